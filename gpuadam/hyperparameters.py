"""The scalars of a step: computed once, in float64, from Python floats, and rounded once to the compute type."""

import dataclasses
import functools
import math
import struct
from typing import NamedTuple

import numpy as np

from . import checks
from .kernels.adam import Form, Scalars, scalars_type
from .kernels.storage import Arrays

ALGORITHMS = ("adam", "nadam", "radam", "adamax")
FORMULAS = ("torch", "apex", "eps-hat", "optax")


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


def formulas(algorithm, formula, eps_root, ema_decay, ema_starts, zero_grad, decoupled):
    """Return Formulas, or raise TypeError or ValueError naming the one that is wrong."""
    arguments = algorithm, formula, eps_root, ema_decay, ema_starts, zero_grad, decoupled
    try:
        return _formulas(*arguments)
    except TypeError:  # a value that no cache can have as its key
        return _formulas.__wrapped__(*arguments)


@functools.lru_cache(maxsize=256, typed=True)  # typed: 1 and True are equal, and one of them is no zero_grad
def _formulas(algorithm, formula, eps_root, ema_decay, ema_starts, zero_grad, decoupled):
    checked = Formulas(
        checks.one_of(ALGORITHMS, "algorithm", algorithm),
        checks.one_of(FORMULAS, "formula", formula),
        checks.non_negative("eps_root", eps_root),
        checks.beta("ema_decay", ema_decay),
        checks.flag("ema_starts", ema_starts),
        checks.flag("zero_grad", zero_grad),
        checks.flag("decoupled", decoupled),
    )
    checks.formula(checked)
    return checked


