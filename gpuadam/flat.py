"""Many parameters in one buffer: one array to the optimizer, the old arrays to everyone else."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import backends, checks
from .kernels.layout import VECTOR_BYTES


class Flat(NamedTuple):
    """What `flatten` returns. `params` and `grads` are views of the two buffers, in the shapes and structure of the arrays."""

    param: Any  # 1-D: every array after the other
    grad: Any  # 1-D: zeros
    params: Any
    grads: Any


def flatten(arrays, backend=None):
    """Copy arrays into one buffer, and return it with views of it in their shapes and, likewise, a buffer of zeros for gradients.

    arrays: one array, a sequence or a dict name -> array: of one dtype, on one device; NumPy, CuPy or Numba device arrays.
    backend: as in `adam_step`; by default the arrays decide.

    The buffer is C-contiguous. Each array starts at a multiple of 16 bytes; the elements between are 0, and stay 0 under an
    optimizer while their gradients do. An optimizer over `param` has one array, whatever the number of views, and its step one
    launch and no table. From then on use the views: the arrays that were given are copied and left as they are.

    Raises ValueError for no arrays or more than one device, TypeError for more than one dtype or library.

    >>> import numpy as np, gpuadam
    >>> flat = gpuadam.flatten({"w": np.ones((2, 3), "float32"), "b": np.zeros(2, "float32")})
    >>> opt = gpuadam.Adam(flat.param, lr=0.1)
    >>> flat.grads["w"][0] = 5.0
    >>> opt.step(flat.grad)
    >>> print(flat.params["w"])
    [[0.9 0.9 0.9]
     [1.  1.  1. ]]
    """
    if isinstance(arrays, Mapping):
        named = [(f"arrays[{name!r}]", array) for name, array in arrays.items()]
    elif isinstance(arrays, (list, tuple)):
        named = [(f"arrays[{k}]", array) for k, array in enumerate(arrays)]
    else:
        named = [("arrays", arrays)]
    if not named:
        raise ValueError("there are no arrays to flatten")
    for name, array in named:
        checks.given(name, array)
    kernels, views = backends.choose(named, backend)
    first = views[0]
    for view in views:
        checks.one_format(view, checks.FORMATS)
        checks.layout(view)
        if view.dtype != first.dtype:
            raise TypeError(
                f"{view.name} has dtype {view.dtype}, {first.name} has {first.dtype}: flatten each dtype by itself"
            )
    devices = {view.device: view.name for view in views if view.size}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(devices.values())} are on devices {sorted(devices)}: flatten each device by itself")
    device = next(iter(devices), 0)

    lanes = VECTOR_BYTES // first.dtype.itemsize
    starts = [0]
    for view in views:
        starts.append(starts[-1] + -(-view.size // lanes) * lanes)
    param, grad = (kernels.zeros(starts[-1], first.dtype, device) for _ in range(2))
    params, grads = (
        [buffer[start : start + view.size].reshape(view.shape) for start, view in zip(starts, views, strict=False)]
        for buffer in (param, grad)
    )
    for own, view in zip(params, views, strict=True):
        to = kernels.view(view.name, own)
        checks.same_layout(to, view, kernels.copies_any_layout)
        kernels.copy(to, view)
    if isinstance(arrays, Mapping):
        return Flat(param, grad, dict(zip(arrays, params, strict=True)), dict(zip(arrays, grads, strict=True)))
    if isinstance(arrays, (list, tuple)):
        return Flat(param, grad, params, grads)
    return Flat(param, grad, params[0], grads[0])
