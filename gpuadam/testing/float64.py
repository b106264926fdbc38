"""The same training in float64, and how far a result may be from it."""

import numpy as np

from .. import checks, hyperparameters, reference
from ..clipping import named_arrays
from .bits import FLOATS, on_host

# What one rounding to nearest may change, relative to the number
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
ROUNDINGS, FEEDBACK = 32, 4


class Reference:
    """Parameters in float64 that are trained beside yours, by `gpuadam.reference.adam_step`, which is written from the papers.

    params: your parameters before the first step: one array, or a sequence or dict of arrays, of any library and format, which
        are copied. lr: a number, or a callable of the number of the step, from 1. The other hyperparameters are those of
        `gpuadam.adam_step`, amsgrad that of `gpuadam.Adam`.
    Attributes: `params`, name -> float64 array, the name being what messages say, "params['w']"; `steps`.

    Use it on your own update too: it asks nothing but parameters and gradients.

    >>> import gpuadam
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
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        decoupled=False,
        amsgrad=False,
        maximize=False,
        algorithm="adam",
        formula="torch",
        eps_root=0.0,
    ):
        self._lr = lr
        self._options = {
            "betas": checks.betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
            "algorithm": checks.one_of(hyperparameters.ALGORITHMS, "algorithm", algorithm),
            "formula": checks.one_of(hyperparameters.FORMULAS, "formula", formula),
            "eps_root": eps_root,
        }
        given = {name: on_host(name, array) for name, array in named_arrays("params", params)}
        if not given:
            raise ValueError("there are no parameters: give one array at least")
        self.params = {name: _numbers(name, host) for name, host in given.items()}
        self._formats = {name: host.format for name, host in given.items()}
        self._state = {
            name: [np.zeros_like(p), np.zeros_like(p), np.zeros_like(p) if amsgrad else None]
            for name, p in self.params.items()
        }
        self._count = dict.fromkeys(self.params, 0)
        self._tolerance = {name: np.zeros_like(p) for name, p in self.params.items()}  # of each element
        self.steps = 0

    def step(self, grads, *, grad_scale=1.0):
        """Take a step. grads: of the structure of params, on the host or a GPU, before they are scaled; None skips one.

        A step that your loop leaves out must be left out here too.
        """
        given = {name: _numbers(name, on_host(name, grad)) for name, grad in named_arrays("grads", grads)}
        names = {name: name.replace("grads", "params", 1) for name in given}
        if strange := [name for name in given if names[name] not in self.params]:
            raise ValueError(f"{', '.join(strange)}: there is no such parameter, only {', '.join(self.params)}")
        for name, grad in given.items():
            if grad.shape != self.params[names[name]].shape:
                raise ValueError(f"{name} has shape {grad.shape}, the parameter has {self.params[names[name]].shape}")
        self.steps += 1
        lr = self._lr(self.steps) if callable(self._lr) else self._lr
        for name, grad in given.items():
            self._step(names[name], grad, lr, grad_scale)

    def _step(self, name, grad, lr, grad_scale):
        self._count[name] += 1
        step, before, (m, v, max_v) = self._count[name], self.params[name], self._state[name]
        after, *self._state[name] = reference.adam_step(
            before, grad, m, v, step, lr=lr, max_v=max_v, grad_scale=grad_scale, **self._options
        )
        self.params[name] = after
        with np.errstate(all="ignore"):  # infinities and NaN
            self._tolerance[name] *= 1 + self._feedback(name, lr)
            self._tolerance[name] += self._rounding(name, lr, before)

    def _rounding(self, name, lr, before):
        """Return how far the roundings of a step may move a parameter."""
        after, format = self.params[name], self._formats[name]
        computed = UNIT_ROUNDOFF["float32"]
        if format == "float64":  # in which the powers of beta are rounded too, before they are taken from 1
            computed = UNIT_ROUNDOFF["float64"] / (1 - max(self._options["betas"]))
        stored = UNIT_ROUNDOFF[format] * np.maximum(np.abs(before), np.abs(after)) + SMALLEST[format]
        return stored + ROUNDINGS * computed * np.maximum(lr, np.abs(after - before))

    def _feedback(self, name, lr):
        """Return by how much a step makes the errors before it grow: L2 decay takes them into the gradient."""
        if self._options["decoupled"] or not self._options["weight_decay"]:
            return 0.0
        _, v, max_v = self._state[name]
        if self._options["algorithm"] == "adamax":
            denom = v
        else:
            bias2 = 1 - self._options["betas"][1] ** self._count[name]
            largest = v / bias2 if max_v is None else max_v / (1.0 if self._options["formula"] == "optax" else bias2)
            denom = np.sqrt(largest + self._options["eps_root"]) + self._options["eps"]
        return FEEDBACK * lr * self._options["weight_decay"] / denom

    def assert_close(self, params, *, atol=0.0):
        """Raise AssertionError where your parameters differ from those in float64 by more than roundings make.

        Over the steps so far an element may differ by the sum of

            u * |param| + 32 * w * max(lr, |change of param|) + atol

        where u is what a rounding to the parameter's format may change, relatively (2**-24 in float32), and w that of what is
        computed in: float32; for float64 parameters it is 2**-53 / (1 - the larger beta). L2 decay takes the error of a
        parameter into its gradient: the sum so far then grows by a factor of 1 + 4 * lr * weight_decay / sqrt(v) in each step,
        so that where gradients are much smaller than the decay little is shown. State of fewer bits and random rounding err by
        more: give `atol`, of a step, as your training allows.
        """
        found = {name: on_host(name, array) for name, array in named_arrays("params", params)}
        if found.keys() != self.params.keys():
            raise AssertionError(f"params has {', '.join(found) or 'no arrays'}; the reference has {', '.join(self.params)}")
        for name, host in found.items():
            if (host.format, host.bits.shape) != (self._formats[name], self.params[name].shape):
                raise AssertionError(
                    f"{name} is {host.format} of shape {host.bits.shape}; the reference began with {self._formats[name]} of "
                    f"{self.params[name].shape}"
                )
            exact, actual = self.params[name], _numbers(name, host)
            tolerance = self._tolerance[name] + self._count[name] * atol
            with np.errstate(invalid="ignore"):  # inf - inf
                far = ~(np.abs(actual - exact) <= tolerance) & ~((actual == exact) | (np.isnan(actual) & np.isnan(exact)))
            if far.any():
                raise AssertionError(self._message(name, actual, exact, tolerance, far))

    def _message(self, name, actual, exact, tolerance, far):
        lines = [
            f"{name}: {int(far.sum()):,} of {far.size:,} elements differ from the float64 reference by more than roundings make "
            f"in {self._count[name]:,} steps"
        ]
        for place in np.argwhere(far)[:5]:
            at = tuple(place)
            lines.append(
                f"  at {[int(i) for i in place]}: {actual[at]:.9g}, reference {exact[at]:.9g}, "
                f"difference {actual[at] - exact[at]:.2g}, tolerance {tolerance[at]:.2g}"
            )
        return "\n".join(lines)


def _numbers(name, host):
    """Return what the bits of floats stand for, in float64."""
    if host.format not in FLOATS:
        raise TypeError(f"{name} has dtype {host.format}; it must be {', '.join(FLOATS)}")
    if host.format == "bfloat16":
        return (host.bits.astype("u4") << 16).view("f4").astype("f8")
    return host.bits.view(host.format).astype("f8")
