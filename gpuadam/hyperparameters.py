"""Hyperparameters, checked, and the scalars of a step: computed once, in float64, and rounded once to the compute type.

An optimizer checks `Formulas` when it is made, by `formulas`, and the hyperparameters of each group at each step, by
`with_formulas`. Both remember their last results, because few of them change from step to step. `checked` does both at once.
"""

import dataclasses
import functools
import math
import struct
from collections.abc import Callable
from typing import NamedTuple, get_args

import numpy as np

from . import checks
from .kernels.adam import Form, scalar_names, scalars_type
from .kernels.operands import Arrays, widened
from .kernels.scalars import on_host, powers_on_host, shares_of_nadam
from .kernels.state_formats import encoded
from .typing import Algorithm, Formula

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
FORMULAS: tuple[str, ...] = get_args(Formula)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)  # told apart by identity, which is quick to hash
class Formulas:
    """What decides about the formulas of a step beside the hyperparameters of a group, checked."""

    algorithm: str = "adam"
    formula: str = "torch"
    eps_root: float = 0.0
    ema_decay: float = 0.999
    ema_starts: bool = False  # the first step sets ema to param
    zero_grad: bool = False
    decoupled: bool = False


def formulas(*fields, **named):
    """Return Formulas of these fields, or raise TypeError or ValueError naming the one that is wrong."""
    try:
        return _formulas(*fields, **named)
    except (TypeError, ValueError):  # a value that no cache can have as its key, or a wrong one
        return _formulas.__wrapped__(*fields, **named)


@functools.lru_cache(maxsize=256, typed=True)  # typed: 1 and True are equal, and one of them is no zero_grad
def _formulas(*fields, **named):
    given = Formulas(*fields, **named)
    checked = Formulas(
        checks.one_of(ALGORITHMS, "algorithm", given.algorithm),
        checks.one_of(FORMULAS, "formula", given.formula),
        checks.non_negative("eps_root", given.eps_root),
        checks.beta("ema_decay", given.ema_decay),
        checks.flag("ema_starts", given.ema_starts),
        checks.flag("zero_grad", given.zero_grad),
        checks.flag("decoupled", given.decoupled),
    )
    checks.formula(checked)
    return checked


ADAM = Formulas()
UNBOUNDED = None, None
# The grad_scale that clips gradients whose norm is NaN: this object, because users may give no NaN
NO_SCALE = math.nan + 0.0


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Fixed(Formulas):
    """All hyperparameters but lr and grad_scale, checked. They seldom change."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    clip_value: float = math.inf
    low: float = -math.inf
    high: float = math.inf

    @property
    def ordered(self):
        """Whether numbers are compared, which complex ones cannot be."""
        return self.clip_value < math.inf or self.low > -math.inf or self.high < math.inf

    @property
    def variant(self):
        """What the scalars depend on: the algorithm, or Adam's formula that is not torch's. Apex's differs in rounding alone."""
        return self.formula if self.algorithm == "adam" and self.formula not in ("torch", "apex") else self.algorithm


class Hyperparameters(NamedTuple):
    """What a user sets for a step, checked."""

    lr: float
    fixed: Fixed
    grad_scale: float = 1.0

    @property
    def scale(self):
        """What the gradient is multiplied by; if it is 1, by nothing. It is never -0.0, as on a device."""
        return (-self.grad_scale if self.fixed.maximize else self.grad_scale) + 0.0


def checked(
    lr, betas, eps, weight_decay, decoupled=False, maximize=False, grad_scale=1.0, clip_value=None, bounds=None, **options
):
    """Return Hyperparameters, or raise TypeError or ValueError naming the one that is wrong.

    options: fields of `Formulas`.

    >>> checked(0.1, (0.9, 0.999), 1e-8, 0.0, algorithm="radam").fixed.algorithm
    'radam'
    """
    of_options = formulas(decoupled=decoupled, **options)
    return with_formulas(lr, betas, eps, weight_decay, maximize, grad_scale, of_options, clip_value, bounds)


