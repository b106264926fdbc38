"""The runner of PTX itself: each instruction against NumPy or Python's integers, and what it must not let pass."""

import functools
import math
import operator

import libraries
import numpy as np
import pytest
from ptx import Incomplete, Kernel, Refused

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


# Integers


def kinds_of(letters="su", widths=(16, 32, 64)):
    return [f"{letter}{n}" for letter in letters for n in widths]


def numpy_kind(kind):
    return {"s": "i", "u": "u", "b": "u"}[kind[0]] + str(int(kind[1:]) // 8)


def bits_of(value, n):
    """Return a Python integer as the NumPy one of its low n bits."""
    return np.dtype(f"u{n // 8}").type(value & ((1 << n) - 1))


TWO_OPERANDS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


@pytest.mark.parametrize("kind", kinds_of())
@pytest.mark.parametrize("operation", TWO_OPERANDS)
def test_integers_are_combined_as_pythons_are(operation, kind):
    n, dtype = int(kind[1:]), numpy_kind(kind)
    x, y = words(dtype, seed=1), words(dtype, seed=2)
    name = f"{operation}.b{n}" if operation in ("and", "or", "xor") else f"{operation}.{kind}"
    expected = [bits_of(TWO_OPERANDS[operation](int(a), int(b)), n) for a, b in zip(x, y, strict=True)]
    same(each(f"{name} out, x, y;", dtype, x, y), np.array(expected))


@pytest.mark.parametrize("kind", kinds_of())
def test_the_high_half_of_a_product(kind):
    n, dtype = int(kind[1:]), numpy_kind(kind)
    x, y = words(dtype, seed=1), words(dtype, seed=2)
    high = [(int(a) * int(b)) >> n for a, b in zip(x, y, strict=True)]
    same(each(f"mul.hi.{kind} out, x, y;", dtype, x, y), np.array([bits_of(h, n) for h in high]))
    same(
        each(f"mad.hi.{kind} out, x, y, x;", dtype, x, y),
        np.array([bits_of(h + int(a), n) for h, a in zip(high, x, strict=True)]),
    )


@pytest.mark.parametrize("kind", kinds_of(widths=(16, 32)))
def test_a_wide_product_has_twice_the_bits(kind):
    n, dtype = int(kind[1:]), numpy_kind(kind)
    x, y, z = words(dtype, seed=1), words(dtype, seed=2), words(f"u{n // 4}", seed=3)
    product = [int(a) * int(b) for a, b in zip(x, y, strict=True)]
    same(each(f"mul.wide.{kind} out, x, y;", z.dtype, x, y), np.array([bits_of(p, 2 * n) for p in product]))
    same(
        each(f"mad.wide.{kind} out, x, y, z;", z.dtype, x, y, z),
        np.array([bits_of(p + int(c), 2 * n) for p, c in zip(product, z, strict=True)]),
    )


ONE_OPERAND = {
    "not.b": lambda x, n: ~x,
    "neg.s": lambda x, n: -x,
    "abs.s": lambda x, n: -x if x >> (n - 1) else x,
    "popc.b": lambda x, n: x.bit_count(),
    "clz.b": lambda x, n: n - x.bit_length(),
    "brev.b": lambda x, n: int(f"{x:0{n}b}"[::-1], 2),
    "bfind.u": lambda x, n: x.bit_length() - 1,
    "bfind.s": lambda x, n: (~x % 2**n if x >> (n - 1) else x).bit_length() - 1,
    "bfind.shiftamt.u": lambda x, n: n - x.bit_length() if x else -1,
}


@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize("operation", ONE_OPERAND)
def test_functions_of_one_integer(operation, n):
    x = words(f"u{n // 8}")
    result = 32 if operation.startswith(("popc", "clz", "bfind")) else n
    expected = np.array([bits_of(ONE_OPERAND[operation](int(a), n), result) for a in x])
    same(each(f"{operation}{n} out, x;", f"u{result // 8}", x), expected)


@pytest.mark.parametrize("kind", kinds_of())
def test_a_quotient_is_truncated(kind):
    n, dtype = int(kind[1:]), numpy_kind(kind)
    x, y = words(dtype, seed=1), words(dtype, seed=2)
    y[y == 0] = 3
    pairs = [(int(a), int(b)) for a, b in zip(x, y, strict=True)]
    quotients = [abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1) for a, b in pairs]
    same(each(f"div.{kind} out, x, y;", dtype, x, y), np.array([bits_of(q, n) for q in quotients]))
    rest = [a - q * b for (a, b), q in zip(pairs, quotients, strict=True)]
    same(each(f"rem.{kind} out, x, y;", dtype, x, y), np.array([bits_of(r, n) for r in rest]))


def test_a_division_by_zero_is_an_error():
    with pytest.raises(ZeroDivisionError, match="2 integer divisions"):
        each("div.u32 out, x, y;", "u4", np.array([1, 2, 3, 4], "u4"), np.array([1, 0, 0, 2], "u4"))


@pytest.mark.parametrize("n", [16, 32, 64])
def test_a_shift_beyond_the_width_leaves_the_sign_or_nothing(n):
    x = words(f"i{n // 8}")
    amounts = np.resize(np.array([0, 1, n - 1, n, n + 1, 255, 65536, ALL], "u4"), x.size)
    pairs = [(int(a), min(int(k), n)) for a, k in zip(x, amounts, strict=True)]
    same(each(f"shl.b{n} out, x, y;", f"u{n // 8}", x, amounts), np.array([bits_of(a << k, n) for a, k in pairs]))
    same(each(f"shr.s{n} out, x, y;", f"u{n // 8}", x, amounts), np.array([bits_of(a >> k, n) for a, k in pairs]))
    unsigned = [bits_of((a & ((1 << n) - 1)) >> k, n) for a, k in pairs]
    same(each(f"shr.u{n} out, x, y;", f"u{n // 8}", x, amounts), np.array(unsigned))


def field_of(x, at, length, n, signed):
    """bfe, bit after bit as the PTX manual has it."""
    at, length = at & 0xFF, length & 0xFF
    fill = x >> min(at + length - 1, n - 1) & 1 if signed and length else 0
    bits = [(x >> (at + k) & 1 if at + k < n else fill) if k < length else fill for k in range(n)]
    return sum(bit << k for k, bit in enumerate(bits))


def inserted(x, into, at, length, n):
    """bfi, likewise."""
    at, length = at & 0xFF, length & 0xFF
    for k in range(min(length, n - at)):
        into = into & ~(1 << (at + k)) | (x >> k & 1) << (at + k)
    return into


EDGES = np.array([(a, b) for a in (0, 1, 7, 31, 32, 63, 64, 255, 256) for b in (0, 1, 8, 31, 32, 33, 63, 64, 255)], "u4")


