"""CuPy's arrays as their objects have them in memory, where compiled code sees whether one of many has changed.

Python takes some 0.2 us to read the shape of an array, and a step of GPT-2 small has 592 arrays. `Facts` keep what the objects of
arrays held: the size, the shape and the strides (C++ vectors, of which the object has the beginning, the end and the end of the
capacity), whether they are contiguous, and the objects of dtype and memory. They are made only if all of these are at the places
that they have in CuPy 14, which the arrays themselves tell.
"""

import ctypes
import functools

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache
from gpuadam.kernels.numba_memory import load_at

# Bytes into the object, and the numbers of its words from there on
BEGIN = 32
SIZE, SHAPE, SHAPE_END, _, STRIDES, STRIDES_END, _, CONTIGUOUS, _, DTYPE, DATA, WORDS = range(12)

_int64_at = load_at(intrinsic, types.int64)


class Facts:
    """What the objects of arrays held. The arrays have to be alive whenever `unchanged` is called."""

    def __init__(self, addresses, words, lengths):
        self._arguments = addresses, words, lengths
        self._unchanged = _compiled()

    def unchanged(self):
        """Whether the arrays have the memory, the shapes and the strides that they had."""
        return self._unchanged(*self._arguments)


def facts(arrays):
    """Return the Facts of arrays, or None if this CuPy's objects are of another kind."""
    words, lengths = np.empty((len(arrays), WORDS), np.int64), []
    for row, array in zip(words, arrays, strict=True):
        if type(array).__basicsize__ < BEGIN + 8 * WORDS:
            return None
        row[:] = (ctypes.c_int64 * WORDS).from_address(id(array) + BEGIN)
        known = array.size, id(array.dtype), id(array.data)
        if (row[SIZE], row[DTYPE], row[DATA]) != known or row[CONTIGUOUS] & 0xFFFFFFFF != array.flags.c_contiguous:
            return None
        for place, given in ((SHAPE, array.shape), (STRIDES, array.strides)):
            if row[place + 1] - row[place] != 8 * len(given):
                return None
            if tuple((ctypes.c_int64 * len(given)).from_address(int(row[place]))) != given:
                return None
            lengths += given
    return Facts(np.array([id(array) for array in arrays], np.int64), words, np.array(lengths, np.int64))


@functools.cache
def _compiled():
    def unchanged(addresses, words, lengths):
        n = 0
        for k in range(len(addresses)):
            for word in range(WORDS):
                if _int64_at(addresses[k] + BEGIN + 8 * word) != words[k, word]:
                    return False
            for place in (SHAPE, STRIDES):  # the vectors are where they were, and as long
                for at in range(words[k, place], words[k, place + 1], 8):
                    if _int64_at(at) != lengths[n]:
                        return False
                    n += 1
        return True

    return compiled_cache.stored(njit(unchanged), "cupy_struct")
