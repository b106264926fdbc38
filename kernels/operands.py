"""The operands of an update, their order, and their formats in memory.

An update has *operands*, the arrays that its kernel touches, and *values*, what its rule takes and returns of one element. Most
operands hold one value each. `param` and `remainder` hold one between them, and `param_copy` holds param once more.

An element is mostly one number. Where several share a v, as both parts of a complex number may, an element is a vector of them:
so are the values of most operands, and v, max_v, lr_scale and where have one number for it.

A loop knows neither: it asks for an element's values, and hands over the new ones. `numba_access.py` and `cuda_c_access.py` write
these loads and stores from a Form.
"""

import functools
from typing import NamedTuple

import numpy as np

from gpuadam.kernels.layout import lanes

FORMATS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint8": 1}  # name: bytes of an element
NARROW = ("bfloat16", "float16")  # formats of floats that are not computed with

# The state format "8bit": m and v are codes of a byte, and neighbours in C order share their scales.
GROUP = 32
GROUP_LANES = 8  # elements of a group that a thread of a GPU takes; 16 would take too many registers

# The arguments of a rule, in its order
VALUES = "param", "grad", "m", "v", "max_v", "ema", "lr_scale", "where", "low", "high"
RESULTS = ("param", "m", "v", "max_v", "ema")
STATE = ("m", "v", "max_v")
# What codes of 8-bit state are made of: m, and the root of v, which a rule then returns in max_v's place
OF_CODES = RESULTS.index("m"), RESULTS.index("max_v")


class Kind(NamedTuple):
    """An operand that an update may have, whatever the format of its array."""

    formats: tuple[str, ...]  # that the array may have
    of_groups: bool = False  # it has an element for each group of neighbours, not for each of param's
    shared: bool = False  # it has one number for each element, however many numbers param has there


_FLOATS = ("float32", "float64", *NARROW)
_MOMENTS = ("float32", "float64", "bfloat16", "uint8")  # v would underflow in float16
KINDS = {  # by name, in the order in which kernels take them
    "param": Kind(_FLOATS),
    "grad": Kind(_FLOATS),
    "m": Kind(_MOMENTS),
    "v": Kind(_MOMENTS, shared=True),
    "max_v": Kind(_MOMENTS, shared=True),
    "remainder": Kind(("int16", "uint16")),
    "param_copy": Kind(_FLOATS),
    "ema": Kind(("float32", "float64")),  # a running mean would not move in fewer bits
    "change": Kind(_FLOATS),
    "lr_scale": Kind(("float32", "float64"), shared=True),
    "where": Kind(("bool", "uint8"), shared=True),
    "low": Kind(_FLOATS),
    "high": Kind(_FLOATS),
    "m_scale": Kind(("float32",), of_groups=True),
    "v_scale": Kind(("float32",), of_groups=True),
}

# The values of operands that do not hold their own. With `change` a rule returns the change in param's place.
VALUE_OF = dict.fromkeys(("param_copy", "remainder", "change"), "param")

# Where in an element's 32 random bits are the 16 by which an operand is rounded. The upper half of each, which matters most, is
# the upper half of no other.
_RANDOM_BITS_FROM = {"param": 0, "m": 16, "v": 8, "max_v": 24}


def is_written(name, names, zero_grad):
    """Whether an update of the operands `names` writes one of them. zero_grad: it stores zeros in grad.

    >>> is_written("param", ("param", "grad", "m", "v"), False), is_written("param", ("param", "grad", "m", "v", "change"), False)
    (True, False)
    """
    if name == "param":
        return "change" not in names
    return zero_grad if name == "grad" else name not in ("lr_scale", "where", "low", "high")


class Operand(NamedTuple):
    """An array that a kernel touches."""

    name: str
    format: str
    loads: bool
    stores: bool
    of_groups: bool  # it has an element for each group of neighbours, not for each of param's
    value: str  # the one of RESULTS that it stores; "": it stores nothing, zeros, or codes and scales of 8-bit state
    encoding: str  # the row of CONVERSIONS that makes stored bits of that value, a float32; "": the value itself is stored
    random_bits_from: int | None  # the first of the 16 bits by which it is rounded randomly; None: it is rounded to nearest
    numbers: int = 1  # that it has of each element

    @property
    def itemsize(self):
        """The bytes of an element."""
        return self.numbers * FORMATS[self.format]

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
    change: str = ""  # what would be added to param is stored here, and param stays
    lr_scale: str = ""  # the learning rate of each element is multiplied by this
    where: str = ""  # elements stay where an array is 0, of flags ("array") or the gradient ("nonzero")
    low: str = ""  # the new param is not below this
    high: str = ""  # nor above this
    numbers: int = 1  # of an element, which share a v

    @classmethod
    def of(cls, formats, stochastic=False, nonzero=False, numbers=1):
        """Return the Arrays of an update.

        formats: operand -> the format of its array. stochastic: a narrow param is rounded randomly. nonzero: elements whose
        gradient is 0 stay. numbers: of an element.
        """
        param, m = formats["param"], formats["m"]
        kept = ("param", "grad", "param_copy", "ema", "change", "lr_scale", "low", "high")
        return cls(
            **{operand: formats[operand] for operand in kept if operand in formats},
            state="8bit" if m == "uint8" else m,
            amsgrad="max_v" in formats,
            remainder="remainder" in formats,
            stochastic=stochastic and param in ("bfloat16", "float16"),
            where="nonzero" if nonzero else "array" if "where" in formats else "",
            numbers=numbers,
        )

    @property
    def compute(self):
        """The type that is computed with: float64 if one of the arrays is, else float32."""
        return np.dtype("float64" if "float64" in self else "float32")

    @property
    def bounded(self):
        """Whether there are arrays of bounds."""
        return self.low != "" or self.high != ""

    @property
    def grouped(self):
        """Whether there are groups of neighbours in C order that share scales."""
        return self.state == "8bit"

    @property
    def random(self):
        """Whether a number is rounded randomly, by its place in C order. Narrow state always is: it would not move otherwise."""
        return self.grouped or any(operand.random_bits_from is not None for operand in operands_of(self))


