"""Which elements of which parameters a rank owns: where parameters lie in one flat buffer, and how the buffer is cut.

    cell     CELL = 4096 neighbours of the buffer. A rank owns whole cells
    bucket   neighbouring cells that go through a collective together. Every rank owns a part of it, of as many cells
    shard    the neighbours of one parameter in a rank's part of a bucket

A parameter of a cell or more begins a cell, and a smaller one lies in a single cell. So a parameter is only cut at multiples of
CELL of its own elements. The chunks of `global_norm`, the groups of 8-bit state, and the numbers of elements, on which random
rounding depends, are therefore the same for any number of ranks.
"""

import bisect
from typing import NamedTuple

from ..kernels.norm_order import CHUNK
from ..kernels.operands import GROUP

CELL = CHUNK


class Shard(NamedTuple):
    """The elements start ... stop - 1, in C order, of one parameter. One rank owns them."""

    parameter: int  # its number in the buffer
    start: int
    stop: int
    place: slice  # of the buffer


class Bucket(NamedTuple):
    """The elements start ... stop - 1 of the buffer: one part of `part` elements for each rank, in order."""

    start: int
    stop: int
    part: int

    def part_of(self, rank):
        """Return the number of the first element of a rank's part, and the number after its last."""
        start = self.start + rank * self.part
        return start, start + self.part


class Layout:
    """Parameters of some sizes in one buffer, cut for some ranks. bucket_cells: about how many cells a bucket has.

    >>> layout = Layout(sizes=[10_000, 5, 100], ranks=2, bucket_cells=2)
    >>> layout.starts, layout.size  # the two small parameters lie in the third cell, behind the end of the large one
    ([0, 10016, 10048], 16384)
    >>> [(shard.parameter, shard.start, shard.stop) for shard in layout.shards(layout.buckets[1], rank=0)]
    [(0, 8192, 10000), (1, 0, 5), (2, 0, 100)]
    """

    def __init__(self, sizes, ranks, bucket_cells):
        self.sizes = list(sizes)
        self.starts, end = placed(self.sizes)
        self.buckets: list[Bucket] = []
        self.size = 0
        while self.size < end:
            cells_left = -(-(end - self.size) // CELL)
            # every rank has as many cells, so the last bucket may have some without a parameter
            part = min(max(bucket_cells // ranks, 1), -(-cells_left // ranks)) * CELL
            self.buckets.append(Bucket(self.size, self.size + ranks * part, part))
            self.size += ranks * part

    def shards(self, bucket, rank):
        """Return the shards that a rank owns in a bucket, in the order of the buffer."""
        first, last = bucket.part_of(rank)
        within = [(k, self.starts[k]) for k in self.within(first, last)]
        parts = [(k, at, max(first - at, 0), min(last - at, self.sizes[k])) for k, at in within]
        return [Shard(k, start, stop, slice(at + start, at + stop)) for k, at, start, stop in parts]

    def within(self, first, last):
        """Return the numbers of the parameters that have elements among first ... last - 1 of the buffer."""
        earliest = max(bisect.bisect_right(self.starts, first) - 1, 0)  # parameters before it end before `first`
        latest = bisect.bisect_left(self.starts, last)
        return [k for k in range(earliest, latest) if self.sizes[k] and first < self.starts[k] + self.sizes[k]]


def placed(sizes):
    """Return the number of each parameter's first element in the buffer, and the number after the last one's end."""
    starts, end = [], 0
    for size in sizes:
        at = -(-end // GROUP) * GROUP
        if at % CELL and at % CELL + size > CELL:
            at = -(-at // CELL) * CELL
        starts.append(at)
        end = at + size
    return starts, end
