"""Compile the kernels of both GPU backends for any architecture on a machine with no GPU, and run their PTX on the host.

CuPy and Numba ask the current device what to compile for. Here the same sources go to the same compilers by hand: NVRTC of
CUDA 12 and of CUDA 13 for CuPy, NVVM for Numba, ptxas and nvdisasm for the machine code, all of them PyPI wheels.
"""

import ctypes
import functools
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from ptx import Kernel

from gpuadam.kernels import adam
from gpuadam.kernels.alignment import split

BLOCK = 128

cupy = pytest.importorskip("cupy", reason="CuPy, whose generated source is compiled here, is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda, whose PTX is run here, is not installed")

from cupy._core import _carray, _kernel, _scalar, core  # noqa: E402
from numba import cuda, types  # noqa: E402
from numba.cuda import dispatcher  # noqa: E402

from gpuadam.kernels import cupy_elementwise, numba_cuda  # noqa: E402


def find(pattern):
    """Return the first file of an installed NVIDIA wheel that matches, or skip the test."""
    for folder in sys.path:
        for path in sorted(pathlib.Path(folder).glob(f"nvidia/{pattern}")):
            return path
    pytest.skip(f"no nvidia/{pattern} is installed: pip install -e '.[test]' has it on Linux")


# CuPy: the generated CUDA C, then NVRTC


