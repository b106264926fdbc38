"""Equality of arrays bit for bit, and a message that says where they differ."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import backends, torch_tensors
from ..clipping import named_arrays
from ..kernels.messages import shortened
from ..kernels.operands import widened


class FloatFormat(NamedTuple):
    """A format of numbers."""

    bits: np.dtype  # the integers that its bits are compared as
    unit_roundoff: float  # how much one rounding to nearest may change a number, relative to it
    smallest: float
    largest: float


FLOATS = {
    "float16": FloatFormat(np.dtype("u2"), 2.0**-11, 2.0**-24, (2 - 2.0**-10) * 2.0**15),
    "bfloat16": FloatFormat(np.dtype("u2"), 2.0**-8, 2.0**-133, (2 - 2.0**-7) * 2.0**127),
    "float32": FloatFormat(np.dtype("u4"), 2.0**-24, 2.0**-149, (2 - 2.0**-23) * 2.0**127),
    "float64": FloatFormat(np.dtype("u8"), 2.0**-53, 2.0**-1074, (2 - 2.0**-52) * 2.0**1023),
}
SHOWN = 5  # elements in a message


@dataclasses.dataclass(frozen=True)
class Host:
    """A copy of an array on the host."""

    bits: np.ndarray  # integers or booleans; of complex numbers those of both parts, in a last dimension of 2
    format: str
    of_complex: bool = False

    @property
    def numbers(self):
        """The numbers that the bits stand for; of bfloat16 in float32."""
        return widened(self.bits, self.format) if self.format == "bfloat16" else self.bits.view(self.format)


def assert_same_bits(actual: Any, expected: Any, name: str = "") -> None:
    """Raise AssertionError unless two arrays have the same shape, the same format and the same bits.

    actual, expected: NumPy, CuPy or Numba device arrays, torch tensors, what has DLPack or `__cuda_array_interface__`, `Bits`, of
        floats, complex numbers, integers or booleans; or numbers; or sequences or dicts of such, None in the same places. They
        may lie in different memory and be of different libraries.
    name: what the message calls them.

    NaN equals NaN, whatever its payload; -0 differs from +0. The message says how many elements differ, where the first are, both
    values and their bits, and how many units in the last place (ulp) lie between.

    >>> assert_same_bits(np.array([1, 2, np.nan], "float32"), np.array([1, 2, np.nan], "float32"))
    >>> assert_same_bits(np.array([1, 2, 0], "float32"), np.array([1, 2.0000002, -0.0], "float32"), "w")
    Traceback (most recent call last):
    AssertionError: w: 2 of 3 elements differ in their bits (float32), by at most 1 ulp
      at [1]: 2.0 0x40000000, expected 2.0000002 0x40000001, 1 ulp
      at [2]: 0.0 0x00000000, expected -0.0 0x80000000, 0 ulp
    """
    _compare(dict(named_arrays(name, actual)), dict(named_arrays(name, expected)), name)


def _compare(actual, expected, name=""):
    """Compare dicts of arrays, by the names that the message calls them."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"{name or 'actual'} has {_arrays(actual, name)}, expected {_arrays(expected, name)}")
    for key in expected:
        label = shortened(key) or "the arrays"
        one, other = on_host(label, actual[key]), on_host(label, expected[key])
        if one.format != other.format:
            raise AssertionError(f"{label}: the elements are {one.format}, expected {other.format}")
        if one.bits.shape != other.bits.shape:
            raise AssertionError(f"{label}: the shape is {one.bits.shape}, expected {other.bits.shape}")
        apart = different(one, other)
        if apart.any():
            raise AssertionError(f"{label}: {_message(one, other, apart)}")


def _arrays(named, name):
    """Return in words which arrays there are. Their names have quotes of their own."""
    if not named:
        return "no arrays"
    return "one array alone" if list(named) == [name] else f"the arrays {shortened(', '.join(named), 1000)}"


