"""`Adam` over shards: the optimizer that a rank updates its part of a bucket with."""

from ..kernels.view import Bits
from ..optimizer import Adam
from ..state import key_of_parameter


class ShardAdam(Adam):
    """Adam of any algorithm and decay, over OwnedShards, which get their state from it.

    Random rounding goes by a shard's place in its parameter. options: `Options`. settings: hyperparameters, and the backend.
    """

    def __init__(self, shards, options, components=1, **settings):
        self.algorithm, self.decoupled = options.algorithm, options.decoupled
        params = {shard.label: in_vectors(shard.param, components) for shard in shards}
        # ShardedAdam zeroes the gradients, not their sums
        super().__init__(params, components=components, **settings, **options.saved() | {"zero_grad": False})
        for shard, parameter in zip(shards, self.parameters.values(), strict=True):
            parameter.key = key_of_parameter(options.seed, shard.number)
            parameter.start = shard.start // components
            shard.state = parameter.state

    def warn_of_no_effect(self, options):
        """Warn of nothing: `ShardedAdam` has, of all parameters and not of those of a shard."""


def in_vectors(array, numbers):
    """Return a 1-D array as one of vectors of so many numbers; of one number as it is."""
    if numbers == 1:
        return array
    return Bits(in_vectors(array.array, numbers), array.format) if type(array) is Bits else array.reshape(-1, numbers)
