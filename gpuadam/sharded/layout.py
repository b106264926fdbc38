"""Which elements of which parameters a rank owns: where parameters lie in one flat buffer, and how that is cut.

    cell     CELL = 4096 neighbours of the buffer; what one rank owns is whole cells
    bucket   neighbouring cells that go through a collective at once: as many for each rank, which owns that part of the bucket
    shard    the neighbours of one parameter in a rank's part of a bucket

A parameter of a cell or more begins a cell, and a smaller one lies in a single cell. So a parameter is only ever cut at multiples
of CELL of its own elements: the chunks of `global_norm`, the groups of 8-bit state and the numbers of its elements, which
random rounding goes by, are the same whatever the number of ranks.
"""

import bisect
import itertools
from typing import NamedTuple

from ..kernels.norm_order import CHUNK
from ..kernels.operands import GROUP

CELL = CHUNK


class Shard(NamedTuple):
    """The elements start ... stop - 1, in C order, of one parameter, which one rank owns."""

    parameter: int  # its number in the buffer
    start: int
    stop: int
    bucket: int
    at: int  # the number of its first element in the buffer


class Bucket(NamedTuple):
    """The elements start ... stop - 1 of the buffer: one part of `part` elements for each rank, in order."""

    start: int
    stop: int
    part: int

    def part_of(self, rank):
        """Return the first element of a rank's part, and the one after its last."""
        start = self.start + rank * self.part
        return start, start + self.part


class Layout:
    """Parameters of some sizes in one buffer, over some ranks. bucket_cells: how many cells a bucket has, about.

    >>> layout = Layout(sizes=[10_000, 5, 100], ranks=2, bucket_cells=2)
    >>> layout.starts, layout.size  # the small ones are in the third cell too, behind the large one's end
    ([0, 10016, 10048], 16384)
    >>> [(shard.parameter, shard.start, shard.stop) for shard in layout.shards(rank=0)]
    [(0, 0, 4096), (0, 8192, 10000), (1, 0, 5), (2, 0, 100)]
    """

    def __init__(self, sizes, ranks, bucket_cells):
        self.sizes, self.ranks = list(sizes), ranks
        self.starts, end = placed(self.sizes)
        self._used = [k for k, size in enumerate(self.sizes) if size]
        self._used_starts = [self.starts[k] for k in self._used]
        left = -(-end // CELL)
        self.buckets: list[Bucket] = []
        at = 0
        while left > 0:
            # the last one may have cells that nobody uses: each rank has as many
            part = min(max(bucket_cells // ranks, 1), -(-left // ranks)) * CELL
            self.buckets.append(Bucket(at, at + ranks * part, part))
            at += ranks * part
            left -= ranks * part // CELL
        self.size = at

    def shards(self, rank):
        """Return what a rank owns, in the order of the buffer."""
        found = []
        for k, bucket in enumerate(self.buckets):
            first, last = bucket.part_of(rank)
            for parameter in self._within(first, last):
                at = self.starts[parameter]
                start, stop = max(first - at, 0), min(last - at, self.sizes[parameter])
                found.append(Shard(parameter, start, stop, k, at + start))
        return found

    def _within(self, first, last):
        """Return the numbers of the parameters that have elements among first ... last - 1 of the buffer."""
        before = bisect.bisect_right(self._used_starts, first) - 1  # the last that begins there or before
        after = bisect.bisect_left(self._used_starts, last)
        return [k for k in self._used[max(before, 0) : after] if first < self.starts[k] + self.sizes[k]]

    def beginning_in(self, bucket):
        """Return the numbers of the parameters whose first element is in a bucket."""
        start, stop, _ = self.buckets[bucket]
        return [k for k in self._within(start, stop) if self.starts[k] >= start]

    def ending_in(self, bucket):
        """Return the numbers of the parameters whose last element is in a bucket."""
        start, stop, _ = self.buckets[bucket]
        return [k for k in self._within(start, stop) if self.starts[k] + self.sizes[k] <= stop]


def placed(sizes):
    """Return where each parameter begins, and the end of the last."""
    starts, end = [], 0
    for size in sizes:
        at = -(-end // GROUP) * GROUP
        if at % CELL and at % CELL + size > CELL:
            at = -(-at // CELL) * CELL
        starts.append(at)
        end = at + size
    return starts, end


def chunk_numbers(layout, rank, firsts):
    """Return the numbers, in a norm, of the chunks that a rank owns, in the order of its shards.

    firsts: the number of each parameter's first chunk; None for one that has no part in the norm.
    """
    numbers: list[int] = []
    for shard in layout.shards(rank):
        first = firsts[shard.parameter]
        if first is not None:
            numbers += range(first + shard.start // CHUNK, first + -(-shard.stop // CHUNK))
    return numbers


def first_chunks(sizes):
    """Return the number of the first chunk of each array of a norm, and how many chunks there are.

    sizes: of the arrays, in the norm's order; None for one that has no part in it.

    >>> first_chunks([5, None, 4097, 1])
    ([0, None, 1, 3], 4)
    """
    counts = [0 if size is None else -(-size // CHUNK) for size in sizes]
    firsts = [0, *itertools.accumulate(counts)]
    return [None if size is None else first for size, first in zip(sizes, firsts, strict=False)], firsts[-1]
