"""The narrow formats, their rounding and its random bits in plain NumPy, written from what is documented of them.

Nothing here comes from `gpuadam/kernels`. Where a format is defined by its bits, they are taken apart with exact float64
arithmetic instead, so that the two have little in common to be wrong together.
"""

import ml_dtypes
import numpy as np

DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("float16"),
    "int16": np.dtype("int16"),
    "uint8": np.dtype("uint8"),
}

NAN_BITS = {"bfloat16": 0x7FC0, "float16": 0x7E00}  # the only NaN that is ever stored
GROUP = 32  # elements that share a scale of 8-bit state


# The random bits


def random_bits(index, key):
    """Return 32 bits for each index: MurmurHash3's finaliser of its lower half.

    One word of the key goes in before it and one in its middle. The upper half of the index moves the key on.
    """
    u64, word = np.uint64, np.uint64(0xFFFFFFFF)
    index = np.asarray(index).astype(u64)
    with np.errstate(over="ignore"):
        moved = u64(key % 2**64) + (index >> u64(32)) * u64(0x9E3779B97F4A7C15)
        x = (index ^ moved) & word
        x ^= x >> u64(16)
        x = (x * u64(0x85EBCA6B) & word) ^ (moved >> u64(32))
        x ^= x >> u64(13)
        x = x * u64(0xC2B2AE35) & word
        return (x ^ (x >> u64(16))).astype(np.uint32)


# Which of an element's 32 bits, counted from the lowest and round again, are the 16 for an operand
OWN_BITS_FROM = {"param": 0, "m": 16, "v": 8, "max_v": 24}


def own_bits(h, operand):
    first = OWN_BITS_FROM[operand]
    return h if first == 0 else (h >> np.uint32(first)) | (h << np.uint32(32 - first))


# 16 bits


def decoded(a):
    """Return an array of a format of at most 32 bits as float32, which is exact."""
    with np.errstate(invalid="ignore"):
        return a.astype(np.float32)


