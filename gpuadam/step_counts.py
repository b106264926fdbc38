"""Where an optimizer counts its steps: on the host, in an array of the CPU, or on the device, for graphs that count on.

What a kernel gets by value is frozen in a captured CUDA graph. In device mode one thread computes the step's scalars, from what
is on the device when the graph runs (`kernels/scalars.py`), and the update loads them.

The three counts have one interface: `alike` says which parameters take which step next, `advance` counts it, `read` and `set` are
for state_dicts, and `numbers` makes of lr and grad_scale what a step takes.
"""

import itertools

import numpy as np

from . import backends, checks, hyperparameters
from .kernels import array_bytes, synchronous
from .kernels.scalars import MEMORY_BYTES, ScalarsForm, ScalarsMemory, Settings
from .kernels.view import View, is_array

NUMBERS = (np.dtype("float32"), np.dtype("float64"))
FLAGS = (*NUMBERS, *map(np.dtype, ("bool", "uint8", "int32", "int64")))


class OnHost:
    """A count for each parameter, a Python int: "step" in its state."""

    on_device = False

    def alike(self, parameters, kind):
        """Return (step, parameters) of those that have taken as many steps and are of one kind.

        Parameters that were skipped before are at another step. kind: of all of them, or None if they are of several.
        """
        counts = [parameter.state["step"] for parameter in parameters]
        first = counts[0] if counts else 0
        if kind and type(first) is int and first >= 0 and counts.count(first) == len(counts):
            return [(first + 1, parameters)] if parameters else []
        pairs = [
            (checks.count(f"the step of params[{parameter.name!r}]", n), parameter.kind)
            for parameter, n in zip(parameters, counts, strict=True)
        ]
        chosen = [(pair, [pair == other for other in pairs]) for pair in dict.fromkeys(pairs)]
        return [(checks.step_number(n + 1), list(itertools.compress(parameters, some))) for (n, _), some in chosen]

    def check_present(self, parameters, present):
        """Refuse gradients for some parameters if these cannot be counted alone. Here they can."""

    def check_counts(self, counts, parameters):
        """Refuse counts that cannot be set. Here every one can."""

    def advance(self, parameters):
        """Count a step of these parameters."""
        for parameter in parameters:
            parameter.state["step"] += 1

    def read(self, parameters):
        """Return how many steps each parameter has taken."""
        return [parameter.state["step"] for parameter in parameters]

    def set(self, parameters, counts):
        """Set the counts of parameters."""
        for parameter, n in zip(parameters, counts, strict=True):
            parameter.state["step"] = n

    def numbers(self, lr, grad_scale, conditions):
        """Return the lr and the grad_scale of a step for `checked_group`, and the Now of its scalars on the device, or None."""
        return lr, grad_scale, None


class InArray:
    """One count for all parameters of a group, in an int64 array of one element on the CPU: device mode without a device."""

    on_device = False

    def __init__(self, kernels):
        self.kernels, self.device = kernels, None
        self.step = np.zeros(1, np.int64)

    def alike(self, parameters, kind):
        """Return (step, parameters): all of them take the same step."""
        return [(self.count() + 1, parameters)] if parameters else []

    def check_present(self, parameters, present):
        """Refuse gradients for some parameters and not for all."""
        skipped = [parameter.name for parameter, there in zip(parameters, present, strict=True) if not there]
        if len(skipped) < len(parameters):
            raise ValueError(
                f"with capturable=True the parameters of a group share a step count, and {skipped} have no gradient: "
                "give zeros, put them into a group of their own, or skip the whole group"
            )

    def check_counts(self, counts, parameters):
        """Refuse counts that differ, or are too large."""
        names = [parameter.name for parameter in parameters]
        if len(set(counts)) > 1:
            raise ValueError(f"with capturable=True the parameters {names} share a step count; the state_dict's differ")
        if any(n >= 1 << 63 for n in counts):
            raise ValueError("with capturable=True a step count is an int64; the state_dict's is larger")

    def advance(self, parameters):
        """Count a step, if a parameter takes one."""
        if parameters:
            self.step += 1

    def read(self, parameters):
        """Return how many steps each parameter has taken."""
        return [self.count()] * len(parameters)

    def set(self, parameters, counts):
        """Set the count, in place: captured graphs know the array."""
        self.fill(self.step, counts[0])

    def numbers(self, lr, grad_scale, conditions):
        """Return the lr and the grad_scale of a step as numbers, and None."""
        return self.value(lr), self.value(grad_scale), None

    def number(self, name, value, dtypes=NUMBERS):
        """Return a View of an array of one number beside the arrays, or None if value is a number of the host."""
        if not is_array(value):
            return None
        _, (view,) = backends.choose([(name, value)], self.kernels.name)
        if view.size != 1 or view.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} has shape {view.shape} and dtype {view.dtype}: it must be one {wanted}")
        if self.device is not None and view.device != self.device:
            raise ValueError(f"{name} is on device {view.device}, the parameters are on {self.device}: move it")
        return view

    def value(self, number, dtypes=NUMBERS):
        """Return a hyperparameter as a number. An array on a GPU is read, after waiting for the device."""
        if not is_array(number):
            return number
        view = self.number("lr, grad_scale, norm or found_inf", number, dtypes)
        return float(array_bytes.number(self.kernels, view))

    def count(self):
        """Return the step count as an int. On a GPU this waits for the device: graphs may count on any stream."""
        return array_bytes.number(self.kernels, self.kernels.view("", self.step))

    def fill(self, array, value):
        """Write a number into an array of one, in place, so that captured graphs see it. On a GPU this waits for the device."""
        array_bytes.store_number(self.kernels, self.kernels.view("", array), value)