@pytest.mark.parametrize("kind", kinds_of(widths=(32, 64)))
def test_a_bit_field_is_taken_out(kind):
    n = int(kind[1:])
    x, edges = words(f"u{n // 8}", 486), np.tile(EDGES, (6, 1))
    expected = [bits_of(field_of(int(v), int(a), int(b), n, kind[0] == "s"), n) for v, (a, b) in zip(x, edges, strict=True)]
    same(each(f"bfe.{kind} out, x, y, z;", x.dtype, x, edges[:, 0], edges[:, 1]), np.array(expected))


@pytest.mark.parametrize("n", [32, 64])
def test_a_bit_field_is_put_in(n):
    x, edges = words(f"u{n // 8}", 486), np.tile(EDGES, (6, 1))
    expected = [bits_of(inserted(int(v), 5, int(a), int(b), n), n) for v, (a, b) in zip(x, edges, strict=True)]
    same(each(f"bfi.b{n} out, x, 5, y, z;", x.dtype, x, edges[:, 0], edges[:, 1]), np.array(expected))


def test_prmt_picks_bytes_and_signs():
    x, y, selector = (words("u4", seed=k) for k in range(3))
    expected = []
    for a, b, s in zip(x, y, selector, strict=True):
        eight, result = int(a) | int(b) << 32, 0
        for k in range(4):
            nibble = int(s) >> 4 * k & 15
            byte = eight >> 8 * (nibble & 7) & 255
            result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * k
        expected.append(bits_of(result, 32))
    same(each("prmt.b32 out, x, y, z;", "u4", x, y, selector), np.array(expected))


@pytest.mark.parametrize("table", [0x00, 0x01, 0x40, 0x80, 0x96, 0xCA, 0xE8, 0xF0, 0xCC, 0xAA, 0xFE, 0xFF])
def test_lop3_looks_every_bit_up(table):
    x, y, z = (words("u4", seed=k) for k in range(3))
    # the manual's way of making a table: the function itself of 0xF0, 0xCC and 0xAA
    bits = lambda v: v[:, None] >> np.arange(32, dtype="u4") & np.uint32(1)  # noqa: E731
    index = 4 * bits(x) + 2 * bits(y) + bits(z)
    expected = ((table >> index & 1) << np.arange(32, dtype="u4")).sum(1, dtype="u4")
    same(each(f"lop3.b32 out, x, y, z, {table:#x};", "u4", x, y, z), expected)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", "lr")
def test_a_funnel_shift_of_two_words(direction, mode):
    x, y, amount = (words("u4", seed=k) for k in range(3))
    expected = []
    for low, high, k in zip(x, y, amount, strict=True):
        both, k = int(low) | int(high) << 32, int(k) % 32 if mode == "wrap" else min(int(k), 32)
        expected.append(bits_of(both << k >> 32 if direction == "l" else both >> k, 32))
    same(each(f"shf.{direction}.{mode}.b32 out, x, y, z;", "u4", x, y, amount), np.array(expected))


COMPARED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


@pytest.mark.parametrize("kind", kinds_of())
def test_integers_are_compared_by_their_type(kind):
    dtype = numpy_kind(kind)
    x, y = words(dtype, seed=1), words(dtype, seed=2)
    y[::4] = x[::4]
    lines = "".join(f"setp.{c}.{kind} %p0, x, y; @%p0 or.b32 out, out, {1 << k};" for k, c in enumerate(COMPARED))
    expected = sum(compare(x, y).astype("u4") << k for k, compare in enumerate(COMPARED.values()))
    same(each("mov.b32 out, 0;" + lines, "u4", x, y), expected)


@pytest.mark.parametrize("comparison, function", [("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")])
def test_lower_and_higher_compare_without_sign(comparison, function):
    x, y = words("u4", seed=1), words("u4", seed=2)
    out = each(f"setp.{comparison}.u32 %p0, x, y; selp.u32 out, 1, 0, %p0;", "u4", x, y)
    same(out, COMPARED[function](x, y).astype("u4"))


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
@pytest.mark.parametrize("sign", ["", "!"])
def test_a_comparison_is_combined_with_a_predicate(combine, sign):
    x, y = words("i4", seed=1), words("i4", seed=2)
    lines = f"setp.lt.s32 %p0, y, 0; setp.lt.{combine}.s32 %p1|%p2, x, y, {sign}%p0; "
    out = each(lines + "selp.u32 out, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; add.u32 out, out, %r2;", "u4", x, y)
    combined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
    other = (y < 0) != bool(sign)
    same(out, combined(x < y, other).astype("u4") + 2 * combined(x >= y, other).astype("u4"))


@pytest.mark.parametrize("operation", ["and", "or", "xor"])
def test_predicates_are_combined(operation):
    x, y = words("i4", seed=1), words("i4", seed=2)
    lines = f"setp.lt.s32 %p0, x, 0; setp.lt.s32 %p1, y, 0; not.pred %p1, %p1; {operation}.pred %p2, %p0, %p1;"
    out = each(f"{lines} selp.b32 out, 7, 9, %p2;", "u4", x, y)
    both = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[operation](x < 0, y >= 0)
    same(out, np.where(both, 7, 9).astype("u4"))


@pytest.mark.parametrize("to, true", [("u32", ALL), ("s32", ALL), ("f32", 0x3F800000)])
def test_set_gives_all_bits_or_one(to, true):
    x, y = words("i2", seed=1), words("i2", seed=2)
    same(each(f"set.lt.{to}.s16 out, x, y;", "u4", x, y), np.where(x < y, true, 0).astype("u4"))


@pytest.mark.parametrize("comparison", ["nan", "num"])
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_nan_is_seen_by_a_comparison(comparison, ftz):
    x = np.array([0, 1, np.nan, np.inf], "f4")
    out = each(f"setp.{comparison}{ftz}.f32 %p0, x, x; selp.u32 out, 1, 0, %p0;", "u4", x)
    same(out, (np.isnan(x) == (comparison == "nan")).astype("u4"))


# Conversions


@pytest.mark.parametrize("source", kinds_of(widths=(8, 16, 32, 64)))
def test_integers_are_extended_by_the_sign_of_the_source(source):
    x, kinds = words(numpy_kind(source)), kinds_of(widths=(8, 16, 32, 64))
    for to, out in zip(kinds, conversions("cvt", kinds, source, x), strict=True):
        same(out, x.astype(numpy_kind(to)), to)


def test_a_narrow_result_fills_its_register_by_its_sign():
    x = words("u4")
    same(each("cvt.s8.s32 out, x;", "u4", x), x.astype("i1").astype("i4").view("u4"))
    same(each("cvt.u8.u32 out, x;", "u4", x), x.astype("u1").astype("u4"))


@pytest.mark.parametrize("to", ["f32", "f64"])
@pytest.mark.parametrize("source", kinds_of(widths=(8, 16, 32, 64)))
def test_an_integer_becomes_the_nearest_float(source, to):
    x, dtype = words(numpy_kind(source)), {"f32": "f4", "f64": "f8"}[to]
    same(each(f"cvt.rn.{to}.{source} out, x;", dtype, x), x.astype(dtype))


