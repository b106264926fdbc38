"""The stages of a chunk: `fetch`, `update` and `store`. `OnHost` updates by the CPU, `OnDevice` by a GPU.

Arrays that are already on the updating side are updated in place. The others are copied there and back, through the memory of a
slot. On the host, the pages of files are brought in before the update and let go after it. Each slot has a stream of its own, so
that a copy to the GPU, a kernel and a copy from it, of three chunks, run at once.
"""

import contextlib
import ctypes
import threading
from typing import Any, NamedTuple

import numpy as np

from .. import backends
from ..kernels import adam
from ..kernels.gpu_launch import Place
from ..kernels.layout import Update
from ..kernels.streams import LEGACY_DEFAULT
from ..kernels.view import View
from .chunks import ALIGNMENT, Launch, Operand, aligned, aligned_memory
from .mapped import Extent, merged


class Slot(NamedTuple):
    """What a chunk has to itself while it is under way. The owners keep a stream and memory of the GPU alive."""

    stream_owner: Any = None
    stream: int = LEGACY_DEFAULT
    pinned: np.ndarray | None = None  # bytes of the host
    gpu_owner: Any = None
    gpu_address: int = 0


class Part(NamedTuple):
    """A piece's part of an operand: the array, and where it is on each side of the bus. An array that stays is on both."""

    operand: Operand
    array: View
    host: View
    gpu: View


class Stages:
    """The slots of a step, and the copies between the host and a GPU.

    gpu: the kernels of the GPU's backend, or None if no array is on a GPU. device: its number. room: the bytes of a chunk. slots:
    how many chunks are under way at once. files: whether some arrays lie in files.

    A subclass has the stages. Each takes a chunk and the number of its slot.
    """

    on_gpu: bool  # whether updates run on the GPU

    def __init__(self, gpu, device, room, slots, files):
        self.gpu, self.device, self.room, self.files = gpu, device, room, files
        self.alone = True  # whether the step is one chunk, which may take all threads
        self.extents: list[list[Extent]] = [[] for _ in range(slots)]  # of files, for the chunk in each slot
        self.slots = [Slot()] * slots
        if gpu:
            with gpu.on(device, None):
                self.slots = [self._new_slot() for _ in range(slots)]
                # a pool may give out memory that is still in use by work on the current stream
                self.after(gpu.current_stream() or LEGACY_DEFAULT)

    def _new_slot(self):
        gpu_owner, address = self.gpu.device_bytes(self.room + ALIGNMENT) if self.on_gpu else (None, 0)
        pinned = aligned_memory(self.gpu.pinned, self.room) if self.files or not self.on_gpu else None
        stream_owner, stream = self.gpu.new_stream()
        return Slot(stream_owner, stream, pinned, gpu_owner, aligned(address))

    def after(self, stream):
        """Let the copies and updates that follow wait for the work on a stream."""
        with self.gpu.on(self.device, None):
            event = self.gpu.record(stream)
            for slot in self.slots:
                self.gpu.wait(slot.stream, event)

    def finish(self, number):
        """Wait for the work on the stream of a slot."""
        if self.gpu:
            with self.gpu.on(self.device, None):
                self.gpu.finish(self.gpu.record(self.slots[number].stream))

    def parts(self, chunk, number):
        """Return (piece, Parts of its operands) for each piece of a chunk. The copies lie one after the other in the slot."""
        slot, offset, parts_of_pieces = self.slots[number], 0, []
        for piece in chunk:
            parts = []
            for operand in piece.job.operands:
                array = host = gpu = operand.part(piece.start, piece.stop)
                if operand.copied:
                    if not self.on_gpu or operand.mapping:
                        pointer = slot.pinned.ctypes.data + offset
                        host = array._replace(array=slot.pinned, pointer=pointer, device=None, stream=None)
                    if self.on_gpu:
                        pointer = slot.gpu_address + offset
                        gpu = array._replace(array=slot.gpu_owner, pointer=pointer, device=self.device, stream=None)
                    offset += aligned(array.nbytes)
                parts.append(Part(operand, array, host, gpu))
            parts_of_pieces.append((piece, parts))
        return parts_of_pieces

    def loaded(self, chunk, number):
        """Return the Parts to copy before the update."""
        return [part for part in self._copies(chunk, number) if part.operand.kind.loads]

    def stored(self, chunk, number):
        """Return the Parts to copy back after the update."""
        return [part for part in self._copies(chunk, number) if part.operand.kind.stores]

    def _copies(self, chunk, number):
        return [part for _, parts in self.parts(chunk, number) for part in parts if part.operand.copied]

    def to_gpu(self, parts, number):
        """Enqueue copies from the host to the GPU, on the stream of a slot."""
        with self.gpu.on(self.device, None):
            for part in parts:
                self.gpu.send(part.gpu.pointer, host_bytes(part.host), part.host.nbytes, self.slots[number].stream)

    def to_host(self, parts, number):
        """Enqueue copies from the GPU to the host, on the stream of a slot."""
        with self.gpu.on(self.device, None):
            for part in parts:
                self.gpu.receive(host_bytes(part.host), part.gpu.pointer, part.host.nbytes, self.slots[number].stream)

    def launch(self, kernels, chunk, number, place):
        """Launch the updates of a chunk: those that share a Launch at once."""
        updates_of: dict[Launch, list[Update]] = {}
        for piece, parts in self.parts(chunk, number):
            views = [part.gpu if self.on_gpu else part.host for part in parts]
            updates_of.setdefault(piece.job.launch, []).append(Update(views, piece.job.key, piece.start))
        for (formats, form, scalars, key), updates in updates_of.items():
            kernel = kernels.name, form, len(updates) > 1
            with contextlib.nullcontext() if kernel in _compiled else _compiling:
                for batch in kernels.batches(updates, formats):
                    batch.prepare(adam, form, scalars, place, key)
                    batch.launch()
                    batch.release()
            _compiled.add(kernel)