ADAM = Formulas()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Fixed(Formulas):
    """What seldom changes between the steps of a program, checked."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    grad_scale: float = 1.0

    @property
    def variant(self):
        """What the scalars depend on: the algorithm, or the formula that is not torch's. Apex's is the same but for rounding."""
        return self.algorithm if self.formula in ("torch", "apex") else self.formula


class Hyperparameters(NamedTuple):
    """What a user sets for a step, checked."""

    lr: float
    fixed: Fixed


def checked(lr, betas, eps, weight_decay, decoupled=False, maximize=False, grad_scale=1.0, **options):
    """Return Hyperparameters, or raise TypeError or ValueError naming the one that is wrong.

    options: fields of `Formulas`.

    >>> checked(0.1, (0.9, 0.999), 1e-8, 0.0, algorithm="radam").fixed.algorithm
    'radam'
    """
    of_options = formulas(**dataclasses.asdict(ADAM) | options | {"decoupled": decoupled})
    return with_formulas(lr, betas, eps, weight_decay, maximize, grad_scale, of_options)


def with_formulas(lr, betas, eps, weight_decay, maximize, grad_scale, formulas):
    """Return Hyperparameters likewise; formulas: checked before."""
    lr = checks.non_negative("lr", lr)
    try:
        beta1, beta2 = betas
        return Hyperparameters(lr, _fixed(beta1, beta2, eps, weight_decay, maximize, grad_scale, formulas))
    except (TypeError, ValueError):  # not two betas, a value that no cache can have as its key, or a wrong one
        betas = checks.betas(betas)
        return Hyperparameters(lr, _fixed.__wrapped__(*betas, eps, weight_decay, maximize, grad_scale, formulas))


@functools.lru_cache(maxsize=256, typed=True)
def _fixed(beta1, beta2, eps, weight_decay, maximize, grad_scale, formulas):
    return Fixed(
        *(getattr(formulas, field.name) for field in dataclasses.fields(Formulas)),
        *checks.betas((beta1, beta2)),
        checks.non_negative("eps", eps),
        checks.non_negative("weight_decay", weight_decay),
        checks.flag("maximize", maximize),
        checks.finite("grad_scale", grad_scale),
    )


def form_and_scalars(h, step, arrays):
    """Return the Form and the Scalars of a step. arrays: the `storage.Arrays` of the update.

    >>> h = checked(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    >>> form, scalars = form_and_scalars(h, 1, Arrays())
    >>> form.near1, scalars.neg_lr  # -lr / (1 - beta1)
    (True, -1.0)
    """
    lr, fixed = h
    form, kind, plain, rounded, largest, grad_scale, decay, w1, w2, eps, eps_root, w_ema = _constants(fixed, arrays)
    if form.decoupled:
        decay = -lr * fixed.weight_decay
        if decay < -largest:
            _overflows("weight_decay times lr", decay, form.dtype)
        decay, _ = rounded(decay, 0.0)
    neg_lr = -lr / (1.0 - power(fixed.beta1, step))
    inv_sqrt_bias2, further = 1.0, ()
    if plain:
        inv_sqrt_bias2 = 1.0 / math.sqrt(1.0 - power(fixed.beta2, step))
    else:
        inv_sqrt_bias2, eps, neg_lr, further = _of_variant(lr, fixed, eps, eps_root, neg_lr, step, rounded)
        if arrays.ema:
            further = (*further, first_w_ema(form) if fixed.ema_starts and step == 1 else w_ema)
    if neg_lr < -largest:
        _overflows("lr / (1 - beta1**step)", neg_lr, form.dtype)
    inv_sqrt_bias2, neg_lr = rounded(inv_sqrt_bias2, neg_lr)  # the first is at most 1e16
    values = (grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr, *further)
    return form, tuple.__new__(kind, values)  # kind(*values), in half of its time


def _of_variant(lr, fixed, eps, eps_root, neg_lr, step, rounded):
    """Return inv_sqrt_bias2, eps, neg_lr and the further scalars of an algorithm or a formula."""
    variant = fixed.variant
    if variant == "radam":
        return *_radam(fixed, eps, neg_lr, step), ()
    if variant == "adamax":
        return 1.0, eps, neg_lr, ()
    bias2 = 1.0 - power(fixed.beta2, step)
    if variant == "nadam":
        return 1.0 / math.sqrt(bias2), eps, -lr, rounded(*_shares_of_nadam(fixed.beta1, step))
    if variant == "eps-hat":  # the formula before section 2.1 of the paper: eps is not corrected with v
        return 1.0, eps, neg_lr * math.sqrt(bias2), ()
    if variant == "optax":
        return 1.0 / bias2, eps, neg_lr, (eps_root,)
    return 1.0 / math.sqrt(bias2), eps, neg_lr, ()


def first_w_ema(form):
    """Return the weight that makes ema, which is zero, the new param."""
    return 1.0 if form.near_ema else 0.0


def _radam(fixed, eps, neg_lr, step):
    """Return inv_sqrt_bias2, eps and neg_lr of RAdam.   (Liu et al. 2020, Algorithm 2, arXiv:1908.03265)"""
    beta2 = fixed.beta2
    power2 = power(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * power2 / (1.0 - power2)
    if rho <= 5.0:  # the variance of 1 / sqrt(v) is not tractable yet: the step is that of momentum
        return 0.0, 1.0, neg_lr
    rectifier = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    return 1.0, eps, neg_lr * rectifier * math.sqrt(1.0 - power2)


NADAM_DECAY = 0.004  # psi of Dozat 2016, and torch's momentum_decay


def _shares_of_nadam(beta1, step):
    """Return NAdam's shares of m and of g in the direction.   (Dozat 2016, Incorporating Nesterov Momentum into Adam)"""
    product = _nadam_product(beta1, step)
    mu, mu_next = _nadam_mu(beta1, step), _nadam_mu(beta1, step + 1)
    return mu_next / (1.0 - product * mu_next), (1.0 - mu) / (1.0 - product)


def _nadam_mu(beta1, step):
    return beta1 * (1.0 - 0.5 * 0.96 ** (step * NADAM_DECAY))


_products: dict[float, tuple[int, float]] = {}


def _nadam_product(beta1, step):
    """Return the product of mu over the steps up to this one. It goes on from where the last call for this beta1 ended."""
    known, product = _products.get(beta1, (0, 1.0))
    if known > step:
        known, product = 0, 1.0
    for k in range(known + 1, step + 1):
        product *= _nadam_mu(beta1, k)
        if product < 1e-300:  # 1 - product has been 1 for long
            product = 0.0
            break
    _products[beta1] = step, product
    return product


def check_rounding(h, dtype):
    """Raise ValueError for a hyperparameter that overflows dtype, or rounds to 0 in it where it must not."""
    _constants(h.fixed, Arrays(*[np.dtype(dtype).name] * 3))


def _overflows(name, value, dtype):
    raise ValueError(f"{name} is {abs(value)}, which overflows {dtype}: choose a smaller one")


@functools.lru_cache(maxsize=256)
def _constants(fixed, arrays):
    """Return what does not change with lr and step: the Form, the type of its scalars, whether they are plain Adam's, the
    rounding to their dtype, its largest number, and seven scalars."""
    dtype = arrays.compute
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

    def weight(beta):
        """Return the weight of lerp from the nearer end, as torch.lerp, and whether that is the first; w - 1 is exact."""
        # 1 - beta is formed in float64: in float32, 1 - 0.999 is off by 1.3e-5 of itself, and so would v be
        w, _ = rounded(1.0 - beta, 0.0)
        return (w, True) if w < 0.5 else (w - 1.0, False)

    (w1, near1), (w2, near2), (w_ema, near_ema) = (weight(beta) for beta in (fixed.beta1, fixed.beta2, fixed.ema_decay))
    if fixed.algorithm == "adamax":
        w2, near2 = rounded(fixed.beta2, 0.0)[0], True
    grad_scale = rounded_but_not_to_zero("grad_scale", -fixed.grad_scale if fixed.maximize else fixed.grad_scale)
    decays = fixed.weight_decay != 0.0
    form = Form(
        arrays,
        "optax" if fixed.formula == "optax" else fixed.algorithm,
        scaled=grad_scale != 1.0,
        l2=decays and not fixed.decoupled,
        decoupled=decays and fixed.decoupled,
        near1=near1,
        near2=near2,
        near_ema=near_ema or not arrays.ema,
        zero_grad=fixed.zero_grad,
    )
    kind = scalars_type(form)
    return (
        form,
        kind,
        kind is Scalars and fixed.variant == "adam",
        rounded,
        largest,
        grad_scale,
        rounded_one("weight_decay", fixed.weight_decay),
        w1,
        w2,
        rounded_but_not_to_zero("eps", fixed.eps),
        rounded_but_not_to_zero("eps_root", fixed.eps_root),
        w_ema,
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
