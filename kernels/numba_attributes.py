"""The attributes of Numba's device arrays, which compiled code compares with what they were.

What checks and launches depend on of a `DeviceNDArray` are objects that it names and that do not change: its memory, shape,
strides, dtype and stream. While they are the same objects, the array is what it was. Python needs 0.3 us to read those of one
array, and compiled code 0.05.
"""

import itertools
import sys
import weakref

import numpy as np
from numba.cuda.cudadrv import devicearray

from gpuadam.kernels.calls import clear_error, decref, of_python
from gpuadam.kernels.gpu_step import GRADS
from gpuadam.kernels.same_objects import in_dict, int64_at
from gpuadam.kernels.step_objects import TYPE

ARRAY = id(getattr(devicearray, "DeviceNDArray", None))  # Numba's simulator of a GPU, which is no backend, has none
NAMES = [sys.intern(name) for name in ("gpu_data", "shape", "strides", "dtype", "stream")]
N = len(NAMES)

_dict_of = of_python("PyObject_GenericGetDict", 2)


def tell(array, array_type, words, n, fill):
    """Compare the attributes of an array with the words from n on; return the next n, or -1 if one is another.

    words: what `told` returned. For the first array, n is 0. The other arguments are those of `cupy_struct.tell`.
    """
    if int64_at(array + TYPE) != array_type:
        return -1
    n = max(n, N)  # behind the names
    attributes, same = _dict_of(array, 0), True
    if attributes == 0:  # no memory for it
        clear_error()
        return -1
    for k in range(N):
        same = same and in_dict(attributes, words[k]) == words[n + k]
    decref(attributes)  # the array has it still
    if not same:
        return -1
    return n + N


def told(columns):
    """Return words for the arrays of each operand, and the objects that the caller has to keep while it uses the words.

    No gradient's memory is kept alive. When it goes, `tell` finds nothing the same: another object could get its address. Where
    memory takes no weak references there are no words, but None.
    """
    words = np.array([*map(id, NAMES), *(id(getattr(a, name)) for a in itertools.chain(*columns) for name in NAMES)])

    def gone(_):
        words[N] = 0

    try:
        memory = [weakref.ref(grad.gpu_data, gone) for grad in columns[GRADS]]
    except TypeError:
        return None
    kept = [getattr(array, name) for array in columns[GRADS] for name in NAMES[1:]]
    kept += [getattr(array, name) for k, column in enumerate(columns) if k != GRADS for array in column for name in NAMES]
    return words, (memory, kept)
