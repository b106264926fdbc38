"""A step in chunks: its jobs are cut to the budget and go through the stages, after the streams that wrote their arrays.

Arrays that are already on the updating side are updated in place. The others are copied there and back, through the memory of a
slot. On the host, the pages of files are brought in before the update, and let go after it unless all of them fit in the budget.
Each slot has a stream of its own, so that a copy to the GPU, a kernel and a copy from it, of three chunks, run at once.
"""

import contextlib
import ctypes
import threading
from typing import Any, NamedTuple

import numpy as np

from .. import backends
from ..kernels import adam, streams
from ..kernels.gpu_batch import Place
from ..kernels.layout import Update
from ..kernels.messages import how_many
from ..kernels.streams import LEGACY_DEFAULT
from ..kernels.view import View
from ..under_way import TORN
from . import chunks, pipeline
from .chunks import ALIGNMENT, Launch, PlacedOperand, aligned, aligned_memory
from .mapped import Extent, merged


class Slot(NamedTuple):
    """What a chunk has to itself while it is under way. The owners keep a stream and memory of the GPU alive."""

    stream_owner: Any = None
    stream: int = LEGACY_DEFAULT
    pinned: np.ndarray | None = None  # bytes of the host
    gpu_owner: Any = None
    gpu_address: int = 0


class Copy(NamedTuple):
    """A piece's part of an array that is copied: the part, and where it is on each side of the bus."""

    operand: PlacedOperand
    array: View
    host: View
    gpu: View


class Placed(NamedTuple):
    """The chunk in a slot."""

    updates: dict[Launch, list[Update]]
    copies: list[Copy]
    extents: list[Extent]  # of files, for arrays that the host updates in place


