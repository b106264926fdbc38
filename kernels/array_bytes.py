"""The bytes of an array, in C order and in small pieces, whatever its strides and wherever it lies.

`chunks` reads them and `buffers` writes them, with a few MB of memory. Only arrays on a GPU that are not C-contiguous are held on
the host whole, one at a time. Each copy from or to a GPU waits for all work that is enqueued on the device, on whatever stream,
and the host waits for the copy.
"""

import numpy as np

from gpuadam.kernels.layout import bounds

CHUNK = 1 << 22  # bytes


def chunks(backend, view):
    """Yield the elements, in C order, as buffers of bytes. Each is good until the next is asked for.

    backend: the backend of the View.

    >>> from gpuadam import backends
    >>> backend, (view,) = backends.choose([("x", np.array([[1, 2], [3, 4]], "u2").T)])
    >>> [bytes(chunk) for chunk in chunks(backend, view)]
    [b'\\x01\\x00\\x03\\x00\\x02\\x00\\x04\\x00']
    """
    return _pieces(backend, view, writes=False)


def buffers(backend, view):
    """Yield buffers for the bytes of the elements, in C order. What is in one is stored when the next is asked for.

    An array on a GPU must have passed `checks.no_gaps`.

    >>> from gpuadam import backends
    >>> x = np.zeros((2, 2), "u2").T
    >>> backend, (view,) = backends.choose([("x", x)])
    >>> for buffer in buffers(backend, view):
    ...     buffer[:] = bytes([1, 0, 2, 0, 3, 0, 4, 0])
    >>> x
    array([[1, 2],
           [3, 4]], dtype=uint16)
    """
    return _pieces(backend, view, writes=True)


class Pieces:
    """Buffers that come one after another, to be read or filled in pieces of any size. Each is good until the next is asked for.

    >>> pieces = Pieces([b"abcd", b"efg"])
    >>> pieces.read(1), pieces.read(5), [bytes(part) for part in pieces.next(1)]
    (b'a', b'bcdef', [b'g'])
    """

    def __init__(self, buffers):
        self._buffers, self._rest = iter(buffers), memoryview(b"")

    def next(self, n):
        """Yield the next n bytes, in parts of one buffer each."""
        while n:
            self._rest = self._rest or memoryview(next(self._buffers))
            part, self._rest = self._rest[:n], self._rest[n:]
            n -= len(part)
            yield part

    def read(self, n):
        return b"".join(map(bytes, self.next(n)))

    def write(self, data):
        data = memoryview(data)
        for part in self.next(len(data)):
            part[:], data = data[: len(part)], data[len(part) :]

    def close(self):
        """Let the last buffer be stored."""
        next(self._buffers, None)


def number(backend, view):
    """Return the number in an array of one.

    >>> from gpuadam import backends
    >>> backend, (view,) = backends.choose([("x", np.array([3]))])
    >>> store_number(backend, view, 4)
    >>> number(backend, view)
    4
    """
    return np.frombuffer(b"".join(chunks(backend, view)), view.dtype).item()


def store_number(backend, view, value):
    """Write a number into an array of one."""
    for buffer in buffers(backend, view):
        buffer[:] = np.array(value, view.dtype).tobytes()


def wait(backend, view):
    """Wait for all work that is enqueued on the device of an array, on whatever stream."""
    if view.device is not None:
        with backend.on(view.device, None):
            backend.synchronize()


def _pieces(backend, view, writes):
    """Yield buffers for the bytes of the elements. writes: they are stored afterwards; else they are read before."""
    size, itemsize = view.size, view.dtype.itemsize
    ranges = [(first, min(first + CHUNK // itemsize, size)) for first in range(0, size, CHUNK // itemsize)]
    if not ranges:
        return  # an empty array on a GPU has no device either
    if view.device is None:
        yield from _pieces_on_host(view.array, ranges, writes)
    elif view.contiguous:
        host = np.empty(min(CHUNK, view.nbytes), np.uint8)
        for first, last in ranges:
            piece, address = host[: (last - first) * itemsize], view.pointer + first * itemsize
            if not writes:
                backend.copy_now(view.device, backend.receive, piece, address, piece.nbytes)
            yield piece.data
            if writes:
                backend.copy_now(view.device, backend.send, address, piece, piece.nbytes)
    else:
        low, high = bounds(view)
        host = np.empty(high - low, np.uint8)
        backend.copy_now(view.device, backend.receive, host, low, host.nbytes)
        array = np.ndarray(view.shape, f"V{itemsize}", host, view.pointer - low, view.strides)
        yield from _pieces_on_host(array, ranges, writes)
        if writes:
            backend.copy_now(view.device, backend.send, low, host, host.nbytes)


def _pieces_on_host(array, ranges, writes):
    elements = array.view(f"V{array.itemsize}")  # NumPy has no buffers of other packages' bfloat16
    if elements.flags.c_contiguous:
        memory, itemsize = elements.reshape(-1).view(np.uint8), elements.itemsize
        for first, last in ranges:
            yield memory[first * itemsize : last * itemsize].data
    else:
        for first, last in ranges:
            piece = np.empty(last - first, elements.dtype) if writes else elements.flat[first:last]
            yield piece.view(np.uint8).data
            if writes:
                elements.flat[first:last] = piece
