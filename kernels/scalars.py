"""The scalars of a step: THE FORMULA, once in Python for the host and for Numba CUDA, and once in CUDA C for CuPy.

The two say the same line by line. They compute in float64, and the results are rounded once to the compute type.

Most steps compute their scalars on the host: `gpuadam/hyperparameters.py` calls the formula. Plain Adam's three lines stand there
once more, because the call would take too long; a test compares them.

A captured graph is replayed with other step counts and learning rates, so there a kernel of one thread computes the scalars on
the device, before the update. It advances the step count, clips by the gradients' norm and decides whether to leave the step
out, because the host would have to wait for these numbers. Numbers that stay the same, such as 1 - beta2, are its arguments.

    decay           = weight_decay, of decoupled decay -lr * weight_decay
    inv_sqrt_bias2  = 1 / sqrt(1 - beta2**t)
    neg_lr          = -lr / (1 - beta1**t)

RAdam (Liu et al. 2020, Algorithm 2, arXiv:1908.03265) rectifies the variance of 1 / sqrt(v). As long as the variance is not
tractable it steps by momentum alone. eps-hat is the formula at the end of section 2 of the paper on Adam, in which the correction
of v's bias is a factor of lr and does not reach eps.
"""

import functools
import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

KEY_AT, SKIP_AT, REALS_AT = 0, 8, 16  # bytes into a ScalarsMemory
MEMORY_BYTES = 128
CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64: Steele, Lea & Flood 2014


class ScalarsForm(NamedTuple):
    """The options of the kernel. An array of one number on the device is given by its dtype, a number of the host by None."""

    dtype: np.dtype  # the compute type
    lr: np.dtype | None
    grad_scale: np.dtype | None
    decoupled: bool
    algorithm: str = "adam"  # or "radam", "adamax", "optax", "eps-hat"
    further: int = 0  # how many scalars there are behind neg_lr
    ema: bool = False  # the last of these scalars, w_ema, has another value at step 1
    random: bool = False  # the step has a key for random rounding
    counts: bool = True  # the step count is on the device
    found_inf: np.dtype | None = None  # of a flag that leaves the step out; None: there is none
    norm: bool = False  # clip by the norm of the gradients, a float64
    checks: bool = False  # leave the step out if that norm is not finite

    @property
    def skips(self):
        return self.found_inf is not None or self.checks

    @property
    def reals(self):
        """How many scalars of the compute type there are."""
        return 7 + self.further


class Settings(NamedTuple):
    """The numbers that the host passes to the kernel, in their order: two int64, then float64."""

    advance: int  # added to the step count first: 0 if the launch for another dtype added 1. If the host counts: the step
    seed: int
    sign: float  # of the gradient: -1 to maximize
    beta1: float
    beta2: float
    weight_decay: float
    w1: float  # a scalar already, like those below
    w2: float
    eps: float
    further1: float = 0.0  # those of the form behind neg_lr, in their order
    further2: float = 0.0
    further3: float = 0.0
    further4: float = 0.0
    further5: float = 0.0
    first_w_ema: float = 0.0  # w_ema, the last of them, at step 1
    max_norm: float = np.inf  # no scalar
    largest_norm: float = np.inf  # a larger norm counts as not finite


class ScalarsMemory:
    """Device memory for the scalars of a step, from `address` on: its key, a flag to skip it, then `adam.scalar_names`."""

    def __init__(self, owner, address, dtype, device):
        self.owner, self.address, self.dtype, self.device = owner, address, dtype, device


class Formula(NamedTuple):
    """The functions of the Python text. t is the step."""

    powers: Callable  # (t, beta1, beta2) -> beta1**t, beta2**t
    of_step: Callable  # (t, beta1**t, beta2**t, lr, beta2, weight_decay, eps) -> decay, inv_sqrt_bias2, eps, neg_lr
    clipped: Callable  # (grad_scale, norm, max_norm) -> the grad_scale that clips gradients of this norm
    too_large: Callable  # (norm, grad_scale, largest_norm) -> whether the scaled norm is too large, or NaN
    key: Callable  # (seed, t) -> the key of a step


