"""The norms of a step: that of the change which it makes, and that of the parameters after it.

The change of an element is its new parameter less the old one: both of the compute type and not yet rounded to the
parameter's format, and their difference one float64 operation. With `change` it is the change that the rule returns. Before the
update, a pass reads all operands, applies the rule, and stores nothing but the sum of the squares of each chunk. The order is
that of `norm_order.py`, as if the changes were arrays of float64, in which a parameter without an update has zeros. So the pass
needs no memory beyond 8 bytes for each chunk. The parameters' norm is taken after the update.

`change_cpu.py`, `change_cuda_c.py` and `change_numba_cuda.py` have the kernels; `change_cpu.py` and `change_gpu.py` launch them.
On a GPU a warp sums a chunk, and thread t has the lanes t, t + 32, ... t + 224: neighbours load neighbours, whatever the formats.
"""

import itertools
import weakref
from typing import Any

from gpuadam.kernels import norm_order as order
from gpuadam.kernels.backend import Batch

# The places in a chunk of the first elements of the lanes that thread 0 of a warp has; the others' are behind them.
PLACES = tuple(lane // order.WIDTH * order.QUARTER + lane % order.WIDTH for lane in range(0, order.LANES, order.WARP))


def table_of(updates, first_sums):
    """Return the table of `layout.Update`s, the number of its rows, and that of their chunks.

    first_sums: of each update the number of its first chunk among those of all parameters.
    """
    rows, chunks = order.Rows(), 0
    for update, first_sum in zip(updates, first_sums, strict=True):
        if size := update.views[0].size:
            rows.add(update.views, size, chunks, first_sum)
            chunks += order.chunks_of(rows.rows[-1][order.SIZE])
    return rows.table(), len(rows.rows), chunks


class ChangePart(Batch):
    """The sums of the change of some Updates: a Batch that writes nothing of the caller's. norms: the `NormPasses` it is of."""

    def __init__(self, norms, group, updates, arrays, first_sums):
        super().__init__(updates, arrays)
        self.norms = weakref.proxy(norms)  # which has this part: the arrays go when the step ends, and not with the garbage
        self.device, self.group = norms.device, group
        self.scalars: Any = None  # as the kernel reads them
        self.names, self.is_random = (), False  # an error of the step names what is updated; nothing here is rounded
        self.views = [view for update in updates for view in update.views]
        self.table, self.n_rows, self.chunks = table_of(updates, first_sums)
        self.elements = sum(update.views[0].size for update in updates)

    def take(self, addresses):
        """Take the arrays at other addresses, in C order: those of the operands of each update that has elements."""
        rows, operands = addresses.shape
        own = self.table[: rows * (order.OPERANDS + operands)].reshape(rows, order.OPERANDS + operands)
        own[:, order.RUN], own[:, order.OPERANDS :] = True, addresses

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

    params: name -> View of all parameters, of one device. device: its number; None for the CPU, or if no parameter has elements.
    out: Views of two arrays of shape () and dtype float64, for the norms of the change and of the parameters; none for new ones.
    `result`: both arrays. `begun` stays False, as of a Batch, because norms update nothing.
    """

    begun = False

    def __init__(self, backend, params, device, out):
        self.backend, self.params, self.device, self.out = backend, [*params.values()], device, out
        self.parts: list[ChangePart] = []
        self.result: tuple = ()
        chunks = [order.chunks_of(view.size) for view in self.params]
        *firsts, self.total = itertools.accumulate(chunks, initial=0)
        self._first_sums = dict(zip(params, firsts, strict=True))

    def part(self, group, names, updates, arrays):
        """Return the ChangePart of `layout.Update`s of parameters of some names, which all have the same `operands.Arrays`."""
        self.parts.append(ChangePart(self, group, updates, arrays, [self._first_sums[name] for name in names]))
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
