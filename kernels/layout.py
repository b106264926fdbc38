"""How arrays lie in memory: which are one run of elements, and how a launch covers runs that may start anywhere."""

import bisect
import itertools
import math
from typing import NamedTuple

VECTOR_BYTES = 16  # the widest load and store of one thread (before sm_100), and a quarter of what a warp asks for at once
WARP = 32  # threads


class Split(NamedTuple):
    """One thread for each vector, then one for each element of the head and of the tail.

    Thread i < vectors updates the elements from head + i * lanes. A later thread, i = vectors + k, updates element k while
    k < head, and element k + vectors * lanes from there on.
    """

    head: int
    vectors: int
    threads: int

    def threads_of(self, vectors_a_thread):
        """Return how many threads there are where a thread takes several vectors.

        The first warps take as many vectors at once as their threads together, side by side: a thread's are WARP vectors apart.
        The vectors that no whole warp is left for, and the elements, have a thread each.

        >>> Split(head=3, vectors=70, threads=75).threads_of(2)  # a warp for 64 vectors; 6 vectors, and 5 elements
        43
        """
        several = self.vectors // (WARP * vectors_a_thread) * WARP
        return self.threads - several * (vectors_a_thread - 1)


def lanes(itemsizes):
    """Return how many elements a vector has: 16 bytes of the narrowest array, but for flags of a byte.

    >>> lanes([4, 4, 2]), lanes([4, 4, 1])
    (8, 4)
    """
    return VECTOR_BYTES // min(n for n in itemsizes if n > 1)


def aligned_to(n_bytes):
    """Return how many bytes an access may take of a run of n_bytes, and so where the run must begin: at most a vector's.

    >>> aligned_to(64), aligned_to(24)
    (16, 8)
    """
    return min(VECTOR_BYTES, n_bytes & -n_bytes)


def split(pointers, itemsizes, size):
    """Split `size` elements where all pointers are at the boundaries of a vector's accesses.

    A vector has `lanes` elements. If no element is at a boundary in all arrays, there are none. itemsizes: of elements, in bytes.

    >>> split([0x1004, 0x2014, 0x3024], [4, 4, 4], size=10)  # 3 elements, 1 vector of 4, 3 elements
    Split(head=3, vectors=1, threads=7)
    >>> split([0x1000, 0x2004], [4, 4], size=10)
    Split(head=0, vectors=0, threads=10)
    >>> split([0x100C, 0x2006], [4, 2], size=20)  # float32 beside bfloat16: 5 elements, 1 vector of 8, 7 elements
    Split(head=5, vectors=1, threads=13)
    """
    n_lanes = lanes(itemsizes)
    boundaries = [(pointer, n, aligned_to(n_lanes * n)) for pointer, n in zip(pointers, itemsizes, strict=True)]
    for head in range(min(n_lanes, size + 1)):
        if all((pointer + head * n) % boundary == 0 for pointer, n, boundary in boundaries):
            vectors = (size - head) // n_lanes
            return Split(head, vectors, size - vectors * (n_lanes - 1))
    return Split(0, 0, size)


