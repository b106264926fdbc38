"""The sums of `global_norm.py` as kernels in CUDA C, compiled by CuPy."""

import functools
import sys

import cupy
import numpy as np

from gpuadam.kernels import cupy_elementwise, global_norm, global_norm_gpu
from gpuadam.kernels.global_norm import BLOCK, WARP


def launch(views, out, device, stream):
    """Enqueue the norm, as `global_norm_gpu.launch` says."""
    return global_norm_gpu.launch(cupy_elementwise, sys.modules[__name__], views, out, device, stream)


def chunk_sums(views):
    """Return the sums of all chunks in the host's memory, as `global_norm_gpu.chunk_sums` says."""
    return global_norm_gpu.chunk_sums(cupy_elementwise, sys.modules[__name__], views)


def current_device():
    """Return the number of the current device."""
    return cupy.cuda.runtime.getDevice()


NAMED = None


def empty():
    """Return a new result, whose memory is of the current device and stream, and its address."""
    result = cupy.empty((), np.float64)
    return result, result.data.ptr


def on_host(address, n, device):
    """Return a copy of n float64 in device memory, when the current stream has written them."""
    return cupy.asnumpy(cupy_elementwise._unowned(address, (n,), np.float64, device))


def run(form, stream, chunks, arguments):
    """Launch a pass on the current device and stream."""
    build(form)((-(-chunks // (BLOCK // WARP)),), (BLOCK,), tuple(map(np.int64, arguments)))


@functools.cache
def build(form):
    """Return the RawKernel of a form; CuPy compiles it at its first call."""
    return cupy.RawKernel(*global_norm.in_cuda_c(form))
