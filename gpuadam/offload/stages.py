"""The stages of a chunk, for an update that runs on the host, and for one that runs on a GPU.

What is where the update runs is updated in place. On the host, memory that is a file is brought in before and let go after; what
is on a GPU is copied into pinned memory and back. On a GPU, what is on the host is copied into a slot of device memory and back.
Each slot has a stream of its own, so that copies in both directions and a kernel, of three chunks, run at once.
"""

import contextlib
import ctypes
import itertools
import threading

import numpy as np

from ..kernels import adam
from ..kernels.gpu_batch import Place
from ..kernels.layout import Update
from ..kernels.streams import LEGACY_DEFAULT
from .chunks import ALIGNMENT, aligned
from .mapped import merged


class Launch:
    """What a kernel is launched with, for all updates of a step that share it."""

    def __init__(self, formats, form, scalars, key):
        self.formats, self.form, self.scalars, self.key = formats, form, scalars, key

    def run(self, kernels, updates, place):
        kernel = kernels.name, self.form, len(updates) > 1
        with contextlib.nullcontext() if kernel in _compiled else _compiling:
            for batch in kernels.batches(updates, self.formats):
                batch.launch(self.form, self.scalars, adam, place, self.key)
                batch.release()
        _compiled.add(kernel)


# The first launch of a kernel compiles it, which several threads would else do at once.
_compiled: set = set()
_compiling = threading.Lock()


class Slot:
    """Memory for the arrays of a chunk, one after the other."""

    def __init__(self, owner, address, device=None):
        self.owner, self.address, self.device = owner, address, device

    def places(self, chunk, copied):
        """Yield (piece, [(operand, its part, where that is in the slot, or None)]) of a chunk. copied: says which are in it."""
        address = self.address
        for piece in chunk:
            parts = []
            for operand, moved in zip(piece.job.operands, piece.job.moved, strict=True):
                part, place = operand.part(piece.start, piece.stop), None
                if moved and copied(operand):
                    place = part._replace(pointer=address, device=self.device, stream=None, array=self.owner)
                    address += aligned(part.nbytes)
                parts.append((operand, part, place))
            yield piece, parts


def _launch(kernels, placed, place):
    """Launch the updates of a chunk. placed: from `Slot.places`."""
    by_launch: dict = {}
    for piece, parts in placed:
        update = Update([there or part for _, part, there in parts], piece.job.key, piece.start)
        by_launch.setdefault(id(piece.job.launch), (piece.job.launch, []))[1].append(update)
    for launch, updates in by_launch.values():
        launch.run(kernels, updates, place)


def host_bytes(view):
    """Return memory of the host as an array of bytes."""
    return np.frombuffer((ctypes.c_uint8 * view.nbytes).from_address(view.pointer), np.uint8)


class OnHost:
    """Stages of an update by the CPU.

    kernels: of the CPU. gpu: the kernels of the backend whose arrays are copied to the host and back, or None; device: theirs.
    """

    def __init__(self, kernels, room, slots, gpu=None, device=None):
        self.kernels, self.gpu, self.device, self.room, self.maps = kernels, gpu, device, room, True
        self.alone = True  # whether there is one chunk, which may take all threads
        self.slots = [Slot(None, 0) for _ in range(slots)]
        if gpu:
            with gpu.on(device, None):
                memory = [_aligned_bytes(gpu.pinned, room) for _ in self.slots]
                self.streams = [gpu.new_stream() for _ in self.slots]
            self.slots = [Slot(one, one.ctypes.data) for one in memory]

    @staticmethod
    def moves(view, mapping):
        """Whether an array takes room of the budget."""
        return view.device is not None or mapping is not None

    @staticmethod
    def copied(operand):
        return operand.view.device is not None

    def after(self, stream):
        """Let all copies wait for what is on a stream."""
        _after(self.gpu, self.device, stream, self.streams)

    def wait(self):
        """Wait for copies that are under way."""
        if self.gpu:
            _wait(self.gpu, self.device, self.streams)

    def fetch(self, chunk, slot):
        for mapping, start, end, writes in _mapped(chunk):
            mapping.populate(start, end, writes)
        if self.gpu:
            _, stream = self.streams[slot]
            with self.gpu.on(self.device, None):
                for operand, part, there in self._copies(chunk, slot):
                    if operand.loads:
                        self.gpu.receive(host_bytes(there), part.pointer, part.nbytes, stream)
                self.gpu.finish(self.gpu.record(stream))

    def update(self, chunk, slot):
        with contextlib.nullcontext() if self.alone else self.kernels.one_thread():
            _launch(self.kernels, self.slots[slot].places(chunk, self.copied), None)

    def store(self, chunk, slot):
        for mapping, start, end, _ in _mapped(chunk):
            mapping.drop(start, end)
        if self.gpu:
            _, stream = self.streams[slot]
            with self.gpu.on(self.device, None):
                for operand, part, there in self._copies(chunk, slot):
                    if operand.stores:
                        self.gpu.send(part.pointer, host_bytes(there), part.nbytes, stream)
                self.gpu.finish(self.gpu.record(stream))

    def _copies(self, chunk, slot):
        for _, parts in self.slots[slot].places(chunk, self.copied):
            yield from (part for part in parts if part[2])


