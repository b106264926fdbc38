"""Stand-ins for the CUDA driver: both GPU backends run to the end on a machine with no GPU.

Kernels are the compiled ones, executed on the host, and a GPU's memory is the host's. Arrays are real CuPy arrays, over that
memory. What this cannot show is that CuPy and Numba take these arguments as we think; `tests/test_gpu.py` does, on a GPU.
"""

import contextlib
import ctypes
import functools
import math
import threading
import weakref

import cupy
import gpu_code
import numpy as np

from gpuadam import backends
from gpuadam.kernels import adam, cupy_elementwise, numba_cuda, pointer_table

ARCH = "sm_90"


class Driver:
    """Streams, events and memory. What is asked of them is written down."""

    backend: str
    kernels: object

    def __init__(self, monkeypatch):
        self.launches = []  # (loop, blocks or threads, stream)
        self.waits = []  # (stream whose event it was, stream that waits)
        self.sent = []  # (address, bytes, stream) to the device
        self.received = []  # likewise from it
        self.streams = 0  # that were made
        self.current = None  # CuPy's current stream
        self.capturing: set[int] = set()
        self.idle = True  # whether events are done
        self.synchronized = 0
        self.memory = []  # what the kernels may touch
        self.waited_for = []  # streams, by the host
        self.errors = []  # what the next of these waits find: an exception, or None
        monkeypatch.setattr(pointer_table, "_free", [])
        for name in (
            *("record", "wait", "done", "finish", "pinned", "device_bytes", "send", "receive", "is_capturing"),
            *("synchronize", "new_stream", "current_stream", "on"),
        ):
            monkeypatch.setattr(self.kernels, name, getattr(self, name))
        monkeypatch.setattr(
            self.kernels, "zeros_like", lambda view, dtype=None: self.array(np.zeros(view.shape, dtype or view.dtype))
        )
        monkeypatch.setattr(self.kernels, "zeros", lambda n, dtype, device: self.array(np.zeros(n, dtype)))
        monkeypatch.setattr(self.kernels, "fill_zero", lambda view: self.numpy(view.array).fill(0))
        monkeypatch.setattr(self.kernels, "from_host", self.array)
        monkeypatch.setattr(self.kernels, "to_host", self.numpy)
        monkeypatch.setattr(self.kernels, "copy", lambda to, source: np.copyto(self.seen(to), self.seen(source)))
        loaded = backends.load
        monkeypatch.setattr(backends, "load", lambda name: self.kernels if name == self.backend else loaded(name))
        probed = backends._probe
        available = backends.Status(True, "a stand-in")
        monkeypatch.setattr(backends, "_probe", lambda name: available if name == self.backend else probed(name))
        monkeypatch.setattr(self.kernels, "synchronize_stream", self.synchronize_stream)

    def launch(self, form, views, scalars, stream=None, key=0):
        self.memory = gpu_code.memory_of([view.array for view in views if view is not None])
        self.kernels.launch(form, views, scalars, adam, stream, key)

    # Arrays

    def array(self, a):
        """Return a CuPy array over a copy of a NumPy array."""
        a = np.array(a, order="K")
        return self.over(a)

    def over(self, a):
        """Return a CuPy array over a NumPy array's own memory, in which kernels may then read and write."""
        memory = cupy.cuda.UnownedMemory(a.ctypes.data, max(a.nbytes, 1), a, 0)
        there = cupy.ndarray(a.shape, a.dtype, cupy.cuda.MemoryPointer(memory, 0), a.strides)
        bounds = gpu_code.memory_of([a])[0]
        self.memory.append(bounds)
        weakref.finalize(a, self.forget, bounds)
        return there

    def forget(self, bounds):
        if bounds in self.memory:
            self.memory.remove(bounds)

    @staticmethod
    def numpy(array):
        """Return a NumPy array over the memory of a CuPy one."""
        if isinstance(array, np.ndarray):
            return array
        if array.size == 0:
            return np.zeros(array.shape, array.dtype)
        bytes_ = (ctypes.c_uint8 * array.nbytes).from_address(array.data.ptr)
        return np.ndarray(array.shape, array.dtype, bytes_, 0, array.strides)

    @classmethod
    def seen(cls, view):
        """Return a NumPy array over the memory of a View, which may be of one element of its array."""
        return cls.numpy(cupy_elementwise._unowned(view.pointer, view.shape, view.dtype, 0, view.strides))

    # Streams, events, memory

    def synchronize_stream(self, stream):
        self.waited_for.append(stream)
        error = self.errors.pop(0) if self.errors else None
        if error:
            raise error

    def record(self, stream):
        return stream

    def wait(self, stream, event):
        self.waits.append((event, stream))

    def done(self, event):
        return self.idle

    def pinned(self, n_bytes):
        return np.zeros(n_bytes, np.uint8)

    def device_bytes(self, n_bytes):
        memory = np.zeros(n_bytes + 16, np.uint8)
        self.memory.append(gpu_code.memory_of([memory])[0])
        return memory, -(-memory.ctypes.data // 16) * 16

    def send(self, address, pinned, n_bytes, stream):
        self.sent.append((address, n_bytes, stream))
        ctypes.memmove(address, pinned.ctypes.data, n_bytes)

    def receive(self, array, address, n_bytes, stream):
        self.received.append((address, n_bytes, stream))
        ctypes.memmove(array.ctypes.data, address, n_bytes)

    def synchronize(self):
        self.synchronized += 1

    def new_stream(self):
        self.streams += 1
        return object(), 1000 + self.streams

    def finish(self, event):
        """All is done when it is asked for."""

    def is_capturing(self, stream):
        return stream in self.capturing

    def current_stream(self):
        return self.current

    def on(self, device, stream):
        return contextlib.nullcontext()

    def execute(self, kernel, blocks, parameters):
        ranges = sorted(set(self.memory))
        merged: list[list[int]] = []
        for start, end in ranges:  # the executor takes few ranges: those that lie close together become one
            if merged and (start <= merged[-1][1] or len(ranges) > 8):
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        kernel.run(blocks, pointer_table.BLOCK, parameters, [tuple(pair) for pair in merged])


class NumbaDriver(Driver):
    """Numba's launches."""

    backend, kernels = "numba-cuda", numba_cuda

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.current = 1
        monkeypatch.setattr(numba_cuda, "_configured", self.configured)
        monkeypatch.setattr(numba_cuda, "view", self.view)
        monkeypatch.setattr(numba_cuda, "_launch_scalars", self.launch_scalars)

    @staticmethod
    def view(name, array):
        found = cupy_elementwise.view(name, array)
        return found if found.size else found._replace(device=None)  # the driver knows no device of an empty array

    def configured(self, rule, form, loop, on_device, blocks, stream):
        kernel = gpu_code.loaded(gpu_code.ptx("numba-cuda", form, ARCH, rule=rule, loop=loop, on_device=on_device))

        def run(*arguments):
            assert len(arguments) == len(gpu_code.signature(form, loop, on_device))  # Numba takes a tuple for one argument
            self.launches.append((loop, blocks, stream))
            self.execute(kernel, blocks, gpu_code.packed(kernel, *arguments))

        return run

    def launch_scalars(self, form, stream, *arguments):
        self.launches.append(("scalars", 1, stream))
        kernel = gpu_code.loaded(gpu_code.scalars_ptx("numba-cuda", form, ARCH))
        self.execute_one(kernel, gpu_code.packed(kernel, *arguments))

    def execute_one(self, kernel, parameters):
        kernel.run(1, 1, parameters, [(0, 1 << 62)])


@functools.cache
def compiled(elementwise, ndim=1):
    return gpu_code.loaded(gpu_code.compile_cupy(elementwise, ARCH, ndim=ndim).rstrip(b"\0").decode())


class CupyDriver(Driver):
    """CuPy's ElementwiseKernel."""

    backend, kernels = "cupy", cupy_elementwise

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.current = 1
        self.of_thread = threading.local()  # the stream that is current there
        build, build_scalars = cupy_elementwise.build, cupy_elementwise.build_scalars
        monkeypatch.setattr(cupy_elementwise, "build", lambda rule, form, loop, on_device=False: functools.partial(
            self.kernel, build(rule, form, loop, on_device), loop
        ))  # fmt: skip
        monkeypatch.setattr(
            cupy_elementwise, "build_scalars", lambda form: functools.partial(self.kernel, build_scalars(form), "scalars")
        )

    @contextlib.contextmanager
    def on(self, device, stream):
        before = getattr(self.of_thread, "stream", 1)
        self.of_thread.stream = stream
        yield
        self.of_thread.stream = before

    def kernel(self, elementwise, loop, *arguments, size=None, block_size=pointer_table.BLOCK):
        """Check arguments as ElementwiseKernel does, then run: inputs, outputs, and the number of threads."""
        assert len(arguments) == len(elementwise.params) - 1  # the last is CuPy's indexer
        parameters = []
        for p, a in zip(elementwise.params, arguments, strict=False):
            is_array = p.raw or p.name in gpu_code.ARRAYS
            assert isinstance(a, cupy.ndarray) == is_array, p.name
            if is_array:
                assert a.dtype == np.dtype(p.dtype), p.name
                parameters.append(gpu_code.carray_of(a.data.ptr, a.size, a.shape, a.strides))
            else:
                parameters.append(np.dtype(p.dtype).type(a).tobytes())
        if loop == "strided":
            assert size is None
            first = next(
                a
                for p, a in zip(elementwise.params, arguments, strict=False)
                if isinstance(a, cupy.ndarray) and not p.raw  # the scalars on the device are raw
            )
            kernel, size, shape = compiled(elementwise, first.ndim), first.size, first.shape
        else:
            assert size is not None and all(a.ndim == 1 for a in arguments if isinstance(a, cupy.ndarray))
            kernel, shape = compiled(elementwise), (size,)
        self.launches.append((loop, math.ceil(size / block_size), getattr(self.of_thread, "stream", 1)))
        parameters.append(gpu_code.indexer(kernel, size, shape))
        if loop == "scalars":
            kernel.run(1, block_size, parameters, [(0, 1 << 62)])
        else:
            self.execute(kernel, math.ceil(size / block_size), parameters)


DRIVERS = [CupyDriver, NumbaDriver]
