"""One launch for many arrays: the table by which a block of a GPU finds its array and its place in it.

An update's work is counted in items: a 16-byte vector of each array, or one element of each before and after the vectors
(`layout.split`). A block takes a chunk of CHUNK items of one array. `owners` has the row of each chunk, and a row where
the arrays are, how they are split, and which chunk is its first.
"""

import threading
from typing import Any

import numpy as np

from gpuadam.kernels.layout import split

BLOCK = 128  # threads
CHUNK = 8 * BLOCK  # items of a block. It reads its row once; with 8 items a thread that is 1 byte in 1,500 that it moves.

# The columns of a row, of int64. Without AMSGrad, max_v is at 0.
PARAM, GRAD, M, V, MAX_V, HEAD, VECTORS, ITEMS, FIRST_CHUNK = range(9)
COLUMNS = 9


def rows_and_owners(updates):
    """Return the two parts of the table, of int64 and int32. updates: of each, the views of its dense arrays."""
    rows = np.empty((len(updates), COLUMNS), np.int64)
    chunks = []
    first = 0
    for row, views in zip(rows, updates, strict=True):
        pointers = [view.pointer for view in views if view is not None]
        head, vectors, items = split(pointers, views[0].size, views[0].dtype.itemsize)
        row[:] = *pointers, *[0] * (5 - len(pointers)), head, vectors, items, first
        chunks.append(-(-items // CHUNK))
        first += chunks[-1]
    return rows, np.repeat(np.arange(len(updates), dtype=np.int32), chunks)


class Table:
    """A table in device memory, copied there from pinned memory on the first stream that it is used on.

    Nothing waits for the device: buffers go back to be used again once the device has passed them.
    """

    def __init__(self, backend, device, updates):
        self.backend, self.device = backend, device
        self.rows, self.owners = rows_and_owners(updates)
        self.streams: dict[int, Any] = {}  # that it was used on, and the event after its last use there
        self._buffer: Any = None
        self._sent: Any = None

    def addresses(self, stream):
        """Return where rows and owners are, for work on a stream."""
        if self._buffer is None:
            self._send(stream)
        elif stream not in self.streams:
            self.backend.wait(stream, self._sent)
        return self._buffer.address, self._buffer.address + self.rows.nbytes

    def _send(self, stream):
        n_rows, n_bytes = self.rows.nbytes, self.rows.nbytes + self.owners.nbytes
        self._buffer = _take(self.backend, self.device, n_bytes)
        self._buffer.pinned[:n_rows] = self.rows.view(np.uint8).ravel()
        self._buffer.pinned[n_rows:n_bytes] = self.owners.view(np.uint8)
        self.backend.send(self._buffer.address, self._buffer.pinned, n_bytes, stream)
        self._sent = self.backend.record(stream)

    def used(self, stream):
        """Take note that work on a stream reads the table. Later the stream may be gone, and with it a way to ask it."""
        if self.backend.is_capturing(stream):
            self._buffer.captured = True
        else:
            self.streams[stream] = self.backend.record(stream)

    def release(self):
        """Give the buffer back, for when all that was enqueued so far is done. A captured graph keeps its own for ever."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            if buffer.captured:
                _captured.append(buffer)
            else:
                buffer.events = [self._sent, *self.streams.values()]
                with _lock:
                    _free.append(buffer)
        self.streams = {}


class _Buffer:
    """Pinned memory of the host and as much memory of a device."""

    def __init__(self, backend, device, n_bytes):
        self.backend, self.device, self.n_bytes = backend, device, n_bytes
        self.pinned = backend.pinned(n_bytes)
        self.owner, self.address = backend.device_bytes(n_bytes)
        self.events: list = []
        self.captured = False


_free: list[_Buffer] = []
_captured: list[_Buffer] = []
_lock = threading.Lock()


def _take(backend, device, n_bytes):
    """Return a buffer that nothing on the device uses any more, or a new one."""
    with _lock:
        for k, buffer in enumerate(_free):
            fits = buffer.backend is backend and buffer.device == device and buffer.n_bytes >= n_bytes
            if fits and all(backend.done(event) for event in buffer.events):
                return _free.pop(k)
    return _Buffer(backend, device, max(1 << 12, 1 << (n_bytes - 1).bit_length()))