class OnDevice(InArray):
    """One count for all parameters of a group, an int64 beside them, and room for the scalars that are made from it."""

    on_device = True

    def __init__(self, kernels, device):
        self.kernels, self.device = kernels, device
        self.memory: dict[np.dtype, ScalarsMemory] = {}  # always the same places, which captured graphs know
        with kernels.on(device, None):
            for dtype in NUMBERS:
                owner, address = kernels.device_bytes(MEMORY_BYTES)
                self.memory[dtype] = ScalarsMemory(owner, address, dtype, device)
            self.step = kernels.from_host(np.zeros(1, np.int64))

    def alike(self, parameters, kind):
        """Return (1, parameters): all of them take the same step, and only the device knows which."""
        return [(1, parameters)] if parameters else []

    def advance(self, parameters):
        """A step counts itself, on the device."""

    def numbers(self, lr, grad_scale, conditions):
        """Return numbers that can be checked in the place of those on the device, and the Now of a step."""
        now = Now(self, lr, grad_scale, **(conditions or {}))
        return (0.0 if now.lr else lr), (1.0 if now.grad_scale else grad_scale), now


def in_array(kernels, device):
    """Return the count for arrays of a backend: OnDevice, or InArray on the CPU."""
    return InArray(kernels) if kernels.memory == "CPU" else OnDevice(kernels, device or 0)


class Now:
    """What a step's scalars are made from on the device: a count, and numbers, or arrays of one number there.

    counts: whether the device counts the steps; else the host does. found_inf: a flag that leaves the step out.
    norm, max_norm: clip gradients of this norm, an array of one float64. largest_norm: a larger one, or NaN, leaves the step out.
    on_host: name -> number, of the conditions that the host has decided.
    """

    def __init__(
        self, clock, lr, grad_scale, *, counts=True, found_inf=None, norm=None, max_norm=None, largest_norm=None, on_host=()
    ):
        self.clock, self.counts, self.on_host = clock, counts, dict(on_host)
        self.lr, self.grad_scale = clock.number("lr", lr), clock.number("grad_scale", grad_scale)
        self.found_inf = None if found_inf is None else clock.number("found_inf", found_inf, FLAGS)
        self.norm = None if norm is None else clock.number("norm", norm, NUMBERS[1:])
        self.max_norm, self.largest_norm = max_norm, largest_norm

    def check_capture(self, h):
        """Refuse the numbers that a captured graph would freeze, and that are others in each step.

        A graph also keeps max_norm, betas, eps, weight_decay and the like: they belong to the training, not to a step.
        """
        frozen = self.on_host | ({"lr": h.lr} if self.lr is None else {})
        if self.grad_scale is None and h.fixed.grad_scale != 1.0:
            frozen["grad_scale"] = h.fixed.grad_scale
        for name, value in frozen.items():
            raise RuntimeError(
                f"a graph is being captured, and it would repeat this step with {name}={value} for ever: give {name} as an array "
                "of one float64 on the device, and change what is in it"
            )


