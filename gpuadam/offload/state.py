"""The arrays of state: how they lie in memory or in a file, and the copies that fill them."""

import math
from typing import Any, NamedTuple

import numpy as np

from ..kernels import array_bytes
from ..kernels.operands import widened
from .chunks import aligned, aligned_memory
from .mapped import drop_mapped

COPIED_AT_ONCE = 1 << 22  # elements


class StateArray(NamedTuple):
    """An array of a parameter's state."""

    param: str  # the parameter's name
    kind: str  # "m"
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def laid_out(arrays, memory_of):
    """Return parameter -> {kind: array}. The arrays of a kind lie one after the other, each at a multiple of ALIGNMENT.

    arrays: StateArrays. memory_of(kind, n_bytes): the memory for all arrays of a kind, as an aligned array of bytes.
    """
    result: dict[str, dict[str, np.ndarray]] = {}
    for kind in dict.fromkeys(array.kind for array in arrays):
        of_kind = [array for array in arrays if array.kind == kind]
        memory, start = memory_of(kind, sum(aligned(array.nbytes) for array in of_kind)), 0
        for array in of_kind:
            part = memory[start : start + array.nbytes]
            result.setdefault(array.param, {})[kind] = part.view(array.dtype).reshape(array.shape)
            start += aligned(array.nbytes)
    return result


class Store:
    """The state of an optimizer, in memory. A `Folder` is one whose memory is files.

    arrays: the StateArrays to keep, which begin at zero. gpu: the kernels of the backend of a GPU that takes part, for which the
    memory is pinned, or None. device: the GPU's number, or None.

    Attributes: `arrays`, parameter -> {kind: array}; `place`, a text; `changing`, whether the state is in the midst of a step;
    `existed`, whether the state is that of an earlier optimizer, whose step counts are in `marks` then.
    """

    existed = changing = False
    marks: dict[str, Any]

    def __init__(self, arrays, gpu, device):
        self.place = "memory" if gpu is None else "pinned memory"

        def zeros(n_bytes):
            if gpu is None:
                return np.zeros(n_bytes, np.uint8)
            with gpu.on(device or 0, None):
                memory = gpu.pinned(n_bytes)
            memory[:] = 0
            return memory

        self.arrays = laid_out(arrays, lambda kind, n_bytes: aligned_memory(zeros, n_bytes))

    def check_open(self):
        """Raise ValueError if the state cannot be changed any more."""

    def begin(self):
        """Note that the state is about to change."""
        self.changing = True

    def end(self, steps, behind):
        """Note that so many steps were taken. behind: name -> the steps of each parameter that took another number of them."""
        self.changing = False

    def flush(self):
        """Wait until the state is where it outlasts the process."""

    def close(self):
        """Flush the state, and let another optimizer have it."""


def fill_master(master, view, kernels):
    """Set a float32 master to the numbers of a narrow parameter."""
    rest = master.reshape(-1)
    for chunk in array_bytes.chunks(kernels, view):
        narrow = np.frombuffer(chunk, np.float16)
        part, rest = rest[: narrow.size], rest[narrow.size :]
        part[:] = widened(narrow, view.format)
        drop_mapped([part])


def copy(to, source):
    """Copy an array into another, a part at a time, so that neither becomes the process's memory if it lies in a file."""
    to, source = to.reshape(-1), source.reshape(-1)
    for start in range(0, to.size, COPIED_AT_ONCE):
        part = slice(start, start + COPIED_AT_ONCE)
        to[part] = source[part]
        drop_mapped([to[part], source[part]])
