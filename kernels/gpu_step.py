"""Whether a step of arrays on a GPU is as the last one, in one compiled call.

It compares the settings, the parameters and the state by identity, and reads of each array what its library lets change while it
stays the same object, if its objects can be read (`cupy_struct.py`). The launch is left to the caller.
"""

import functools

import numpy as np
from numba import carray, njit

from gpuadam.kernels import compiled_cache, step_objects
from gpuadam.kernels.cpu_step import pointer
from gpuadam.kernels.step_objects import OWN, ROWS, WIDTH, int64_at

# Where the memory of a Plan has what. WORDS: how many words are told of all arrays; 0: what arrays are is not read here.
HELD, TOLD, WORDS, ARRAY_TYPE, HEAD = range(OWN, OWN + 5)
GRADS = 1  # the column that is not compared by identity: gradients may be in new arrays that lie where the last ones did


class Plan(step_objects.Plan):
    """The memory that steps of several updates are compared with.

    columns: the arrays of each operand. told: what the library's struct tells of them, by columns, or None. array_type: the
    address of their type. struct: the module that reads them.
    """

    def __init__(self, columns, by_name, told, struct):
        super().__init__(len(columns), len(columns[0]), by_name, HEAD - OWN)
        self._held = np.array([id(array) for column in columns for array in column], np.int64)
        self._told = np.zeros(0, np.int64) if told is None else told
        array_type = 0 if told is None else struct.ARRAY
        self.memory[OWN:HEAD] = self._held.ctypes.data, self._told.ctypes.data, self._told.size, array_type
        self._call = _compiled(None if told is None else struct)

    def same(self, arrays, settings):
        """Whether a step is as the last one. arrays: what `step_objects.of_several` takes. settings: a tuple."""
        return self._call(self.address, id(arrays), id(settings))


@functools.cache
def _compiled(struct):
    quick, READS = njit(**compiled_cache.INNER), struct is not None
    same_settings, gather = quick(step_objects.same_settings), quick(step_objects.of_several)
    tell = quick(struct.tell) if struct else None

    def same(plan, arrays, settings):
        if not same_settings(plan, settings):
            return False
        rows, width = int64_at(plan + 8 * ROWS), int64_at(plan + 8 * WIDTH)
        objects = np.empty(rows * width, np.int64)
        if not gather(plan, arrays, objects):
            return False
        held = int64_at(plan + 8 * HELD)
        for k in range(width * rows):
            if k // rows != GRADS and objects[k] != int64_at(held + 8 * k):
                return False
        if READS:
            words = carray(pointer(int64_at(plan + 8 * TOLD)), int64_at(plan + 8 * WORDS), np.int64)
            array_type, n = int64_at(plan + 8 * ARRAY_TYPE), 0
            for k in range(width * rows):
                n = tell(objects[k], array_type, words, n, True)
                if n < 0:
                    return False
        return True

    return compiled_cache.stored(njit(same), "gpu_step", struct and struct.__name__)
