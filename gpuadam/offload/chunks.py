"""Chunks: a step's updates are cut into pieces of parameters, and the pieces of a chunk go through the stages together."""

from typing import Any, NamedTuple

from ..kernels.adam import Form
from ..kernels.operands import GROUP, Arrays, Operand
from ..kernels.view import View
from .mapped import Mapping

# A step is cut into about CHUNKS chunks, but into none of fewer bytes than SMALLEST_CHUNK: pages are cheaper in large numbers.
CHUNKS, SMALLEST_CHUNK = 256, 1 << 25
# A slot holds one chunk that is under way. On a GPU one chunk is copied to it, one is updated and one is copied back; on the host
# each processor has a slot, up to MOST_SLOTS.
SLOTS_ON_GPU, MOST_SLOTS = 3, 8
ALIGNMENT = 64  # bytes: arrays in a slot, in a file of state and in the host's memory begin at multiples of it
# Elements, 2 MB of float32: a large page, by which Linux may map files. Linux reads a large page whole. So the chunks of an array
# that starts on a large page also end on one, and no page is read for two chunks.
EDGE = 1 << 19


class PlacedOperand(NamedTuple):
    """An operand of a parameter's update, and where its array lies."""

    kind: Operand
    view: View
    mapping: Mapping | None  # of the file that the array lies in
    copied: bool  # the update runs on a copy, because the array is on the other side of the bus

    @property
    def takes_room(self):
        """Whether the budget counts the array: as a copy, or as pages of a file."""
        return self.copied or self.mapping is not None

    @property
    def lasts(self):
        """Whether every step has the same array: the parameter and its state. A gradient may lie elsewhere in the next one."""
        return self.kind.name != "grad"

    def part(self, start, stop):
        """Return a View of the part for the elements start ... stop - 1 of the parameter. start: a multiple of GROUP."""
        if self.kind.of_groups:
            start, stop = start // GROUP, -(-stop // GROUP)
        itemsize = self.view.dtype.itemsize
        pointer = self.view.pointer + start * itemsize
        return self.view._replace(pointer=pointer, shape=(stop - start,), strides=(itemsize,), contiguous=True)


class Launch(NamedTuple):
    """What the updates have in common that one launch can make."""

    formats: Arrays
    form: Form
    scalars: Any
    key: int  # of the step, for random rounding


class Job(NamedTuple):
    """The update of one parameter."""

    operands: list[PlacedOperand]
    size: int
    key: int  # for random rounding
    launch: Launch

    def bytes_of(self, n):
        """Return the room that n elements take in a chunk."""
        return sum(aligned(operand.kind.nbytes(n)) for operand in self.operands if operand.takes_room)

    def least(self):
        """Return the least room in which the parameter can be cut."""
        return self.bytes_of(min(GROUP, self.size)) + ALIGNMENT * sum(operand.takes_room for operand in self.operands)

    def fitting(self, room):
        """Return how many elements fit in a room: all, or the largest multiple of GROUP."""
        if self.bytes_of(self.size) <= room:
            return self.size
        n = room // sum(operand.kind.nbytes(GROUP) for operand in self.operands if operand.takes_room) * GROUP
        while self.bytes_of(n) > room:  # by the gaps between the arrays
            n -= GROUP
        return n


class Piece(NamedTuple):
    """The elements start ... stop - 1 of a parameter. start is a multiple of GROUP."""

    job: Job
    start: int
    stop: int


def aligned(n_bytes):
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def aligned_memory(allocate, n_bytes):
    """Return an array of bytes that begins at a multiple of ALIGNMENT. allocate(n): an array of n bytes."""
    memory = allocate(n_bytes + ALIGNMENT)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes]


def room_of(jobs, budget, slots):
    """Return the bytes of each chunk, or raise ValueError if the budget is too small for the jobs."""
    least, most = max((job.least() for job in jobs), default=0), budget // slots
    if least > most:
        raise ValueError(f"budget={budget:,} bytes is too little: {slots * least:,} is the least for these arrays")
    total = sum(job.bytes_of(job.size) for job in jobs)
    return max(least, min(most, max(SMALLEST_CHUNK, total // CHUNKS)))


def cut(jobs, room):
    """Yield chunks, in the order of the jobs: lists of Pieces that fit in the room. room: at least `least()` of each job."""
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
            if not n or (chunk and n < rest.size and left < room // 4):  # no sliver of a parameter that is cut in any case
                yield chunk
                chunk, left = [], room
                continue
            chunk.append(Piece(job, start, start + n))
            left -= job.bytes_of(n)
            start += n
    if chunk:
        yield chunk
