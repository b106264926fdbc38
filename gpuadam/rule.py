"""`Rule`: the update of one element, for kernels of your own."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import backends, checks, hyperparameters
from .description import defaults_of, of_values, repr_of
from .kernels.messages import shown
from .kernels.operands import Arrays
from .typing import Algorithm, Betas, Bounds, Formula, Integer, Number, RuleChanges

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers have it, and Python from 3.11 on

NAMES = ("lr", "betas", "eps", "weight_decay", "grad_scale", "clip_value", "bounds")  # that a step may change


class Rule:
    """The update of one element, for kernels of your own: the backward pass and the update in one, with `adam_step`'s bits.

    The options are those of `adam_step`. They are compiled in: a part that is not used costs nothing. What remains is the
    numbers of a step, which `scalars` returns.

    dtype: float32 or float64, of all values. A kernel with narrower arrays converts where it loads and stores.
    lr, betas, eps, weight_decay, grad_scale, clip_value, bounds: of the steps, unless `scalars` is told otherwise.
    amsgrad: there is max_v too. ema_decay: there is ema too, a running mean of param; None for none.
    decoupled, maximize, algorithm, formula, eps_root: as in `adam_step`.

    Raises TypeError or ValueError for a wrong option.

    >>> import numba, numpy as np, gpuadam
    >>> rule = gpuadam.Rule("float32", lr=0.1, bounds=(0, None))
    >>> update = rule.for_njit()
    >>> @numba.njit
    ... def fit(x, target, m, v, s):  # one step: the gradient of the sum of squares and the update
    ...     for i in range(x.size):
    ...         x[i], m[i], v[i] = update(x[i], x[i] - target[i], m[i], v[i], s)
    >>> x, m, v = np.zeros((3, 2), "float32")
    >>> for step in range(1, 101):
    ...     fit(x, np.array([1, -1], "float32"), m, v, rule.scalars(step))
    >>> print(x.round(2))
    [1. 0.]
    """

    def __init__(
        self,
        dtype: npt.DTypeLike = "float32",
        *,
        lr: Number = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        decoupled: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        grad_scale: Number = 1.0,
        clip_value: Number | None = None,
        bounds: Bounds | None = None,
        algorithm: Algorithm = "adam",
        formula: Formula = "torch",
        eps_root: Number = 0.0,
        ema_decay: Number | None = None,
    ) -> None:
        self.dtype = _computed_with(dtype)
        self._settings = dict(zip(NAMES, (lr, betas, eps, weight_decay, grad_scale, clip_value, bounds), strict=True))
        self._maximize = checks.flag("maximize", maximize)
        has_ema, name = ema_decay is not None, self.dtype.name
        ema_decay = ema_decay if has_ema else 0.999
        self._formulas = hyperparameters.formulas(algorithm, formula, eps_root, ema_decay, False, False, decoupled)
        self._arrays = Arrays(name, name, name, checks.flag("amsgrad", amsgrad), ema=name if has_ema else "")
        checks.combination(algorithm, ["max_v"] if amsgrad else [], False)
        self._form = self._form_and_scalars(1, {})[0]

    def __repr__(self) -> str:
        return repr_of(self, self._description)

    def _description(self):
        """Return the text of `repr`."""
        formulas = {name: getattr(self._formulas, name) for name in ("algorithm", "formula", "eps_root", "decoupled")}
        values = self._settings | formulas | {"maximize": self._maximize, "amsgrad": self._arrays.amsgrad}
        values |= {"ema_decay": self._formulas.ema_decay if self._arrays.ema else None}
        return of_values(type(self).__name__, values, defaults_of(type(self)), [repr(self.dtype.name)])

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the values that an update takes, in their order: param, grad, m, v; max_v and ema if there are any."""
        return tuple(_kernels("element").arguments(self._form))

    def scalars(self, step: Integer, **changes: Unpack[RuleChanges]) -> tuple[Any, ...]:
        """Return the numbers of a step as a tuple of NumPy scalars of the rule's dtype.

        Numba's code takes the tuple as it is; CuPy's ElementwiseKernel takes the numbers one by one.

        step: number of this update, counted from 1. changes: lr, betas, eps, weight_decay, grad_scale, clip_value or bounds of
            this step.

        Raises TypeError or ValueError for a wrong one, and for one that needs another kernel: without weight decay, for
        example, none is compiled in. A rule that was made with a grad_scale other than 1 takes 1 too.

        >>> import gpuadam
        >>> rule = gpuadam.Rule("float32", lr=0.1)
        >>> len(rule.scalars(1)), rule.scalars(1) == rule.scalars(1, lr=0.2)
        (7, False)
        """
        if unknown := sorted(changes.keys() - set(NAMES)):
            raise TypeError(f"a step cannot change {shown(', '.join(unknown))}, only {', '.join(NAMES)}: make another Rule")
        form, values = self._form_and_scalars(checks.step_number(step), changes)
        made = self._form
        # a product with 1 is exact, so the kernel for another grad_scale does
        if form._replace(scaled=made.scaled) != made or form.scaled > made.scaled:
            given = ", ".join(f"{name}={shown(value)}" for name, value in changes.items())
            before = ", ".join(f"{name}={shown(self._settings[name])}" for name in changes)
            raise ValueError(
                f"{given} needs another kernel than a Rule made with {before}: whether there are weight decay, bounds, "
                "clipping and a grad_scale, and whether a beta is above 1/2, is compiled in. Make a Rule with it"
            )
        return tuple(map(self.dtype.type, values))

    def struct(self, step: Integer, **changes: Unpack[RuleChanges]) -> npt.NDArray[np.void]:
        """Return the same as one `Scalars` of the CUDA C, an array of one element, which CuPy passes to a RawKernel by value."""
        numbers = np.array(self.scalars(step, **changes))
        return numbers.view(np.dtype([("value", numbers.dtype, numbers.shape)]))

    def for_njit(self) -> Callable[..., Any]:
        """Return update(param, grad, m, v, [max_v,] [ema,] s) -> (param, m, v, [max_v,] [ema]), for @njit code.

        All are numbers of the rule's dtype, s is what `scalars` returns; another type is an error when the code is compiled.
        fastmath=True changes the caller's arithmetic alone. Leave cache=True out: Numba would not see that a later version of a
        program has another rule, and run the code of the first.

        Raises `BackendUnavailableError` if Numba compiles nothing here.
        """
        backends.load("numba-cpu")
        return _kernels("element_numba").build(self._form)

    def for_cuda_jit(self) -> Callable[..., Any]:
        """Return the same for @cuda.jit code of numba-cuda. There too fastmath=True changes the caller's arithmetic alone."""
        try:
            return _kernels("numba_cuda_kernels").build_element(self._form)
        except ImportError:
            backends.load("numba-cuda")  # which says what is missing
            raise

    def for_cuda_c(self, namespace: str = "gpuadam") -> str:
        """Return CUDA C, to put before a RawKernel's code, or into the preamble of an ElementwiseKernel.

        It has a namespace with the function `update(param, grad, m, v, [max_v,] [ema,] s)`, which takes references and changes
        all but grad in place, and the struct `Scalars`, of s. All have the type of the rule, double or float; another is an error
        when the code is compiled. --use_fast_math changes the caller's arithmetic alone. namespace: an identifier, for two rules
        in one kernel.
        """
        return _kernels("element").in_cuda_c(self._form, _identifier(namespace))

    def for_elementwise(self, namespace: str = "gpuadam") -> tuple[str, str]:
        """Return two texts for an ElementwiseKernel: its input parameters for `*rule.scalars(step)`, and `update`'s argument s.

        >>> import gpuadam
        >>> parameters, s = gpuadam.Rule("float32").for_elementwise()
        >>> print(parameters[:41], s[:44], sep="\\n")
        float32 gpuadam_s0, float32 gpuadam_s1, f
        gpuadam::Scalars{{gpuadam_s0, gpuadam_s1, gp

        It is CuPy's to index and to launch:

            kernel = cupy.ElementwiseKernel(
                f"T target, {parameters}", "T x, T m, T v",
                f"gpuadam::update(x, x - target, m, v, {s});", preamble=rule.for_cuda_c(),
            )
            kernel(target, *rule.scalars(step), x, m, v)
        """
        names = [f"{_identifier(namespace)}_s{k}" for k in range(len(self.scalars(1)))]
        return ", ".join(f"{self.dtype} {name}" for name in names), f"{namespace}::Scalars{{{{{', '.join(names)}}}}}"

    def _form_and_scalars(self, step, changes):
        h = hyperparameters.with_formulas(**self._settings | changes, maximize=self._maximize, formulas=self._formulas)
        return hyperparameters.form_and_scalars(h, step, self._arrays)


def _kernels(name):
    """Return a module of gpuadam.kernels. They import Numba or llvmlite, and `import gpuadam` imports neither."""
    return importlib.import_module(f"gpuadam.kernels.{name}")


def _computed_with(dtype):
    """Return a dtype that rules compute with."""
    try:
        found = np.dtype(dtype) if dtype is not None else None
    except TypeError:
        found = None
    if found is None or found.name not in ("float32", "float64"):
        raise ValueError(
            f"dtype={shown(dtype)} must be float32 or float64, with which a rule computes: a kernel of yours converts narrower "
            "numbers where it loads and stores them"
        )
    return np.dtype(found.name)


def _identifier(namespace):
    if not isinstance(namespace, str) or not re.fullmatch(r"[A-Za-z_]\w*", namespace, re.ASCII):
        raise ValueError(f"namespace={shown(namespace)} must be an identifier of CUDA C, such as 'gpuadam'")
    return namespace
