"""The state of a parameter in `gpuadam.torch`: torch's names for it, its dtypes, and how a loaded checkpoint is converted."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .. import checks
from .. import state as gpuadam_state
from ..groups import some
from ..kernels import huge_pages
from ..kernels.messages import shown
from ..kernels.operands import KINDS
from ..state_conversion import CONVERTED, conversion
from .distributed import is_distributed

# By gpuadam's names. 8-bit codes have names of their own, so that torch's Adam does not take them for numbers
NAMES = {"m": "exp_avg", "v": "exp_avg_sq", "max_v": "max_exp_avg_sq", "remainder": "remainder"}
OF_CODES = "exp_avg_codes", "exp_avg_sq_codes"
NAMES_OF_8_BITS = {"m": OF_CODES[0], "v": OF_CODES[1], "m_scale": "exp_avg_scale", "v_scale": "exp_avg_sq_scale"}


class Array(NamedTuple):
    """An array of a parameter's state."""

    name: str  # torch's
    operand: str  # gpuadam's
    dtype: torch.dtype


@functools.cache
def kept(state_dtype, master, amsgrad, dtype):
    """Return an Array for each array of state of a parameter of some dtype, in the order of operands."""
    of_param = dtype.to_real() if dtype.is_complex else dtype
    formats = gpuadam_state.kept(str(of_param).removeprefix("torch."), state_dtype, amsgrad, master, ema=False)
    names = NAMES | NAMES_OF_8_BITS if state_dtype == "8bit" else NAMES
    operands = [operand for operand in KINDS if operand in formats]
    dtypes = [getattr(torch, formats[operand]) for operand in operands]
    if dtype.is_complex and state_dtype not in ("bfloat16", "8bit"):  # as torch has it
        dtypes = [kind.to_complex() for kind in dtypes]
    return tuple(Array(names[operand], operand, kind) for operand, kind in zip(operands, dtypes, strict=True))


def new(arrays, param, capturable):
    """Return the state that a parameter begins with: zeros in its order of memory.

    Of complex numbers narrow state has both parts, in a last dimension of 2.
    """
    if param.is_complex() and not all(array.dtype.is_complex for array in arrays):
        param = torch.view_as_real(param)
    step = torch.zeros((), dtype=torch.float32, device=param.device if capturable else "cpu")
    state = {"step": step}
    for name, operand, dtype in arrays:
        shape, alike = gpuadam_state.shape(operand, param.shape), operand not in gpuadam_state.OF_GROUPS
        state[name] = _zeros(torch.empty_like(param, dtype=dtype) if alike else param.new_empty(shape, dtype=dtype))
    return state


def _zeros(tensor):
    """Set a new tensor to zeros and return it. torch asks for no huge pages: CPU memory gets those that lie in it whole."""
    if tensor.is_cpu and not is_distributed(tensor):
        huge_pages.make_huge(tensor.data_ptr(), tensor.nbytes, new=True)
    return tensor.zero_()


def count(name, value):
    """Return a step count, which torch keeps as a float, as an int. name: the parameter's, for the message."""
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    steps = float(number) if checks.is_number(number) else math.nan
    if not (steps >= 0 and steps.is_integer()):
        raise ValueError(f"the step of {name} is {shown(number)}: it must be how many steps it has taken, 0, 1, 2, ...")
    return int(steps)


def by_key(states, keys):
    """Return the states of a loaded checkpoint by the keys of the parameters in its groups.

    JSON makes strings of keys that are numbers, so "0" is taken for 0. Raises ValueError for a key that no parameter has or that
    two have, TypeError for state that is no dict.
    """
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise TypeError("the loaded state must be a dict: key of a parameter -> dict of its step and moments")
    if len(set(keys)) < len(keys):
        raise ValueError(f"two parameters of the loaded groups have the same key; the keys are {some(keys)}")
    of_text = {str(key): key for key in keys if isinstance(key, int)}
    own, result, strange = set(keys), {}, []
    for given, state in states.items():
        key = given if given in own else of_text.get(given)
        if key is None or key in result:
            strange.append(given)
        result[key] = state
    if strange:
        raise ValueError(
            f"the loaded state has the keys {some(strange)}, which are of no parameter in its groups or of one that has state: "
            f"the groups have {some(keys)}. Give the state of each parameter the key that it has there"
        )
    return result


