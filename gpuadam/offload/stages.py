"""The stages of a chunk: `fetch`, `update` and `store`. `OnHost` updates by the CPU, `OnDevice` by a GPU.

Arrays that are already on the updating side are updated in place. The others are copied there and back, through the memory of a
slot. On the host, the pages of files are brought in before the update, and let go after it unless all of them fit in the budget.
Each slot has a stream of its own, so that a copy to the GPU, a kernel and a copy from it, of three chunks, run at once.
"""

import contextlib

from .. import backends
from ..kernels.gpu_batch import Place
from .runner import Runner, host_bytes


class OnHost(Runner):
    """The stages of an update by the CPU. Arrays on a GPU are copied to pinned memory and back."""

    on_gpu = False

    def fetch(self, chunk, number):
        self.place(chunk, number)
        for extent in self.placed[number].extents:
            extent.mapping.populate(extent.start, extent.end, extent.writes)
        if self.gpu:
            self.cross(number, back=False)
            self.finish(number)

    def update(self, chunk, number):
        cpu = backends.load("numba-cpu")
        with contextlib.nullcontext() if self.alone else cpu.one_thread():
            self.launch(cpu, number, None)

    def store(self, chunk, number):
        for extent in self.placed[number].extents:
            if not (self.keeps and extent.lasts):
                extent.mapping.drop(extent.start, extent.end)
        if self.gpu:
            self.cross(number, back=True)
            self.finish(number)


class OnDevice(Runner):
    """The stages of an update by a GPU. Arrays of the host are copied to it and back, those in files through pinned memory."""

    on_gpu = True

    def fetch(self, chunk, number):
        self.place(chunk, number)
        self._copy_files(number, back=False)

    def update(self, chunk, number):
        self.cross(number, back=False)
        self.launch(self.gpu, number, Place(self.slots[number].stream, [], False))
        self.cross(number, back=True)

    def store(self, chunk, number):
        self.finish(number)
        self._copy_files(number, back=True)

    def _copy_files(self, number, back):
        for copy in self.copies(number, back):
            if copy.operand.mapping:
                copy.operand.mapping.copy(copy.array.pointer, host_bytes(copy.host), writes=back)
