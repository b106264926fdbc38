"""The global norm of arrays on a GPU, in the order of `norm_order.py`: a table of the arrays, and the launches of the passes."""

import functools

import numpy as np

from gpuadam.kernels import norm_order as order
from gpuadam.kernels import synchronous
from gpuadam.kernels.gpu_table import Table
from gpuadam.kernels.layout import VECTOR_BYTES, side_by_side


class GpuNorm:
    """The norm of arrays that stay where they are, as often as it is asked for. None of them is kept alive.

    views: of the arrays, all on a device, given by its number. once: it is asked for once. Else it is as often as `goes_on`: all
    launches are on one stream, because they share memory for the sums.
    """

    _loaded = False  # whether the launches have loaded the kernels

    def __init__(self, backend, views, device, once=True):
        self.backend, self.device, self._once = backend, device, once
        self._stream: int | None = None  # that the launches are on, by its id
        self.streams = list(dict.fromkeys(view.stream for view in views))  # that the arrays name
        self._plan = plan = order.plan(views, VECTOR_BYTES)
        self._borrowed, self._n_chunks = backend.borrowed(views), order.chunks_of_all(views)
        names, size = [view.name for view in views], sum(view.size for view in views)
        self._text = functools.partial(synchronous.text_of_norm, names, size, plan, device=device)
        (_, self._sums_at), n_bytes = side_by_side([plan.table.nbytes, plan.workspace], VECTOR_BYTES)
        sums_at = self._sums_at
        self._table = Table(backend, device, n_bytes, lambda at: plan.placed(at + sums_at).view(np.uint8), once)

    def goes_on(self, place):
        """Whether a launch may go to a Place of the current device. A graph that is captured would keep the table for ever."""
        if self._once:
            return True
        return not place.capturing and self._stream in (None, self.backend.stream_id(place.stream))

    def launch(self, place, norm_at):
        """Enqueue the passes at a Place. norm_at: the address of the norm."""
        self._launch(place, norm_at, lambda sums: None)

    def chunk_sums(self, place):
        """Return the sums of all chunks, after waiting for them, as a NumPy array."""
        result = np.empty(self._n_chunks)

        def receive(sums):
            self.backend.receive(result, sums, result.nbytes, place.stream)
            self.backend.synchronize_stream(place.stream)

        self._launch(place, None, receive)
        return result

    def _launch(self, place, norm_at, then):
        backend = self.backend
        if place.capturing:
            for one in self._plan.passes:
                backend.check_loaded(self.device, one.form)
        with backend.at(self.device, place):
            if not self._once and self._stream is None:
                self._stream = backend.stream_id(place.stream)
            backend.before(place)
            table = self._table.on_stream(place)
            backend.launch_passes(self._plan, table, table + self._sums_at, norm_at, place.stream, self._text)
            self._table.used(place)
            if norm_at and not (self._loaded or place.capturing):
                for one in self._plan.passes:
                    backend.launched(self.device, one.form)
                self._loaded = True
            then(table + self._sums_at)
            backend.after(place, self._borrowed)

    def release(self):
        """Give the table's memory back. It is used again when the device is done with it."""
        self._table.release()