@functools.lru_cache(maxsize=256)
def operands_of(arrays, zero_grad=False, reads_param=True):
    """Return the Operands of an update, in the order in which kernels take them.

    zero_grad: the kernel stores zeros in grad. reads_param: the rule looks at the parameter.
    """
    moment, scale = ("uint8", "float32") if arrays.grouped else (arrays.state, "")
    formats = arrays._asdict() | {"m": moment, "v": moment, "m_scale": scale, "v_scale": scale}
    formats["max_v"] = arrays.state if arrays.amsgrad else ""
    formats["remainder"] = "int16" if arrays.remainder else ""
    formats["where"] = "uint8" if arrays.where == "array" else ""
    there = [name for name in KINDS if formats[name]]

    def operand(name, kind):
        format = formats[name]
        coded, stores = kind.of_groups or format == "uint8", is_written(name, there, zero_grad)
        random = format in NARROW and (name in STATE or (name == "param" and arrays.stochastic and stores))
        encoding = f"to_{format}{'_randomly' if random else ''}" if format in NARROW else ""
        if arrays.remainder:
            encoding = {"param": "high_part", "remainder": "low_part"}.get(name, encoding)
        return Operand(
            name,
            format,
            loads=reads_param if name == "param" else name not in ("param_copy", "change"),
            stores=stores,
            of_groups=kind.of_groups,
            value="" if name == "grad" or coded or not stores else VALUE_OF.get(name, name),
            encoding=encoding,
            random_bits_from=_RANDOM_BITS_FROM[name] if random else None,
            numbers=1 if kind.shared else arrays.numbers,
        )

    return tuple(operand(name, KINDS[name]) for name in there)


def decodings(form):
    """Return how each of VALUES is decoded, by its name: the row of CONVERSIONS, and the operands that the row takes.

    A row "" takes one operand, the number itself. The operands "m_unit" and "v_unit" are results of the rows of these names. A
    rule does not look at values that its form does not have; other values take their place.
    """
    rows, loaded = {}, [operand for operand in operands_of_form(form) if operand.loads]
    for o in loaded:
        coded = o.format == "uint8" and o.name in STATE
        row = f"from_{o.name}_code" if coded else f"from_{o.format}" if o.format in (*NARROW, "uint8") else ""
        rows[o.name] = row, (o.name, *((f"{o.name}_unit",) if coded else ()))
    if form.arrays.remainder:
        rows["param"] = "from_parts", ("param", "remainder")
    return {name: rows.get(name) or rows["v" if KINDS[name].shared else "grad"] for name in VALUES}


def operands_of_form(form):
    """Return the Operands of an update of a Form."""
    return operands_of(form.arrays, form.zero_grad, form.reads_param)


def sharing(is_complex, complex, components):
    """Return how many numbers of a parameter share a v. complex, components: as in `Adam`.

    >>> sharing(True, "joint", 3), sharing(True, "parts", 3), sharing(False, "joint", 3)
    (2, 1, 3)
    """
    if is_complex:
        return 2 if complex == "joint" else 1
    return components


def widened(array, format):
    """Return an array of NumPy or CuPy as one that they can widen: a bfloat16's bits are the upper half of a float32's."""
    if format == "bfloat16":
        return (array.view("uint16").astype("uint32") << 16).view("float32")
    return array.view("float16") if format == "float16" else array  # of integers, if it was in Bits


def lanes_of(form):
    """Return how many elements a thread of a GPU takes at once: 16 bytes of the narrowest floats, but 8 codes of 8-bit state."""
    if form.arrays.grouped:
        return GROUP_LANES
    return lanes(operand.itemsize for operand in operands_of_form(form))


def bytes_per_element(form):
    """Return the bytes that an update reads and writes of each element: of a number, a complex one, or a vector."""
    return bytes_moved_of(operands_of_form(form), GROUP) / GROUP


def bytes_moved_of(operands, n):
    """Return the bytes that an update of n elements reads and writes, exactly."""
    return sum(o.nbytes(n) * (o.loads + o.stores) for o in operands)
