"""The norms of a step, for rules that say when to stop: of the change that it makes, and of the parameters after it."""

from typing import Any, NamedTuple

from . import backends, clipping
from .kernels.messages import shown


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


def norms_of(params, kept, asked):
    """Return the `change_sums.NormPasses` of a step.

    params: name -> array, of all parameters. kept: the backend and the StepNorms of an earlier step, to be written again; None
    for new arrays. asked: the backend that the optimizer was given, or None. Raises what `global_norm` raises, of the parameters.
    """
    backend, views = backends.choose([(f"params[{shown(name)}]", array) for name, array in params.items()], asked)
    device, out = clipping.checked(views), []
    if kept and kept[0] is backend:
        out = [backend.view("norms", array) for array in kept[1]]
    if any(None is not device != view.device for view in out):
        out = []
    return backend.step_norms(dict(zip(params, views, strict=True)), device, out)