def _mapped(chunk):
    """Return the extents of files that a chunk's arrays are in, as `merged` does."""
    extents = []
    for job, start, stop in chunk:
        for operand in job.operands:
            if operand.mapping:
                part = operand.part(start, stop)
                extents.append((operand.mapping, part.pointer, part.pointer + part.nbytes, operand.stores))
    return merged(extents)


class OnDevice:
    """Stages of an update by a GPU. kernels: of its backend. maps: whether there are files, which go through pinned memory."""

    def __init__(self, kernels, device, room, slots, maps):
        self.kernels, self.device, self.room, self.maps = kernels, device, room, maps
        with kernels.on(device, None):
            memory = [kernels.device_bytes(room + ALIGNMENT) for _ in range(slots)]
            self.slots = [Slot(owner, aligned(address), device) for owner, address in memory]
            pinned = [_aligned_bytes(kernels.pinned, room) for _ in range(slots if maps else 0)]
            self.pinned = [Slot(one, one.ctypes.data) for one in pinned]
            self.streams = [kernels.new_stream() for _ in range(slots)]
            # what a pool gives out may still be in use by what is on the stream that it is given on
            self.after(kernels.current_stream() or LEGACY_DEFAULT)

    @staticmethod
    def moves(view, mapping):
        """Whether an array takes room of the budget."""
        return view.device is None

    def after(self, stream):
        """Let all chunks wait for what is on a stream."""
        _after(self.kernels, self.device, stream, self.streams)

    def wait(self):
        """Wait for copies and updates that are under way."""
        _wait(self.kernels, self.device, self.streams)

    @staticmethod
    def copied(operand):
        return operand.view.device is None

    def _on_host(self, chunk, slot):
        """Yield (operand, where the device's copies come from and go to, where it is on the device, its part)."""
        pinned = self.pinned[slot].places(chunk, _in_file) if self.pinned else itertools.repeat((None, None))
        for (_, parts), (_, staged) in zip(self.slots[slot].places(chunk, self.copied), pinned, strict=False):
            for k, (operand, part, there) in enumerate(parts):
                if there:
                    yield operand, (staged[k][2] if operand.mapping else part), there, part

    def fetch(self, chunk, slot):
        for operand, on_host, _, part in self._on_host(chunk, slot):
            if operand.mapping and operand.loads:
                copy_mapped(operand.mapping, part, host_bytes(on_host), writes=False)

    def update(self, chunk, slot):
        stream = self.streams[slot][1]
        moved = list(self._on_host(chunk, slot))
        with self.kernels.on(self.device, stream):
            for operand, on_host, there, _ in moved:
                if operand.loads:
                    self.kernels.send(there.pointer, host_bytes(on_host), there.nbytes, stream)
            _launch(self.kernels, self.slots[slot].places(chunk, self.copied), Place(stream, [], False))
            for operand, on_host, there, _ in moved:
                if operand.stores:
                    self.kernels.receive(host_bytes(on_host), there.pointer, there.nbytes, stream)

    def store(self, chunk, slot):
        with self.kernels.on(self.device, None):
            self.kernels.finish(self.kernels.record(self.streams[slot][1]))
        for operand, on_host, _, part in self._on_host(chunk, slot):
            if operand.mapping and operand.stores:
                copy_mapped(operand.mapping, part, host_bytes(on_host), writes=True)


def _in_file(operand):
    return operand.mapping is not None


def copy_mapped(mapping, view, other, writes):
    """Copy memory that is a file to other bytes; or, if writes, those to it."""
    start, end = view.pointer, view.pointer + view.nbytes
    mapping.populate(start, end, writes)
    to, source = (host_bytes(view), other) if writes else (other, host_bytes(view))
    np.copyto(to, source)
    mapping.drop(start, end)


def _aligned_bytes(allocate, n_bytes):
    memory = allocate(n_bytes + ALIGNMENT)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes]


def _after(kernels, device, stream, own):
    with kernels.on(device, None):
        event = kernels.record(stream)
        for _, handle in own:
            kernels.wait(handle, event)


def _wait(kernels, device, own):
    with kernels.on(device, None):
        for _, handle in own:
            kernels.finish(kernels.record(handle))
