"""The norms of a step on a GPU: one table for all passes, and their launches on one stream."""

import functools
from typing import Any

import numpy as np

from gpuadam.kernels import norm_order as order
from gpuadam.kernels import synchronous
from gpuadam.kernels.change_sums import NormPasses
from gpuadam.kernels.gpu_table import Table
from gpuadam.kernels.layout import VECTOR_BYTES, side_by_side
from gpuadam.kernels.scalars import MEMORY_BYTES, REALS_AT, ScalarsMemory


class GpuNormPasses(NormPasses):
    """The norms of a step over arrays of one GPU.

    All passes go on one stream, with which the streams that the arrays name are ordered: those of the update wait for the pass
    before it, and the pass after it waits for them.
    """

    def __init__(self, backend, params, device, out):
        super().__init__(backend, params, device, out)
        if self.device is None:
            self.device = out[0].device if out else backend.current_device()
        self._place: Any = None

    def place(self, stream):
        if self._place is None:
            views = [*self.params, *(view for part in self.parts for view in part.views)]
            why = (
                "the norms have no arrays yet that outlive it: take a step with norms=True before the capture, with the same "
                "arrays, on this stream"
            )
            self._place = self.backend.place_with_results(
                self.device, stream, [view.stream for view in views], self.out, why
            )
        return self._place

    def prepare_part(self, part):
        _, form, scalars, *_ = part.prepared
        if not isinstance(scalars, ScalarsMemory):
            part.scalars = np.zeros(MEMORY_BYTES, np.uint8)  # neither a key nor a flag
            reals = np.array(scalars, form.dtype).view(np.uint8)
            part.scalars[REALS_AT : REALS_AT + reals.size] = reals
        else:
            part.scalars = np.zeros(0, np.uint8)
        self._rehearse(form)

    def _rehearse(self, form):
        """Compile a kernel before anything is written. While a graph is captured it has to be there."""
        if self._place.capturing:
            self.backend.check_loaded(self.device, form)
            return
        with self.backend.on(self.device, self._place.stream):
            arguments = (0,) * 6  # no chunks
            self.backend.rehearse(self.device, form, lambda s: self.backend.launch_sums(form, 1, arguments, s))

    def _launched(self, forms):
        if not self._place.capturing:
            for form in forms:
                self.backend.launched(self.device, form)

    def prepare(self, stream):
        """Send what all passes read: tables, scalars that the host has computed, and zeros for parameters that do not change."""
        place = self.place(stream)
        self._plans = order.plan([], n_sums=self.total), order.plan(self.params, VECTOR_BYTES)
        for plan in self._plans:
            for one in plan.passes:
                self._rehearse(one.form)
        tables = [x for part in self.parts for x in (part.table, part.scalars)]
        sizes = [x.nbytes for x in (*tables, *(plan.table for plan in self._plans))] + [p.workspace for p in self._plans]
        starts, end = side_by_side(sizes, VECTOR_BYTES)
        self._places, self._sums = starts[:-2], starts[-2:]  # of tables and of both workspaces, in bytes

        def contents(address):
            memory = np.zeros(self._sums[1], np.uint8)
            placed = [plan.placed(address + at) for plan, at in zip(self._plans, self._sums, strict=True)]
            for start, table in zip(self._places, [*tables, *placed], strict=True):
                memory[start : start + table.nbytes] = table.view(np.uint8)
            return memory

        backend = self.backend
        with backend.on(self.device, None):
            results = [(view.array, view.pointer) for view in self.out] or [backend.empty_number(), backend.empty_number()]
        self.result, self._norms_at = zip(*results, strict=True)
        self._table = Table(backend, self.device, end, contents, once=True)
        with backend.on(self.device, place.stream):
            self._address = self._table.on_stream(place)

    def launch_part(self, part):
        number, scalars = 2 * self.parts.index(part), part.prepared[2]
        table, words = (self._address + start for start in self._places[number : number + 2])
        words = scalars.address if isinstance(scalars, ScalarsMemory) else words
        arguments = table, 0, part.n_rows, self._address + self._sums[0], part.chunks, words
        with self.backend.ordered_at(self._place, self.device, part.views) as stream:
            what = functools.partial(synchronous.text_of_updates, part.updates, "change")
            synchronous.launch(
                self.backend, stream, what, self.backend.launch_sums, part.prepared[1], part.chunks, arguments, stream
            )
        self._launched([part.prepared[1]])

    def launch(self):
        names, size = [view.name for view in self.params], sum(view.size for view in self.params)
        with self.backend.ordered_at(self._place, self.device, self.params) as stream:
            for plan, table, sums, norm in zip(self._plans, self._places[-2:], self._sums, self._norms_at, strict=True):
                text = functools.partial(synchronous.text_of_norm, names, size, plan, device=self.device)
                self.backend.launch_passes(plan, self._address + table, self._address + sums, norm, stream, text)
            self._table.used(self._place)
        self._launched(one.form for plan in self._plans for one in plan.passes)
        self._table.release()
