"""How many steps parameters have taken, where torch's own count does not hold it.

torch keeps the count of a parameter as a float32, "step" in its state. From 2**24 on that number plus 1 rounds back to itself: a
count made of it alone would stand still, and with it the random bits of every step. So beyond that, and on the device for steps
that are captured, integers count, and "step" is the float32 nearest to them. A checkpoint or a copy goes on from "step".
"""

import itertools

import numpy as np
import torch

from .. import torch_tensors
from ..kernels.step_objects import same
from ..step_counts import DeviceCount

LAST = 1 << 24  # float32 holds every count up to this one


class HostCounts:
    """The counts of parameters whose steps the host counts."""

    def __init__(self):
        self._beyond: dict[torch.Tensor, int] = {}  # a "step" -> the count, if it is beyond LAST

    def taken(self, step):
        """Return the count of a "step", as a float or an int."""
        nearest = step.item()
        if nearest >= LAST:
            exact = self._beyond.get(step, 0)
            if np.float32(exact) == nearest:  # else "step" was set since
                return exact
        return nearest

    def advance(self, counted):
        """Count a step. counted: pairs of a new count and the "step"s of the parameters that have it now."""
        if counted:  # one call for all, as torch's own optimizers make
            torch._foreach_add_(list(itertools.chain.from_iterable(steps for _, steps in counted)), 1)
        for count, steps in counted:
            if count > LAST:
                for step in steps:
                    step.fill_(count)
                    self._beyond[step] = count


class Clock:
    """The count of a group whose steps its device counts, and the "step"s of its parameters, which are copies of it."""

    def __init__(self, steps, kernels, device, param):
        self._steps, self._versions = steps, []
        self._count = torch.zeros((), dtype=torch.int64, device=param.device)
        self.on_device = DeviceCount(kernels, device, torch_tensors.plain("the step count", self._count))

    def is_of(self, steps):
        """Whether these "step"s are the copies."""
        return same(steps, self._steps)

    @property
    def is_current(self):
        """Whether nobody else has written a copy since the last step."""
        return self._versions == self._versions_now()

    def set(self, count):
        """Set the count, in the memory that captured graphs know."""
        self._count.fill_(count)
        self._versions = self._versions_now()

    def copy(self):
        """Copy the count, which the step has advanced unless it was left out, to all "step"s."""
        torch._foreach_copy_(self._steps, [self._count.to(torch.float32)] * len(self._steps))
        self._versions = self._versions_now()

    def _versions_now(self):
        return [None if step.is_inference() else step._version for step in self._steps]
