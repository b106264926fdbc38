"""The transport of MPI, through mpi4py."""

import itertools
import pickle
import sys
import time

import numpy as np

from .protocol import Work, imported

FIRST = 248  # bytes of an object that go through the first collective of `exchange`


class MPI:
    """Ranks of MPI, for arrays in the CPU's memory: the extra `mpi` brings mpi4py and MPICH.

    comm: a communicator of mpi4py, by default COMM_WORLD. The transport uses a duplicate of it, so that messages of the caller
        do not mix with its own.

    As soon as it is made, an exception that nobody handles ends all ranks, without `-m mpi4py` too: `sys.excepthook` calls Abort.
    Collectives are non-blocking, but MPICH moves bytes only while a rank is inside a call of MPI. With the environment variable
    MPIR_CVAR_ASYNC_PROGRESS=1 a thread of MPICH's moves them all the time, which pays where there is a core for it.
    """

    memory = "CPU"

    def __init__(self, comm=None):
        self._mpi = imported("mpi4py.MPI", 'pip install "gpuadam[mpi]"')
        self._comm = (self._mpi.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        _abort_all_ranks_on_an_exception(self._comm)

    def reduce_scatter(self, buffer, part):
        return _work(self._comm.Ireduce_scatter_block(buffer, part, self._mpi.SUM))

    def all_gather(self, buffer):
        return _work(self._comm.Iallgather(self._mpi.IN_PLACE, buffer.view(np.uint8)))

    def broadcast(self, buffer):
        _work(self._comm.Ibcast(buffer.view(np.uint8))).wait()

    def exchange(self, item):
        pickled = np.frombuffer(pickle.dumps(item), np.uint8)
        first = np.zeros((self.size, FIRST + 8), np.uint8)  # the first bytes of each rank's object, and its size
        first[self.rank, : min(pickled.size, FIRST)] = pickled[:FIRST]
        first[self.rank, FIRST:].view(np.int64)[0] = pickled.size
        self.all_gather(first.reshape(-1)).wait()
        sizes = first[:, FIRST:].copy().view(np.int64).ravel()
        if sizes.max() <= FIRST:  # the objects of most steps are that small
            return [pickle.loads(bytes(row[:size])) for row, size in zip(first, sizes, strict=True)]
        everything = np.empty(sizes.sum(), np.uint8)
        _work(self._comm.Iallgatherv(pickled, [everything, sizes])).wait()
        return [pickle.loads(bytes(part)) for part in np.split(everything, np.cumsum(sizes)[:-1])]


def _work(request):
    """Return the Work of a request of MPI."""

    def wait():
        # MPI_Wait would spin, deaf to Ctrl-C. Where there are more ranks than cores, sleeping for a moment lets another rank run
        for polls in itertools.count(1):
            if request.Test():
                return
            if polls % 64 == 0:
                time.sleep(0)

    return Work(wait)


def _abort_all_ranks_on_an_exception(comm):
    """End all ranks when an exception ends this one: the others would wait for it for ever."""
    if comm.size == 1:
        return
    before = sys.excepthook

    def abort(kind, value, traceback):
        before(kind, value, traceback)
        sys.stdout.flush()
        sys.stderr.flush()
        comm.Abort(1)

    sys.excepthook = abort