def converted(state, arrays, param, capturable, name, convert=False):
    """Return a copy of a loaded state, in the dtypes of some Arrays, beside the parameter.

    convert: 8-bit state may become other state and the other way round.

    A parameter without a remainder in its checkpoint gets one of zero. Raises ValueError for an array that is missing, has no
    place here or is of another shape, TypeError for integers in the place of numbers and the other way round.
    """
    own_names = NAMES_OF_8_BITS if any(array.operand == "m_scale" for array in arrays) else NAMES
    their_names = NAMES_OF_8_BITS if "exp_avg_codes" in state else NAMES
    if convert and own_names is not their_names:
        return _of_another_format(state, arrays, param, capturable, name, their_names)
    needed = ["step", *(array.name for array in arrays)]
    strange = state.keys() - set(needed) - {NAMES["max_v"]}  # which stays in the state when a group's amsgrad is turned off
    if strange or set(needed) - state.keys() - {"remainder"}:
        raise ValueError(
            f"the loaded state of {name} has {some(sorted(map(str, state)))}, and this optimizer needs {needed} and no other: "
            "make one with the amsgrad, state_dtype and master of the one that was saved, which must be an Adam or AdamW"
            + (". load_state_dict(state_dict, convert=True) converts 8-bit state" if own_names is not their_names else "")
        )
    result = new(arrays, param, capturable)
    result["step"].fill_(count(name, state["step"]))
    for key, _, dtype in arrays:
        value = state.get(key, result[key])
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the loaded {key} of {name} is a {type(value).__name__}, not a tensor")
        if is_distributed(value) != is_distributed(param):
            raise TypeError(
                f"the loaded {key} of {name} is a {type(value).__name__} and the parameter a {type(param).__name__}: load it by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which distributes it as the parameter is"
            )
        if value.shape != result[key].shape:
            raise ValueError(f"the loaded {key} of {name} has shape {tuple(value.shape)}, not {tuple(result[key].shape)}")
        both = (value.is_floating_point(), value.is_complex()), (dtype.is_floating_point, dtype.is_complex)
        if value.dtype != dtype and (both[0] != both[1] or not any(both[0])):
            raise TypeError(f"the loaded {key} of {name} is {value.dtype}, and cannot become {dtype}")
        result[key].copy_(value)
    return result


def _of_another_format(state, arrays, param, capturable, name, their_names):
    """Return the same where one of them is 8-bit state. their_names: operand -> name in the loaded state."""
    moments = {operand: their_names[operand] for operand in CONVERTED if operand in their_names}
    theirs = {operand: state[key] for operand, key in moments.items() if key in state}
    rest = {key: value for key, value in state.items() if key not in moments.values()}
    others = [array for array in arrays if array.operand not in CONVERTED]
    result = new(arrays, param, capturable) | converted(rest, others, param, capturable, name)
    for operand, tensor in theirs.items():
        if not isinstance(tensor, torch.Tensor) or is_distributed(tensor) or is_distributed(param):
            raise TypeError(
                f"the loaded {moments[operand]} of {name} is no tensor that can be converted: load it as it was saved"
            )
        if moments[operand] in OF_CODES and tensor.dtype is not torch.uint8:
            raise TypeError(
                f"the loaded {moments[operand]} of {name} is {tensor.dtype}, not torch.uint8: load it as it was saved"
            )
    own = {array.operand: result[array.name] for array in arrays if array.operand in CONVERTED}
    conversion(name, own, theirs).run()
    return result
