"""Every conversion between stored bits and floats, alone, on every backend: the model's bits, and what is true of them."""

import functools
from typing import Any

import ml_dtypes
import narrow_model as model
import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from gpuadam.kernels import conversions, llvm, numba_cuda_kernels, processor
from gpuadam.kernels.conversions import CONVERSIONS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMPY: dict[str, Any] = {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "u32": np.dtype("u4")}
NUMBA = {"f32": types.float32, "f64": types.float64, "u32": types.uint32}


def of_conversion(name, intrinsic, contracts):
    """Return a conversion as a function for Numba."""
    row = CONVERSIONS[name]

    def emit(builder, *operands):
        return row.llvm(builder, llvm.nvvm_rn(builder) if contracts else None, *operands)

    return llvm.function(intrinsic, name, emit, NUMBA[row.result](*(NUMBA[x] for x in row.operands)))


@functools.cache
def on_the_cpu(name, by_instructions):
    letters = ", ".join("abcde"[: len(CONVERSIONS[name][1])])
    indexed = ", ".join(f"{letter}[i]" for letter in letters.split(", "))
    namespace = {"convert": of_conversion(name, intrinsic, contracts=False)}
    exec(f"def loop(out, {letters}):\n    for i in range(out.size):\n        out[i] = convert({indexed})", namespace)
    return numba.njit(error_model="numpy")(namespace["loop"])


def converted(name, *operands):
    """Return a conversion's results on the CPU. Operands are of its types, or are broadcast to them."""
    result, kinds, *_ = CONVERSIONS[name]
    alike = np.broadcast_arrays(*operands)
    given = [np.ascontiguousarray(x, NUMPY[kind]) for x, kind in zip(alike, kinds, strict=True)]
    out = np.empty(given[0].size, NUMPY[result])
    on_the_cpu(name, processor.converts_float16())(out, *given)
    return out


@pytest.fixture(params=["as it is", "integers alone"])
def float16_on_the_cpu(request, monkeypatch):
    """Also as on a CPU without instructions for float16."""
    if request.param == "integers alone":
        monkeypatch.setattr(processor, "converts_float16", lambda: False)


def every_pattern():
    return np.arange(1 << 16, dtype=np.uint32)


def edge_cases():
    """Return the bits of float32 at which one of the conversions may go wrong."""
    of_exponents = (np.arange(512, dtype=np.uint32) << np.uint32(23))[:, None]
    ties = [0, 1, 2, 0x7FFFFF, 0x7FFFFE, 0x400000, 0x3FFFFF, 0x400001]
    ties += [(k << 16) + d & 0x7FFFFF for k in (0, 1, 2, 0x7E, 0x7F) for d in (0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000)]
    ties += [(k << 13) + d & 0x7FFFFF for k in (0, 1, 2, 0x3FE, 0x3FF) for d in (0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000)]
    return np.unique(of_exponents | np.array(ties, np.uint32))


