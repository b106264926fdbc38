"""Tensors that are as they were at the last step, told by compiled code.

A type may have functions for C beside `__dlpack__` (DLPackExchangeAPI, DLPack 1.3, dlpack.h): one fills in the DLTensor of an
object. Of torch's tensors it takes 60 ns, where Python needs 460 for a tensor's address, strides, shape and dtype.
"""

import ctypes

import numpy as np
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, dlpack
from gpuadam.kernels.calls import c_function, clear_error
from gpuadam.kernels.numba_memory import on_stack
from gpuadam.kernels.same_objects import agrees, int64_at
from gpuadam.kernels.step_objects import ITEMS_OF_LIST, known

# Where a DLPackExchangeAPI has the address of the function dltensor_from_py_object_no_sync, in words of 8 bytes. The first word
# is the version.
VERSION, DLTENSOR_FROM_PY_OBJECT = 0, 5
# Where a DLTensor has what, in bytes. Behind the device are ndim and the dtype, in one word.
DATA, DEVICE, NDIM, SHAPE, STRIDES, BYTE_OFFSET = range(0, dlpack.TENSOR.size, 8)
OBJECT, ADDRESS, ON, ELEMENTS, HEAD = range(5)  # what is kept of a tensor; the lengths and strides of its dimensions follow


def function_of(kind):
    """Return the address of the function that fills in the DLTensor of an object of a type, or 0 if there is none."""
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None or not known():
        return 0
    words = (ctypes.c_uint64 * 7).from_address(dlpack.pointer(capsule, b"dlpack_exchange_api"))
    return words[DLTENSOR_FROM_PY_OBJECT] if words[VERSION] & 0xFFFFFFFF == dlpack.VERSION[0] else 0


class Tensors:
    """What is known of the tensors in a list: which each is, its address, device, dtype, shape and strides.

    function: of `function_of`. move: other tensors of the same type may take their places, at other addresses.
    """

    def __init__(self, function, tensors, move):
        self._tensors = None if move else tensors  # alive, so that no others become the same objects
        self._pointers, self._arguments = np.zeros(len(tensors), np.int64), (function, move)
        self._kept = np.zeros(sum(HEAD + 2 * x.ndim for x in tensors), np.int64)
        self._compare(tensors, True)

    def are(self, tensors):
        """Return whether those in a list are as these."""
        return len(tensors) == len(self._pointers) and self._compare(tensors, False)

    @property
    def addresses(self):
        """The addresses of those that were compared last."""
        return self._pointers.tolist()

    def _compare(self, tensors, fill):
        function, move = self._arguments
        return as_kept(function, id(tensors), self._pointers, self._kept, move, fill)


call, tensor_memory = c_function(2), on_stack(intrinsic, dlpack.TENSOR.size)


@compiled_cache.inner
def _has_shape(kept, at, tensor, ndim, fill):
    shape, strides = int64_at(tensor + SHAPE), int64_at(tensor + STRIDES)
    if strides == 0 and ndim > 0:
        return False
    for d in range(ndim):
        length, stride = int64_at(shape + 8 * d), int64_at(strides + 8 * d)
        if not (agrees(kept, at + 2 * d, length, fill) and agrees(kept, at + 2 * d + 1, stride, fill)):
            return False
    return True


@compiled_cache.kept
def as_kept(function, tensors, pointers, kept, move, fill):
    """Return whether the tensors of a list are as those that are kept. fill: keep them."""
    tensor, at = tensor_memory(), 0
    for k in range(pointers.size):
        x = int64_at(int64_at(tensors + ITEMS_OF_LIST) + 8 * k)
        if not (move or agrees(kept, at + OBJECT, x, fill)):
            return False
        if call(function, x, tensor) != 0:
            clear_error()  # the long way raises what is wrong
            return False
        pointers[k] = int64_at(tensor + DATA) + int64_at(tensor + BYTE_OFFSET)
        device, of_elements = int64_at(tensor + DEVICE), int64_at(tensor + NDIM)
        ndim = of_elements & 0xFFFFFFFF
        if not (
            (move or agrees(kept, at + ADDRESS, pointers[k], fill))
            and agrees(kept, at + ON, device, fill)
            and agrees(kept, at + ELEMENTS, of_elements, fill)
            and _has_shape(kept, at + HEAD, tensor, ndim, fill)
        ):
            return False
        at += HEAD + 2 * ndim
    return True
