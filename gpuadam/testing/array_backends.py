"""Arrays of each backend, by the same few functions, so that a test is written once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import backends, checks
from ..kernels.huge_pages import address_of
from ..kernels.operands import widened
from ..kernels.view import Bits
from ..typing import Array


class ArrayBackend:
    """The arrays of a backend: made in its memory, and read back.

    Attributes: `name`, as in `backend=`; `on_gpu`, whether its memory is a GPU's.
    """

    def __init__(self, name: str) -> None:
        self.name, self.on_gpu = name, backends.BACKENDS[name].memory == "CUDA"
        self._kernels = backends.load(name)

    def array(self, a: npt.ArrayLike) -> Any:
        """Return a copy of a NumPy array, or of what NumPy makes one of, in this backend's memory, of the same layout.

        NumPy alone knows the bfloat16 of ml_dtypes: on a GPU the copy is `gpuadam.Bits`.
        """
        a = np.asarray(a)
        if self.on_gpu and a.dtype.name == "bfloat16":
            return Bits(self._copy(a.view("u2")), "bfloat16")
        return self._copy(a)

    def zeros(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "float32") -> Any:
        """Return zeros in this backend's memory."""
        return self.array(np.zeros(shape, dtype))

    def flag(self, value: float) -> Any:
        """Return a flag in this backend's memory, an array of one float32, for `step(found_inf=...)`."""
        return self.array(np.array([value], "float32"))

    def numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy of an array of this backend as a NumPy array, after waiting for the device. Bits come as numbers."""
        if type(array) is Bits:
            return widened(self._kernels.to_host(array.array).view("f2"), array.format)
        return self._kernels.to_host(array)

    def synchronize(self) -> None:
        """Wait until the device has done all work that was enqueued there."""
        if self.on_gpu:
            self._kernels.synchronize()

    def __repr__(self) -> str:
        return f"<arrays of {self.name}>"

    def _copy(self, a):
        if a.flags.c_contiguous or a.flags.f_contiguous:
            return self._kernels.from_host(a)
        # the memory between the first and the last byte is copied, gaps included, and then viewed with the same strides
        start, end = np.lib.array_utils.byte_bounds(a)
        memory = self._kernels.from_host(np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start)))
        offset = address_of(a) - start
        if self.name == "numba-cuda":
            return StridedDeviceArray(memory, offset, a)
        if self.name == "cupy":
            return type(memory)(a.shape, a.dtype, memory.data + offset, a.strides)
        return np.ndarray(a.shape, a.dtype, memory, offset, a.strides)


class StridedDeviceArray:
    """A view of any strides of a Numba device array, which Numba itself cannot make."""

    def __init__(self, memory, offset, like):
        self.memory, self.shape, self.dtype, self.strides = memory, like.shape, like.dtype, like.strides
        address = memory.__cuda_array_interface__["data"][0] + offset
        self.__cuda_array_interface__ = memory.__cuda_array_interface__ | {
            "shape": like.shape,
            "strides": like.strides,
            "typestr": like.dtype.str,
            "data": (address, False),
        }


def array_backend(name: str) -> ArrayBackend:
    """Return the ArrayBackend of a backend's name, or raise BackendUnavailableError with the reason.

    >>> from gpuadam import testing
    >>> backend = testing.array_backend("numba-cpu")
    >>> param = backend.array(np.array([1.0, 2.0], "float32"))
    >>> backend.numpy(param)
    array([1., 2.], dtype=float32)
    """
    return _made(checks.one_of(backends.BACKENDS, "name", name))


_made = functools.cache(ArrayBackend)  # a cache around the public function would hide its types
