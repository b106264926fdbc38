"""The state of a parameter in `gpuadam.torch`: torch's names for it, its dtypes, and what a checkpoint becomes."""

import functools
import math
import numbers

import torch

from ..kernels.operands import GROUP

# What gpuadam calls it. 8-bit codes have names of their own, so that torch's Adam does not take them for numbers.
OPERANDS = {
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "exp_avg_codes": "m",
    "exp_avg_sq_codes": "v",
    "max_exp_avg_sq": "max_v",
    "remainder": "remainder",
    "exp_avg_scale": "m_scale",
    "exp_avg_sq_scale": "v_scale",
}


@functools.cache
def kept(state_dtype, master, amsgrad, dtype):
    """Return name -> dtype of the state of a parameter of some dtype, in the order of `operands.operands_of`."""
    remainder = {"remainder": torch.int16} if master and dtype is torch.bfloat16 else {}
    if state_dtype == "8bit":
        codes = dict.fromkeys(("exp_avg_codes", "exp_avg_sq_codes"), torch.uint8)
        return codes | remainder | dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), torch.float32)
    own = getattr(torch, state_dtype or ("float64" if dtype is torch.float64 else "float32"))
    return dict.fromkeys(("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())), own) | remainder


def new(kept, param, capturable):
    """Return the state that a parameter begins with: zeros in its order of memory."""
    return {"step": step(0.0, param, capturable)} | {key: zeros(key, dtype, param) for key, dtype in kept.items()}


def step(count, param, capturable):
    """Return a step count as torch's Adam keeps it."""
    return torch.tensor(count, dtype=torch.float32, device=param.device if capturable else "cpu")


def count(name, value):
    """Return a step count, which torch keeps as a float, as an int. name: the parameter's, for the message."""
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    steps = float(number) if isinstance(number, numbers.Real) and not isinstance(number, bool) else math.nan
    if not (steps >= 0 and steps.is_integer()):
        raise ValueError(f"the step of {name} is {number!r}: it must be how many steps it has taken, 0, 1, 2, ...")
    return int(steps)


def zeros(key, dtype, param):
    if key.endswith("_scale"):
        return torch.zeros(-(-param.numel() // GROUP), dtype=dtype, device=param.device)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def converted(state, kept, param, capturable, name):
    """Return a copy of a loaded state in the dtypes of kept, beside the parameter.

    A parameter whose checkpoint has no remainder gets one of zero. Raises ValueError for what is missing or of another shape,
    TypeError for integers in the place of numbers and the other way round.
    """
    missing = kept.keys() - state.keys() - {"remainder"}
    if missing or "step" not in state:
        raise ValueError(
            f"the loaded state of {name} has {sorted(state)}, and this optimizer needs {['step', *kept]}: make one with the "
            "amsgrad and state_dtype of the one that was saved"
        )
    own = {"step": step(count(name, state["step"]), param, capturable)}
    for key, dtype in kept.items():
        own[key] = zeros(key, dtype, param)
        if key in state:
            value = state[key]
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"the loaded {key} of {name} is a {type(value).__name__}, not a tensor")
            if value.shape != own[key].shape:
                raise ValueError(f"the loaded {key} of {name} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}")
            if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point):
                raise TypeError(f"the loaded {key} of {name} is {value.dtype}, and cannot become {dtype}")
            own[key].copy_(value)
    return own
