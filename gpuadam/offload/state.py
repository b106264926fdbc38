"""The arrays of state: how they lie in memory or in a file, and the copies that fill them."""

import math
from typing import Any

import numpy as np

from ..kernels import array_bytes, huge_pages
from ..kernels.operands import widened
from ..kernels.state_formats import encoded
from ..state import dtype_of, shape
from ..under_way import UnderWay
from .chunks import ALIGNMENT, aligned, aligned_memory
from .mapped import drop_mapped

COPIED_AT_ONCE = 1 << 22  # elements


def laid_out(beginnings, memory_of):
    """Return parameter -> {kind: array}. The arrays of a kind lie one after the other, each at a multiple of ALIGNMENT.

    beginnings: name -> `parameters.Beginning`. memory_of(kind, n_bytes): the memory for all arrays of a kind, as an aligned array
    of bytes.
    """
    arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in beginnings}
    for kind in dict.fromkeys(kind for beginning in beginnings.values() for kind in beginning.kept):
        places, end = [], 0
        for name, (_, view, kept, numbers) in beginnings.items():
            if kind in kept:
                dtype, its_shape = dtype_of(kept[kind]), shape(kind, view.shape, numbers)
                places.append((name, its_shape, dtype, end))
                end += aligned(math.prod(its_shape) * dtype.itemsize)
        memory = memory_of(kind, end)
        for name, its_shape, dtype, start in places:
            arrays[name][kind] = np.ndarray(its_shape, dtype, memory, start)
    return arrays


class Store(UnderWay):
    """The state of an optimizer, in `Memory` or in a `Folder`. The methods here are all that state in memory needs.

    Attributes: `arrays`, parameter -> {kind: array}; `place`, a text; `existed`, whether the state is that of an earlier
    optimizer, whose step counts are in `marks` then.
    """

    arrays: dict[str, dict[str, np.ndarray]]
    place: str
    existed = False
    marks: dict[str, Any]

    def check_open(self):
        """Raise ValueError if the state cannot be changed any more."""

    def end_at(self, steps, behind):
        """Note that so many steps were taken. behind: name -> the steps of each parameter that took another number of them."""
        self.end()

    def flush(self):
        """Wait until the state is where it outlasts the process."""

    def close(self):
        """Flush the state, and let another optimizer have it."""

    def discard(self):
        """Delete the state."""


class Memory(Store):
    """State in the host's memory. It stays after `close`, as files do, and no step follows.

    beginnings: name -> `parameters.Beginning`; the state begins at zero. gpu: the kernels of the backend of a GPU that takes
    part, for which the memory is pinned, or None. device: the GPU's number, or None.
    """

    def __init__(self, beginnings, gpu, device):
        super().__init__()
        self.place = "memory" if gpu is None else "pinned memory"

        def zeros(kind, n_bytes):
            if gpu is None:
                return huge_pages.zeros(n_bytes, ALIGNMENT)
            with gpu.on(device or 0, None):
                memory = aligned_memory(gpu.pinned, n_bytes)
            memory[:] = 0
            return memory

        self._closed = False
        self.arrays = laid_out(beginnings, zeros)

    def check_open(self):
        if self._closed:
            raise ValueError("this optimizer is closed: make another, and give it this one's state_dict() to go on")

    def begin(self):
        self.check_open()
        super().begin()

    def close(self):
        self._closed = True


def copy_master(master, view, kernels, to_master):
    """Set a float32 master to the numbers of a narrow parameter, or the parameter to the master's, rounded."""
    rest = master.reshape(-1)
    for buffer in (array_bytes.chunks if to_master else array_bytes.buffers)(kernels, view):
        part, rest = rest[: len(buffer) // 2], rest[len(buffer) // 2 :]
        if to_master:
            part[:] = widened(np.frombuffer(buffer, np.float16), view.format)
        else:
            buffer[:] = encoded(part, view.format).tobytes()
        drop_mapped([part])


def copy(to, source):
    """Copy an array into another, a part at a time, so that neither becomes the process's memory if it lies in a file."""
    to, source = to.reshape(-1), source.reshape(-1)
    for start in range(0, to.size, COPIED_AT_ONCE):
        part = slice(start, start + COPIED_AT_ONCE)
        to[part] = source[part]
        drop_mapped([to[part], source[part]])