def some_floats(n=200_000, seed=0):
    """Return float32 of random bits, ordinary ones and edge cases."""
    rng = np.random.default_rng(seed)
    random = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    near_float16 = np.exp2(rng.uniform(-28, 17, n // 2)).astype("f4") * rng.choice([-1, 1], n // 2).astype("f4")
    return np.concatenate([random, near_float16.view(np.uint32), edge_cases()]).view(np.float32)


def bits(x):
    return x.view(f"u{x.itemsize}")


def of_16_bits(found, format):
    """Return results of 32 bits, of which the upper half is zero, as numbers of a format."""
    assert found.max() <= 0xFFFF
    return found.astype("u2").view(model.DTYPES[format])


def assert_bits(actual, expected):
    """Compare the bits of results; a NaN equals every NaN."""
    unequal = bits(np.ascontiguousarray(actual)) != bits(np.ascontiguousarray(expected))
    if actual.dtype.kind not in "iu":
        unequal &= ~(np.isnan(actual) & np.isnan(expected))
    assert not unequal.any(), f"{unequal.sum()} of {unequal.size}, first at {np.flatnonzero(unequal)[:5]}"


# 16 bits


@pytest.mark.usefixtures("float16_on_the_cpu")
@pytest.mark.parametrize("format, dtype", [("bfloat16", BFLOAT16), ("float16", np.dtype("f2"))])
def test_every_pattern_of_16_bits_decodes_to_what_numpy_says(format, dtype):
    patterns = every_pattern()
    with np.errstate(invalid="ignore"):
        assert_bits(converted(f"from_{format}", patterns), patterns.astype("u2").view(dtype).astype("f4"))


@pytest.mark.usefixtures("float16_on_the_cpu")
@pytest.mark.parametrize("format, dtype", [("bfloat16", BFLOAT16), ("float16", np.dtype("f2"))])
def test_rounding_to_nearest_is_the_cast_of_numpy(format, dtype):
    x = some_floats()
    found = of_16_bits(converted(f"to_{format}", x), format)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        cast = x.astype(dtype)
    assert_bits(found, cast)
    assert_bits(found, model.nearest(x, format))
    assert np.isnan(x).sum() > 500
    assert (np.isinf(cast) & np.isfinite(x)).sum() > 20  # overflow
    assert ((np.abs(cast.astype("f4")) < ml_dtypes.finfo(dtype).smallest_normal) & (x != 0)).sum() > 500


@pytest.mark.usefixtures("float16_on_the_cpu")
def test_every_nan_becomes_one_bfloat16_and_a_quiet_float16():
    x = some_floats()
    x = x[np.isnan(x)]
    assert (converted("to_bfloat16", x) == 0x7FC0).all()
    assert (converted("to_bfloat16_randomly", x, 0xFFFF) == 0x7FC0).all()
    for found in (converted("to_float16", x), converted("to_float16_randomly", x, 0xFFFFFFFF)):
        assert ((found & 0x7E00) == 0x7E00).all()


@pytest.mark.usefixtures("float16_on_the_cpu")
@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_what_is_decoded_is_encoded_to_the_same_bits(format):
    patterns = every_pattern()
    x = converted(f"from_{format}", patterns)
    number = ~np.isnan(x)
    assert (converted(f"to_{format}", x)[number] == patterns[number]).all()
    for h in (0, 0xFFFFFFFF, 0x12345678):
        assert (converted(f"to_{format}_randomly", x, h)[number] == patterns[number]).all()


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_random_rounding_is_the_models(format):
    x = some_floats(seed=1)
    for h in (np.random.default_rng(2).integers(0, 1 << 32, x.size, dtype=np.uint32), 0, 0xFFFFFFFF, 0x8000, 0x1000):
        h = np.broadcast_to(np.uint32(h), x.shape)
        found = of_16_bits(converted(f"to_{format}_randomly", x, h), format)
        assert_bits(found, model.randomly(x, h, format))


UNBIASED = {
    "bfloat16": [1.0 + 2.0**-9, 1.001, -3.14159, 1e-3, 2.0**-126 * 1.003, 2.0**-130 * 1.7, 7.7e-41, 3.3e38],
    "float16": [1.0 + 2.0**-13, 1.001, -3.14159, 1e-3, 6.1e-5, -1e-5, 2.0**-24 * 0.3, 2.0**-24 * 5.25, 1e-9, 65000.0],
}


@pytest.mark.parametrize("format, x", [(format, x) for format, xs in UNBIASED.items() for x in xs])
def test_random_rounding_is_right_on_average(format, x):
    """Over a million consecutive elements, within 5 standard errors, and to one of the two neighbours each time."""
    n = 1_000_000
    x = np.float32(x)
    h = generated(np.arange(n), 0x1234_5678_9ABC_DEF0)
    found = of_16_bits(converted(f"to_{format}_randomly", np.full(n, x), h), format)
    below, above = np.unique(found)
    assert np.nextafter(below, above) == above
    found, below, above = found.astype("f8"), float(below), float(above)
    assert below < float(x) < above
    share = (float(x) - below) / (above - below)
    standard_error = np.sqrt(share * (1 - share) / n)
    assert abs((found == above).mean() - share) <= 5 * standard_error + 2.0**-16  # the random bits are 16, or more


def test_below_2_to_the_minus_32_a_float16_is_zero():
    """A 256th of the smallest number that it has: 32 random bits say no more."""
    tiny = np.array([2.0**-32, -(2.0**-32), 2.0**-33, -(2.0**-33), 1e-45], "f4")
    assert (converted("to_float16_randomly", tiny, 0) == [0, 0x8000, 0, 0x8000, 0]).all()
    assert (converted("to_float16_randomly", tiny, 0xFFFFFFFF) == [1, 0x8001, 0, 0x8000, 0]).all()


# A float32 in two parts


def test_two_parts_are_the_exact_float32():
    rng = np.random.default_rng(3)
    patterns = np.concatenate([rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32), edge_cases()])
    x = patterns.view(np.float32)
    high, low = converted("high_part", x), converted("low_part", x)
    whole = converted("from_parts", high, low)
    nan = np.isnan(x)
    assert (bits(whole)[~nan] == patterns[~nan]).all()
    assert (bits(whole)[nan] == 0x7FC00000).all() and nan.sum() > 1000
    assert high.max() <= 0xFFFF and low.max() <= 0xFFFF
    wanted_high, wanted_low = model.parts(x)
    assert_bits(high.astype("u2"), bits(wanted_high))
    assert_bits(low.astype("u2"), bits(wanted_low))
    assert_bits(whole, model.whole(wanted_high, wanted_low))


def test_the_upper_part_is_the_nearest_bfloat16_and_ties_go_away_from_zero():
    x = some_floats(seed=4)
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]
    high = converted("high_part", x).astype("u2").view(BFLOAT16).astype("f8")
    nearest = x.astype(BFLOAT16).astype("f8")
    distance, least = np.abs(high - x), np.abs(nearest - x)
    assert (distance == least).all()
    ties = high != nearest
    assert ties.sum() > 100 and (np.abs(high) > np.abs(nearest))[ties].all()


