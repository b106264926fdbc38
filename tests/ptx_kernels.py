"""Kernels of a few lines of PTX, for the tests of the runner."""

import functools
import math

import numpy as np
from ptx import Kernel

ALL = 0xFFFFFFFF
LANES = np.arange(32)


@functools.cache
def kernel_of(lines, n_arrays, sizes=(), shared=""):
    """Return a kernel of arrays a0, a1, ... whose addresses of this thread's elements (of `sizes` bytes) are %a0, %a1, ..."""
    declared = ", ".join(f".param .u64 a{k}" for k in range(n_arrays))
    addresses = "".join(
        f"ld.param.u64 %a{k}, [a{k}]; cvta.to.global.u64 %a{k}, %a{k}; mad.wide.u32 %a{k}, %i, {size}, %a{k};"
        for k, size in enumerate(sizes)
    )
    return Kernel(f"""
        .version 8.7 .target sm_90 .address_size 64
        .visible .entry kernel({declared}) {{
            .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<19>, %i, %t; .reg .b64 %d<9>, %a<9>; {shared}
            mov.u32 %t, %tid.x; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mad.lo.s32 %i, %r0, %r1, %t;
            {addresses} {lines} ret; }}""")


def launch(kernel, arrays, block, grid=1, memory=None, **options):
    memory = arrays if memory is None else memory
    parameters = [a.ctypes.data.to_bytes(8, "little") for a in arrays]
    kernel.run(grid, block, parameters, [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in memory], **options)
    return kernel


def each(lines, dtype, *operands):
    """Compute `out` from x, y and z, for each element of the operands. Bytes and halves are in registers of 16 bits."""
    out = np.zeros(operands[0].size, dtype)
    arrays = [out, *map(np.ascontiguousarray, operands)]
    bits = [8 * a.itemsize for a in arrays]
    registers = "".join(f".reg .b{max(16, n)} {name};" for n, name in zip(bits, ("out", "x", "y", "z"), strict=False))
    loads = "".join(
        f"ld.global.b{n} {name}, [%a{k}];" for k, (n, name) in enumerate(zip(bits[1:], "xyz", strict=False), start=1)
    )
    kernel = kernel_of(
        f"{registers} {loads} {lines} st.global.b{bits[0]} [%a0], out;", len(arrays), tuple(n // 8 for n in bits)
    )
    block = math.gcd(out.size, 256)
    launch(kernel, arrays, block, out.size // block)
    return out


def conversions(prefix, kinds, source, x):
    """Convert x to integers of all kinds by `prefix.kind.source`, in one kernel. Returns an array of each."""
    out, bits = np.zeros((x.size, len(kinds)), "u8"), 8 * x.itemsize
    lines = f".reg .b{max(16, bits)} x; ld.global.b{bits} x, [%a1];"
    for k, kind in enumerate(kinds):
        n = int(kind[1:])
        lines += f".reg .b{max(16, n)} out{k}; {prefix}.{kind}.{source} out{k}, x; st.global.b{n} [%a0+{8 * k}], out{k};"
    launch(kernel_of(lines, 2, (8 * len(kinds), x.itemsize)), [out, x], 256, x.size // 256)
    return [out[:, k].astype(f"u{int(kind[1:]) // 8}") for k, kind in enumerate(kinds)]


def warps(lines, dtype, x, block=32, shared="", **options):
    """Likewise of one operand, in blocks of `block` threads."""
    out = np.zeros(x.size, dtype)
    size = out.itemsize
    load, store = f"ld.global.b{8 * x.itemsize} x, [%a1];", f"st.global.b{8 * size} [%a0], out;"
    text = f".reg .b{8 * x.itemsize} x; .reg .b{8 * size} out; {load} {lines} {store}"
    launch(kernel_of(text, 2, (size, x.itemsize), shared), [out, x], block, x.size // block, **options)
    return out


def words(dtype, n=512, seed=0):
    """Return integers of all magnitudes and the edges of the type, in an order of their own for every seed."""
    rng = np.random.default_rng(seed)
    bits = 8 * np.dtype(dtype).itemsize
    edges = [v % 2**bits for v in (0, 1, 2, -1, -2, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 31, 32, 33)]
    values = rng.integers(0, 2**64, n, "u8") >> rng.integers(64 - bits, 64, n, "u8")
    values[: len(edges)] = edges[:n]
    return rng.permutation(values).astype(f"u{bits // 8}").view(dtype)


def same(actual, expected, what=""):
    np.testing.assert_array_equal(actual.view(f"u{actual.itemsize}"), expected.view(f"u{expected.itemsize}"), what)


def same_or_nan(actual, expected):
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    same(actual[~np.isnan(expected)], expected[~np.isnan(expected)])


def kinds_of(letters="su", widths=(16, 32, 64)):
    return [f"{letter}{n}" for letter in letters for n in widths]


def numpy_kind(kind):
    return {"s": "i", "u": "u", "b": "u"}[kind[0]] + str(int(kind[1:]) // 8)


def bits_of(value, n):
    """Return a Python integer as the NumPy one of its low n bits."""
    return np.dtype(f"u{n // 8}").type(value & ((1 << n) - 1))
