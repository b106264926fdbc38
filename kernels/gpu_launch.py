"""What both GPU backends do to launch: which arrays share a launch, on which stream it goes, what a captured graph may hold.

A backend module brings what differs: `on(device, stream)`, `current_stream()`, `is_capturing(stream)`, `order(before, after)`,
`synchronize_stream(stream)`, `begin_capture(stream)`, `drop_capture(stream)`, the memory for `pointer_table`, and
`run(batch, form, scalars, rule, stream, key)`. All but `on` are about the current device: each device has a current stream of its
own and a default stream of the same name, and an event serves the streams of its own device.
"""

import collections
import contextlib
import ctypes
import itertools
import os
import threading
from typing import NamedTuple

from gpuadam.kernels import pointer_table, streams, synchronous
from gpuadam.kernels.dlpack import Borrowed
from gpuadam.kernels.layout import Update, dense, split
from gpuadam.kernels.operands import GROUP_LANES
from gpuadam.kernels.scalars import ScalarsMemory


def launch(backend, form, views, scalars, rule, stream, key=0):
    """Update arrays in CUDA memory in place, on their device.

    views: of the arrays, in the order of `operands_of`, of one shape and device, checked; those that are None are left out.
    scalars: `adam.Scalars` of form.dtype, or the `scalars.ScalarsMemory` that holds them.
    stream: the handle of one; by default CuPy's current stream, or the one that the arrays name.
    key: of the step, for random rounding.
    """
    for batch in batches(backend, [Update([view for view in views if view is not None])], form.arrays):
        batch.prepare(rule, form, scalars, batch.place(stream), key)
        batch.launch()


def batches(backend, updates, arrays):
    """Return the launches that updates take: one for all dense arrays, one for each other.

    updates: `layout.Update`s of arrays on one device, of the formats in arrays.
    """
    updates = [update for update in updates if update.views[0].size]
    is_dense = [dense(update.views, in_c_order=arrays.random) for update in updates]
    together = list(itertools.compress(updates, is_dense))
    apart = [Batch(backend, "strided", arrays, [update]) for update, one in zip(updates, is_dense, strict=True) if not one]
    if not together:
        return apart
    loop = "table" if len(together) > 1 or arrays.grouped else "contiguous"
    return [Batch(backend, loop, arrays, together), *apart]


def to_order(backend, stream, others):
    """Return which of the other streams work on a stream has to be ordered with."""
    if others and backend.is_capturing(stream):
        # nothing that is captured can wait for the default stream, and a graph is ordered where it is launched
        return [other for other in others if other != streams.LEGACY_DEFAULT]
    return others


@contextlib.contextmanager
def ordered(backend, device, views, given=None):
    """Make a device current and the stream for work on arrays there, which is chosen and ordered as a launch's. Gives its handle.

    The work is also ordered with what was the current stream, where others may have used the same memory. given: the handle of a
    stream, or None.
    """
    with backend.on(device, None):
        stream, others = streams.choose(given, backend.current_stream(), [*(view.stream for view in views), None])
        others = to_order(backend, stream, others)
        with backend.on(device, stream):
            for other in others:
                backend.order(other, stream)
            yield stream
            for other in others:
                backend.order(stream, other)
            if not backend.is_capturing(stream):
                keep_until_done(backend, stream, borrowed(views))


RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextlib.contextmanager
def allowed_while_capturing():
    """Let this thread allocate and query events during a capture of CUDA's mode "global", torch's, which they would end.

    They are no part of the graph.
    """
    try:
        exchange = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except OSError:  # there is no driver to refuse it
        yield
        return
    mode = ctypes.c_int(RELAXED)
    exchange(ctypes.byref(mode))  # which gives the one of before
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def borrowed(views):
    """Return those arrays of Views that were borrowed by DLPack."""
    return [view.array for view in views if type(view.array) is Borrowed]


_in_use: collections.deque = collections.deque()  # (backend, event, what was borrowed), in the order of launches
_in_use_lock = threading.Lock()


def keep_until_done(backend, stream, borrowed):
    """Keep what was borrowed until the work that is on a stream is done, of which its producer does not know."""
    if not borrowed and not _in_use:
        return
    with _in_use_lock:
        while _in_use and _in_use[0][0].done(_in_use[0][1]):
            _in_use.popleft()
        if borrowed:
            _in_use.append((backend, backend.record(stream), borrowed))


MOST_OF_32_BITS = 2**31  # bytes of an array that CuPy counts in 32 bits

_rehearsed: set = set()  # (backend, device, kernel)


