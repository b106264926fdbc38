"""What the steps of arrays on a GPU have in common with the last ones, found out in one compiled call.

Settings, parameters and state are compared by identity. Of each array is read what its library lets change while it stays the
same object, if its objects can be read (`cupy_struct.py`, `numba_attributes.py`). The launch is left to the caller.
"""

import functools
from typing import Any

import numpy as np
from numba import carray

from gpuadam.kernels import compiled_cache, step_objects
from gpuadam.kernels.same_objects import int64_at, of_one, of_several, pointer, same_settings
from gpuadam.kernels.step_objects import OWN, ROWS, WIDTH

# Where the memory of a plan has what. WORDS: how many words there are for what is told of arrays.
HELD, TOLD, WORDS, ARRAY_TYPE, HEAD = range(OWN, OWN + 5)
GRADS = 1  # the column that is not compared by identity: gradients may be in new arrays that lie where the last ones did
WORDS_OF_CALL = 256  # enough for four arrays of 29 dimensions


class Plan(step_objects.Plan):
    """The memory that steps of several updates are compared with.

    columns: the arrays of each operand. struct: the module that reads their objects. told: what it tells of them, by columns. If
    it is None, what the arrays are is not compared.
    """

    def __init__(self, columns, struct, told):
        super().__init__(len(columns), len(columns[0]), HEAD - OWN)
        self._held = np.array([id(array) for column in columns for array in column], np.int64)
        self._told = np.zeros(0, np.int64) if told is None else told
        array_type = 0 if told is None else struct.ARRAY
        self.memory[OWN:HEAD] = self._held.ctypes.data, self._told.ctypes.data, self._told.size, array_type
        self._same = _same(None if told is None else struct)

    def same(self, arrays, settings):
        """Whether a step is as the last one. arrays: what `same_objects.of_several` takes. settings: a tuple."""
        return self._same(self.address, id(arrays), id(settings))


class Calls(step_objects.Plan):
    """The memory that the settings of calls of adam_step are compared with. struct: as in Plan."""

    def __init__(self, width, struct):
        super().__init__(width, n_own=HEAD - OWN)
        self._words = np.zeros(WORDS_OF_CALL, np.int64)
        self._bytes = self._words.data.cast("B")
        self.memory[OWN:HEAD] = 0, self._words.ctypes.data, self._words.size, struct.ARRAY
        self._tell = _tell(struct)

    def key(self, arrays, settings):
        """Return what is told of the arrays of a call, as bytes; None if its settings are others, or it cannot be told.

        arrays, settings: tuples.
        """
        n = self._tell(self.address, id(arrays), id(settings))
        return None if n < 0 else bytes(self._bytes[: 8 * n])


@functools.cache
def _same(struct):
    READS = struct is not None
    tell_all: Any = _telling(struct) if READS else None

    def same(plan, arrays, settings):
        n = int64_at(plan + 8 * ROWS) * int64_at(plan + 8 * WIDTH)
        objects = np.empty(n, np.int64)
        if not same_settings(plan, settings) or not of_several(plan, arrays, objects):
            return False
        held, rows = int64_at(plan + 8 * HELD), int64_at(plan + 8 * ROWS)
        for k in range(n):
            if objects[k] != int64_at(held + 8 * k) and not GRADS * rows <= k < (GRADS + 1) * rows:
                return False
        if READS:
            return tell_all(plan, objects, False) >= 0
        return True

    return compiled_cache.kept(same, __name__, struct and struct.__name__)


@functools.cache
def _tell(struct):
    tell_all = _telling(struct)

    def tell(plan, arrays, settings):
        objects = np.empty(int64_at(plan + 8 * WIDTH), np.int64)
        if not same_settings(plan, settings) or not of_one(plan, arrays, objects):
            return -1
        return tell_all(plan, objects, True)

    return compiled_cache.kept(tell, __name__, struct.__name__)


def _telling(struct):
    """Return the function that compares what a plan has words for, or fills them in. Its result is how many these are, or -1."""
    tell_one = compiled_cache.inner(struct.tell)

    @compiled_cache.compiler(__name__, struct.__name__)
    def tell_all(plan, objects, fill):
        words = carray(pointer(int64_at(plan + 8 * TOLD)), int64_at(plan + 8 * WORDS))
        array_type, n = int64_at(plan + 8 * ARRAY_TYPE), 0
        for k in range(len(objects)):
            n = tell_one(objects[k], array_type, words, n, fill)
            if n < 0:
                return -1
        return n

    return tell_all
