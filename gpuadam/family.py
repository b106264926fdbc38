"""The family: optimizers that differ from `Adam` in one thing.

The rule of each is in `kernels/adam.py`, known by the name of its algorithm. Each constructor lists all of its options, because
editors, type checkers and the reference read signatures, and an error of Python names the class; what a class has not is typed
`Literal[False]`.
"""

from __future__ import annotations

from typing import Literal

from .optimizer import Adam as Adam  # with the others, for what looks one up by its name
from .options import arguments
from .typing import (
    Algorithm,
    Betas,
    Complex,
    Components,
    Formula,
    Integer,
    LearningRate,
    LikeParams,
    Number,
    ParamBounds,
    Params,
    StateDtype,
)  # fmt: skip


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

    def __init__(
        self, params: Params, lr: LearningRate = 1e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8,
        weight_decay: Number = 1e-2, *,
        amsgrad: bool = False, maximize: bool = False, clip_value: Number | None = None,
        bounds: ParamBounds | None = None, complex: Complex | None = None, components: Components = 1, capturable: bool = False,
        formula: Formula = "torch", eps_root: Number = 0.0, state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None, param_copies: LikeParams = None, ema_decay: Number | None = None,
        zero_grad: bool = False, stochastic_rounding: bool = False, seed: Integer = 0, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(**arguments(locals()))


class NAdam(Adam):
    """Adam with Nesterov momentum.   (Dozat 2016, Incorporating Nesterov Momentum into Adam)

    As `Adam`, with the defaults and the schedule of torch.optim.NAdam (momentum_decay 0.004); with formula="optax" beta1 stays
    the same in all steps, as in optax.nadam, which has no schedule. It has no eps_root and no amsgrad, and cannot be capturable:
    only the host computes its scalars.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.NAdam(w, lr=0.1).step(np.array([-33.0, 1.0], "float32"))
    >>> print(w.round(4))
    [ 0.6056 -0.1056]
    """

    algorithm: Algorithm = "nadam"

    def __init__(
        self, params: Params, lr: LearningRate = 2e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8,
        weight_decay: Number = 0.0, *,
        amsgrad: Literal[False] = False, maximize: bool = False, clip_value: Number | None = None,
        bounds: ParamBounds | None = None, complex: Complex | None = None, components: Components = 1,
        capturable: Literal[False] = False, formula: Literal["torch", "optax"] = "torch", eps_root: Number = 0.0,
        state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None, param_copies: LikeParams = None, ema_decay: Number | None = None,
        zero_grad: bool = False, stochastic_rounding: bool = False, seed: Integer = 0, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(**arguments(locals()))


class RAdam(Adam):
    """Adam whose step is rectified while the variance of 1 / sqrt(v) is large.   (Liu et al. 2020, arXiv:1908.03265)

    As `Adam`, with the rule of torch.optim.RAdam. It has no amsgrad.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.RAdam(w, lr=0.1).step(np.array([-3.0, 1.0], "float32"))  # as momentum at first
    >>> print(w)
    [ 0.8 -0.1]
    """

    algorithm: Algorithm = "radam"

    def __init__(
        self, params: Params, lr: LearningRate = 1e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8,
        weight_decay: Number = 0.0, *,
        amsgrad: Literal[False] = False, maximize: bool = False, clip_value: Number | None = None,
        bounds: ParamBounds | None = None, complex: Complex | None = None, components: Components = 1, capturable: bool = False,
        formula: Literal["torch"] = "torch", eps_root: Number = 0.0, state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None, param_copies: LikeParams = None, ema_decay: Number | None = None,
        zero_grad: bool = False, stochastic_rounding: bool = False, seed: Integer = 0, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(**arguments(locals()))


class AdaMax(Adam):
    """Adam by the infinity norm: v is max(beta2 * v, |gradient| + eps), and divides.   (Kingma & Ba 2015, Algorithm 2)

    As `Adam`, with the defaults of torch.optim.Adamax. It has no amsgrad.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.AdaMax(w, lr=0.1).step(np.array([-33.0, 1.0], "float32"))
    >>> print(w)
    [ 0.6 -0.1]
    """

    algorithm: Algorithm = "adamax"

    def __init__(
        self, params: Params, lr: LearningRate = 2e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8,
        weight_decay: Number = 0.0, *,
        amsgrad: Literal[False] = False, maximize: bool = False, clip_value: Number | None = None,
        bounds: ParamBounds | None = None, complex: Complex | None = None, components: Components = 1, capturable: bool = False,
        formula: Literal["torch"] = "torch", eps_root: Number = 0.0, state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None, param_copies: LikeParams = None, ema_decay: Number | None = None,
        zero_grad: bool = False, stochastic_rounding: bool = False, seed: Integer = 0, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(**arguments(locals()))
