"""State in memory, and the first values of a master."""

import numpy as np

from ..kernels import array_bytes
from .chunks import ALIGNMENT, aligned
from .mapped import drop_mapped

COPIED_AT_ONCE = 1 << 22  # elements


def in_memory(kinds, gpu, device):
    """Return parameter -> {kind: zeros}. kinds: as of a `Folder`. The memory is pinned if a GPU takes part, gpu: its kernels."""
    arrays: dict = {}
    for kind, of_parameters in kinds.items():
        sizes = [int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in of_parameters]
        memory = _zeros(sum(map(aligned, sizes)) + ALIGNMENT, gpu, device)
        at = -memory.ctypes.data % ALIGNMENT
        for (name, shape, dtype), size in zip(of_parameters, sizes, strict=True):
            arrays.setdefault(name, {})[kind] = memory[at : at + size].view(dtype).reshape(shape)
            at += aligned(size)
    return arrays


def _zeros(n_bytes, gpu, device):
    if gpu is None:
        return np.zeros(n_bytes, np.uint8)
    with gpu.on(device or 0, None):
        memory = gpu.pinned(n_bytes)
    memory[:] = 0
    return memory


def fill_master(master, view, kernels):
    """Set a float32 master to the numbers of a narrow parameter."""
    rest = master.reshape(-1)
    for chunk in array_bytes.chunks(kernels, view):
        own = np.frombuffer(chunk, np.uint16)
        to, rest = rest[: own.size], rest[own.size :]
        to[:] = own.view(np.float16) if view.format == "float16" else (own.astype(np.uint32) << 16).view(np.float32)
        drop_mapped([to])


def copy(to, source):
    """Copy an array into another, a part at a time: neither becomes the process's memory if it is in a file."""
    to, source = to.reshape(-1), source.reshape(-1)
    for start in range(0, to.size, COPIED_AT_ONCE):
        part = slice(start, start + COPIED_AT_ONCE)
        to[part] = source[part]
        drop_mapped([to[part], source[part]])
