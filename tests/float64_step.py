"""One step against float64: from what the arrays held before it, and with what roundings may add to each element.

Every step begins from the numbers that are stored, whatever their format, so that errors do not pile up: a step of bfloat16 or
8-bit state is held to its own last rounding.
"""

import narrow_model as model
import numpy as np

from gpuadam import reference
from gpuadam.testing.bits import FLOATS

VALUES = ("param", "grad", "m", "v", "max_v", "ema")
RESULTS = ("param", "m", "v", "max_v", "ema")  # of the reference
ROUNDINGS = 12  # of the compute type, by which an operand may be off before it has its part in the result
TOO_LARGE = 1e15  # a number from here on may overflow float32 where float64 does not
SMALLEST_ROOT = 2 * model.SMALLEST_ROOT


def check_step(before, after, step, options, stochastic):
    """Raise AssertionError where a step left another number than the papers' in float64, by more than its roundings.

    before, after: operand -> NumPy array, of ml_dtypes where it is bfloat16; before has the gradient. options: of
        `reference.adam_step`. stochastic: whether a narrow param is rounded randomly.
    """
    with np.errstate(all="ignore"):
        values, new = (_numbers(arrays, options.get("components", 1)) for arrays in (before, after))
        exact, tolerance = _expected(values, step, options, _unit(before, step, options))
        ordinary = np.ones(values["param"].shape, bool)
        for numbers in (*values.values(), *exact.values()):
            ordinary &= np.abs(numbers) < TOO_LARGE
        if "m_scale" in after:
            ordinary = _of_groups(ordinary, np.all)
            _allow_codes(new, exact, tolerance)
        if "change" in after:
            assert after["param"].tobytes() == before["param"].tobytes(), "param has changed, with change="
            change = after["change"]
            _compare(
                "change", change.astype("f8"), exact.pop("param") - values["param"], tolerance["param"], change.dtype.name,
                False, ordinary,
            )  # fmt: skip
        for name in sorted(exact, key=("m", "v", "max_v", "param", "ema").index):  # from cause to effect
            format = "float32" if name == "param" and "remainder" in after else after[name].dtype.name
            random = format == "bfloat16" if name != "param" else stochastic
            _compare(name, new[name], exact[name], tolerance[name], format, random, ordinary)
        if "param_copy" in after:
            copy = after["param_copy"]
            _compare("param_copy", copy.astype("f8"), exact["param"], tolerance["param"], copy.dtype.name, False, ordinary)


def _numbers(arrays, components):
    """Return the numbers that the arrays of an update stand for, in float64 and param's shape."""
    numbers = {name: arrays[name].astype("f8") for name in VALUES if name in arrays}
    if components > 1:
        shared = {name: numbers[name][..., None] for name in ("v", "max_v") if name in arrays}
        numbers |= {name: np.broadcast_to(x, arrays["param"].shape) for name, x in shared.items()}
    if "remainder" in arrays:
        numbers["param"] = model.whole(arrays["param"], arrays["remainder"]).astype("f8")
    if "m_scale" in arrays:
        codes = (arrays[name].reshape(-1) for name in ("m", "v"))
        decoded = model.decoded_codes(*codes, arrays["m_scale"], arrays["v_scale"])
        for name, of_name in zip(("m", "v"), decoded, strict=True):
            numbers[name] = of_name.astype("f8").reshape(arrays[name].shape)
    return numbers


def _unit(arrays, step, options):
    """Return the unit roundoff of what a step is computed in."""
    if all(array.dtype != "f8" for array in arrays.values()):
        return FLOATS["float32"].unit_roundoff
    # float64 is also what scalars are computed in: a power of beta is off by a unit for each step, and then taken from 1
    beta1, beta2 = options["betas"]
    lost = 1 / (1 - max(beta1, beta2)) + step
    if options["algorithm"] == "radam":  # its rho is taken from a number of this size
        lost *= 2 / (1 - beta2)
    return FLOATS["float64"].unit_roundoff * (8 + lost)


