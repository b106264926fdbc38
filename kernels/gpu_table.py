"""One launch for many arrays: the table by which a block of a GPU finds its array and its place in it.

An update's work is counted in items: a 16-byte vector of each array, or one element of each before and after the vectors
(`layout.split`). A block takes a chunk of CHUNK items of one array. `owners` has the row of each chunk, and a row says where
the arrays are, how they are split, and which chunk is its first.
"""

import threading
from typing import Any

import numpy as np

from gpuadam.kernels import gpu_driver
from gpuadam.kernels.layout import split, split_groups

BLOCK = 128  # threads
MOST_STREAMS = 16  # of a table, before it forgets those on which it is not in use any more
CHUNK = 8 * BLOCK  # items of a block. With 8 items a thread, reading the row is 1 byte in 1,500 that a block moves.

# The columns of a row, of int64; from OPERANDS on the addresses of the arrays.
HEAD, VECTORS, ITEMS, FIRST_CHUNK, KEY, START, SIZE, OPERANDS = range(8)


def rows_and_owners(updates, group_lanes=0):
    """Return the two parts of the table, of int64 and int32. updates: `layout.Update`s of dense arrays.

    group_lanes: with 8-bit state, how many neighbours an item has; the last two arrays are then the scales of groups.
    """
    rows = np.empty((len(updates), OPERANDS + len(updates[0].views)), np.int64)
    itemsizes = [view.dtype.itemsize for view in updates[0].views]
    for row, (views, key, start) in zip(rows, updates, strict=True):
        pointers, size = [view.pointer for view in views], views[0].size
        if group_lanes:
            parts = split_groups(pointers[:-2], itemsizes[:-2], size, group_lanes)
        else:
            parts = split(pointers, itemsizes, size)
        row[:] = *parts, 0, key, start, size, *pointers
    chunks = -(-rows[:, ITEMS] // CHUNK)
    rows[:, FIRST_CHUNK] = np.cumsum(chunks) - chunks
    return rows, np.repeat(np.arange(len(updates), dtype=np.int32), chunks)


class Table:
    """A table in device memory, copied there from pinned memory on the first stream that it is used on.

    Nothing waits for the device: buffers go back to be used again once the device has passed them. While a graph is captured, the
    table is copied at once, on a stream of its own, and no graph that has captured its use gives it back.
    """

    def __init__(self, backend, device, n_bytes, contents, once=False):
        """contents(address): the bytes of a table at an address. once: one stream uses it once, so that no other waits for it."""
        self.backend, self.device, self.n_bytes, self.contents, self.once = backend, device, n_bytes, contents, once
        self._streams: dict[int, Any] = {}  # ids of those on which it is there, and the event after its last use there
        self._stream = 0  # the id of the last one
        self._buffer: Any = None
        self._sent: Any = None  # the event after the copy

    def on_stream(self, place):
        """Return the table's address, for work at a `gpu_batch.Place` on the current device, of which `used` is then called."""
        stream, stream_id = place.stream, self.backend.stream_id(place.stream)
        self._stream = stream_id
        if self._buffer is None:
            with gpu_driver.allowed_while_capturing():
                self._buffer = _take(self.backend, self.device, self.n_bytes)
            contents = self.contents(self._buffer.address)
            self._buffer.pinned[: contents.size] = contents
            if place.capturing:
                self._send_now(contents.size)
                return self._buffer.address
            self.backend.send(self._buffer.address, self._buffer.pinned, contents.size, stream)
            self._buffer.in_use = True
            if not self.once:
                self._sent = self._streams[stream_id] = self._record(stream, None)
        elif self._sent is not None and stream_id not in self._streams:
            if place.capturing:  # whose work cannot wait for what is not captured
                with gpu_driver.allowed_while_capturing():
                    self.backend.finish(self._sent)
            else:
                self._forget_streams()
                self.backend.wait(stream, self._sent)
                self._streams[stream_id] = self._sent
        return self._buffer.address

    def _send_now(self, n_bytes):
        """Copy the table while a graph is captured, beside the capture, and wait for the copy."""
        with gpu_driver.allowed_while_capturing():
            owner, stream = self.backend.new_stream()
            self._buffer.in_use = True
            self.backend.send(self._buffer.address, self._buffer.pinned, n_bytes, stream)
            self.backend.synchronize_stream(stream)
            self._buffer.in_use = False
            del owner

    def _forget_streams(self):
        """Forget the streams where all work with the table is done, if there are many: a program may make one for each step."""
        if len(self._streams) >= MOST_STREAMS:
            with gpu_driver.allowed_while_capturing():
                done = [stream for stream, event in self._streams.items() if self.backend.done(event)]
            for stream in done:
                del self._streams[stream]

    def used(self, place):
        """Take note that work at a Place reads the table. Later the stream may be gone, and with it a way to ask it."""
        if place.capturing:
            self._buffer.captured = True
        else:
            self._buffer.in_use = True
            before = self._streams.get(self._stream)
            self._streams[self._stream] = self._record(place.stream, None if before is self._sent else before)

    def _record(self, stream, event):
        """Record an event on a stream, the one that was there before if there was one, and return it."""
        event = self.backend.record(stream, event=event)
        self._buffer.in_use = False
        return event

    def release(self, waits=True):
        """Give the buffer back, for when all that was enqueued so far is done. A captured graph keeps its own for ever.

        waits: whether this may wait for the device, for work that no event could be recorded behind. Else its buffer stays lent.
        """
        buffer, self._buffer = self._buffer, None
        if buffer is not None and not buffer.captured and (waits or not buffer.in_use):  # a captured one stays lent
            if buffer.in_use:
                with self.backend.on(self.device, None):
                    self.backend.synchronize()
            buffer.in_use, buffer.events = False, [*self._streams.values()]
            buffer.lent = False
        self._streams = {}

    def __del__(self):
        # goes with its optimizer. Work on streams that the buffer's allocator does not know may still read it
        if _lock is not None:  # else Python ends
            self.release(waits=False)  # garbage may be collected amid a capture, which waiting would end


class _Buffer:
    """Pinned memory of the host and as much memory of a device."""

    def __init__(self, backend, device, n_bytes):
        self.backend, self.device, self.n_bytes = backend, device, n_bytes
        self.pinned = backend.pinned(n_bytes)
        self.owner, self.address = backend.device_bytes(n_bytes)
        self.events: list = []  # after its last uses
        self.lent = True  # to a Table
        self.captured = False
        self.in_use = False  # by work that no event is recorded behind


# All buffers. The list keeps them alive: if a buffer and its Table became garbage together, Numba could free its memory before
# `Table.__del__` runs.
buffers: list[_Buffer] = []
_lock = threading.RLock()  # Python may end a Table in a thread that holds it


def _take(backend, device, n_bytes):
    """Return a buffer that nothing on the device uses any more, or a new one."""
    with _lock:
        for k, buffer in enumerate(buffers):
            fits = buffer.backend is backend and buffer.device == device and buffer.n_bytes >= n_bytes
            if fits and not buffer.lent:
                if all(backend.done(event) for event in buffer.events):
                    buffer.lent = True
                    return buffer
                buffers.append(buffers.pop(k))  # so that the next call asks for another; to ask for all takes too long
                break
    buffer = _Buffer(backend, device, max(1 << 12, 1 << (n_bytes - 1).bit_length()))
    buffers.append(buffer)
    return buffer
