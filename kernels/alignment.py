"""How one launch covers arrays that may start anywhere: a head, 16-byte vectors, a tail."""

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
