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


def split(pointers, size, itemsize):
    """Split `size` elements at the 16-byte boundaries that all pointers share; no vectors where they share none.

    >>> split([0x1004, 0x2014, 0x3024], size=10, itemsize=4)  # 3 elements, 1 vector of 4, 3 elements
    Split(head=3, vectors=1, threads=7)
    >>> split([0x1000, 0x2004], size=10, itemsize=4)
    Split(head=0, vectors=0, threads=10)
    """
    lanes = VECTOR_BYTES // itemsize
    offset = pointers[0] % VECTOR_BYTES
    if any(pointer % VECTOR_BYTES != offset for pointer in pointers):
        return Split(0, 0, size)
    head = min(-offset % VECTOR_BYTES // itemsize, size)
    vectors = (size - head) // lanes
    return Split(head, vectors, size - vectors * (lanes - 1))


def dense(views):
    """Whether all arrays fill their memory without gaps and in the same order of dimensions: each is one run of elements."""
    if all(view.contiguous for view in views):
        return True
    _, strides = collapse(views[0].shape, [view.strides for view in views])
    return all(steps in ((), (views[0].dtype.itemsize,)) for steps in strides)


def collapse(shape, strides):
    """Merge the dimensions that all arrays step through as one, and drop those of one element.

    strides: one tuple of bytes for each array. Dimensions are first put in the order of the first array's memory.

    >>> collapse((2, 3, 4), [(48, 16, 4), (48, 16, 4)])
    ((24,), [(4,), (4,)])
    >>> collapse((2, 3), [(4, 8), (12, 4)])  # F order beside C order
    ((3, 2), [(8, 4), (4, 12)])
    """
    dims = [(n, *steps) for n, *steps in zip(shape, *strides, strict=True) if n != 1]
    dims.sort(key=lambda dim: -abs(dim[1]))
    merged: list[list[int]] = []
    for n, *steps in dims:
        if merged and merged[-1][1:] == [n * step for step in steps]:
            merged[-1] = [merged[-1][0] * n, *steps]
        else:
            merged.append([n, *steps])
    return tuple(dim[0] for dim in merged), [tuple(dim[k + 1] for dim in merged) for k in range(len(strides))]
