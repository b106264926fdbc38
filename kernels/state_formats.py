"""The formats of moments in NumPy, for conversions between them. A step converts by the rows of `conversions.py`.

What is stored is read as a step reads it, bit for bit. It is rounded to nearest, and not randomly as in a step: a conversion is
made once, so nothing adds up that has to be right on average, and to nearest the error of each number is half as large. Nor does
the result depend on a seed or on the place of a parameter.

8-bit state: in groups of 32 neighbours that share two float32 scales, the largest |m| and the largest sqrt(v) among them. A code
is the exponent and the first bits of a float between 2**-7 and 2, less 2**-7: linear within each power of two, and as many codes
to each. m has a sign, 3 bits of exponent and 4 more, the root of v 3 and 5.

A unit is the value of a 1 among a group's codes, its scale over the largest code. The inverse is a millionth too small so that
no product passes that code. A group with a NaN or an infinity becomes NaN; one whose roots are all below 2**-50 becomes 0, so
that nothing decoded is ever subnormal, and m becomes 0 where all are below 2**-114. v is never 0 where m is not.
"""

import numpy as np

from gpuadam.kernels.operands import GROUP, widened

BIAS, BIAS_BITS = 2.0**-7, 120 << 23
M_LARGEST, V_LARGEST = 1.9296875, 1.9609375
BELOW = 1 - 2.0**-20
INFINITY, M_SMALLEST, V_SMALLEST = 0x7F800000, 13 << 23, 77 << 23  # bits of float32
M_CUT, V_CUT = 19, 18  # how many bits of such a float a code leaves out


def decoded(array, format, key="", scale=None):
    """Return an array of a moment as float32, or as it is if it is float64. One dimension, whole groups but for the last.

    key: "m" or "v" of 8-bit state, of whose codes scale has the scales.

    >>> m, v = np.float32([0.5, -0.25]), np.float32([4.0, 1.0])
    >>> codes = in_8_bits(m, v)
    >>> decoded(codes["m"], "uint8", "m", codes["m_scale"]), decoded(codes["v"], "uint8", "v", codes["v_scale"]).round(3)
    (array([ 0.5       , -0.24898785], dtype=float32), array([4.   , 0.992], dtype=float32))
    """
    if format != "uint8":
        return widened(array, format)
    largest, cut, sizes = (M_LARGEST, M_CUT, array & 0x7F) if key == "m" else (V_LARGEST, V_CUT, array)
    with np.errstate(over="ignore", invalid="ignore"):
        unit = _of_elements(scale * np.float32(1 / largest), array.size).astype("f8")
        floats = (sizes.astype("u4") << cut | BIAS_BITS).view("f4")
        # exact in float64, so that it is rounded once, as by an fma
        number = (floats.astype("f8") * unit - BIAS * unit).astype("f4")
        return np.where(array & 0x80, -number, number) if key == "m" else number * number


def encoded(array, format):
    """Return floats in another format of floats, bfloat16 as uint16, rounded to nearest even.

    >>> [hex(x) for x in encoded(np.float32([1.0, 1.00390625, 1.01171875]), "bfloat16")]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    with np.errstate(over="ignore", under="ignore"):
        array = array.astype("float32" if format == "bfloat16" else format)
    if format != "bfloat16":
        return array
    bits = array.view("u4")
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype("u2")


def in_8_bits(m, v):
    """Return float32 moments of one dimension as codes and scales: "m", "v", "m_scale" and "v_scale"."""
    m, v = (encoded(x, "float32") for x in (m, v))
    with np.errstate(invalid="ignore"):
        sizes, roots = np.abs(m), np.sqrt(v)
    largest_m, largest_root = _largest_bits(sizes), _largest_bits(roots)
    bad = (largest_m >= INFINITY) | (largest_root >= INFINITY)
    has_v = ~bad & (largest_root >= V_SMALLEST)
    has_m = has_v & (largest_m >= M_SMALLEST)
    codes_m = _codes(sizes, largest_m, has_m, M_LARGEST, M_CUT) | np.where(np.signbit(m), 0x80, 0).astype("u4")
    codes_v = np.maximum(_codes(roots, largest_root, has_v, V_LARGEST, V_CUT), v != 0)  # v > 0 has no code 0
    codes = {"m": np.where(_of_elements(has_m, m.size), codes_m, 0), "v": np.where(_of_elements(has_v, v.size), codes_v, 0)}
    scales = {"m_scale": np.where(has_m, largest_m, 0), "v_scale": np.where(has_v, largest_root, 0)}
    return {key: x.astype("u1") for key, x in codes.items()} | {
        key: np.where(bad, 0x7FC00000, bits).astype("u4").view("f4") for key, bits in scales.items()
    }


def _largest_bits(x):
    """Return the largest number of each group, as bits: a NaN is larger than all others. x: not negative."""
    groups = np.zeros((-(-x.size // GROUP), GROUP), "u4")
    groups.reshape(-1)[: x.size] = x.view("u4") & 0x7FFFFFFF
    return groups.max(1, initial=0)


def _codes(x, largest, present, largest_code, cut):
    """Return the codes of the nearest numbers; of a group that is not present they mean nothing."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        inverse = np.float32(largest_code * BELOW) / np.where(present, largest, BIAS_BITS).astype("u4").view("f4")
        z = x.astype("f8") * _of_elements(inverse, x.size) + BIAS
        bits = np.where(_of_elements(present, x.size), z, BIAS).astype("f4").view("u4")
    return bits + (1 << cut - 1) >> cut & (1 << 26 - cut) - 1


def _of_elements(x, n):
    return np.repeat(x, GROUP)[:n]