def formula_in_python(algorithm, decoupled, op):
    """Return the Formula, for the host to run or for Numba to compile.

    algorithm: of an `adam.Form`, or "eps-hat". op: functions of float64, by the names of `primitives.PRIMITIVES`, and the casts
    u64 and i64 to integers.
    """
    add, sub, mul, div, sqrt, neg, abs_ = op.add, op.sub, op.mul, op.div, op.sqrt, op.neg, op.abs
    u64, i64 = op.u64, op.i64
    RADAM, ADAMAX, NADAM, OPTAX, EPS_HAT = (algorithm == x for x in ("radam", "adamax", "nadam", "optax", "eps-hat"))

    def powers(t, beta1, beta2):
        power1, power2 = 1.0, 1.0
        while t:
            if t & 1:
                power1, power2 = mul(power1, beta1), mul(power2, beta2)
            beta1, beta2 = mul(beta1, beta1), mul(beta2, beta2)
            t >>= 1
        return power1, power2

    def of_step(t, power1, power2, lr, beta2, weight_decay, eps):
        decay = mul(neg(lr), weight_decay) if decoupled else weight_decay
        neg_lr = neg(lr) if NADAM else div(neg(lr), sub(1.0, power1))  # NAdam's shares hold the bias of m
        bias2 = sub(1.0, power2)
        inv_sqrt_bias2 = 1.0
        if RADAM:
            rho_inf = sub(div(2.0, sub(1.0, beta2)), 1.0)
            rho = sub(rho_inf, div(mul(mul(2.0, float(t)), power2), bias2))
            if rho > 5.0:
                above = mul(mul(sub(rho, 4.0), sub(rho, 2.0)), rho_inf)
                below = mul(mul(sub(rho_inf, 4.0), sub(rho_inf, 2.0)), rho)
                neg_lr = mul(mul(neg_lr, sqrt(div(above, below))), sqrt(bias2))
            else:
                inv_sqrt_bias2, eps = 0.0, 1.0
        elif EPS_HAT:
            neg_lr = mul(neg_lr, sqrt(bias2))
        elif not ADAMAX:
            inv_sqrt_bias2 = div(1.0, bias2 if OPTAX else sqrt(bias2))
        return decay, inv_sqrt_bias2, eps, neg_lr

    def clipped(grad_scale, norm, max_norm):
        clip = div(max_norm, add(mul(norm, abs_(grad_scale)), CLIP_EPS))
        return grad_scale if clip >= 1.0 else mul(grad_scale, clip)  # NaN, if the norm is: as torch.nn.utils.clip_grad_norm_

    def too_large(norm, grad_scale, largest_norm):
        return not mul(norm, abs_(grad_scale)) <= largest_norm  # true for a NaN

    def key(seed, t):
        z = u64(u64(seed) + u64(t) * u64(GOLDEN))
        z = u64((z ^ (z >> u64(30))) * u64(MIX1))
        z = u64((z ^ (z >> u64(27))) * u64(MIX2))
        return i64(z ^ (z >> u64(31)))

    return Formula(powers, of_step, clipped, too_large, key)


IN_CUDA_C = r"""
const double unclipped = wide(GRAD_SCALE), norm_or_0 = NORM;
const bool skip = FOUND_INF || (CHECKS && !(mul_(norm_or_0, abs_(unclipped)) <= largest_norm));
#if COUNTS
const long long t = step[0] + (skip ? 0 : advance);
step[0] = t;
#else
const long long t = advance;
#endif
double power1 = 1.0, power2 = 1.0, b1 = beta1, b2 = beta2;
for (long long n = t; n; n >>= 1) {
    if (n & 1)
        power1 = mul_(power1, b1), power2 = mul_(power2, b2);
    b1 = mul_(b1, b1), b2 = mul_(b2, b2);
}
const double eta = wide(LR), bias2 = sub_(1.0, power2);
const double decay = DECOUPLED ? mul_(neg_(eta), weight_decay) : weight_decay;
double neg_lr = div_(neg_(eta), sub_(1.0, power1)), inv_sqrt_bias2 = 1.0, epsilon = eps;
if (RADAM) {
    const double rho_inf = sub_(div_(2.0, sub_(1.0, beta2)), 1.0);
    const double rho = sub_(rho_inf, div_(mul_(mul_(2.0, (double)t), power2), bias2));
    if (rho > 5.0) {
        const double above = mul_(mul_(sub_(rho, 4.0), sub_(rho, 2.0)), rho_inf);
        const double below = mul_(mul_(sub_(rho_inf, 4.0), sub_(rho_inf, 2.0)), rho);
        neg_lr = mul_(mul_(neg_lr, sqrt_(div_(above, below))), sqrt_(bias2));
    } else {
        inv_sqrt_bias2 = 0.0, epsilon = 1.0;
    }
} else if (EPS_HAT) {
    neg_lr = mul_(neg_lr, sqrt_(bias2));
} else if (!ADAMAX) {
    inv_sqrt_bias2 = div_(1.0, OPTAX ? bias2 : sqrt_(bias2));
}
double scale = mul_(sign, unclipped);
const double clip = div_(max_norm, add_(mul_(norm_or_0, abs_(scale)), CLIP_EPS));
if (CLIPS && !(clip >= 1.0))
    scale = mul_(scale, clip);
scale = add_(scale, 0.0);
const double all[] = {
    scale, decay, w1, w2, inv_sqrt_bias2, epsilon, neg_lr, further1, further2, further3, further4, further5};
#pragma unroll
for (int k = 0; k < N_SCALARS; ++k)
    narrow(scalars[k], EMA && k == N_SCALARS - 1 && t == 1 ? first_w_ema : all[k]);
#if WORDS
unsigned long long z = (unsigned long long)seed + (unsigned long long)t * GOLDEN;
z = (z ^ z >> 30) * MIX1;
z = (z ^ z >> 27) * MIX2;
words[0] = (long long)(z ^ z >> 31);
words[1] = skip;
#endif
"""

