"""Memory of the host on huge pages, of 2 MB instead of 4 KB: with small pages a step can take twice as long.

A processor remembers where some thousand pages lie. A step over large arrays touches many more, and must look up each in tables
in memory; in a virtual machine it needs two sets of tables. One huge page takes the place of 512 small ones.

Linux gives huge pages to memory that asks for them (`madvise`), at addresses that are multiples of their size. So large
allocations are made here in four steps:

1. They have whole huge pages.
2. They ask for huge pages (MADV_HUGEPAGE).
3. One byte of each huge page is written. Where a step reads new memory first, some versions of Linux map a shared page of
   zeros, and put small pages in its place when the step writes.
4. Pages that are small nevertheless are made huge ones (MADV_COLLAPSE, Linux 6.1).

Where memory is nearer to some processors than to others, steps 3 and 4 are left out: a page lies where it is touched first, which
is best done by the threads of the update.

Where a system has no huge pages, it has small ones, and the numbers are the same. That is no error.

Arrays that a step goes through side by side should not begin at the same place in 128 MB, nor in 4 KB. So each large allocation
begins some STAGGERs and NEARs behind a huge page's first byte, and so do places within one. An array alone that is smaller begins
some NEARs behind it, if these take no page more:

1. On an AMD EPYC (znver3) a step over four arrays, each 128 or 256 MB behind the other, took 1.6 to 2.0 and 3.1 to 4.5 times as
   long as over four that were 16 KB farther apart, as if they were in different rows of the same banks of memory, of which each
   keeps one row open.
2. On an Intel Xeon (Granite Rapids) a step over four arrays that begin at the same place in 4 KB takes 1.03 to 1.05 times as long
   as over four that begin 1 KB farther each, as if it mattered that all come to the end of a small page at once. A program's
   large arrays do begin at the same place: 16 bytes into a small page those of NumPy, 64 those of torch.
"""

import contextlib
import ctypes
import functools
import itertools
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
NODES = Path("/sys/devices/system/node")
COLLAPSE = 25  # of Linux 6.1 and later; Python has no name for it
USUAL_BYTES = 2 << 20  # of a huge page
SMALL_PAGE = 4 << 10  # bytes
STAGGER = 16 << 10  # bytes: with 4 KB there was still a third to gain, with 8 KB a tenth
NEAR = 512  # bytes: with 64 there was still a half to gain on Granite Rapids, with 256 a tenth, with 1 KB nothing
STAGGERED_FROM = 16  # huge pages of an allocation, to which one more may then belong
_places = itertools.count()  # of operands, counted through all allocations

libc: Any = ctypes.CDLL(None, use_errno=True) if hasattr(mmap.mmap, "madvise") else None  # Windows has none


def zeros(n_bytes, boundary):
    """Return zeros as an array of bytes that begins at a multiple of boundary, at most NEAR / 2: on huge pages if it is large.

    Raises MemoryError.
    """
    if is_large(n_bytes):
        return _mapped(n_bytes)
    memory = np.zeros(n_bytes + boundary, np.uint8)
    start = -address_of(memory) % boundary
    return memory[start : start + n_bytes]


