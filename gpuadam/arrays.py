"""What the rest of the package needs to know of an array, whichever library made it."""

import ctypes
import functools
import itertools
import math
import operator
import sys
from typing import Any, NamedTuple

import numpy as np


class View(NamedTuple):
    """An array as the checks and the kernels see it. Nothing is copied: the memory is the caller's."""

    name: str  # as the caller knows it: "grad", "params['w1']"
    array: Any  # a numpy.ndarray or cupy.ndarray, or the caller's object, which it keeps alive
    pointer: int
    shape: tuple
    strides: tuple  # in bytes
    dtype: np.dtype
    writeable: bool
    contiguous: bool  # in C order, without gaps
    device: int | None  # the CUDA device's number; None for the CPU
    stream: int | None = None  # the CUDA stream that wrote it last, if its library says so
    bits: str = ""  # the format that the elements of an array of integers stand for, if the caller named one

    @property
    def format(self):
        """The name of what an element is: "float32", "bfloat16"."""
        return self.bits or _name(self.dtype)

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * self.dtype.itemsize


_name = functools.cache(operator.attrgetter("name"))  # which NumPy puts together anew each time


class Bits(NamedTuple):
    """An array of 16-bit integers whose bits are numbers of a format that its library may not know: "bfloat16" or "float16".

    >>> import numpy as np, gpuadam
    >>> ones = np.full(3, 0x3F80, "uint16")
    >>> param = gpuadam.Bits(ones, "bfloat16")
    """

    array: Any
    format: str


def as_bits(array):
    """Return a bfloat16 tensor of torch, which NumPy and `__cuda_array_interface__` do not know, as Bits; all else as it is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor) and array.dtype is torch.bfloat16:
        return Bits(array.view(torch.int16), "bfloat16")
    return array


def on_cpu(name, array):
    """View a NumPy array, or anything that shares CPU memory through DLPack."""
    if type(array) is not np.ndarray:
        if not isinstance(array, np.ndarray):
            try:
                array = np.from_dlpack(array)
            except Exception as error:  # what a producer raises is up to it
                raise TypeError(f"{name}, a {kind(array)}, cannot be shared with NumPy: {error}") from error
        array = array.view(np.ndarray)  # a subclass may have its own idea of shape: a matrix is always 2-D
    pointer, flags = _address(array), array.flags
    return View(name, array, pointer, array.shape, array.strides, array.dtype, flags.writeable, flags.c_contiguous, None)


def _address(array):
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # a fifth of the time of the interface's dict
    except (TypeError, ValueError):  # read-only, empty or not C-contiguous
        return array.__array_interface__["data"][0]


def on_cuda(name, array, device_of):
    """View an array in CUDA memory. device_of(pointer) asks the driver for the device's number."""
    try:
        interface = array.__cuda_array_interface__
        pointer, read_only = interface["data"]
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        strides = interface.get("strides")
    except Exception as error:  # what a producer raises is up to it
        raise TypeError(
            f"{name}, a {kind(array)}, does not describe its CUDA memory by __cuda_array_interface__ ({error!r}): "
            "convert it, with cupy.from_dlpack for example"
        ) from error
    if interface.get("mask") is not None:
        raise TypeError(f"{name} has a mask, which an update cannot heed. Pass an array without one")
    pointer = pointer or 0  # None, in some libraries, where there are no elements
    in_c_order = contiguous_strides(shape, dtype.itemsize)
    if hasattr(array, "__cuda_ndarray__"):  # Numba's interface says None, contiguous, of a broadcast array too
        strides = array.strides
    strides = tuple(strides or in_c_order)
    device = device_of(pointer) if math.prod(shape) else None
    stream = interface.get("stream")
    if stream is None and device is not None:
        # two libraries do not name the stream that their work is on. 1 is the interface's name for the default stream
        torch = sys.modules.get("torch")
        if hasattr(array, "__cuda_ndarray__"):
            stream = 1
        elif torch is not None and isinstance(array, torch.Tensor):
            stream = torch.cuda.current_stream(device).cuda_stream or 1
    return View(name, array, pointer, shape, strides, dtype, not read_only, strides == in_c_order, device, stream)


_CUPY = "cupy.ndarray"
_NUMBA = "numba.cuda.cudadrv.devicearray.DeviceNDArray"
_NUMBA_DESCRIBED = operator.attrgetter("device_ctypes_pointer.value", "shape", "strides", "dtype", "stream")
# By type, so that nothing is imported: all that checks and launches depend on of an array in CUDA memory; and what of that can
# change while it is the same object.
_DESCRIBED = {_CUPY: operator.attrgetter("data.ptr", "shape", "strides", "dtype"), _NUMBA: _NUMBA_DESCRIBED}
_CHANGING = {_CUPY: operator.attrgetter("shape"), _NUMBA: _NUMBA_DESCRIBED}


class Description(NamedTuple):
    """What was found of the arrays of many updates, to be compared with what is found later."""

    held: list[Any]  # params and state, compared by identity
    changing: list[Any]
    grads: list[Any]

    def same(self, other):
        return (
            len(self.held) == len(other.held)
            and all(map(operator.is_, self.held, other.held))
            and self.changing == other.changing
            and self.grads == other.grads
        )


def description(columns):
    """Return the Description of the params, grads and state of updates, or None if one is of a type that is not known here."""
    params, grads, *state = columns
    held, formats = bare([*params, *itertools.chain.from_iterable(state)])
    grads, formats_of_grads = bare(grads)
    changing, described = _read(held, _CHANGING), _read(grads, _DESCRIBED)
    if changing is None or described is None:
        return None
    return Description(held, changing + formats, described + formats_of_grads)


def bare(arrays):
    """Return the arrays, those in Bits without them, and the formats that Bits named."""
    if Bits not in set(map(type, arrays)):
        return arrays, []
    formats = [a.format if type(a) is Bits else None for a in arrays]
    return [a.array if type(a) is Bits else a for a in arrays], formats


def _read(arrays, getters):
    read: list[Any] = []
    for kind, run in itertools.groupby(arrays, type):
        getter = getters.get(f"{kind.__module__}.{kind.__qualname__}")
        if getter is None:
            return None
        read.append(kind)
        read += map(getter, run)
    return read


def always_cuda(array):
    """Whether an array is of a type whose memory is a GPU's, known without asking for its interface."""
    kind = type(array)
    return f"{kind.__module__}.{kind.__qualname__}" in _DESCRIBED


def contiguous_strides(shape, itemsize):
    """Return the strides, in bytes, of a C-contiguous array.

    >>> contiguous_strides((2, 3), 4)
    (12, 4)
    """
    return tuple(itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape)))


def kind(array):
    """Return what an error message calls an array: "numpy.ndarray", "list"."""
    cls = type(array)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
