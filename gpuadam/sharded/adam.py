"""`Adam` over shards: the optimizer that a rank updates its part of a bucket with."""

from ..optimizer import Adam, key_of_parameter


class ShardAdam(Adam):
    """Adam of any algorithm and decay, over parts of parameters.

    params: name -> array. places: name -> (number of the parameter, number of its first element that is here), by which numbers
        are rounded randomly. options: `Options`. settings: hyperparameters, and the backend.
    """

    def __init__(self, params, places, options, **settings):
        self.algorithm, self.decoupled = options.algorithm, options.decoupled
        # ShardedAdam zeroes the gradients, not their sums
        super().__init__(params, **settings, **options.saved() | {"zero_grad": False})
        for name, (number, start) in places.items():
            self.parameters[name].key = key_of_parameter(options.seed, number)
            self.parameters[name].start = start
