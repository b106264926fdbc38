"""The same training in float64, and how far a result may be from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .. import checks, hyperparameters, reference
from ..clipping import named_arrays
from ..kernels.messages import shortened
from ..kernels.operands import sharing
from ..typing import Algorithm, ArrayTree, Betas, Bounds, Complex, Components, Formula, Number
from .bits import FLOATS, on_host

ROUNDINGS, FEEDBACK = 32, 4


@dataclasses.dataclass
class Trained:
    """A parameter in float64, its state, and how far another that is trained likewise may be from it."""

    value: np.ndarray
    format: str  # of the caller's parameter
    numbers: int = 1  # that share a v
    m: Any = 0.0
    v: Any = 0.0
    max_v: Any = None
    tolerance: Any = 0.0  # of each element
    count: int = 0  # of steps


class Reference:
    """Parameters in float64 that are trained beside yours, by `gpuadam.reference.adam_step`, which is written from the papers.

    params: your parameters before the first step: one array, or a sequence or dict of arrays, of any library and format, which
        are copied. lr: a number, or a callable of the number of the step, from 1. The other hyperparameters are those of
        `gpuadam.adam_step`, amsgrad that of `gpuadam.Adam`.
    Attributes: `params`, name -> float64 array, the name being what messages say, "params['w']"; `steps`. Of complex parameters
    the arrays are of both parts, in a last dimension of 2.

    Use it on your own update too: it asks nothing but parameters and gradients.

    >>> import numpy as np, gpuadam
    >>> from gpuadam.testing import Reference
    >>> params = {"w": np.linspace(-1, 1, 5, dtype="float32")}
    >>> opt, exact = gpuadam.Adam(params, lr=0.1), Reference(params, lr=0.1)
    >>> for step in range(3):
    ...     grads = {"w": 2 * params["w"]}
    ...     opt.step(grads)
    ...     exact.step(grads)
    >>> exact.assert_close(params)
    """

    def __init__(
        self,
        params: ArrayTree,
        lr: Number | Callable[[int], float] = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        decoupled: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        clip_value: Number | None = None,
        bounds: Bounds | None = None,
        algorithm: Algorithm = "adam",
        formula: Formula = "torch",
        eps_root: Number = 0.0,
        complex: Complex | None = None,
        components: Components = 1,
    ) -> None:
        self._lr = lr
        self._options: dict[str, Any] = {
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
        }
        self._options |= {"betas": checks.betas(betas), "eps_root": eps_root, "clip_value": clip_value, "bounds": bounds}
        self._options["algorithm"] = checks.one_of(hyperparameters.ALGORITHMS, "algorithm", algorithm)
        self._options["formula"] = checks.one_of(hyperparameters.FORMULAS, "formula", formula)
        self._trained: dict[str, Trained] = {}
        for name, array in named_arrays("params", params):
            host = on_host(name, array)
            if host.of_complex and checks.complex_parts(complex) is None:
                raise TypeError(f"{shortened(name)} is complex: say which Adam it is trained by, complex='joint' or 'parts'")
            numbers = sharing(host.of_complex, complex, checks.components(components))
            value = _numbers(name, host)
            self._trained[name] = Trained(value, host.format, numbers, max_v=0.0 if amsgrad else None)
        if not self._trained:
            raise ValueError("there are no parameters: give one array at least")
        self.steps = 0

    @property
    def params(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: param.value for name, param in self._trained.items()}

    def step(
        self,
        grads: ArrayTree,
        *,
        grad_scale: Number = 1.0,
        lr_scale: ArrayTree = None,
        where: ArrayTree | Literal["nonzero"] = None,
    ) -> None:
        """Take a step. grads: of the structure of params, on the host or a GPU, before they are scaled; None skips one.

        lr_scale, where: as in `gpuadam.Adam.step`, arrays of the structure of params, on the host or a GPU.

        A step that your loop leaves out must be left out here too.
        """
        numbers = {name: _numbers(name, on_host(name, grad)) for name, grad in named_arrays("params", grads)}
        shapes = {name: param.value.shape for name, param in self._trained.items()}
        if strange := [f"{name} of {grad.shape}" for name, grad in numbers.items() if grad.shape != shapes.get(name)]:
            given, needed = shortened(", ".join(strange), 1000), shortened(str(shapes), 1000)
            raise ValueError(f"there are gradients of {given}; the parameters have the shapes {needed}")
        scales = self._beside_params("lr_scale", lr_scale)
        flags = dict.fromkeys(self._trained, where) if isinstance(where, str) else self._beside_params("where", where)
        if isinstance(where, str):
            checks.nonzero(where)
        self.steps += 1
        lr = self._lr(self.steps) if callable(self._lr) else self._lr
        for name, grad in numbers.items():
            self._step(self._trained[name], grad, lr * scales.get(name, 1.0), grad_scale, flags.get(name))

    def _beside_params(self, operand, given):
        """Return name -> array in float64 whose numbers go with those of the parameter, or with its rows or vectors."""
        arrays = {}
        for name, array in named_arrays("params", given):
            label = f"{operand} of {shortened(name)}"
            param = self._trained.get(name)
            if param is None:
                raise ValueError(
                    f"there is {label}, and there are the parameters {shortened(', '.join(self._trained), 1000)}"
                )
            numbers = on_host(label, array).numbers.astype("f8")
            shape = param.value.shape[:-1] if param.numbers > 1 else param.value.shape
            if numbers.shape != shape[: numbers.ndim]:
                raise ValueError(
                    f"{label} has shape {numbers.shape}: it must have the shape {shape}, or its leading dimensions"
                )
            arrays[name] = numbers.reshape(numbers.shape + (1,) * (param.value.ndim - numbers.ndim))
        return arrays

    def _step(self, param, grad, lr, grad_scale, where):
        param.count += 1
        before = param.value
        param.value, param.m, param.v, param.max_v = reference.adam_step(
            before, grad, param.m, param.v, param.count, lr=lr, max_v=param.max_v, grad_scale=grad_scale,
            components=param.numbers, where=where, **self._options,
        )  # fmt: skip
        with np.errstate(all="ignore"):  # infinities and NaN
            growth = 1 + self._feedback(param, lr)
            param.tolerance = param.tolerance * growth + self._rounding(param, lr, before)

    def _rounding(self, param, lr, before):
        """Return how far the roundings of a step may move a parameter."""
        computed = FLOATS["float32"].unit_roundoff
        if param.format == "float64":  # in which the powers of beta are rounded too, before they are taken from 1
            computed = FLOATS["float64"].unit_roundoff / (1 - max(self._options["betas"]))
        of_storage = FLOATS[param.format]
        stored = of_storage.unit_roundoff * np.maximum(np.abs(before), np.abs(param.value)) + of_storage.smallest
        return stored + ROUNDINGS * computed * np.maximum(lr, np.abs(param.value - before))

    def _feedback(self, param, lr):
        """Return by how much a step makes the errors before it grow: L2 decay takes them into the gradient."""
        options = self._options
        if options["decoupled"] or not options["weight_decay"]:
            return 0.0
        denom = param.v
        if options["algorithm"] != "adamax":
            bias2 = 1 - options["betas"][1] ** param.count
            corrected = param.max_v is not None and options["formula"] == "optax"  # which keeps the maximum of corrected v
            largest = (param.v if param.max_v is None else param.max_v) / (1.0 if corrected else bias2)
            denom = np.sqrt(largest + options["eps_root"]) + options["eps"]
        return FEEDBACK * lr * options["weight_decay"] / denom

    def assert_close(self, params: ArrayTree, *, atol: Number = 0.0) -> None:
        """Raise AssertionError where your parameters differ from those in float64 by more than roundings make.

        Over the steps so far an element may differ by the sum of

            u * |param| + 32 * w * max(lr, |change of param|) + atol

        where u is what a rounding to the parameter's format may change, relatively (2**-24 in float32), and w that of what is
        computed in: float32; for float64 parameters it is 2**-53 / (1 - the larger beta). L2 decay takes the error of a
        parameter into its gradient: the sum so far then grows by a factor of 1 + 4 * lr * weight_decay / sqrt(v) in each step,
        so that where gradients are much smaller than the decay little is shown. State of fewer bits and random rounding err by
        more: give `atol`, of a step, as your training allows.
        """
        hosts = {name: on_host(name, array) for name, array in named_arrays("params", params)}
        if hosts.keys() != self._trained.keys():
            given, needed = (shortened(", ".join(names), 1000) for names in (hosts, self._trained))
            raise AssertionError(f"params has {given or 'no arrays'}; the reference has {needed}")
        for name, host in hosts.items():
            param = self._trained[name]
            if (host.format, host.bits.shape) != (param.format, param.value.shape):
                began = f"began with {param.format} of {param.value.shape}"
                raise AssertionError(f"{shortened(name)} is {host.format} of shape {host.bits.shape}; the reference {began}")
            exact, actual = param.value, _numbers(name, host)
            tolerance = param.tolerance + np.full(exact.shape, param.count * atol)
            with np.errstate(invalid="ignore"):  # inf - inf
                far = ~(np.abs(actual - exact) <= tolerance) & ~((actual == exact) | (np.isnan(actual) & np.isnan(exact)))
            if far.any():
                count = f"{int(far.sum()):,} of {far.size:,} elements"
                lines = [
                    f"{shortened(name)}: {count} differ from float64 by more than roundings make in {param.count:,} steps"
                ]
                for at in map(tuple, np.argwhere(far)[:5].tolist()):
                    apart = f"difference {actual[at] - exact[at]:.2g}, tolerance {tolerance[at]:.2g}"
                    lines.append(f"  at {list(at)}: {actual[at]:.9g}, reference {exact[at]:.9g}, {apart}")
                raise AssertionError("\n".join(lines))


def _numbers(name, host):
    """Return the numbers of floats, in float64."""
    if host.format not in FLOATS:
        raise TypeError(f"{shortened(name)} has dtype {host.format}; it must be {', '.join(FLOATS)}")
    return host.numbers.astype("f8")
