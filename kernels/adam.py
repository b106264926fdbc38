"""THE RULE: one Adam step on one element, once in Python for Numba and once in CUDA C for CuPy.

The two say the same line by line. Every operation is a row of `primitives.py` and rounds once, so every backend gives the same
bits. Parts that a step does not use are left out at compile time.

m and v are PyTorch's exp_avg and exp_avg_sq, and optax's mu and nu; max_v is PyTorch's max_exp_avg_sq.

    g      = grad_scale * grad
    g      = min(max(g, -clip_value), clip_value)           clipping by value
    g      = g + weight_decay * param                       L2 decay
    param  = param - lr * weight_decay * param              decoupled decay
    m      = m + (1 - beta1) * (g - m)                      Kingma & Ba 2015, Algorithm 1 (arXiv:1412.6980)
    v      = v + (1 - beta2) * (g * g - v)
    max_v  = max(max_v, v)                                  AMSGrad, Reddi et al. 2018 (arXiv:1904.09237)
    param  = param - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
    param  = min(max(param, low), high)                     bounds
    ema    = ema + (1 - ema_decay) * (param - ema)

lr_scale multiplies lr. Where `where` is 0, param and its moments stay as they were, and ema, a mean over steps, goes on.

An element may be a vector of numbers that share a v, such as both parts of a complex number: then g * g is the sum of their
squares, |g| its root, and the rest goes number by number.

The family differs in the last line before bounds. NAdam (Dozat 2016) takes a mean of m and g for m; RAdam (Liu et al. 2020,
arXiv:1908.03265) has other scalars: another lr, and before the variance is tractable a denominator of 1; AdaMax (Kingma & Ba
2015, Algorithm 2) has v = max(beta2 * v, |g| + eps) and divides by it. optax divides by
sqrt(v / (1 - beta2**t) + eps_root) + eps, and its AMSGrad takes the maximum of v / (1 - beta2**t).
"""

import collections
import functools
from typing import NamedTuple

from gpuadam.kernels.operands import Arrays


class Form(NamedTuple):
    """The options of a step that are known when its kernel is compiled."""

    arrays: Arrays = Arrays()
    algorithm: str = "adam"  # or "nadam", "radam", "adamax"; "optax" is Adam with its denominator
    scaled: bool = False  # the gradient is multiplied by grad_scale
    clips: bool = False  # its elements are clipped
    l2: bool = False  # weight decay joins the gradient (Adam)
    decoupled: bool = False  # weight decay joins the parameter (AdamW; Loshchilov & Hutter 2019, arXiv:1711.05101)
    bounded: bool = False  # the parameter has bounds, numbers or arrays
    near1: bool = True  # 1 - beta1 < 1/2: m is interpolated from m, else from g
    near2: bool = True  # likewise v, from v or from g * g
    near_ema: bool = True  # likewise ema, from ema or from param
    zero_grad: bool = False  # zeros take the place of the gradient
    skips: bool = False  # a flag on the device can turn the step off

    @property
    def dtype(self):
        """The type that is computed with."""
        return self.arrays.compute

    @property
    def amsgrad(self):
        return self.arrays.amsgrad

    @property
    def reads_param(self):
        """Whether the rule looks at the parameter. If it returns the change alone, only some options do."""
        return not self.arrays.change or self.l2 or self.decoupled or self.bounded


class Scalars(NamedTuple):
    """The numbers that are the same for every element of a step, of the compute type, in the order of kernel arguments."""

    grad_scale: float  # negative to maximize
    decay: float  # weight_decay if l2, -lr * weight_decay if decoupled
    w1: float  # 1 - beta1 if near1, else that minus 1
    w2: float  # 1 - beta2 if near2, else that minus 1; of AdaMax beta2
    # 1 / sqrt(1 - beta2**step); of optax its square; of RAdam 1, or 0 before the variance is tractable
    inv_sqrt_bias2: float
    eps: float  # of RAdam 1 before the variance is tractable
    neg_lr: float  # -lr / (1 - beta1**step), times further factors of an algorithm


FURTHER = ("of_m", "of_g", "eps_root", "clip_value", "least", "most", "w_ema")  # the scalars that not every form has
MOST_SCALARS = len(Scalars._fields) + len(FURTHER)


