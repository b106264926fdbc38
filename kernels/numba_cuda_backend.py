"""The backend `numba-cuda`: Numba's device arrays, and all arrays in CUDA memory."""

import functools
import importlib
import sys
import warnings

import numpy as np
from numba import cuda
from numba.cuda.cudadrv.driver import device_memset
from numba.cuda.cudadrv.error import CudaSupportError

from gpuadam.kernels import (
    adam,
    change_numba_cuda,
    cuda_linker,
    gpu_driver,
    norm_numba_cuda,
    norm_order,
    numba_attributes,
)
from gpuadam.kernels.gpu_backend import UNCHANGED, GpuBackend
from gpuadam.kernels.gpu_launch import Changing
from gpuadam.kernels.gpu_table import BLOCK
from gpuadam.kernels.layout import collapse
from gpuadam.kernels.numba_cuda_kernels import build, build_rows, build_scalars, compiled
from gpuadam.kernels.scalars import ScalarsMemory
from gpuadam.kernels.streams import LEGACY_DEFAULT
from gpuadam.kernels.view import on_cuda, on_device


class NumbaCuda(GpuBackend):
    """Kernels that Numba compiles (`numba_cuda_kernels.py`, `norm_numba_cuda.py`) and launches."""

    name = "numba-cuda"
    copies_any_layout = False
    default_named = LEGACY_DEFAULT
    attributes = numba_attributes

    def status(self):
        if cuda.config.ENABLE_CUDASIM:
            return False, "NUMBA_ENABLE_CUDASIM=1: no compiled kernels", "unset NUMBA_ENABLE_CUDASIM before Python starts"
        version = importlib.import_module("numba_cuda").__version__
        try:
            problem = "" if len(cuda.gpus) else "the driver lists none"
        except CudaSupportError as error:
            problem = " ".join(str(error).split()).strip(" :.")
        return not problem, f"numba-cuda {version}" + (f" finds no usable CUDA device: {problem}" if problem else "")

    def linked(self):
        """Return the `cuda_linker.Linked` of what NVVM and the linker are here, after compiling a kernel that does nothing."""
        capability = gpu_driver.compute_capability(self.current_device())
        ptx, _ = cuda.compile(_nothing, (), cc=capability, device=False, abi="numba", output="ptx")
        # imported here, because at the top of the file an environment without it would hide that numba-cuda is broken
        linker = importlib.import_module("cuda.core").Linker
        which = getattr(linker, "which_backend", None)  # without it, cuda.core takes nvJitLink wherever there is one
        return cuda_linker.linked(ptx, which is None or "jitlink" in which().lower())

    def view(self, name, array):
        view = on_cuda(name, on_device(name, array, self), gpu_driver.device_of)
        # CuPy's arrays name whatever stream is current when they are asked
        return view._replace(stream=None) if type(array).__module__.startswith("cupy") else view

    # Launches. A kernel takes all scalars as one argument; Numba takes a Python float for a float64.

    def run(self, batch, form, scalars, rule, stream, key):
        on_device = isinstance(scalars, ScalarsMemory)
        if batch.call is None or batch.call[0] != stream:
            batch.call = stream, *_call_of(batch, form, rule, on_device, stream)
        _, launch, arguments, row_key = batch.call
        numbers = scalars.address if on_device else tuple(map(form.dtype.type, scalars))
        _launch(launch, *arguments, row_key ^ key, numbers)

    def changing(self, batch, form):
        _, _, arguments, row_key = batch.call
        key = sum(map(_n_numbers, arguments))
        return Changing(key + 1, key, key + 1 + len(adam.scalar_names(form)), row_key)

    def launch_one_thread(self, form, arguments, stream):
        _launch(_configured(compiled(build_scalars, form), 1, 1, stream), *arguments)

    def launch_sums(self, form, chunks, arguments, stream):
        blocks = -(-chunks // (norm_order.BLOCK // norm_order.WARP))
        build_sums = change_numba_cuda.build if isinstance(form, adam.Form) else norm_numba_cuda.build
        _launch(_configured(compiled(build_sums, form), blocks, norm_order.BLOCK, stream), *arguments)

    # Memory

    def zeros(self, n, dtype, device):
        with cuda.gpus[device or 0]:
            array = cuda.device_array(n, dtype)
            if n:
                device_memset(array, 0, array.nbytes)
                self.synchronize_stream(LEGACY_DEFAULT)
            return array

    def shaped(self, memory, shape, strides):
        if not memory.size:
            return cuda.device_array(shape, memory.dtype)
        array = memory.reshape(*shape)
        if strides is None:
            return array
        described = array.__cuda_array_interface__ | {"strides": strides}
        with self.on(self.view("", memory).device, None):
            return cuda.from_cuda_array_interface(described, owner=array, sync=False)

    def fill_zero(self, view, stream=None):
        if not view.size:
            return
        shape, (strides,) = collapse(view.shape, [view.strides])
        with self.ordered(view.device, [view], stream) as stream:
            if strides in ((), (view.dtype.itemsize,)):
                gpu_driver.call("cuMemsetD8Async", view.pointer, 0, view.nbytes, stream)
            else:
                kernel = compiled(build_rows, view.dtype.itemsize, len(shape), False)
                launch = _configured(kernel, -(-view.size // BLOCK), BLOCK, stream)
                _launch(launch, view.pointer, strides, 0, strides, shape, 0, view.size)

    def copy(self, to, source):
        if to.size:
            with self.ordered(to.device, [to, source]) as stream:
                gpu_driver.call("cuMemcpyDtoDAsync_v2", to.pointer, source.pointer, to.nbytes, stream)

    def copy_rows(self, to, source, rows):
        if not to.size:
            return
        with self.ordered(to.device, [to, source]) as stream:
            on_device = self.from_host(rows)
            kernel = compiled(build_rows, to.dtype.itemsize, len(to.shape), True)
            of_arrays = to.pointer, to.strides, source.pointer, source.strides
            launch = _configured(kernel, -(-to.size // BLOCK), BLOCK, stream)
            _launch(launch, *of_arrays, to.shape, on_device.device_ctypes_pointer.value, to.size)
            self.synchronize_stream(stream)  # before the rows are freed

    def from_host(self, array):
        there = cuda.to_device(array)
        # a copy from pageable memory may still be under way, and only the default stream waits for it
        self.synchronize_stream(LEGACY_DEFAULT)
        return there

    def native(self, view):
        return cuda.as_cuda_array(view.array, sync=False)

    def empty_number(self):
        result = cuda.device_array((), np.float64)  # which may outlive every stream but the default one
        return result, result.device_ctypes_pointer.value

    def pinned(self, n_bytes):
        return cuda.pinned_array(n_bytes, np.uint8)

    def device_bytes(self, n_bytes):
        memory = cuda.device_array(n_bytes, np.uint8)
        return memory, memory.__cuda_array_interface__["data"][0]

    # Devices and streams

    def on(self, device, stream):
        """Return a context in which a device is the current one. Kernels name their stream."""
        gpu, context = _gpu(device)
        # Numba's own context manager calls more of the driver, which takes as long as a launch
        return UNCHANGED if gpu_driver.current_context() == context else gpu

    def current_device(self):
        return cuda.get_current_device().id

    def current_stream(self):
        cupy = sys.modules.get("cupy")
        return cupy and (cupy.cuda.get_current_stream().ptr or LEGACY_DEFAULT)


def _launch(configured, *arguments):
    """Launch a configured kernel. The first launch compiles and links it."""
    try:
        configured(*arguments)
    except Exception as error:  # of cuda.core or of nvJitLink, whose classes are others in each version
        if not cuda_linker.refuses(error):
            raise
        linked, said = backend.linked(), " ".join(str(error).split())
        raise RuntimeError(
            f"numba-cuda cannot link its kernels: {linked.text}. To mend it: {linked.fix}. ({said})"
        ) from error


def _nothing():
    """A kernel that does nothing."""


def _call_of(batch, form, rule, on_device, stream):
    """Return the configured kernel of a batch, its arguments before the key and the scalars, and the key of its parameter."""

    def kernel(loop, blocks):
        return _configured(compiled(build, rule, form, loop, on_device, batch.vectors), blocks, BLOCK, stream)

    if batch.loop == "table":
        return kernel("table", batch.owners.size), (batch.address, batch.address + batch.rows.nbytes), 0
    (update,) = batch.updates
    if batch.loop == "contiguous":
        threads = batch.split.threads_of(batch.vectors)
        arguments = tuple(batch.pointers), *batch.split[:2], threads, update.start
        return kernel("contiguous", -(-threads // BLOCK)), arguments, update.key
    views = update.views
    shape, strides = collapse(views[0].shape, [view.strides for view in views], form.arrays.random)
    steps = tuple(zip(*strides, strict=True))  # by dimension
    arguments = tuple(batch.pointers), shape, steps, batch.size, update.start
    return kernel(f"strided {len(shape)}", -(-batch.size // BLOCK)), arguments, update.key


@functools.cache
def _gpu(device):
    """Return Numba's device of a number, and the handle of its context."""
    return cuda.gpus[device], int(cuda.gpus[device].get_primary_context().handle)


def _n_numbers(argument):
    """Return how many parameters Numba makes of an argument: it takes tuples apart."""
    return sum(map(_n_numbers, argument)) if type(argument) is tuple else 1


@functools.cache
def _stream(handle):
    # one object for each stream: Numba caches launch configurations by its identity
    return 0 if handle == LEGACY_DEFAULT else cuda.external_stream(handle)


@functools.lru_cache(maxsize=1024)
def _configured(kernel, blocks, threads, stream):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size")  # Numba would warn of every array too small to fill a GPU
        return kernel[blocks, threads, _stream(stream)]


backend = NumbaCuda()
