"""How ranks exchange what `ShardedAdam` needs: over MPI, NCCL or torch's process groups, or, with one rank, not at all.

A rank is a process. Start one for each GPU, or for each part of a CPU, by

    mpiexec -n 4 python -m mpi4py script.py

where `-m mpi4py` makes a rank that raises or exits early end all the others; mpiexec ends them when one is killed. Each rank
makes its transport, and its optimizer with it, in the same order. What a transport is made of is imported when it is made.
"""

import contextlib
import pickle
import sys
import time
from typing import Any, Protocol

import numpy as np

from ...kernels import view as arrays


class Work(Protocol):
    """A collective under way."""

    def wait(self):
        """Return when it is done; on a GPU, make CuPy's current stream wait for it."""


class Transport(Protocol):
    """What `ShardedAdam` asks of a transport. Buffers are 1-D arrays without gaps, of one size on all ranks.

    Every rank calls the same methods in the same order. A buffer is not touched from a call of the first two until its Work has
    been waited for. `memory` says whose arrays it takes: "CPU", NumPy's; "CUDA", CuPy's; "any".
    """

    rank: int
    size: int
    memory: str

    def reduce_scatter(self, buffer, part) -> Work:
        """Store in part, of 1/size of the buffer, the sum over all ranks of the rank-th part of their buffers."""

    def all_gather(self, buffer) -> Work:
        """Fill the buffer, whose rank-th part is there, with the parts of the other ranks. They are bytes of any dtype."""

    def broadcast(self, buffer):
        """Make the buffer that of rank 0, and return when it is."""

    def exchange(self, item) -> list:
        """Return what each rank gave, in the order of the ranks: Python objects that can be pickled, and NumPy arrays."""


class Done:
    """A Work that was done when its call returned."""

    def wait(self):
        pass


class Local:
    """One rank, which is everything. What needs several ranks can be written and tested with it.

    >>> import numpy as np
    >>> transport = Local()
    >>> part = np.zeros(3)
    >>> transport.reduce_scatter(np.ones(3), part).wait()
    >>> print(part, transport.exchange("a"))
    [1. 1. 1.] ['a']
    """

    rank, size, memory = 0, 1, "any"

    def reduce_scatter(self, buffer, part):
        part[...] = buffer
        return Done()

    def all_gather(self, buffer):
        return Done()

    def broadcast(self, buffer):
        pass

    def exchange(self, item):
        return [item]


