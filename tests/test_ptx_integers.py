"""The integers, comparisons and predicates of the PTX runner, beside Python's integers and NumPy's."""

import operator

import numpy as np
import pytest
from ptx_kernels import ALL, bits_of, each, kinds_of, numpy_kind, same, words

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
