"""Which arrays an optimizer keeps for a parameter: their names, formats and shapes.

The operands of an update that are kept between steps are state. Optimizers, checkpoints, sharding, the drop-in for torch and the
planner read this list.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from .kernels.messages import shown
from .kernels.operands import GROUP, KINDS
from .kernels.scalars import step_key

OF_GROUPS = tuple(name for name, kind in KINDS.items() if kind.of_groups)
SHARED = tuple(name for name, kind in KINDS.items() if kind.shared)  # by the numbers of an element
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


def shape(key, param_shape, numbers=1):
    """Return the shape of an array of the state. numbers: of the parameter, in its last dimension, that share a v.

    >>> shape("m", (5, 20)), shape("m_scale", (5, 20)), shape("v", (5, 2), numbers=2)
    ((5, 20), (4,), (5,))
    """
    if key in OF_GROUPS:
        return (-(-int(np.prod(param_shape)) // GROUP),)
    return tuple(param_shape[:-1] if numbers > 1 and key in SHARED else param_shape)


def dtype_of(format):
    """Return the dtype of arrays of a format.

    >>> dtype_of("float16"), dtype_of("bfloat16")
    (dtype('float16'), dtype('uint16'))
    """
    return np.dtype(IN_MEMORY.get(format, format))


def place(key, start, stop, numbers=1):
    """Return which elements of an array belong to elements start ... stop - 1 of its parameter.

    numbers: of the parameter that share a v.

    >>> place("m", 4096, 5000), place("m_scale", 4096, 5000), place("v", 4096, 5000, numbers=2)
    ((4096, 5000), (128, 157), (2048, 2500))
    """
    of_one = GROUP if key in OF_GROUPS else numbers if key in SHARED else 1
    return start // of_one, -(-stop // of_one)


def meaning(key, algorithm, formula):
    """Return what an array of the state is, in words, if its numbers depend on the algorithm or the formula; else None.

    >>> meaning("v", "adamax", "torch"), meaning("m", "adamax", "torch")
    ('the decayed maximum of |gradient| + eps', None)
    """
    of_algorithm = {"adamax": "the decayed maximum of |gradient| + eps"}.get(algorithm, "the running mean of gradient**2")
    of_formula = {"optax": "the maximum of v / (1 - beta2**step)"}.get(formula, "the maximum of v")
    return {"v": of_algorithm, "max_v": of_formula}.get(key)


def check_meaning(keys, options, algorithm, formula):
    """Refuse state of an algorithm and formula whose numbers mean something else to an optimizer. options: the optimizer's.

    Adam, NAdam and RAdam have the same m and v, with every formula and kind of decay.
    """
    for key in keys:
        theirs, ours = meaning(key, algorithm, formula), meaning(key, options.algorithm, options.formula)
        if theirs != ours:
            raise ValueError(
                f"{key} of algorithm={shown(algorithm)} with formula={shown(formula)} is {theirs}, and {key} of this optimizer, "
                f"of algorithm={options.algorithm!r} with formula={options.formula!r}, is {ours}: neither can become the other. "
                "Use an optimizer of the same algorithm and formula"
            )


class States(dict[str, dict[str, Any]]):
    """name -> state of all parameters of an optimizer. Its steps use the dicts in it, so no program puts others there."""

    def __setitem__(self, name, state):
        if state is not self.get(name):
            self._refuse()

    def _refuse(self, *args, **kwargs):
        raise TypeError(
            "the entries of an optimizer's state are dicts that its steps use, and others would not be used. Write into one, "
            "state[name].update(m=m, v=v), or use load_state_dict, and add, remove or replace for parameters"
        )

    __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def become(self, states):
        """Take over the states of an optimizer with other parameters."""
        dict.clear(self)
        dict.update(self, states)

    def __reduce__(self):
        return (type(self), (dict(self),))


def zeros(beginnings):
    """Return name -> {key: zeros} of the state of a group's parameters at its start, beside them, in their order of memory.

    On each device the arrays of a dtype are parts of one allocation, first m of all parameters, then v, as far as the backend
    makes one (`Backend.zeros_in_one`).

    beginnings: name -> `parameters.Beginning`.
    """
    states: dict[str, dict[str, Any]] = {name: dict.fromkeys(beginning.kept) for name, beginning in beginnings.items()}
    together: dict[tuple, list[tuple]] = {}
    for key in dict.fromkeys(key for beginning in beginnings.values() for key in beginning.kept):
        for name, (backend, view, kept, numbers) in beginnings.items():
            if key in kept:
                place = name, key, _like(key, view, numbers)
                together.setdefault((backend, view.device, dtype_of(kept[key])), []).append(place)
    for (backend, _, dtype), places in together.items():
        operands = [key for _, key, _ in places]
        arrays = backend.zeros_like_all([view for *_, view in places], dtype, operands)
        for (name, key, _), array in zip(places, arrays, strict=True):
            states[name][key] = array
    return states


def _like(key, param, numbers):
    """Return a View with the shape and order of memory that an array of the state gets. param: the parameter's."""
    if key in OF_GROUPS:
        return param._replace(pointer=0, shape=shape(key, param.shape), contiguous=True)
    return param.in_vectors(numbers) if key in SHARED else param


class ParameterKind(NamedTuple):
    """What parameters have in common that one launch can update: their format, and the operands of their updates."""

    param: str
    operands: tuple[str, ...]  # in the order of kernels
    kept: tuple[str, ...]  # those that are state
    bits: tuple[str, ...]  # of each operand: the format that its integers stand for, or ""
    counted: bool  # a number is rounded randomly, by its place in the parameter
    numbers: int  # that share a v
    of_complex: bool

    @classmethod
    def of(cls, param, kept, has_copy, stochastic, numbers=1):
        """Return the Kind of a parameter, given by its View, whose state is `kept`: key -> format."""
        there = {"param", "grad", *kept, *(["param_copy"] if has_copy else [])}
        operands = tuple(name for name in KINDS if name in there)
        bits = tuple("bfloat16" if kept.get(name) == "bfloat16" else "" for name in operands)
        state = tuple(name for name in operands if name in kept)
        counted = stochastic or "bfloat16" in bits or "m_scale" in kept
        return cls(param.format, operands, state, bits, counted, numbers, bool(param.of_complex))


@dataclasses.dataclass(slots=True, eq=False)
class Parameter:
    """A parameter of an optimizer and its state."""

    name: str
    kind: ParameterKind
    state: dict[str, Any]  # "step" and arrays
    kept: tuple[str, ...]  # the keys of these arrays, as the optimizer's options ask for them
    size: int  # how many elements the parameter has
    key: int  # for random rounding: an int64 that tells the parameter from others
    copy: Any = None  # an array that is overwritten with the new parameter
    start: int = 0  # the number of the first element, where the parameter is a part of one


OF_PARAMETERS = 0xD1B54A32D192ED03  # so that the keys of parameters are none of a step


def key_of_parameter(seed, number):
    """Return the key of the number-th parameter of all groups, counted from 0, for random rounding."""
    return step_key(seed ^ OF_PARAMETERS, number)