def with_formulas(lr, betas, eps, weight_decay, maximize, grad_scale, formulas, clip_value=None, bounds=None):
    """Return Hyperparameters likewise; formulas: checked before."""
    lr = checks.non_negative("lr", lr)
    if grad_scale is not NO_SCALE:
        grad_scale = checks.finite("grad_scale", grad_scale)
    try:
        beta1, beta2 = betas if type(betas) is tuple else checks.betas(betas)
        if clip_value is bounds is None:  # the usual case; each argument of a cached function costs time
            return Hyperparameters(lr, _fixed(beta1, beta2, eps, weight_decay, maximize, formulas), grad_scale)
        low, high = UNBOUNDED if bounds is None else checks.pair(bounds)
        fixed = _fixed(beta1, beta2, eps, weight_decay, maximize, formulas, clip_value, low, high)
    except (TypeError, ValueError):  # not two of them, a value that no cache can have as its key, or a wrong one
        betas = checks.betas(betas)
        checks.bounds_of_param(bounds)
        low, high = UNBOUNDED if bounds is None else bounds
        fixed = _fixed.__wrapped__(*betas, eps, weight_decay, maximize, formulas, clip_value, low, high)
    return Hyperparameters(lr, fixed, grad_scale)


@functools.lru_cache(maxsize=256, typed=True)
def _fixed(beta1, beta2, eps, weight_decay, maximize, formulas, clip_value=None, low=None, high=None):
    beta1, beta2 = checks.betas((beta1, beta2))
    low, high = checks.bounds_of_param((low, high))
    return Fixed(
        **dataclasses.asdict(formulas),
        beta1=beta1,
        beta2=beta2,
        eps=checks.non_negative("eps", eps),
        weight_decay=checks.non_negative("weight_decay", weight_decay),
        maximize=checks.flag("maximize", maximize),
        clip_value=checks.clip_value(clip_value),
        low=low,
        high=high,
    )


def form_and_scalars(h, step, arrays):
    """Return the Form and the Scalars of a step. arrays: the `operands.Arrays` of the update.

    >>> h = checked(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    >>> form, scalars = form_and_scalars(h, 1, Arrays())
    >>> form.near1, scalars.neg_lr  # -lr / (1 - beta1)
    (True, -1.0)
    """
    (lr, fixed, _), scale = h, h.scale
    of_all = constants(fixed, arrays, scale != 1.0)
    form, scalars_type, of_step, pack, unpack, lowest, w1, w2, eps, first, later = of_all
    if scale != 1.0:
        scale = _rounded("grad_scale", scale, arrays.compute, to_zero=False)
    power1, power2 = powers_on_host(fixed.beta1, fixed.beta2, step)
    if of_step is None:  # plain Adam: what of_step would compute, without the time of a call, some 300 ns
        decay = -lr * fixed.weight_decay if form.decoupled else fixed.weight_decay
        neg_lr = -lr / (1.0 - power1)
        inv_sqrt_bias2 = 1.0 / math.sqrt(1.0 - power2)
    else:
        decay, inv_sqrt_bias2, eps, neg_lr = of_step(step, power1, power2, lr, fixed.beta2, fixed.weight_decay, eps)
        if fixed.algorithm == "nadam":
            shares = shares_of_nadam(fixed.beta1, step, fixed.formula)
            first, later = shares + first, shares + later
    if decay < lowest:
        _overflows("weight_decay times lr", decay, arrays.compute)
    if neg_lr < lowest:
        _overflows("lr / (1 - beta1**step)", neg_lr, arrays.compute)
    values: tuple[float, ...] = scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr
    if later:
        values += first if step == 1 else later
    # pack rounds to nearest even, as NumPy's cast does, in less time; so does tuple.__new__ what scalars_type(*values) does
    return form, tuple.__new__(scalars_type, unpack(pack(*values)))


def check_rounding(h, dtype):
    """Raise ValueError for a hyperparameter that overflows dtype, or rounds to 0 in it where it must not."""
    constants(h.fixed, Arrays(*[np.dtype(dtype).name] * 3))
    _rounded("grad_scale", h.grad_scale, np.dtype(dtype), to_zero=False)


