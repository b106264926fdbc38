"""THE ORDER: the square root of the sum of the squares of all elements of many arrays, in an order that no machine can change.

A sum in floating point depends on its order. Here the order follows from the place of an element alone, in its array in C order
and among the arrays in the order of the list. So every backend, alignment, layout and number of threads gives the same bits.

    chunk     CHUNK = 4096 neighbours of one array, the last one of an array shorter; no chunk has elements of two arrays
    lane      a chunk is 4 quarters of QUARTER = 1024, and a quarter has WIDTH = 64 lanes: element i of a chunk belongs to lane
              i // QUARTER * WIDTH + i % WIDTH of LANES = 256. A lane starts at +0 and takes its 16 elements in order:
                  s = fma(x, x, s)
    tree      the lanes are added in halves, until one is left:
                  s[j] = s[j] + s[j + half]   for j < half = 128, 64, 32, 16, 8, 4, 2, 1
    level     the sums of all chunks, in the order of the arrays, are an array of their own, which is summed likewise, by chunks,
              lanes and the tree, with s = s + x in place of the fma; so are its sums, until one is left
    norm      sqrt of that

All of it is float64, and elements become float64 exactly. What a lane has no element for counts as +0, which changes nothing: no
sum is ever -0. Squares of float32, bfloat16 and float16 are exact and far from overflow. Squares of float64 overflow from
1.3e154, and the norm is then infinite; below 1.5e-162 they are 0. A NaN makes the norm NaN.

On a GPU a chunk is summed by a warp. A thread holds 8 lanes, those of the elements that it loads 16 bytes at a time, and the
middle of the tree goes through shuffles. On a CPU the lanes lie in memory, and the loop over a quarter's is LLVM's to vectorise;
four rows of WIDTH are neighbours, so that it goes through memory in order.
"""

import itertools
from typing import NamedTuple

import numpy as np

from gpuadam.kernels import operands
from gpuadam.kernels.layout import VECTOR_BYTES, WARP, collapse

CHUNK = 4096
QUARTER = 1024
WIDTH = 64
LANES = CHUNK // QUARTER * WIDTH

BLOCK = 128  # threads of a GPU
LANES_PER_THREAD = LANES // WARP

# name of a format: the rows of `conversions.py` that make a float64 of an element
FORMATS = {
    "float64": (),
    "float32": ("widened",),
    "bfloat16": ("from_bfloat16", "widened"),
    "float16": ("from_float16", "widened"),
}


class Form(NamedTuple):
    """What is known when a kernel is compiled."""

    format: str = "float32"
    squares: bool = True  # whether to sum the squares of the elements, or the elements

    @property
    def itemsize(self):
        return operands.FORMATS[self.format]

    @property
    def lanes(self):
        """How many elements 16 bytes hold."""
        return VECTOR_BYTES // self.itemsize

    @property
    def part(self):
        """How many elements lie between two vectors of a thread in a row: a warp takes some quarters at once."""
        return WARP * self.lanes // WIDTH * QUARTER


# The table of the arrays, of int64: a row for each array, then its dimensions, of which each has a length and a stride in bytes.
# A kernel takes rows first_row ... first_row + n_rows - 1, whose chunks it counts from 0. RUN: whether vectors can be loaded.
# NDIM, DIMS: how many dimensions there are and where they start; sums of chunks need none. From OPERANDS on are the addresses,
# one in a norm; where arrays are read together (`change_sums.py`) there are more, and a dimension has a stride for each.
SIZE, RUN, NDIM, DIMS, FIRST_CHUNK, FIRST_SUM, OPERANDS = range(7)
COLUMNS = OPERANDS + 1  # of a norm


class Pass(NamedTuple):
    """One launch: some rows of the table, and where the sums of their chunks go, in bytes from the start of the workspace."""

    form: Form
    first_row: int
    n_rows: int
    chunks: int
    elements: int
    out: int


class Plan(NamedTuple):
    """The passes of a norm. The last pass writes the norm, and not a sum.

    Each level of sums is one row of the table, with an offset for an address until the workspace's address is known.
    """

    table: np.ndarray
    passes: list[Pass]
    workspace: int  # bytes

    def placed(self, workspace):
        """Return the table for a workspace at an address."""
        table = self.table.copy()
        for one in self.passes:
            if not one.form.squares:
                table[one.first_row * COLUMNS + OPERANDS] += workspace
        return table


class Rows:
    """The rows of a table and their dimensions, while they are put together."""

    def __init__(self):
        self.rows, self.dims = [], []

    def add(self, views, size, first_chunk, first_sum, alignment=None):
        """Add the row of arrays of one shape, of `size` elements, that are read together. alignment: as in `plan`.

        SIZE counts numbers, and dimensions count elements, which may have several.
        """
        pointers, itemsizes, run, gaps = [], [], True, False
        for view in views:
            pointers.append(view.pointer)
            itemsizes.append(view.dtype.itemsize)
            run = run and view.pointer % (alignment or view.dtype.base.itemsize) == 0
            gaps = gaps or not view.contiguous
        in_a_run = dimensions = [(size, *itemsizes)]
        if gaps:
            shape, strides = collapse(views[0].shape, [view.strides for view in views], in_c_order=True)
            dimensions = list(zip(shape, *strides, strict=True)) or in_a_run
        numbers = size * (itemsizes[0] // views[0].dtype.base.itemsize)
        run, here = run and dimensions == in_a_run, len(self.dims)
        self.rows.append([numbers, run, len(dimensions), here, first_chunk, first_sum, *pointers])
        for dimension in dimensions:
            self.dims += dimension

    def table(self):
        """Return rows and dimensions as one array."""
        width = len(self.rows[0]) if self.rows else 1  # of arrays without elements
        n = width * len(self.rows)
        table = np.fromiter(itertools.chain(*self.rows, self.dims), np.int64, n + len(self.dims))
        table[DIMS:n:width] += n
        return table


def plan(views, alignment=None, n_sums=0):
    """Return the Plan of a norm. alignment: of the address of a vector; by default that of the elements.

    n_sums: of chunks whose sums something else writes, in the place of views: to the start of the workspace.
    """
    rows = Rows()
    passes = []
    by_format: dict[str, list[tuple]] = {}  # one launch for the arrays of a format
    total = n_sums
    for view in views:
        if size := view.size:
            by_format.setdefault(view.format, []).append((view, size, total))
            total += chunks_of(size)
    for format, members in by_format.items():
        form, chunks, elements = Form(format), 0, 0
        for view, size, first_sum in members:
            rows.add([view], size, chunks, first_sum, alignment)
            chunks += chunks_of(size)
            elements += size
        passes.append(Pass(form, len(rows.rows) - len(members), len(members), chunks, elements, 0))
    sums, n = 0, total
    workspace = _bytes(n)
    while n != 1 or not passes:  # no chunks at all are an array of no elements, whose sum is +0
        rows.rows.append([n, 1, 0, 0, 0, 0, sums])
        elements, n = n, max(1, chunks_of(n))
        passes.append(Pass(Form("float64", squares=False), len(rows.rows) - 1, 1, n, elements, workspace))
        sums, workspace = workspace, workspace + _bytes(n)
    return Plan(rows.table(), passes, workspace)


def chunks_of(n):
    return -(-n // CHUNK)


def chunks_of_all(views):
    return sum(chunks_of(view.size) for view in views)


def _bytes(n):
    return -(-8 * n // VECTOR_BYTES) * VECTOR_BYTES