@functools.lru_cache(maxsize=256)
def scalars_type(form):
    """Return the type of a form's scalars: Scalars, or a named tuple with more fields."""
    # of_m and of_g are the shares in NAdam's direction; w_ema is 1 - ema_decay if near_ema, else that minus 1
    more = {"nadam": ("of_m", "of_g"), "optax": ("eps_root",)}.get(form.algorithm, ())
    more += ("clip_value",) * form.clips + ("least", "most") * form.bounded + ("w_ema",) * bool(form.arrays.ema)
    return collections.namedtuple("MoreScalars", Scalars._fields + more) if more else Scalars


def scalar_names(form):
    """Return the names of the scalars that a form uses."""
    return scalars_type(form)._fields


def options(form):
    """Return the constants by which the texts of the rule leave out unused parts."""
    named = {
        "SCALED": form.scaled, "CLIPS": form.clips, "L2": form.l2, "DECOUPLED": form.decoupled,
        "AMSGRAD": form.arrays.amsgrad, "NEAR1": form.near1, "NEAR2": form.near2, "BOUNDED": form.bounded,
        "NEAR_EMA": form.near_ema, "EMA": form.arrays.ema != "", "ROOT": form.arrays.grouped,
        "CHANGE": form.arrays.change != "", "LR_SCALE": form.arrays.lr_scale != "", "WHERE": form.arrays.where != "",
        "NONZERO": form.arrays.where == "nonzero", "LOWS": form.arrays.low != "", "HIGHS": form.arrays.high != "",
    }  # fmt: skip
    return named | {name.upper(): form.algorithm == name for name in ("nadam", "adamax", "optax")}


def in_python(form, op):
    """Return the rule as a Python function of an element; op holds the primitives, on numbers of any kind."""
    fma, add, sub, mul, div, sqrt, neg, abs_, larger, zero_below, at_least, at_most, choose = (
        op.fma, op.add, op.sub, op.mul, op.div, op.sqrt, op.neg, op.abs, op.larger, op.zero_below, op.at_least, op.at_most,
        op.choose,
    )  # fmt: skip
    squares, plus_squares, length, nonzero = op.squares, op.plus_squares, op.length, op.nonzero
    (
        SCALED, CLIPS, L2, DECOUPLED, AMSGRAD, NEAR1, NEAR2, BOUNDED, NEAR_EMA, EMA, ROOT, CHANGE, LR_SCALE, WHERE, NONZERO,
        LOWS, HIGHS, NADAM, ADAMAX, OPTAX,
    ) = options(form).values()  # fmt: skip
    names = scalar_names(form)
    OF_M, OF_G, EPS_ROOT, CLIP_VALUE, LEAST, MOST, W_EMA = (names.index(x) if x in names else 0 for x in FURTHER)

    def update(param, grad, m, v, max_v, ema, lr_scale, where, low, high, s):
        grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr = s[:7]
        old_param, old_m, old_v, old_max_v, where = param, m, v, max_v, nonzero(grad) if NONZERO else where
        if LR_SCALE:
            decay, neg_lr = mul(decay, lr_scale) if DECOUPLED else decay, mul(neg_lr, lr_scale)
        g = mul(grad_scale, grad) if SCALED else grad
        if CLIPS:
            g = at_most(at_least(g, neg(s[CLIP_VALUE])), s[CLIP_VALUE])
        if L2:
            g = fma(decay, param, g)
        if DECOUPLED:
            param = mul(decay, param) if CHANGE else fma(decay, param, param)
        m = fma(w1, sub(g, m), m if NEAR1 else g)
        v = (
            larger(mul(w2, v), add(length(g), eps))
            if ADAMAX
            else fma(w2, plus_squares(neg(v), g), v if NEAR2 else squares(g))
        )
        v_hat = mul(v, inv_sqrt_bias2) if OPTAX else v
        max_v = larger(max_v, v_hat) if AMSGRAD else v_hat
        root = v if ADAMAX else sqrt(v) if OPTAX else sqrt(max_v)
        denom = v if ADAMAX else add(sqrt(add(max_v, s[EPS_ROOT])), eps) if OPTAX else fma(root, inv_sqrt_bias2, eps)
        direction = fma(s[OF_G], g, mul(s[OF_M], m)) if NADAM else m
        step = div(direction, denom)
        param = mul(neg_lr, step) if CHANGE and not DECOUPLED else fma(neg_lr, step, param)
        if BOUNDED:
            bounded = add(old_param, param) if CHANGE else param
            bounded = at_most(at_least(bounded, low if LOWS else s[LEAST]), high if HIGHS else s[MOST])
            param = sub(bounded, old_param) if CHANGE else bounded
        if WHERE:
            param = choose(where, param, abs_(where) if CHANGE else old_param)
        if EMA:
            ema = fma(s[W_EMA], sub(param, ema), ema if NEAR_EMA else param)
        # A gradient that stays zero makes m subnormal, and a CPU then 80 times slower. The v that divides is never flushed
        # without m: m / (0 + eps) could be anything. m stays where another v is flushed: with AMSGrad max_v may be large.
        m = zero_below(zero_below(m, max_v if AMSGRAD else v), abs_(m))
        max_v = zero_below(root, v) if ROOT else zero_below(max_v, max_v)  # 8-bit state keeps the root of v
        v = zero_below(v, v)
        if WHERE:
            m, v, max_v = choose(where, m, old_m), choose(where, v, old_v), choose(where, max_v, old_max_v)
        return param, m, v, max_v, ema

    return update


