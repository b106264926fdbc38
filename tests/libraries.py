"""How the tests make arrays for each backend and read them back."""

import numpy as np


class NumpyLibrary:
    backend = "numba-cpu"

    def array(self, a):
        return np.array(a, order="K", subok=False)  # a copy, of the same layout

    def numpy(self, array):
        return np.array(array)


class CupyLibrary:
    backend = "cupy"

    def __init__(self):
        import cupy

        self.cupy = cupy

    def array(self, a):
        """Copy, keeping strides: the whole of the base goes over, then the same view is taken."""
        base, view = _base_of(a)
        there = self.cupy.asarray(base)
        memory = self.cupy.cuda.MemoryPointer(there.data.mem, there.data.ptr - there.data.mem.ptr + view["offset"])
        return self.cupy.ndarray(a.shape, a.dtype, memory, view["strides"])

    def numpy(self, array):
        return self.cupy.asnumpy(array)


class NumbaCudaLibrary:
    backend = "numba-cuda"

    def __init__(self):
        from numba import cuda

        self.cuda = cuda

    def array(self, a):
        if a.flags.c_contiguous or a.flags.f_contiguous:
            return self.cuda.to_device(a)
        base, view = _base_of(a)
        return StridedDeviceArray(self.cuda.to_device(base), a, view)

    def numpy(self, array):
        if not isinstance(array, StridedDeviceArray):
            return array.copy_to_host()
        whole = array.base.copy_to_host()
        return np.ndarray(array.shape, array.dtype, whole, array.offset, array.strides).copy()


class StridedDeviceArray:
    """A view of any strides of a Numba device array, which Numba itself cannot make."""

    def __init__(self, base, a, view):
        self.base, self.shape, self.dtype, self.strides, self.offset = (
            base,
            a.shape,
            a.dtype,
            view["strides"],
            view["offset"],
        )
        self.__cuda_array_interface__ = base.__cuda_array_interface__ | {
            "shape": a.shape,
            "strides": view["strides"],
            "typestr": a.dtype.str,
            "data": (base.__cuda_array_interface__["data"][0] + view["offset"], False),
        }


def _base_of(a):
    """Return the bytes that an array's view lies in, and where it starts."""
    if a.size == 0:
        return np.zeros(0, "u1"), {"offset": 0, "strides": None}
    start, end = np.lib.array_utils.byte_bounds(a)
    whole = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * (end - start)).from_address(start)).copy()
    return whole, {"offset": a.__array_interface__["data"][0] - start, "strides": a.strides}


LIBRARIES = {"cupy": CupyLibrary, "numba-cuda": NumbaCudaLibrary, "numba-cpu": NumpyLibrary}