def test_a_remainder_of_zero_is_the_bfloat16():
    patterns = every_pattern()
    assert_bits(converted("from_parts", patterns, 0), converted("from_bfloat16", patterns))


# 8 bits


def some_scales(n, seed, smallest):
    rng = np.random.default_rng(seed)
    scales = np.exp2(rng.uniform(np.log2(smallest), 127, n)).astype("f4")
    return np.concatenate([scales, np.array([smallest, 1.0, 3.4e38, 0.0, np.nan], "f4")])


def test_every_code_of_every_scale_is_the_models_number():
    codes = np.arange(256, dtype=np.uint8)
    for m_scale, v_scale in zip(
        some_scales(300, 5, model.SMALLEST_M), some_scales(300, 6, model.SMALLEST_ROOT), strict=True
    ):
        groups = 256 // model.GROUP
        m, v = model.decoded_codes(codes, codes, np.full(groups, m_scale), np.full(groups, v_scale))
        assert_bits(converted("from_m_code", codes, converted("m_unit", m_scale)), m)
        assert_bits(converted("from_v_code", codes, converted("v_unit", v_scale)), v)


def test_the_largest_of_a_group_keeps_the_last_code_and_no_other_passes_it():
    largest = some_scales(100_000, 7, model.SMALLEST_ROOT)[:-2]
    inverse, root_inverse = converted("m_inverse", bits(largest)), converted("v_inverse", bits(largest))
    for h, allowed in ((0, (126, 127)), (0xFFFFFFFF, (127,))):
        codes = converted("to_m_code", largest, inverse, 0xFFFFFFFF, h)
        assert np.isin(codes, allowed).all()
    for h, allowed in ((0, (254, 255)), (0xFFFFFFFF, (255,))):
        codes = converted("to_v_code", largest, root_inverse, 0xFFFFFFFF, h)
        assert np.isin(codes, allowed).all()


# The random bits


def generated(index, key):
    index = np.asarray(index).astype("u8")
    key = key % 2**64
    return converted("random", index & 0xFFFFFFFF, index >> 32, key & 0xFFFFFFFF, key >> 32)


KEYS = (0, 1, -1, 0x0123456789ABCDEF, -(2**63))


@pytest.mark.parametrize("key", KEYS)
def test_the_random_bits_are_the_models(key):
    rng = np.random.default_rng(8)
    index = np.concatenate([np.arange(1000), 2**32 - 500 + np.arange(1000), rng.integers(0, 2**62, 100_000)])
    assert_bits(generated(index, key), model.random_bits(index, key))


