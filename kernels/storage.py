"""How the arrays of an update lie in memory: their formats, and how numbers of a format become numbers to compute with and back.

An update has *operands*, the arrays that its kernel touches, and *values*, the numbers of one element that its rule takes and
gives. Most operands hold one value each. `param` and `remainder` hold one between them, `param_copy` holds param once more.

A loop knows neither: it asks for an element's values, and hands over the new ones. How that is done is written from a Form by
`storage_numba.py` and `storage_cuda_c.py`.
"""

import functools
from typing import NamedTuple

import numpy as np

from gpuadam.kernels.layout import VECTOR_BYTES

# name: bytes of an element
FORMATS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint8": 1}

# The state format "8bit": m and v are codes of a byte, and neighbours in C order share their scales.
GROUP = 32
GROUP_LANES = 8  # elements of a group that a thread of a GPU takes; 16 would take too many registers

# What a rule takes, in its order; it gives all but grad.
VALUES = ("param", "grad", "m", "v", "max_v", "ema")


# Where a rule's results have the state. Of 8-bit state it gives the root of v in max_v's place.
STATE = {"m": 1, "v": 2, "max_v": 3}


class Operand(NamedTuple):
    """An array that a kernel touches."""

    name: str
    format: str
    loads: bool = True
    stores: bool = True
    of_groups: bool = False  # it has an element for each group, not for each of param's

    @property
    def itemsize(self):
        return FORMATS[self.format]

    def nbytes(self, n):
        """Return its bytes for n elements of param."""
        return self.itemsize * (-(-n // GROUP) if self.of_groups else n)


class Arrays(NamedTuple):
    """The formats of an update's arrays; an empty one means that there is no such array."""

    param: str = "float32"
    grad: str = "float32"
    state: str = "float32"  # of m, v and max_v; or "8bit"
    amsgrad: bool = False
    remainder: bool = False  # param is bfloat16, and with 16 bits more in another array an exact float32
    param_copy: str = ""  # the new param, rounded, is stored here too
    ema: str = ""  # the running mean of param
    stochastic: bool = False  # a narrow param is rounded randomly

    @property
    def compute(self):
        """The type that is computed with: float64 if one of the arrays is, else float32."""
        return np.dtype("float64" if "float64" in self else "float32")

    @property
    def grouped(self):
        """Whether there are groups of neighbours in C order that share scales."""
        return self.state == "8bit"

    @property
    def random(self):
        """Whether a number is rounded randomly, by its place in C order. Narrow state always is: it would not move otherwise."""
        return self.grouped or any(is_random(self, operand) for operand in operands(self))


@functools.lru_cache(maxsize=256)
def operands(arrays, zero_grad=False):
    """Return the Operands of an update, in the order in which kernels take them."""
    found = [
        Operand("param", arrays.param),
        Operand("grad", arrays.grad, stores=zero_grad),
        Operand("m", "uint8" if arrays.grouped else arrays.state),
        Operand("v", "uint8" if arrays.grouped else arrays.state),
    ]
    if arrays.amsgrad:
        found.append(Operand("max_v", arrays.state))
    if arrays.remainder:
        found.append(Operand("remainder", "int16"))
    if arrays.param_copy:
        found.append(Operand("param_copy", arrays.param_copy, loads=False))
    if arrays.ema:
        found.append(Operand("ema", arrays.ema))
    if arrays.grouped:
        found += [Operand("m_scale", "float32", of_groups=True), Operand("v_scale", "float32", of_groups=True)]
    return tuple(found)


def of_form(form):
    return operands(form.arrays, form.zero_grad)


def widened(array, format):
    """Return an array of NumPy or CuPy as one that they can widen: a bfloat16's bits are the upper half of a float32's."""
    return (array.view("uint16").astype("uint32") << 16).view("float32") if format == "bfloat16" else array


def lanes(form):
    """Return how many elements a thread of a GPU takes at once: 16 bytes of the narrowest array, but 8 codes of 8-bit state."""
    if form.arrays.grouped:
        return GROUP_LANES
    return VECTOR_BYTES // min(operand.itemsize for operand in of_form(form))


def bytes_moved(form):
    """Return the bytes that an update reads and writes of each element."""
    return bytes_moved_of(of_form(form), GROUP) / GROUP


def bytes_moved_of(operands, n):
    """Return the bytes that an update of n elements reads and writes, exactly."""
    return sum(o.nbytes(n) * (o.loads + o.stores) for o in operands)


def is_random(arrays, operand):
    """Whether an operand is rounded randomly."""
    if operand.format not in ("bfloat16", "float16"):
        return False
    return operand.name in ("m", "v", "max_v") or (operand.name == "param" and arrays.stochastic)


# Where in an element's 32 random bits are the 16 by which an operand is rounded. The upper half of each, which matters most, is
# the upper half of no other.
RANDOM_BITS_FROM = {"param": 0, "m": 16, "v": 8, "max_v": 24}
