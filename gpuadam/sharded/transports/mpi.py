"""The transport of MPI, through mpi4py."""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ... import checks
from .protocol import Calls, RankEnded, RankMissing, Work, imported
from .sums import Sums

FIRST = 248  # bytes of an object that go through the first collective of `exchange`
ENDED = -1  # in the place of an object's size
HERE, PART = 1, 2  # tags of messages: that this rank is here, for `_watch`; and a piece of a sum, for `Sums`


class MPI:
    """Ranks of MPI, for arrays in the CPU's memory: the extra `mpi` brings mpi4py and MPICH.

    comm: a communicator of mpi4py, by default COMM_WORLD. The transport uses a duplicate of it, so that messages of the caller
        do not mix with its own.
    timeout: seconds, the same on all ranks, or None for ever. A rank that waits longer for the others raises RankMissing, which
        names the ranks that are stopped, dead or busy with something else. Choose more than the ranks' longest work between two
        steps. A rank that waits for others to make their transport cannot tell which they are.

    As soon as it is made, an exception that nobody handles ends all ranks, without `-m mpi4py` too: `sys.excepthook` calls Abort.
    A rank whose program ends tells the others, whose next call then raises RankEnded; so does `close`. It waits for their end
    without a timeout, as MPI_Finalize does. If it ends amid a call, or after a call that was cut short, it calls Abort. After
    `os._exit` or a kill the other ranks are not told. mpiexec ends the job; where a launcher does not, the timeout does. (After
    `os._exit(0)` mpiexec's status may be 0.)

    Raises ImportError without mpi4py, and TypeError or ValueError for a timeout that is not a positive number, or that differs
    between ranks.

    Gradients are summed in the order of the ranks: ((g0 + g1) + g2) + g3, each sum rounded to float32, or to float64 for float64.
    So the bits of a sum depend on the gradients and the number of ranks alone. They depend neither on the library of MPI, whose
    own reduce-scatter has no order that is known, nor on buckets, nor on which rank owns an element.

    Collectives are non-blocking, but MPICH moves bytes only while a rank is inside a call of MPI. With the environment variable
    MPIR_CVAR_ASYNC_PROGRESS=1 a thread of MPICH's moves them all the time, which pays where there is a core for it.
    """

    memory = "CPU"

    def __init__(self, comm: Any = None, timeout: float | None = None) -> None:
        self._mpi = imported("mpi4py.MPI", 'pip install "gpuadam[mpi]"')
        if timeout is not None and (timeout := checks.finite("timeout", timeout)) <= 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds, or None to wait for ever")
        comm = self._mpi.COMM_WORLD if comm is None else comm
        self.rank, self.size, self.calls = comm.rank, comm.size, Calls()
        self._ended: list[int] = []  # the ranks that make no more calls
        self._started = 0  # how many collectives have begun
        # number of a collective that is not done -> what tests whether it is
        self._pending: dict[int, Callable[[], bool]] = {}
        self._timeout: Any = timeout  # this and the next two are for `_watch`
        self._told = 0
        self._heard: dict[int, int] = {}
        if self.size > 1:
            _tell_of_the_end(self)
        self._comm: Any = None
        duplicate, request = comm.Idup()
        self._work(request.Test).wait()
        self._comm, self._sums = duplicate, Sums(self._mpi, duplicate, PART)
        if len(set(timeouts := self.exchange(timeout))) > 1:
            raise ValueError(f"the ranks differ in timeout, {timeouts}: give all ranks the same")

    def reduce_scatter(self, buffer: Any, part: Any) -> Work:
        return self._work(self._sums.start(buffer, part))

    def all_gather(self, buffer: Any) -> Work:
        return self._work(self._comm.Iallgather(self._mpi.IN_PLACE, buffer.view(np.uint8)).Test)

    def broadcast(self, buffer: Any) -> None:
        self._work(self._comm.Ibcast(buffer.view(np.uint8)).Test).wait()

    def exchange(self, item: Any) -> list[Any]:
        self._check_ended()
        if self._pending:
            raise ValueError(
                f"rank {self.rank} has a collective that was cut short, or whose Work was not waited for. Wait first; after one "
                "that was cut short, start all ranks again"
            )
        pickled = np.frombuffer(pickle.dumps(item), np.uint8)
        first, work = self._gather_first(pickled, pickled.size)
        work.wait()
        sizes = first[:, FIRST:].copy().view(np.int64).ravel()
        self._ended = np.flatnonzero(sizes == ENDED).tolist()
        self._check_ended()
        if sizes.max() <= FIRST:  # the objects of most steps are that small
            return [pickle.loads(bytes(row[:size])) for row, size in zip(first, sizes, strict=True)]
        everything = np.empty(sizes.sum(), np.uint8)
        self._work(self._comm.Iallgatherv(pickled, [everything, sizes]).Test).wait()
        return [pickle.loads(bytes(part)) for part in np.split(everything, np.cumsum(sizes)[:-1])]

    def close(self) -> None:
        """Tell the other ranks, without waiting for them, that this rank makes no more calls. Theirs raise RankEnded."""
        with self.calls.alone("the closing of a transport"):
            if not self._ended:
                self._gather_first(np.empty(0, np.uint8), ENDED)
                self._ended = [self.rank]

    def _check_ended(self):
        if self._ended:
            ranks = ", ".join(map(str, self._ended))
            raise RankEnded(
                f"rank {ranks} has ended, or closed its transport, and rank {self.rank} makes another call: let all ranks take "
                "the same number of steps, or end where this is raised"
            )

    def _gather_first(self, pickled, size):
        """Start to collect the first bytes of each rank's object, and its size. Return where these come to be, and the Work."""
        first = np.zeros((self.size, FIRST + 8), np.uint8)
        first[self.rank, : min(pickled.size, FIRST)] = pickled[:FIRST]
        first[self.rank, FIRST:].view(np.int64)[0] = size
        return first, self._work(self._comm.Iallgather(self._mpi.IN_PLACE, first.reshape(-1)).Test)

    def _work(self, is_done):
        """Return the Work of a collective. is_done: tests whether it is done, and lets MPI go on with it."""
        self._started += 1
        number = self._started
        self._pending[number] = is_done

        def wait():
            begun = time.monotonic()
            # MPI_Wait would spin, deaf to Ctrl-C. With more ranks than cores, sleeping for a moment lets another rank run
            for polls in itertools.count(1):
                if is_done():
                    self._pending.pop(number, None)
                    return
                if polls % 64 == 0:
                    time.sleep(0)
                    if self._timeout is not None:
                        self._watch(number, time.monotonic() - begun)

        return Work(wait)

    def _watch(self, number, waited):
        """Raise RankMissing if this rank has waited too long for a collective. number: of the collective.

        After half the timeout a rank tells the others how many collectives it has begun. Those that wait, too, answer. So at
        the end of the timeout the rank knows who is there.
        """
        asked = False
        while self._comm is not None and self._comm.Iprobe(tag=HERE):
            message, status = np.zeros(1, np.int64), self._mpi.Status()
            self._comm.Recv(message, tag=HERE, status=status)
            self._heard[status.source] = message[0]
            asked = True
        others = [rank for rank in range(self.size) if rank != self.rank]
        if self._comm is not None and self._told < self._started and (asked or waited > self._timeout / 2):
            self._told = self._started
            # never waited for: a rank that does not receive them is stopped, and messages of 8 bytes do not wait for it
            self._sent = [self._comm.Isend(np.array([self._started], np.int64), rank, HERE) for rank in others]
        if waited > self._timeout:
            missing = [str(rank) for rank in others if self._heard.get(rank, 0) < number]
            if self._comm is None:
                who = "not all ranks have made their transport"
            elif missing:
                who = f"rank {', '.join(missing)} has not come: it may be stopped, dead, or busy with something else"
            else:
                who = "all ranks wait: they may have made different calls"
            raise RankMissing(f"rank {self.rank} has waited for its timeout, {self._timeout} s, and {who}")


