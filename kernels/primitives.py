"""The operations a rule may use: one row each, as LLVM for Numba and as PTX for CuPy's CUDA C.

A row is one IEEE-754 operation, rounded to nearest even, with subnormals kept. Nothing else may touch a float in a rule:

- CuPy appends `-ftz=true` to every compile, and the optimiser may then turn a C operator, a flipped sign bit or a
  ternary of two floats into an instruction that flushes subnormals (it does so on some architectures and not on others).
  Inline PTX is left as written.
- Numba's CUDA target contracts `a * b + c`. The `llvm.nvvm.*.rn` forms are never contracted, nor are the `.rn`
  instructions that they become.
- `error_model` and NaN handling differ between Numba's operators on the CPU and CUDA. LLVM instructions do not.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

# The smallest normal number, and zero, as the bits that PTX takes.
PTX_TYPES = {
    np.dtype("float32"): {"t": "f32", "u": "u32", "b": "b32", "r": "f", "tiny": "0f00800000", "zero": "0f00000000"},
    np.dtype("float64"): {
        "t": "f64",
        "u": "u64",
        "b": "b64",
        "r": "d",
        "tiny": "0d0010000000000000",
        "zero": "0d0000000000000000",
    },
}


# Each emitter takes an llvmlite builder and operands of one float type and returns the result. `rn` names what differs on
# the CUDA target: there add, sub and mul are calls that no later pass may fuse.
def _fma(b, rn, x, y, z):
    return b.fma(x, y, z)


def _add(b, rn, x, y):
    return rn("add", x, y) if rn else b.fadd(x, y)


def _sub(b, rn, x, y):
    return rn("add", x, _neg(b, rn, y)) if rn else b.fsub(x, y)


def _mul(b, rn, x, y):
    return rn("mul", x, y) if rn else b.fmul(x, y)


def _div(b, rn, x, y):
    return b.fdiv(x, y)


def _sqrt(b, rn, x):
    return b.call(b.module.declare_intrinsic("llvm.sqrt", [x.type]), [x])


def _neg(b, rn, x):
    return b.fsub(x.type(-0.0), x)  # the same bits; NVVM's older dialect of LLVM has no fneg


def _abs(b, rn, x):
    bits = _int_type(x)  # NVVM has no llvm.fabs
    return b.bitcast(b.and_(b.bitcast(x, bits), bits((1 << (bits.width - 1)) - 1)), x.type)


def _larger(b, rn, x, y):
    number, bits = x.type, _int_type(x)
    x, y = b.bitcast(_add(b, rn, x, number(0.0)), bits), b.bitcast(y, bits)
    return b.bitcast(b.select(b.icmp_unsigned(">", x, y), x, y), number)


def _zero_below(b, rn, x, y):
    return b.select(b.fcmp_ordered("<", y, y.type(_tiny(y))), x.type(0.0), x)


PRIMITIVES = {
    # name: (LLVM for Numba, PTX for CUDA C: %0 is the result, %1 ... the operands)
    "fma": (_fma, "fma.rn.{t} %0, %1, %2, %3;"),  # x * y + z, rounded once
    "add": (_add, "add.rn.{t} %0, %1, %2;"),
    "sub": (_sub, "sub.rn.{t} %0, %1, %2;"),
    "mul": (_mul, "mul.rn.{t} %0, %1, %2;"),
    "div": (_div, "div.rn.{t} %0, %1, %2;"),
    "sqrt": (_sqrt, "sqrt.rn.{t} %0, %1;"),
    "neg": (_neg, "neg.{t} %0, %1;"),
    "abs": (_abs, "abs.{t} %0, %1;"),
    # The larger of two numbers that are not negative; a NaN wins. As unsigned integers such floats are in the same order
    # and every NaN is above infinity. The sum with +0 clears the sign of a -0, which would win as well. `max.NaN` would be
    # one instruction for both, but sm_75 has none.
    "larger": (
        _larger,
        "{{ .reg .{t} z; .reg .{b} x, y; add.rn.{t} z, %1, {zero}; mov.{b} x, z; mov.{b} y, %2;"
        " max.{u} x, x, y; mov.{b} %0, x; }}",
    ),
    # +0 where y is below the smallest normal number, else x. False for NaN, so a NaN stays.
    "zero_below": (_zero_below, "{{ .reg .pred p; setp.lt.{t} p, %2, {tiny}; selp.{t} %0, {zero}, %1, p; }}"),
}


# Conversions between how a number is stored and a float, as exact operations on bits. Raw bits are a u32, its upper half zero
# for those of 16 bits. Rounding is to nearest even unless a name says "randomly": then h, 32 random bits, is added below the
# last bit that is kept, and the rest is cut off, which is right on average (stochastic rounding). A NaN becomes a quiet NaN.
#
# LLVM's own half and bfloat are not used: on CPUs without instructions for them they are calls to what is not there.
def _from_bfloat16(b, rn, u):
    return b.bitcast(b.shl(u, u.type(16)), _float())


def _to_bfloat16(b, rn, x):
    u = b.bitcast(x, _u32())
    odd = b.and_(b.lshr(u, u.type(16)), u.type(1))
    rounded = b.lshr(b.add(b.add(u, u.type(0x7FFF)), odd), u.type(16))
    return b.select(_is_nan(b, u), u.type(0x7FC0), rounded)


def _to_bfloat16_randomly(b, rn, x, h):
    u = b.bitcast(x, _u32())
    rounded = b.lshr(b.add(u, b.and_(h, u.type(0xFFFF))), u.type(16))
    return b.select(_is_nan(b, u), u.type(0x7FC0), rounded)


def _from_float16(b, rn, u):
    if rn:  # the CUDA target
        return _assembly(b, "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }", "=f,r", _float(), u)
    magnitude, sign = b.and_(u, u.type(0x7FFF)), b.shl(b.and_(u, u.type(0x8000)), u.type(16))
    shifted = b.shl(magnitude, u.type(13))
    normal = b.add(shifted, u.type((127 - 15) << 23))
    special = b.or_(shifted, u.type(0xFF << 23))  # infinity and NaN
    tiny = b.bitcast(b.fmul(b.sitofp(magnitude, _float()), _float()(2.0**-24)), _u32())  # exact; signed, which AVX2 has
    large = b.select(b.icmp_unsigned(">=", magnitude, u.type(0x7C00)), special, normal)
    bits = b.select(b.icmp_unsigned("<", magnitude, u.type(0x0400)), tiny, large)
    return b.bitcast(b.or_(bits, sign), _float())


def _to_float16(b, rn, x):
    if rn:
        return _assembly(b, "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.u32.u16 $0, h; }", "=r,f", _u32(), x)
    u = b.bitcast(x, _u32())
    magnitude, sign = _sign_apart(b, u)
    odd = b.and_(b.lshr(magnitude, u.type(13)), u.type(1))
    rebiased = b.add(magnitude, u.type((0xFFF - ((127 - 15) << 23)) % 2**32))
    normal = b.lshr(b.add(rebiased, odd), u.type(13))
    # a sum whose last bit is the last of the subnormal numbers of float16
    half = _float()(0.5)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, _float()), half), _u32()), u.type(0x3F000000))
    return _finish_float16(b, u, magnitude, sign, b.select(_is_tiny_for_float16(b, magnitude), tiny, normal))


def _to_float16_randomly(b, rn, x, h):
    u = b.bitcast(x, _u32())
    magnitude, sign = _sign_apart(b, u)
    # 13 bits are cut off a normal number of float16, and more off a subnormal one, whose leading 1 has to be written out
    below = b.sub(u.type(113), b.lshr(magnitude, u.type(23)))
    tiny = _is_tiny_for_float16(b, magnitude)
    cut = b.add(b.select(tiny, below, u.type(0)), u.type(13))
    vanishes = b.icmp_unsigned(">", cut, u.type(31))  # below 2**-32, a 256th of the smallest: 0
    cut = b.select(vanishes, u.type(31), cut)
    written_out = b.or_(b.and_(magnitude, u.type(0x7FFFFF)), u.type(0x800000))
    kept = b.select(tiny, written_out, b.sub(magnitude, u.type((127 - 15) << 23)))
    noise = b.and_(h, b.sub(b.shl(u.type(1), cut), u.type(1)))
    rounded = b.lshr(b.add(kept, noise), cut)
    return _finish_float16(b, u, magnitude, sign, b.select(vanishes, u.type(0), rounded))


def _finish_float16(b, u, magnitude, sign, finite):
    infinite = b.select(_is_nan(b, u), u.type(0x7E00), u.type(0x7C00))
    return b.or_(b.select(b.icmp_unsigned(">=", magnitude, u.type(0x47800000)), infinite, finite), sign)


def _is_tiny_for_float16(b, magnitude):
    return b.icmp_unsigned("<", magnitude, magnitude.type(113 << 23))


def _sign_apart(b, u):
    return b.and_(u, u.type(0x7FFFFFFF)), b.and_(b.lshr(u, u.type(16)), u.type(0x8000))


# A float32 in two parts of 16 bits: the nearest bfloat16, ties away from zero, and what is left, a signed number. To nearest
# even, what is left would not fit.
def _from_parts(b, rn, high, low):
    signed = b.ashr(b.shl(low, low.type(16)), low.type(16))
    return b.bitcast(b.add(b.shl(high, high.type(16)), signed), _float())


def _high_part(b, rn, x):
    u = _one_nan(b, x)
    return b.lshr(b.add(u, u.type(0x8000)), u.type(16))


def _low_part(b, rn, x):
    u = _one_nan(b, x)
    return b.and_(u, u.type(0xFFFF))


def _one_nan(b, x):
    u = b.bitcast(x, _u32())
    return b.select(_is_nan(b, u), u.type(0x7FC00000), u)


# 8-bit state, in groups of 32 neighbours that share two float32 scales, the largest |m| and the largest sqrt(v) among them. A
# code is the exponent and the first bits of a float between 2**-7 and 2, less 2**-7: linear within each power of two, and as many
# codes to each. m has a sign, 3 bits of exponent and 4 more, the root of v 3 and 5. Both are rounded randomly: to nearest, a code
# of v would stay where it is, because a step changes v by less than half a code.
#
# A unit is what one is worth of a group, its scale over the largest code. The inverse is a millionth too small so that no product
# passes that code. A group with a NaN or an infinity becomes NaN; one whose roots are all below 2**-50 becomes 0, so that nothing
# decoded is ever subnormal, and m becomes 0 where all are below 2**-114. v is never 0 where m is not.
_BIAS, _BIAS_BITS = 2.0**-7, 120 << 23
_M_LARGEST, _V_LARGEST = 1.9296875, 1.9609375
_BELOW = 1 - 2.0**-20
_INFINITY, _M_SMALLEST, _V_SMALLEST = 0x7F800000, 13 << 23, 77 << 23


def _m_unit(b, rn, scale):
    return _mul(b, rn, scale, _float()(_to_float32(1 / _M_LARGEST)))


def _v_unit(b, rn, scale):
    return _mul(b, rn, scale, _float()(_to_float32(1 / _V_LARGEST)))


def _from_m_code(b, rn, code, unit):
    magnitude = _from_code(b, rn, b.shl(b.and_(code, code.type(0x7F)), code.type(19)), unit)
    sign = b.shl(b.and_(code, code.type(0x80)), code.type(24))
    return b.bitcast(b.or_(b.bitcast(magnitude, _u32()), sign), _float())


def _from_v_code(b, rn, code, unit):
    root = _from_code(b, rn, b.shl(code, code.type(18)), unit)
    return _mul(b, rn, root, root)


def _from_code(b, rn, shifted, unit):
    z = b.bitcast(b.or_(shifted, shifted.type(_BIAS_BITS)), _float())
    return b.fma(z, unit, _neg(b, rn, _mul(b, rn, unit, _float()(_BIAS))))  # as if z - BIAS, which is exact, came first


def _magnitude(b, rn, x):
    u = b.bitcast(x, _u32())
    return b.and_(u, u.type(0x7FFFFFFF))


def _m_inverse(b, rn, largest_m):
    return b.fdiv(_float()(_to_float32(_M_LARGEST * _BELOW)), b.bitcast(largest_m, _float()))


def _v_inverse(b, rn, largest_root):
    return b.fdiv(_float()(_to_float32(_V_LARGEST * _BELOW)), b.bitcast(largest_root, _float()))


def _m_mask(b, rn, largest_m, largest_root):
    kept = b.icmp_unsigned(">=", largest_m, largest_m.type(_M_SMALLEST))
    return b.and_(b.sext(kept, largest_m.type), _v_mask(b, rn, largest_m, largest_root))


def _v_mask(b, rn, largest_m, largest_root):
    kept = b.icmp_unsigned(">=", largest_root, largest_root.type(_V_SMALLEST))
    return b.sext(b.and_(kept, b.not_(_is_bad(b, largest_m, largest_root))), largest_m.type)


def _m_scale(b, rn, largest_m, largest_root):
    return _scale(b, largest_m, largest_root, b.and_(largest_m, _m_mask(b, rn, largest_m, largest_root)))


def _v_scale(b, rn, largest_m, largest_root):
    return _scale(b, largest_m, largest_root, b.and_(largest_root, _v_mask(b, rn, largest_m, largest_root)))


def _scale(b, largest_m, largest_root, good):
    return b.bitcast(b.select(_is_bad(b, largest_m, largest_root), good.type(0x7FC00000), good), _float())


def _is_bad(b, largest_m, largest_root):
    infinity = largest_m.type(_INFINITY)
    return b.or_(b.icmp_unsigned(">=", largest_m, infinity), b.icmp_unsigned(">=", largest_root, infinity))


def _to_m_code(b, rn, m, inverse, mask, h):
    z = b.bitcast(b.fma(_abs(b, rn, m), inverse, _float()(_BIAS)), _u32())
    code = b.and_(b.lshr(b.add(z, b.lshr(h, h.type(13))), h.type(19)), h.type(0x7F))
    sign = b.and_(b.lshr(b.bitcast(m, _u32()), h.type(24)), h.type(0x80))
    return b.and_(b.or_(code, sign), mask)


def _to_v_code(b, rn, v, root, inverse, mask, h):
    z = b.bitcast(b.fma(root, inverse, _float()(_BIAS)), _u32())
    code = b.and_(b.lshr(b.add(z, b.and_(h, h.type(0x3FFFF))), h.type(18)), h.type(0xFF))
    v = b.bitcast(v, _u32())
    least = b.select(b.icmp_unsigned("!=", v, v.type(0)), v.type(1), v.type(0))  # v > 0 has no code 0
    code = b.select(b.icmp_unsigned(">", code, least), code, least)
    return b.and_(code, mask)


def _to_float32(x):
    return float(np.float32(x))


def _widened(b, rn, x):
    return b.fpext(x, _double())


def _narrowed(b, rn, x):
    return b.fptrunc(x, _float())


# 32 random bits, a function of a 64-bit index and a 64-bit key alone: the lower half of the index through the finaliser of
# MurmurHash3 (Austin Appleby, public domain), which changes every bit that comes out in half of all cases if one that goes in
# changes. The words of the key, which the upper half of the index moves on, go in before it and in its middle.
def _random(b, rn, low, high, key0, key1):
    u64 = _u64()
    key = b.or_(b.zext(key0, u64), b.shl(b.zext(key1, u64), u64(32)))
    key = b.add(key, b.mul(b.zext(high, u64), u64(0x9E3779B97F4A7C15)))
    x = b.xor(low, b.trunc(key, low.type))
    x = b.xor(x, b.lshr(x, x.type(16)))
    x = b.xor(b.mul(x, x.type(0x85EBCA6B)), b.trunc(b.lshr(key, u64(32)), low.type))
    x = b.xor(x, b.lshr(x, x.type(13)))
    x = b.mul(x, x.type(0xC2B2AE35))
    return b.xor(x, b.lshr(x, x.type(16)))


_ROUND_NAN = " setp.nan.f32 p, %1, %1; selp.b32 %0, 0x7FC0, x, p; }"
_PART = "{ .reg .pred p; .reg .b32 x; mov.b32 x, %1; setp.nan.f32 p, %1, %1; selp.b32 x, 0x7FC00000, x, p;"


def _ptx(x):
    """Return a float32 as PTX writes it."""
    return f"0f{np.float32(x).view('u4'):08X}"


_FROM_CODE = (
    f" or.b32 x, x, {_BIAS_BITS:#x}; mov.b32 z, x; mul.rn.f32 o, %2, {_ptx(_BIAS)}; neg.f32 o, o; fma.rn.f32 z, z, %2, o;"
)
_MASKS = (
    "{ .reg .pred p; .reg .b32 mm, vm, bad; max.u32 bad, %1, %2;"
    f" setp.ge.u32 p, bad, {_INFINITY:#x}; selp.b32 bad, 0xFFFFFFFF, 0, p;"
    f" setp.ge.u32 p, %2, {_V_SMALLEST:#x}; selp.b32 vm, 0xFFFFFFFF, 0, p; not.b32 mm, bad; and.b32 vm, vm, mm;"
    f" setp.ge.u32 p, %1, {_M_SMALLEST:#x}; selp.b32 mm, vm, 0, p;"
)
_SCALE = " setp.ne.u32 p, bad, 0; selp.b32 mm, 0x7FC00000, mm, p; mov.b32 %0, mm; }"

CONVERSIONS: dict[str, tuple[str, tuple[str, ...], Callable, str]] = {
    # name: (result, operands, LLVM for Numba, PTX for CUDA C)
    "from_bfloat16": ("f32", ("u32",), _from_bfloat16, "{ .reg .b32 x; shl.b32 x, %1, 16; mov.b32 %0, x; }"),
    "to_bfloat16": (
        "u32",
        ("f32",),
        _to_bfloat16,
        "{ .reg .pred p; .reg .b32 x, t; mov.b32 x, %1; shr.u32 t, x, 16; and.b32 t, t, 1; add.u32 x, x, 0x7FFF;"
        " add.u32 x, x, t; shr.u32 x, x, 16;" + _ROUND_NAN,
    ),
    "to_bfloat16_randomly": (
        "u32",
        ("f32", "u32"),
        _to_bfloat16_randomly,
        "{ .reg .pred p; .reg .b32 x, t; mov.b32 x, %1; and.b32 t, %2, 0xFFFF; add.u32 x, x, t; shr.u32 x, x, 16;"
        + _ROUND_NAN,
    ),
    "from_float16": ("f32", ("u32",), _from_float16, "{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }"),
    "to_float16": ("u32", ("f32",), _to_float16, "{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h; }"),
    "to_float16_randomly": (
        "u32",
        ("f32", "u32"),
        _to_float16_randomly,
        "{ .reg .pred tiny, gone, large, nan; .reg .b32 x, s, cut, kept, t; mov.b32 x, %1; shr.u32 s, x, 16;"
        " and.b32 s, s, 0x8000; and.b32 x, x, 0x7FFFFFFF; setp.lt.u32 tiny, x, 0x38800000; shr.u32 t, x, 23;"
        " sub.u32 t, 113, t; selp.b32 t, t, 0, tiny; add.u32 cut, t, 13; setp.gt.u32 gone, cut, 31; min.u32 cut, cut, 31;"
        " and.b32 t, x, 0x7FFFFF; or.b32 t, t, 0x800000; sub.u32 kept, x, 0x38000000; selp.b32 kept, t, kept, tiny;"
        " shl.b32 t, 1, cut; sub.u32 t, t, 1; and.b32 t, t, %2; add.u32 kept, kept, t; shr.u32 kept, kept, cut;"
        " selp.b32 kept, 0, kept, gone; setp.ge.u32 large, x, 0x47800000; setp.gt.u32 nan, x, 0x7F800000;"
        " selp.b32 kept, 0x7C00, kept, large; selp.b32 kept, 0x7E00, kept, nan; or.b32 %0, kept, s; }",
    ),
    "from_parts": (
        "f32",
        ("u32", "u32"),
        _from_parts,
        "{ .reg .b32 x, t; shl.b32 x, %1, 16; shl.b32 t, %2, 16; shr.s32 t, t, 16; add.u32 x, x, t; mov.b32 %0, x; }",
    ),
    "high_part": ("u32", ("f32",), _high_part, _PART + " add.u32 x, x, 0x8000; shr.u32 %0, x, 16; }"),
    "low_part": ("u32", ("f32",), _low_part, _PART + " and.b32 %0, x, 0xFFFF; }"),
    "m_unit": ("f32", ("f32",), _m_unit, f"mul.rn.f32 %0, %1, {_ptx(1 / _M_LARGEST)};"),
    "v_unit": ("f32", ("f32",), _v_unit, f"mul.rn.f32 %0, %1, {_ptx(1 / _V_LARGEST)};"),
    "from_m_code": (
        "f32",
        ("u32", "f32"),
        _from_m_code,
        "{ .reg .b32 x, s; .reg .f32 z, o; and.b32 x, %1, 0x7F; shl.b32 x, x, 19;" + _FROM_CODE + " and.b32 s, %1, 0x80;"
        " shl.b32 s, s, 24; mov.b32 x, z; or.b32 x, x, s; mov.b32 %0, x; }",
    ),
    "from_v_code": (
        "f32",
        ("u32", "f32"),
        _from_v_code,
        "{ .reg .b32 x; .reg .f32 z, o; shl.b32 x, %1, 18;" + _FROM_CODE + " mul.rn.f32 %0, z, z; }",
    ),
    "magnitude": ("u32", ("f32",), _magnitude, "{ .reg .b32 x; mov.b32 x, %1; and.b32 %0, x, 0x7FFFFFFF; }"),
    "m_inverse": (
        "f32",
        ("u32",),
        _m_inverse,
        "{ .reg .f32 x; mov.b32 x, %1; div.rn.f32 %0, " + _ptx(_M_LARGEST * _BELOW) + ", x; }",
    ),
    "v_inverse": (
        "f32",
        ("u32",),
        _v_inverse,
        "{ .reg .f32 x; mov.b32 x, %1; div.rn.f32 %0, " + _ptx(_V_LARGEST * _BELOW) + ", x; }",
    ),
    "m_mask": ("u32", ("u32", "u32"), _m_mask, _MASKS + " mov.b32 %0, mm; }"),
    "v_mask": ("u32", ("u32", "u32"), _v_mask, _MASKS + " mov.b32 %0, vm; }"),
    "m_scale": ("f32", ("u32", "u32"), _m_scale, _MASKS + " and.b32 mm, mm, %1;" + _SCALE),
    "v_scale": ("f32", ("u32", "u32"), _v_scale, _MASKS + " and.b32 mm, vm, %2;" + _SCALE),
    "to_m_code": (
        "u32",
        ("f32", "f32", "u32", "u32"),
        _to_m_code,
        "{ .reg .f32 z; .reg .b32 x, t; abs.f32 z, %1; fma.rn.f32 z, z, %2, "
        + _ptx(_BIAS)
        + "; mov.b32 x, z; shr.u32 t, %4, 13;"
        " add.u32 x, x, t; shr.u32 x, x, 19; and.b32 x, x, 0x7F; mov.b32 t, %1; shr.u32 t, t, 24; and.b32 t, t, 0x80;"
        " or.b32 x, x, t; and.b32 %0, x, %3; }",
    ),
    "to_v_code": (
        "u32",
        ("f32", "f32", "f32", "u32", "u32"),
        _to_v_code,
        "{ .reg .f32 z; .reg .b32 x, t; fma.rn.f32 z, %2, %3, " + _ptx(_BIAS) + "; mov.b32 x, z; and.b32 t, %5, 0x3FFFF;"
        " add.u32 x, x, t; shr.u32 x, x, 18; and.b32 x, x, 0xFF; mov.b32 t, %1; min.u32 t, t, 1; max.u32 x, x, t;"
        " and.b32 %0, x, %4; }",
    ),
    "widened": ("f64", ("f32",), _widened, "cvt.f64.f32 %0, %1;"),
    "narrowed": ("f32", ("f64",), _narrowed, "cvt.rn.f32.f64 %0, %1;"),
    "random": (
        "u32",
        ("u32", "u32", "u32", "u32"),
        _random,
        "{ .reg .b32 x, t, k0, k1; .reg .b64 k, h; mov.b64 k, {%3, %4}; mul.wide.u32 h, %2, 0x7F4A7C15; add.u64 k, k, h;"
        " mov.b64 {k0, k1}, k; mul.lo.u32 t, %2, 0x9E3779B9; add.u32 k1, k1, t; xor.b32 x, %1, k0; shr.u32 t, x, 16;"
        " xor.b32 x, x, t; mul.lo.u32 x, x, 0x85EBCA6B; xor.b32 x, x, k1; shr.u32 t, x, 13; xor.b32 x, x, t;"
        " mul.lo.u32 x, x, 0xC2B2AE35; shr.u32 t, x, 16; xor.b32 %0, x, t; }",
    ),
}


def _assembly(b, text, constraints, result, *operands):
    from llvmlite import ir

    kind = ir.FunctionType(result, [x.type for x in operands])
    return b.call(ir.InlineAsm(kind, text, constraints), operands)


def _is_nan(b, u):
    x = b.bitcast(u, _float())
    return b.fcmp_unordered("uno", x, x)


def _float():
    from llvmlite import ir

    return ir.FloatType()


def _double():
    from llvmlite import ir

    return ir.DoubleType()


def _u32():
    from llvmlite import ir

    return ir.IntType(32)


def _u64():
    from llvmlite import ir

    return ir.IntType(64)


def for_numba(intrinsic, contracts=False):
    """Return the primitives as functions that a rule in Python can call.

    intrinsic: `numba.extending.intrinsic`, or the one of Numba's CUDA target.
    contracts: whether the target fuses a bare product with a bare sum, so that it has to be told not to.
    """
    return SimpleNamespace(**{name: _numba(intrinsic, name, emit, contracts) for name, (emit, _) in PRIMITIVES.items()})


def _numba(intrinsic, name, emit, contracts):
    # Numba reads the number of operands off the signature, so there is one wrapper for each.
    def codegen(context, builder, signature, args):
        rn = nvvm_rn(builder) if contracts else None
        return emit(builder, rn, *args)

    def unary(typingctx, x):
        return x(x), codegen

    def binary(typingctx, x, y):
        return x(x, x), codegen

    def ternary(typingctx, x, y, z):
        return x(x, x, x), codegen

    function = {1: unary, 2: binary, 3: ternary}[emit.__code__.co_argcount - 2]
    function.__name__ = function.__qualname__ = name
    return intrinsic(function)


def nvvm_rn(builder):
    from llvmlite import ir

    def call(operation, x, y):
        name = f"llvm.nvvm.{operation}.rn.{'f' if isinstance(x.type, ir.FloatType) else 'd'}"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(x.type, [x.type, x.type]), name)
        return builder.call(function, [x, y])

    return call


def _int_type(x):
    from llvmlite import ir

    return ir.IntType(32 if isinstance(x.type, ir.FloatType) else 64)


def _tiny(x):
    return float(np.finfo("float32" if _int_type(x).width == 32 else "float64").smallest_normal)


def for_cuda_c(dtype):
    """Return the primitives as CUDA C: inline functions over `T`, which is float or double."""
    types = PTX_TYPES[np.dtype(dtype)]
    named = ((name, "xyz"[: emit.__code__.co_argcount - 2], ptx) for name, (emit, ptx) in PRIMITIVES.items())
    return "".join(_c(name, "T", types["r"], [("T", types["r"])] * len(xs), ptx.format(**types)) for name, xs, ptx in named)


C_TYPES = {"f32": ("float", "f"), "f64": ("double", "d"), "u32": ("unsigned", "r")}


def conversions_for_cuda_c():
    """Return the conversions as CUDA C: inline functions."""
    return "".join(
        _c(name, *C_TYPES[result], [C_TYPES[x] for x in operands], ptx)
        for name, (result, operands, _, ptx) in CONVERSIONS.items()
    )


def _c(name, result, r, operands, ptx):
    declared = ", ".join(f"{kind} x{k}" for k, (kind, _) in enumerate(operands))
    bound = ", ".join(f'"{letter}"(x{k})' for k, (_, letter) in enumerate(operands))
    body = f'{result} r; asm("{ptx}" : "={r}"(r) : {bound}); return r;'
    return f"__device__ __forceinline__ {result} {name}_({declared}) {{ {body} }}\n"
