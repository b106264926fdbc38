"""The formats of moments in NumPy: read as a step reads them, rounded to nearest, and as near as their bits allow."""

import narrow_model as model
import numpy as np
import pytest

from gpuadam.kernels import state_formats
from gpuadam.kernels.operands import GROUP


def moments(n, seed, ordinary=False):
    """Return m and v, v at least m**2 / 100 as in training, or any numbers; groups of zeros, NaN and infinities among these."""
    rng = np.random.default_rng(seed)
    m = rng.standard_normal(n).astype("f4")
    v = (m**2 * rng.uniform(0.01, 4, n)).astype("f4")
    if ordinary:
        return m, v
    with np.errstate(over="ignore", under="ignore"):
        sizes = np.exp(rng.uniform(-90, 40, -(-n // GROUP)))
        m, v = (m * np.repeat(sizes, GROUP)[:n]).astype("f4"), (v * np.repeat(sizes, GROUP)[:n] ** 2).astype("f4")
    for x in (m, v):
        x[rng.integers(n, size=n // 300)] = np.nan
        x[rng.integers(n, size=n // 300)] = np.inf
        x[rng.integers(n, size=n // 20)] = 0
    m[:64] = v[:64] = 0
    return m, v


@pytest.mark.parametrize("n", [1, 31, 32, 33, 5003])
def test_codes_are_read_as_a_step_reads_them(n):
    rng = np.random.default_rng(n)
    m, v = (rng.integers(0, 256, n).astype("u1") for _ in range(2))
    groups = -(-n // GROUP)
    m_scale, v_scale = (np.exp(rng.uniform(-30, 30, groups)).astype("f4") for _ in range(2))
    m_scale[0] = np.nan if n > 40 else m_scale[0]
    expected = model.decoded_codes(m, v, m_scale, v_scale)
    assert model.different(state_formats.decoded(m, "uint8", "m", m_scale), expected[0]) == 0
    assert model.different(state_formats.decoded(v, "uint8", "v", v_scale), expected[1]) == 0


@pytest.mark.parametrize("n", [1, 31, 32, 33, 20_003])
def test_codes_are_a_steps_that_rounds_in_the_middle(n):
    m, v = moments(n, n)
    middle = np.full(n, 1 << 31 | 1 << 17, "u4")  # of the random bits of m, and of v
    with np.errstate(over="ignore"):
        expected = dict(zip(("m", "v", "m_scale", "v_scale"), model.codes(m, v, middle), strict=True))
    found = state_formats.in_8_bits(m, v)
    for key, array in expected.items():
        # the model's middle of m is 16 / 2**19 of a code too high
        apart = model.different(found[key], array)
        assert apart <= (n // 5_000 if key == "m" else 0), (key, apart)


def test_a_code_is_the_nearest_and_what_it_stands_for_has_its_code():
    m, v = moments(50_000, 1, ordinary=True)
    codes = state_formats.in_8_bits(m, v)
    back = state_formats.decoded(codes["m"], "uint8", "m", codes["m_scale"])
    units = np.repeat(codes["m_scale"] / np.float32(model.M_NUMBERS[-1]), GROUP)[: m.size]
    z = np.abs(m) / units + 2.0**-7
    half = np.exp2(np.floor(np.log2(z)) - 4) / 2 * units
    assert (np.abs(back - m) <= half * 1.001).all()
    v_back = state_formats.decoded(codes["v"], "uint8", "v", codes["v_scale"])
    again = state_formats.in_8_bits(back, v_back)
    for key in ("m", "v"):
        assert (again[key] == codes[key]).all()
    assert (v_back[m != 0] > 0).all()


def test_bfloat16_is_rounded_to_nearest_even():
    x = model.wide("float32", 20_000, np.random.default_rng(0))
    expected = model.nearest(x, "bfloat16")
    assert model.different(state_formats.encoded(x, "bfloat16").view(expected.dtype), expected) == 0
    assert model.different(state_formats.decoded(expected, "bfloat16"), expected.astype("f4")) == 0


def test_float64_state_is_rounded_once_and_overflows_to_infinity():
    x = np.float64([1 + 2.0**-24, 1e300, -1e-300, np.nan])
    assert model.different(state_formats.encoded(x, "float32"), np.float32([1, np.inf, -0.0, np.nan])) == 0
    assert state_formats.encoded(np.float32([0.1]), "float64").dtype == np.float64
