"""The scalars of a step, computed on the device by one thread: for graphs captured once and replayed with current values.

It advances the step count and does what `hyperparameters.form_and_scalars` does on the host: the same float64 operations, rounded
once to the compute type, so the bits are the same. The text is here twice, as in `adam.py`, over the primitives of float64.
What the host knows for good, such as 1 - beta2, comes as an argument.

It also does what only the device can know without waiting for it: clipping by the gradients' norm, and leaving a step out.
"""

from typing import NamedTuple

import numpy as np

KEY_AT, SKIP_AT, REALS_AT = 0, 8, 16  # bytes into a Memory
MEMORY_BYTES = 128
CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64: Steele, Lea & Flood 2014


class Form(NamedTuple):
    """What is known when the kernel is compiled. An array is given by its dtype, and None stands for a number of the host."""

    dtype: np.dtype  # the compute type
    lr: np.dtype | None
    grad_scale: np.dtype | None
    decoupled: bool
    algorithm: str = "adam"  # or "radam", "adamax", "optax", "eps-hat"
    ema: bool = False
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
        return 7 + (self.algorithm == "optax") + self.ema


class Settings(NamedTuple):
    """What the host knows, in the order of kernel arguments: two int64, then float64."""

    advance: int  # added to the step count first: 0 where it was advanced for another dtype. Without a count there, the step
    seed: int
    sign: float  # of the gradient: -1 to maximize
    beta1: float
    beta2: float
    weight_decay: float
    w1: float  # these three go through as they are
    w2: float
    eps: float
    eps_root: float = 0.0  # likewise
    w_ema: float = 0.0  # likewise
    first_w_ema: float = 0.0  # likewise, at step 1
    max_norm: float = np.inf
    largest_norm: float = np.inf  # that is taken for finite


SETTINGS = Settings._fields


class Memory:
    """Scalars in device memory, from `address`: the step's key, whether to skip it, then the reals by `adam.scalars`."""

    def __init__(self, owner, address, dtype, device):
        self.owner, self.address, self.dtype, self.device = owner, address, dtype, device


def step_key(seed, step):
    """Return the key of a step for random rounding, an int64: the step-th number of the generator SplitMix64.

    >>> hex(step_key(0, 1) % 2**64)  # its published first number for this seed
    '0xe220a8397b1dcdaf'
    """
    z = (seed + step * GOLDEN) % 2**64
    z = (z ^ z >> 30) * MIX1 % 2**64
    z = (z ^ z >> 27) * MIX2 % 2**64
    z ^= z >> 31
    return z - (z >> 63 << 64)


def in_python(form, op, narrow):
    """Return the computation as Python functions for Numba to compile: of the scalars, the key and whether to skip.

    narrow: float64 to the compute type.
    """
    add, sub, mul, div, sqrt, neg, abs_ = op.add, op.sub, op.mul, op.div, op.sqrt, op.neg, op.abs
    DECOUPLED, NORM, EMA = form.decoupled, form.norm, form.ema
    RADAM, ADAMAX, OPTAX, EPS_HAT = (form.algorithm == name for name in ("radam", "adamax", "optax", "eps-hat"))
    from numba import types

    u64 = types.uint64

    def scalars(
        t, lr, grad_scale, norm, sign, beta1, beta2, weight_decay, w1, w2, eps, eps_root, w_ema, first_w_ema, max_norm
    ):
        power1, power2, b1, b2, n = 1.0, 1.0, beta1, beta2, t
        while n:
            if n & 1:
                power1, power2 = mul(power1, b1), mul(power2, b2)
            b1, b2 = mul(b1, b1), mul(b2, b2)
            n >>= 1
        scale = mul(sign, grad_scale)
        if NORM:
            clip = div(max_norm, add(mul(norm, abs_(grad_scale)), CLIP_EPS))
            if clip < 1.0:
                scale = mul(scale, clip)
        decay = mul(neg(lr), weight_decay) if DECOUPLED else weight_decay
        neg_lr = div(neg(lr), sub(1.0, power1))
        if ADAMAX:
            inv_sqrt_bias2 = 1.0
        elif RADAM:
            rho_inf = sub(div(2.0, sub(1.0, beta2)), 1.0)
            rho = sub(rho_inf, div(mul(mul(2.0, types.float64(t)), power2), sub(1.0, power2)))
            inv_sqrt_bias2 = 1.0
            if rho > 5.0:
                above = mul(mul(sub(rho, 4.0), sub(rho, 2.0)), rho_inf)
                below = mul(mul(sub(rho_inf, 4.0), sub(rho_inf, 2.0)), rho)
                neg_lr = mul(mul(neg_lr, sqrt(div(above, below))), sqrt(sub(1.0, power2)))
            else:
                inv_sqrt_bias2, eps = 0.0, 1.0
        elif EPS_HAT:
            inv_sqrt_bias2, neg_lr = 1.0, mul(neg_lr, sqrt(sub(1.0, power2)))
        elif OPTAX:
            inv_sqrt_bias2 = div(1.0, sub(1.0, power2))
        else:
            inv_sqrt_bias2 = div(1.0, sqrt(sub(1.0, power2)))
        base: tuple = (
            narrow(scale), narrow(decay), narrow(w1), narrow(w2), narrow(inv_sqrt_bias2), narrow(eps), narrow(neg_lr),
        )  # fmt: skip
        if OPTAX:
            base = base + (narrow(eps_root),)  # noqa: RUF005 - Numba unpacks no tuple there
        if EMA:
            return base + (narrow(first_w_ema if t == 1 else w_ema),)  # noqa: RUF005 - Numba unpacks no tuple there
        return base

    def key(seed, t):
        z = u64(seed) + u64(t) * u64(GOLDEN)
        z = (z ^ (z >> u64(30))) * u64(MIX1)
        z = (z ^ (z >> u64(27))) * u64(MIX2)
        return types.int64(z ^ (z >> u64(31)))

    def too_large(norm, grad_scale, largest_norm):
        return not mul(norm, abs_(grad_scale)) <= largest_norm  # nor is a NaN

    return scalars, key, too_large


