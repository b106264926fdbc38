"""Ranks that are threads of one process: what needs several ranks, but no MPI, can be tested in milliseconds."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpuadam import transports

SECONDS = 60  # until a rank that waits for others gives up


class Threads:
    """A transport between threads. shared: an object of all ranks, with `barrier` and a list `given`."""

    memory = "CPU"

    def __init__(self, rank, size, shared):
        self.rank, self.size, self._shared = rank, size, shared

    def broken(self):
        """Let the ranks that wait, and those that come, raise BrokenBarrierError."""
        self._shared.barrier.abort()

    def exchange(self, item):
        self._shared.given[self.rank] = item
        self._shared.barrier.wait()
        found = list(self._shared.given)
        self._shared.barrier.wait()
        return found

    def reduce_scatter(self, buffer, part):
        own = slice(self.rank * part.size, (self.rank + 1) * part.size)
        buffers = self.exchange(buffer)
        part[...] = np.sum([other[own] for other in buffers], axis=0, dtype=part.dtype)
        self._shared.barrier.wait()
        return transports.Work()

    def all_gather(self, buffer):
        n = buffer.size // self.size
        for rank, other in enumerate(self.exchange(buffer)):
            if rank != self.rank:
                own = slice(rank * n, (rank + 1) * n)
                buffer[own] = other[own]
        self._shared.barrier.wait()
        return transports.Work()

    def broadcast(self, buffer):
        buffer[...] = self.exchange(buffer)[0]
        self._shared.barrier.wait()


class _Shared:
    def __init__(self, size):
        self.barrier, self.given = threading.Barrier(size, timeout=SECONDS), [None] * size


def on_ranks(size, function, *arguments):
    """Call function(transport, *arguments) on some ranks. Return what each of them returned, or the error that it raised."""
    shared = _Shared(size)

    def rank_main(rank):
        try:
            return function(Threads(rank, size, shared), *arguments)
        except Exception as error:  # noqa: BLE001 - what it is, the caller looks at
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank_main, range(size)))


def all_well(results):
    """Return the results of ranks, none of which has raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
