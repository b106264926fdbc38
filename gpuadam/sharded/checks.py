"""The checks of a `ShardedAdam`'s arrays: of its parameters, and of the gradients of a step."""

import bisect
import collections
import itertools

from .. import backends, checks
from ..groups import named_params
from ..kernels.layout import bounds
from ..kernels.messages import shown
from .layout import CELL

NARROWER = tuple(format for format in checks.FORMATS if format != "float64")


def params(groups, arrangement, transport, backend):
    """Return the backend of all parameters and their Views, in order."""
    params = list(named_params(groups))
    for name, n in collections.Counter(name for name, _ in params).items():
        if n > 1:
            raise ValueError(f"two parameters are named {shown(name)}: names must differ")
    labelled = [(arrangement.label(name), param) for name, param in params]
    named = [(label, checks.given(label, param)) for label, param in labelled]
    kernels, views = _chosen(named, transport, backend)
    for view in views:
        checks.param(view)
    checks.given_once(views)
    checks.overlap(views, [])
    devices = {view.device for view in views if view.size}
    if len(devices) > 1:
        raise ValueError(f"the parameters are on devices {sorted(devices)}: a rank has one GPU")
    return kernels, views


def numbers(views, groups):
    """Return how many numbers of each parameter share a v. views: of all parameters, in the order of the groups."""
    of_groups = [group for group in groups for _ in group["params"]]
    sharing = [
        checks.numbers(view, group["complex"], group["components"]) for view, group in zip(views, of_groups, strict=True)
    ]
    for view, n in zip(views, sharing, strict=True):
        if CELL % n:
            raise ValueError(
                f"{view.name} has components={n}: ranks own multiples of {CELL:,} numbers, which are no whole vectors of {n}. "
                "With a fourth number, whose gradient is 0, components=4 takes the same steps"
            )
    return sharing


def _chosen(named, transport, backend):
    """Return what `backends.choose` does, of a backend whose arrays the transport takes."""
    kernels, views = backends.choose(named, backend)
    if kernels.name not in ("numba-cpu", "cupy"):
        raise TypeError(f"{kernels.name} has no collectives; NCCL is reached through CuPy: give backend='cupy'")
    if transport.memory not in ("any", kernels.memory):
        raise TypeError(
            f"{named[0][0]} is in {kernels.memory} memory, and transports.{type(transport).__name__} takes arrays in "
            f"{transport.memory} memory: use MPI or torch's gloo on the CPU, NCCL on GPUs"
        )
    return kernels, views


def grads(members, listed, transport, taken, zero_grad, backend):
    """Return a View of each gradient, or None, in the order of the parameters.

    members: all parameters. listed: their gradients, None included. taken: the Taken memory of the optimizer. zero_grad: whether
    gradients are written.
    """
    # a gradient that is the array of its place is known
    views = [member.grad if grad is member.grad_array else None for member, grad in zip(members, listed, strict=True)]
    elsewhere = [m for m, grad, view in zip(members, listed, views, strict=True) if grad is not None and view is None]
    if elsewhere:
        named = [(f"the gradient of {member.view.name}", listed[member.number]) for member in elsewhere]
        _, their_views = _chosen(named, transport, backend)
        for member, view in zip(elsewhere, their_views, strict=True):
            allowed = checks.FORMATS if member.grad.format == "float64" else NARROWER
            checks.gradient(view, member.view, allowed, zero_grad)
            taken.check(view, member.grad)
            views[member.number] = view
    return views


class Taken:
    """The arrays that a step writes beside gradients. They stay where they are, and share no memory with one another."""

    def __init__(self, views):
        self._views = sorted((view for view in views if view.size), key=bounds)
        extents = [bounds(view) for view in self._views]
        self._starts = [start for start, _ in extents]
        self._ends = list(itertools.accumulate((end for _, end in extents), max))  # arrays with gaps may interlock

    def check(self, grad, place):
        """Refuse a gradient that shares memory with one of them, unless it lies in its place in the buffer of gradients."""
        start, end = bounds(grad)
        before = bisect.bisect_left(self._starts, end)
        in_place = grad.contiguous and (grad.pointer, grad.dtype) == (place.pointer, place.dtype)
        if not in_place and before and self._ends[before - 1] > start:
            checks.overlap(self._views, [grad])
