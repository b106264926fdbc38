"""Adam in float64 NumPy, written from the papers: what the kernels are measured against. It shares no code with them."""

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
):
    """Return new float64 (param, m, v, max_v); nothing is changed in place. Arguments as in `gpuadam.adam_step`.

    Kingma & Ba 2015, Algorithm 1. L2 decay and AdamW: Loshchilov & Hutter 2019, Algorithm 2 (with the decay multiplied by lr,
    as in torch). AMSGrad: Reddi et al. 2018, Algorithm 2, with torch's bias correction of the maximum.

    >>> param, m, v, _ = adam_step(np.array([0.5]), np.array([-33.0]), np.zeros(1), np.zeros(1), 1, lr=0.1)
    >>> print(param)
    [0.6]
    """
    theta, g, m, v = (np.asarray(x, "float64") for x in (param, grad, m, v))
    beta1, beta2 = betas
    with np.errstate(all="ignore"):  # infinities and NaN are part of what is compared
        g = -g * grad_scale if maximize else g * grad_scale
        if weight_decay and decoupled:
            theta = theta - lr * weight_decay * theta
        elif weight_decay:
            g = g + weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        if max_v is not None:
            max_v = np.maximum(np.asarray(max_v, "float64"), v)
        m_hat = m / (1 - beta1**step)
        v_hat = (v if max_v is None else max_v) / (1 - beta2**step)
        theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta, m, v, max_v
