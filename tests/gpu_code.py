"""Compile the kernels of both GPU backends for any architecture on a machine with no GPU, and run their PTX on the host.

CuPy and Numba ask the current device what to compile for. Here the same sources go to the same compilers by hand: NVRTC of
CUDA 12 and of CUDA 13 for CuPy, NVVM for Numba, ptxas and nvdisasm for the machine code, all of them PyPI wheels.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import kept
import libraries
import numpy as np
import pytest
from ptx import loaded

from gpuadam.kernels import adam, gpu_table, primitives
from gpuadam.kernels.layout import Update, collapse, split
from gpuadam.kernels.operands import GROUP_LANES, KINDS, operands_of_form
from gpuadam.kernels.scalars import MEMORY_BYTES, REALS_AT, Settings
from gpuadam.kernels.view import View

BLOCK = gpu_table.BLOCK

cupy = libraries.imported("cupy", reason="CuPy, whose generated source is compiled here, is not installed")
libraries.imported("numba_cuda", reason="numba-cuda, whose PTX is run here, is not installed")

from cupy._core import _carray, _kernel, _scalar, core  # noqa: E402
from numba import cuda, types  # noqa: E402
from numba.cuda import dispatcher  # noqa: E402

from gpuadam.kernels import cupy_kernels, limit, numba_cuda_kernels  # noqa: E402

PRIMITIVES = dict(primitives.PRIMITIVES)  # before a test replaces one


def find(pattern):
    """Return the first file of an installed NVIDIA wheel that matches, or skip the test."""
    for folder in sys.path:
        for path in sorted(pathlib.Path(folder).glob(f"nvidia/{pattern}")):
            return path
    pytest.skip(f"no nvidia/{pattern} is installed: pip install -e '.[test]' has it on Linux")


# What is compiled is kept for later runs, by its source, the options and the compiler

OF_COMPILERS = ("cuda", "cupy", "llvmlite", "numba", "nvidia")


@functools.cache
def versions():
    """Return all packages that have a part in compiling, with their versions, and the settings that they heed."""
    found = {f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name.lower().startswith(OF_COMPILERS)}
    settings = {f"{name}={value}" for name, value in os.environ.items() if name.startswith(("CUDA_", "CUPY_", "NUMBA_"))}
    return " ".join([sys.version, *sorted(found), *sorted(settings)])


@functools.cache
def package_text():
    """Return the hash of all of gpuadam: the source of a kernel of Numba is functions that call others."""
    digest, kernels = hashlib.sha256(), pathlib.Path(adam.__file__).parent
    for folder in (kernels.parent, kernels.resolve()):  # which is a link, and rglob follows none
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# CuPy: the generated CUDA C, then NVRTC


class Nvrtc:
    """The few functions of one NVRTC library that a compile takes."""

    def __init__(self, pattern):
        self.path = str(find(pattern))
        self.lib = ctypes.CDLL(self.path)

    def compile(self, source, options, output):
        key = (source, *options, output, self.path, versions())
        return kept.data("nvrtc", key, lambda: self._compile(source, options, output))

    def _compile(self, source, options, output):
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
        elif p.raw or p.name in ARRAYS:
            own = 1 if p.raw else ndim  # what is raw beside strided arrays are the scalars on the device
            infos.append(_kernel._ArgInfo(1, cupy.ndarray, np.dtype(p.dtype), own, own == 1, False))
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


def compile_numba(kernel, signature, arch, **options):
    cc = (int(arch[3:-1]), int(arch[-1]))
    # a device function asks the current device what it can do; there is none, so answer for it
    original = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        return cuda.compile(kernel, signature, cc=cc, output="ptx", device=False, abi="numba", **options)[0]
    finally:
        dispatcher.get_current_device = original


# what CuPy passes as an array even if it is not raw
ARRAYS = tuple(KINDS)


def signature(form, loop, on_device):
    """Return the types of the arguments of a Numba kernel."""
    i64 = types.int64
    scalars = i64 if on_device else types.UniTuple(__import__("numba").from_dtype(form.dtype), len(adam.scalar_names(form)))
    addresses = types.UniTuple(i64, len(operands_of_form(form)))
    if loop == "table":
        return (i64, i64, i64, scalars)
    if loop == "contiguous":
        return (addresses, *[i64] * 5, scalars)
    ndim = int(loop.split()[1])
    return (addresses, types.UniTuple(i64, ndim), types.UniTuple(addresses, ndim), *[i64] * 3, scalars)


# Both, by the names of COMPILERS in cases.py


def ptx(backend, form, arch, ndim=None, rule=adam, loop=None, on_device=False, vectors=1):
    """Return the PTX of a kernel: contiguous, strided of `ndim` dimensions, or of another loop."""
    return _ptx(backend, form, arch, loop or ("contiguous" if ndim is None else f"strided {ndim}"), rule, on_device, vectors)


@functools.cache
def _ptx(backend, form, arch, loop, rule, on_device, vectors):
    if backend == "numba-cuda":
        return _numba_ptx(form, arch, loop, rule, on_device, vectors)
    name, _, ndim = loop.partition(" ")
    kernel = cupy_kernels.build(rule, form, name, on_device, vectors)
    version = 12 if backend == "cupy-cuda12" else 13
    return compile_cupy(kernel, arch, "PTX", version, int(ndim or 1)).rstrip(b"\0").decode()


def _numba_ptx(form, arch, loop, rule, on_device, vectors):
    def make():
        kernel = numba_cuda_kernels.build(rule, form, loop, on_device, vectors)
        return compile_numba(kernel, signature(form, loop, on_device), arch)

    if rule not in (adam, limit) or PRIMITIVES != primitives.PRIMITIVES:  # a test's own, whose text is in no key
        return make()
    key = repr(form), arch, loop, rule.__name__, str(on_device), str(vectors), package_text(), versions()
    return kept.text("nvvm", key, make)


@functools.cache
def scalars_ptx(backend, form, arch):
    """Return the PTX of the kernel of a `scalars.ScalarsForm`."""
    if backend != "numba-cuda":
        options = [*core.assemble_cupy_compiler_options(()), "-ftz=true", f"-arch={arch.replace('sm', 'compute')}"]
        source = cupy_kernels.build_scalars(form).code
        return nvrtc(12 if backend == "cupy-cuda12" else 13).compile(source, options, "PTX").rstrip(b"\0").decode()
    i64, f64 = types.int64, types.float64
    lr, grad_scale = (f64 if dtype is None else i64 for dtype in (form.lr, form.grad_scale))
    settings = [i64, i64, *[f64] * (len(Settings._fields) - 2)]
    types_of_arguments = (i64, i64, i64, lr, grad_scale, i64, *settings)
    return kept.text(
        "nvvm-scalars",
        (repr(form), arch, package_text(), versions()),
        lambda: compile_numba(numba_cuda_kernels.build_scalars(form), types_of_arguments, arch),
    )


@functools.cache
def norm_ptx(in_numba, in_cuda_c, backend, form, arch):
    """Return the PTX of a kernel of a norm. in_numba, in_cuda_c: the modules that write it."""
    if backend == "numba-cuda":
        key = repr(form), arch, package_text(), versions()
        return kept.text(
            f"nvvm-{in_numba.__name__}", key, lambda: compile_numba(in_numba.build(form), (types.int64,) * 6, arch)
        )
    options = ["-ftz=true", f"-arch={arch.replace('sm', 'compute')}"]
    version = 12 if backend == "cupy-cuda12" else 13
    return nvrtc(version).compile(in_cuda_c.text_and_name(form)[0], options, "PTX").rstrip(b"\0").decode()


def run(backend, form, arch, arrays, scalars, rule=adam, text=None, key=0, start=0, vectors=1):
    """Run an update of contiguous 1-D NumPy arrays through the compiled kernel of a GPU backend. Returns the Kernel.

    arrays: in the order of `operands.operands_of`; those that are None are left out. Where an element has several numbers, they
    are in a last dimension.
    """
    used = [a for a in arrays if a is not None]
    n = used[0].size // form.arrays.numbers
    cut = split([a.ctypes.data for a in used], [o.itemsize for o in operands_of_form(form)], n)
    threads = cut.threads_of(vectors)
    kernel = loaded(text or ptx(backend, form, arch, rule=rule, vectors=vectors))
    parameters = contiguous_parameters(backend, form, arrays, cut._replace(threads=threads), scalars, kernel, key, start)
    kernel.run(math.ceil(threads / BLOCK), BLOCK, parameters, memory_of(used))
    return kernel


def words_of(form, scalars):
    """Return the scalars that a form uses, in the type that it computes with."""
    return [form.dtype.type(s) for s in scalars[: len(adam.scalar_names(form))]]


def in_and_out(form, values):
    """Return what belongs to the operands that are only read, and to the others: CuPy takes them in that order."""
    pairs = list(zip(operands_of_form(form), values, strict=True))
    return [x for operand, x in pairs if not operand.stores], [x for operand, x in pairs if operand.stores]


def contiguous_parameters(backend, form, arrays, split, scalars, kernel, key=0, start=0):
    head, vectors, threads = split
    words, used = words_of(form, scalars), [a for a in arrays if a is not None]
    if backend == "numba-cuda":
        return packed(kernel, tuple(a.ctypes.data for a in used), head, vectors, threads, start, key, tuple(words))
    read, written = in_and_out(form, (carray(a.reshape(-1)) for a in used))
    row, step = ([0, start], [key]) if form.arrays.random else ([], [])
    return packed(kernel, *read, head, vectors, *row, *words, *step, *written, indexer(kernel, threads))


def run_strided(backend, form, arch, arrays, scalars, key=0, start=0):
    """Likewise for NumPy arrays of any strides."""
    whole = [a for a in arrays if a is not None]
    used = [a[..., 0] if o.numbers > 1 else a for a, o in zip(whole, operands_of_form(form), strict=True)]
    n, words = used[0].size, words_of(form, scalars)
    if backend == "numba-cuda":
        shape, strides = collapse(used[0].shape, [a.strides for a in used], form.arrays.random)
        kernel = loaded(ptx(backend, form, arch, ndim=len(shape)))
        steps = tuple(zip(*strides, strict=True))
        parameters = packed(kernel, tuple(a.ctypes.data for a in used), shape, steps, n, start, key, tuple(words))
    else:
        kernel = loaded(ptx(backend, form, arch, ndim=used[0].ndim))
        read, written = in_and_out(form, map(carray, used))
        row, step = ([0, start], [key]) if form.arrays.random else ([], [])
        parameters = packed(kernel, *read, *row, *words, *step, *written, indexer(kernel, n, used[0].shape))
    kernel.run(math.ceil(n / BLOCK), BLOCK, parameters, memory_of(whole))
    return kernel


def run_table(backend, form, arch, updates, scalars, memory, on_device=False, key=0, keys=None, skip=0, vectors=1):
    """Likewise for the arrays of several updates in one launch. memory: ranges that hold all arrays; the table is added.

    on_device: pass the scalars in memory, and with them the step's key and the flag that turns it off. keys: of each update.
    """
    keys = keys or [0] * len(updates)
    numbers = [operand.numbers for operand in operands_of_form(form)]
    views = [
        Update(
            [cuda_view("", a).in_vectors(n) for a, n in zip((a for a in arrays if a is not None), numbers, strict=True)], k
        )
        for arrays, k in zip(updates, keys, strict=True)
    ]
    rows, owners = gpu_table.rows_and_owners(views, GROUP_LANES if form.arrays.grouped else 0)
    kernel = loaded(ptx(backend, form, arch, loop="table", on_device=on_device, vectors=vectors))
    given = words_of(form, scalars)
    in_memory = np.zeros(MEMORY_BYTES // 8, "i8")
    in_memory[:2] = key, skip
    reals = in_memory[REALS_AT // 8 :].view(form.dtype)[: len(given)]
    reals[:] = given
    if backend == "numba-cuda":
        address = in_memory.ctypes.data
        parameters = packed(
            kernel, rows.ctypes.data, owners.ctypes.data, 0 if on_device else key, address if on_device else tuple(given)
        )
    else:
        threads = owners.size * gpu_table.BLOCK
        if on_device:
            given = [carray(reals)] + [carray(in_memory[:2])] * (form.arrays.random or form.skips)
        elif form.arrays.random:
            given = [*given, key]
        parameters = packed(kernel, carray(owners), *given, carray(rows.reshape(-1)), indexer(kernel, threads))
    memory = [*memory, *memory_of([rows, owners, in_memory])]
    kernel.run(owners.size, gpu_table.BLOCK, parameters, memory)
    return kernel


def run_scalars(backend, form, arch, settings, step, lr, grad_scale, found_inf=None, norm=None):
    """Run the one-thread kernel of a `scalars.ScalarsForm`. step: int64 array, advanced. Returns the memory that it writes."""
    kernel = loaded(scalars_ptx(backend, form, arch))
    out = np.zeros(MEMORY_BYTES // 8, "i8")
    numbers = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in (step, found_inf, norm, lr, grad_scale)]
    numbers = [0 if x is None else x for x in numbers]
    parameters = packed(kernel, *numbers, out.ctypes.data, *settings)
    arrays = [x for x in (step, out, lr, grad_scale, found_inf, norm) if isinstance(x, np.ndarray)]
    kernel.run(1, 1, parameters, [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays])
    return out


def reals_of(out, form):
    """Return the scalars in what `run_scalars` returned."""
    return out[REALS_AT // 8 :].view(form.dtype)[: form.reals]


def cuda_view(name, a, stream=None):
    """View a NumPy array as if it were in a GPU's memory."""
    return View(name, a, a.ctypes.data, a.shape, a.strides, a.dtype, True, a.flags.c_contiguous, 0, stream)


