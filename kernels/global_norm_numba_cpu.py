"""The sums of `global_norm.py` on the CPU, as Numba loops."""

import functools
import math
import sys

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, global_norm, numba_cpu, primitives
from gpuadam.kernels.global_norm import (
    CHUNK,
    COLUMNS,
    DIMS,
    FIRST_CHUNK,
    FIRST_SUM,
    LANES,
    NDIM,
    POINTER,
    QUARTER,
    RUN,
    SIZE,
    WIDTH,
)

# Elements from which two threads finish sooner than one.
PARALLEL_FROM = 1 << 18

RAW = {"float64": types.float64, "float32": types.float32, "bfloat16": types.uint16, "float16": types.uint16}


def norm(views):
    """Return the norm of NumPy arrays as a float."""
    plan = global_norm.plan(views)
    workspace, result = np.empty(plan.workspace // 8), np.empty(1)
    table = plan.placed(workspace.ctypes.data)
    for one in plan.passes:
        last = one is plan.passes[-1]
        run(one, table, result.ctypes.data if last else workspace.ctypes.data + one.out, last)
    return result.item()


def chunk_sums(views):
    """Return the sums of the squares of all chunks of NumPy arrays, in their order: the norm's terms, before its levels."""
    plan = global_norm.plan(views)
    sums = np.empty(global_norm.chunks_of_all(views))
    for one in plan.passes:
        if one.form.squares:
            run(one, plan.table, sums.ctypes.data, last=False)
    return sums


def norm_of_chunks(sums):
    """Return the norm as a float. sums: float64, without gaps, of the chunks of all arrays in their order."""
    form = global_norm.Form("float64", squares=False)
    while sums.size != 1:
        n = sums.size
        above = np.empty(max(1, global_norm.chunks_of(n)))
        table = np.array([sums.ctypes.data, n, 1, 1, COLUMNS, 0, 0, 0, n, sums.itemsize])
        run(global_norm.Pass(form, 0, 1, above.size, n, 0), table, above.ctypes.data, last=False)
        sums = above
    return math.sqrt(sums[0])


def run(one, table, out, last):
    """Make a pass, in threads if there is much to sum."""
    form, first_row, n_rows, chunks, elements, _ = one
    rest = (first_row, n_rows, out, last)
    n_threads = 1 if elements < PARALLEL_FROM else min(numba_cpu._n_threads(), chunks)
    if n_threads == 1:
        build(form, "serial")(table, 0, chunks, *rest)
    else:
        numba_cpu.in_threads(functools.partial(build, form), table, chunks, n_threads, rest)


@functools.cache
def build(form, loop):
    """Return the compiled kernel of a form. loop: "serial" or "parallel"."""
    if loop == "parallel":
        return numba_cpu.parallel_of(build(form, "serial"), "first_row, n_rows, out, last")
    this = sys.modules[__name__]

    def compiled(function):
        return njit(error_model="numpy", nogil=True)(compiled_cache.named(function, this, form))

    op = primitives.for_numba(intrinsic)
    fma, add, sqrt = op.fma, op.add, op.sqrt
    ITEMSIZE, SQUARES = form.itemsize, form.squares
    pointer, widened, element, store = _accesses(form.format)

    @compiled
    def plus(s, x):
        return fma(x, x, s) if SQUARES else add(s, x)

    @compiled
    def add_quarter(s, address, n):
        """Add n neighbours to the lanes of a quarter, four rows at a time: a lane is then loaded and stored once for four."""
        x, r = carray(pointer(address), n), 0
        while r + 4 * WIDTH <= n:
            for j in range(s.size):  # a constant would be unrolled, which is no faster
                two = plus(plus(s[j], widened(x[r + j])), widened(x[r + WIDTH + j]))
                s[j] = plus(plus(two, widened(x[r + 2 * WIDTH + j])), widened(x[r + 3 * WIDTH + j]))
            r += 4 * WIDTH
        for i in range(r, n):
            s[i % WIDTH] = plus(s[i % WIDTH], widened(x[i]))

    @compiled
    def add_strided(s, table, row, start, n):
        """Add the elements start ... start + n - 1, in C order, of an array of any strides and alignment to the lanes."""
        ndim, dims = table[row + NDIM], table[row + DIMS]
        for i in range(n):
            address, rest = table[row + POINTER], start + i
            for d in range(ndim - 1, 0, -1):
                address += rest % table[dims + 2 * d] * table[dims + 2 * d + 1]
                rest //= table[dims + 2 * d]
            lane = i // QUARTER * WIDTH + i % WIDTH
            s[lane] = plus(s[lane], element(address + rest * table[dims + 1]))

    @compiled
    def tree(s):
        half = LANES // 2
        while half:
            for j in range(half):
                s[j] = add(s[j], s[j + half])
            half //= 2
        return s[0]

    def serial(table, first, end, first_row, n_rows, out, last):
        """Sum the chunks first ... end - 1."""
        s = np.empty(LANES)
        row, after = first_row * COLUMNS, (first_row + n_rows) * COLUMNS
        for chunk in range(first, end):
            while row + COLUMNS < after and table[row + COLUMNS + FIRST_CHUNK] <= chunk:
                row += COLUMNS
            k = chunk - table[row + FIRST_CHUNK]
            start = k * CHUNK
            n = min(table[row + SIZE] - start, CHUNK)
            for j in range(LANES):
                s[j] = 0.0
            if table[row + RUN]:
                address = table[row + POINTER] + start * ITEMSIZE
                for q in range(-(-n // QUARTER)):
                    here = min(n - q * QUARTER, QUARTER)
                    add_quarter(s[q * WIDTH : (q + 1) * WIDTH], address + q * QUARTER * ITEMSIZE, here)
            else:
                add_strided(s, table, row, start, n)
            total = tree(s)
            store(out + 8 * (table[row + FIRST_SUM] + k), sqrt(total) if last else total)

    return compiled_cache.stored(compiled(serial), __name__, form)


def _accesses(format):
    """Return functions: an address as a pointer to elements, a raw element as float64, the element at any address, a store."""
    raw = RAW[format]

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(raw)(types.int64), codegen

    @intrinsic
    def widened(typingctx, x):
        def codegen(context, builder, signature, args):
            return global_norm.to_float64(builder, format, args[0], on_gpu=False)

        return types.float64(raw), codegen

    @intrinsic
    def element(typingctx, address):
        def codegen(context, builder, signature, args):
            at = builder.inttoptr(args[0], context.get_value_type(types.CPointer(raw)))
            return global_norm.to_float64(builder, format, builder.load(at, align=1), on_gpu=False)

        return types.float64(types.int64), codegen

    @intrinsic
    def store(typingctx, address, x):
        def codegen(context, builder, signature, args):
            builder.store(args[1], builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.float64))))
            return context.get_dummy_value()

        return types.void(types.int64, types.float64), codegen

    return pointer, widened, element, store