IN_CUDA_C = r"""
__device__ __forceinline__ void update(
    V& param, V grad, V& m, T& v, T& max_v, V& ema, T lr_scale, T where, V low, V high, %(scalars)s) {
    %(unused)s
    const V old_param = param, old_m = m;
    const T old_v = v, old_max_v = max_v;
    where = NONZERO ? nonzero_(grad) : where;
    if (LR_SCALE)
        decay = DECOUPLED ? mul_(decay, lr_scale) : decay, neg_lr = mul_(neg_lr, lr_scale);
    V g = SCALED ? mul_(grad_scale, grad) : grad;
    if (CLIPS)
        g = at_most_(at_least_(g, neg_(clip_value)), clip_value);
    if (L2)
        g = fma_(decay, param, g);
    if (DECOUPLED)
        param = CHANGE ? mul_(decay, param) : fma_(decay, param, param);
    m = fma_(w1, sub_(g, m), NEAR1 ? m : g);
    v = ADAMAX ? larger_(mul_(w2, v), add_(length_(g), eps))
               : fma_(w2, plus_squares_(neg_(v), g), NEAR2 ? v : squares_(g));
    T v_hat = OPTAX ? mul_(v, inv_sqrt_bias2) : v;
    max_v = AMSGRAD ? larger_(max_v, v_hat) : v_hat;
    T root = ADAMAX ? v : OPTAX ? sqrt_(v) : sqrt_(max_v);
    T denom = ADAMAX ? v : OPTAX ? add_(sqrt_(add_(max_v, eps_root)), eps) : fma_(root, inv_sqrt_bias2, eps);
    V direction = NADAM ? fma_(of_g, g, mul_(of_m, m)) : m;
    V step = div_(direction, denom);
    param = CHANGE && !DECOUPLED ? mul_(neg_lr, step) : fma_(neg_lr, step, param);
    if (BOUNDED) {
        V bounded = CHANGE ? add_(old_param, param) : param;
        bounded = at_most_(at_least_(bounded, LOWS ? low : least), HIGHS ? high : most);
        param = CHANGE ? sub_(bounded, old_param) : bounded;
    }
    if (WHERE)
        param = choose_(where, param, CHANGE ? abs_(where) : old_param);
    if (EMA)
        ema = fma_(w_ema, sub_(param, ema), NEAR_EMA ? ema : param);
    // A gradient that stays zero makes m subnormal, and a CPU then 80 times slower. The v that divides is never flushed
    // without m: m / (0 + eps) could be anything. m stays where another v is flushed: with AMSGrad max_v may be large.
    m = zero_below_(zero_below_(m, AMSGRAD ? max_v : v), abs_(m));
    max_v = ROOT ? zero_below_(root, v) : zero_below_(max_v, max_v);  // 8-bit state keeps the root of v
    v = zero_below_(v, v);
    if (WHERE)
        m = choose_(where, m, old_m), v = choose_(where, v, old_v), max_v = choose_(where, max_v, old_max_v);
}
"""


def in_cuda_c(form):
    """Return the rule as CUDA C over `T`, with the form's options as constants."""
    defined = "".join(f"#define {name} {value:d}\n" for name, value in options(form).items())
    used = scalar_names(form)
    unused = "".join(f"const T {name} = 0; " for name in FURTHER if name not in used)
    return defined + IN_CUDA_C % {"scalars": ", ".join(f"T {name}" for name in used), "unused": unused}
