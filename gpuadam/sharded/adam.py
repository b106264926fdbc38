"""`Adam` over parts of parameters: what a rank updates its shards with, and what all ranks check their options with."""

from .. import hyperparameters
from ..optimizer import Adam, key_of_parameter


class ShardAdam(Adam):
    """Adam of any algorithm and decay, over parameters or over parts of them.

    places: name -> (number of the parameter, number of its first element that is here), for random rounding. By default all
        parameters are whole, and numbered in order.
    """

    def __init__(self, algorithm, decoupled, params, places=None, **options):
        self._algorithm, self._decoupled = algorithm, decoupled
        super().__init__(params, **options)
        if places:
            self._keys = {name: key_of_parameter(self._seed, number) for name, (number, _) in places.items()}
            self._starts = {name: start for name, (_, start) in places.items()}

    @property
    def computed_in(self):
        """Return name -> dtype of the arithmetic of each parameter's update."""
        return self._computed_in

    def checked(self, groups, step, grad_scale):
        """Return the Hyperparameters of each of some groups with this optimizer's parameters, after checking them.

        step: the number of the step that a callable lr is called with.
        """
        checked = []
        for group, structure in zip(groups, self._structures, strict=True):
            h = self._checked(group, structure, step, grad_scale)
            for dtype in {self._computed_in[name] for name in structure.names}:
                hyperparameters.check_rounding(h, dtype)
            checked.append(h)
        return checked
