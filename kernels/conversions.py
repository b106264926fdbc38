"""Conversions between how a number is stored and a float, and random bits: one row each, as LLVM for Numba and as PTX for CuPy.

They are exact operations on bits. Raw bits are a u32; its upper half is zero for formats of 16 bits. Rounding is to nearest even
unless a name says "randomly": then h, 32 random bits, is added below the last bit that is kept, and the rest is cut off, which is
right on average (stochastic rounding). A NaN becomes a quiet NaN.

LLVM's own half is used where the CPU has instructions for it, and its bfloat never: on other CPUs they become calls of
functions that are not there.
"""

import functools

import numpy as np

from gpuadam.kernels import processor
from gpuadam.kernels.llvm import F16, F32, F64, U16, U32, U64, assembly
from gpuadam.kernels.primitives import Operation, abs_, in_cuda_c, mul, neg, operation
from gpuadam.kernels.state_formats import (
    BELOW,
    BIAS,
    BIAS_BITS,
    INFINITY,
    M_LARGEST,
    M_SMALLEST,
    V_CUT,
    V_LARGEST,
    V_SMALLEST,
)

CONVERSIONS: dict[str, Operation] = {}
conversion = functools.partial(operation, CONVERSIONS)


def for_cuda_c():
    """Return the conversions as CUDA C: inline functions."""
    return in_cuda_c(CONVERSIONS)


@conversion("f32 -> f64", "cvt.f64.f32 %0, %1;")
def widened(b, rn, x):
    return b.fpext(x, F64)


@conversion("f64 -> f32", "cvt.rn.f32.f64 %0, %1;")
def narrowed(b, rn, x):
    return b.fptrunc(x, F32)


@conversion("u32 -> f32", "cvt.rn.f32.u32 %0, %1;")
def from_uint8(b, rn, u):
    return b.uitofp(u, F32)


# bfloat16: the upper half of a float32.

_UNLESS_NAN = "setp.nan.f32 p, %1, %1; selp.b32 %0, 0x7FC0, x, p; }"


@conversion("u32 -> f32", "{ .reg .b32 x; shl.b32 x, %1, 16; mov.b32 %0, x; }")
def from_bfloat16(b, rn, u):
    return b.bitcast(b.shl(u, U32(16)), F32)


@conversion(
    "f32 -> u32",
    "{ .reg .pred p; .reg .b32 x, t; mov.b32 x, %1; shr.u32 t, x, 16; and.b32 t, t, 1; add.u32 x, x, 0x7FFF;",
    "add.u32 x, x, t; shr.u32 x, x, 16;",
    _UNLESS_NAN,
)
def to_bfloat16(b, rn, x):
    u = b.bitcast(x, U32)
    odd = b.and_(b.lshr(u, U32(16)), U32(1))
    rounded = b.lshr(b.add(b.add(u, U32(0x7FFF)), odd), U32(16))
    return b.select(_is_nan(b, u), U32(0x7FC0), rounded)


@conversion(
    "f32, u32 -> u32",
    "{ .reg .pred p; .reg .b32 x, t; mov.b32 x, %1; and.b32 t, %2, 0xFFFF; add.u32 x, x, t; shr.u32 x, x, 16;",
    _UNLESS_NAN,
)
def to_bfloat16_randomly(b, rn, x, h):
    u = b.bitcast(x, U32)
    rounded = b.lshr(b.add(u, b.and_(h, U32(0xFFFF))), U32(16))
    return b.select(_is_nan(b, u), U32(0x7FC0), rounded)


def _is_nan(b, u):
    x = b.bitcast(u, F32)
    return b.fcmp_unordered("uno", x, x)


# float16: on GPUs one instruction, and on CPUs that have it; on others integers.


