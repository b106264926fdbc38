"""torch's for-loop form of Adam in float32 NumPy: a yardstick for rounding errors. The oracle is `gpuadam.reference`.

The operations and their order are those of `torch.optim.adam._single_tensor_adam` (torch 2.13): lerp_ for exp_avg, mul_ and
addcmul_ for exp_avg_sq, sqrt, a division by a Python float, add_, addcdiv_.
"""

import numpy as np

f32 = np.float32


def torch_for_loop_step(param, grad, m, v, step, *, lr, betas, eps):
    """Update float32 arrays in place."""
    beta1, beta2 = betas
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    weight = 1 - beta1
    m[:] = m + f32(weight) * (grad - m) if weight < 0.5 else grad - (grad - m) * (f32(1) - f32(weight))
    v[:] = v * f32(beta2) + f32(1 - beta2) * grad * grad
    denom = np.sqrt(v) / f32(bias2**0.5) + f32(eps)
    param[:] = param + f32(-(lr / bias1)) * (m / denom)