def on_host(name, array):
    """Return the Host of an array, which may be anywhere, or of a number."""
    if type(array) is Host:
        return array
    if torch_tensors.is_tensor(array):
        array = array.detach().cpu()
    if isinstance(array, (bool, int, float, complex, np.generic)):
        array = np.asarray(array)
    name = shortened(name)
    kernels, (view,) = backends.choose([(name, array)], backends.home(name, array))
    if view.format not in FLOATS and view.dtype.kind not in "biu":
        raise TypeError(
            f"{name} has dtype {shortened(str(view.dtype))}: bits are compared of {', '.join(FLOATS)}, complex numbers, "
            "integers and booleans"
        )
    values = kernels.to_host(view.array)
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    bits = native.view(FLOATS[view.format].bits) if view.format in FLOATS else native
    return Host(bits, view.format, bool(view.of_complex))


def different(actual, expected):
    """Return where the bits of two Hosts differ. A NaN equals every NaN."""
    apart = actual.bits != expected.bits
    if actual.format in FLOATS and apart.any():
        apart &= ~(np.isnan(actual.numbers) & np.isnan(expected.numbers))
    return apart


def _message(actual, expected, apart):
    one, other = (Host(np.atleast_1d(host.bits)[np.atleast_1d(apart)], host.format) for host in (actual, expected))
    count, distances = len(one.bits), [""] * SHOWN
    first = f"{count:,} of {apart.size:,} elements differ in their bits ({actual.format})"
    if actual.format in FLOATS:
        ulps, nan = _ulps(one, other), np.isnan(one.numbers) | np.isnan(other.numbers)
        first += f", by at most {int(ulps[~nan].max()):,} ulp" if not nan.all() else ""
        first += f"; {int(nan.sum()):,} NaN on one side alone" if nan.any() else ""
        distances = ["" if nan[k] else f", {int(ulps[k]):,} ulp" for k in range(min(count, SHOWN))]
    lines = [first]
    for k, place in enumerate(np.argwhere(apart)[:SHOWN].tolist()):
        lines.append(f"  at {place}: {_shown(one, k)}, expected {_shown(other, k)}{distances[k]}")
    if count > SHOWN:
        lines.append(f"  and {count - SHOWN:,} more")
    return "\n".join(lines)


def _shown(host, k):
    digits = f" {host.bits[k]:#0{2 * host.bits.itemsize + 2}x}" if host.format in FLOATS else ""
    return str(host.numbers[k]) + digits


def _ulps(one, other):
    """Return how many numbers of their format lie from one number to the other, as uint64; from -0 to +0 it is 0."""
    sign = np.uint64(1) << np.uint64(8 * one.bits.itemsize - 1)

    def in_order(bits):
        """Return integers that are in the order of the numbers, and the same for both zeros."""
        bits = bits.astype("u8")
        return np.where(bits & sign, sign - (bits & ~sign), sign + bits)

    a, b = in_order(one.bits), in_order(other.bits)
    return np.maximum(a, b) - np.minimum(a, b)


@contextlib.contextmanager
def unchanged(**things: Any) -> Iterator[None]:
    """Assert that a block leaves arrays, and the state of optimizers with its step counts, bit for bit as they were.

    things: by the names that a message calls them: arrays, numbers, sequences or dicts of such, or what has a `state_dict`.

    >>> import numpy as np, gpuadam
    >>> from gpuadam.testing import unchanged
    >>> w = np.ones(3, "float32")
    >>> opt = gpuadam.Adam(w)
    >>> with unchanged(w=w, opt=opt):
    ...     opt.step(np.array([1, np.inf, 2], "float32"), check_finite=True)
    """
    before = _arrays_in(things)
    yield
    _compare(_arrays_in(things), before)


def _arrays_in(things):
    """Return the Hosts of all arrays and numbers in things, by name."""
    hosts: dict[str, Host] = {}
    for name, thing in things.items():
        if hasattr(thing, "state_dict"):
            # an optimizer's `steps` counts calls: it cannot know of a step that the device leaves out
            thing = {key: value for key, value in thing.state_dict().items() if key != "steps"}
        hosts |= {key: on_host(key, array) for key, array in named_arrays(name, thing) if not isinstance(array, str)}
    return hosts
