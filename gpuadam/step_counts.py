"""Where an optimizer counts its steps: on the host, in an array of the CPU, or on the device, for graphs that count on.

The three counts have one interface: `alike` says which parameters take which step next, `advance` counts it, `read` and `set` are
for state_dicts, and `numbers` returns lr and grad_scale in the form that a step needs.
"""

import numpy as np

from . import backends, checks, clipping
from .device_step import NUMBERS, Now
from .groups import some
from .kernels import array_bytes
from .kernels.messages import shortened, shown
from .kernels.scalars import MEMORY_BYTES, ScalarsMemory
from .kernels.view import is_array

MOST_STEPS = 1 << 62  # that a count in an array can be set to: an int64 must not overflow before a program ends


class HostCount:
    """A count for each parameter, a Python int: "step" in its state."""

    on_device = False

    def alike(self, parameters, kind):
        """Return (step, flags that choose the parameters which take it next and are of one kind; None for all of them).

        Parameters that were skipped before are at another step. kind: of all of them, or None if they are of several.
        """
        counts = [parameter.state["step"] for parameter in parameters]
        first = counts[0] if counts else 0
        if kind and type(first) is int and first >= 0 and counts.count(first) == len(counts):
            return [(first + 1, None)] if parameters else []
        pairs = [
            (checks.count(f"the step of params[{shown(parameter.name)}]", n), parameter.kind)
            for parameter, n in zip(parameters, counts, strict=True)
        ]
        return [(pair[0] + 1, [pair == other for other in pairs]) for pair in dict.fromkeys(pairs)]

    def check_present(self, parameters, present):
        """Refuse gradients for some parameters if these cannot be counted alone. Here they can."""

    def check_counts(self, counts, parameters):
        """Refuse counts that cannot be set. Here every one can."""

    def advance(self, parameters):
        """Count a step of these parameters."""
        for parameter in parameters:
            parameter.state["step"] = int(parameter.state["step"]) + 1  # an integer of NumPy would wrap

    def read(self, parameters):
        """Return how many steps each parameter has taken."""
        return [parameter.state["step"] for parameter in parameters]

    def set(self, parameters, counts):
        """Set the counts of parameters."""
        for parameter, n in zip(parameters, counts, strict=True):
            parameter.state["step"] = n

    def value(self, number):
        """Return a hyperparameter as a number, which it has to be."""
        return checks.real("lr", number)

    def check_fill(self, name, array):
        """Refuse an array in the place of a number."""
        checks.real(name, array)

    def numbers(self, lr, grad_scale, conditions):
        """Return the lr and the grad_scale of a step for `checked_group`, and the Now of its scalars on the device, or None."""
        return lr, grad_scale, None


class ArrayCount:
    """One count for all parameters of a group, in an int64 array of one element on the CPU: device mode without a device."""

    on_device = False

    def __init__(self, kernels):
        self.kernels, self.device = kernels, None
        self.step = np.zeros(1, np.int64)

    def alike(self, parameters, kind):
        """Return (step, None): all of them take the same step."""
        self._check_own(parameters)
        return [(self.count() + 1, None)] if parameters else []

    def _check_own(self, parameters):
        """Refuse another count in the place of this one, which would count nothing."""
        for parameter in parameters:
            if parameter.state["step"] is not self.step:
                raise ValueError(
                    f"with capturable=True the step of params[{shown(parameter.name)}] is counted in an array that its group "
                    "shares, and something else is in its place: write into the array, state[name]['step'][...] = n"
                )

    def check_present(self, parameters, present):
        """Refuse gradients for some parameters and not for all."""
        skipped = [parameter.name for parameter, there in zip(parameters, present, strict=True) if not there]
        if len(skipped) < len(parameters):
            raise ValueError(
                f"with capturable=True the parameters of a group share a step count, and {some(skipped)} have no gradient: "
                "give zeros, put them into a group of their own, or skip the whole group"
            )

    def check_counts(self, counts, parameters):
        """Refuse counts that differ, or are too large."""
        names = [parameter.name for parameter in parameters]
        if len(set(counts)) > 1:
            raise ValueError(
                f"with capturable=True the parameters {some(names)} share a step count; the state_dict's differ"
            )
        if any(n >= MOST_STEPS for n in counts):
            raise ValueError("with capturable=True a step count is an int64; the state_dict's is larger than 2**62")

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
        for name in ("norm", "found_inf"):
            if name in (conditions or {}):
                clipping.refuse_on_gpu(name)
        return self.value(lr), self.value(grad_scale), None

    def number(self, name, value, dtypes=NUMBERS):
        """Return a View of an array of one number beside the arrays, or None if value is a number of the host."""
        if not is_array(value):
            return None
        _, (view,) = backends.choose([(name, value)], self.kernels.name)
        if view.size != 1 or view.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(
                f"{name} has shape {view.shape} and dtype {shortened(str(view.dtype))}: it must be one {wanted}"
            )
        if self.device is not None and view.device != self.device:
            raise ValueError(f"{name} is on device {view.device}, the parameters are on {self.device}: move it")
        return view

    def value(self, number):
        """Return a hyperparameter as a number. An array on a GPU is read, after waiting for the device."""
        if not is_array(number):
            return number
        return float(array_bytes.number(self.kernels, self.number("lr or grad_scale", number)))

    def count(self):
        """Return the step count as an int. On a GPU this waits for the device: graphs may count on any stream."""
        return array_bytes.number(self.kernels, self.kernels.view("", self.step))

    def check_fill(self, name, array):
        """Refuse an array that `fill` cannot write."""
        checks.writeable(self.number(name, array))

    def fill(self, array, value):
        """Write a number into an array of one, in place, so that captured graphs see it. On a GPU this waits for the device."""
        array_bytes.store_number(self.kernels, self.kernels.view("", array), value)


class DeviceCount(ArrayCount):
    """One count for all parameters of a group, an int64 beside them, and room for the scalars that are made from it."""

    on_device = True

    def __init__(self, kernels, device, step=None):
        """step: the array to count in; by default a new one."""
        self.kernels, self.device = kernels, device
        self.memory: dict[np.dtype, ScalarsMemory] = {}  # always the same places, which captured graphs know
        with kernels.on(device, None):
            for dtype in NUMBERS:
                owner, address = kernels.device_bytes(MEMORY_BYTES)
                self.memory[dtype] = ScalarsMemory(owner, address, dtype, device)
            self.step = kernels.from_host(np.zeros(1, np.int64)) if step is None else step

    def __reduce__(self):  # a copy has memory of its own
        return type(self), (self.kernels, self.device, self.step)

    def alike(self, parameters, kind):
        """Return (1, None): all of them take the same step, and only the device knows which."""
        self._check_own(parameters)
        return [(1, None)] if parameters else []

    def advance(self, parameters):
        """A step counts itself, on the device."""

    def numbers(self, lr, grad_scale, conditions):
        """Return numbers that can be checked in the place of those on the device, and the Now of a step."""
        now = Now(self, lr, grad_scale, **(conditions or {}))
        return (0.0 if now.lr else lr), (1.0 if now.grad_scale else grad_scale), now


def in_array(kernels, device, before=None):
    """Return the count beside arrays of a backend and a device: the one before if it is there, or a new one."""
    device = None if kernels.memory == "CPU" else device or 0
    if isinstance(before, ArrayCount) and (before.kernels, before.device) == (kernels, device):
        return before
    return ArrayCount(kernels) if device is None else DeviceCount(kernels, device)
