"""What both GPU backends do to launch the passes of `global_norm.py`: on which stream they go, where table and sums lie.

A backend's own file brings `current_device()`, `empty()`, a new result on the current device and its address, `NAMED`, the stream
that a new result names, and `run(form, stream, chunks, arguments)`, a launch on the current device.
"""

import contextlib

import numpy as np

from gpuadam.kernels import global_norm, gpu_launch, pointer_table, streams, synchronous
from gpuadam.kernels.layout import VECTOR_BYTES


def launch(backend, own, views, out, device, given):
    """Enqueue the norm of arrays in CUDA memory and return the array that it will be in.

    backend: `cupy_elementwise` or `numba_cuda`; own: the file beside this one. out: a View, or None for a new array. device: the
    arrays' number, or None if they have no elements. given: the handle of a stream, or None.
    """
    if device is None:
        device = own.current_device() if out is None or out.device is None else out.device
    # a new result is there for the current stream, and for the one that it names, wherever the work goes
    named = [view.stream for view in views] + ([out.stream] if out else [None, own.NAMED])
    with backend.on(device, None):
        stream, others = streams.choose(given, backend.current_stream(), named)
        others = gpu_launch.to_order(backend, stream, others)
        capturing = backend.is_capturing(stream)
        if capturing:
            _check_capture(out, others)
        result, address = own.empty() if out is None else (out.array, out.pointer)
    plan = global_norm.plan(views, VECTOR_BYTES)
    table = _Table(backend, device, plan)
    with backend.on(device, stream):
        for other in others:
            backend.order(other, stream)
        with gpu_launch.allowed_while_capturing() if capturing else contextlib.nullcontext():
            at, workspace = table.addresses(stream)
        for one in plan.passes:
            last = one is plan.passes[-1]
            arguments = (at, one.first_row, one.n_rows, address if last else workspace + one.out, one.chunks, int(last))
            launched = one.form, stream, one.chunks, arguments
            if synchronous.ON:
                synchronous.launch(backend, stream, _what(views, plan, one, device), own.run, *launched)
            else:
                own.run(*launched)
        table.used(stream)
        for other in others:
            backend.order(stream, other)
        if not capturing:
            gpu_launch.keep_until_done(backend, stream, gpu_launch.borrowed(views))
    table.release()
    return result


def _what(views, plan, one, device):
    """Return what an error calls the launch of a pass."""
    number, size = plan.passes.index(one) + 1, sum(view.size for view in views)
    names = ", ".join(view.name for view in views[:3]) + (f" and {len(views) - 3:,} more" if len(views) > 3 else "")
    return (
        f"pass {number} of {len(plan.passes)} of the global norm of {names} ({len(views):,} arrays, {size:,} elements; "
        f"{one.form.format}, {one.chunks:,} chunks, device {device})"
    )


def chunk_sums(backend, own, views):
    """Return the sums of the squares of all chunks as a NumPy array, in their order. The host waits for them.

    views: of arrays on one device, used on its current stream.
    """
    if not views:
        return np.empty(0)
    device = views[0].device
    plan = global_norm.plan(views, VECTOR_BYTES)
    table = _Table(backend, device, plan)
    with backend.on(device, None):
        stream = backend.current_stream() or streams.LEGACY_DEFAULT
        at, workspace = table.addresses(stream)
        for one in plan.passes:
            if one.form.squares:
                own.run(one.form, stream, one.chunks, (at, one.first_row, one.n_rows, workspace + one.out, one.chunks, 0))
        table.used(stream)
        sums = own.on_host(workspace, global_norm.chunks_of_all(views), device)
    table.release()
    return sums


def _check_capture(out, others):
    """Refuse what a graph that is being captured cannot hold."""
    if out is None:
        raise RuntimeError(
            "a graph is being captured, and a new array for the norm would not outlive this call for it: give out=, an array of "
            "shape () and dtype float64 that you keep"
        )
    if others:
        raise RuntimeError(
            f"a graph is being captured, and arrays were last used on other streams ({others}): make the stream that is captured "
            "the current one, in their library too, and use them there first"
        )


class _Table(pointer_table.Table):
    """The table of a plan in device memory, and after it the workspace for the sums, which belongs to this call alone."""

    def __init__(self, backend, device, plan):
        self.backend, self.device, self.plan = backend, device, plan
        self.streams, self._buffer, self._sent = {}, None, None
        self.n_bytes = -(-plan.table.nbytes // VECTOR_BYTES) * VECTOR_BYTES

    def addresses(self, stream):
        """Send the table, and return where it and the workspace are, for work on a stream."""
        self._buffer = pointer_table._take(self.backend, self.device, self.n_bytes + self.plan.workspace)
        workspace = self._buffer.address + self.n_bytes
        table = self.plan.placed(workspace)
        self._buffer.pinned[: table.nbytes] = table.view(np.uint8)
        self.backend.send(self._buffer.address, self._buffer.pinned, table.nbytes, stream)
        self._buffer.in_use = True
        return self._buffer.address, workspace
