"""The norm of all gradients as one vector, and what depends on it: whether a step clips, and whether it is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, ValuesView
from typing import Any

import numpy as np

from . import backends, checks
from .groups import is_sequence
from .hyperparameters import NO_SCALE
from .kernels import norm_order as order
from .kernels import streams
from .kernels.messages import shortened
from .kernels.scalars import on_host
from .kernels.view import Bits, is_array
from .remembered import NormsOnGpu
from .typing import Array, ArrayTree, Stream

_NORMS = NormsOnGpu()


def global_norm(
    grads: ArrayTree, *, out: Array | None = None, backend: str | None = None, stream: Stream | None = None
) -> Any:
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
    and the norm of arrays of these shapes was taken once before, which loads the kernels.

    Raises ValueError (no array at all, different devices, out of another shape or device, read-only, or one that shares memory
    with an array), TypeError (dtypes, not an array, arrays of different libraries), BackendUnavailableError, or RuntimeError
    while a graph is captured without out or without such a norm before, each before anything is written.

    >>> import numpy as np, gpuadam
    >>> grads = {"w": np.array([[1.0, 2.0], [4.0, 10.0]], "float32"), "b": np.zeros(3, "float32"), "frozen": None}
    >>> gpuadam.global_norm(grads)
    array(11.)
    """
    named = [(shortened(name), array) for name, array in named_arrays("grads", grads)]
    if not named:
        raise ValueError("there is no array to take the norm of: grads must have one at least, which may be empty")
    stream = None if stream is None else streams.handle(stream)
    key = _NORMS.key([array for _, array in named], out, backend)
    if key and (result := _NORMS.taken(key, out, stream)) is not None:
        return result
    kernels, views = backends.choose([*named, *([] if out is None else [("out", out)])], backend)
    place = None if out is None else views.pop()
    device = checked(views)
    if place is not None:
        _check_out(place, views, device)
    result = _NORMS.take(key, kernels, views, device, place, stream) if key and device is not None else None
    if result is None:
        result = kernels.norm(views, place, device, stream)
    return result if out is None else out


def norm_in_place(grads, norms, backend=None, stream=None):
    """Return the norm of a list of gradients: a number, or on a GPU an array.

    norms: such arrays, one for each device and library. Captured graphs know them, so the one that is beside the gradients is
    written again; a new one is added.
    """
    for out in (*norms, None):
        try:
            norm = global_norm(grads, out=out, backend=backend, stream=stream)
            break
        except (TypeError, ValueError):  # out is elsewhere; or the gradients are wrong, which the call without out says
            if out is None:
                raise
    if isinstance(norm, np.ndarray):
        return norm.item()
    if out is None:
        norms.append(norm)
    return norm


def named_arrays(name, x, around=()):
    """Give what errors call each array, and the array. around: the lists and dicts that x is in."""
    if x is None:
        return
    if type(x) is Bits:  # a tuple, and one array
        yield name, x
    elif isinstance(x, Mapping):
        around = _further_in(name, x, around)
        for key, value in x.items():
            yield from named_arrays(f"{name}[{key!r}]", value, around)
    elif is_sequence(x) or isinstance(x, (Iterator, ValuesView)):
        around = _further_in(name, x, around)
        for k, value in enumerate(x):
            yield from named_arrays(f"{name}[{k}]", value, around)
    else:
        yield name, x


def _further_in(name, x, around):
    """Return what the members of a list or dict are in. Refuse one that is in itself, whose arrays have no end."""
    if any(x is one for one in around):
        raise ValueError(f"{shortened(name)} is a {type(x).__name__} that is in itself: give one that has each array once")
    return *around, x


NORMED = tuple(order.FORMATS)  # formats that a norm takes


def checked(views):
    """Check the arrays of a norm. Return their device; None for the CPU, or if they have no elements and are nowhere."""
    for view in views:
        checks.one_format(view, NORMED)
        checks.layout(view, written=False)
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
        raise TypeError(f"out has dtype {shortened(str(out.dtype))}; a norm is float64")
    if not out.writeable:
        raise ValueError("out is read-only: pass a writeable array")
    if None not in (device, out.device) and out.device != device:
        raise ValueError(f"out is on device {out.device}, {views[0].name} on {device}: pass one that is beside the arrays")
    if out.device is not None and out.pointer % out.dtype.itemsize:
        raise ValueError("out is not aligned to its 8-byte elements, which a GPU needs. Pass another array")
    checks.overlap([out], views)


# The norm of gradients from which one of their squares may overflow the type that is computed with
LARGEST_NORM = {np.dtype(name): float(np.sqrt(np.float64(np.finfo(name).max))) for name in ("float32", "float64")}


def conditions(grad_scale, max_norm, norm, check_finite, found_inf, capturable, device_mode, largest_norm):
    """Return a step's grad_scale, whether it is left out, as far as the host knows, and what a device decides of it.

    The last is a dict of arguments of `device_step.Now`, or None. See `Adam.step` for the arguments here, which are checked.
    device_mode: whether the step's scalars are computed on a device, which only a capturable optimizer's are.
    largest_norm: that is taken for finite.
    """
    left_out = False
    on_device: dict[str, Any] = {}
    on_host: dict[str, Any] = {}
    norm, found_inf = backends.on_host("norm", norm), backends.on_host("found_inf", found_inf)
    if not is_array(found_inf):
        left_out = checks.found_inf(found_inf)
        on_host |= {} if found_inf is None else {"found_inf": found_inf}
    elif device_mode:
        on_device["found_inf"] = found_inf
    else:
        raise ValueError(
            "found_inf is an array on a GPU, which the step does not wait for: make the optimizer capturable=True"
        )
    if is_array(norm):
        if capturable and not device_mode:
            refuse_on_gpu("norm")
        if check_finite and not device_mode:
            raise ValueError("check_finite on a GPU needs an optimizer with capturable=True: the step does not wait to know")
        on_device |= {"norm": norm, "max_norm": max_norm} | ({"largest_norm": largest_norm} if check_finite else {})
    elif norm is not None:
        on_host["norm"] = norm
        norm = checks.norm(norm)
        if is_array(grad_scale):
            raise TypeError("grad_scale is on a GPU and norm is a number: give both there, or both as numbers")
        left_out = left_out or (check_finite and not norm * abs(grad_scale) <= largest_norm)
        if max_norm is not None:
            grad_scale = clipped(checks.finite("grad_scale", grad_scale), norm, max_norm)
    if device_mode:
        on_device["on_host"] = on_host
    return grad_scale, left_out, on_device or None


def refuse_on_gpu(name):
    """Raise TypeError for a condition of a step that is on a GPU, where parameters are on the CPU."""
    raise TypeError(f"{name} is on a GPU, and parameters are on the CPU: give it as a number, float({name})")


def clipped(grad_scale, norm, max_norm):
    """Return the grad_scale that clips gradients of a norm, as a device does it; NO_SCALE if the norm is NaN.

    >>> round(clipped(0.5, norm=4.0, max_norm=1.0), 6)  # scaled, the norm is 2
    0.25
    """
    scale = on_host().clipped(grad_scale, norm, max_norm)
    return NO_SCALE if math.isnan(scale) else scale