def zeros_in_one(sizes, boundary, operands=()):
    """Return arrays of zeros, of some sizes in bytes, that share an allocation, each from a multiple of boundary on.

    operands: the operand of each array, if a step goes through those of several side by side. Those of one follow one another.

    When one of them is freed, the huge pages that it has to itself go back to the system, and with the last one the rest. Arrays
    that are small, all together, have allocations of their own. Raises MemoryError.
    """
    if len(sizes) == 1 or not is_large(sum(sizes)):
        return [zeros(n_bytes, boundary) for n_bytes in sizes]
    places, end, operand = [], 0, 0
    for k, n_bytes in enumerate(sizes):
        if k and operands and operands[k] != operands[k - 1]:
            operand += 1
            end = -(-end // SMALL_PAGE) * SMALL_PAGE + operand * NEAR
        places.append(end + end // USUAL_BYTES * STAGGER)
        end += -(-n_bytes // boundary) * boundary
    memory = _mapped(places[-1] + sizes[-1], operand + 1)
    return [np.asarray(_Part(memory, place, n_bytes)) for place, n_bytes in zip(places, sizes, strict=True)]


def is_large(n_bytes):
    """Whether an allocation of so many bytes is on huge pages: two of them or more. NumPy asks for them from 4 MB on, too."""
    return hasattr(mmap, "MADV_HUGEPAGE") and n_bytes >= 2 * page_bytes()


@functools.cache
def page_bytes():
    """Return how many bytes a huge page has: 2 MB but on some ARM systems."""
    with contextlib.suppress(OSError, ValueError):  # a system without these settings
        return int((SETTINGS / "hpage_pmd_size").read_text())
    return USUAL_BYTES


def advise(start, n_bytes, advice):
    """Call `madvise`, without Python's lock. start: an address. Raises OSError."""
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def make_huge(start, n_bytes, new=False):
    """Ask for huge pages for memory of another library, as far as whole ones lie there, and make small ones there huge.

    start: an address. The memory has to be private, as that of arrays is. new: it is written for the first time after this, which
    on several nodes decides where it lies.
    """
    page = page_bytes()
    first, after = -(-start // page) * page, (start + n_bytes) // page * page
    if first < after and hasattr(mmap, "MADV_HUGEPAGE"):
        _ask(first, after - first, mmap.MADV_HUGEPAGE)
        if not (new and _has_several_nodes()):
            _ask(first, after - first, COLLAPSE)


def _ask(start, n_bytes, advice):
    with contextlib.suppress(OSError):  # a system without huge pages, or with none left, has small ones
        advise(start, n_bytes, advice)


def address_of(array):
    """Return the address of the first byte of an array."""
    return array.__array_interface__["data"][0]


def _mapped(n_bytes, operands=1):
    """Return new zeros on huge pages of their own. The memory is given back when nothing refers to it any more.

    They begin at another place in a huge page, and in a small one, than those of the last allocations. operands: how many begin
    in this one, NEAR apart.
    """
    page, (place, *_) = page_bytes(), [next(_places) for _ in range(operands)]
    stagger = NEAR // 2 + place % 32 * (STAGGER + NEAR)
    if n_bytes < STAGGERED_FROM * page:
        stagger = stagger % SMALL_PAGE if -n_bytes % page >= SMALL_PAGE else 0
    whole = -(-(n_bytes + stagger) // page) * page
    try:
        memory = mmap.mmap(-1, whole + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"unable to allocate {n_bytes:,} bytes: {error}") from error
    array = np.frombuffer(memory, np.uint8)
    offset = -address_of(array) % page
    array = array[offset : offset + whole]
    _ask(address_of(array), whole, mmap.MADV_HUGEPAGE)
    if not _has_several_nodes():
        array[::page] = 0
        _ask(address_of(array), whole, COLLAPSE)
    return array[stagger : stagger + n_bytes]


@functools.cache
def _has_several_nodes():
    """Whether memory is near to some processors and far from others.

    A page then lies beside the processor that touches it first, which should be the one that will update it.
    """
    return len(list(NODES.glob("node[0-9]*"))) > 1


class _Part:
    """The memory of one array in an allocation of several. NumPy keeps it for as long as there are views of the array."""

    def __init__(self, memory, place, n_bytes):
        self.memory = memory  # the whole allocation, which is given back with its last part
        start = address_of(memory) + place
        self.__array_interface__ = {"version": 3, "shape": (n_bytes,), "typestr": "|u1", "data": (start, False)}
        page = page_bytes()
        first, after = -(-start // page) * page, (start + n_bytes) // page * page
        if first < after:
            weakref.finalize(self, _give_back, memory, first, after - first).atexit = False


def _give_back(memory, start, n_bytes):
    """Give pages back to the system. memory: the allocation that they lie in, which is there until this is done."""
    with contextlib.suppress(OSError):  # of pages that the program has locked: they go with the allocation
        advise(start, n_bytes, mmap.MADV_DONTNEED)
