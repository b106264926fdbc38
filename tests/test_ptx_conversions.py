"""Conversions and moves of the PTX runner, beside NumPy's and those of ml_dtypes."""

import math

import libraries
import numpy as np
import pytest
from ptx_kernels import (
    bits_of,
    conversions,
    each,
    kinds_of,
    numpy_kind,
    same,
    same_or_nan,
    words,
)


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