# A plain cast would flush subnormal numbers: CuPy compiles with -ftz=true
CASTS_IN_CUDA_C = """
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ double wide(float x) { double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(x)); return r; }
__device__ __forceinline__ void narrow(double& r, double x) { r = x; }
__device__ __forceinline__ void narrow(float& r, double x) { asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(x)); }
"""


def formula_in_cuda_c(form):
    """Return the formula for a ScalarsForm as CUDA C: the text before a kernel, and the kernel's body."""
    # A flag is read as bits, without a sign: a number other than zero leaves the step out.
    shift = 1 if form.found_inf is not None and form.found_inf.kind == "f" else 0
    numbers = {
        "COUNTS": form.counts, "CLIPS": form.norm, "CHECKS": form.checks, "WORDS": form.random or form.skips,
        "DECOUPLED": form.decoupled, "EMA": form.ema, "N_SCALARS": form.reals, "GOLDEN": GOLDEN, "MIX1": MIX1, "MIX2": MIX2,
    }  # fmt: skip
    numbers |= {x.upper().replace("-", "_"): form.algorithm == x for x in ("radam", "adamax", "optax", "eps-hat")}
    defined = {name: f"{value:d}ull" if value >> 32 else f"{value:d}" for name, value in numbers.items()} | {
        "LR": "lr" if form.lr is None else "lr[0]",
        "GRAD_SCALE": "grad_scale" if form.grad_scale is None else "grad_scale[0]",
        "NORM": "norm[0]" if form.norm or form.checks else "0.0",
        "FOUND_INF": "false" if form.found_inf is None else f"((found_inf[0] << {shift}) != 0)",
        "CLIP_EPS": CLIP_EPS,
    }
    return "".join(f"#define {name} {value}\n" for name, value in defined.items()) + CASTS_IN_CUDA_C, IN_CUDA_C


# Python's own operations on floats are those of IEEE 754
OPERATIONS_ON_HOST = SimpleNamespace(
    add=operator.add, sub=operator.sub, mul=operator.mul, div=operator.truediv, sqrt=math.sqrt, neg=operator.neg, abs=abs,
    u64=lambda x: x % 2**64, i64=lambda x: x - (x >> 63 << 64),
)  # fmt: skip


@functools.cache
def on_host(algorithm="adam", decoupled=False):
    """Return the Formula as Python functions of floats."""
    return formula_in_python(algorithm, decoupled, OPERATIONS_ON_HOST)


def step_key(seed, step):
    """Return the key of a step for random rounding, an int64: the step-th number of the generator SplitMix64.

    >>> hex(step_key(0, 1) % 2**64)  # its published first number for this seed
    '0xe220a8397b1dcdaf'
    """
    return on_host().key(seed, step)


def powers_on_host(beta1, beta2, step):
    """Return beta1**step and beta2**step as `Formula.powers` does, quicker: most of its products are kept from step to step.

    `**` gives other bits in half of all cases, and other ones on other machines.

    >>> powers_on_host(0.5, 0.25, 10)
    (0.0009765625, 9.5367431640625e-07)
    """
    low1, low2, squares = _factors(beta1, beta2, step >> 10)
    power1, power2 = low1[step & 1023], low2[step & 1023]
    for square1, square2 in squares:
        power1, power2 = power1 * square1, power2 * square2
    return power1, power2


@functools.lru_cache(maxsize=64)
def _factors(beta1, beta2, high):
    """Return both tables of `_low_powers`, and of both betas the squares for the bits of a step number above the lowest 10."""
    (low1, square1), (low2, square2) = _low_powers(beta1), _low_powers(beta2)
    squares = []
    while high:
        if high & 1:
            squares.append((square1, square2))
        square1, square2 = square1 * square1, square2 * square2
        high >>= 1
    return low1, low2, squares


@functools.lru_cache(maxsize=64)
def _low_powers(base):
    """Return the loop's result for each exponent of 10 bits, and base**1024, with which the loop goes on."""
    products = [1.0]
    for _ in range(10):
        products += [product * base for product in products]
        base *= base
    return products, base


NADAM_DECAY = 0.004  # psi of Dozat 2016, and torch's momentum_decay


def shares_of_nadam(beta1, step, formula="torch"):
    """Return NAdam's shares of m and of g in the direction.   (Dozat 2016, Incorporating Nesterov Momentum into Adam)

    They depend on all steps before, so only the host computes them. optax's do not: its beta1 stays the same in all steps.
    """
    if formula == "optax":
        power, next_power = (powers_on_host(beta1, 0.0, t)[0] for t in (step, step + 1))
        return beta1 / (1.0 - next_power), (1.0 - beta1) / (1.0 - power)
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
            break
    _products[beta1] = step, product
    return product
