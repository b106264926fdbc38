"""What the rest of the package needs to know of an array, whichever library made it."""

import ctypes
import functools
import math
import operator
import sys
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from gpuadam.kernels import dlpack
from gpuadam.kernels.messages import shortened, shown
from gpuadam.kernels.streams import LEGACY_DEFAULT


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
    bits: str = ""  # the format that the elements of an array of integers stand for, if the caller or its library named one
    immutable: str = ""  # why it must not be written, beyond being read-only
    of_complex: str = ""  # the name of the complex dtype whose parts these are, in a last dimension of 2

    @property
    def format(self):
        """The name of what a number is: "float32", "bfloat16"."""
        return self.bits or _name(self.dtype.base)

    def in_parts(self):
        """Return the View of an array of complex numbers as one of their real and imaginary parts, in a last dimension of 2."""
        real = np.dtype(f"f{self.dtype.itemsize // 2}").newbyteorder(self.dtype.byteorder)
        shape, strides = (*self.shape, 2), (*self.strides, real.itemsize)
        on_host = isinstance(self.array, np.ndarray)
        array = self.array[..., None].view(real) if on_host else InParts(self, shape, real, strides)
        return self._replace(array=array, shape=shape, dtype=real, strides=strides, of_complex=self.dtype.name)

    def in_vectors(self, numbers):
        """Return the View as one whose elements are vectors of so many numbers, those of the last dimension, without gaps."""
        if numbers == 1:
            return self
        vector = np.dtype((self.dtype, (numbers,)))
        return self._replace(shape=self.shape[:-1], strides=self.strides[:-1], dtype=vector)

    @property
    def flat(self):
        """The View of an array without gaps as one of its numbers in a row."""
        number = self.dtype.base
        return self._replace(shape=(self.nbytes // number.itemsize,), strides=(number.itemsize,), dtype=number)

    def of_rows(self, shape):
        """Return the View as one of a shape whose leading dimensions it has: each element stands for all that is behind it."""
        missing = len(shape) - len(self.shape)
        if missing <= 0 or self.shape != tuple(shape[:-missing]):
            return self
        return self._replace(shape=tuple(shape), strides=self.strides + (0,) * missing, contiguous=False)

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * self.dtype.itemsize


_name = functools.cache(operator.attrgetter("name"))  # which NumPy puts together anew each time


class InParts:
    """An array of complex numbers in CUDA memory as one of their parts, which its library may not be able to make of it."""

    def __init__(self, view, shape, dtype, strides):
        self.array = view.array  # kept alive
        described = {"data": (view.pointer, not view.writeable), "shape": shape, "strides": strides, "typestr": dtype.str}
        self.__cuda_array_interface__ = described | {"version": 3, "stream": view.stream or None}


BitsFormat: TypeAlias = Literal["bfloat16", "float16"]


class Bits(NamedTuple):
    """An array of 16-bit integers whose bits are numbers of a format that its library may not know: "bfloat16" or "float16".

    >>> import numpy as np, gpuadam
    >>> ones = np.full(3, 0x3F80, "uint16")
    >>> param = gpuadam.Bits(ones, "bfloat16")
    """

    array: Any  # of 16-bit integers
    format: BitsFormat


def on_cpu(name, array):
    """View a NumPy array, or anything that shares CPU memory through DLPack."""
    bits = ""
    if type(array) is not np.ndarray:
        if not isinstance(array, np.ndarray):
            shared = borrowed(name, array)
            array, bits = np.asarray(shared), shared.bits
        # a subclass may have its own idea of shape, as a matrix, which is always 2-D, and of `view`
        array = np.ndarray.view(array, np.ndarray)
    pointer, flags = _address(array), array.flags
    writeable, contiguous = flags.writeable, flags.c_contiguous
    return View(name, array, pointer, array.shape, array.strides, array.dtype, writeable, contiguous, None, bits=bits)


def borrowed(name, array, **stream):
    """Return the dlpack.Borrowed memory of an array. stream: of the GPU that is to wait for the array's library."""
    try:
        return dlpack.Borrowed(array, **stream)
    except Exception as error:  # what a producer raises is up to it
        raise TypeError(f"{name}, {a_kind(array)}, cannot be shared by DLPack: {shortened(str(error))}") from error


def _address(array):
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # a fifth of the time of the interface's dict
    except (TypeError, ValueError):  # read-only, empty or not C-contiguous
        return array.__array_interface__["data"][0]


def on_cuda(name, array, device_of):
    """View an array with `__cuda_array_interface__`. device_of(pointer) asks the driver for the device's number."""
    try:
        interface = array.__cuda_array_interface__
        pointer, read_only = interface["data"]
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        strides = interface.get("strides")
    except Exception as error:  # what a producer raises is up to it
        raise TypeError(
            f"{name}, {a_kind(array)}, does not describe its CUDA memory by __cuda_array_interface__ ({shown(error)}): "
            "convert it, with cupy.from_dlpack for example"
        ) from error
    if interface.get("mask") is not None:
        raise TypeError(f"{name} has a mask, which an update cannot heed. Pass an array without one")
    pointer = pointer or 0  # None, in some libraries, where there are no elements
    in_c_order = tuple(dtype.itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape)))
    if hasattr(array, "__cuda_ndarray__"):  # Numba's interface says None, contiguous, of a broadcast array too
        strides = array.strides
    strides = tuple(strides or in_c_order)
    device = device_of(pointer) if math.prod(shape) else None
    stream = interface.get("stream")
    if stream is None and device is not None:
        # two libraries do not name the stream that their work is on. 1 is the interface's name for the default stream
        torch = sys.modules.get("torch")
        if hasattr(array, "__cuda_ndarray__"):
            stream = LEGACY_DEFAULT
        elif torch is not None and isinstance(array, torch.Tensor):
            stream = torch_stream(device)
    bits = array.bits if type(array) is dlpack.Borrowed else ""
    contiguous = strides == in_c_order or device is None  # an empty array may have any strides
    return View(name, array, pointer, shape, strides, dtype, not read_only, contiguous, device, stream, bits)


