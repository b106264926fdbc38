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

from gpuadam.arrays import View
from gpuadam.kernels import adam, pointer_table
from gpuadam.kernels.layout import collapse, split

BLOCK = pointer_table.BLOCK

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
        elif p.raw or p.name in ("param", "grad", "m", "v", "max_v"):
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


def compile_numba(kernel, signature, arch):
    cc = (int(arch[3:-1]), int(arch[-1]))
    # a device function asks the current device what it can do; there is none, so answer for it
    original = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        return cuda.compile(kernel, signature, cc=cc, output="ptx", device=False, abi="numba")[0]
    finally:
        dispatcher.get_current_device = original


def signature(form, loop, on_device):
    """Return the types of the arguments of a Numba kernel."""
    i64 = types.int64
    scalars = i64 if on_device else types.UniTuple(numba_cuda.REALS[form.dtype.name], 7)
    if loop == "table":
        return (i64, i64, scalars)
    if loop == "contiguous":
        return (*[i64] * 8, scalars)
    return (*[i64] * 5, *[types.UniTuple(i64, int(loop.split()[1]))] * 6, i64, scalars)


# Both, by the names of COMPILERS in cases.py


def ptx(backend, form, arch, ndim=None, rule=adam, loop=None, on_device=False):
    """Return the PTX of a kernel: contiguous, strided of `ndim` dimensions, or of another loop."""
    return _ptx(backend, form, arch, loop or ("contiguous" if ndim is None else f"strided {ndim}"), rule, on_device)


@functools.cache
def _ptx(backend, form, arch, loop, rule, on_device):
    if backend == "numba-cuda":
        return compile_numba(numba_cuda.build(rule, form, loop, on_device), signature(form, loop, on_device), arch)
    name, _, ndim = loop.partition(" ")
    kernel = cupy_elementwise.build(rule, form, name, on_device)
    version = 12 if backend == "cupy-cuda12" else 13
    return compile_cupy(kernel, arch, "PTX", version, int(ndim or 1)).rstrip(b"\0").decode()


@functools.cache
def scalars_ptx(backend, form, arch):
    """Return the PTX of the kernel of a `device_scalars.Form`."""
    if backend != "numba-cuda":
        return (
            compile_cupy(cupy_elementwise.build_scalars(form), arch, "PTX", 12 if backend == "cupy-cuda12" else 13)
            .rstrip(b"\0")
            .decode()
        )
    i64, f64 = types.int64, types.float64
    lr, grad_scale = (f64 if dtype is None else i64 for dtype in (form.lr, form.grad_scale))
    return compile_numba(numba_cuda.build_scalars(form), (i64, lr, grad_scale, i64, i64, *[f64] * 7), arch)


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
    words = [np.dtype(arrays[0].dtype).type(s) for s in scalars]
    if backend == "numba-cuda":
        pointers = [0 if a is None else a.ctypes.data for a in arrays]
        return packed(kernel, *pointers, head, vectors, threads, tuple(words))
    param, grad, *state = [carray(a) for a in arrays if a is not None]
    return packed(kernel, grad, head, vectors, *words, param, *state, indexer(kernel, threads))


def run_strided(backend, form, arch, arrays, scalars):
    """Likewise for NumPy arrays of any strides."""
    used = [a for a in arrays if a is not None]
    n, words = used[0].size, [form.dtype.type(s) for s in scalars]
    if backend == "numba-cuda":
        shape, strides = collapse(used[0].shape, [a.strides for a in used])
        strides = [*strides, strides[0]][:5]
        kernel = loaded(ptx(backend, form, arch, ndim=len(shape)))
        pointers = [0 if a is None else a.ctypes.data for a in arrays]
        parameters = packed(kernel, *pointers, shape, *strides, n, tuple(words))
    else:
        kernel = loaded(ptx(backend, form, arch, ndim=used[0].ndim))
        param, grad, *state = [carray(a) for a in used]
        parameters = packed(kernel, grad, *words, param, *state, indexer(kernel, n, used[0].shape))
    kernel.run(math.ceil(n / BLOCK), BLOCK, parameters, memory_of(used))
    return kernel


