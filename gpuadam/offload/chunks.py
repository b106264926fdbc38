"""What a step's updates are cut into: pieces of parameters that go through the stages together."""

from typing import Any, NamedTuple

from ..kernels.operands import GROUP
from ..kernels.view import View
from .mapped import Mapping

ALIGNMENT = 64  # bytes, of an array in a slot
# Elements, 2 MB of float32: the large pages in which Linux may map files. Where a part of one is asked for, all of it comes:
# so an array that begins with one has its chunks end with one.
EDGE = 1 << 19


class Operand(NamedTuple):
    """An array of a parameter's update."""

    view: View
    loads: bool
    stores: bool
    of_groups: bool  # it has an element for each GROUP of the parameter's
    mapping: Mapping | None  # if it is in a file

    def part(self, start, stop):
        """Return a View of what belongs to the elements start ... stop - 1 of the parameter."""
        if self.of_groups:
            start, stop = start // GROUP, -(-stop // GROUP)
        view, itemsize = self.view, self.view.dtype.itemsize
        return view._replace(
            pointer=view.pointer + start * itemsize, shape=(stop - start,), strides=(itemsize,), contiguous=True
        )


class Job(NamedTuple):
    """The update of one parameter."""

    operands: list[Operand]
    size: int
    key: int  # for random rounding
    launch: Any  # what all updates have in common that one launch can make
    moved: tuple[bool, ...]  # of each operand: whether it takes room in a chunk

    def bytes_of(self, n):
        """Return the room that n elements take in a chunk."""
        each = (o.view.dtype.itemsize * (-(-n // GROUP) if o.of_groups else n) for o in self._moved())
        return sum(aligned(n_bytes) for n_bytes in each)

    def fitting(self, room):
        """Return how many elements fit in a room: all, or the largest multiple of GROUP."""
        if self.bytes_of(self.size) <= room:
            return self.size
        of_group = sum(o.view.dtype.itemsize * (1 if o.of_groups else GROUP) for o in self._moved())
        n = room // of_group * GROUP
        while self.bytes_of(n) > room:  # by what lies between the arrays
            n -= GROUP
        return n

    def _moved(self):
        return [operand for operand, moved in zip(self.operands, self.moved, strict=True) if moved]


class Piece(NamedTuple):
    """The elements start ... stop - 1 of a parameter. start is a multiple of GROUP."""

    job: Job
    start: int
    stop: int


def aligned(n_bytes):
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def smallest(jobs):
    """Return the least room in which every job can be cut."""
    return max((job.bytes_of(min(GROUP, job.size)) + ALIGNMENT * sum(job.moved) for job in jobs), default=0)


def cut(jobs, room):
    """Yield chunks: lists of Pieces that take no more than this room, of the jobs in order. room: at least `smallest(jobs)`."""
    chunk: list[Piece] = []
    left = room
    for job in jobs:
        start = 0
        edge = EDGE if job.fitting(room) >= EDGE else GROUP
        while start < job.size:
            rest = job._replace(size=job.size - start)
            n = rest.fitting(left)
            if n < rest.size:
                n = n // edge * edge
            if not n or (chunk and n < rest.size and left < room // 4):  # no slivers of what does not fit anyway
                yield chunk
                chunk, left = [], room
                continue
            chunk.append(Piece(job, start, start + n))
            left -= job.bytes_of(n)
            start += n
    if chunk:
        yield chunk
