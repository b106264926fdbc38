"""How arrays lie in memory: which are one run of elements, and how a launch covers runs that may start anywhere."""

from typing import NamedTuple

VECTOR_BYTES = 16  # the widest load and store of one thread (before sm_100), and a quarter of what a warp asks for at once


class Split(NamedTuple):
    """One thread for each vector, then one for each element of the head and of the tail.

    Thread i < vectors updates the elements from head + i * lanes. A later thread, i = vectors + k, updates element k while
    k < head, and element k + vectors * lanes from there on.
    """

    head: int
    vectors: int
    threads: int


def split(pointers, itemsizes, size):
    """Split `size` elements where all pointers are at 16-byte boundaries, or at those of a vector's bytes if it has fewer.

    A vector is 16 bytes of the narrowest array. There are none where the arrays share no such place.

    >>> split([0x1004, 0x2014, 0x3024], [4, 4, 4], size=10)  # 3 elements, 1 vector of 4, 3 elements
    Split(head=3, vectors=1, threads=7)
    >>> split([0x1000, 0x2004], [4, 4], size=10)
    Split(head=0, vectors=0, threads=10)
    >>> split([0x100C, 0x2006], [4, 2], size=20)  # float32 beside bfloat16: 5 elements, 1 vector of 8, 7 elements
    Split(head=5, vectors=1, threads=13)
    """
    lanes = VECTOR_BYTES // min(itemsizes)
    for head in range(min(lanes, size + 1)):
        if all((pointer + head * n) % VECTOR_BYTES == 0 for pointer, n in zip(pointers, itemsizes, strict=True)):
            vectors = (size - head) // lanes
            return Split(head, vectors, size - vectors * (lanes - 1))
    return Split(0, 0, size)


def split_groups(pointers, itemsizes, size, lanes):
    """Split `size` elements into items of `lanes` neighbours from the first on: Split(0, how many are whole vectors, all).

    No item is a vector if an array does not begin at a boundary of 16 bytes, or of a vector's bytes if it has fewer.

    >>> split_groups([0x1000, 0x2008], [4, 1], size=20, lanes=8)  # float32 beside bytes: 2 vectors, and a rest of 4 elements
    Split(head=0, vectors=2, threads=3)
    """
    boundaries = [min(VECTOR_BYTES, lanes * n) for n in itemsizes]
    aligned = all(pointer % n == 0 for pointer, n in zip(pointers, boundaries, strict=True))
    return Split(0, size // lanes if aligned else 0, -(-size // lanes))


class Update(NamedTuple):
    """The arrays of one update: Views in the order of `operands.operands_of`."""

    views: list
    key: int = (
        0  # for random rounding: an int64 that tells this parameter from others, and the number of its first element here
    )
    start: int = 0


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
    """Return after how many elements of dtype, from a boundary on, an array starts whose later boundaries are at a view's."""
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