@conversion("u32 -> f32", "{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }")
def from_float16(b, rn, u):
    if rn:  # the CUDA target
        return assembly(b, "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }", "=f,r", F32, u)
    if processor.converts_float16():
        return b.fpext(b.bitcast(b.trunc(u, U16), F16), F32)
    magnitude, sign = b.and_(u, U32(0x7FFF)), b.shl(b.and_(u, U32(0x8000)), U32(16))
    shifted = b.shl(magnitude, U32(13))
    normal = b.add(shifted, U32((127 - 15) << 23))
    special = b.or_(shifted, U32(0xFF << 23))  # infinity and NaN
    tiny = b.bitcast(b.fmul(b.sitofp(magnitude, F32), F32(2.0**-24)), U32)  # exact; signed, which AVX2 has
    large = b.select(b.icmp_unsigned(">=", magnitude, U32(0x7C00)), special, normal)
    bits = b.select(b.icmp_unsigned("<", magnitude, U32(0x0400)), tiny, large)
    return b.bitcast(b.or_(bits, sign), F32)


@conversion("f32 -> u32", "{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h; }")
def to_float16(b, rn, x):
    if rn:
        return assembly(b, "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.u32.u16 $0, h; }", "=r,f", U32, x)
    if processor.converts_float16():
        return b.zext(b.bitcast(b.fptrunc(x, F16), U16), U32)
    magnitude, tiny, finish = _for_float16(b, x)
    odd = b.and_(b.lshr(magnitude, U32(13)), U32(1))
    rebiased = b.add(magnitude, U32((0xFFF - ((127 - 15) << 23)) % 2**32))
    normal = b.lshr(b.add(rebiased, odd), U32(13))
    # a sum whose last bit is the last of the subnormal numbers of float16
    of_tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, F32), F32(0.5)), U32), U32(0x3F000000))
    return finish(b.select(tiny, of_tiny, normal))


@conversion(
    "f32, u32 -> u32",
    "{ .reg .pred tiny, gone, large, nan; .reg .b32 x, s, cut, kept, t; mov.b32 x, %1; shr.u32 s, x, 16;",
    "and.b32 s, s, 0x8000; and.b32 x, x, 0x7FFFFFFF; setp.lt.u32 tiny, x, 0x38800000; shr.u32 t, x, 23;",
    "sub.u32 t, 113, t; selp.b32 t, t, 0, tiny; add.u32 cut, t, 13; setp.gt.u32 gone, cut, 31; min.u32 cut, cut, 31;",
    "and.b32 t, x, 0x7FFFFF; or.b32 t, t, 0x800000; sub.u32 kept, x, 0x38000000; selp.b32 kept, t, kept, tiny;",
    "shl.b32 t, 1, cut; sub.u32 t, t, 1; and.b32 t, t, %2; add.u32 kept, kept, t; shr.u32 kept, kept, cut;",
    "selp.b32 kept, 0, kept, gone; setp.ge.u32 large, x, 0x47800000; setp.gt.u32 nan, x, 0x7F800000;",
    "selp.b32 kept, 0x7C00, kept, large; selp.b32 kept, 0x7E00, kept, nan; or.b32 %0, kept, s; }",
)
def to_float16_randomly(b, rn, x, h):
    magnitude, tiny, finish = _for_float16(b, x)
    # 13 bits are cut off a normal number of float16, and more off a subnormal one, whose leading 1 has to be written out
    below = b.sub(U32(113), b.lshr(magnitude, U32(23)))
    cut = b.add(b.select(tiny, below, U32(0)), U32(13))
    vanishes = b.icmp_unsigned(">", cut, U32(31))  # below 2**-32, a 256th of the smallest: 0
    cut = b.select(vanishes, U32(31), cut)
    written_out = b.or_(b.and_(magnitude, U32(0x7FFFFF)), U32(0x800000))
    kept = b.select(tiny, written_out, b.sub(magnitude, U32((127 - 15) << 23)))
    noise = b.and_(h, b.sub(b.shl(U32(1), cut), U32(1)))
    rounded = b.lshr(b.add(kept, noise), cut)
    return finish(b.select(vanishes, U32(0), rounded))