def _rounded(name, value, dtype, *, to_zero=True):
    """Return a number of the compute type. to_zero: whether one that is not 0 may become 0."""
    if abs(value) > float(np.finfo(dtype).max):
        _overflows(name, value, dtype)
    result = float(dtype.type(value))
    if value and not result and not to_zero:
        instead = "None for no clipping" if name == "clip_value" else "0 itself"
        raise ValueError(f"{name}={value} rounds to 0 in {dtype}: choose a larger one, or {instead}")
    return result


def _overflows(name, value, dtype):
    raise ValueError(f"{name} is {abs(value)}, which overflows {dtype}: choose a smaller one")


class Constants(NamedTuple):
    """The parts of a step's form and scalars that do not change with lr, grad_scale and step. Numbers are of the compute type."""

    form: Form
    scalars_type: type
    of_step: Callable | None  # of a `scalars.Formula`; None: plain Adam's
    pack: Callable  # rounds the scalars, and makes bytes of them
    unpack: Callable  # the scalars of these bytes
    lowest: float  # number of the compute type
    w1: float
    w2: float
    eps: float
    first: tuple[float, ...]  # those of `adam.FURTHER` that the form has, but NAdam's shares, at step 1
    later: tuple[float, ...]  # likewise at all other steps


def bound(value, format):
    """Return a bound of a parameter, rounded to nearest even in its format: what is rounded later does not leave it."""
    if not math.isfinite(value):
        return value
    (rounded,) = widened(encoded(np.array([value]), format), format)
    if not math.isfinite(rounded):
        raise ValueError(f"bounds: {value} overflows {format}: give a smaller number, or None for no bound")
    return float(rounded)


@functools.lru_cache(maxsize=256)
def constants(fixed, arrays, scaled=False):
    """Return the Constants of hyperparameters and formats. Raise ValueError for a number that the compute type cannot hold.

    scaled: whether the gradient is multiplied by grad_scale.
    """
    dtype = arrays.compute
    real, rounded = dtype.type, functools.partial(_rounded, dtype=dtype)

    def weight(beta):
        """Return the weight of lerp from the nearer end, as torch.lerp, and whether this is the first end; w - 1 is exact."""
        # 1 - beta is formed in float64: in float32, 1 - 0.999 is off by 1.3e-5 of itself, and so would v be
        w = float(real(1.0 - beta))
        return (w, True) if w < 0.5 else (w - 1.0, False)

    (w1, near1), (w2, near2), (w_ema, near_ema) = (weight(beta) for beta in (fixed.beta1, fixed.beta2, fixed.ema_decay))
    if fixed.algorithm == "adamax":
        w2, near2 = float(real(fixed.beta2)), True
    rounded("weight_decay", fixed.weight_decay)
    decays = fixed.weight_decay != 0.0
    form = Form(
        arrays,
        "optax" if fixed.variant == "optax" else fixed.algorithm,
        scaled=scaled,
        l2=decays and not fixed.decoupled,
        decoupled=decays and fixed.decoupled,
        near1=near1,
        near2=near2,
        near_ema=near_ema or not arrays.ema,
        zero_grad=fixed.zero_grad,
        clips=fixed.clip_value < math.inf,
        bounded=arrays.bounded or not fixed.low == -fixed.high == -math.inf,
    )
    reals = struct.Struct({"float32": "f", "float64": "d"}[dtype.name] * len(scalar_names(form)))
    further = {"eps_root": rounded("eps_root", fixed.eps_root, to_zero=False), "w_ema": w_ema}
    further |= {"least": bound(fixed.low, arrays.param), "most": bound(fixed.high, arrays.param)}
    if form.clips:
        further["clip_value"] = rounded("clip_value", fixed.clip_value, to_zero=False)
    later = tuple(further[name] for name in scalar_names(form) if name in further)
    return Constants(
        form=form,
        scalars_type=scalars_type(form),
        of_step=None if fixed.variant == "adam" else on_host(fixed.variant, form.decoupled).of_step,
        pack=reals.pack,
        unpack=reals.unpack,
        lowest=float(np.finfo(dtype).min),
        w1=w1,
        w2=w2,
        eps=rounded("eps", fixed.eps, to_zero=False),
        first=(*later[:-1], float(near_ema)) if arrays.ema and fixed.ema_starts else later,  # from ema, 0, to the new param
        later=later,
    )