class Nvrtc:
    """The few functions of one NVRTC library that a compile takes."""

    def __init__(self, pattern):
        self.lib = ctypes.CDLL(str(find(pattern)))

    def compile(self, source, options, output):
        program = ctypes.c_void_p()
        self._check(self.lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
        encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if self.lib.nvrtcCompileProgram(program, len(options), encoded):
            raise RuntimeError(self._get(program, "ProgramLog").decode()[:3000])
        return self._get(program, output)

    def _get(self, program, what):
        size = ctypes.c_size_t()
        self._check(getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status):
        if status:
            raise RuntimeError(f"NVRTC error {status}")


@functools.cache
def nvrtc(cuda_version):
    return Nvrtc({12: "cuda_nvrtc/lib/libnvrtc.so.12", 13: "cu13/lib/libnvrtc.so.13"}[cuda_version])


def cupy_source(kernel, ndim=1):
    """Return the CUDA C that CuPy generates for an ElementwiseKernel and arrays of 64-bit indices."""
    infos = []
    for p in kernel.params:
        if p.name == "_ind":
            infos.append(_kernel._ArgInfo(2, _carray.Indexer, None, ndim, True, False))
        elif p.name in ("param", "grad", "m", "v", "max_v"):
            infos.append(_kernel._ArgInfo(1, cupy.ndarray, np.dtype(p.dtype), ndim, ndim == 1, False))
        else:
            infos.append(_kernel._ArgInfo(3, _scalar.CScalar, np.dtype(p.dtype), 0, True, True))
    dtypes = tuple(i.dtype for i in infos)
    type_map = kernel._decide_params_type(dtypes[: kernel.nin], dtypes[kernel.nin : kernel.nargs])[2]
    generated = _kernel._get_elementwise_kernel_code(
        tuple(infos), type_map, kernel.params, kernel.operation, kernel.name, kernel.preamble
    )
    return "".join(f"#include <cupy/{h}.cuh>\n" for h in ("complex", "carray", "atomics")) + generated


def compile_cupy(kernel, arch, output="PTX", cuda_version=13, ndim=1):
    """Compile as `cupy.cuda.compiler` does: its options, and `-ftz=true` after them."""
    # "virtual" compute_90 gives PTX; "real" sm_90 gives machine code
    arch = arch.replace("sm", "compute") if output == "PTX" else arch
    options = [*core.assemble_cupy_compiler_options(()), "-ftz=true", f"-arch={arch}"]
    return nvrtc(cuda_version).compile(cupy_source(kernel, ndim), options, output)


# Numba: NVVM


def compile_numba(kernel, dtype, arch, ndim=None):
    cc = (int(arch[3:-1]), int(arch[-1]))
    i64, real = types.int64, {"float32": types.float32, "float64": types.float64}[np.dtype(dtype).name]
    pointers_and_counts = (i64,) * 8 if ndim is None else (i64,) * 5 + (types.UniTuple(i64, ndim),) * 6 + (i64,)
    signature = pointers_and_counts + (real,) * 7
    # a device function asks the current device what it can do; there is none, so answer for it
    original = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        return cuda.compile(kernel, signature, cc=cc, output="ptx", device=False, abi="numba")[0]
    finally:
        dispatcher.get_current_device = original


# Both, by the names of COMPILERS in cases.py


def ptx(backend, form, arch, ndim=None, rule=adam):
    """Return the PTX of a contiguous kernel, or of a strided one of `ndim` dimensions."""
    return _ptx(backend, form, arch, ndim, rule)


@functools.cache
def _ptx(backend, form, arch, ndim, rule):
    if backend == "numba-cuda":
        return compile_numba(
            numba_cuda.build(rule, form, "contiguous" if ndim is None else f"strided {ndim}"), form.dtype, arch, ndim
        )
    kernel = cupy_elementwise.build(rule, form, "contiguous" if ndim is None else "strided")
    version = 12 if backend == "cupy-cuda12" else 13
    return compile_cupy(kernel, arch, "PTX", version, ndim or 1).rstrip(b"\0").decode()


@functools.cache
def _loaded(body):
    return Kernel(body)


def loaded(text):
    """Return the PTX as a callable kernel. Equal code for several architectures is translated once."""
    return _loaded(re.sub(r"\.(version|target)[^\n]*|//[^\n]*", "", text))


def run(backend, form, arch, arrays, scalars, rule=adam, text=None):
    """Run an update of contiguous 1-D NumPy arrays through the compiled kernel of a GPU backend. Returns the Kernel."""
    used = [a for a in arrays if a is not None]
    n = used[0].size
    head, vectors, threads = split([a.ctypes.data for a in used], n, form.dtype.itemsize)
    kernel = loaded(text or ptx(backend, form, arch, rule=rule))
    parameters = contiguous_parameters(backend, arrays, (head, vectors, threads), scalars, kernel)
    kernel.run(math.ceil(threads / BLOCK), BLOCK, parameters, memory_of(used))
    return kernel


def contiguous_parameters(backend, arrays, split, scalars, kernel):
    head, vectors, threads = split
    words = [s.tobytes() for s in scalars]
    if backend == "numba-cuda":
        pointers = [0 if a is None else a.ctypes.data for a in arrays]
        return [int64s(k) for k in (*pointers, head, vectors, threads)] + words
    param, grad, *state = [carray(a) for a in arrays if a is not None]
    indexer = int64s(threads, threads, 0, 0)[: kernel.parameter_sizes[-1]]
    return [grad, int64s(head), int64s(vectors), *words, param, *state, indexer]


def run_strided(backend, form, arch, arrays, scalars):
    """Likewise for NumPy arrays of any strides."""
    used = [a for a in arrays if a is not None]
    n, words = used[0].size, [s.tobytes() for s in scalars]
    if backend == "numba-cuda":
        shape, strides = numba_cuda.collapse(used[0].shape, [a.strides for a in used])
        strides = [*strides, strides[0]][:5]
        kernel = loaded(ptx(backend, form, arch, ndim=len(shape)))
        pointers = [int64s(0 if a is None else a.ctypes.data) for a in arrays]
        parameters = [*pointers, *(int64s(*t) for t in (shape, *strides)), int64s(n), *words]
        if len(parameters) != len(kernel.parameter_sizes):  # a tuple is one parameter, or one for each number
            parameters = [*pointers, *(int64s(k) for t in (shape, *strides) for k in t), int64s(n), *words]
    else:
        kernel = loaded(ptx(backend, form, arch, ndim=used[0].ndim))
        param, grad, *state = [carray(a) for a in used]
        indexer = int64s(n, *used[0].shape, *[0] * 9)[: kernel.parameter_sizes[-1]]
        parameters = [grad, *words, param, *state, indexer]
    kernel.run(math.ceil(n / BLOCK), BLOCK, parameters, memory_of(used))
    return kernel


def int64s(*values):
    return np.array(values, "i8").tobytes()


def carray(a):
    """CuPy's CArray struct: pointer, size, shape, strides in bytes."""
    return int64s(a.ctypes.data, a.size, *a.shape, *a.strides)


def memory_of(arrays):
    return [np.lib.array_utils.byte_bounds(a) if a.size else (0, 0) for a in arrays]


# What the PTX consists of

ROUNDED = ("fma", "add", "sub", "mul", "div", "sqrt")


def rounded_operations(kernel):
    """Count the operations that round. A subtraction counts as an addition: compilers write it as either."""
    counts = Counter()
    for opcode, n in kernel.opcodes.items():
        operation, *modifiers = opcode.split(".")
        if operation in ROUNDED and modifiers[-1] in ("f32", "f64"):
            counts["add" if operation == "sub" else operation] += n
    return counts


def foreign_operations(kernel, form):
    """List the instructions on floats that the contract has no place for."""
    other = {4: "f64", 8: "f32"}[form.dtype.itemsize]
    exact = ("ld", "st", "mov", "neg", "abs", "setp", "selp")
    foreign = []
    for opcode in kernel.opcodes:
        operation, *modifiers = opcode.split(".")
        if {"f16", "f32", "f64", "bf16"} & set(modifiers):
            rounds = operation in ROUNDED and "rn" in modifiers
            if other in modifiers or {"ftz", "approx"} & set(modifiers) or not (rounds or operation in exact):
                foreign.append(opcode)
    return foreign


# Machine code


class Resources(NamedTuple):
    registers: int
    local_bytes: int  # stack and spills, of one thread


def machine_code(backend, form, arch, ndim=None, rule=adam):
    """Return the SASS of a kernel as nvdisasm prints it."""
    return _on_cubin("nvdisasm", backend, form, arch, ndim, rule)


def resources(backend, form, arch, ndim=None, rule=adam):
    """Return what cuobjdump says that a thread of a kernel takes."""
    usage = _on_cubin("cuobjdump", backend, form, arch, ndim, rule, "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local)


@functools.cache
def _on_cubin(tool, backend, form, arch, ndim, rule, *options):
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(_cubin(backend, form, arch, ndim, rule))
        command = [find(f"cu13/bin/{tool}"), *options, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _cubin(backend, form, arch, ndim, rule):
    if backend != "numba-cuda":
        kernel = cupy_elementwise.build(rule, form, "contiguous" if ndim is None else "strided")
        return compile_cupy(kernel, arch, "CUBIN", 12 if backend == "cupy-cuda12" else 13, ndim or 1)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.cubin"
        source.write_text(ptx(backend, form, arch, ndim, rule))
        subprocess.run([find("cu13/bin/ptxas"), f"-arch={arch}", source, "-o", cubin], check=True, capture_output=True)
        return cubin.read_bytes()
