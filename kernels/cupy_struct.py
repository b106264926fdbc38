"""CuPy's arrays as their objects have them in memory, where compiled code sees whether one of many has changed.

Python takes some 0.2 us to read the shape of an array, and a step of GPT-2 small has 592 arrays. What is told of an array here is
all that checks and launches depend on: its address and device, which are in an object of their own, its size, dtype, shape and
strides (C++ vectors, of which the array has the beginning, the end and the end of the capacity), and whether it is contiguous.
That is read only if all of it is at the places that it has in CuPy 14, which the arrays themselves tell.
"""

import ctypes

import cupy
import numpy as np
from numba import types
from numba.extending import intrinsic

from gpuadam.kernels.numba_memory import load_at
from gpuadam.kernels.same_objects import agrees, int64_at
from gpuadam.kernels.step_objects import TYPE

# Bytes into the object of an array. CONTIGUOUS: two of 4 bytes, for C and for Fortran order.
SIZE, SHAPE, SHAPE_END, _, STRIDES, STRIDES_END, _, CONTIGUOUS, _, DTYPE, DATA, END = range(32, 32 + 8 * 12, 8)
POINTER, DEVICE, END_OF_DATA = 24, 32, 40  # and into that of its memory; DEVICE has 4 bytes

_int32_at = load_at(intrinsic, types.int32)
ARRAY = id(cupy.ndarray)


def tell(array, array_type, words, n, fill):
    """Compare what is told of an array with the words from n on; or fill them in. Return the next n, or -1.

    It is -1 if a word differs, the array is not of CuPy's type, or the words are too few. array, array_type: addresses.
    """
    if int64_at(array + TYPE) != array_type:
        return -1
    shape, strides, data = int64_at(array + SHAPE), int64_at(array + STRIDES), int64_at(array + DATA)
    dims = (int64_at(array + SHAPE_END) - shape) // 8
    if n + 6 + 2 * dims > len(words) or int64_at(array + STRIDES_END) - strides != 8 * dims:
        return -1
    fixed = (
        int64_at(data + POINTER),
        types.int64(_int32_at(data + DEVICE)),
        int64_at(array + SIZE),
        int64_at(array + DTYPE),
        int64_at(array + CONTIGUOUS),
        dims,
    )
    for word in fixed:
        if not agrees(words, n, word, fill):
            return -1
        n += 1
    for vector in (shape, strides):
        for d in range(dims):
            if not agrees(words, n, int64_at(vector + 8 * d), fill):
                return -1
            n += 1
    return n


def told(arrays):
    """Return the words of arrays, int64, or None if this CuPy's objects are of another kind."""
    words = []
    for array in arrays:
        if array.__class__ is not cupy.ndarray or type(array).__basicsize__ < END:
            return None
        if type(array.data).__basicsize__ < END_OF_DATA:
            return None

        def field(offset, kind=ctypes.c_int64, of=array):
            return kind.from_address(id(of) + offset).value

        known = array.size, id(array.dtype), id(array.data), array.flags.c_contiguous, array.flags.f_contiguous
        flags = field(CONTIGUOUS, ctypes.c_int32), field(CONTIGUOUS + 4, ctypes.c_int32)
        if (field(SIZE), field(DTYPE), field(DATA), *flags) != known:
            return None
        memory = field(POINTER, of=array.data), field(DEVICE, ctypes.c_int32, array.data)
        if memory != (array.data.ptr, array.data.device_id):
            return None
        for place, given in ((SHAPE, array.shape), (STRIDES, array.strides)):
            if field(place + 8) - field(place) != 8 * len(given):
                return None
            if tuple((ctypes.c_int64 * len(given)).from_address(field(place))) != given:
                return None
        words += [*memory, field(SIZE), field(DTYPE), field(CONTIGUOUS), array.ndim, *array.shape, *array.strides]
    return np.array(words, np.int64)
