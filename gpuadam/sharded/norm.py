"""The norm of gradients of which each rank has a part: the bits of `global_norm`, for any number of ranks.

A rank sums the chunks in its shards, which are whole (`layout.py`). Then all ranks exchange these sums, one float64 for each 4096
elements, and add them up in the order of the parameters. On a GPU the sums come to the host, which waits for them.
"""

import numpy as np

from .. import backends
from .layout import chunk_numbers, first_chunks


class ShardedNorm:
    """The norm of the gradients in some Buffers. It keeps for the next step which chunks each rank has."""

    def __init__(self, kernels, buffers, transport):
        self._kernels, self._buffers, self._transport = kernels, buffers, transport
        self._sizes, self._numbers = None, []

    def norm(self, sizes):
        """Return the norm of the reduced gradients. sizes: of all gradients, by number; None for a parameter without one."""
        shards = (shard for buffer in self._buffers for bucket in buffer.buckets for shard in bucket.shards)
        views = [self._kernels.view("", shard.sums) for shard in shards if sizes[shard.number] is not None]
        sums_of_ranks = self._transport.exchange(self._kernels.chunk_sums(views))
        sums = np.empty(sum(of_rank.size for of_rank in sums_of_ranks))
        for numbers, of_rank in zip(self._chunk_numbers(sizes), sums_of_ranks, strict=True):
            sums[numbers] = of_rank
        return backends.load("numba-cpu").norm_of_chunks(sums)

    def _chunk_numbers(self, sizes):
        """Return, for each rank, the numbers of its chunks in the norm."""
        if self._sizes != sizes:
            firsts, _ = first_chunks(sizes)
            self._sizes, self._numbers = sizes, []
            for rank in range(self._transport.size):
                of_buffers = [chunk_numbers(b.layout, rank, [firsts[m.number] for m in b.members]) for b in self._buffers]
                self._numbers.append(np.concatenate(of_buffers).astype(np.int64))
        return self._numbers
