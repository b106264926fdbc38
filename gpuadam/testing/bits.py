"""Equality of arrays bit for bit, and a message that helps where there is none."""

import contextlib
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .. import backends
from ..groups import is_sequence
from ..kernels.view import Bits, a_kind
from .array_backends import array_backend

# format -> (its bits as integers, those of infinity)
FLOATS: dict[str, tuple[np.dtype, int]] = {
    "float16": (np.dtype("u2"), 0x7C00),
    "bfloat16": (np.dtype("u2"), 0x7F80),
    "float32": (np.dtype("u4"), 0x7F800000),
    "float64": (np.dtype("u8"), 0x7FF0000000000000),
}
SHOWN = 5


class Host(NamedTuple):
    """An array as it was, on the host."""

    bits: np.ndarray  # integers or booleans
    format: str


def assert_same_bits(actual, expected, name=""):
    """Raise AssertionError unless two arrays have the same shape, the same format and the same bits.

    actual, expected: NumPy, CuPy or Numba device arrays, torch tensors, what has DLPack or `__cuda_array_interface__`, `Bits`, of
        floats, integers or booleans; or numbers; or sequences or dicts of such, None in the same places. They may lie in
        different memory and be of different libraries.
    name: what the message calls them.

    NaN equals NaN, whatever its payload; -0 differs from +0. The message says how many elements differ, where the first are, both
    values and their bits, and how many units in the last place (ulp) lie between.

    >>> assert_same_bits(np.float32([1, 2, np.nan]), np.float32([1, 2, np.nan]))
    >>> assert_same_bits(np.float32([1, 2, 0]), np.float32([1, 2.0000002, -0.0]), "w")
    Traceback (most recent call last):
    AssertionError: w: 2 of 3 elements differ in their bits (float32), by at most 1 ulp
      at [1]: 2.0 0x40000000, expected 2.0000002 0x40000001, 1 ulp
      at [2]: 0.0 0x00000000, expected -0.0 0x80000000, 0 ulp
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if actual.keys() != expected.keys():
            raise AssertionError(f"{name or 'actual'} has the keys {list(actual)}, expected {list(expected)}")
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{name}[{key!r}]")
    elif _several(expected) and _several(actual):
        if len(actual) != len(expected):
            raise AssertionError(f"{name or 'actual'} has {len(actual)} arrays, expected {len(expected)}")
        for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, b, f"{name}[{k}]")
    elif (actual is None) != (expected is None):
        raise AssertionError(f"{name or 'actual'} is {_what(actual)}, expected {_what(expected)}")
    elif expected is not None:
        label = name or "the arrays"
        _assert_same(on_host(label, actual), on_host(label, expected), label)


def _several(x):
    return is_sequence(x) and type(x) not in (Bits, Host)


def _what(x):
    return "None" if x is None else f"{a_kind(x)}"


def on_host(name, array):
    """Return the Host of an array, which may be anywhere, or of a number."""
    if type(array) is Host:
        return array
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
    if isinstance(array, (bool, int, float, np.generic)):
        array = np.asarray(array)
    kernels, (view,) = backends.choose([(name, array)], backends.home(name, array))
    values = view.array
    if kernels.name != "numba-cpu":
        values = array_backend(kernels.name).numpy(values)
    if view.format in FLOATS:
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        return Host(native.view(FLOATS[view.format][0]), view.format)
    if view.dtype.kind not in "biu":
        raise TypeError(f"{name} has dtype {view.dtype}: bits are compared of {', '.join(FLOATS)}, integers and booleans")
    return Host(values, view.format)


def different(actual, expected):
    """Return where the bits of two Hosts differ, a NaN being equal to every NaN."""
    apart = actual.bits != expected.bits
    if actual.format in FLOATS and apart.any():
        apart &= ~(_is_nan(actual) & _is_nan(expected))
    return apart


def _is_nan(host):
    dtype, infinity = FLOATS[host.format]
    return host.bits << 1 > dtype.type(infinity << 1)


def _assert_same(actual, expected, name):
    if actual.format != expected.format:
        raise AssertionError(f"{name}: the elements are {actual.format}, expected {expected.format}")
    if actual.bits.shape != expected.bits.shape:
        raise AssertionError(f"{name}: the shape is {actual.bits.shape}, expected {expected.bits.shape}")
    apart = different(actual, expected)
    if apart.any():
        raise AssertionError(_message(actual, expected, np.atleast_1d(apart), name))


def _message(actual, expected, apart, name):
    mine, theirs = (np.atleast_1d(host.bits)[apart] for host in (actual, expected))
    count, total = len(mine), apart.size
    lines = [f"{name}: {count:,} of {total:,} elements differ in their bits ({actual.format})"]
    rows: list[tuple] = [(f"{a}", f"{b}", "") for a, b in zip(mine[:SHOWN], theirs[:SHOWN], strict=True)]
    if actual.format in FLOATS:
        ulps, n_digits = _ulps(mine, theirs, actual.format), 2 * mine.itemsize
        one_nan = _is_nan(Host(mine, actual.format)) | _is_nan(Host(theirs, actual.format))
        if not one_nan.all():
            lines[0] += f", by at most {int(ulps[~one_nan].max()):,} ulp"
        if one_nan.any():
            lines[0] += f"; {int(one_nan.sum()):,} NaN on one side alone"
        rows = [
            (f"{_value(a, actual.format)} {a:#0{n_digits + 2}x}", f"{_value(b, actual.format)} {b:#0{n_digits + 2}x}",
             "" if nan else f", {int(ulp):,} ulp")
            for a, b, ulp, nan in zip(mine[:SHOWN], theirs[:SHOWN], ulps, one_nan, strict=False)
        ]  # fmt: skip
    places = np.argwhere(apart.reshape(actual.bits.shape))
    for place, (a, b, distance) in zip(places, rows, strict=False):
        lines.append(f"  at {[int(i) for i in place]}: {a}, expected {b}{distance}")
    if count > SHOWN:
        lines.append(f"  and {count - SHOWN:,} more")
    return "\n".join(lines)


def _value(bits, format):
    return str((np.uint32(bits) << np.uint32(16)).view("f4") if format == "bfloat16" else bits.view(format))


def _ulps(a, b, format):
    """Return how many numbers of the format lie from one to the other, as uint64; from -0 to +0 it is 0."""
    sign = np.uint64(1) << np.uint64(8 * FLOATS[format][0].itemsize - 1)
    a, b = a.astype("u8"), b.astype("u8")
    magnitude_a, magnitude_b = a & ~sign, b & ~sign
    same_side = (a & sign) == (b & sign)
    apart = np.maximum(magnitude_a, magnitude_b) - np.minimum(magnitude_a, magnitude_b)
    return np.where(same_side, apart, magnitude_a + magnitude_b)


@contextlib.contextmanager
def unchanged(**things):
    """Assert that a block leaves arrays, and the state of optimizers with its step counts, bit for bit as they were.

    things: by the names that a message calls them: arrays, numbers, sequences or dicts of such, or what has a `state_dict`.

    >>> import gpuadam
    >>> w = np.ones(3, "float32")
    >>> opt = gpuadam.Adam(w)
    >>> with unchanged(w=w, opt=opt):
    ...     opt.step(np.float32([1, np.inf, 2]), check_finite=True)
    """
    before = {name: _kept(thing, name) for name, thing in things.items()}
    yield
    for name, thing in things.items():
        assert_same_bits(_kept(thing, name), before[name], name)


def _kept(thing, name):
    """Return the same structure with a Host copy in each array's place."""
    if hasattr(thing, "state_dict"):
        found = thing.state_dict()
        # an optimizer's `steps` counts calls: it cannot know of a step that the device leaves out
        return _kept({key: found[key] for key in found if key != "steps"}, name)
    if isinstance(thing, Mapping):
        return {key: _kept(value, f"{name}[{key!r}]") for key, value in thing.items()}
    if _several(thing):
        return [_kept(value, f"{name}[{k}]") for k, value in enumerate(thing)]
    if thing is None or isinstance(thing, str):
        return None
    bits, format = on_host(name, thing)
    return Host(bits.copy(), format)
