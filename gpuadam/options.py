"""What an optimizer is made with beside parameters, hyperparameters and a backend: one record, checked once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import numpy as np

from . import checks, hyperparameters, state
from .typing import StateDtype

STATE_DTYPES: tuple[str, ...] = get_args(StateDtype)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an optimizer, as `Adam` documents them. Raises TypeError or ValueError for a wrong one.

    `algorithm` and `decoupled` are those of the optimizer's class.

    >>> Options(state_dtype="bfloat16").saved()["state_dtype"]
    'bfloat16'
    """

    algorithm: str = "adam"
    decoupled: bool = False
    capturable: bool = False
    formula: str = "torch"
    eps_root: float = 0.0
    state_dtype: str | None = None
    master: str | None = None
    ema_decay: float | None = None
    zero_grad: bool = False
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("capturable", "decoupled", "zero_grad", "stochastic_rounding"):
            self._set(name, checks.flag(name, getattr(self, name)))
        self._set("seed", checks.seed(self.seed))
        self._set("eps_root", checks.non_negative("eps_root", self.eps_root))
        if self.ema_decay is not None:
            self._set("ema_decay", checks.beta("ema_decay", self.ema_decay))
        if self.state_dtype is not None:
            checks.one_of(STATE_DTYPES, "state_dtype", self.state_dtype)
        if self.master is not None:
            checks.one_of(("remainder",), "master", self.master)
        if self.algorithm == "nadam" and self.capturable:
            raise ValueError(
                "NAdam cannot be capturable: its scalars depend on all steps before, or on the next, which only the host counts"
            )

    def _set(self, name, value):
        object.__setattr__(self, name, value)  # the record is frozen for everyone else

    @functools.cached_property
    def formulas(self):
        """What the options say of a step's formulas, checked: `hyperparameters.Formulas`."""
        has_ema = self.ema_decay is not None
        return hyperparameters.formulas(
            self.algorithm,
            self.formula,
            self.eps_root,
            self.ema_decay if has_ema else 0.999,
            has_ema,
            self.zero_grad,
            self.decoupled,
        )

    @property
    def rounds_randomly(self):
        """Whether numbers are rounded randomly: by the place of their parameter among all, so that its name is not enough."""
        return self.stochastic_rounding or self.state_dtype in ("bfloat16", "8bit")

    def kept(self, param, amsgrad, numbers=1):
        """Return key -> format of the state of a parameter, in the order of operands.

        param: the parameter's View. numbers: of it that share a v.
        """
        kept = state.kept(param.format, self.state_dtype, amsgrad, self.master, self.ema_decay is not None)
        if self.state_dtype == "8bit":
            checks.eight_bits(param, numbers)
        checks.combination(self.algorithm, kept, self.stochastic_rounding)
        return kept

    def computed_in(self, param):
        """Return the dtype that updates are computed in, before gradients are known. param: the parameter's format."""
        return np.dtype("float64" if "float64" in (param, self.state_dtype) else "float32")

    def saved(self):
        """Return the options as a checkpoint has them: name -> value, without those of the class."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("algorithm", "decoupled")}


SAVED = tuple(Options().saved())


def arguments(given: dict[str, Any], besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a constructor hands on to the one of its base: its arguments, but for its own.

    given: its `locals()`, before it has any others.
    """
    return {name: value for name, value in given.items() if name not in ("self", "__class__", *besides)}