def nearest(x, format):
    """Round float32 to nearest, ties to even: the casts of NumPy and ml_dtypes, and one NaN."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bits = x.astype(DTYPES[format]).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(NAN_BITS[format]), bits).view(DTYPES[format])


def randomly(x, h, format):
    """Round float32 to the number below or above it, in magnitude, by random bits: up in the share that is cut off."""
    rounded = {"bfloat16": _to_bfloat16, "float16": _to_float16}[format](np.abs(x), h)
    rounded = rounded | np.where(np.signbit(x), np.uint16(0x8000), np.uint16(0))
    return np.where(np.isnan(x), np.uint16(NAN_BITS[format]), rounded).astype(np.uint16).view(DTYPES[format])


def _to_bfloat16(x, h):
    bits = x.view(np.uint32)
    cut_off, noise = bits & np.uint32(0xFFFF), h & np.uint32(0xFFFF)
    up = cut_off.astype(np.int64) + noise >= 1 << 16
    return ((bits >> np.uint32(16)) + up).astype(np.uint16)


def _to_float16(x, h):
    finite = np.isfinite(x)
    x = np.where(finite, x, np.float32(1)).astype(np.float64)
    exponent = np.frexp(np.where(x == 0, 1, x))[1].astype(np.int64) - 1
    last = np.maximum(exponent, -14) - 10  # the power of two of the last bit that is kept
    cut = last - (exponent - 23)  # how many bits of float32 are below it
    kept = x / np.exp2(last)
    noise = (h.astype(np.int64) & ((1 << np.minimum(cut, 31)) - 1)) / np.exp2(cut)
    number = np.floor(np.where((cut > 31) | (x == 0), 0.0, kept + noise)) * np.exp2(last)
    with np.errstate(over="ignore"):
        bits = np.where(number > 65504, np.inf, number).astype(np.float16).view(np.uint16)  # exact
    return np.where(finite, bits, np.uint16(0x7C00))


def parts(x):
    """Return the bfloat16 nearest to float32 numbers, ties away from zero, and the int16 that is left of their bits."""
    bits = np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32)).astype(np.int64)
    high = bits // 65536 + (bits % 65536 >= 32768)
    return high.astype(np.uint16).view(DTYPES["bfloat16"]), (bits - high * 65536).astype(np.int16)


def whole(high, low):
    """Return the float32 of two parts."""
    return (high.view(np.uint16).astype(np.int64) * 65536 + low).astype(np.uint32).view(np.float32)


def stored(x, format, operand="param_copy", h=None):
    """Return new values of the compute type as they are stored. h: random bits, if they are rounded by those."""
    if format == "float64":
        return x
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        x = x.astype(np.float32)
    if format == "float32":
        return x
    return nearest(x, format) if h is None else randomly(x, own_bits(h, operand), format)


# 8 bits


def numbers_of_codes(bits):
    """Return what the codes stand for, in units: floats from 2**-7 to 2, less 2**-7, of 3 bits of exponent and some more."""
    code = np.arange(2 ** (3 + bits))
    return (1 + code % 2**bits / 2**bits) * np.exp2(code // 2**bits - 7) - 2.0**-7


M_NUMBERS, V_NUMBERS = numbers_of_codes(4), numbers_of_codes(5)
SMALLEST_M, SMALLEST_ROOT = 2.0**-114, 2.0**-50  # a group whose largest are smaller becomes zeros


def of_elements(scales, n):
    return np.repeat(scales, GROUP)[:n]


def decoded_codes(m_codes, v_codes, m_scale, v_scale):
    """Return m and v of 8-bit state as float32."""
    f32, f64, n = np.float32, np.float64, m_codes.size
    with np.errstate(over="ignore", invalid="ignore"):
        m_unit = of_elements(m_scale * f32(1 / M_NUMBERS[-1]), n).astype(f64)
        v_unit = of_elements(v_scale * f32(1 / V_NUMBERS[-1]), n).astype(f64)
        m = (M_NUMBERS[m_codes & 0x7F] * m_unit).astype(f32)  # exact in float64, so that it is rounded once
        root = (V_NUMBERS[v_codes] * v_unit).astype(f32)
        return np.where(m_codes & 0x80, -m, m), root * root


def codes(m, v, h):
    """Return m and v, which a step has left as float32, as codes and scales: m_codes, v_codes, m_scale, v_scale."""
    f32, n, n_groups = np.float32, m.size, -(-m.size // GROUP)
    with np.errstate(invalid="ignore"):
        root = np.sqrt(v)
    largest = [np.zeros((n_groups, GROUP), f32) for _ in range(2)]
    for padded, x in zip(largest, (np.abs(m), root), strict=True):
        padded.reshape(-1)[:n] = x
    largest_m, largest_root = (padded.max(1, initial=0) for padded in largest)  # NaN wins
    bad = ~(np.isfinite(largest_m) & np.isfinite(largest_root))
    no_v = ~bad & (largest_root < SMALLEST_ROOT)
    no_m = no_v | (~bad & (largest_m < SMALLEST_M))
    # a millionth less than the largest code, so that nothing is rounded past it
    m_codes = _random_codes(np.abs(m), largest_m, bad | no_m, M_NUMBERS[-1], 4, h >> np.uint32(13))
    v_codes = _random_codes(root, largest_root, bad | no_v, V_NUMBERS[-1], 5, h & np.uint32(0x3FFFF))
    v_codes = np.where(of_elements(bad | no_v, n), 0, np.maximum(v_codes, v != 0))
    m_codes = m_codes | np.where(of_elements(bad | no_m, n), 0, np.signbit(m) * 0x80)
    m_scale = np.where(bad, f32(np.nan), np.where(no_m, f32(0), largest_m))
    v_scale = np.where(bad, f32(np.nan), np.where(no_v, f32(0), largest_root))
    return m_codes.astype(np.uint8), v_codes.astype(np.uint8), m_scale, v_scale


def _random_codes(x, largest, zero, top, bits, noise):
    f32, n = np.float32, x.size
    zero = of_elements(zero, n)
    inverse = f32(top * (1 - 2.0**-20)) / np.where(largest > 0, largest, f32(1))
    with np.errstate(over="ignore", invalid="ignore"):
        z = fma(np.where(zero, f32(0), x), of_elements(inverse, n), f32(2.0**-7)).astype(np.float64)
    z = np.where(zero, 2.0**-7, z)
    exponent = np.frexp(z)[1].astype(np.int64) - 1
    share = noise / np.exp2(23 - bits)  # of the distance to the next code
    steps = np.floor(z / np.exp2(exponent - bits) + share).astype(np.int64)  # from 2**bits on
    return (exponent + 7) * 2**bits + steps - 2**bits


def fma(a, b, c):
    """Return a * b + c of float32, rounded once: by way of float64, rounded to odd (Boldo & Melquiond 2008)."""
    product, c = a.astype(np.float64) * b, np.float64(c)  # exact
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    even = total.view(np.int64) % 2 == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


# Data


def wide(format, n, rng, signed=True):
    """Return numbers from the whole range of a format, ordinary, subnormal and special ones among them."""
    dtype = DTYPES[format]
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        return rng.integers(ends.min, ends.max + 1, n).astype(dtype)
    info = ml_dtypes.finfo(dtype)
    smallest, normal, largest = (float(x) for x in (info.smallest_subnormal, info.smallest_normal, info.max))
    x = np.exp(rng.uniform(np.log(smallest), np.log(largest), n))
    kind = rng.random(n)
    x = np.where(kind < 0.4, np.abs(rng.standard_normal(n)), x)
    x = np.where(kind > 0.8, normal * rng.random(n), x)
    x = np.where(signed & (rng.random(n) < 0.5), -x, x)
    specials = np.array([0.0, -0.0, np.inf, np.nan, smallest, normal, largest])
    x = np.where(rng.random(n) < 0.08, rng.choice(specials, n), x)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return x.astype(dtype)


def different(a, b):
    """Return in how many elements two arrays of one dtype differ in their bits; a NaN equals every NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    bits = f"u{a.itemsize}"
    unequal = a.view(bits) != b.view(bits)
    if a.dtype.kind not in "iu":
        unequal &= ~(np.isnan(a) & np.isnan(b))
    return int(unequal.sum())
