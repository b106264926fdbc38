"""The backend `cupy`: CuPy's arrays, and all arrays in CUDA memory."""

import contextlib
import functools
import math
import warnings
from typing import Any

import cupy
import numpy as np

from gpuadam.kernels import adam, cupy_kernels, cupy_struct, gpu_driver, gpu_table, norm_order
from gpuadam.kernels.cupy_kernels import IN_MEMORY, in_and_out
from gpuadam.kernels.gpu_backend import UNCHANGED, GpuBackend
from gpuadam.kernels.gpu_launch import Changing
from gpuadam.kernels.operands import operands_of_form, widened
from gpuadam.kernels.scalars import REALS_AT, ScalarsMemory
from gpuadam.kernels.streams import LEGACY_DEFAULT
from gpuadam.kernels.view import View, on_cuda, on_device

MOST_OF_POOL = 1 << 20  # bytes of pinned memory


class Cupy(GpuBackend):
    """Kernels in CUDA C (`cupy_kernels.py`, `norm_cuda_c.py`), launched by CuPy."""

    name = "cupy"
    enters_streams = True
    interleaves = True
    struct = cupy_struct

    def status(self):
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return False, f"CuPy {cupy.__version__} finds no usable CUDA driver: {error}"
        if count == 0:
            return False, f"CuPy {cupy.__version__} finds no CUDA device"
        return True, f"CuPy {cupy.__version__}, {count} CUDA device(s)"

    def view(self, name, array):
        if not isinstance(array, cupy.ndarray):
            return on_cuda(name, on_device(name, array, self), gpu_driver.device_of)
        memory = array.data
        contiguous = array.flags.c_contiguous
        return View(name, array, memory.ptr, array.shape, array.strides, array.dtype, True, contiguous, memory.device_id)

    # Launches

    def run(self, batch, form, scalars, rule, stream, key):
        if batch.call is None:
            batch.call = _call_of(batch, form, rule, isinstance(scalars, ScalarsMemory))
        kernel, before, after, options = batch.call
        if isinstance(scalars, ScalarsMemory):
            address, n = scalars.address + REALS_AT, len(adam.scalar_names(form))
            numbers: Any = [_unowned(address, (n,), scalars.dtype, batch.device)]
            if batch.is_random or form.skips:
                numbers.append(_unowned(scalars.address, (2,), np.int64, batch.device))
        else:
            numbers = [*scalars, *([key] if batch.is_random else [])]
        kernel(*before, *numbers, *after, **options)

    def changing(self, batch, form):
        _, before, after, _ = batch.call
        n, scalars = len(adam.scalar_names(form)), len(before)
        n_all = scalars + n + batch.is_random + len(after) + 1  # CuPy adds the number of threads
        return Changing(scalars, scalars + n if batch.is_random else None, n_all)

    def launch_one_thread(self, form, arguments, stream):
        kernel = cupy_kernels.build_scalars(form)
        kernel((1,), (1,), tuple(np.int64(x) if type(x) is int else np.float64(x) for x in arguments))

    def launch_sums(self, form, chunks, arguments, stream):
        blocks = -(-chunks // (norm_order.BLOCK // norm_order.WARP))
        cupy_kernels.build_sums(form)((blocks,), (norm_order.BLOCK,), tuple(map(np.int64, arguments)))

    # Memory

    def zeros(self, n, dtype, device):
        with cupy.cuda.Device(device):
            array = cupy.zeros(n, dtype)
            cupy.cuda.get_current_stream().synchronize()
            return array

    def shaped(self, memory, shape, strides):
        return cupy.ndarray(shape, memory.dtype, memory.data, strides)

    def fill_zero(self, view, stream=None):
        with self.ordered(view.device or 0, [view], stream):
            self.native(view).fill(0)

    def copy(self, to, source):
        with self.ordered(to.device or 0, [to, source]):
            array = self.native(source)
            self.native(to)[...] = array if to.dtype == source.dtype else widened(array, source.format)

    def copy_rows(self, to, source, rows):
        there = np.flatnonzero(rows >= 0)
        with self.ordered(to.device or 0, [to, source]):
            of_to, of_source = (cupy.asarray(x, blocking=True) for x in (there, rows[there]))
            self.native(to)[of_to] = self.native(source)[of_source]

    def from_host(self, array):
        return cupy.asarray(array, blocking=True)

    def native(self, view):
        if isinstance(view.array, cupy.ndarray):
            return view.array
        if view.size == 0:
            return cupy.empty(view.shape, view.dtype)
        return _unowned(view.pointer, view.shape, view.dtype, view.device, view.strides)

    def empty_number(self):
        result = cupy.empty((), np.float64)
        return result, result.data.ptr

    def pinned(self, n_bytes):
        if n_bytes <= MOST_OF_POOL:
            memory = cupy.cuda.alloc_pinned_memory(n_bytes)
        else:  # CuPy's pool rounds up to a power of two, and keeps freed memory: of state that fills the host's memory
            memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(n_bytes, cupy.cuda.runtime.hostAllocPortable), 0)
        return np.frombuffer(memory, np.uint8, n_bytes)

    def device_bytes(self, n_bytes):
        if self.is_capturing(self.current_stream()):
            # memory of CUDA's pool would become a part of the graph, which would allocate it at each launch
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(n_bytes), 0)
        else:
            memory = cupy.cuda.alloc(n_bytes)
        return memory, memory.ptr

    # Devices and streams

    def on(self, device, stream):
        if gpu_driver.current_device() == device:
            return UNCHANGED if stream is None or self.current_stream() == stream else _entered(stream)
        return self._on_another(device, stream)

    @contextlib.contextmanager
    def _on_another(self, device, stream):
        with cupy.cuda.Device(device):
            cupy.cuda.runtime.setDevice(device)  # which also makes a context current in a thread that has none
            with self.on(device, stream):
                yield

    def current_device(self):
        return cupy.cuda.runtime.getDevice()

    def current_stream(self):
        return cupy.cuda.get_current_stream().ptr or LEGACY_DEFAULT


