"""The norms of a step, for rules that say when to stop: of the change that it makes, and of the parameters after it."""

from typing import Any, NamedTuple

from . import backends, clipping
from .kernels import streams
from .kernels.messages import shown
from .kernels.norm_order import chunks_of


class StepNorms(NamedTuple):
    """What `Adam.step` returns with norms=True: float64 arrays of shape () beside the parameters.

    change: the norm of the change of all parameters: the square root of the sum of the squares of (new - old) over all elements.
    param: the norm of all parameters after the step, the bits of `gpuadam.global_norm(params)`.

    >>> import numpy as np, gpuadam
    >>> opt = gpuadam.Adam(np.array([3.0, 4.0]), lr=1.0)
    >>> change, param = opt.step(np.array([5.0, 0.0]), norms=True)  # to 2 and 4
    >>> print(change.round(6), param.round(6))
    1.0 4.472136
    """

    change: Any
    param: Any


class NormsOfStep:
    """The norms of a step that is under way.

    params: name -> array, of all parameters. kept: the backend and the StepNorms of an earlier step, to be written again; None
    for new arrays. asked: the backend that the optimizer was given, or None. Raises what `global_norm` raises, of the parameters.
    """

    begun = False  # whether an update has begun; no norm is one

    def __init__(self, params, kept, asked):
        self.asked = asked
        named = [(f"params[{shown(name)}]", array) for name, array in params.items()]
        self.backend, views = backends.choose(named, asked)
        device, out = clipping.checked(views), []
        if kept and kept[0] is self.backend:
            out = [self.backend.view("norms", array) for array in kept[1]]
        if any(None is not device != view.device for view in out):
            out = []
        self._kept, self._norms = kept[1] if out else None, self.backend.step_norms(views, device, out)
        self._first_sums, total = {}, 0
        for name, view in zip(params, views, strict=True):
            self._first_sums[name] = total
            total += chunks_of(view.size)

    def part(self, group, names, updates, arrays):
        """Return the batch that sums the changes of the parameters of some names: `layout.Update`s of the same arrays."""
        part = self._norms.part(updates, arrays, [self._first_sums[name] for name in names])
        part.group = group
        return part

    def prepare(self, stream):
        """Do what may fail before anything is written, once all parts are prepared. stream: the handle of one, or None."""
        self._norms.prepare(stream)

    def launch(self):
        """Compute the norms, or enqueue it on a GPU, after the updates."""
        self._norms.launch()

    def without_update(self, stream):
        """Compute the norms of a step that updates nothing. stream: as `Adam.step` takes it."""
        self.prepare(streams.handle(stream))
        self.launch()

    def result(self):
        """Return the StepNorms."""
        return self._kept or StepNorms(*self._norms.result)
