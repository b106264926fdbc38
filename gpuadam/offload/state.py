"""The arrays of state: how they lie in memory or in a file, and the copies that fill them."""

import math
from typing import NamedTuple

import numpy as np

from ..kernels import array_bytes, storage
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


def in_memory(arrays, gpu, device):
    """Return parameter -> {kind: zeros}. If a GPU takes part the memory is pinned. gpu: the kernels of its backend, or None."""

    def zeros(kind, n_bytes):
        if gpu is None:
            return aligned_memory(lambda n: np.zeros(n, np.uint8), n_bytes)
        with gpu.on(device or 0, None):
            memory = aligned_memory(gpu.pinned, n_bytes)
        memory[:] = 0
        return memory

    return laid_out(arrays, zeros)


def fill_master(master, view, kernels):
    """Set a float32 master to the numbers of a narrow parameter."""
    rest = master.reshape(-1)
    for chunk in array_bytes.chunks(kernels, view):
        narrow = np.frombuffer(chunk, np.float16)
        part, rest = rest[: narrow.size], rest[narrow.size :]
        part[:] = storage.widened(narrow, view.format)
        drop_mapped([part])


def copy(to, source):
    """Copy an array into another, a part at a time, so that neither becomes the process's memory if it lies in a file."""
    to, source = to.reshape(-1), source.reshape(-1)
    for start in range(0, to.size, COPIED_AT_ONCE):
        part = slice(start, start + COPIED_AT_ONCE)
        to[part] = source[part]
        drop_mapped([to[part], source[part]])
