"""The bytes of an array, in C order and in small pieces, whatever its strides and wherever it lies.

`chunks` reads them and `buffers` writes them, each over any range of elements, with a few MB of memory. Only arrays on a GPU that
are not C-contiguous are held on the host whole, one at a time. Each copy from or to a GPU waits for all work that is enqueued on
the device, on whatever stream, and the host waits for the copy.
"""

import numpy as np

from gpuadam.kernels.layout import bounds
from gpuadam.kernels.streams import LEGACY_DEFAULT

CHUNK = 1 << 22  # bytes


def chunks(kernels, view, start=0, stop=None):
    """Yield elements start to stop, counted in C order, as buffers of bytes. Each is good until the next is asked for.

    kernels: the backend of the View.

    >>> from gpuadam import backends
    >>> kernels, (view,) = backends.choose([("x", np.array([[1, 2], [3, 4]], "u2").T)])
    >>> [bytes(chunk) for chunk in chunks(kernels, view, 1)]
    [b'\\x03\\x00\\x02\\x00\\x04\\x00']
    """
    ranges = _ranges(view, start, stop)
    if not ranges:
        return  # an empty array on a GPU has no device either
    if view.device is None:
        yield from _chunks_of(view.array, ranges)
    elif not view.contiguous:
        low, host = _whole(kernels, view)
        yield from _chunks_of(_strided(view, low, host), ranges)
    else:
        itemsize = view.dtype.itemsize
        host = np.empty(min(CHUNK, view.nbytes), np.uint8)
        for a, b in ranges:
            part = host[: (b - a) * itemsize]
            _receive(kernels, view.device, part, view.pointer + a * itemsize)
            yield part.data


def buffers(kernels, view, start=0, stop=None):
    """Yield buffers for the bytes of elements start to stop, counted in C order. What is put into one is stored afterwards.

    An array on a GPU must have passed `checks.no_gaps`.

    >>> from gpuadam import backends
    >>> x = np.zeros((2, 2), "u2").T
    >>> kernels, (view,) = backends.choose([("x", x)])
    >>> for buffer in buffers(kernels, view, 2):
    ...     buffer[:] = bytes([1, 0, 2, 0])
    >>> x
    array([[0, 0],
           [1, 2]], dtype=uint16)
    """
    ranges = _ranges(view, start, stop)
    if not ranges:
        return
    if view.device is None:
        yield from _buffers_of(view.array, ranges)
    elif not view.contiguous:
        low, host = _whole(kernels, view)
        yield from _buffers_of(_strided(view, low, host), ranges)
        _send(kernels, view.device, low, host)
    else:
        itemsize = view.dtype.itemsize
        host = np.empty(min(CHUNK, view.nbytes), np.uint8)
        for a, b in ranges:
            part = host[: (b - a) * itemsize]
            yield part.data
            _send(kernels, view.device, view.pointer + a * itemsize, part)


def number(kernels, view):
    """Return the number in an array of one.

    >>> from gpuadam import backends
    >>> kernels, (view,) = backends.choose([("x", np.array([3]))])
    >>> store_number(kernels, view, 4)
    >>> number(kernels, view)
    4
    """
    return np.frombuffer(b"".join(chunks(kernels, view)), view.dtype).item()


def store_number(kernels, view, value):
    """Write a number into an array of one."""
    for buffer in buffers(kernels, view):
        buffer[:] = np.array(value, view.dtype).tobytes()


def wait(kernels, view):
    """Wait for all that is enqueued on the device of an array, on whatever stream."""
    if view.device is not None:
        with kernels.on(view.device, None):
            kernels.synchronize()


# The device is the current one only within these two: between the pieces that a generator gives, the caller's code runs.


def _receive(kernels, device, host, address):
    with kernels.on(device, None):
        kernels.synchronize()
        kernels.receive(host, address, host.nbytes, LEGACY_DEFAULT)
        kernels.synchronize()


def _send(kernels, device, address, host):
    with kernels.on(device, None):
        kernels.synchronize()
        kernels.send(address, host, host.nbytes, LEGACY_DEFAULT)
        kernels.synchronize()


def _ranges(view, start, stop):
    """Return (first, last) of pieces of at most CHUNK bytes."""
    stop = view.size if stop is None else stop
    elements = CHUNK // view.dtype.itemsize
    return [(a, min(a + elements, stop)) for a in range(start, stop, elements)]


def _as_integers(array):
    return array.view(f"u{array.dtype.itemsize}")  # NumPy has no buffers of other packages' bfloat16


def _chunks_of(array, ranges):
    integers = _as_integers(array)
    if integers.flags.c_contiguous:
        memory, itemsize = integers.reshape(-1).view(np.uint8), integers.itemsize
        for a, b in ranges:
            yield memory[a * itemsize : b * itemsize].data
    else:
        for a, b in ranges:
            yield integers.flat[a:b].view(np.uint8).data


def _buffers_of(array, ranges):
    integers = _as_integers(array)
    if integers.flags.c_contiguous:
        yield from _chunks_of(array, ranges)
    else:
        for a, b in ranges:
            part = np.empty(b - a, integers.dtype)
            yield part.view(np.uint8).data
            integers.flat[a:b] = part


def _whole(kernels, view):
    """Return the lowest address of an array on a GPU, and all bytes from there to its highest."""
    low, high = bounds(view)
    host = np.empty(high - low, np.uint8)
    _receive(kernels, view.device, host, low)
    return low, host


def _strided(view, low, host):
    return np.ndarray(view.shape, f"u{view.dtype.itemsize}", host, view.pointer - low, view.strides)