def _for_float16(b, x):
    """Return the bits of |x|, whether |x| is subnormal in float16, and a function that makes x of a finite |x| in float16."""
    u = b.bitcast(x, U32)
    magnitude, sign = b.and_(u, U32(0x7FFFFFFF)), b.and_(b.lshr(u, U32(16)), U32(0x8000))

    def finish(finite):
        infinite = b.select(_is_nan(b, u), U32(0x7E00), U32(0x7C00))
        return b.or_(b.select(b.icmp_unsigned(">=", magnitude, U32(0x47800000)), infinite, finite), sign)

    return magnitude, b.icmp_unsigned("<", magnitude, U32(113 << 23)), finish


# A float32 in two parts of 16 bits: the nearest bfloat16, ties away from zero, and the signed difference from it. If ties went to
# even, the difference would not fit.

_ONE_NAN = "{ .reg .pred p; .reg .b32 x; mov.b32 x, %1; setp.nan.f32 p, %1, %1; selp.b32 x, 0x7FC00000, x, p;"


@conversion(
    "u32, u32 -> f32",
    "{ .reg .b32 x, t; shl.b32 x, %1, 16; shl.b32 t, %2, 16; shr.s32 t, t, 16; add.u32 x, x, t; mov.b32 %0, x; }",
)
def from_parts(b, rn, high, low):
    signed = b.ashr(b.shl(low, U32(16)), U32(16))
    return b.bitcast(b.add(b.shl(high, U32(16)), signed), F32)


@conversion("f32 -> u32", _ONE_NAN, "add.u32 x, x, 0x8000; shr.u32 %0, x, 16; }")
def high_part(b, rn, x):
    return b.lshr(b.add(_one_nan(b, x), U32(0x8000)), U32(16))


@conversion("f32 -> u32", _ONE_NAN, "and.b32 %0, x, 0xFFFF; }")
def low_part(b, rn, x):
    return b.and_(_one_nan(b, x), U32(0xFFFF))


def _one_nan(b, x):
    u = b.bitcast(x, U32)
    return b.select(_is_nan(b, u), U32(0x7FC00000), u)


# 8-bit state, which `state_formats.py` explains. Codes are rounded randomly: to nearest, a code of v would stay where it is,
# because a step changes v by less than half a code.


def _ptx(x):
    """Return a float32 as PTX writes it."""
    return f"0f{np.float32(x).view('u4'):08X}"


def _f32(x):
    return F32(float(np.float32(x)))


@conversion("f32 -> f32", f"mul.rn.f32 %0, %1, {_ptx(1 / M_LARGEST)};")
def m_unit(b, rn, scale):
    return mul(b, rn, scale, _f32(1 / M_LARGEST))


@conversion("f32 -> f32", f"mul.rn.f32 %0, %1, {_ptx(1 / V_LARGEST)};")
def v_unit(b, rn, scale):
    return mul(b, rn, scale, _f32(1 / V_LARGEST))


_FROM_CODE = (
    f"or.b32 x, x, {BIAS_BITS:#x}; mov.b32 z, x; mul.rn.f32 o, %2, {_ptx(BIAS)}; neg.f32 o, o; fma.rn.f32 z, z, %2, o;"
)


@conversion(
    "u32, f32 -> f32",
    "{ .reg .b32 x, s; .reg .f32 z, o; and.b32 x, %1, 0x7F; shl.b32 x, x, 19;",
    _FROM_CODE,
    "and.b32 s, %1, 0x80; shl.b32 s, s, 24; mov.b32 x, z; or.b32 x, x, s; mov.b32 %0, x; }",
)
def from_m_code(b, rn, code, unit):
    size = _from_code(b, rn, b.shl(b.and_(code, U32(0x7F)), U32(19)), unit)
    sign = b.shl(b.and_(code, U32(0x80)), U32(24))
    return b.bitcast(b.or_(b.bitcast(size, U32), sign), F32)


@conversion("u32, f32 -> f32", "{ .reg .b32 x; .reg .f32 z, o; shl.b32 x, %1, 18;", _FROM_CODE, "mul.rn.f32 %0, z, z; }")
def from_v_code(b, rn, code, unit):
    root = _from_code(b, rn, b.shl(code, U32(18)), unit)
    return mul(b, rn, root, root)


