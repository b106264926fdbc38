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


@functools.lru_cache(maxsize=256)  # many arrays share a step
def form_and_scalars(h, step, dtype, amsgrad):
    """Return the Form and the Scalars of a step for arrays of dtype.

    >>> h = checked(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    >>> form, scalars = form_and_scalars(h, 1, np.dtype("float32"), False)
    >>> form.near1, float(scalars.neg_lr)  # -lr / (1 - beta1)
    (True, -1.0)
    """
    form, rounded, grad_scale, decay, w1, w2, eps = _constants(h[1:], dtype, amsgrad)
    if h.decoupled:
        decay = rounded("weight_decay times lr", -h.lr * h.weight_decay)
    inv_sqrt_bias2 = rounded("1 / sqrt(1 - beta2**step)", 1.0 / math.sqrt(1.0 - power(h.beta2, step)))
    neg_lr = rounded("lr / (1 - beta1**step)", -h.lr / (1.0 - power(h.beta1, step)))
    return form, Scalars(grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr)


def check_rounding(h, dtype):
    """Raise ValueError for a hyperparameter that overflows dtype, or rounds to 0 in it where it must not."""
    _constants(h[1:], dtype, False)


@functools.lru_cache(maxsize=256)
def _constants(h, dtype, amsgrad):
    """Return what does not change with lr and step: the Form, the rounding to dtype, and five scalars."""
    beta1, beta2, eps, weight_decay, decoupled, maximize, grad_scale = h
    largest, to_dtype = float(np.finfo(dtype).max), dtype.type

    def rounded(name, value):
        if not -largest <= value <= largest:
            raise ValueError(f"{name} is {abs(value)}, which overflows {dtype}: choose a smaller one")
        return to_dtype(value)

    def rounded_but_not_to_zero(name, value):
        if value and not rounded(name, value):
            raise ValueError(f"{name}={value} rounds to 0 in {dtype}: choose a larger one, or 0 itself")
        return rounded(name, value)

    # 1 - beta is formed in float64: in float32, 1 - 0.999 is off by 1.3e-5 of itself, and so would v be
    w1, w2 = rounded("1 - beta1", 1.0 - beta1), rounded("1 - beta2", 1.0 - beta2)
    near1, near2 = bool(w1 < 0.5), bool(w2 < 0.5)
    one = to_dtype(1)
    grad_scale = rounded_but_not_to_zero("grad_scale", -grad_scale if maximize else grad_scale)
    decays = weight_decay != 0.0
    form = Form(
        dtype,
        scaled=bool(grad_scale != one),
        l2=decays and not decoupled,
        decoupled=decays and decoupled,
        amsgrad=amsgrad,
        near1=near1,
        near2=near2,
    )
    return (
        form,
        rounded,
        grad_scale,
        rounded("weight_decay", weight_decay),
        # lerp from the nearer end, as torch.lerp; w - 1 is exact
        w1 if near1 else w1 - one,
        w2 if near2 else w2 - one,
        rounded_but_not_to_zero("eps", eps),
    )


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
