"""The norm of all gradients as one vector, on their device, for clipping by it."""

from collections.abc import Iterator, Mapping, ValuesView

import numpy as np

from . import backends, checks
from .groups import is_sequence
from .kernels import norm_order as order
from .kernels import streams
from .kernels import view as arrays


def global_norm(grads, *, out=None, backend=None, stream=None):
    """Return the square root of the sum of the squares of all elements of all arrays, in their memory.

    grads: one array, or a sequence or dict of arrays, or of such; None is skipped. float32, float64, bfloat16 or float16, of any
        shapes and strides, on one device: NumPy, CuPy, Numba device arrays, `Bits`, or anything with DLPack or
        `__cuda_array_interface__`. They are only read.
    out: an array of shape () and dtype float64 beside them, to write the norm to and return. By default a new one: a NumPy
        array, or of the backend's library on a GPU.
    backend: "cupy", "numba-cuda" or "numba-cpu"; by default the arrays decide.
    stream: on a GPU, where to enqueue the work, as in `adam_step`.

    The sum is float64, in an order that depends on nothing but the places of the elements (`gpuadam/kernels/norm_order.py`): the
    bits are the same on every backend and with any number of threads. If an element is infinite or NaN, the norm is not finite.
    It is also infinite where the sum of squares is more than float64 holds, which only float64 elements can reach.

    On a GPU the call returns before the norm is there, and never waits for the device. A graph can capture it if out is given
    and the same call was made once before.

    Raises ValueError (no array at all, different devices, out of another shape or device, read-only, or one that shares memory
    with an array), TypeError (dtypes, not an array, arrays of different libraries), BackendUnavailableError, or RuntimeError
    while a graph is captured without out, each before anything is written.

    >>> import numpy as np, gpuadam
    >>> grads = {"w": np.array([[1.0, 2.0], [4.0, 10.0]], "float32"), "b": np.zeros(3, "float32"), "frozen": None}
    >>> gpuadam.global_norm(grads)
    array(11.)
    """
    named = list(named_arrays("grads", grads))
    if not named:
        raise ValueError("there is no array to take the norm of: grads must have one at least, which may be empty")
    kernels, views = backends.choose([*named, ("out", out)], backend)
    *views, place = views
    for view in views:
        _check(view)
    device = _one_device(views)
    if place is not None:
        _check_out(place, views, device)
    result = kernels.norm(views, place, device, streams.handle(stream))
    return result if out is None else out


def named_arrays(name, x):
    """Give what errors call each array, and the array."""
    if x is None:
        return
    if type(x) is arrays.Bits:  # a tuple, and one array
        yield name, x
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from named_arrays(f"{name}[{key!r}]", value)
    elif is_sequence(x) or isinstance(x, (Iterator, ValuesView)):
        for k, value in enumerate(x):
            yield from named_arrays(f"{name}[{k}]", value)
    else:
        yield name, x


def _check(view):
    if order.format_of(view) is None:
        checks.one_format(view, tuple(order.FORMATS))
    itemsize = view.dtype.itemsize
    if view.device is not None and (view.pointer % itemsize or any(s % itemsize for s in view.strides)):
        raise ValueError(f"{view.name} is not aligned to its {itemsize}-byte elements, which a GPU needs. Pass a copy")


def _one_device(views):
    """Return the device of the arrays; None for the CPU, or if they have no elements and are nowhere."""
    placed = [view for view in views if view.device is not None]
    for view in placed:
        if view.device != placed[0].device:
            raise ValueError(
                f"{view.name} is on device {view.device}, {placed[0].name} on {placed[0].device}: a norm is of arrays on one "
                "device. Move them, or take the norm of each device's and then of those"
            )
    return placed[0].device if placed else None


def _check_out(out, views, device):
    if out.shape != ():
        raise ValueError(f"out has shape {out.shape}; a norm is one number, of shape ()")
    if out.dtype != np.dtype("float64"):
        raise TypeError(f"out has dtype {out.dtype}; a norm is float64")
    if not out.writeable:
        raise ValueError("out is read-only: pass a writeable array")
    if None not in (device, out.device) and out.device != device:
        raise ValueError(f"out is on device {out.device}, {views[0].name} on {device}: pass one that is beside the arrays")
    if out.device is not None and out.pointer % out.dtype.itemsize:
        raise ValueError("out is not aligned to its 8-byte elements, which a GPU needs. Pass another array")
    checks.overlap([out], views)