def torch_stream(device):
    """Return the handle of torch's current stream on a device."""
    return sys.modules["torch"].cuda.current_stream(device).cuda_stream or LEGACY_DEFAULT


def on_device(name, array, backend):
    """Return an array with `__cuda_array_interface__` as it is, and what a GPU backend has to borrow by DLPack so."""
    # JAX's interface names no stream, and its work is on one of its own, which DLPack waits for
    if hasattr(array, "__cuda_array_interface__") and not is_jax(array):
        return array
    _, device = array.__dlpack_device__()
    with backend.on(device, None):
        return borrowed(name, array, stream=backend.current_stream() or LEGACY_DEFAULT)


def is_jax(array):
    return type(array).__module__.partition(".")[0] in ("jax", "jaxlib")


def bare(arrays):
    """Return the arrays, those in Bits without them, and the formats that Bits named."""
    if Bits not in set(map(type, arrays)):
        return arrays, []
    formats = [a.format if type(a) is Bits else None for a in arrays]
    return [a.array if type(a) is Bits else a for a in arrays], formats


def type_name(cls):
    """Return the full name of a type, by which one is known without importing its library."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_array(value):
    """Whether a hyperparameter is given as an array rather than as a number."""
    cls = type(value)
    return cls is not float and (hasattr(cls, "__dlpack__") or hasattr(cls, "__cuda_array_interface__"))


def always_cuda(array):
    """Whether an array is of a type whose memory is a GPU's, known without asking for its interface."""
    return type_name(type(array)) in ("cupy.ndarray", "numba.cuda.cudadrv.devicearray.DeviceNDArray")


def a_kind(array):
    """Return what an error message calls an array: "a numpy.ndarray", "an int"."""
    cls = type(array)
    name = cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"