# The first launch of a kernel compiles it. Without the lock several threads would do so at once.
_compiled: set = set()
_compiling = threading.Lock()


def host_bytes(view):
    """Return memory of the host as an array of bytes."""
    return np.frombuffer((ctypes.c_uint8 * view.nbytes).from_address(view.pointer), np.uint8)


class OnHost(Stages):
    """The stages of an update by the CPU. Arrays on a GPU are copied to pinned memory and back."""

    on_gpu = False

    def fetch(self, chunk, number):
        self.extents[number] = _extents(chunk)
        for extent in self.extents[number]:
            extent.mapping.populate(extent.start, extent.end, extent.writes)
        if self.gpu:
            self.to_host(self.loaded(chunk, number), number)
            self.finish(number)

    def update(self, chunk, number):
        cpu = backends.load("numba-cpu")
        with contextlib.nullcontext() if self.alone else cpu.one_thread():
            self.launch(cpu, chunk, number, None)

    def store(self, chunk, number):
        for extent in self.extents[number]:
            extent.mapping.drop(extent.start, extent.end)
        if self.gpu:
            self.to_gpu(self.stored(chunk, number), number)
            self.finish(number)


def _extents(chunk):
    """Return the Extents of files that a chunk's arrays lie in, merged."""
    extents = []
    for job, start, stop in chunk:
        for operand in job.operands:
            if operand.mapping:
                first, n_bytes = operand.part(start, stop).pointer, operand.kind.nbytes(stop - start)
                extents.append(Extent(operand.mapping, first, first + n_bytes, operand.kind.stores))
    return merged(extents)


class OnDevice(Stages):
    """The stages of an update by a GPU. Arrays of the host are copied to it and back, those in files through pinned memory."""

    on_gpu = True

    def fetch(self, chunk, number):
        for part in self.loaded(chunk, number):
            if part.operand.mapping:
                part.operand.mapping.copy(part.array.pointer, host_bytes(part.host), writes=False)

    def update(self, chunk, number):
        self.to_gpu(self.loaded(chunk, number), number)
        self.launch(self.gpu, chunk, number, Place(self.slots[number].stream, [], False))
        self.to_host(self.stored(chunk, number), number)

    def store(self, chunk, number):
        self.finish(number)
        for part in self.stored(chunk, number):
            if part.operand.mapping:
                part.operand.mapping.copy(part.array.pointer, host_bytes(part.host), writes=True)