def packed(kernel, *arguments):
    """Return the bytes of each parameter. A tuple is one parameter, or one for each number, also of tuples in it."""
    if len(arguments) != len(kernel.parameter_sizes):
        arguments = list(_numbers(arguments))
    return [_pack(a) for a in arguments]


def _numbers(arguments):
    for a in arguments:
        if isinstance(a, tuple):
            yield from _numbers(a)
        else:
            yield a


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


def contract_operations(form):
    """Return how many of each rounded operation one element takes, counted from the contract."""
    nadam, adamax, optax = (form.algorithm == name for name in ("nadam", "adamax", "optax"))
    ema, change, lr_scale = form.arrays.ema != "", form.arrays.change != "", form.arrays.lr_scale != ""
    counts = {
        # m, g * g - v, v, denom, param; decay; NAdam's direction; ema. AdaMax has but m and param, optax another denom
        "fma": (2 if adamax else 5 - optax) + form.l2 + form.decoupled + nadam + ema - change,
        # of_m * m; beta2 * v; the corrected v; the change or its decay; the learning rate, and the decay it is in
        "mul": form.scaled + (not form.near2) + nadam + adamax + optax + change + lr_scale * (1 + form.decoupled),
        # g - m; the sum that clears the sign of a loaded -0; |g| + eps; eps_root and eps; param - ema; a bounded change
        "add": 1 + form.amsgrad + 2 * adamax + 2 * optax + ema + 2 * (change and form.bounded),
        "sqrt": 0 if adamax else 1,
        "div": 1,
    }
    return {op: n for op, n in counts.items() if n}


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


