"""The transport of torch's process groups."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from .protocol import Calls, Work, imported


class Torch:
    """The ranks of a process group of torch, which the caller has initialised: gloo for the CPU, NCCL for GPUs.

    group: by default the whole world. With NCCL the arrays are CuPy's, and CuPy's current stream is made torch's while a
    collective is enqueued. gloo has no reduce-scatter of its own, and sums whole buffers: right, but slower than MPI.
    `torchrun` starts the ranks, and ends them all when one fails. When a rank ends or is missing, it is torch that raises an
    error: gloo as soon as a connection is closed, both after the timeout that `init_process_group` was given. After a call that
    was cut short, a new transport needs a new group.
    """

    def __init__(self, group: Any = None) -> None:
        self._torch = imported("torch", 'pip install "gpuadam[torch]"')
        self._dist = dist = imported("torch.distributed", "install a torch that is built with it")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch has no process group yet: call torch.distributed.init_process_group first")
        self._group, self.calls = group, Calls()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.memory = "CUDA" if "nccl" in dist.get_backend(group) else "CPU"
        self._root = 0 if group is None else dist.get_global_rank(group, 0)
        # torch 2.13 deprecates the second names
        self._reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def reduce_scatter(self, buffer: Any, part: Any) -> Work:
        return self._enqueued(self._reduce_scatter, self._tensor(part), self._tensor(buffer))

    def all_gather(self, buffer: Any) -> Work:
        whole = self._tensor(buffer.view(np.uint8))
        return self._enqueued(self._all_gather, whole, whole.chunk(self.size)[self.rank])

    def broadcast(self, buffer: Any) -> None:
        self._enqueued(self._dist.broadcast, self._tensor(buffer.view(np.uint8)), self._root).wait()

    def exchange(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.size
        with self._stream():
            self._dist.all_gather_object(items, item, group=self._group)
        return items

    def _tensor(self, array):
        """Return a tensor over the memory of an array."""
        return self._torch.from_numpy(array) if self.memory == "CPU" else self._torch.from_dlpack(array)

    def _enqueued(self, collective, *arguments):
        with self._stream():
            work = collective(*arguments, group=self._group, async_op=True)

        def wait():
            with self._stream():
                work.wait()

        return Work(wait)

    def _stream(self):
        """Make CuPy's current stream torch's."""
        if self.memory == "CPU":
            return contextlib.nullcontext()
        cupy = imported("cupy", "the arrays of this transport are CuPy's")
        cuda, handle = self._torch.cuda, cupy.cuda.get_current_stream().ptr
        # for the handle 0, of the default stream, torch takes any stream of its pool
        return cuda.stream(cuda.ExternalStream(handle) if handle else cuda.default_stream())