def rehearse(backend, device, kernel, launch):
    """Launch a kernel into a graph that is thrown away: what can fail in the compiler or the loader fails before a write.

    Nothing runs. device: the current one. kernel: what tells one that is compiled from others; the first launch of each is
    rehearsed. launch(stream): enqueues it.
    """
    key = backend.name, device, kernel
    if key in _rehearsed:
        return
    owner, stream = backend.new_stream()
    with backend.on(device, stream):
        backend.begin_capture(stream)
        try:
            launch(stream)
        finally:
            backend.drop_capture(stream)
    del owner
    _rehearsed.add(key)


class Place(NamedTuple):
    """Where a launch goes."""

    stream: int
    others: list[int]  # streams to order it with
    capturing: bool  # whether a graph is being captured on the stream


class Batch:
    """Updates that one launch makes, short of the form and the scalars.

    It may be launched again and again for as long as the arrays stay where they are, and keeps none of them alive.
    """

    lasts = True

    def __init__(self, backend, loop, arrays, updates):
        self.backend, self.loop, self.arrays, self.is_random = backend, loop, arrays, arrays.random
        self.group, self.begun = 0, False
        first = updates[0].views
        self.device, self.size = first[0].device, first[0].size
        self.named = list(dict.fromkeys(view.stream for update in updates for view in update.views))
        self.pointers = [view.pointer for view in first]
        self.borrowed = borrowed(view for update in updates for view in update.views)
        self.arguments = None  # what a backend makes of the arrays at the first launch
        self.what = synchronous.updates_of(updates, loop) if synchronous.ON else ""
        self.names = [update.views[0].name for update in updates]
        # what CuPy compiles a kernel for, beside its form
        self.kernel = loop, *((view.contiguous, len(view.shape), view.nbytes > MOST_OF_32_BITS) for view in first)
        self.at = None  # where the table is
        if loop != "table":
            self.updates = [updates[0]._replace(views=[view._replace(array=None) for view in first])]
        if loop == "contiguous":
            self.split = split(self.pointers, [view.dtype.itemsize for view in first], self.size)
        elif loop == "table":
            self.table = pointer_table.Table(backend, self.device, updates, GROUP_LANES if arrays.grouped else 0)

    def place(self, given):
        """Return the Place of a launch. given: the handle of a stream, or None."""
        with self.backend.on(self.device, None):
            stream, others = streams.choose(given, self.backend.current_stream(), self.named)
            return Place(stream, to_order(self.backend, stream, others), self.backend.is_capturing(stream))

    def check(self, place, on_device):
        """Refuse what a graph that is being captured cannot hold. on_device: whether the scalars are in device memory."""
        if not place.capturing:
            return
        if not on_device:
            raise RuntimeError(
                "a graph is being captured on this stream, and it would repeat this step with the learning rate and the step "
                "count of now. Make the optimizer with capturable=True: it counts the steps on the device; give it the "
                "learning rate as an array there"
            )
        if place.others:
            raise RuntimeError(
                f"a graph is being captured, and arrays were last used on other streams ({place.others}): make the stream that "
                "is captured the current one, in their library too, and use them there first"
            )
        if self.loop == "table" and place.stream not in self.table.streams:
            raise RuntimeError(
                "a graph is being captured, and the table of these arrays is not on the device yet: take a step with the same "
                "arrays, gradients included, on this stream before the capture"
            )

    def prepare(self, rule, form, scalars, place, key=0):
        """Do what may fail before anything is written: put the table on the device, and compile the kernel."""
        self.prepared, self.begun = (rule, form, scalars, place, key), False
        with self.backend.on(self.device, place.stream):
            if self.loop == "table":
                self.at = self.table.addresses(place.stream)
            if not place.capturing:
                kernel = rule, form, isinstance(scalars, ScalarsMemory), self.kernel
                rehearse(self.backend, self.device, kernel, lambda s: self.backend.run(self, form, scalars, rule, s, key))

    def launch(self):
        """Enqueue the updates that were prepared. `begun` says from then on that they cannot be taken back."""
        rule, form, scalars, place, key = self.prepared
        stream, others, _ = place
        with self.backend.on(self.device, stream):
            if self.loop == "table":
                self.at = self.table.addresses(stream)
            for other in others:
                self.backend.order(other, stream)
            if synchronous.ON:
                synchronous.launch(self.backend, stream, self.what, self.backend.run, self, form, scalars, rule, stream, key)
            else:
                self.backend.run(self, form, scalars, rule, stream, key)
            self.begun = True
            if self.loop == "table":
                self.table.used(stream)
            for other in others:
                self.backend.order(stream, other)
            if not place.capturing:
                keep_until_done(self.backend, stream, self.borrowed)

    def release(self):
        """Give back what it holds on the device, once the device is done with it."""
        if self.loop == "table":
            self.table.release()
