"""Adam and its family in float64 NumPy, written from the papers. Kernels are measured against it, and share no code with it."""

import numpy as np


def adam_step(
    param,
    grad,
    m,
    v,
    step,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    max_v=None,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    bounds=None,
    algorithm="adam",
    formula="torch",
    eps_root=0.0,
    ema=None,
    ema_decay=0.999,
    lr_scale=1.0,
    where=None,
):
    """Return new float64 (param, m, v, max_v), and ema if it is given; nothing is changed in place.

    Arguments as in `gpuadam.adam_step`. Adam: Kingma & Ba 2015, Algorithm 1. L2 decay and AdamW: Loshchilov & Hutter 2019,
    Algorithm 2 (with the decay multiplied by lr, as in torch). AMSGrad: Reddi et al. 2018, Algorithm 2, with torch's bias
    correction of the maximum. NAdam: Dozat 2016, with torch's momentum_decay. RAdam: Liu et al. 2020, Algorithm 2; eps is added
    to sqrt(v), as in torch. AdaMax: Kingma & Ba 2015, Algorithm 2, with torch's eps. eps-hat: the last lines of Kingma & Ba 2015,
    section 2. optax: its documentation of `scale_by_adam` and `scale_by_amsgrad`.

    >>> param, m, v, _ = adam_step(np.array([0.5]), np.array([-33.0]), np.zeros(1), np.zeros(1), 1, lr=0.1)
    >>> print(param)
    [0.6]
    """
    theta, g, m, v = old_theta, old_g, old_m, old_v = [np.asarray(x, "float64") for x in (param, grad, m, v)]
    old_max_v, lr = max_v, lr * np.asarray(lr_scale, "float64")
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
        v = np.maximum(beta2 * v, np.abs(g) + eps) if algorithm == "adamax" else beta2 * v + (1 - beta2) * g**2
        if max_v is not None:
            max_v = np.maximum(np.asarray(max_v, "float64"), v / bias2 if formula == "optax" else v)
        largest = v if max_v is None else max_v
        v_hat = largest if formula == "optax" and max_v is not None else largest / bias2
        if formula == "eps-hat":
            direction = np.sqrt(bias2) / bias1 * m / (np.sqrt(largest) + eps)
        elif algorithm == "adam":
            direction = m / bias1 / (np.sqrt(v_hat + eps_root) + eps)
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
        theta = theta if bounds is None else np.clip(theta, *bounds)
        new: tuple = theta, m, v, max_v
        if where is not None:
            flags = old_g != 0 if isinstance(where, str) else np.asarray(where) != 0
            old = old_theta, old_m, old_v, old_max_v
            new = tuple(x if x is None else np.where(flags, x, y) for x, y in zip(new, old, strict=True))
        if ema is None:
            return new
        return *new, ema_decay * np.asarray(ema, "float64") + (1 - ema_decay) * new[0]
