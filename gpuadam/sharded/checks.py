"""The checks of a `ShardedAdam`'s arrays: of its parameters, and of the gradients of a step."""

from .. import backends, checks
from ..groups import named_params
from .layout import CELL

NARROWER = tuple(format for format in checks.FORMATS if format != "float64")


def params(groups, arrangement, transport, backend):
    """Return the backend of all parameters and their Views, in order."""
    named = [(label := arrangement.label(name), checks.given(label, param)) for name, param in named_params(groups)]
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

    members: all parameters. listed: their gradients, None included. taken: Views of what the step writes beside them, of which a
    gradient may share the memory of its own place alone. zero_grad: whether gradients are written.
    """
    # a gradient that is the array of its place is known
    views = [member.grad if grad is member.grad_array else None for member, grad in zip(members, listed, strict=True)]
    elsewhere = [m for m, grad, view in zip(members, listed, views, strict=True) if grad is not None and view is None]
    if elsewhere:
        named = [(f"the gradient of {member.view.name}", listed[member.number]) for member in elsewhere]
        _, their_views = _chosen(named, transport, backend)
        for member, view in zip(elsewhere, their_views, strict=True):
            allowed = checks.FORMATS if member.grad.format == "float64" else NARROWER
            checks.beside(view, member.view, "grad", zero_grad, allowed=allowed)
            views[member.number] = view
        pairs = zip(elsewhere, their_views, strict=True)
        checks.overlap(taken, [view for member, view in pairs if not _same_place(view, member.grad)])
    return views


def _same_place(view, place):
    return view.contiguous and (view.pointer, view.dtype) == (place.pointer, place.dtype)
