"""Files that are mapped into memory: pages come before they are used and go afterwards, so that a process holds few of them.

The pages of a mapped file that a process has touched count as its memory. `Mapping.populate` brings pages in, ahead of the
update and in a thread of its own. `Mapping.drop` takes them out of the process again; the system writes the changed ones to disk.
Both cost ext4 some 0.1 us for each 4 KB, on large pages too, because it notes for each block that it will be written.
"""

import errno
import mmap
import operator
import sys
import weakref
from typing import NamedTuple

import numpy as np

from ..kernels import huge_pages

PAGE = mmap.PAGESIZE
AROUND = 1 << 16  # a fault may bring in neighbours of its page, as far as this boundary
# Of Linux 5.14 and later, for reading and for writing; Python has no names for them
POPULATE = {False: 22, True: 23}


class Mapping(NamedTuple):
    """The map of a file, and its addresses."""

    map: mmap.mmap
    start: int
    end: int

    def populate(self, start, end, writes):
        """Bring in the memory between two addresses. writes: whether it is to be written, or only read."""
        start, end = self._around(start, end, PAGE)
        if sys.platform == "linux":
            try:
                self._advise(start, end, POPULATE[writes])
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # of an older Linux
                    raise
        self._bytes(start, end)[::PAGE].max()

    def drop(self, start, end):
        """Take the memory between two addresses out of the process. Neighbours that go with it come back when touched."""
        if huge_pages.libc:
            start, end = self._around(start, end, AROUND)
            self._advise(start, end, mmap.MADV_DONTNEED)

    def copy(self, start, memory, writes):
        """Copy between the map, from an address on, and other memory, an array of bytes. writes: into the map."""
        self.populate(start, start + memory.size, writes)
        of_file = self._bytes(start, start + memory.size)
        to, source = (of_file, memory) if writes else (memory, of_file)
        to[:] = source
        self.drop(start, start + memory.size)

    def _bytes(self, start, end):
        return np.frombuffer(self.map, np.uint8, end - start, start - self.start)

    def _around(self, start, end, boundary):
        start, end = start - self.start, end - self.start
        return self.start + start // boundary * boundary, min(self.start + -(-end // boundary) * boundary, self.end)

    def _advise(self, start, end, advice):
        try:
            huge_pages.advise(start, end - start, advice)  # Python's method keeps its lock for as long as the disk takes
        except OSError as error:
            why = f"the system cannot provide {end - start:,} bytes of a mapped file: {error.strerror}"
            raise OSError(error.errno, why) from None


# Of each map, the address, which takes NumPy long to say
_starts: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()


def mapping_of(array):
    """Return the Mapping of an array that shares its memory with a file, or None.

    A map that is copied when it is written, mode "c", does not share: its pages are the process's own.
    """
    while isinstance(array, np.ndarray):
        file_map = getattr(array, "_mmap", None)
        if file_map is not None:
            if getattr(array, "mode", "c") == "c":
                return None
            if file_map not in _starts:
                _starts[file_map] = huge_pages.address_of(np.frombuffer(file_map, np.uint8))
            return Mapping(file_map, _starts[file_map], _starts[file_map] + len(file_map))
        array = array.base
    return None


def drop_mapped(arrays):
    """Take arrays in files out of the process's memory."""
    for array in arrays:
        mapping = mapping_of(array)
        if mapping and array.size:
            start = huge_pages.address_of(array)
            mapping.drop(start, start + array.nbytes)


class Extent(NamedTuple):
    """Memory between two addresses of a mapped file."""

    mapping: Mapping
    start: int
    end: int
    writes: bool  # whether it is written, or only read
    lasts: bool  # whether every step has it: parameters and state, and not gradients


def merged(extents):
    """Return fewer Extents: those of one file that touch, or nearly do, become one.

    >>> a, b = Mapping(None, 0, 10**7), Mapping(None, 10**7, 10**8)
    >>> addresses = [(a, 0, 10, True), (b, 10**7, 10**7 + 5, False), (a, 64, 70, True), (a, 10**6, 10**7, True)]
    >>> [(extent.start, extent.end) for extent in merged(Extent(*four, lasts=True) for four in addresses)]
    [(10000000, 10000005), (0, 70), (1000000, 10000000)]
    """
    result: list[Extent] = []
    for extent in sorted(extents, key=operator.attrgetter("writes", "start")):
        last = result[-1] if result else None
        alike = last and (last.mapping, last.writes, last.lasts) == (extent.mapping, extent.writes, extent.lasts)
        if last and alike and extent.start <= last.end + PAGE:
            result[-1] = last._replace(end=max(last.end, extent.end))
        else:
            result.append(extent)
    return result
