"""The norm of gradients of which each rank has a part: the bits of `global_norm`, whatever the number of ranks.

A rank sums its own chunks, which are whole ones (`shard_layout.py`). All ranks then have all sums, one float64 for each 4096
elements, and add them up in the order of the parameters. On a GPU the sums come to the host, which waits for them.
"""

import numpy as np

from .. import backends
from .layout import chunk_numbers, first_chunks


class ShardedNorm:
    """The norm of the gradients in some `shard_buffer.Buffer`s. It keeps which chunks are whose for the next step."""

    def __init__(self, kernels, buffers, transport):
        self._kernels, self._buffers, self._transport = kernels, buffers, transport
        self._sizes, self._numbers = None, []

    def norm(self, sizes):
        """Return the norm of the sums that the reduce-scatters have left. sizes: of all gradients; None for one left out."""
        own = []
        for buffer in self._buffers:
            shards = [shard for shard in buffer.shards if sizes[buffer.numbers[shard.parameter]] is not None]
            own += [self._kernels.view("", buffer.sums[shard]) for shard in shards]
        parts = self._transport.exchange(self._kernels.chunk_sums(own))
        sums = np.empty(sum(part.size for part in parts))
        for numbers, part in zip(self._chunk_numbers(sizes), parts, strict=True):
            sums[numbers] = part
        return backends.load("numba-cpu").norm_of_chunks(sums)

    def _chunk_numbers(self, sizes):
        """Return, for each rank, the numbers of its chunks in the norm."""
        if self._sizes != sizes:
            firsts, _ = first_chunks(sizes)
            self._sizes, self._numbers = sizes, []
            for rank in range(self._transport.size):
                of_buffers = [chunk_numbers(b.layout, rank, [firsts[n] for n in b.numbers]) for b in self._buffers]
                self._numbers.append(np.concatenate(of_buffers).astype(np.int64))
        return self._numbers