class Scalars:
    """The launches that compute the scalars of a step on the device: one for each compute type; the first counts the step.

    group: the `update.Updates` of the step.
    """

    def __init__(self, group, stream):
        self.group, self.stream, self.begun = group, stream, False
        self._launches: dict[np.dtype, tuple] = {}

    def of(self, formats):
        """Return the Form of the step for arrays of some formats, and the `scalars.ScalarsMemory` where its scalars will be."""
        now, h, fixed = self.group.now, self.group.h, self.group.h.fixed
        form, scalars = hyperparameters.form_and_scalars(h, 1, formats)  # or an error if a scalar of step 1 overflows
        constants = hyperparameters.constants(fixed, formats)
        skips = now.found_inf is not None or now.largest_norm is not None
        scaled = form.scaled or now.grad_scale is not None or now.max_norm is not None
        form = form._replace(scaled=scaled, skips=skips)
        dtype = form.dtype
        out = now.clock.memory[dtype]
        first = not self._launches or next(iter(self._launches)) == dtype
        settings = Settings(
            advance=(1 if first else 0) if now.counts else self.group.step,
            seed=self.group.seed - (self.group.seed >> 63 << 64),
            sign=-1.0 if fixed.maximize else 1.0,
            beta1=fixed.beta1,
            beta2=fixed.beta2,
            weight_decay=fixed.weight_decay,
            w1=constants.w1,
            w2=constants.w2,
            eps=constants.eps,
            eps_root=getattr(scalars, "eps_root", 0.0),
            w_ema=constants.later[-1] if formats.ema else 0.0,
            first_w_ema=constants.first[-1] if formats.ema else 0.0,
            max_norm=np.inf if now.max_norm is None else now.max_norm,
            largest_norm=np.inf if now.largest_norm is None else now.largest_norm,
        )
        scalars_form = ScalarsForm(
            dtype,
            None if now.lr is None else now.lr.dtype,
            None if now.grad_scale is None else now.grad_scale.dtype,
            form.decoupled,
            fixed.variant,
            ema=formats.ema != "",
            random=formats.random or (dtype in self._launches and self._launches[dtype][0].random),
            counts=now.counts,
            found_inf=None if now.found_inf is None else now.found_inf.dtype,
            norm=now.max_norm is not None,
            checks=now.largest_norm is not None,
        )
        self._launches[dtype] = scalars_form, settings, out
        return form, out

    def prepare(self):
        """Compile what `launch` launches, before anything is written."""
        kernels, device = self.group.now.clock.kernels, self.group.now.clock.device
        given = self._given()
        with kernels.on(device, self.stream):
            if kernels.is_capturing(self.stream):
                return
            for form, settings, out in self._launches.values():
                kernels.rehearse(
                    device,
                    form,
                    lambda stream, launch=(form, settings, given, out): kernels.launch_scalars(*launch, stream),
                )

    def _given(self):
        """Return what the scalars are made from by name: a View of one number on the device, or a number."""
        now, h = self.group.now, self.group.h
        given = {
            "lr": h.lr if now.lr is None else now.lr,
            "grad_scale": h.fixed.grad_scale if now.grad_scale is None else now.grad_scale,
        }
        given |= {"found_inf": now.found_inf} if now.found_inf is not None else {}
        given |= {"norm": now.norm} if now.norm is not None else {}
        if now.counts:
            given["step"] = now.clock.kernels.view("step", now.clock.step)
        return given

    def launch(self):
        """Enqueue them. `begun` says from then on that the device has counted the step."""
        now, clock, given = self.group.now, self.group.now.clock, self._given()
        kernels, stream = clock.kernels, self.stream
        views = [value for value in given.values() if isinstance(value, View)]
        # after the step before, which may be on another stream: it reads the memory that is written here
        with kernels.ordered(clock.device, views, stream):
            for form, settings, out in self._launches.values():
                launched = form, settings, given, out, stream

                def what(form=form):
                    return f"the computation of a step's scalars from {sorted(given)} ({form.dtype}, device {clock.device})"

                synchronous.launch(kernels, stream, what, kernels.launch_scalars, *launched)
                self.begun = now.counts