def _from_code(b, rn, shifted, unit):
    z = b.bitcast(b.or_(shifted, U32(BIAS_BITS)), F32)
    return b.fma(z, unit, neg(b, rn, mul(b, rn, unit, F32(BIAS))))  # as if z - BIAS, which is exact, came first


@conversion("f32 -> u32", "{ .reg .b32 x; mov.b32 x, %1; and.b32 %0, x, 0x7FFFFFFF; }")
def magnitude(b, rn, x):
    return b.and_(b.bitcast(x, U32), U32(0x7FFFFFFF))


@conversion("u32 -> f32", f"{{ .reg .f32 x; mov.b32 x, %1; div.rn.f32 %0, {_ptx(M_LARGEST * BELOW)}, x; }}")
def m_inverse(b, rn, largest_m):
    return b.fdiv(_f32(M_LARGEST * BELOW), b.bitcast(largest_m, F32))


@conversion("u32 -> f32", f"{{ .reg .f32 x; mov.b32 x, %1; div.rn.f32 %0, {_ptx(V_LARGEST * BELOW)}, x; }}")
def v_inverse(b, rn, largest_root):
    return b.fdiv(_f32(V_LARGEST * BELOW), b.bitcast(largest_root, F32))


# A mask is all ones, or all zeros where m (or v) of the group becomes 0.
_MASKS = (
    "{ .reg .pred p; .reg .b32 mm, vm, bad; max.u32 bad, %1, %2;"
    f" setp.ge.u32 p, bad, {INFINITY:#x}; selp.b32 bad, 0xFFFFFFFF, 0, p;"
    f" setp.ge.u32 p, %2, {V_SMALLEST:#x}; selp.b32 vm, 0xFFFFFFFF, 0, p; not.b32 mm, bad; and.b32 vm, vm, mm;"
    f" setp.ge.u32 p, %1, {M_SMALLEST:#x}; selp.b32 mm, vm, 0, p;"
)
_SCALE = "setp.ne.u32 p, bad, 0; selp.b32 mm, 0x7FC00000, mm, p; mov.b32 %0, mm; }"


@conversion("u32, u32 -> u32", _MASKS, "mov.b32 %0, mm; }")
def m_mask(b, rn, largest_m, largest_root):
    kept = b.icmp_unsigned(">=", largest_m, U32(M_SMALLEST))
    return b.and_(b.sext(kept, U32), v_mask(b, rn, largest_m, largest_root))


@conversion("u32, u32 -> u32", _MASKS, "mov.b32 %0, vm; }")
def v_mask(b, rn, largest_m, largest_root):
    kept = b.icmp_unsigned(">=", largest_root, U32(V_SMALLEST))
    return b.sext(b.and_(kept, b.not_(_is_bad(b, largest_m, largest_root))), U32)


@conversion("u32, u32 -> f32", _MASKS, "and.b32 mm, mm, %1;", _SCALE)
def m_scale(b, rn, largest_m, largest_root):
    kept = b.and_(largest_m, m_mask(b, rn, largest_m, largest_root))
    return b.bitcast(b.select(_is_bad(b, largest_m, largest_root), U32(0x7FC00000), kept), F32)


@conversion("u32, u32 -> f32", _MASKS, "and.b32 mm, vm, %2;", _SCALE)
def v_scale(b, rn, largest_m, largest_root):
    kept = b.and_(largest_root, v_mask(b, rn, largest_m, largest_root))
    return b.bitcast(b.select(_is_bad(b, largest_m, largest_root), U32(0x7FC00000), kept), F32)


def _is_bad(b, *largest):
    """Whether a group has a NaN or an infinity."""
    return b.or_(*(b.icmp_unsigned(">=", bits, U32(INFINITY)) for bits in largest))


