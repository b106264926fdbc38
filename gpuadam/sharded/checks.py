"""What is checked of the arrays of a `ShardedAdam`: its parameters, and the gradients of a step."""

import bisect
import itertools

from .. import backends, checks

MEMORY = {"numba-cpu": "CPU", "cupy": "CUDA"}
NARROWER = tuple(format for format in checks.FORMATS if format != "float64")


def params(groups, transport, state_dtype, backend):
    """Return the backend of all parameters and their Views, in order."""
    names = [name for group in groups for name in group["names"]]
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"two parameters are named {twice!r}: names must differ")
    given = [(f"params[{name!r}]", p) for g in groups for name, p in zip(g["names"], g["params"], strict=True)]
    for label, param in given:
        checks.given(label, param)
    kernels, views = backends.choose(given, backend)
    _memory(kernels, transport)
    for view in views:
        checks.one_format(view, checks.FORMATS)
        checks.layout(view)
        if not view.writeable:
            checks.read_only(view)
        if state_dtype == "8bit" and view.format == "float64":
            checks.eight_bits(view)
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


def grads(given, buffers, transport, zero_grad, written, backend):
    """Return a View of each gradient, or None, in the order of all parameters.

    buffers: `shard_buffer.Buffer`s. written: Written, what a gradient that is zeroed must not share memory with.
    """
    views = [None] * len(given)
    elsewhere = []
    for buffer in buffers:
        for k, number in enumerate(buffer.numbers):
            if given[number] is buffer.grads[k]:
                views[number] = buffer.grad_views[k]  # in its place, and known
            elif given[number] is not None:
                elsewhere.append((number, buffer, k))
    if elsewhere:
        named = [(f"the gradient of {buffer.views[k].name}", given[number]) for number, buffer, k in elsewhere]
        kernels, found = backends.choose(named, backend)
        _memory(kernels, transport)
        for (number, buffer, k), view in zip(elsewhere, found, strict=True):
            _grad(view, buffer.views[k], buffer.grad_views[k], buffers)
            if zero_grad and not view.writeable:
                checks.read_only(view)
            if zero_grad:  # else a gradient may be what is written: it is copied first
                written.check(view)
            views[number] = view
    return views


class Written:
    """What a step writes beside gradients: Views that stay where they are, and do not share memory with one another."""

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


def _grad(grad, param, place, buffers):
    """Check a gradient that is to be copied. place: its View in the buffer."""
    checks.one_format(grad, checks.FORMATS if place.format == "float64" else NARROWER)
    if grad.shape != param.shape:
        raise ValueError(f"{grad.name} has shape {grad.shape}, {param.name} has {param.shape}: nothing is broadcast")
    if grad.device != param.device and param.size:
        raise ValueError(f"{grad.name} is on device {grad.device}, {param.name} on {param.device}: move one of them")
    checks.layout(grad)
    in_place = grad.contiguous and (grad.pointer, grad.dtype) == (place.pointer, place.dtype)
    if not in_place and grad.size and any(buffer.has(grad) for buffer in buffers):
        raise ValueError(f"{grad.name} lies in another place of the buffer of gradients than its own: pass a copy")
