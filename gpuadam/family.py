"""The family: optimizers that differ from `Adam` in one thing.

The rule of each is in `kernels/adam.py`, known by the name of its algorithm.
"""

from .optimizer import Adam as Adam  # with the others, for what looks one up by its name


class AdamW(Adam):
    """Adam with decoupled weight decay.   (Loshchilov & Hutter 2019, arXiv:1711.05101)

    As `Adam`, but weight_decay, 0.01 by default, takes lr * weight_decay * param off each parameter.

    >>> import numpy as np, gpuadam
    >>> w = np.ones(2, "float32")
    >>> gpuadam.AdamW(w, lr=0.1, weight_decay=0.5).step(np.zeros(2, "float32"))
    >>> print(w)
    [0.95 0.95]
    """

    decoupled = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **options):
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class NAdam(Adam):
    """Adam with Nesterov momentum.   (Dozat 2016, Incorporating Nesterov Momentum into Adam)

    As `Adam`, with the defaults and the schedule of torch.optim.NAdam (momentum_decay 0.004); with formula="optax" beta1 stays
    the same in all steps, as in optax.nadam, which has no schedule. It has no eps_root and no amsgrad, and cannot be capturable:
    only the host computes its scalars.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.NAdam(w, lr=0.1).step(np.float32([-33.0, 1.0]))
    >>> print(w.round(4))
    [ 0.6056 -0.1056]
    """

    algorithm = "nadam"

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class RAdam(Adam):
    """Adam whose step is rectified while the variance of 1 / sqrt(v) is large.   (Liu et al. 2020, arXiv:1908.03265)

    As `Adam`, with the rule of torch.optim.RAdam. It has no amsgrad.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.RAdam(w, lr=0.1).step(np.float32([-3.0, 1.0]))  # as momentum at first
    >>> print(w)
    [ 0.8 -0.1]
    """

    algorithm = "radam"


class AdaMax(Adam):
    """Adam by the infinity norm: v is max(beta2 * v, |gradient| + eps), and divides.   (Kingma & Ba 2015, Algorithm 2)

    As `Adam`, with the defaults of torch.optim.Adamax. It has no amsgrad.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.AdaMax(w, lr=0.1).step(np.float32([-33.0, 1.0]))
    >>> print(w)
    [ 0.6 -0.1]
    """

    algorithm = "adamax"

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        super().__init__(params, lr, betas, eps, weight_decay, **options)