@conversion(
    "f32, f32, u32, u32 -> u32",
    f"{{ .reg .f32 z; .reg .b32 x, t; abs.f32 z, %1; fma.rn.f32 z, z, %2, {_ptx(BIAS)}; mov.b32 x, z; shr.u32 t, %4, 13;",
    "add.u32 x, x, t; shr.u32 x, x, 19; and.b32 x, x, 0x7F; mov.b32 t, %1; shr.u32 t, t, 24; and.b32 t, t, 0x80;",
    "or.b32 x, x, t; and.b32 %0, x, %3; }",
)
def to_m_code(b, rn, m, inverse, mask, h):
    z = b.bitcast(b.fma(abs_(b, rn, m), inverse, F32(BIAS)), U32)
    code = b.and_(b.lshr(b.add(z, b.lshr(h, U32(13))), U32(19)), U32(0x7F))
    sign = b.and_(b.lshr(b.bitcast(m, U32), U32(24)), U32(0x80))
    return b.and_(b.or_(code, sign), mask)


@conversion(
    "f32, f32, u32, u32 -> u32",
    f"{{ .reg .f32 z; .reg .b32 x, t; fma.rn.f32 z, %1, %2, {_ptx(BIAS)}; mov.b32 x, z; and.b32 t, %4, 0x3FFFF;",
    "add.u32 x, x, t; and.b32 x, x, 0x3FFFFFF; mov.b32 t, %1; min.u32 t, t, 0x40000; max.u32 x, x, t;",
    "shr.u32 x, x, 18; and.b32 %0, x, %3; }",
)
def to_v_code(b, rn, root, inverse, mask, h):
    z = b.bitcast(b.fma(root, inverse, F32(BIAS)), U32)
    code = b.and_(b.add(z, b.and_(h, U32(0x3FFFF))), U32(0x03FFFFFF))
    bits, one = b.bitcast(root, U32), U32(1 << V_CUT)
    least = b.select(b.icmp_unsigned("<", bits, one), bits, one)  # where v > 0 there is no code 0
    code = b.select(b.icmp_unsigned(">", code, least), code, least)
    return b.and_(b.lshr(code, U32(V_CUT)), mask)


# 32 random bits, a function of a 64-bit index and a 64-bit key alone: the lower half of the index through the finaliser of
# MurmurHash3 (Austin Appleby, public domain), in which each bit of the input changes every bit of the output in half of all
# cases. The words of the key, which the upper half of the index moves on, go in before it and in its middle.
@conversion(
    "u32, u32, u32, u32 -> u32",
    "{ .reg .b32 x, t, k0, k1; .reg .b64 k, h; mov.b64 k, {%3, %4}; mul.wide.u32 h, %2, 0x7F4A7C15; add.u64 k, k, h;",
    "mov.b64 {k0, k1}, k; mul.lo.u32 t, %2, 0x9E3779B9; add.u32 k1, k1, t; xor.b32 x, %1, k0; shr.u32 t, x, 16;",
    "xor.b32 x, x, t; mul.lo.u32 x, x, 0x85EBCA6B; xor.b32 x, x, k1; shr.u32 t, x, 13; xor.b32 x, x, t;",
    "mul.lo.u32 x, x, 0xC2B2AE35; shr.u32 t, x, 16; xor.b32 %0, x, t; }",
)
def random(b, rn, low, high, key0, key1):
    return random_bits_of(b, *random_words(b, low, high, key0, key1))


def random_words(b, low, high, key0, key1):
    """Return the two words, x and a key, of which `random_bits_of` makes random bits.

    Neighbours share them: where the last 5 bits of `low` are 0, the words of low + j are x ^ j and the key, for j < 32.
    """
    key = b.or_(b.zext(key0, U64), b.shl(b.zext(key1, U64), U64(32)))
    key = b.add(key, b.mul(b.zext(high, U64), U64(0x9E3779B97F4A7C15)))
    x = b.xor(low, b.trunc(key, U32))
    return b.xor(x, b.lshr(x, U32(16))), b.trunc(b.lshr(key, U64(32)), U32)


def random_bits_of(b, x, key):
    """Return 32 random bits."""
    x = b.xor(b.mul(x, U32(0x85EBCA6B)), key)
    x = b.xor(x, b.lshr(x, U32(13)))
    x = b.mul(x, U32(0xC2B2AE35))
    return b.xor(x, b.lshr(x, U32(16)))
