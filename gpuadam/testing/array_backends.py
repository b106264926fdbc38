"""Arrays of each backend, by the same few functions, so that a test is written once."""

import ctypes
import functools

import numpy as np

from .. import backends
from ..kernels.view import Bits


class ArrayBackend:
    """A backend's name, and how arrays are made in its memory and read back."""

    name: str
    on_gpu: bool

    def array(self, a):
        """Return a copy of a NumPy array, or of what NumPy makes one of, in this backend's memory, of the same layout.

        NumPy alone knows the bfloat16 of ml_dtypes: on a GPU the copy is `gpuadam.Bits`.
        """
        a = np.asarray(a)
        if self.on_gpu and a.dtype.name == "bfloat16":
            return Bits(self._copy(a.view("u2")), "bfloat16")
        return self._copy(a)

    def zeros(self, shape, dtype="float32"):
        """Return zeros in this backend's memory."""
        return self._copy(np.zeros(shape, dtype))

    def flag(self, value):
        """Return a flag in this backend's memory, an array of one float32, for `step(found_inf=...)`."""
        return self._copy(np.array([value], "float32"))

    def numpy(self, array):
        """Return a copy of an array of this backend as a NumPy array, after waiting for the device. Bits come as numbers."""
        if type(array) is not Bits:
            return self._read(array)
        bits = self._read(array.array).view("u2")
        return bits.view("f2") if array.format == "float16" else (bits.astype("u4") << 16).view("f4")

    def synchronize(self):
        """Wait until the device has done what it was given."""

    def __repr__(self):
        return f"<arrays of {self.name}>"

    def _copy(self, a):
        raise NotImplementedError

    def _read(self, array):
        raise NotImplementedError


class NumpyBackend(ArrayBackend):
    name, on_gpu = "numba-cpu", False

    def _copy(self, a):
        return np.array(a, order="K")

    def _read(self, array):
        return np.array(array)


class CupyBackend(ArrayBackend):
    name, on_gpu = "cupy", True

    def __init__(self):
        import cupy

        self.cupy = cupy

    def _copy(self, a):
        """Copy, keeping strides: the whole of the base goes over, then the same view is taken."""
        base, offset, strides = _base_of(a)
        there = self.cupy.asarray(base)
        memory = self.cupy.cuda.MemoryPointer(there.data.mem, there.data.ptr - there.data.mem.ptr + offset)
        return self.cupy.ndarray(a.shape, a.dtype, memory, strides)

    def _read(self, array):
        self.synchronize()
        return self.cupy.asnumpy(array)

    def synchronize(self):
        self.cupy.cuda.Device().synchronize()


class NumbaCudaBackend(ArrayBackend):
    name, on_gpu = "numba-cuda", True

    def __init__(self):
        from numba import cuda

        self.cuda = cuda

    def _copy(self, a):
        if a.flags.c_contiguous or a.flags.f_contiguous:
            return self.cuda.to_device(a)
        base, offset, strides = _base_of(a)
        return StridedDeviceArray(self.cuda.to_device(base), a, offset, strides)

    def _read(self, array):
        self.synchronize()
        if isinstance(array, StridedDeviceArray):
            whole = array.base.copy_to_host()
            return np.ndarray(array.shape, array.dtype, whole, array.offset, array.strides).copy()
        return self.cuda.as_cuda_array(array, sync=False).copy_to_host()

    def synchronize(self):
        self.cuda.synchronize()


class StridedDeviceArray:
    """A view of any strides of a Numba device array, which Numba itself cannot make."""

    def __init__(self, base, a, offset, strides):
        self.base, self.shape, self.dtype, self.strides, self.offset = base, a.shape, a.dtype, strides, offset
        self.__cuda_array_interface__ = base.__cuda_array_interface__ | {
            "shape": a.shape,
            "strides": strides,
            "typestr": a.dtype.str,
            "data": (base.__cuda_array_interface__["data"][0] + offset, False),
        }


def _base_of(a):
    """Return a copy of the bytes that an array lies in, where in them it starts, and its strides."""
    if a.size == 0:
        return np.zeros(0, "u1"), 0, None
    start, end = np.lib.array_utils.byte_bounds(a)
    whole = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start)).copy()
    return whole, a.__array_interface__["data"][0] - start, a.strides


ARRAY_BACKENDS = {cls.name: cls for cls in (CupyBackend, NumbaCudaBackend, NumpyBackend)}


@functools.cache
def array_backend(name):
    """Return the ArrayBackend of a backend's name, or raise BackendUnavailableError with the reason.

    >>> from gpuadam import testing
    >>> backend = testing.array_backend("numba-cpu")
    >>> param = backend.array(np.float32([1.0, 2.0]))
    >>> backend.numpy(param)
    array([1., 2.], dtype=float32)
    """
    backends.load(backends._known(name, "array_backend"))
    return ARRAY_BACKENDS[name]()