def _expected(values, step, options, unit):
    """Return name -> new numbers, and name -> how far each may be off before it is stored."""
    exact = _in_float64(values, step, options)
    tiny = float(np.finfo("f4" if unit > 1e-8 else "f8").smallest_normal)  # below which state becomes zero
    tolerance = {name: np.full(numbers.shape, tiny) for name, numbers in exact.items()}
    for name in {"param", "ema"} & exact.keys():
        tolerance[name] = tolerance[name] + ROUNDINGS * unit * np.abs(exact["param"] - values["param"])
    divisor = exact.get("max_v", exact["v"])
    tolerance["m"] = np.where(divisor < 2 * tiny, np.abs(exact["m"]) + tiny, tolerance["m"])  # m is flushed with it
    # a gradient that was clipped does not move with the one that was given
    given = values | ({"clip_value": options["clip_value"]} if options.get("clip_value") else {})
    for moved, numbers in given.items():
        moves = [_in_float64(values, step, options, {moved: numbers * (1 + s * ROUNDINGS * unit)}) for s in (1, -1)]
        for name, of_exact in exact.items():
            tolerance[name] = tolerance[name] + np.maximum(*(np.abs(of_moved[name] - of_exact) for of_moved in moves))
    return exact, tolerance


def _in_float64(values, step, options, moved=()):
    results = reference.adam_step(**{"step": step} | values | options | dict(moved))
    return {name: result for name, result in zip(RESULTS, results, strict=False) if result is not None}


def _allow_codes(new, exact, tolerance):
    """Compare v of 8-bit state by its root, and allow a code's distance to the next."""
    root = np.sqrt(exact["v"])
    tolerance["v"] = root - np.sqrt(np.maximum(exact["v"] - tolerance["v"], 0)) + SMALLEST_ROOT
    new["v"], exact["v"] = np.sqrt(new["v"]), root
    lost = _of_groups(root, np.max) < SMALLEST_ROOT  # such a group is zero
    tolerance["m"] = tolerance["m"] + np.where(lost, np.abs(exact["m"]), 0) + model.SMALLEST_M
    for name, numbers, bits in (("m", model.M_NUMBERS, 4), ("v", model.V_NUMBERS, 5)):
        largest = _of_groups(np.abs(exact[name]) + tolerance[name], np.max)
        distance = (np.abs(exact[name]) + 2.0**-7 * largest / numbers[-1]) * 2.0**-bits
        tolerance[name] = tolerance[name] + distance + 2.0**-18 * largest


def _of_groups(numbers, of_group):
    """Return for each element what a function makes of its group's numbers."""
    flat = numbers.reshape(-1)
    starts = np.arange(0, flat.size, model.GROUP)
    reduced = [of_group(flat[start : start + model.GROUP]) for start in starts]
    return model.of_elements(np.array(reduced, flat.dtype), flat.size).reshape(numbers.shape)


def _compare(name, actual, exact, tolerance, format, random, ordinary):
    coded = format == "uint8"
    stored = FLOATS["float32" if coded else format]
    reach = np.abs(exact) + tolerance
    if not coded:
        narrowed = 0.0 if format == "float64" else FLOATS["float32"].unit_roundoff  # on the way to 16 bits
        tolerance = tolerance + (1 + random) * (stored.unit_roundoff * reach + stored.smallest) + narrowed * reach
    overflows = np.isinf(actual) & (actual * exact > 0) & (reach > stored.largest * (1 - stored.unit_roundoff))
    far = ordinary & ~overflows & ~(np.abs(actual - exact) <= tolerance)
    if far.any():
        at = tuple(np.argwhere(far)[0].tolist())
        what = "the root of v" if coded and name == "v" else name
        raise AssertionError(
            f"{what}: {int(far.sum())} of {far.size} elements differ from float64 by more than roundings. At {list(at)}: "
            f"{actual[at]:.9g}, in float64 {exact[at]:.9g}, tolerance {tolerance[at]:.2g}"
        )
