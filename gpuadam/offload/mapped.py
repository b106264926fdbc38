"""Memory that is a file: its pages come before they are used and go after, so that the process holds few of them.

What a process has touched of a mapped file counts as its memory. `populate` brings pages in, ahead of the update and in a thread
of its own; `drop` takes them out of the process again. What was written is then the system's to bring to the disk.
"""

import ctypes
import errno
import mmap
import os
import sys
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
AROUND = 1 << 16  # a fault may bring in neighbours of its page, as far as this boundary
# Of Linux 5.14 and later, for reading and for writing; Python has no names for them
POPULATE = {False: 22, True: 23}

# Python's own method keeps the interpreter's lock for as long as the disk takes
_libc: Any = ctypes.CDLL(None, use_errno=True) if hasattr(mmap.mmap, "madvise") else None  # Windows has none


class Mapping:
    """The map of a file that an array is in."""

    def __init__(self, file_map):
        self.map = file_map  # kept, and with it its address
        whole = np.frombuffer(file_map, np.uint8)
        self.start, self.end = whole.ctypes.data, whole.ctypes.data + whole.size

    def populate(self, start, end, writes):
        """Bring in the memory between two addresses. writes: whether it is to be written; else it is only read."""
        start, end = self._around(start, end, PAGE)
        try:
            populated = sys.platform == "linux" and self._advise(start, end, POPULATE[writes])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            populated = False  # an older Linux
        if not populated:
            np.frombuffer(self.map, np.uint8, end - start, start - self.start)[::PAGE].max()

    def drop(self, start, end):
        """Take memory out of the process. Neighbours that go with it come back when they are touched."""
        if _libc:
            start, end = self._around(start, end, AROUND)
            self._advise(start, end, mmap.MADV_DONTNEED)

    def _around(self, start, end, boundary):
        start, end = start - self.start, end - self.start
        return self.start + start // boundary * boundary, min(self.start + -(-end // boundary) * boundary, self.end)

    def _advise(self, start, end, advice):
        if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice):
            code = ctypes.get_errno()
            raise OSError(code, f"the system cannot provide {end - start:,} bytes of a mapped file: {os.strerror(code)}")
        return True


def mapping_of(array, known):
    """Return the Mapping of an array that shares its memory with a file, or None. known: those found before, by their maps.

    A map that is copied when it is written, mode "c", does not share: its pages are the process's own.
    """
    while isinstance(array, np.ndarray):
        file_map = getattr(array, "_mmap", None)
        if file_map is not None:
            if getattr(array, "mode", "c") == "c":
                return None
            if id(file_map) not in known:
                known[id(file_map)] = Mapping(file_map)
            return known[id(file_map)]
        array = array.base
    return None


def drop_mapped(arrays):
    """Take arrays in files out of the process's memory."""
    known: dict = {}
    for array in arrays:
        mapping = mapping_of(array, known)
        if mapping and array.size:
            start = array.__array_interface__["data"][0]
            mapping.drop(start, start + array.nbytes)


def merged(extents):
    """Return fewer extents, of those that touch or nearly do. extents: (mapping, start, end, whether it is written).

    >>> merged([("a", 0, 10, True), ("b", 0, 5, False), ("a", 64, 70, True), ("a", 10**6, 10**6 + 1, True)])
    [('a', 0, 70, True), ('a', 1000000, 1000001, True), ('b', 0, 5, False)]
    """
    found: list = []
    for mapping, start, end, writes in sorted(extents, key=lambda extent: (str(extent[0]), extent[3], extent[1])):
        last = found[-1] if found else None
        if last and last[0] is mapping and last[3] == writes and start <= last[2] + PAGE:
            found[-1] = (mapping, last[1], max(last[2], end), writes)
        else:
            found.append((mapping, start, end, writes))
    return found
