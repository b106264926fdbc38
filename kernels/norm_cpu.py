"""The sums of `norm_order.py` on the CPU, as Numba loops."""

import functools
import math
import sys

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, cpu_threads, llvm, primitives
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.norm_order import LANES, QUARTER, WIDTH
from gpuadam.kernels.numba_memory import RAW, llvm_type, load_at, store_at, widened

# Elements from which two threads finish sooner than one.
PARALLEL_FROM = 1 << 18


def norm(views):
    """Return the norm of NumPy arrays as a float."""
    return norm_of_chunks(chunk_sums(views))


def chunk_sums(views):
    """Return the sums of the squares of all chunks of NumPy arrays, in their order: the norm's terms, before its levels."""
    plan = order.plan(views)
    sums = np.empty(order.chunks_of_all(views))
    for one in plan.passes:
        if one.form.squares:
            run(one, plan.table, sums)
    return sums


def norm_of_chunks(sums):
    """Return the norm as a float. sums: float64, without gaps, of the chunks of all arrays in their order."""
    form = order.Form("float64", squares=False)
    while sums.size != 1:
        n = sums.size
        above = np.empty(max(1, order.chunks_of(n)))
        table = np.array([sums.ctypes.data, n, 1, 0, 0, 0, 0, 0])
        run(order.Pass(form, 0, 1, above.size, n, 0), table, above)
        sums = above
    return math.sqrt(sums[0])


def rehearse(views):
    """Compile what `norm` runs: between an update and the norm of what it has written that could fail."""
    plan = order.plan(views)
    for one in plan.passes:
        build(one.form, "serial")(plan.table, 0, 0, 0, 0, 0)
        if _parts(one) > 1 and cpu_threads.numba_threads_are_safe():
            build(one.form, "parallel")(plan.table, 0, 1, 0, 0, 0)


def run(one, table, sums):
    """Make a pass, in threads if there is much to sum. sums: an array for those of all chunks."""
    arguments = one.first_row, one.n_rows, sums.ctypes.data
    cpu_threads.run(functools.partial(build, one.form), table, one.chunks, _parts(one), arguments)


def _parts(one):
    return 1 if one.elements < PARALLEL_FROM else min(cpu_threads.n_threads(), one.chunks)


@functools.cache
def build(form, loop):
    """Return the compiled kernel of a form. loop: "serial" or "parallel"."""
    if loop == "parallel":
        return cpu_threads.parallel_of(build(form, "serial"))
    this = sys.modules[__name__]

    def compiled(function, options=compiled_cache.INNER):
        return njit(**options)(compiled_cache.named(function, this, form))

    op = primitives.for_numba(intrinsic)
    fma, add = op.fma, op.add
    ITEMSIZE, SQUARES = form.itemsize, form.squares
    raw = RAW[form.format]
    kind, raw_at = llvm_type(raw), load_at(intrinsic, raw, align=1)
    pointer = llvm.function(intrinsic, "pointer", lambda b, x: llvm.pointer(b, x, kind, 0), types.CPointer(raw)(types.int64))
    as_float64, store = widened(intrinsic, form.format, on_gpu=False), store_at(intrinsic, types.float64)

    @compiled
    def plus(s, x):
        return fma(x, x, s) if SQUARES else add(s, x)

    @compiled
    def add_quarter(s, address, n):
        """Add n neighbours to the lanes of a quarter, four rows at a time: a lane is then loaded and stored once for four."""
        x, r = carray(pointer(address), n), 0
        while r + 4 * WIDTH <= n:
            for j in range(s.size):  # a constant would be unrolled, which is no faster
                two = plus(plus(s[j], as_float64(x[r + j])), as_float64(x[r + WIDTH + j]))
                s[j] = plus(plus(two, as_float64(x[r + 2 * WIDTH + j])), as_float64(x[r + 3 * WIDTH + j]))
            r += 4 * WIDTH
        for i in range(r, n):
            s[i % WIDTH] = plus(s[i % WIDTH], as_float64(x[i]))

    @compiled
    def add_strided(s, table, row, start, n):
        """Add the elements start ... start + n - 1, in C order, of an array of any strides and alignment to the lanes."""
        ndim, dims = table[row + order.NDIM], table[row + order.DIMS]
        for i in range(n):
            address, rest = table[row + order.POINTER], start + i
            for d in range(ndim - 1, 0, -1):
                address += rest % table[dims + 2 * d] * table[dims + 2 * d + 1]
                rest //= table[dims + 2 * d]
            lane = i // QUARTER * WIDTH + i % WIDTH
            s[lane] = plus(s[lane], as_float64(raw_at(address + rest * table[dims + 1])))

    @compiled
    def tree(s):
        half = LANES // 2
        while half:
            for j in range(half):
                s[j] = add(s[j], s[j + half])
            half //= 2
        return s[0]

    def serial(table, first, end, first_row, n_rows, out):
        """Sum the chunks first ... end - 1."""
        s = np.empty(LANES)
        row, after = first_row * order.COLUMNS, (first_row + n_rows) * order.COLUMNS
        for chunk in range(first, end):
            while row + order.COLUMNS < after and table[row + order.COLUMNS + order.FIRST_CHUNK] <= chunk:
                row += order.COLUMNS
            k = chunk - table[row + order.FIRST_CHUNK]
            start = k * order.CHUNK
            n = min(table[row + order.SIZE] - start, order.CHUNK)
            for j in range(LANES):
                s[j] = 0.0
            if table[row + order.RUN]:
                address = table[row + order.POINTER] + start * ITEMSIZE
                for q in range(-(-n // QUARTER)):
                    here = min(n - q * QUARTER, QUARTER)
                    add_quarter(s[q * WIDTH : (q + 1) * WIDTH], address + q * QUARTER * ITEMSIZE, here)
            else:
                add_strided(s, table, row, start, n)
            store(out + 8 * (table[row + order.FIRST_SUM] + k), tree(s))

    return compiled_cache.stored(compiled(serial, compiled_cache.KERNEL), __name__, form)
