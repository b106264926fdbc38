"""The scalars of a step: computed once, in float64, from Python floats, and rounded once to the compute type."""

import functools
import math
from typing import NamedTuple

import numpy as np

from . import checks
from .kernels.adam import Form, Scalars


class Hyperparameters(NamedTuple):
    """What a user sets for a step, checked."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    grad_scale: float


def checked(*, lr, betas, eps, weight_decay, decoupled, maximize, grad_scale=1.0):
    """Return Hyperparameters, or raise TypeError or ValueError naming the one that is wrong."""
    beta1, beta2 = checks.betas(betas)
    return Hyperparameters(
        checks.non_negative("lr", lr),
        beta1,
        beta2,
        checks.non_negative("eps", eps),
        checks.non_negative("weight_decay", weight_decay),
        checks.flag("decoupled", decoupled),
        checks.flag("maximize", maximize),
        checks.finite("grad_scale", grad_scale),
    )


@functools.lru_cache(maxsize=1024)
def form_and_scalars(h, step, dtype, amsgrad):
    """Return the Form and the Scalars of a step for arrays of dtype.

    >>> h = checked(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    >>> form, scalars = form_and_scalars(h, 1, np.dtype("float32"), False)
    >>> form.near1, float(scalars.neg_lr)  # -lr / (1 - beta1)
    (True, -1.0)
    """
    one = dtype.type(1)
    grad_scale = -h.grad_scale if h.maximize else h.grad_scale
    decays = h.weight_decay != 0.0
    # 1 - beta is formed in float64: in float32, 1 - 0.999 is off by 1.3e-5 of itself, and so would v be
    with np.errstate(over="ignore"):
        exact = {
            "grad_scale": grad_scale,
            "decay": -h.lr * h.weight_decay if h.decoupled else h.weight_decay,
            "w1": 1.0 - h.beta1,
            "w2": 1.0 - h.beta2,
            "inv_sqrt_bias2": 1.0 / math.sqrt(1.0 - power(h.beta2, step)),
            "eps": h.eps,
            "neg_lr": -h.lr / (1.0 - power(h.beta1, step)),
        }
        rounded = {name: dtype.type(value) for name, value in exact.items()}
    for name, value in rounded.items():
        if not np.isfinite(value):
            given = {"decay": "weight_decay (times lr)", "neg_lr": "lr / (1 - beta1**step)"}.get(name, name)
            raise ValueError(f"{given} is {abs(exact[name])}, which overflows {dtype}: choose a smaller one")
    for name in ("eps", "grad_scale"):
        if exact[name] and not rounded[name]:
            raise ValueError(f"{name}={exact[name]} rounds to 0 in {dtype}: choose a larger one, or 0 itself")
    near1, near2 = (bool(rounded[w] < 0.5) for w in ("w1", "w2"))
    # lerp from the nearer end, as torch.lerp; w - 1 is exact
    rounded["w1"] = rounded["w1"] if near1 else rounded["w1"] - one
    rounded["w2"] = rounded["w2"] if near2 else rounded["w2"] - one
    form = Form(
        dtype,
        scaled=bool(rounded["grad_scale"] != one),
        l2=decays and not h.decoupled,
        decoupled=decays and h.decoupled,
        amsgrad=amsgrad,
        near1=near1,
        near2=near2,
    )
    return form, Scalars(**rounded)


def power(base, exponent):
    """Return base**exponent by repeated squaring: these products and no others.

    `**` gives other bits in half of all cases, and other ones on other machines; a GPU kernel can do this loop too.

    >>> power(0.5, 10)
    0.0009765625
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
