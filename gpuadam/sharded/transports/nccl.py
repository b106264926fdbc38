"""The transport of NCCL, through CuPy."""

from __future__ import annotations

from typing import Any

from .mpi import MPI
from .protocol import Work, imported


class NCCL(MPI):
    """Ranks with a GPU each, by NCCL through CuPy. MPI brings them together. CuPy's current device is the rank's.

    comm, timeout: as in `MPI`, which also carries the data of the host: checks, and the sums of a norm.

    Collectives run on a stream of their own, beside the updates on CuPy's current stream, and after the work that was enqueued
    there before. The host does not wait for them.

    The end of a rank is told as in `MPI`, and the timeout holds for what MPI carries. So a rank that is missing is named when the
    others begin their next call. A missing rank is not named while the host waits for the GPU, as with max_norm or in a copy of a
    parameter: a collective on a GPU ends with its process alone, and there a rank that dies amid a step leaves the end of the
    job to mpiexec.
    """

    memory = "CUDA"

    def __init__(self, comm: Any = None, timeout: float | None = None) -> None:
        self._cupy = imported("cupy", 'pip install "gpuadam[cuda13]" (or cuda12)')
        self._nccl = imported("cupy.cuda.nccl", "install a CuPy that has it")
        if not self._nccl.available:
            raise ImportError("CuPy finds no NCCL: pip install nvidia-nccl-cu13 (or -cu12, as CuPy's CUDA)")
        super().__init__(comm, timeout)
        (unique, *_) = self.exchange(self._nccl.get_unique_id() if self.rank == 0 else None)
        self._communicator = self._nccl.NcclCommunicator(self.size, unique, self.rank)
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self._dtypes = {"float32": self._nccl.NCCL_FLOAT32, "float64": self._nccl.NCCL_FLOAT64}

    def reduce_scatter(self, buffer: Any, part: Any) -> Work:
        dtype = self._dtypes[buffer.dtype.name]
        return self._enqueued(
            self._communicator.reduceScatter, buffer.data.ptr, part.data.ptr, part.size, dtype, self._nccl.NCCL_SUM
        )

    def all_gather(self, buffer: Any) -> Work:
        n_bytes = buffer.nbytes // self.size
        part = buffer.data.ptr + self.rank * n_bytes  # NCCL knows from this address that it works in place
        return self._enqueued(self._communicator.allGather, part, buffer.data.ptr, n_bytes, self._nccl.NCCL_UINT8)

    def broadcast(self, buffer: Any) -> None:
        at = buffer.data.ptr
        self._enqueued(self._communicator.broadcast, at, at, buffer.nbytes, self._nccl.NCCL_UINT8, 0).wait()

    def _enqueued(self, collective, *arguments):
        """Enqueue a collective on its own stream, after the work on the current one. Return its Work."""
        self._stream.wait_event(self._event(self._current()))
        collective(*arguments, self._stream.ptr)
        event = self._event(self._stream)
        return Work(lambda: self._current().wait_event(event))

    def _current(self):
        return self._cupy.cuda.get_current_stream()

    def _event(self, stream):
        return stream.record(self._cupy.cuda.Event(disable_timing=True))
