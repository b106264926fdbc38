"""The sums of `norm_order.py` on the CPU, as Numba loops."""

import functools
import math

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, cpu_threads, numba_access, primitives, processor
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.norm_order import LANES, QUARTER, WIDTH
from gpuadam.kernels.numba_memory import RAW, fetch_at, load_at, on_stack, pointer_to, store_at, widened

# Elements from which two threads finish sooner than one.
PARALLEL_FROM = 1 << 18


def norm(views):
    """Return the norm of NumPy arrays as a float."""
    return norm_of(order.plan(views))


def chunk_sums(views):
    """Return the sums of the squares of all chunks of NumPy arrays, in their order: the norm's terms, before its levels."""
    plan = order.plan(views)
    return _passed(plan, [one for one in plan.passes if one.form.squares])[: order.chunks_of_all(views)]


def norm_of_chunks(sums):
    """Return the norm as a float. sums: float64, without gaps, of the chunks of all arrays in their order."""
    return norm_of(order.plan([], n_sums=sums.size), sums)


def norm_of(plan, sums=()):
    """Return the norm of a `norm_order.Plan` as a float. sums: of chunks, in the place of arrays."""
    return math.sqrt(_passed(plan, plan.passes, sums)[plan.passes[-1].out // 8])


def _passed(plan, passes, sums=()):
    """Make passes of a plan, and return its workspace."""
    workspace = np.empty(plan.workspace // 8)
    if len(sums):
        workspace[: len(sums)] = sums
    table = plan.placed(workspace.ctypes.data)
    for one in passes:
        _run(one, table, workspace.ctypes.data + one.out, one.chunks)
    return workspace


def rehearse(plan):
    """Compile what `norm_of` runs: between an update and the norm of what it has written that could fail."""
    for one in plan.passes:
        _run(one, plan.table, 0, 0)


def _run(one, table, out, chunks):
    """Sum the first chunks of a pass, in threads if there is much to sum."""
    parts = 1 if one.elements < PARALLEL_FROM else min(cpu_threads.n_threads(), one.chunks)
    arguments = one.first_row, one.n_rows, out, 0
    cpu_threads.run(functools.partial(build, one.form), table, chunks, parts, arguments)


def over_chunks(compiled, columns, add_chunk):
    """Return the loop over chunks, compiled but for the cache. compiled: a `compiled_cache.compiler`.

    columns: of the table. add_chunk(lanes, table, row, start, n, scalars): adds n numbers from number `start` on to the lanes.
    """
    add, store = primitives.for_numba(intrinsic).add, store_at(intrinsic, types.float64)
    memory, float64_pointer = on_stack(intrinsic, 8 * LANES), pointer_to(intrinsic, types.float64)

    @compiled
    def tree(s):
        half = LANES // 2
        while half:
            for j in range(half):
                s[j] = add(s[j], s[j + half])
            half //= 2
        return s[0]

    def serial(table, first, end, first_row, n_rows, out, scalars):
        """Sum the chunks first ... end - 1. scalars: the address of those of a rule."""
        lanes = carray(float64_pointer(memory()), LANES)
        row, after = first_row * columns, (first_row + n_rows) * columns
        for chunk in range(first, end):
            while row + columns < after and table[row + columns + order.FIRST_CHUNK] <= chunk:
                row += columns
            k = chunk - table[row + order.FIRST_CHUNK]
            start = k * order.CHUNK
            for j in range(LANES):
                lanes[j] = 0.0
            add_chunk(lanes, table, row, start, min(table[row + order.SIZE] - start, order.CHUNK), scalars)
            store(out + 8 * (table[row + order.FIRST_SUM] + k), tree(lanes))

    return compiled(serial, compiled_cache.KERNEL)


@functools.cache
def build(form, loop, how=None):
    """Return the compiled kernel of a form. loop: "serial" or "parallel". how: a `processor.Loop`; by default what suits sums."""
    if loop == "parallel":
        return cpu_threads.parallel_of(build(form, "serial", how))
    how = how or processor.loop_of_sums()
    compiled = compiled_cache.compiler(__name__, form, how)
    op = primitives.for_numba(intrinsic)
    fma, add = op.fma, op.add
    ITEMSIZE, SQUARES = form.itemsize, form.squares
    raw = RAW[form.format]
    pointer, raw_at = pointer_to(intrinsic, raw), load_at(intrinsic, raw, align=1)
    choose_vectors, AHEAD = numba_access.choose_vectors(intrinsic, how.wide), how.ahead * ITEMSIZE
    ROWS = 4  # that are added together: a lane is then loaded and stored once for four
    fetch = fetch_at(intrinsic, ROWS * WIDTH * ITEMSIZE)
    as_float64 = widened(intrinsic, form.format, on_gpu=False)

    @compiled
    def plus(s, x):
        return fma(x, x, s) if SQUARES else add(s, x)

    @compiled
    def add_quarter(s, address, n):
        """Add n neighbours to the lanes of a quarter."""
        choose_vectors()
        x, r = carray(pointer(address), n), 0
        while r + ROWS * WIDTH <= n:
            if AHEAD:
                fetch(address + (r * ITEMSIZE + AHEAD))
            for j in range(s.size):  # a constant would be unrolled, which is no faster
                two = plus(plus(s[j], as_float64(x[r + j])), as_float64(x[r + WIDTH + j]))
                s[j] = plus(plus(two, as_float64(x[r + 2 * WIDTH + j])), as_float64(x[r + 3 * WIDTH + j]))
            r += ROWS * WIDTH
        for i in range(r, n):
            s[i % WIDTH] = plus(s[i % WIDTH], as_float64(x[i]))

    @compiled
    def add_strided(s, table, row, start, n):
        """Add the elements start ... start + n - 1, in C order, of an array of any strides and alignment to the lanes."""
        ndim, dims = table[row + order.NDIM], table[row + order.DIMS]
        for i in range(n):
            address, rest = table[row + order.OPERANDS], start + i
            for d in range(ndim - 1, 0, -1):
                address += rest % table[dims + 2 * d] * table[dims + 2 * d + 1]
                rest //= table[dims + 2 * d]
            lane = i // QUARTER * WIDTH + i % WIDTH
            s[lane] = plus(s[lane], as_float64(raw_at(address + rest * table[dims + 1])))

    @compiled
    def add_chunk(s, table, row, start, n, scalars):
        if table[row + order.RUN]:
            address = table[row + order.OPERANDS] + start * ITEMSIZE
            for q in range(-(-n // QUARTER)):
                here = min(n - q * QUARTER, QUARTER)
                add_quarter(s[q * WIDTH : (q + 1) * WIDTH], address + q * QUARTER * ITEMSIZE, here)
        else:
            add_strided(s, table, row, start, n)

    return compiled_cache.stored(over_chunks(compiled, order.COLUMNS, add_chunk), __name__, form, how)