IN_CUDA_C = r"""
const double scale_given = wide(GRAD_SCALE), norm_given = NORM;
const bool skip = FOUND_INF || (CHECKS && !(mul_(norm_given, abs_(scale_given)) <= largest_norm));
#if COUNTS
const long long t = step[0] + (skip ? 0 : advance);
step[0] = t;
#else
const long long t = advance;
#endif
double power1 = 1.0, power2 = 1.0, b1 = beta1, b2 = beta2;
for (long long n = t; n; n >>= 1) {
    if (n & 1) {
        power1 = mul_(power1, b1);
        power2 = mul_(power2, b2);
    }
    b1 = mul_(b1, b1);
    b2 = mul_(b2, b2);
}
double scale = mul_(sign, scale_given);
#if CLIPS
const double clip = div_(max_norm, add_(mul_(norm_given, abs_(scale_given)), CLIP_EPS));
if (clip < 1.0)
    scale = mul_(scale, clip);
#endif
const double eta = wide(LR);
const double decay = DECOUPLED ? mul_(neg_(eta), weight_decay) : weight_decay;
double neg_lr = div_(neg_(eta), sub_(1.0, power1)), epsilon = eps;
#if ADAMAX
double inv_sqrt_bias2 = 1.0;
#elif RADAM
const double rho_inf = sub_(div_(2.0, sub_(1.0, beta2)), 1.0);
const double rho = sub_(rho_inf, div_(mul_(mul_(2.0, (double)t), power2), sub_(1.0, power2)));
double inv_sqrt_bias2 = 1.0;
if (rho > 5.0) {
    const double above = mul_(mul_(sub_(rho, 4.0), sub_(rho, 2.0)), rho_inf);
    const double below = mul_(mul_(sub_(rho_inf, 4.0), sub_(rho_inf, 2.0)), rho);
    neg_lr = mul_(mul_(neg_lr, sqrt_(div_(above, below))), sqrt_(sub_(1.0, power2)));
} else {
    inv_sqrt_bias2 = 0.0;
    epsilon = 1.0;
}
#elif EPS_HAT
double inv_sqrt_bias2 = 1.0;
neg_lr = mul_(neg_lr, sqrt_(sub_(1.0, power2)));
#elif OPTAX
double inv_sqrt_bias2 = div_(1.0, sub_(1.0, power2));
#else
double inv_sqrt_bias2 = div_(1.0, sqrt_(sub_(1.0, power2)));
#endif
const double of_ema = t == 1 ? first_w_ema : w_ema;
const double all[] = {scale, decay, w1, w2, inv_sqrt_bias2, epsilon, neg_lr, OPTAX ? eps_root : of_ema, of_ema};
#pragma unroll
for (int k = 0; k < N_SCALARS; ++k)
    narrow(scalars[k], all[k]);
#if WORDS
unsigned long long z = (unsigned long long)seed + (unsigned long long)t * GOLDEN;
z = (z ^ z >> 30) * MIX1;
z = (z ^ z >> 27) * MIX2;
words[0] = (long long)(z ^ z >> 31);
words[1] = skip;
#endif
"""


def preamble(form):
    """Return what IN_CUDA_C needs of its form."""
    # A flag is read as bits, without a sign: what is not zero leaves the step out.
    shift = 1 if form.found_inf is not None and form.found_inf.kind == "f" else 0
    defined = {
        "DECOUPLED": int(form.decoupled),
        "RADAM": int(form.algorithm == "radam"),
        "ADAMAX": int(form.algorithm == "adamax"),
        "OPTAX": int(form.algorithm == "optax"),
        "EPS_HAT": int(form.algorithm == "eps-hat"),
        "COUNTS": int(form.counts),
        "CLIPS": int(form.norm),
        "CHECKS": int(form.checks),
        "WORDS": int(form.random or form.skips),
        "N_SCALARS": form.reals,
        "LR": "lr" if form.lr is None else "lr[0]",
        "GRAD_SCALE": "grad_scale" if form.grad_scale is None else "grad_scale[0]",
        "NORM": "norm[0]" if form.norm or form.checks else "0.0",
        "FOUND_INF": "false" if form.found_inf is None else f"((found_inf[0] << {shift}) != 0)",
        "CLIP_EPS": repr(CLIP_EPS),
        "GOLDEN": f"{GOLDEN:#x}ull",
        "MIX1": f"{MIX1:#x}ull",
        "MIX2": f"{MIX2:#x}ull",
    }
    # a plain cast would flush subnormal numbers: CuPy compiles with -ftz=true
    return (
        "".join(f"#define {name} {value}\n" for name, value in defined.items())
        + """
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ double wide(float x) { double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(x)); return r; }
__device__ __forceinline__ void narrow(double& r, double x) { r = x; }
__device__ __forceinline__ void narrow(float& r, double x) { asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(x)); }
"""
    )
