"""The scalars of a step: computed once, in float64, from Python floats, and rounded once to the compute type."""

import functools
import math
import struct
from typing import NamedTuple

import numpy as np

from . import checks
from .kernels.adam import Form, Scalars


class Fixed(NamedTuple):
    """What seldom changes between the steps of a program, checked."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    grad_scale: float


class Hyperparameters(NamedTuple):
    """What a user sets for a step, checked."""

    lr: float
    fixed: Fixed


def checked(*, lr, betas, eps, weight_decay, decoupled, maximize, grad_scale=1.0):
    """Return Hyperparameters, or raise TypeError or ValueError naming the one that is wrong."""
    lr = checks.non_negative("lr", lr)
    try:
        beta1, beta2 = betas
        fixed = _fixed(beta1, beta2, eps, weight_decay, decoupled, maximize, grad_scale)
    except (
        TypeError,
        ValueError,
    ):  # two betas, and values that can be keys of a cache, are the usual case and not the only one
        fixed = _fixed.__wrapped__(*checks.betas(betas), eps, weight_decay, decoupled, maximize, grad_scale)
    return Hyperparameters(lr, fixed)


@functools.lru_cache(maxsize=256, typed=True)  # typed: 1 and True are equal, and one of them is no weight_decay
def _fixed(beta1, beta2, eps, weight_decay, decoupled, maximize, grad_scale):
    beta1, beta2 = checks.betas((beta1, beta2))
    return Fixed(
        beta1,
        beta2,
        checks.non_negative("eps", eps),
        checks.non_negative("weight_decay", weight_decay),
        checks.flag("decoupled", decoupled),
        checks.flag("maximize", maximize),
        checks.finite("grad_scale", grad_scale),
    )


def form_and_scalars(h, step, dtype, amsgrad):
    """Return the Form and the Scalars of a step for arrays of dtype.

    >>> h = checked(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    >>> form, scalars = form_and_scalars(h, 1, np.dtype("float32"), False)
    >>> form.near1, scalars.neg_lr  # -lr / (1 - beta1)
    (True, -1.0)
    """
    lr, fixed = h
    beta1, beta2, *_ = fixed
    form, rounded, largest, grad_scale, decay, w1, w2, eps = _constants(fixed, dtype, amsgrad)
    if form.decoupled:
        decay = -lr * fixed.weight_decay
        if decay < -largest:
            _overflows("weight_decay times lr", decay, dtype)
        decay, _ = rounded(decay, 0.0)
    inv_sqrt_bias2 = 1.0 / math.sqrt(1.0 - power(beta2, step))
    neg_lr = -lr / (1.0 - power(beta1, step))
    if neg_lr < -largest:
        _overflows("lr / (1 - beta1**step)", neg_lr, dtype)
    inv_sqrt_bias2, neg_lr = rounded(inv_sqrt_bias2, neg_lr)  # the first is at most 1e8
    return form, Scalars(grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr)


def check_rounding(h, dtype):
    """Raise ValueError for a hyperparameter that overflows dtype, or rounds to 0 in it where it must not."""
    _constants(h.fixed, dtype, False)


def _overflows(name, value, dtype):
    raise ValueError(f"{name} is {abs(value)}, which overflows {dtype}: choose a smaller one")


@functools.lru_cache(maxsize=256)
def _constants(fixed, dtype, amsgrad):
    """Return what does not change with lr and step: the Form, the rounding to dtype and its largest number, five scalars."""
    beta1, beta2, eps, weight_decay, decoupled, maximize, grad_scale = fixed
    largest = float(np.finfo(dtype).max)
    two = struct.Struct({"float32": "ff", "float64": "dd"}[dtype.name])
    pack, unpack = two.pack, two.unpack

    def rounded(x, y):
        """Round two numbers to nearest even, as NumPy's cast does, in a quarter of its time."""
        return unpack(pack(x, y))

    def rounded_one(name, value):
        if abs(value) > largest:
            _overflows(name, value, dtype)
        return rounded(value, 0.0)[0]

    def rounded_but_not_to_zero(name, value):
        result = rounded_one(name, value)
        if value and not result:
            raise ValueError(f"{name}={value} rounds to 0 in {dtype}: choose a larger one, or 0 itself")
        return result

    # 1 - beta is formed in float64: in float32, 1 - 0.999 is off by 1.3e-5 of itself, and so would v be
    w1, w2 = rounded(1.0 - beta1, 1.0 - beta2)
    near1, near2 = w1 < 0.5, w2 < 0.5
    grad_scale = rounded_but_not_to_zero("grad_scale", -grad_scale if maximize else grad_scale)
    decays = weight_decay != 0.0
    form = Form(
        dtype,
        scaled=grad_scale != 1.0,
        l2=decays and not decoupled,
        decoupled=decays and decoupled,
        amsgrad=amsgrad,
        near1=near1,
        near2=near2,
    )
    return (
        form,
        rounded,
        largest,
        grad_scale,
        rounded_one("weight_decay", weight_decay),
        # lerp from the nearer end, as torch.lerp; w - 1 is exact
        w1 if near1 else w1 - 1.0,
        w2 if near2 else w2 - 1.0,
        rounded_but_not_to_zero("eps", eps),
    )


def power(base, exponent):
    """Return base**exponent by repeated squaring, from the lowest bit of the exponent: these products and no others.

    `**` gives other bits in half of all cases, and other ones on other machines; a GPU kernel can do this loop too.

    >>> power(0.5, 10)
    0.0009765625
    """
    products, base = _low_powers(base)
    result = products[exponent & 1023]
    exponent >>= 10
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@functools.lru_cache(maxsize=64)
def _low_powers(base):
    """Return what the loop has for the first 10 bits of an exponent, by those bits, and the square that comes next."""
    products = [1.0]
    for _ in range(10):
        products += [product * base for product in products]
        base *= base
    return products, base