@pytest.mark.parametrize("key", KEYS)
def test_each_bit_is_set_in_half_of_a_million_draws(key):
    n = 1_000_000
    h = generated(np.arange(n), key)
    for k in range(32):
        assert abs(((h >> np.uint32(k)) & 1).sum() - n / 2) <= 5 * np.sqrt(n) / 2, k
    assert abs(np.corrcoef(h[:-1], h[1:])[0, 1]) <= 5 / np.sqrt(n)  # nor does a draw say anything of the next


def changed_by(bit, of_key):
    """Return the share of elements in which each bit that comes out changes with one that goes in."""
    n = 40_000
    index, key = np.random.default_rng(9).integers(0, 2**40, n), 0x5DEECE66D1234567
    other = generated(index, key ^ (1 << bit)) if of_key else generated(index ^ (1 << bit), key)
    return (((generated(index, key) ^ other)[:, None] >> np.arange(32, dtype="u4")) & 1).mean(0)


@pytest.mark.parametrize("bit", range(40))
def test_every_bit_of_the_index_changes_each_bit_that_comes_out_in_about_half(bit):
    assert (np.abs(changed_by(bit, of_key=False) - 0.5) < 0.1).all()


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_the_key_changes_about_half_of_what_comes_out(bit):
    """On average over 32 bits: its upper half goes in late. Keys are random numbers themselves."""
    assert 0.3 < changed_by(bit, of_key=True).mean() < 0.7


def test_elements_2_32_apart_have_other_random_bits():
    index = np.arange(100_000)
    h = generated(index, 42)
    for above in (2**32, 2**33, 2**40):
        other = generated(index + above, 42)
        assert (h == other).sum() < 10
        same = ((h ^ other)[:, None] >> np.arange(32, dtype="u4") & 1).mean(0)
        assert (np.abs(same - 0.5) < 5 * 0.5 / np.sqrt(100_000)).all()


# The compiled code of the GPU backends

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

import cupy  # noqa: E402
from numba import cuda  # noqa: E402
from numba.cuda.extending import intrinsic as cuda_intrinsic  # noqa: E402

NAMES = list(CONVERSIONS)
LETTERS = "abcde"


def slot(kind, k):
    """Return operand k as an array of its kind: there are five of each, as bits, so that all conversions share them."""
    return f"{kind}_{LETTERS[k]}"


OPERANDS = sorted({slot(kind, k) for _, kinds, *_ in CONVERSIONS.values() for k, kind in enumerate(kinds)})


@functools.cache
def kernel_of(compiler, arch):
    """Return one kernel that does every conversion to each element; results of 32 bits lie one after the other in `out`."""
    if compiler == "numba-cuda":
        return gpu_code.loaded(gpu_code.compile_numba(numba_kernel(), (types.int64,) * (len(OPERANDS) + 3), arch))
    c_types = {"f32": "float32", "f64": "float64", "u32": "uint32"}
    inputs = [f"raw {c_types[name[:3]]} {name}" for name in OPERANDS] + ["int64 n"]
    lines = []
    for j, name in enumerate(NAMES):
        result, kinds, *_ = CONVERSIONS[name]
        call = f"{name}_({', '.join(f'{slot(kind, k)}[i]' for k, kind in enumerate(kinds))})"
        store = {
            "f32": f"out[{j} * n + i] = __float_as_uint({call});",
            "u32": f"out[{j} * n + i] = {call};",
            "f64": f"wide[i] = {call};",
        }
        lines.append(store[result])
    elementwise = cupy.ElementwiseKernel(
        ", ".join(inputs), "raw uint32 out, raw float64 wide", "\n".join(lines), "every_conversion",
        preamble=conversions.for_cuda_c(),
    )  # fmt: skip
    version = 12 if compiler == "cupy-cuda12" else 13
    return gpu_code.loaded(gpu_code.compile_cupy(elementwise, arch, "PTX", version).rstrip(b"\0").decode())


