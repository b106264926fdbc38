"""The rule in kernels of users, for Numba CUDA: a function of one element that @cuda.jit code calls."""

import functools

from numba import cuda
from numba.core.errors import TypingError

from gpuadam.kernels import adam, primitives
from gpuadam.kernels.element_numba import in_python
from gpuadam.kernels.numba_cuda_kernels import intrinsic


@functools.cache
def build(form):
    """Return the update of a form as a function for @cuda.jit code."""
    compiled = cuda.jit(device=True, fastmath=False)
    rule = compiled(adam.in_python(form, primitives.in_assembly(intrinsic, form.dtype)))
    return compiled(in_python(form, intrinsic, rule, TypingError))
