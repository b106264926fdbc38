"""What one launch on a GPU updates, and where it goes."""

import operator
from typing import Any, NamedTuple

import numpy as np

from gpuadam.kernels import gpu_driver, gpu_launch, synchronous
from gpuadam.kernels.backend import Batch
from gpuadam.kernels.gpu_in_flight import vectors_of
from gpuadam.kernels.gpu_table import Table, rows_and_owners
from gpuadam.kernels.layout import split
from gpuadam.kernels.operands import GROUP_LANES
from gpuadam.kernels.scalars import ScalarsMemory

MOST_OF_32_BITS = 2**31  # bytes of an array that CuPy indexes in 32 bits


class Place(NamedTuple):
    """Where a launch goes."""

    stream: int
    others: list[int]  # streams to order the launch with
    capturing: bool  # whether a graph is being captured on the stream
    is_current: bool = False  # whether device and stream were the current ones when the place was chosen

    def check_capture(self):
        """Refuse to capture work that would have to wait for streams outside the graph."""
        if self.capturing and self.others:
            raise RuntimeError(
                f"a graph is being captured, and arrays were last used on other streams ({self.others}): make the stream that "
                "is captured the current one, in their library too, and use them there first"
            )


class GpuBatch(Batch):
    """Updates that one launch makes, in one of three loops: "contiguous", "table" or "strided".

    It can be launched again and again for as long as the arrays stay where they are, and keeps none of them alive.
    """

    lasts = True

    def __init__(self, backend, loop, arrays, updates):
        super().__init__(updates, arrays)
        self.backend, self.loop = backend, loop
        first = updates[0].views
        views = [view for update in updates for view in update.views]
        self.device, self.size = first[0].device, first[0].size
        self.streams = list(dict.fromkeys(view.stream for view in views))  # that the arrays name
        self.pointers = [view.pointer for view in first]
        self.borrowed = backend.borrowed(views)
        self.built: Any = None  # (rule, form, whether scalars are on the device) of the kernel that is known to be there
        self.vectors = 1  # that a thread of it takes
        self.call: Any = None  # what the backend keeps for the next launch of the same kernel
        self.recorded: Any = None  # the gpu_launch.Recorded launch of the kernel; False if there can be none
        self.text = synchronous.text_of_updates(updates, loop) if synchronous.ON else ""
        # what CuPy compiles a kernel for, beside its form
        self.kernel = loop, *((view.contiguous, len(view.shape), view.nbytes > MOST_OF_32_BITS) for view in first)
        self.table = None
        if loop == "table":
            self.rows, self.owners = parts = rows_and_owners(updates, GROUP_LANES if arrays.grouped else 0)
            contents = np.concatenate([part.view(np.uint8).ravel() for part in parts])
            self.table = Table(backend, self.device, contents.size, lambda address: contents)
        self.address = None  # of the table
        first = [view._replace(array=None) for view in first]
        if loop == "contiguous":
            self.split = split(self.pointers, [view.dtype.itemsize for view in first], self.size)
            first = [view.flat for view in first]
        self.updates = [] if self.table else [updates[0]._replace(views=first)]

    def place(self, stream):
        return self.backend.place(self.device, stream, self.streams)

    def check(self, place, on_device):
        if not place.capturing:
            return
        if not on_device:
            raise RuntimeError(
                "a graph is being captured on this stream, and it would repeat this step with the learning rate and the step "
                "count of now. Make the optimizer with capturable=True: it counts the steps on the device; give it the "
                "learning rate as an array there"
            )
        place.check_capture()
        with self.backend.at(self.device, place):
            is_there = not self.table or self.table.is_on(place.stream)
        if not is_there:
            raise RuntimeError(
                "a graph is being captured, and the table of these arrays is not on the device yet: take a step with the same "
                "arrays, gradients included, on this stream before the capture"
            )

    def prepare(self, rule, form, scalars, place, key=0):
        """Put the table on the device, and compile the kernel. The second time, record its launch."""
        super().prepare(rule, form, scalars, place, key)
        kernel = rule, form, isinstance(scalars, ScalarsMemory)
        with self.backend.at(self.device, place):
            if self.table:
                self.address = self.table.on_stream(place.stream)
            if self.built is not None and all(map(operator.is_, kernel, self.built)):
                if self.recorded is None and not kernel[-1] and not place.capturing and gpu_launch.alone():
                    self.recorded = self.backend.recorded(self, form, scalars, rule, key) or False
                return
            self.built = self.call = self.recorded = None
            capability = gpu_driver.compute_capability(self.device)
            self.vectors = vectors_of(form, self.loop, capability, self.backend.interleaves)
            if not place.capturing:
                self.backend.rehearse(
                    self.device, (*kernel, self.kernel), lambda s: self.backend.run(self, form, scalars, rule, s, key)
                )
                self.built = kernel

    def launch(self):
        rule, form, scalars, place, key = self.prepared
        backend, stream = self.backend, place.stream
        with backend.at(self.device, place):
            backend.before(place)
            launch: tuple[Any, ...]
            if self.recorded:
                launch = self.recorded.launch, stream, scalars, key
            else:
                launch = backend.run, self, form, scalars, rule, stream, key
            synchronous.launch(backend, stream, lambda: self.text, *launch)
            self.begun = True
            if self.table:
                self.table.used(stream)
            backend.after(place, self.borrowed)

    def release(self):
        """Give the table's memory back. It is used again when the device is done with it."""
        if self.table:
            self.table.release()