def machine_code(backend, form, arch, ndim=None, rule=adam, loop=None, on_device=False, vectors=1):
    """Return the SASS of a kernel as nvdisasm prints it."""
    return _on_cubin("nvdisasm", backend, form, arch, ndim, rule, loop, on_device, vectors)


def resources(backend, form, arch, ndim=None, rule=adam, loop=None, on_device=False, vectors=1):
    """Return what cuobjdump says that a thread of a kernel takes."""
    usage = _on_cubin("cuobjdump", backend, form, arch, ndim, rule, loop, on_device, vectors, "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local)


def memory_accesses(sass):
    """Return how many accesses to memory of each kind there are in machine code."""
    return Counter(re.findall(r"\b((?:LDG|STG|LD|ST|LDL|STL|LDS|STS|ATOM|RED)\.[\w.]+)", sass))


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
WIDE = {"128": 16, "64": 8}


def loaded_before_use(sass):
    """Return the most bytes that a thread loads in a run of instructions before one of them takes what was loaded.

    A run ends at a label and at a branch. The loads of a table's row, of 8 bytes, do not count: from its address many numbers are
    read. What is 4 bytes wide or less does not count either, for the elements beyond the vectors are.
    """
    lines = [(line, INSTRUCTION.match(line)) for line in sass.splitlines()]
    offsets: dict[str, set] = {}
    for _, found in lines:
        if found and found[1].startswith("LDG"):
            offsets.setdefault(_address(found[2]), set()).add(found[2])
    most, loaded, pending = 0, 0, set()
    for line, found in lines:
        if not found:
            if line.strip().endswith(":"):
                loaded, pending = 0, set()
            continue
        operation, operands = found.groups()
        written, _, read = operands.partition(",") if not operation.startswith("ST") else ("", "", operands)
        used = {int(number) for number in re.findall(r"\bR(\d+)", read)}
        if operation.startswith(("BRA", "EXIT")) or used & pending:
            loaded, pending = 0, set()
        if operation.startswith("LDG"):
            n = next((WIDE[part] for part in operation.split(".") if part in WIDE), 0)
            if n == 8 and len(offsets[_address(operands)]) > 4:
                continue
            first = int(re.match(r"\s*R(\d+)", written)[1])
            pending |= set(range(first, first + n // 4))
            loaded += n
            most = max(most, loaded)
    return most


def _address(operands):
    """Return the address register in the operands of a load, without what is added to it.

    >>> _address("R4, desc[UR6][R2.64+0x10]"), _address("R0, [UR4]")
    ('R2', 'UR4')
    """
    return re.findall(r"\[(U?R\w+)", operands)[-1]


@functools.cache
def _on_cubin(tool, backend, form, arch, ndim, rule, loop, on_device, vectors, *options):
    code = _cubin(
        backend, form, arch, loop or ("contiguous" if ndim is None else f"strided {ndim}"), rule, on_device, vectors
    )

    def make():
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder) / "kernel.cubin"
            cubin.write_bytes(code)
            command = [find(f"cu13/bin/{tool}"), *options, cubin]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return kept.text(tool, (*options, code, versions()), make)


@functools.cache
def _cubin(backend, form, arch, loop, rule, on_device, vectors):
    if backend != "numba-cuda":
        name, _, ndim = loop.partition(" ")
        kernel = cupy_kernels.build(rule, form, name, on_device, vectors)
        return compile_cupy(kernel, arch, "CUBIN", 12 if backend == "cupy-cuda12" else 13, int(ndim or 1))
    text = _ptx(backend, form, arch, loop, rule, on_device, vectors)

    def make():
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.cubin"
            source.write_text(text)
            subprocess.run([find("cu13/bin/ptxas"), f"-arch={arch}", source, "-o", cubin], check=True, capture_output=True)
            return cubin.read_bytes()

    return kept.data("ptxas", (text, arch, versions()), make)
