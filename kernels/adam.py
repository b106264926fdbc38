"""THE RULE: one Adam step on one element, once in Python for Numba and once in CUDA C for CuPy.

The two say the same line by line. Each line is one rounding, or two where it holds two operations, and every operation is a
row of `primitives.py`; that is why every backend gives the same bits. What a step does not use is left out at compile time.

m and v are PyTorch's exp_avg and exp_avg_sq, and optax's mu and nu; max_v is PyTorch's max_exp_avg_sq.

    g      = grad_scale * grad
    g      = g + weight_decay * param                       L2 decay
    param  = param - lr * weight_decay * param              decoupled decay
    m      = m + (1 - beta1) * (g - m)                      Kingma & Ba 2015, Algorithm 1 (arXiv:1412.6980)
    v      = v + (1 - beta2) * (g * g - v)
    max_v  = max(max_v, v)                                  AMSGrad, Reddi et al. 2018 (arXiv:1904.09237)
    param  = param - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
"""

from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
    """What is known of a step when its kernel is compiled."""

    dtype: np.dtype = np.dtype("float32")
    scaled: bool = False  # the gradient is multiplied by grad_scale
    l2: bool = False  # weight decay joins the gradient (Adam)
    decoupled: bool = False  # weight decay joins the parameter (AdamW; Loshchilov & Hutter 2019, arXiv:1711.05101)
    amsgrad: bool = False
    near1: bool = True  # 1 - beta1 < 1/2: m is interpolated from m, else from g
    near2: bool = True  # likewise v, from v or from g * g


class Scalars(NamedTuple):
    """What is the same for every element of a step: numbers of the compute type, in the order of kernel arguments."""

    grad_scale: float  # negative to maximize
    decay: float  # weight_decay if l2, -lr * weight_decay if decoupled
    w1: float  # 1 - beta1 if near1, else that minus 1
    w2: float  # 1 - beta2 if near2, else that minus 1
    inv_sqrt_bias2: float  # 1 / sqrt(1 - beta2**step)
    eps: float
    neg_lr: float  # -lr / (1 - beta1**step)


SCALARS = Scalars._fields


def in_python(form, op):
    """Return the rule as a Python function for Numba to compile; op holds the primitives."""
    fma, sub, mul, div, sqrt, neg, abs_, larger = op.fma, op.sub, op.mul, op.div, op.sqrt, op.neg, op.abs, op.larger
    zero_below = op.zero_below
    SCALED, L2, DECOUPLED, AMSGRAD, NEAR1, NEAR2 = form[1:]

    def update(param, grad, m, v, max_v, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        g = mul(grad_scale, grad) if SCALED else grad
        if L2:
            g = fma(decay, param, g)
        if DECOUPLED:
            param = fma(decay, param, param)
        m = fma(w1, sub(g, m), m if NEAR1 else g)
        v = fma(w2, fma(g, g, neg(v)), v if NEAR2 else mul(g, g))
        max_v = larger(max_v, v) if AMSGRAD else v
        denom = fma(sqrt(max_v), inv_sqrt_bias2, eps)
        param = fma(neg_lr, div(m, denom), param)
        # A gradient that stays zero makes m subnormal, and a CPU then 80 times slower. v is never flushed without m:
        # m / (0 + eps) could be anything.
        m = zero_below(zero_below(m, v), abs_(m))
        v = zero_below(v, v)
        max_v = zero_below(max_v, max_v)
        return param, m, v, max_v

    return update


IN_CUDA_C = r"""
__device__ __forceinline__ void update(T& param, T grad, T& m, T& v, T& max_v,
                                       T grad_scale, T decay, T w1, T w2, T inv_sqrt_bias2, T eps, T neg_lr) {
    T g = SCALED ? mul_(grad_scale, grad) : grad;
    if (L2)
        g = fma_(decay, param, g);
    if (DECOUPLED)
        param = fma_(decay, param, param);
    m = fma_(w1, sub_(g, m), NEAR1 ? m : g);
    v = fma_(w2, fma_(g, g, neg_(v)), NEAR2 ? v : mul_(g, g));
    max_v = AMSGRAD ? larger_(max_v, v) : v;
    T denom = fma_(sqrt_(max_v), inv_sqrt_bias2, eps);
    param = fma_(neg_lr, div_(m, denom), param);
    // A gradient that stays zero makes m subnormal, and a CPU then 80 times slower. v is never flushed without m:
    // m / (0 + eps) could be anything.
    m = zero_below_(zero_below_(m, v), abs_(m));
    v = zero_below_(v, v);
    max_v = zero_below_(max_v, max_v);
}
"""


def in_cuda_c(form):
    """Return the rule as CUDA C over `T`, with the form's options as constants."""
    options = zip(("SCALED", "L2", "DECOUPLED", "AMSGRAD", "NEAR1", "NEAR2"), form[1:], strict=True)
    return "".join(f"#define {name} {value:d}\n" for name, value in options) + IN_CUDA_C
