"""Adam and its family in float64 NumPy, written from the papers. Kernels are measured against it, and share no code with it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .typing import Algorithm, ArrayBounds, Betas, Complex, Components, Formula, Integer, Number


def adam_step(
    param: np.ndarray[Any, Any],
    grad: np.ndarray[Any, Any],
    m: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    step: Integer,
    *,
    lr: float | np.ndarray[Any, Any] = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decoupled: bool = False,
    max_v: np.ndarray[Any, Any] | None = None,
    maximize: bool = False,
    grad_scale: Number = 1.0,
    clip_value: Number | None = None,
    bounds: ArrayBounds | None = None,
    algorithm: Algorithm = "adam",
    formula: Formula = "torch",
    eps_root: Number = 0.0,
    ema: np.ndarray[Any, Any] | None = None,
    ema_decay: Number = 0.999,
    lr_scale: float | np.ndarray[Any, Any] = 1.0,
    where: np.ndarray[Any, Any] | Literal["nonzero"] | None = None,
    complex: Complex | None = None,
    components: Components = 1,
) -> tuple[Any, ...]:
    """Return new float64 (param, m, v, max_v), and ema if it is given; nothing is changed in place.

    Arguments as in `gpuadam.adam_step`. Adam: Kingma & Ba 2015, Algorithm 1. L2 decay and AdamW: Loshchilov & Hutter 2019,
    Algorithm 2 (with the decay multiplied by lr, as in torch). AMSGrad: Reddi et al. 2018, Algorithm 2, with torch's bias
    correction of the maximum. NAdam: Dozat 2016, with torch's momentum_decay. RAdam: Liu et al. 2020, Algorithm 2; eps is added
    to sqrt(v), as in torch. AdaMax: Kingma & Ba 2015, Algorithm 2, with torch's eps. eps-hat: the last lines of Kingma & Ba 2015,
    section 2. optax: its documentation of `scale_by_adam`, with nesterov for NAdam, and `scale_by_amsgrad`. components: Ling et
    al. 2022, VectorAdam.

    >>> param, m, v, _ = adam_step(np.array([0.5]), np.array([-33.0]), np.zeros(1), np.zeros(1), 1, lr=0.1)
    >>> print(param)
    [0.6]
    """
    if np.iscomplexobj(param):
        return _of_complex(
            (param, grad, m, v, max_v, ema), complex, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled=decoupled, maximize=maximize, grad_scale=grad_scale, clip_value=clip_value, bounds=bounds,
            algorithm=algorithm, formula=formula, eps_root=eps_root, ema_decay=ema_decay, lr_scale=lr_scale, where=where,
        )  # fmt: skip
    theta, g, m = old_theta, old_g, old_m = [np.asarray(x, "float64") for x in (param, grad, m)]
    lack_last = [components > 1 and x is not None and 0 < np.ndim(x) < theta.ndim for x in (v, max_v)]
    v, lr = _beside(theta, v), lr * _beside(theta, lr_scale)
    max_v = None if max_v is None else _beside(theta, max_v)
    old_v, old_max_v = v, max_v
    beta1, beta2 = betas
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    with np.errstate(all="ignore"):  # infinities and NaN are part of what is compared
        g = -g * grad_scale if maximize else g * grad_scale
        g = g if clip_value is None else np.clip(g, -clip_value, clip_value)
        if weight_decay and decoupled:
            theta = theta - lr * weight_decay * theta
        elif weight_decay:
            g = g + weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        size = np.abs(g) if components == 1 else np.sqrt(np.sum(g**2, axis=-1, keepdims=True))
        v = np.maximum(beta2 * v, size + eps) if algorithm == "adamax" else beta2 * v + (1 - beta2) * size**2
        if max_v is not None:
            max_v = np.maximum(max_v, v / bias2 if formula == "optax" else v)
        largest = v if max_v is None else max_v
        v_hat = largest if formula == "optax" and max_v is not None else largest / bias2
        if formula == "eps-hat":
            direction = np.sqrt(bias2) / bias1 * m / (np.sqrt(largest) + eps)
        elif algorithm == "adam":
            direction = m / bias1 / (np.sqrt(v_hat + eps_root) + eps)
        elif algorithm == "nadam" and formula == "optax":
            m_bar = beta1 * m / (1 - beta1 ** (step + 1)) + (1 - beta1) * g / bias1
            direction = m_bar / (np.sqrt(v_hat) + eps)
        elif algorithm == "nadam":
            mu = beta1 * (1 - 0.5 * 0.96 ** (0.004 * np.arange(1, step + 2)))
            now, following = np.prod(mu[:-1]), np.prod(mu)
            m_bar = mu[-1] * m / (1 - following) + (1 - mu[-2]) * g / (1 - now)
            direction = m_bar / (np.sqrt(v_hat) + eps)
        elif algorithm == "radam":
            direction = m / bias1
            longest = 2 / (1 - beta2) - 1
            length = longest - 2 * step * beta2**step / bias2
            if length > 5:
                rectifier = np.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
                direction = rectifier * direction * np.sqrt(bias2) / (np.sqrt(v) + eps)
        else:
            direction = m / bias1 / v
        theta = theta - lr * direction
        low: Any
        high: Any
        low, high = (None, None) if bounds is None else bounds
        theta = theta if low is None else np.where(theta < low, low, theta)
        theta = theta if high is None else np.where(theta > high, high, theta)
        new: tuple = theta, m, v, max_v
        if where is not None:
            flags = old_g != 0 if isinstance(where, str) else _beside(theta, where) != 0
            if isinstance(where, str) and components > 1:
                flags = flags.any(axis=-1, keepdims=True)
            old = old_theta, old_m, old_v, old_max_v
            new = tuple(x if x is None else np.where(flags, x, y) for x, y in zip(new, old, strict=True))
        new = (*new[:2], *(x[..., 0] if without_last else x for x, without_last in zip(new[2:], lack_last, strict=True)))
        if ema is None:
            return new
        return *new, ema_decay * np.asarray(ema, "float64") + (1 - ema_decay) * new[0]


def _beside(theta, x):
    """Return an array in float64 that goes with theta number by number: one of rows or vectors gets the dimensions it lacks."""
    x = np.asarray(x, "float64")
    return x.reshape(x.shape + (1,) * (theta.ndim - x.ndim)) if x.ndim else x


def _of_complex(arrays, complex, step, **options):
    """Return the same of complex numbers, by their real and imaginary parts. arrays: param, grad, m, v, max_v and ema."""

    def parts(x):
        return np.stack([np.real(x), np.imag(x)], axis=-1).astype("float64") if np.ndim(x) else x

    def whole(x):
        return x[..., 0] + 1j * x[..., 1]

    joint = complex == "joint"
    param, grad, m, v, max_v, ema = arrays
    v, max_v = (x if joint or x is None else parts(x) for x in (v, max_v))
    given = parts(param), parts(grad), parts(m), v, step
    ema = None if ema is None else parts(ema)
    param, m, v, max_v, *ema = adam_step(*given, max_v=max_v, ema=ema, components=2 if joint else 1, **options)
    return whole(param), whole(m), *(x if joint or x is None else whole(x) for x in (v, max_v)), *map(whole, ema)