class Runner:
    """Runs steps. It keeps its slots from step to step, and with them their memory.

    on_gpu: whether updates run on the GPU. gpu: the kernels of its backend, or None. device: of the parameters; None if they are
    on the host. budget: bytes. bar: the class of rich's progress bars, or None to show nothing. Attributes: `last_step`, a text;
    `keeps`, whether all parameters and state in files fit in the budget, beside the chunks under way, and so stay in the
    process's memory.
    """

    def __init__(self, on_gpu, gpu, device, budget, bar):
        self.on_gpu = on_gpu
        self.gpu: Any = gpu if on_gpu or device is not None else None
        self.on_host, self.device, self.budget, self.bar = device is None, device or 0, budget, bar
        n_threads = backends.load("numba-cpu").n_threads()
        self.n_slots = chunks.SLOTS_ON_GPU if on_gpu else min(max(n_threads, 2), chunks.MOST_SLOTS)
        self.slots = [Slot()] * self.n_slots
        self.room, self.files = 0, False  # the bytes of each slot, and whether they serve arrays in files
        self.placed: dict[int, Placed] = {}  # by the number of the slot
        self.alone = True  # whether the step is one chunk, which may take all threads
        self.keeps = False
        self._lasting: dict[int, int] = {}  # the bytes of each array in a file, but of gradients, by its address
        self.last_step = "no step was taken yet"

    def run(self, jobs, stream, begin):
        """Run the jobs of a step, and return when they are done. begin(): is called when nothing can be refused any more.

        Raises ValueError (the budget) or RuntimeError (a graph is captured) before that; RuntimeError, or what the disk or Ctrl-C
        raises, if the step is cut short.
        """
        room = chunks.room_of(jobs, self.budget, self.n_slots)
        work = list(chunks.cut(jobs, room))
        self._make_slots(room, any(operand.mapping for job in jobs for operand in job.operands))
        self.alone = len(work) == 1
        lasting = (operand.view for job in jobs for operand in job.operands if operand.lasts and operand.mapping)
        self._lasting.update((view.pointer, view.nbytes) for view in lasting)  # a step may leave some of them out
        self.keeps = sum(self._lasting.values()) + self.n_slots * room <= self.budget
        size = f"{how_many(len(work), 'chunk')} of up to {room:,} bytes"
        self.last_step = f"the last step in {size}, {self.n_slots} of them under way at once"
        if not self.on_host:
            self._wait_for_callers(jobs, stream)
        begin()
        with self.bar(transient=True) if self.bar else contextlib.nullcontext() as bar:
            task = bar and bar.add_task("step", total=sum(job.size for job in jobs))

            def store(chunk, slot):
                self.store(chunk, slot)
                if bar:
                    bar.advance(task, sum(piece.stop - piece.start for piece in chunk))

            try:
                pipeline.run(work, self.fetch, self.update, store, self.n_slots)
            except BaseException as error:
                for slot in range(self.n_slots):
                    self.finish(slot)  # what was begun still uses memory that its owner may give up now
                # errors of the disk and Ctrl-C stay what they are; the driver's do not say what they were for
                if isinstance(error, Exception) and not isinstance(error, OSError):
                    raise RuntimeError(f"the step was cut short ({type(error).__name__}: {error}): {TORN}") from error
                raise
            finally:
                self.placed.clear()  # gradients are not kept alive

    def _make_slots(self, room, files):
        """Make slots of some bytes, unless those of an earlier step are good enough. files: whether some arrays lie in files."""
        if self.room >= room and self.files >= files:
            return
        self.slots, self.room, self.files = [Slot()] * self.n_slots, 0, files  # their memory is given back first
        if self.gpu:
            with self.gpu.on(self.device, None):
                self.slots = [self._new_slot(room) for _ in self.slots]
                # a pool may give out memory that is still in use by work on the current stream
                self._wait_for(self.gpu.current_stream() or LEGACY_DEFAULT)
        self.room = room

    def _new_slot(self, room):
        gpu_owner, address = self.gpu.device_bytes(room + ALIGNMENT) if self.on_gpu else (None, 0)
        pinned = aligned_memory(self.gpu.pinned, room) if self.files or not self.on_gpu else None
        stream_owner, stream = self.gpu.new_stream()
        return Slot(stream_owner, stream, pinned, gpu_owner, aligned(address))

    def _wait_for(self, stream):
        """Let the copies and updates that follow wait for the work on a stream."""
        with self.gpu.on(self.device, None):
            event = self.gpu.record(stream)
            for slot in self.slots:
                self.gpu.wait(slot.stream, event)

    def _wait_for_callers(self, jobs, stream):
        """Let a step wait for the streams of its arrays. stream: given by the caller, or None."""
        named = [operand.view.stream for job in jobs for operand in job.operands if operand.view.device is not None]
        place = self.gpu.place(self.device, streams.handle(stream), named)
        if place.capturing:
            raise RuntimeError(
                "a graph is being captured on this stream, and no graph can hold a step of OffloadAdam, whose launches and "
                "copies the host orders: take the step outside of the capture"
            )
        for earlier in (place.stream, *place.others):
            self._wait_for(earlier)

    # The stages of a chunk. number: of its slot

    def fetch(self, chunk, number):
        """Place the chunk in its slot, and bring what lies in files into memory."""
        self.place(chunk, number)
        for extent in self.placed[number].extents:
            extent.mapping.populate(extent.start, extent.end, extent.writes)
        self._copy_files(number, back=False)

    def update(self, chunk, number):
        """Update the chunk, between its copies over the bus. The host waits for those that it reads."""
        self.cross(number, back=False)
        if self.on_gpu:
            self.launch(self.gpu, number, Place(self.slots[number].stream, [], False))
        else:
            self.finish(number)
            cpu = backends.load("numba-cpu")
            with contextlib.nullcontext() if self.alone else cpu.one_thread():
                self.launch(cpu, number, None)
        self.cross(number, back=True)

    def store(self, chunk, number):
        """Bring the chunk's results to where they belong."""
        for extent in self.placed[number].extents:
            if not (self.keeps and extent.lasts):
                extent.mapping.drop(extent.start, extent.end)
        self.finish(number)
        self._copy_files(number, back=True)

    def place(self, chunk, number):
        """Place a chunk in a slot, where the copies of its arrays lie one after the other."""
        slot, offset = self.slots[number], 0
        updates: dict[Launch, list[Update]] = {}
        copies: list[Copy] = []
        extents: list[Extent] = []
        for job, start, stop in chunk:
            views = []
            for operand in job.operands:
                view = array = operand.part(start, stop)
                if operand.copied:
                    host = gpu = array
                    if not self.on_gpu or operand.mapping:
                        pointer = slot.pinned.ctypes.data + offset
                        host = array._replace(array=slot.pinned, pointer=pointer, device=None, stream=None)
                    if self.on_gpu:
                        pointer = slot.gpu_address + offset
                        gpu = array._replace(array=slot.gpu_owner, pointer=pointer, device=self.device, stream=None)
                    offset += aligned(array.nbytes)
                    copies.append(Copy(operand, array, host, gpu))
                    view = gpu if self.on_gpu else host
                elif operand.mapping:
                    end = array.pointer + array.nbytes
                    extents.append(Extent(operand.mapping, array.pointer, end, operand.kind.stores, operand.lasts))
                views.append(view)
            updates.setdefault(job.launch, []).append(Update(views, job.key, start))
        self.placed[number] = Placed(updates, copies, merged(extents))

    def copies(self, number, back):
        """Return the Copies that the chunk in a slot needs before its update or, back, after it."""
        copies = self.placed[number].copies
        return [copy for copy in copies if (copy.operand.kind.stores if back else copy.operand.kind.loads)]

    def _copy_files(self, number, back):
        """Copy between files and the pinned memory of a slot, for an update on the GPU."""
        for copy in self.copies(number, back):
            if copy.operand.mapping:
                copy.operand.mapping.copy(copy.array.pointer, host_bytes(copy.host), writes=back)

    def cross(self, number, back):
        """Enqueue copies between the host and the GPU, on the stream of a slot. back: those after the update."""
        if not self.gpu:
            return
        stream = self.slots[number].stream
        with self.gpu.on(self.device, None):
            for copy in self.copies(number, back):
                memory, address = host_bytes(copy.host), copy.gpu.pointer
                if back == self.on_gpu:
                    self.gpu.receive(memory, address, memory.nbytes, stream)
                else:
                    self.gpu.send(address, memory, memory.nbytes, stream)

    def launch(self, kernels, number, place):
        """Launch the updates of the chunk in a slot: those that share a Launch at once."""
        for (formats, form, scalars, key), updates in self.placed[number].updates.items():
            kernel = kernels.name, form, len(updates) > 1
            with contextlib.nullcontext() if kernel in _compiled else _compiling:
                for batch in kernels.batches(updates, formats):
                    batch.prepare(adam, form, scalars, place, key)
                    batch.launch()
                    batch.release()
            _compiled.add(kernel)

    def finish(self, number):
        """Wait for the work on the stream of a slot."""
        if self.gpu:
            with self.gpu.on(self.device, None):
                self.gpu.finish_stream(self.slots[number].stream)  # asleep, while other workers copy files


# The first launch of a kernel compiles it. Without the lock several threads would do so at once.
_compiled: set = set()
_compiling = threading.Lock()


def host_bytes(view):
    """Return memory of the host as an array of bytes."""
    return np.frombuffer((ctypes.c_uint8 * view.nbytes).from_address(view.pointer), np.uint8)