class MPI:
    """Ranks of MPI, for arrays in the CPU's memory: the extra `mpi` brings mpi4py and MPICH.

    comm: a communicator of mpi4py, by default COMM_WORLD. A duplicate of it is used, so that no message of the caller's is
        mistaken for one of these.

    From when it is made an exception that nobody handles ends all ranks, without `-m mpi4py` too: `sys.excepthook` calls Abort.
    Collectives are non-blocking, but MPICH moves bytes only while a rank is inside a call of MPI. With the environment variable
    MPIR_CVAR_ASYNC_PROGRESS=1 a thread of its own does so all the time, which pays where that has a core.
    """

    memory = "CPU"

    def __init__(self, comm=None):
        self._mpi = _imported("mpi4py.MPI", 'pip install "gpuadam[mpi]"')
        self._comm = (self._mpi.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        _abort_all_ranks_on_an_exception(self._comm)

    def reduce_scatter(self, buffer, part):
        return _Request(self._comm.Ireduce_scatter_block(buffer, part, self._mpi.SUM))

    def all_gather(self, buffer):
        return _Request(self._comm.Iallgather(self._mpi.IN_PLACE, buffer.view(np.uint8)))

    def broadcast(self, buffer):
        _Request(self._comm.Ibcast(buffer.view(np.uint8))).wait()

    def exchange(self, item):
        given = np.frombuffer(pickle.dumps(item), np.uint8)
        first = np.zeros((self.size, FIRST + 8), np.uint8)  # the first bytes of each, and how many there are
        first[self.rank, : min(given.size, FIRST)] = given[:FIRST]
        first[self.rank, FIRST:].view(np.int64)[0] = given.size
        self.all_gather(first.reshape(-1)).wait()
        sizes = first[:, FIRST:].copy().view(np.int64).ravel()
        if sizes.max() <= FIRST:  # as what is exchanged at each step mostly is
            return [pickle.loads(bytes(row[:size])) for row, size in zip(first, sizes, strict=True)]
        everything = np.empty(sizes.sum(), np.uint8)
        _Request(self._comm.Iallgatherv(given, [everything, sizes])).wait()
        return [pickle.loads(bytes(part)) for part in np.split(everything, np.cumsum(sizes)[:-1])]


FIRST = 248  # bytes of an object that go through the first collective


class _Request:
    def __init__(self, request):
        self._request = request

    def wait(self):
        # MPI_Wait would spin, deaf to Ctrl-C. Where there are more ranks than cores, sleeping for a moment lets another rank run
        polls = 0
        while not self._request.Test():
            polls += 1
            if polls % 64 == 0:
                time.sleep(0)


class NCCL:
    """Ranks with a GPU each, by NCCL through CuPy; MPI brings them together. CuPy's current device is the rank's.

    comm: as in `MPI`, which also carries what is the host's: checks, and the sums of a norm.

    Collectives run on a stream of their own, beside the updates on CuPy's current one, and after what was enqueued there before.
    The host does not wait for them.
    """

    memory = "CUDA"

    def __init__(self, comm=None):
        cupy = _imported("cupy", 'pip install "gpuadam[cuda13]" (or cuda12)')
        self._cupy, self._nccl = cupy, _imported("cupy.cuda.nccl", "install a CuPy that has it")
        if not self._nccl.available:
            raise ImportError("CuPy finds no NCCL: pip install nvidia-nccl-cu13 (or -cu12, as CuPy's CUDA)")
        self._host = MPI(comm)
        self.rank, self.size, self.exchange = self._host.rank, self._host.size, self._host.exchange
        (unique, *_) = self.exchange(self._nccl.get_unique_id() if self.rank == 0 else None)
        self._nccl_comm = self._nccl.NcclCommunicator(self.size, unique, self.rank)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._numbers = {"float32": self._nccl.NCCL_FLOAT32, "float64": self._nccl.NCCL_FLOAT64}

    def reduce_scatter(self, buffer, part):
        number, add = self._numbers[buffer.dtype.name], self._nccl.NCCL_SUM
        stream = self._after_current()
        self._nccl_comm.reduceScatter(buffer.data.ptr, part.data.ptr, part.size, number, add, stream)
        return self._work()

    def all_gather(self, buffer):
        n_bytes = buffer.nbytes // self.size
        own = buffer.data.ptr + self.rank * n_bytes  # where NCCL knows it for in place
        self._nccl_comm.allGather(own, buffer.data.ptr, n_bytes, self._nccl.NCCL_UINT8, self._after_current())
        return self._work()

    def broadcast(self, buffer):
        at = buffer.data.ptr
        self._nccl_comm.broadcast(at, at, buffer.nbytes, self._nccl.NCCL_UINT8, 0, self._after_current())
        self._work().wait()

    def _after_current(self):
        """Make the communication wait for what is enqueued on the current stream, and return the handle of its own."""
        self._stream.wait_event(self._recorded(self._cupy.cuda.get_current_stream()))
        return self._stream.ptr

    def _work(self):
        return _Event(self._cupy, self._recorded(self._stream))

    def _recorded(self, stream):
        return stream.record(self._cupy.cuda.Event(disable_timing=True))


class _Event:
    def __init__(self, cupy, event):
        self._cupy, self._event = cupy, event

    def wait(self):
        self._cupy.cuda.get_current_stream().wait_event(self._event)


class Torch:
    """The ranks of a process group of torch, which the caller has initialised: gloo for the CPU, NCCL for GPUs.

    group: by default the whole world. With NCCL the arrays are CuPy's, and CuPy's current stream is made torch's while a
    collective is enqueued. gloo has no reduce-scatter of its own, and sums whole buffers: right, but slower than MPI.
    `torchrun` starts the ranks, and ends them all when one fails.
    """

    def __init__(self, group=None):
        self._torch = _imported("torch", "pip install torch")
        self._dist = dist = _imported("torch.distributed", "install a torch that is built with it")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch has no process group yet: call torch.distributed.init_process_group first")
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.memory = "CUDA" if "nccl" in dist.get_backend(group) else "CPU"
        self._root = 0 if group is None else dist.get_global_rank(group, 0)
        # the names before torch 2.13 are deprecated from there on
        self._reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def reduce_scatter(self, buffer, part):
        return self._enqueued(self._reduce_scatter, self._tensor(part), self._tensor(buffer))

    def all_gather(self, buffer):
        whole = self._tensor(buffer.view(np.uint8))
        return self._enqueued(self._all_gather, whole, whole.chunk(self.size)[self.rank])

    def broadcast(self, buffer):
        self._enqueued(self._dist.broadcast, self._tensor(buffer.view(np.uint8)), self._root).wait()

    def exchange(self, item):
        items: list[Any] = [None] * self.size
        with self._stream():
            self._dist.all_gather_object(items, item, group=self._group)
        return items

    def _tensor(self, array):
        """Return a tensor over the memory of an array."""
        return self._torch.from_numpy(array) if self.memory == "CPU" else self._torch.from_dlpack(array)

    def _enqueued(self, collective, *arguments):
        with self._stream():
            return _TorchWork(collective(*arguments, group=self._group, async_op=True), self._stream)

    def _stream(self):
        """Make CuPy's current stream torch's."""
        if self.memory == "CPU":
            return contextlib.nullcontext()
        import cupy

        cuda = self._torch.cuda
        return cuda.stream(cuda.ExternalStream(cupy.cuda.get_current_stream().ptr))


class _TorchWork:
    def __init__(self, work, stream):
        self._work, self._stream = work, stream

    def wait(self):
        with self._stream():
            self._work.wait()


def _imported(name, fix):
    try:
        return __import__(name, fromlist=["_"])
    except (ImportError, RuntimeError) as error:  # the second is mpi4py's, where there is no library of MPI
        raise ImportError(f"{name} is needed for this transport and cannot be imported ({error}): {fix}") from error


def _abort_all_ranks_on_an_exception(comm):
    """End all ranks when this one ends by an exception: else the others would wait for it for ever."""
    if comm.size == 1:
        return
    before = sys.excepthook

    def abort(kind, value, traceback):
        before(kind, value, traceback)
        sys.stdout.flush()
        sys.stderr.flush()
        comm.Abort(1)

    sys.excepthook = abort


def check(transport):
    """Raise TypeError for what is no transport, before it is used."""
    for name in ("rank", "size", "memory", "reduce_scatter", "all_gather", "broadcast", "exchange"):
        if isinstance(transport, type) or not hasattr(transport, name):
            raise TypeError(
                f"transport is {_kind(transport)}, which has no {name}: "
                "pass gpuadam.transports.MPI(), NCCL(), Torch() or Local()"
            )


def _kind(transport):
    return f"the class {transport.__name__}" if isinstance(transport, type) else arrays.a_kind(transport)
