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
        base, view = _base_of(a)
        there = self.cuda.to_device(base)
        described = dict(there.__cuda_array_interface__)
        described |= {"shape": a.shape, "strides": view["strides"], "typestr": a.dtype.str}
        described["data"] = (described["data"][0] + view["offset"], False)
        array = self.cuda.from_cuda_array_interface(described, owner=there)
        array.test_base = there
        return array

    def numpy(self, array):
        return array.copy_to_host() if array.is_c_contiguous() else self._strided(array)

    def _strided(self, array):
        whole = array.test_base.copy_to_host()
        offset = array.__cuda_array_interface__["data"][0] - array.test_base.__cuda_array_interface__["data"][0]
        return np.ndarray(array.shape, array.dtype, whole, offset, array.strides).copy()


def _base_of(a):
    """Return the bytes that an array's view lies in, and where it starts."""
    if a.size == 0:
        return np.zeros(0, "u1"), {"offset": 0, "strides": None}
    start, end = np.lib.array_utils.byte_bounds(a)
    whole = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * (end - start)).from_address(start)).copy()
    return whole, {"offset": a.__array_interface__["data"][0] - start, "strides": a.strides}


LIBRARIES = {"cupy": CupyLibrary, "numba-cuda": NumbaCudaLibrary, "numba-cpu": NumpyLibrary}
