"""The checks of a `ShardedAdam`'s arrays: of its parameters, and of the gradients of a step."""

import bisect
import collections
import itertools

from .. import backends, checks

MEMORY = {"numba-cpu": "CPU", "cupy": "CUDA"}
NARROWER = tuple(format for format in checks.FORMATS if format != "float64")


def params(groups, transport, backend):
    """Return the backend of all parameters and their Views, in order."""
    params = [(name, p) for group in groups for name, p in zip(group["names"], group["params"], strict=True)]
    twice = [name for name, n in collections.Counter(name for name, _ in params).items() if n > 1]
    if twice:
        raise ValueError(f"two parameters are named {twice[0]!r}: names must differ")
    named = [(f"params[{name!r}]", checks.given(f"params[{name!r}]", param)) for name, param in params]
    kernels, views = backends.choose(named, backend)
    _memory(kernels, transport)
    for view in views:
        checks.one_format(view, checks.FORMATS)
        checks.layout(view)
        if not view.writeable:
            checks.read_only(view)
    checks.overlap(views, [])
    devices = {view.device for view in views if view.size}
    if len(devices) > 1:
        raise ValueError(f"the parameters are on devices {sorted(devices)}: a rank has one GPU")
    return kernels, views


def _memory(kernels, transport):
    if kernels.name not in MEMORY:
        raise TypeError(f"{kernels.name} has no collectives; NCCL is reached through CuPy: give backend='cupy'")
    takes, memory = transport.memory, MEMORY[kernels.name]
    if takes not in ("any", memory):
        raise TypeError(
            f"the parameters are in {memory} memory, and transports.{type(transport).__name__} takes arrays in {takes} memory: "
            "use MPI or torch's gloo on the CPU, NCCL on GPUs"
        )


def grads(members, listed, buffers, transport, written, backend):
    """Return a View of each gradient, or None, in the order of the parameters.

    members: all parameters. listed: their gradients, None included. buffers: a list of `Buffer`. written: a Written, with which
    gradients must not share memory; None where they are only read.
    """
    # a gradient that is the array of its place is known
    views = [member.grad if grad is member.grad.array else None for member, grad in zip(members, listed, strict=True)]
    triples = zip(members, listed, views, strict=True)
    elsewhere = [(member, grad) for member, grad, view in triples if grad is not None and view is None]
    if elsewhere:
        named = [(f"the gradient of {member.view.name}", grad) for member, grad in elsewhere]
        kernels, their_views = backends.choose(named, backend)
        _memory(kernels, transport)
        for (member, _), view in zip(elsewhere, their_views, strict=True):
            _grad(view, member, buffers)
            if written is not None:
                if not view.writeable:
                    checks.read_only(view)
                written.check(view)
            views[member.number] = view
    return views


class Written:
    """The arrays that a step writes beside gradients. They stay where they are, and share no memory with one another."""

    def __init__(self, views):
        self._views = sorted((view for view in views if view.size), key=checks.bounds)
        extents = [checks.bounds(view) for view in self._views]
        self._starts = [start for start, _ in extents]
        self._ends = list(itertools.accumulate((end for _, end in extents), max))  # arrays with gaps may interlock

    def check(self, grad):
        """Refuse a gradient that shares memory with one of them."""
        start, end = checks.bounds(grad)
        before = bisect.bisect_left(self._starts, end)
        if before and self._ends[before - 1] > start:
            checks.overlap(self._views, [grad])


def _grad(grad, member, buffers):
    """Check a gradient that is not the array of its place in the buffer."""
    param, place = member.view, member.grad
    checks.one_format(grad, checks.FORMATS if place.format == "float64" else NARROWER)
    if grad.shape != param.shape:
        raise ValueError(f"{grad.name} has shape {grad.shape}, {param.name} has {param.shape}: nothing is broadcast")
    if grad.device != param.device and param.size:
        raise ValueError(f"{grad.name} is on device {grad.device}, {param.name} on {param.device}: move one of them")
    checks.layout(grad)
    in_place = grad.contiguous and (grad.pointer, grad.dtype) == (place.pointer, place.dtype)
    if not in_place and grad.size and any(buffer.has(grad) for buffer in buffers):
        raise ValueError(f"{grad.name} lies in another place of the buffer of gradients than its own: pass a copy")