def floats(dtype, n=1024):
    rng = np.random.default_rng(0)
    magnitudes = rng.normal(size=n - 32) * 2.0 ** rng.integers(-4, 70, n - 32)
    edges = [0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 128, 255.5, 256, -128.5, -129, 32767.5, 65535.5]
    edges += [2.0**31 - 128, 2.0**31, -(2.0**31), 2.0**32, 2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30]
    edges += [np.inf, -np.inf, np.nan, np.finfo(dtype).smallest_subnormal, -np.finfo(dtype).smallest_subnormal, -np.nan]
    return np.array([*edges, *magnitudes], dtype)


ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("mode", ROUNDED)
def test_a_float_becomes_an_integer_within_its_type(mode, source):
    x, kinds = floats({"f32": "f4", "f64": "f8"}[source]), kinds_of(widths=(8, 16, 32, 64))
    rounded = ROUNDED[mode](x).tolist()
    for to, out in zip(kinds, conversions(f"cvt.{mode}", kinds, source, x), strict=True):
        limits = np.iinfo(numpy_kind(to))
        # the manual's value for NaN
        nan = 1 << (limits.bits - 1) if source == "f64" or limits.bits == 64 else 0
        within = [nan if math.isnan(v) else min(max(v, limits.min), limits.max) for v in rounded]
        same(out, np.array([bits_of(int(v), limits.bits) for v in within]), to)


def test_ftz_makes_an_integer_of_zero_from_a_subnormal():
    x = np.array([1e-40, 1e-37], "f4")
    same(each("cvt.rpi.ftz.s32.f32 out, x;", "i4", x), np.array([0, 1], "i4"))
    same(each("cvt.rpi.s32.f32 out, x;", "i4", x), np.array([1, 1], "i4"))


@pytest.mark.parametrize("mode", ROUNDED)
@pytest.mark.parametrize("kind, dtype", [("f32", "f4"), ("f64", "f8")])
def test_a_float_is_rounded_to_an_integer(kind, dtype, mode):
    x = floats(dtype)
    same_or_nan(each(f"cvt.{mode}.{kind}.{kind} out, x;", dtype, x), ROUNDED[mode](x))


def test_all_halves_become_floats():
    x = np.arange(65536, dtype="u2").view("f2")
    same_or_nan(each("cvt.f32.f16 out, x;", "f4", x), x.astype("f4"))


def float32_bits_around(edges):
    """Return float32s: `edges`, their neighbours, and random bits."""
    bits = edges.astype("f4").view("u4")[:, None] + np.array([-2, -1, 0, 1, 2], "i4").astype("u4")
    return np.concatenate([bits.ravel(), np.random.default_rng(0).integers(0, 2**32, 65536, "u4")]).view("f4")


