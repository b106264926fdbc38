"""The norm of gradients of which each rank has a part: the bits of `global_norm`, for any number of ranks.

A rank sums the chunks in its shards, which are whole (`layout.py`). Then all ranks exchange these sums, one float64 for each 4096
elements, and add them up in the order of the parameters. On a GPU the sums come to the host, which waits for them.
"""

import itertools

import numpy as np

from .. import backends
from ..kernels.norm_order import CHUNK, chunks_of


class ShardedNorm:
    """The norm of the sums of some OwnedShards and of those of the other ranks."""

    def __init__(self, kernels, shards, transport):
        self._kernels, self._shards, self._transport = kernels, shards, transport
        self._sizes, self._order = None, None

    def norm(self, sizes):
        """Return the norm of the reduced gradients. sizes: of all gradients, by number; None for a parameter without one."""
        shards = [shard for shard in self._shards if sizes[shard.number] is not None]
        if self._sizes != sizes:
            self._sizes, self._order = sizes, self._order_of_chunks(shards, sizes)
        sums = self._exchanged(self._kernels.chunk_sums([self._kernels.view("", shard.sums) for shard in shards]))
        return backends.load("numba-cpu").norm_of_chunks(sums[self._order])

    def _order_of_chunks(self, shards, sizes):
        """Return the indices that put the chunks of all ranks into the order of the parameters."""
        firsts = [0, *itertools.accumulate(chunks_of(size or 0) for size in sizes)]
        numbers = [firsts[s.number] + np.arange(s.start // CHUNK, chunks_of(s.stop)) for s in shards]
        return np.argsort(self._exchanged(np.concatenate([np.empty(0, np.int64), *numbers])))

    def _exchanged(self, array):
        """Return the arrays of all ranks, one after another."""
        return np.concatenate(self._transport.exchange(array))