def run_table(backend, form, arch, updates, scalars, memory, on_device=False):
    """Likewise for the arrays of several updates in one launch. memory: ranges that hold all arrays; the table is added.

    on_device: pass the scalars in memory.
    """
    views = [[None if a is None else cuda_view("", a) for a in arrays] for arrays in updates]
    rows, owners = pointer_table.rows_and_owners([[v for v in update if v is not None] for update in views])
    kernel = loaded(ptx(backend, form, arch, loop="table", on_device=on_device))
    words = np.array(scalars, form.dtype)
    given = [form.dtype.type(s) for s in scalars]
    if backend == "numba-cuda":
        parameters = packed(kernel, rows.ctypes.data, owners.ctypes.data, words.ctypes.data if on_device else tuple(given))
    else:
        threads = owners.size * pointer_table.BLOCK
        given = [carray(words)] if on_device else given
        parameters = packed(kernel, carray(owners), *given, carray(rows.reshape(-1)), indexer(kernel, threads))
    memory = [*memory, *memory_of([rows, owners, words])]
    kernel.run(owners.size, pointer_table.BLOCK, parameters, memory)
    return kernel


def run_scalars(backend, form, arch, settings, step, lr, grad_scale):
    """Run the one-thread kernel of a `device_scalars.Form`. step: int64 array, advanced. Returns the scalars."""
    kernel = loaded(scalars_ptx(backend, form, arch))
    out = np.zeros(7, form.dtype)
    if backend == "numba-cuda":
        numbers = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in (lr, grad_scale)]
        parameters = packed(kernel, step.ctypes.data, *numbers, out.ctypes.data, *settings)
    else:
        numbers = [carray(x) if isinstance(x, np.ndarray) else x for x in (lr, grad_scale)]
        parameters = packed(kernel, *numbers, *settings, carray(step), carray(out), indexer(kernel, 1))
    arrays = [x for x in (step, out, lr, grad_scale) if isinstance(x, np.ndarray)]
    kernel.run(1, 1, parameters, [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays])
    return out


def cuda_view(name, a, stream=None):
    """View a NumPy array as if it were in a GPU's memory."""
    return View(name, a, a.ctypes.data, a.shape, a.strides, a.dtype, True, a.flags.c_contiguous, 0, stream)


def packed(kernel, *arguments):
    """Return the bytes of each parameter. A tuple is one parameter, or one for each number."""
    if len(arguments) != len(kernel.parameter_sizes):
        arguments = [x for a in arguments for x in (a if isinstance(a, tuple) else (a,))]
    return [_pack(a) for a in arguments]


def _pack(value):
    if isinstance(value, tuple):
        return b"".join(map(_pack, value))
    if isinstance(value, bytes):
        return value
    return value.tobytes() if isinstance(value, np.generic) else np.array(value).tobytes()


def indexer(kernel, n, shape=None):
    """Return CuPy's Indexer struct, the last parameter: a size and a shape."""
    return int64s(n, *(shape or (n,)), *[0] * 9)[: kernel.parameter_sizes[-1]]


def int64s(*values):
    return np.array(values, "i8").tobytes()


def carray(a):
    return carray_of(a.ctypes.data, a.size, a.shape, a.strides)


def carray_of(pointer, size, shape, strides):
    """CuPy's CArray struct: pointer, size, shape, strides in bytes."""
    return int64s(pointer, size, *shape, *strides)


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


def machine_code(backend, form, arch, ndim=None, rule=adam, loop=None, on_device=False):
    """Return the SASS of a kernel as nvdisasm prints it."""
    return _on_cubin("nvdisasm", backend, form, arch, ndim, rule, loop, on_device)


def resources(backend, form, arch, ndim=None, rule=adam, loop=None, on_device=False):
    """Return what cuobjdump says that a thread of a kernel takes."""
    usage = _on_cubin("cuobjdump", backend, form, arch, ndim, rule, loop, on_device, "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local)


@functools.cache
def _on_cubin(tool, backend, form, arch, ndim, rule, loop, on_device, *options):
    loop = loop or ("contiguous" if ndim is None else f"strided {ndim}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(_cubin(backend, form, arch, loop, rule, on_device))
        command = [find(f"cu13/bin/{tool}"), *options, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _cubin(backend, form, arch, loop, rule, on_device):
    if backend != "numba-cuda":
        name, _, ndim = loop.partition(" ")
        kernel = cupy_elementwise.build(rule, form, name, on_device)
        return compile_cupy(kernel, arch, "CUBIN", 12 if backend == "cupy-cuda12" else 13, int(ndim or 1))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.cubin"
        source.write_text(_ptx(backend, form, arch, loop, rule, on_device))
        subprocess.run([find("cu13/bin/ptxas"), f"-arch={arch}", source, "-o", cubin], check=True, capture_output=True)
        return cubin.read_bytes()