def split_groups(pointers, itemsizes, size, lanes):
    """Split `size` elements into items of `lanes` neighbours from the first on: Split(0, how many are whole vectors, all).

    No item is a vector if an array does not begin at a boundary of 16 bytes, or of a vector's bytes if it has fewer.

    >>> split_groups([0x1000, 0x2008], [4, 1], size=20, lanes=8)  # float32 beside bytes: 2 vectors, and a rest of 4 elements
    Split(head=0, vectors=2, threads=3)
    """
    boundaries = [aligned_to(lanes * n) for n in itemsizes]
    aligned = all(pointer % n == 0 for pointer, n in zip(pointers, boundaries, strict=True))
    return Split(0, size // lanes if aligned else 0, -(-size // lanes))


def side_by_side(sizes, boundary):
    """Return where parts of some sizes begin, each at a multiple of boundary, and where the last one ends, at another.

    >>> side_by_side([5, 8], 8)
    ([0, 8], 16)
    """
    *starts, end = itertools.accumulate((-(-n // boundary) * boundary for n in sizes), initial=0)
    return starts, end


class Update(NamedTuple):
    """The arrays of one update: Views in the order of `operands.operands_of`."""

    views: list
    key: int = 0  # for random rounding: an int64 that tells this parameter from others
    start: int = 0  # likewise the number of its first element here


def dense(views, in_c_order=False):
    """Whether all arrays fill their memory without gaps and in the same order of dimensions: each is one run of elements.

    in_c_order: whether the run has to be in C order, because elements are counted.
    """
    if all(view.contiguous for view in views):
        return True
    if in_c_order:
        return False
    _, strides = collapse(views[0].shape, [view.strides for view in views])
    return all(steps in ((), (view.dtype.itemsize,)) for view, steps in zip(views, strides, strict=True))


def offset_like(view, dtype, boundary):
    """Return how many elements of dtype after a boundary an array must start, so that its boundaries are at a view's elements."""
    head = -view.pointer % boundary // view.dtype.itemsize
    return -head * dtype.itemsize % boundary // dtype.itemsize


def strides_like(view, dtype):
    """Return the strides, in bytes, of an array of dtype in a dense view's order of memory; None stands for C order."""
    if view.contiguous or not dense([view]):
        return None
    return tuple(stride // view.dtype.itemsize * dtype.itemsize for stride in view.strides)


def bounds(view):
    """Return the addresses of the first byte and of the byte after the last."""
    if view.contiguous:
        return view.pointer, view.pointer + view.nbytes
    start = end = view.pointer
    for stride, n in zip(view.strides, view.shape, strict=True):
        if stride < 0:
            start += stride * (n - 1)
        else:
            end += stride * (n - 1)
    return start, end + view.dtype.itemsize


def collapse(shape, strides, in_c_order=False):
    """Merge the dimensions that all arrays step through as one, and drop those of one element.

    strides: one tuple of bytes for each array. Dimensions are first put in the order of the first array's memory, unless they
    are to stay in C order.

    >>> collapse((2, 3, 4), [(48, 16, 4), (48, 16, 4)])
    ((24,), [(4,), (4,)])
    >>> collapse((2, 3), [(4, 8), (12, 4)])  # F order beside C order
    ((3, 2), [(8, 4), (4, 12)])
    """
    dims = [(n, *steps) for n, *steps in zip(shape, *strides, strict=True) if n != 1]
    if not in_c_order:
        dims.sort(key=lambda dim: -abs(dim[1]))
    merged: list[list[int]] = []
    for n, *steps in dims:
        if merged and merged[-1][1:] == [n * step for step in steps]:
            merged[-1] = [merged[-1][0] * n, *steps]
        else:
            merged.append([n, *steps])
    return tuple(dim[0] for dim in merged), [tuple(dim[k + 1] for dim in merged) for k in range(len(strides))]


def in_rows_apart(extents):
    """Return True for arrays that share no memory as the columns of one matrix do, and False if each pair has to be compared.

    extents: (start, end, whether the array is written, View), in the order of the starts. Two arrays that are only read may be
        the same.

    Memory is taken as the rows of a table, whose width is the greatest common divisor of the strides. Each array then lies in a
    few rectangles, though it need not fill them, and a sweep over the rows shows whether two rectangles meet.
    """
    blocks, strides = [], []
    for start, end, is_written, view in extents:
        n_bytes = view.dtype.itemsize  # of a block without gaps
        for stride, n in sorted((abs(stride), n) for stride, n in zip(view.strides, view.shape, strict=True) if n > 1):
            if stride == n_bytes:
                n_bytes *= n
            else:
                strides.append(stride)
        blocks.append((start - extents[0][0], n_bytes, end - start - n_bytes, is_written))
    width = math.gcd(*strides)
    if width == 0 or any(reach and n_bytes > width for _, n_bytes, reach, _ in blocks):
        return False
    written: list[tuple] = []
    read: set[tuple] = set()
    for start, n_bytes, reach, is_written in blocks:
        (written.extend if is_written else read.update)(_rectangles(start, n_bytes, reach // width + 1, width))
    return not _meet([*written, *read])


def _rectangles(start, n_bytes, n_rows, width):
    """Return where a block lies that n_rows rows repeat: tuples of the first row, the one after the last, and columns likewise.

    >>> _rectangles(start=6, n_bytes=4, n_rows=2, width=8)  # columns 6 and 7, then 0 and 1 of the next row
    [(0, 2, 6, 8), (1, 3, 0, 2)]
    """
    (row, left), (last, right) = divmod(start, width), divmod(start + n_bytes - 1, width)
    if row == last:
        return [(row, row + n_rows, left, right + 1)]
    parts = [(row, row + n_rows, left, width), (last, last + n_rows, 0, right + 1)]
    return parts if last == row + 1 else [*parts, (row + 1, last, 0, width)]


def _meet(rectangles):
    """Return whether two rectangles have a place in common."""
    begins = [(first, True, left, right) for first, _, left, right in rectangles]
    ends = [(after, False, left, right) for _, after, left, right in rectangles]
    lefts: list[int] = []  # of the rectangles in the row that the sweep has reached
    rights: list[int] = []
    for _, begin, left, right in sorted(begins + ends):  # what ends at a row comes before what begins there
        k = bisect.bisect_right(lefts, left)
        if not begin:
            del lefts[k - 1], rights[k - 1]
        elif (k and rights[k - 1] > left) or (k < len(lefts) and lefts[k] < right):
            return True
        else:
            lefts.insert(k, left)
            rights.insert(k, right)
    return False
