"""Which arrays an optimizer keeps for a parameter: their names, formats and shapes.

The operands of an update that are kept between steps are state. Optimizers, checkpoints, sharding, the drop-in for torch and the
planner read this list.
"""

from typing import NamedTuple

import numpy as np

from .kernels.operands import GROUP, KINDS

OF_GROUPS = tuple(kind.name for kind in KINDS.values() if kind.of_groups)
IN_MEMORY = {"bfloat16": "uint16"}  # the dtype of a format that NumPy does not know
MOMENTS = ("m", "v", "max_v")


def kept(param, state_dtype, amsgrad, master, ema):
    """Return key -> format of the state of a parameter, in the order of a checkpoint.

    param: the parameter's format. state_dtype, master: as in `Adam`; amsgrad, ema: whether there is a max_v, an ema.

    >>> kept("bfloat16", None, False, "remainder", True)
    {'m': 'float32', 'v': 'float32', 'remainder': 'int16', 'ema': 'float32'}
    """
    wide = "float64" if param == "float64" else "float32"
    moments = state_dtype or wide
    formats = dict.fromkeys(MOMENTS if amsgrad else MOMENTS[:2], "uint8" if moments == "8bit" else moments)
    if moments == "8bit":
        formats |= dict.fromkeys(OF_GROUPS, "float32")
    if master == "remainder" and param == "bfloat16":
        formats["remainder"] = "int16"
    if ema:
        formats["ema"] = wide
    return formats


def shape(key, param_shape):
    """Return the shape of an array of the state.

    >>> shape("m", (5, 20)), shape("m_scale", (5, 20))
    ((5, 20), (4,))
    """
    return (-(-int(np.prod(param_shape)) // GROUP),) if key in OF_GROUPS else tuple(param_shape)


def zeros(backend, param, key, format):
    """Return an array of the state at its start: zeros beside a parameter, in its order of memory. param: its View."""
    dtype = np.dtype(IN_MEMORY.get(format, format))
    if key in OF_GROUPS:
        return backend.zeros(*shape(key, param.shape), dtype, param.device)
    return backend.zeros_like(param, dtype)


class ParameterKind(NamedTuple):
    """What parameters have in common that one launch can update: their format, and the operands of their updates."""

    param: str
    operands: tuple[str, ...]  # in the order of kernels
    bits: tuple[str, ...]  # of each operand: the format that its integers stand for, or ""
    counted: bool  # a number is rounded randomly, by its place in the parameter

    @classmethod
    def of(cls, param, kept, has_copy, stochastic):
        """Return the Kind of a parameter of some format, whose state is `kept`: key -> format."""
        there = {"param", "grad", *kept, *(["param_copy"] if has_copy else [])}
        operands = tuple(name for name in KINDS if name in there)
        bits = tuple("bfloat16" if kept.get(name) == "bfloat16" else "" for name in operands)
        return cls(param, operands, bits, stochastic or "bfloat16" in bits or "m_scale" in kept)


class Parameter:
    """A parameter of an optimizer and its state."""

    __slots__ = ("copy", "key", "kind", "name", "start", "state")

    def __init__(self, name, kind, state, key, copy=None, start=0):
        self.name, self.kind = name, kind
        self.state = state  # "step" and arrays
        self.key = key  # for random rounding: an int64 that tells the parameter from others
        self.copy = copy  # an array that is overwritten with the new parameter, or None
        self.start = start  # the number of the first element, where the parameter is a part of one
