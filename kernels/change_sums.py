"""The norms of a step: that of the change which it makes, and that of the parameters after it.

The change of an element is its new parameter less the old one: both of the compute type and not yet rounded to the
parameter's format, and their difference one float64 operation. With `change` it is the change that the rule returns. Before the
update, a pass reads all operands, applies the rule, and stores nothing but the sum of the squares of each chunk. The order is
that of `norm_order.py`, as if the changes were arrays of float64, in which a parameter without an update has zeros. So the pass
needs no memory beyond 8 bytes for each chunk. The parameters' norm is taken after the update.

`change_cpu.py`, `change_cuda_c.py` and `change_numba_cuda.py` have the kernels; `change_cpu.py` and `change_gpu.py` launch them.
On a GPU a warp sums a chunk, and thread t has the lanes t, t + 32, ... t + 224: neighbours load neighbours, whatever the formats.
"""

from typing import Any

import numpy as np

from gpuadam.kernels import norm_order as order
from gpuadam.kernels.backend import Batch
from gpuadam.kernels.layout import collapse

# The places in a chunk of the first elements of the lanes that thread 0 of a warp has; the others' are behind them.
PLACES = tuple(lane // order.WIDTH * order.QUARTER + lane % order.WIDTH for lane in range(0, order.LANES, order.WARP))


def table_of(updates, first_sums):
    """Return the table of `layout.Update`s, of int64, the number of its rows, and that of their chunks.

    first_sums: of each update the number of its first chunk among those of all parameters.

    A row has the columns of `norm_order.py`, of which POINTER is unused, and then the addresses of the operands. A dimension has
    a length, and then a stride for each operand. SIZE and chunks count numbers, dimensions elements, which may have several.
    """
    rows: list[list[int]] = []
    dims: list[int] = []
    chunks = 0
    for update, first_sum in zip(updates, first_sums, strict=True):
        views, elements, numbers = update.views, update.views[0].size, update.views[0].flat.size
        if not elements:
            continue
        itemsizes = [view.dtype.itemsize for view in views]
        run = all(view.pointer % view.dtype.base.itemsize == 0 for view in views)
        dimensions = [(elements, *itemsizes)]
        if not all(view.contiguous for view in views):
            shape, strides = collapse(views[0].shape, [view.strides for view in views], in_c_order=True)
            if shape:
                dimensions = list(zip(shape, *strides, strict=True))
            run = run and dimensions == [(elements, *itemsizes)]
        pointers = (view.pointer for view in views)
        rows.append([0, numbers, run, len(dimensions), len(dims), chunks, first_sum, 0, *pointers])
        dims += [number for dimension in dimensions for number in dimension]
        chunks += order.chunks_of(numbers)
    table = np.array([number for row in rows for number in row] + dims, np.int64)
    if rows:
        width = len(rows[0])
        table[order.DIMS : len(rows) * width : width] += len(rows) * width
    return table, len(rows), chunks


class ChangePart(Batch):
    """The sums of the change of some Updates: a Batch that writes nothing of the caller's. norms: the `NormPasses` it is of."""

    def __init__(self, norms, updates, arrays, first_sums):
        super().__init__(updates, arrays)
        self.norms, self.device = norms, norms.device
        self.scalars: Any = None  # as the kernel reads them
        self.names, self.is_random = (), False  # an error of the step names what is updated; nothing here is rounded
        self.views = [view for update in updates for view in update.views]
        self.table, self.n_rows, self.chunks = table_of(updates, first_sums)

    def place(self, stream):
        return self.norms.place(stream)

    def prepare(self, rule, form, scalars, place, key=0):
        super().prepare(rule, form, scalars, place, key)
        self.norms.prepare_part(self)

    def launch(self):
        if self.chunks:
            self.norms.launch_part(self)


class NormPasses:
    """The passes that the norms of one step take.

    The order of calls: `part` for each kind of arrays, `prepare` of each part, `prepare`; then `launch` of each part, the
    updates, `launch`.

    params: Views of all parameters, of one device. device: its number; None for the CPU, or if no parameter has elements. out:
    Views of two arrays of shape () and dtype float64, for the norms of the change and of the parameters; none for new ones.
    `result`: both arrays.
    """

    def __init__(self, backend, params, device, out):
        self.backend, self.params, self.device, self.out = backend, params, device, out
        self.parts: list[ChangePart] = []
        self.result: tuple = ()
        self.total = order.chunks_of_all(params)

    def part(self, updates, arrays, first_sums):
        """Return the ChangePart of Updates, which all have the same `operands.Arrays`, and keep it."""
        self.parts.append(ChangePart(self, updates, arrays, first_sums))
        return self.parts[-1]

    def place(self, stream):
        """Return where the launches go, or None on the CPU. stream: the handle of one, or None."""

    def prepare_part(self, part):
        """Compile the kernel of a part that was prepared."""

    def launch_part(self, part):
        """Sum the squares of a part's changes."""

    def prepare(self, stream):
        """Do what may fail before anything is written."""

    def launch(self):
        """Compute both norms, or enqueue it on a GPU."""
