"""The arrays that a checkpoint has: which they are, what they are called in it, and how they become tensors of a file."""

from functools import partial
from typing import NamedTuple

from .. import backends
from ..kernels import array_bytes
from ..kernels.operands import GROUP
from ..kernels.view import Bits
from ..optimizer import OF_GROUPS
from .safetensors import Tensor

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int16": "I16", "uint8": "U8"}
PARAM = "param"  # beside the keys of the state


class Range(NamedTuple):
    """The elements start ... stop - 1 of a parameter, in C order."""

    param: str
    start: int
    stop: int


def place(key, start, stop):
    """Return which elements of an array belong to elements start ... stop - 1 of its parameter.

    >>> place("m", 4096, 5000), place("m_scale", 4096, 5000)
    ((4096, 5000), (128, 157))
    """
    return (start // GROUP, -(-stop // GROUP)) if key in OF_GROUPS else (start, stop)


def arrays_of(opt, ranges=None):
    """Return (Range, key) -> (backend, View) of the state of an `Adam`, and, with the key PARAM, of its parameters.

    ranges: name -> Range, of an optimizer whose parameters are parts of others.
    """
    found = {}
    for group in opt.groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            kernels, (view,) = backends.choose([(f"params[{name!r}]", param)], opt.backend)
            own = ranges[name] if ranges else Range(name, 0, view.size)
            found[own, PARAM] = kernels, view
            state = opt.state[name]
            for key in (key for key in state if key != "step"):
                array = Bits(state[key], "bfloat16") if opt.is_bfloat16(name, key) else state[key]
                kernels, (view,) = backends.choose([(f"{key} of params[{name!r}]", array)], opt.backend)
                found[own, key] = kernels, view
    return found


def tensor(name, kernels, view):
    """Return a Tensor with the elements of an array."""
    return Tensor(name, DTYPES[view.format], view.shape, partial(array_bytes.chunks, kernels, view))