def numba_kernel():
    arguments = [*OPERANDS, "n", "out", "wide"]
    lines = ["i = cuda.grid(1)", "if i < n:"]
    kinds_of = {"f32": 4, "f64": 8, "u32": 4}
    namespace = {"cuda": cuda}
    for kind in kinds_of:
        namespace[f"load_{kind}"] = numba_cuda_kernels.global_load(NUMBA[kind])
        namespace[f"store_{kind}"] = numba_cuda_kernels.global_store(NUMBA[kind])
    for j, name in enumerate(NAMES):
        result, kinds, *_ = CONVERSIONS[name]
        namespace[name] = of_conversion(name, cuda_intrinsic, contracts=True)
        given = ", ".join(f"load_{kind}({slot(kind, k)} + {kinds_of[kind]} * i)" for k, kind in enumerate(kinds))
        at = "wide + 8 * i" if result == "f64" else f"out + 4 * ({j} * n + i)"
        lines.append(f"    store_{result}({at}, {name}({given}))")
    exec(f"def kernel({', '.join(arguments)}):\n    " + "\n    ".join(lines), namespace)
    return namespace["kernel"]


def operands_of_all(n=120_000):
    """Return an array for each slot: random bits among which are those that matter to a conversion that takes them."""
    rng = np.random.default_rng(10)
    found = {}
    for name in OPERANDS:
        kind, k = name[:3], LETTERS.index(name[4])
        if kind == "f32":
            x = some_floats(n, seed=20 + k)
            found[name] = x[rng.permutation(x.size)[:n]]
            usual = rng.random(n) < 0.3
            found[name][usual] = np.abs(rng.standard_normal(usual.sum())).astype("f4")
        elif kind == "f64":
            found[name] = np.where(rng.random(n) < 0.5, rng.standard_normal(n), rng.integers(0, 2**63, n).view("f8"))
        else:
            found[name] = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    # what is stored has 16 bits or 8, but masks, keys and random bits have 32
    return found


OTHER_PLACES = ("cupy", "sm_75"), ("cupy-cuda12", "sm_80"), ("numba-cuda", "sm_120")  # behind --exhaustive
TAKES = {"from_bfloat16": 0xFFFF, "from_float16": 0xFFFF, "from_parts": 0xFFFF, "from_m_code": 0xFF, "from_v_code": 0xFF}


@pytest.mark.parametrize(
    "compiler, arch",
    [
        *(pytest.param(*place, marks=pytest.mark.exhaustive) for place in OTHER_PLACES),
        *[("cupy", "sm_90"), ("numba-cuda", "sm_80")],
    ],
)
def test_every_conversion_of_the_gpu_code_has_the_cpus_bits(compiler, arch):
    for limit in (0xFFFFFFFF, 0xFFFF, 0xFF):
        operands, n = operands_of_all(), 120_000
        for name, x in operands.items():
            if name.startswith("u32"):
                x &= np.uint32(limit)
        out, wide = np.zeros(len(NAMES) * n, "u4"), np.zeros(n)
        kernel = kernel_of(compiler, arch)
        arrays = [operands[name] for name in OPERANDS]
        if compiler == "numba-cuda":
            parameters = gpu_code.packed(kernel, *(x.ctypes.data for x in arrays), n, out.ctypes.data, wide.ctypes.data)
        else:
            given = [gpu_code.carray(x) for x in (*arrays, out, wide)]
            given = [*given[: len(arrays)], n, *given[len(arrays) :]]
            parameters = gpu_code.packed(kernel, *given, gpu_code.indexer(kernel, n))
        spans = gpu_code.memory_of([*arrays, out, wide])
        memory = [(min(start for start, _ in spans), max(end for _, end in spans))]
        kernel.run(-(-n // 128), 128, parameters, memory)
        for j, name in enumerate(NAMES):
            result, kinds, *_ = CONVERSIONS[name]
            if TAKES.get(name, 0xFFFFFFFF) < limit:
                continue
            expected = converted(name, *(operands[slot(kind, k)] for k, kind in enumerate(kinds)))
            found = wide if result == "f64" else out[j * n : (j + 1) * n].view(NUMPY[result])
            if "float16" in name and name.startswith("to_"):
                found, expected = (of_16_bits(x, name.split("_")[1]) for x in (found, expected))
            try:
                assert_bits(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