def test_floats_become_the_nearest_halves():
    halves = np.arange(0x7C00, dtype="u2").view("f2").astype("f8")
    ties = np.append((halves[1:] + halves[:-1]) / 2, 65520)
    x = float32_bits_around(np.concatenate([halves, ties, -halves, -ties, [np.inf, -np.inf, 1e-40, 2.0**-126]]))
    x = np.resize(x, -(-x.size // 256) * 256)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = x.astype("f2").view("u2")
    expected[np.isnan(x)] = 0x7FFF
    same(each("cvt.rn.f16.f32 out, x;", "u2", x), expected)


def test_all_bfloat16s_become_floats():
    x = np.arange(65536, dtype="u2")
    same(each("cvt.f32.bf16 out, x;", "u4", x), x.astype("u4") << 16)


def test_floats_become_the_nearest_bfloat16s():
    high = np.arange(65536, dtype="u4") << 16
    x = (high[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "u4")).ravel().view("f4")
    # by exact arithmetic: the nearer of the two that enclose it, the even one of two as near
    below = x.view("u4") >> 16
    with np.errstate(invalid="ignore", over="ignore"):
        pairs = [(b << 16).astype("u4").view("f4").astype("f8") for b in (below, below + 1)]
        pairs[1][np.isinf(pairs[1])] = np.copysign(2.0**128, pairs[1][np.isinf(pairs[1])])
        up = np.abs(x.astype("f8") - pairs[0]) - np.abs(pairs[1] - x.astype("f8"))
        expected = (below + ((up > 0) | ((up == 0) & (below % 2 == 1)))).astype("u2")
    expected[np.isinf(x)] = below[np.isinf(x)]
    expected[np.isnan(x)] = 0x7FFF
    same(each("cvt.rn.bf16.f32 out, x;", "u2", x), expected)


def test_floats_become_the_bfloat16s_of_ml_dtypes():
    bfloat16 = libraries.imported("ml_dtypes", reason="ml_dtypes, the reference here, is not installed").bfloat16
    x = float32_bits_around(np.arange(65536, dtype="u2").view(bfloat16).astype("f4"))
    out = each("cvt.rn.bf16.f32 out, x;", "u2", x)
    with np.errstate(invalid="ignore"):
        expected = x.astype(bfloat16).view("u2")
    same(out[~np.isnan(x)], expected[~np.isnan(x)])


@pytest.mark.parametrize("kind, dtype", [("f16", "f2"), ("bf16", "u2")])
def test_two_floats_are_packed_the_first_high(kind, dtype):
    x, y = (floats("f4")[::k].copy() for k in (1, -1))
    one = [each(f"cvt.rn.{kind}.f32 out, x;", "u2", v).astype("u4") for v in (x, y)]
    same(each(f"cvt.rn.{kind}x2.f32 out, x, y;", "u4", x, y), one[0] << 16 | one[1])


@pytest.mark.parametrize("operation", ["add", "sub"])
def test_a_half_is_widened_within_an_addition(operation):
    x, y = np.arange(0x7C00, dtype="u2").view("f2"), np.resize(floats("f4")[:26], 0x7C00)
    expected = {"add": np.add, "sub": np.subtract}[operation](x.astype("f4"), y)
    same_or_nan(each(f"{operation}.rn.f32.f16 out, x, y;", "f4", x, y), expected)


# Moves


@pytest.mark.parametrize("n, parts", [(32, 2), (64, 2), (64, 4)])
def test_a_register_is_taken_apart_and_put_together(n, parts):
    x, part = words(f"u{n // 8}"), f"u{n // 8 // parts}"
    names = [f"part{k}" for k in range(parts)]
    lines = f".reg .b{n // parts} {', '.join(names)}; mov.b{n} {{{', '.join(names)}}}, x;"
    expected = x.view(part).reshape(-1, parts)
    same(
        each(f"{lines} mov.b{n} out, {{{', '.join(names[::-1])}}};", x.dtype, x),
        expected[:, ::-1].copy().view(x.dtype)[:, 0],
    )
    sink = ", ".join(["_"] * (parts - 1) + [names[-1]])
    lines = f".reg .b{n // parts} {names[-1]}; mov.b{n} {{{sink}}}, x; mov.b{n // parts} out, {names[-1]};"
    same(each(lines, part, x), expected[:, -1].copy())


# Memory


@pytest.mark.parametrize("kind", [f"{x}{n}" for x in "bsu" for n in (8, 16)])
def test_a_narrow_load_fills_its_register_by_its_sign(kind):
    n = int(kind[1:])
    x, out = words(f"u{n // 8}", 256), np.zeros(256, "i4")
    kernel = kernel_of(f"ld.global.{kind} %r4, [%a1]; st.global.u32 [%a0], %r4;", 2, (4, n // 8))
    launch(kernel, [out, x], 256)
    same(out, x.view(numpy_kind(kind)).astype("i4"))
    assert (kernel.loaded_bytes, kernel.stored_bytes) == (256 * n // 8, 1024)


def on_32_bytes(a):
    """Return a copy that starts where the widest vector may."""
    room = np.zeros(a.nbytes + 32, "u1")
    start = -room.ctypes.data % 32
    copy = room[start : start + a.nbytes].view(a.dtype)
    copy[:] = a
    return copy


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "b64"])
def test_a_vector_is_loaded_and_stored_in_order(kind, lanes):
    n = int(kind[1:])
    x, size = on_32_bytes(words(f"u{n // 8}", 64 * lanes)), n // 8 * lanes
    out = on_32_bytes(np.zeros_like(x))
    names = [f"v{k}" for k in range(lanes)]
    forward, back = ", ".join(names), ", ".join(names[::-1])
    lines = f".reg .b{max(n, 16)} {forward}; ld.global.v{lanes}.{kind} {{{forward}}}, [%a1]; "
    kernel = kernel_of(lines + f"st.global.v{lanes}.{kind} [%a0], {{{back}}};", 2, (size, size))
    launch(kernel, [out, x], 64)
    same(out, x.reshape(-1, lanes)[:, ::-1].ravel())
    assert kernel.loaded_bytes == kernel.stored_bytes == x.nbytes


@pytest.mark.parametrize("access", ["ld.global.u8 %r4, [%a0+1]", "st.global.s8 [%a0+1], %r4"])
def test_one_byte_outside_is_an_error(access):
    room = np.zeros(64, "u1")
    with pytest.raises(MemoryError, match=r"^1 accesses outside"):
        launch(kernel_of(f"{access};", 1, (1,)), [room[:32]], 32)


def test_half_of_a_narrow_access_outside_is_an_error():
    room = np.zeros(64, "u1")
    with pytest.raises(MemoryError, match=r"^1 accesses outside"):
        launch(kernel_of("ld.global.b16 %r4, [%a0];", 1, (2,)), [room[:31]], 16)


@pytest.mark.parametrize("access", ["ld.global.b16 %r4, [%a0+1]", "st.global.v2.u8 [%a0+1], {%h4, %h5}"])
def test_a_misaligned_narrow_access_is_an_error(access):
    with pytest.raises(MemoryError, match=r"^16 misaligned"):
        launch(kernel_of(f"{access};", 1, (2,)), [np.zeros(64, "u1")], 16)


def test_what_lies_outside_is_not_touched():
    room, out = np.full(64, 7, "u1"), np.full(64, 9, "u4")
    kernel = kernel_of("st.global.u8 [%a0], 1; ld.global.u8 %r4, [%a0]; st.global.u32 [%a1], %r4;", 2, (1, 4))
    with pytest.raises(MemoryError, match="64 accesses outside"):
        launch(kernel, [room, out], 64, memory=[room[:32], out])
    np.testing.assert_array_equal(room, [1] * 32 + [7] * 32)
    np.testing.assert_array_equal(out, [1] * 32 + [0] * 32)


@pytest.mark.parametrize("address", [0, 8, 2**47, 2**63, 2**64 - 16, 2**64 - 4, 2**64 - 1])
@pytest.mark.parametrize("memory", [[], [(0, 0)], [(4096, 4096)]])
def test_an_access_of_unmapped_memory_does_not_end_the_process(address, memory):
    kernel = kernel_of(
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a0]; st.global.v4.b32 [%a0], {%r4, %r5, %r6, %r7};", 1, (16,)
    )
    with pytest.raises(MemoryError):
        kernel.run(1, 1, [address.to_bytes(8, "little")], memory)


def test_memory_may_be_of_any_number_of_ranges():
    arrays = [np.zeros(1, "u4") for _ in range(40)]
    lines = "".join(f"ld.param.u64 %d0, [a{k}]; st.global.u32 [%d0], {k};" for k in range(40))
    launch(kernel_of(lines, 40), arrays, 1)
    assert [int(a[0]) for a in arrays] == list(range(40))


# Shuffles


def shuffled(mode, b, clamp, segment):
    """Return the lane that each lane reads, and whether its own segment holds it, as the PTX manual has it."""
    lanes, within = [], []
    for lane in range(32):
        highest, lowest = lane & segment | clamp & ~segment, lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | b & ~segment}[mode]
        within.append(source >= highest if mode == "up" else source <= highest)
        lanes.append(source if within[-1] else lane)
    return lanes, within


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_a_shuffle_gives_each_lane_anothers_value(mode, width):
    x = words("u4", 96)
    for b in (1, 3, 16):
        clamp, segment = 0 if mode == "up" else 31, 32 - width & 31
        lines = f"shfl.sync.{mode}.b32 out|%p0, x, {b}, {segment << 8 | clamp}, -1;"
        out = warps(f"{lines} @!%p0 xor.b32 out, out, -1;", "u4", x)
        lanes, within = shuffled(mode, b, clamp, segment)
        same(out, np.where(within, x.reshape(-1, 32)[:, lanes], ~x.reshape(-1, 32)[:, lanes]).ravel(), f"b={b}")


def test_a_shuffle_without_a_predicate():
    x = words("u4", 64)
    same(warps("shfl.sync.bfly.b32 out, x, 1, 31, -1;", "u4", x, 64), x.reshape(-1, 2)[:, ::-1].ravel())


def test_each_lane_may_name_a_lane_of_its_own():
    x = words("u4", 64)
    lines = "mul.lo.u32 %r4, %t, 7; shfl.sync.idx.b32 out, x, %r4, 31, -1;"
    same(warps(lines, "u4", x), x.reshape(2, 32)[:, LANES * 7 % 32].ravel())


GROUP_MAXIMUM = "".join(f"shfl.sync.bfly.b32 %r4, out, {k}, 31, -1; max.u32 out, out, %r4;" for k in (16, 8, 4, 2, 1))


def test_the_maximum_of_many_groups():
    x = words("u4", 32 * 9000)
    out = warps("mov.b32 out, x;" + GROUP_MAXIMUM, "u4", x, block=32 * 9)
    same(out, np.repeat(x.reshape(-1, 32).max(1), 32))


def test_a_partial_warp_exchanges_within_the_lanes_it_has():
    x = words("u4", 48)
    lines = f"setp.lt.u32 %p0, %t, 32; selp.b32 %r4, -1, {0xFFFF}, %p0; shfl.sync.down.b32 out, x, 1, 31, %r4;"
    with pytest.raises(Incomplete, match=r"thread 47 of block 0 reads lane 16 .* mask 0xffff does not name"):
        warps(lines, "u4", x, block=48)
    lines = lines.replace("31, %r4", "0x100f, %r4")
    expected = x.reshape(-1, 16)[:, [*range(1, 16), 15]].ravel()
    same(warps(lines, "u4", x, block=48), expected)


def test_two_halves_of_a_warp_shuffle_apart_and_then_together():
    x = words("u4", 32)
    out = warps(
        """setp.lt.u32 %p0, %t, 16; @%p0 bra LOW;
        shfl.sync.up.b32 out, x, 1, 0x1000, 0xffff0000; bra BOTH;
        LOW: shfl.sync.down.b32 out, x, 1, 0x100f, 0x0000ffff; add.u32 out, out, 1;
        BOTH: shfl.sync.bfly.b32 out, out, 16, 31, -1;""",
        "u4",
        x,
    )
    low, high = x[[*range(1, 16), 15]] + np.uint32(1), x[[16, *range(16, 31)]]
    same(out, np.concatenate([high, low]))


def test_two_masks_at_one_shuffle():
    x = words("u4", 64)
    lines = f"and.b32 %r4, %t, 1; setp.eq.u32 %p0, %r4, 0; selp.b32 %r5, {0x55555555}, {0xAAAAAAAA}, %p0;"
    out = warps(lines + "shfl.sync.bfly.b32 out, x, 2, 31, %r5;", "u4", x)
    same(out, x.reshape(-1, 32)[:, LANES ^ 2].ravel())


def test_lanes_that_exit_first_need_no_shuffle():
    x, out = words("u4", 32), np.zeros(32, "u4")
    lines = "setp.ge.u32 %p0, %t, 8; @%p0 exit; ld.global.u32 %r4, [%a1]; shfl.sync.bfly.b32 %r4, %r4, 1, 31, 0xff;"
    launch(kernel_of(lines + "st.global.u32 [%a0], %r4;", 2, (4, 4)), [out, x], 32)
    same(out, np.where(LANES < 8, x[LANES ^ 1], 0).astype("u4"))


def test_a_shuffle_in_a_loop_of_other_lengths_for_each_warp():
    x = words("u4", 128)
    lines = """shr.u32 %r4, %t, 5; mov.b32 out, x;
        AGAIN: shfl.sync.up.b32 out, out, 1, 0, -1; add.u32 out, out, 1;
        setp.ne.u32 %p0, %r4, 0; sub.u32 %r4, %r4, 1; @%p0 bra AGAIN;"""
    out = warps(lines, "u4", x, block=128).reshape(4, 32)
    for warp in range(4):
        expected = x.reshape(4, 32)[warp][np.maximum(LANES - warp - 1, 0)]
        same(out[warp], expected + np.uint32(warp + 1))


INCOMPLETE = {
    "a lane has exited": ("setp.eq.u32 %p0, %t, 5; @%p0 exit; shfl.sync.bfly.b32 out, x, 1, 31, -1;", "5, which has exited"),
    "a lane goes round it": (
        "setp.eq.u32 %p0, %t, 5; @%p0 bra END; shfl.sync.bfly.b32 out, x, 1, 31, -1; END:",
        "5, which has exited",
    ),
    "a lane is guarded": ("setp.ne.u32 %p0, %t, 9; @%p0 shfl.sync.bfly.b32 out, x, 1, 31, -1;", "9, which has exited"),
    "another shuffle": (
        """setp.lt.u32 %p0, %t, 16; @%p0 bra LOW; shfl.sync.bfly.b32 out, x, 1, 31, -1; bra END;
        LOW: shfl.sync.bfly.b32 out, x, 1, 31, -1; END:""",
        r"thread 0 .* for thread 16, which waits at `shfl",
    ),
    "another instruction": (
        """setp.eq.u32 %p0, %t, 4; @%p0 bra LOW; shfl.sync.bfly.b32 out, x, 1, 31, -1; bra END;
        LOW: bar.warp.sync -1; END:""",
        "for thread 4, which waits at `bar.warp.sync -1`",
    ),
    "another mask": (
        "setp.eq.u32 %p0, %t, 3; selp.b32 %r4, 8, -1, %p0; shfl.sync.bfly.b32 out, x, 1, 31, %r4;",
        "thread 3 of block 0 reads lane 2 .* mask 0x8 does not name",
    ),
    "two masks that overlap": (
        "setp.eq.u32 %p0, %t, 3; selp.b32 %r4, 12, -1, %p0; shfl.sync.bfly.b32 out, x, 1, 31, %r4;",
        "thread 0 .* for thread 3, which has the mask 0xc",
    ),
    "a mask without its own lane": ("shfl.sync.bfly.b32 out, x, 0, 31, 1;", "thread 1 of block 0 is not in the mask 0x1"),
    "a vote": ("setp.eq.u32 %p0, %t, 5; @%p0 exit; vote.sync.ballot.b32 out, %p0, -1;", "`vote.*5, which has exited"),
    "a warp's barrier": ("setp.eq.u32 %p0, %t, 5; @%p0 exit; bar.warp.sync -1;", "`bar.warp.*5, which has exited"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_shuffle_is_an_error(case):
    lines, message = INCOMPLETE[case]
    with pytest.raises(Incomplete, match=message):
        warps(f"mov.b32 out, 0; {lines}", "u4", words("u4", 32))


def test_a_mask_that_names_lanes_beyond_the_block_is_an_error():
    with pytest.raises(Incomplete, match=r"thread 32 of block 0 .* for thread 36, which is not in the block"):
        warps("shfl.sync.bfly.b32 out, x, 1, 31, -1;", "u4", words("u4", 36), block=36)


def test_the_block_of_an_incomplete_shuffle_is_named():
    lines = "setp.eq.u32 %p0, %i, 9613; @%p0 exit; shfl.sync.idx.b32 out, x, 0, 31, -1;"
    with pytest.raises(Incomplete, match=r"thread 0 of block 300 .* for thread 13,"):
        warps(lines, "u4", words("u4", 32 * 400))


# Votes


@pytest.mark.parametrize("mask", [ALL, 0x0F0F00FF])
def test_votes_count_the_lanes_of_their_mask(mask):
    x = np.array([0] * 32 + [1] * 32 + [0, 1] * 16 + [*(mask >> LANES & 1)] + [5] + [0] * 31, "u4")
    named = mask >> LANES & 1 == 1
    lines = f"""mov.b32 out, 99; shl.b32 %r4, 1, %t; and.b32 %r4, %r4, {mask}; setp.eq.u32 %p1, %r4, 0; @%p1 bra END;
        setp.ne.u32 %p0, x, 0;
        vote.sync.all.pred %p2, %p0, {mask}; vote.sync.any.pred %p3, %p0, {mask}; vote.sync.uni.pred %p4, !%p0, {mask};
        selp.b32 out, 1, 0, %p2; @%p3 add.u32 out, out, 2; @%p4 add.u32 out, out, 4; END:"""
    votes = x.reshape(-1, 32)[:, named] != 0
    every, some = votes.all(1), votes.any(1)
    expected = np.where(named, (every + 2 * some + 4 * (every | ~some))[:, None], 99)
    same(warps(lines, "u4", x), expected.ravel().astype("u4"))


def test_a_ballot_has_the_bit_of_every_lane_that_votes():
    x = words("u4", 128)
    votes = (x.reshape(-1, 32) & 1).astype("u8") << LANES.astype("u8")
    out = warps("and.b32 %r4, x, 1; setp.eq.u32 %p0, %r4, 1; vote.sync.ballot.b32 out, %p0, -1;", "u4", x)
    same(out, np.repeat(votes.sum(1), 32).astype("u4"))


def test_the_active_lanes_are_those_of_one_branch():
    lines = "setp.lt.u32 %p0, %t, 5; @%p0 bra LOW; activemask.b32 out; bra END; LOW: activemask.b32 out; END:"
    same(warps(lines, "u4", words("u4", 32)), np.where(LANES < 5, 0x1F, 0xFFFFFFE0).astype("u4"))


REDUCTIONS = {
    "add.u32": lambda a: a.sum(1, dtype="u4"),
    "min.u32": lambda a: a.min(1),
    "max.u32": lambda a: a.max(1),
    "min.s32": lambda a: a.view("i4").min(1),
    "max.s32": lambda a: a.view("i4").max(1),
    "and.b32": lambda a: np.bitwise_and.reduce(a, 1),
    "or.b32": lambda a: np.bitwise_or.reduce(a, 1),
    "xor.b32": lambda a: np.bitwise_xor.reduce(a, 1),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_a_warp_is_reduced(operation):
    x = words("u4", 96)
    expected = np.repeat(REDUCTIONS[operation](x.reshape(-1, 32)), 32)
    same(warps(f"redux.sync.{operation} out, x, -1;", "u4", x), expected)


def test_the_lane_is_known():
    same(
        warps("mov.u32 out, %laneid; add.u32 out, out, WARP_SZ;", "u4", words("u4", 64), 64),
        np.tile(LANES + 32, 2).astype("u4"),
    )


# Blocks

REVERSED = """mov.u64 %d0, room; mul.wide.u32 %d1, %t, 8; add.s64 %d1, %d0, %d1; st.shared.b64 [%d1], x; bar.sync 0;
    sub.u32 %r4, %r1, %t; sub.u32 %r4, %r4, 1; mad.wide.u32 %d2, %r4, 8, %d0; ld.shared.b64 out, [%d2];"""
ROOM = ".shared .align 8 .b8 room[8192];"


@pytest.mark.parametrize("block", [1, 31, 33, 1024])
def test_a_block_is_reversed_through_shared_memory(block):
    x = words("u8", 5 * block)
    same(warps(REVERSED, "u8", x, block, ROOM), x.reshape(5, block)[:, ::-1].ravel())


TREE = """mul.wide.u32 %d1, %t, 8; mov.u64 %d0, room; add.s64 %d1, %d1, %d0; st.shared.f64 [%d1], x; shr.u32 %r4, %r1, 1;
    AGAIN: bar.sync 0; setp.ge.u32 %p0, %t, %r4; @%p0 bra SKIP;
    mad.wide.u32 %d2, %r4, 8, %d1; ld.shared.f64 %d3, [%d2]; ld.shared.f64 %d4, [%d1];
    add.rn.f64 %d3, %d3, %d4; st.shared.f64 [%d1], %d3;
    SKIP: shr.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r4, 0; @%p1 bra AGAIN; bar.sync 0; ld.shared.f64 out, [room];"""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("block", [2, 32, 256, 1024])
def test_a_block_is_summed_by_a_tree(block, backwards):
    x = np.random.default_rng(0).normal(size=7 * block)
    rest = x.reshape(7, block)
    while rest.shape[1] > 1:
        half = rest.shape[1] // 2
        rest = rest[:, half:] + rest[:, :half]
    same(warps(TREE, "f8", x, block, ROOM, backwards=backwards), np.repeat(rest[:, 0], block))


def test_a_missing_barrier_shows_in_one_of_the_two_orders():
    x = np.random.default_rng(0).normal(size=256)
    lacking = TREE.replace("AGAIN: bar.sync 0;", "bar.sync 0; AGAIN:")
    orders = [warps(lacking, "f8", x, 256, ROOM, backwards=backwards)[0] for backwards in (False, True)]
    assert orders[0] != orders[1]


def test_shared_memory_that_nobody_wrote_is_nan():
    assert np.isnan(warps("ld.shared.f64 out, [room];", "f8", np.zeros(64), 32, ROOM)).all()


def test_a_barrier_waits_for_no_thread_that_has_exited():
    x = words("u8", 64)
    lines = "setp.ge.u32 %p0, %t, 40; @%p0 exit;" + REVERSED.replace("%r1, %t", "40, %t")
    expected = np.where(np.arange(64) < 40, np.resize(x[:40][::-1], 64), 0).astype("u8")
    same(warps(lines, "u8", x, 64, ROOM), expected)


INCOMPLETE_BARRIERS = {
    "another barrier": (
        "setp.lt.u32 %p0, %t, 33; @%p0 bra LOW; bar.sync 0; bra END; LOW: bar.sync 0; END:",
        "thread 0 of block 0 waits at `bar.sync 0` for thread 33, which waits at `bar.sync 0`",
    ),
    "a shuffle": (
        "setp.lt.u32 %p0, %t, 40; @%p0 bra LOW; shfl.sync.bfly.b32 out, x, 1, 31, -1; bra END; LOW: bar.sync 0; END:",
        "thread 0 .* for thread 40, which waits at `shfl",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE_BARRIERS)
def test_an_incomplete_barrier_is_an_error(case):
    lines, message = INCOMPLETE_BARRIERS[case]
    with pytest.raises(Incomplete, match=message):
        warps(f"mov.b32 out, 0; {lines}", "u4", words("u4", 64), 64)


@pytest.mark.parametrize(
    "access", ["ld.shared.b64 out, [room+8192]", "ld.shared.b64 out, [room+-8]", "ld.shared.b64 out, [%a1]"]
)
def test_an_access_outside_shared_memory_is_an_error(access):
    with pytest.raises(MemoryError, match="32 accesses outside the variables of shared memory"):
        warps(f"{access};", "u8", words("u8", 32), 32, ROOM + ".shared .align 8 .b8 more[8];")


def test_an_address_of_shared_memory_is_none_of_global_memory():
    with pytest.raises(MemoryError, match="outside the arrays"):
        warps("mov.u64 %d0, room; ld.global.b64 out, [%d0];", "u8", words("u8", 32), 32, ROOM)


def test_a_misaligned_access_of_shared_memory_is_an_error():
    with pytest.raises(MemoryError, match="32 misaligned"):
        warps("ld.shared.b64 out, [room+4];", "u8", words("u8", 32), 32, ROOM)


def test_shared_memory_counts_no_bytes():
    x, out = words("u8", 64), np.zeros(64, "u8")
    lines = ".reg .b64 x, out; ld.global.b64 x, [%a1];" + REVERSED + "st.global.b64 [%a0], out;"
    kernel = launch(kernel_of(lines, 2, (8, 8), ROOM), [out, x], 64)
    assert (kernel.loaded_bytes, kernel.stored_bytes) == (512, 512)


def test_some_blocks_of_a_grid_can_be_run():
    x = words("u8", 320)
    expected = x.reshape(10, 32)[:, ::-1].copy()
    expected[[0, 1, 2, 7, 8, 9]] = 0
    same(warps(REVERSED, "u8", x, 32, ROOM, first_block=3, last_block=7), expected.ravel())


# What is refused

REFUSED = [
    "add.f32 %r4, %r5, %r6",
    "mul.ftz.f32 %r4, %r5, %r6",
    "sub.f64 %d4, %d5, %d6",
    "add.f16 %h4, %h5, %h6",
    "neg.f16 %h4, %h5",
    "abs.bf16 %h4, %h5",
    "fma.rn.f16 %h4, %h5, %h6, %h7",
    "max.f32 %r4, %r5, %r6",
    "min.NaN.f32 %r4, %r5, %r6",
    "max.bf16 %h4, %h5, %h6",
    "rcp.approx.f32 %r4, %r5",
    "ex2.approx.ftz.f32 %r4, %r5",
    "fma.rz.f32 %r4, %r5, %r6, %r7",
    "add.rn.sat.f32 %r4, %r5, %r6",
    "cvt.rz.f16.f32 %h4, %r5",
    "cvt.rn.ftz.f16.f32 %h4, %r5",
    "cvt.ftz.f32.f16 %r4, %h5",
    "cvt.rn.satfinite.bf16.f32 %h4, %r5",
    "cvt.rz.f32.s32 %r4, %r5",
    "cvt.f32.s32 %r4, %r5",
    "cvt.s32.f32 %r4, %r5",
    "cvt.sat.s8.s32 %r4, %r5",
    "cvt.rni.ftz.s32.f64 %r4, %d5",
    "cvt.rn.f32.f32 %r4, %r5",
    "add.cc.u32 %r4, %r5, %r6",
    "addc.u32 %r4, %r5, %r6",
    "add.sat.s32 %r4, %r5, %r6",
    "mul.s32 %r4, %r5, %r6",
    "mul24.lo.s32 %r4, %r5, %r6",
    "prmt.b32.f4e %r4, %r5, %r6, %r7",
    "vadd4.u32.u32.u32 %r4, %r5, %r6, %r7",
    "dp4a.s32.s32 %r4, %r5, %r6, %r7",
    "setp.ltx.s32 %p0, %r4, %r5",
    "setp.lt.f16 %p0, %h4, %h5",
    "ld.global.b12 %r4, [%a0]",
    "ld.u32 %r4, [%a0]",
    "ld.volatile.shared.u32 %r4, [%a0]",
    "ld.shared.global.u32 %r4, [%a0]",
    "st.param.u32 [a0], %r4",
    "ld.param.u32 %r4, [b0]",
    "ld.shared.u32 %r4, [room]",
    "atom.global.add.u32 %r4, [%a0], 1",
    "cvta.shared.u64 %d4, %d5",
    "shfl.bfly.b32 %r4, %r5, 1, 31",
    "match.any.sync.b32 %r4, %r5, -1",
    "vote.ballot.b32 %r4, %p0",
    "bar.sync 1",
    "bar.sync 0, 64",
    "bar.red.popc.u32 %r4, 0, %p0",
    "barrier.cluster.arrive",
    "membar.gl",
    "trap",
    "mov.u32 %r4, %tid.y",
    ".shared .align 4 .b8 two[8], three[8]",
    ".extern .shared .align 4 .b8 dynamic[]",
]


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_runner_does_not_know_is_refused(line):
    with pytest.raises(Refused):
        kernel_of(f"{line};", 1, (4,))


# What compilers make of CUDA C and of Python

SOURCES = {
    "bfloat16": """__global__ void bfloat16(const unsigned short* x, unsigned short* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        if (i >= n) return;
        unsigned u = __float_as_uint(__fmul_rn(__uint_as_float((unsigned)x[i] << 16), 1.5f));
        out[i] = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16; }""",
    "hash": """__global__ void hash(const unsigned* x, unsigned* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        if (i >= n) return;
        unsigned h = x[i];
        h ^= h >> 16; h *= 0x85ebca6bu; h ^= h >> 13; h *= 0xc2b2ae35u; h ^= h >> 16;
        out[i] = ((h << 13) | (h >> 19)) ^ __umulhi(h, 0xD2511F53u); }""",
    "bytes": """__global__ void bytes(const int4* x, uint2* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        if (i >= n) return;
        int4 v = x[i];
        unsigned word = (v.x & 255) | (v.y & 255) << 8 | (v.z & 255) << 16 | (unsigned)v.w << 24;
        float sum = 0;
        for (int k = 0; k < 4; k++) sum = __fadd_rn(sum, (float)(signed char)(word >> 8 * k));
        out[i] = make_uint2(word, (unsigned)__float2int_rn(__fmul_rn(sum, 0.5f))); }""",
    "maximum": """__global__ void maximum(const float* x, float* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        unsigned u = i < n ? __float_as_uint(x[i]) & 0x7fffffffu : 0;
        for (int k = 16; k; k >>= 1) u = max(u, __shfl_xor_sync(0xffffffffu, u, k));
        if (i < n) out[i] = __uint_as_float(u); }""",
    "total": """__global__ void total(const double* x, double* out, long long n) {
        __shared__ double part[32];
        double s = 0;
        for (long long i = threadIdx.x; i < n; i += blockDim.x) s = __dadd_rn(s, x[i]);
        for (int k = 16; k; k >>= 1) s = __dadd_rn(s, __shfl_down_sync(0xffffffffu, s, k));
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
        __syncthreads();
        if (threadIdx.x >= 32) return;
        s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0;
        for (int k = 16; k; k >>= 1) s = __dadd_rn(s, __shfl_down_sync(0xffffffffu, s, k));
        if (threadIdx.x == 0) out[0] = s; }""",
}


def numba_kernels():
    """Return the same kernels in Python and the types of their arguments, addresses as int64."""
    from numba import cuda, float32, float64, int8, int32, int64, types, uint16, uint32
    from numba.cuda import libdevice

    def bfloat16(x, out, n):
        i = cuda.grid(1)
        if i < n:
            widened = uint32(uint32(x[i]) << uint32(16)).view(np.float32)
            u = uint32(libdevice.fmul_rn(widened, float32(1.5)).view(np.uint32))
            rounded = uint32(u + uint32(0x7FFF) + ((u >> uint32(16)) & uint32(1))) >> uint32(16)
            out[i] = uint16(0x7FFF if (u & uint32(0x7FFFFFFF)) > uint32(0x7F800000) else rounded)

    def hash_(x, out, n):
        i = cuda.grid(1)
        if i < n:
            h = uint32(x[i])
            h = uint32((h ^ (h >> uint32(16))) * uint32(0x85EBCA6B))
            h = uint32((h ^ (h >> uint32(13))) * uint32(0xC2B2AE35))
            h = uint32(h ^ (h >> uint32(16)))
            high = uint32((types.uint64(h) * types.uint64(0xD2511F53)) >> types.uint64(32))
            out[i] = uint32(uint32(h << uint32(13)) | (h >> uint32(19))) ^ high

    def bytes_(x, out, n):
        i = cuda.grid(1)
        if i < n:
            word, total = uint32(0), float32(0)
            for k in range(4):
                byte = int8(x[4 * i + k])
                word |= uint32(int32(byte) & int32(255)) << uint32(8 * k)
                total = libdevice.fadd_rn(total, float32(byte))
            out[2 * i] = word
            out[2 * i + 1] = uint32(libdevice.float2int_rn(libdevice.fmul_rn(total, float32(0.5))))

    def maximum(x, out, n):
        i = cuda.grid(1)
        u = int32(0)
        if i < n:
            u = int32(x[i].view(np.int32) & int32(0x7FFFFFFF))
        for k in (16, 8, 4, 2, 1):
            u = int32(max(u, cuda.shfl_xor_sync(0xFFFFFFFF, u, k)))
        if i < n:
            out[i] = u.view(np.float32)

    def total(x, out, n):
        part = cuda.shared.array(32, float64)
        s, t = 0.0, cuda.threadIdx.x
        for i in range(t, n, cuda.blockDim.x):
            s = libdevice.dadd_rn(s, x[i])
        for k in (16, 8, 4, 2, 1):
            s = libdevice.dadd_rn(s, cuda.shfl_down_sync(0xFFFFFFFF, s, k))
        if t % 32 == 0:
            part[t // 32] = s
        cuda.syncthreads()
        if t < 32:
            s = part[t] if t < cuda.blockDim.x // 32 else 0.0
            for k in (16, 8, 4, 2, 1):
                s = libdevice.dadd_rn(s, cuda.shfl_down_sync(0xFFFFFFFF, s, k))
            if t == 0:
                out[0] = s

    def taking(x, out):
        return types.Array(x, 1, "C"), types.Array(out, 1, "C"), int64

    return {
        "bfloat16": (bfloat16, taking(uint16, uint16)),
        "hash": (hash_, taking(uint32, uint32)),
        "bytes": (bytes_, taking(int32, uint32)),
        "maximum": (maximum, taking(float32, float32)),
        "total": (total, taking(float64, float64)),
    }


def run_compiled(compiler, arch, name, x, out, n, block, grid):
    gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)
    if compiler == "numba-cuda":
        text = gpu_code.compile_numba(*numba_kernels()[name], arch)
        # an array is seven parameters: what it belongs to, two of them, its size, itemsize, address, shape and stride
        array = [[0, 0, a.size, a.itemsize, a.ctypes.data, a.size, a.itemsize] for a in (x, out)]
        values = [*array[0], *array[1], n]
    else:
        options = ["-ftz=true", f"-arch={arch.replace('sm', 'compute')}"]
        source = f'extern "C" {SOURCES[name]}'
        text = gpu_code.nvrtc(12 if compiler == "cupy-cuda12" else 13).compile(source, options, "PTX").rstrip(b"\0").decode()
        values = [x.ctypes.data, out.ctypes.data, n]
    kernel = gpu_code.loaded(text)
    memory = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (x, out)]
    kernel.run(grid, block, [np.int64(v).tobytes() for v in values], memory)
    return out


# one of each kind of code that NVRTC and NVVM write
some_architectures = pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])


@some_architectures
def test_compiled_bfloat16_arithmetic(compiler, arch):
    x = np.arange(65536, dtype="u2")
    with np.errstate(over="ignore", invalid="ignore"):
        product = (x.astype("u4") << 16).view("f4") * np.float32(1.5)
    if compiler != "numba-cuda":  # -ftz=true: both what goes in and what comes out
        product[(x & 0x7F80 == 0) | (np.abs(product) < np.finfo("f4").tiny)] *= 0
    u = product.view("u4")
    expected = np.where(np.isnan(product), 0x7FFF, (u + 0x7FFF + (u >> 16 & 1)) >> 16).astype("u2")
    out = run_compiled(compiler, arch, "bfloat16", x, np.zeros_like(x), x.size, 128, 512)
    same(out, expected)


@some_architectures
def test_a_compiled_hash(compiler, arch):
    x = words("u4", 1000)
    h = x ^ x >> 16
    h = h * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    h ^= h >> 16
    expected = (h << 13 | h >> 19) ^ (h.astype("u8") * 0xD2511F53 >> 32).astype("u4")
    same(run_compiled(compiler, arch, "hash", x, np.zeros_like(x), x.size, 128, 8), expected)


@some_architectures
def test_compiled_bytes_are_packed_and_unpacked(compiler, arch):
    x = words("i4", 4000)
    four = x.astype("i1").reshape(-1, 4)
    halves = np.rint(four.sum(1, dtype="i4") / 2).astype("i4").view("u4")
    expected = np.stack([four.view("u4")[:, 0], halves], 1).ravel()
    same(run_compiled(compiler, arch, "bytes", x, np.zeros(2000, "u4"), 1000, 128, 8), expected)


@some_architectures
def test_a_compiled_maximum_of_groups(compiler, arch):
    x = np.random.default_rng(0).normal(size=3000).astype("f4")
    groups = np.resize(np.append(np.abs(x), np.zeros(8, "f4")), (94, 32)).max(1)
    same(run_compiled(compiler, arch, "maximum", x, np.zeros_like(x), x.size, 128, 24), np.repeat(groups, 32)[:3000])


@some_architectures
def test_a_compiled_sum_of_a_block(compiler, arch):
    x = np.random.default_rng(0).normal(size=5000)
    threads = np.zeros(1024)
    for start in range(0, x.size, 1024):
        part = x[start : start + 1024]
        threads[: part.size] += part
    for _ in range(2):  # the sum of each warp, and then of these
        rows = threads.reshape(-1, 32)
        for k in (16, 8, 4, 2, 1):
            rows = rows[:, :k] + rows[:, k : 2 * k]
        threads = rows[:, 0]
    same(run_compiled(compiler, arch, "total", x, np.zeros(1), x.size, 1024, 1), threads)