_open: list[MPI] = []  # transports whose other ranks are to be told when this one ends


def _tell_of_the_end(transport):
    """See to it that the other ranks do not wait for ever for this one, however its program ends."""
    if not _open:
        before, mpi = sys.excepthook, transport._mpi

        def abort(kind, value, traceback):
            before(kind, value, traceback)
            if _open:
                _abort(transport)

        sys.excepthook = abort
        mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=lambda *_: _end()), None)  # MPI_Finalize deletes it first
        atexit.register(_end)  # mpi4py calls MPI_Finalize when Python can run no function any more
        if hasattr(os, "register_at_fork"):  # Windows does not fork
            os.register_at_fork(after_in_child=_open.clear)  # the end of a child is not that of its rank
    _open.append(transport)


def _end():
    """Tell the other ranks that this one ends, and wait until they end, too."""
    for transport in list(_open):
        amid = transport.calls.under_way or ("a collective" if transport._pending and not transport._ended else "")
        if amid:
            print(f"rank {transport.rank} ends amid {amid}, or after it was cut short: all ranks end", file=sys.stderr)
            _abort(transport)
    for transport in _open:
        transport.close()
    pending = [is_done for transport in _open for is_done in transport._pending.values()]
    while not all(is_done() for is_done in pending):
        time.sleep(0.001)
    _open.clear()


def _abort(transport):
    _open.clear()  # Abort may return, and this rank then ends without a word
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.5)  # mpiexec passes on what it has read, and Abort makes it stop reading
    transport._mpi.COMM_WORLD.Abort(1)