def _call_of(batch, form, rule, on_device):
    """Return the kernel of a batch, its arguments before and after the numbers of a step, and CuPy's options of its launch."""
    kernel = cupy_kernels.build(rule, form, batch.loop, on_device, batch.vectors)
    if batch.loop == "table":
        rows = _unowned(batch.address, (batch.rows.size,), np.int64, batch.device)
        owners = _unowned(batch.address + batch.rows.nbytes, batch.owners.shape, np.int32, batch.device)
        options = {"size": owners.size * gpu_table.BLOCK, "block_size": gpu_table.BLOCK}
        return kernel, (owners,), (rows,), options
    (update,) = batch.updates
    operands, options, head_and_vectors = operands_of_form(form), {}, ()
    arrays = [
        _unowned(v.pointer, v.shape, IN_MEMORY[o.format], v.device, v.strides)
        for v, o in zip(update.views, operands, strict=True)
    ]
    if batch.loop == "contiguous":
        head_and_vectors, options = batch.split[:2], {"size": batch.split.threads_of(batch.vectors)}
    of_row = (update.key, update.start) if batch.is_random else ()
    read, written = in_and_out(operands, arrays)
    return kernel, (*read, *head_and_vectors, *of_row), written, options


@functools.lru_cache(maxsize=1024)
def _unowned(address, shape, dtype, device, strides=None):
    """Return a CuPy array over memory that others keep: the caller its arrays, a table its buffer, until it is enqueued."""
    dtype = np.dtype(dtype)
    memory = cupy.cuda.UnownedMemory(address, math.prod(shape) * dtype.itemsize, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


@contextlib.contextmanager
def _entered(handle):
    """Make a stream the current one, and afterwards the one that was.

    CuPy's `with` goes back to the stream of the `with` around it, or else to the default one, and forgets what `use` has chosen.
    """
    before = cupy.cuda.get_current_stream()
    try:
        with _stream(handle):
            yield
    finally:
        if cupy.cuda.get_current_stream().ptr != before.ptr:
            before.use()


@functools.cache
def _stream(handle):
    """Return a CuPy stream of any device for a handle. It is only to be entered: other calls take the handle."""
    with warnings.catch_warnings():
        # The class that CuPy names instead takes an object, asks for the current device and keeps to it. Handle 1 has several.
        warnings.simplefilter("ignore", DeprecationWarning)
        return cupy.cuda.ExternalStream(handle)


backend = Cupy()
