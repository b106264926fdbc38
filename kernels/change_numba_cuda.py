"""The sums of `change_sums.py` as Numba CUDA kernels. Line by line they are IN_CUDA_C of `change_cuda_c.py`."""

from numba import cuda, from_dtype, types
from numba.cuda.extending import intrinsic

from gpuadam.kernels import adam, numba_access, primitives
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.change_sums import PLACES
from gpuadam.kernels.norm_numba_cuda import NO_SUMS, chunk_of_warp_in, int64_at, place_of_warp, tree_of, tuple_of
from gpuadam.kernels.norm_order import LANES_PER_THREAD, WARP, WIDTH
from gpuadam.kernels.numba_memory import store_at, tuple_at, widened
from gpuadam.kernels.operands import GROUP, operands_of_form
from gpuadam.kernels.scalars import REALS_AT, SKIP_AT


def build(form):
    """Return the kernel of an `adam.Form` as a Python function."""
    op = primitives.for_numba(intrinsic, contracts=True)
    fma, sub = op.fma, op.sub
    update = numba_access.update_of(adam, form, intrinsic, contracts=True)
    access = numba_access.functions(form, intrinsic, addrspace=1)
    load, stepped = access.load, access.stepped
    N, CHANGE, GROUPED, SKIPS = len(operands_of_form(form)), form.arrays.change != "", form.arrays.grouped, form.skips
    NUMBERS, SEVERAL = form.arrays.numbers, form.arrays.numbers > 1
    operands_at, store = tuple_at(intrinsic, N, addrspace=1), store_at(intrinsic, types.float64, addrspace=1)
    tree, chunk_of_warp = tree_of(1), chunk_of_warp_in(order.OPERANDS + N)
    as_float64 = widened(intrinsic, form.dtype.name, on_gpu=True)
    scalars_at = tuple_at(intrinsic, len(adam.scalar_names(form)), from_dtype(form.dtype), addrspace=1)

    @cuda.jit(device=True)
    def number(x, k):
        """Return number k of a value. It may be one alone."""
        return x[k] if SEVERAL else x

    @cuda.jit(device=True)
    def change_of(values, k, is_there, s):
        new, old = as_float64(number(update(values, s)[0], k)), as_float64(number(values[0], k))
        change = new if CHANGE else sub(new, old)
        return change if is_there else 0.0

    if GROUPED:
        units = access.units

        @cuda.jit(device=True)
        def values_at(at, i):
            return load(at, i, units(at, i // GROUP))

        @cuda.jit(device=True)
        def values_with_gaps(at, table, row, rest):
            return values_at(at, rest)  # there are none
    else:

        @cuda.jit(device=True)
        def values_at(at, i):
            return load(at, i // NUMBERS)

        @cuda.jit(device=True)
        def values_with_gaps(at, table, row, i):
            """Return the values of the element of arrays of any strides that number i, in C order, is of."""
            rest = i // NUMBERS
            d = int64_at(row + 8 * order.NDIM) - 1
            while d >= 0:
                dimension = table + 8 * (int64_at(row + 8 * order.DIMS) + d * (N + 1))
                following = types.int64(0)
                if d > 0:
                    following = types.int64(types.uint64(rest) // types.uint64(int64_at(dimension)))
                at = stepped(at, operands_at(dimension + 8), rest - following * int64_at(dimension))
                rest = following
                d -= 1
            return load(at, 0)

    @cuda.jit(device=True)
    def plus(sum_of_lane, at, start, i, n, s):
        """Add number i of a chunk of arrays without gaps to its lane, if the chunk has it."""
        k = start + min(i, n - 1)
        x = change_of(values_at(at, k), k % NUMBERS, i < n, s)
        return fma(x, x, sum_of_lane)

    arguments, item = "sums, at, start, i, n, s", "plus(sums[{k}], at, start, i + PLACES[{k}], n, s)"
    add_row = tuple_of(arguments, item, LANES_PER_THREAD, plus=plus, PLACES=PLACES)
    item = "fma(x, x, sums[{k}]) if lane == {k} else sums[{k}]"
    add_to_lane = tuple_of("sums, lane, x", item, LANES_PER_THREAD, fma=fma)

    def sums(table, first_row, n_rows, out, chunks, scalars):
        thread, chunk = place_of_warp()
        if chunk >= chunks:
            return  # the whole warp
        row, of_row, start, n = chunk_of_warp(table, first_row, n_rows, chunk)
        lanes, s, at = NO_SUMS, scalars_at(scalars + REALS_AT), operands_at(row + 8 * order.OPERANDS)
        if SKIPS and int64_at(scalars + SKIP_AT):
            pass
        elif GROUPED or int64_at(row + 8 * order.RUN):
            for r in range(order.QUARTER // WIDTH):
                lanes = add_row(lanes, at, start, thread + r * WIDTH, n, s)
        else:
            for part in range(order.CHUNK // WARP):
                i = thread + part * WARP
                lane = i // order.QUARTER * (WIDTH // WARP) + i % WIDTH // WARP
                k = start + min(i, n - 1)
                x = change_of(values_with_gaps(at, table, row, k), k % NUMBERS, i < n, s)
                lanes = add_to_lane(lanes, lane, x)
        total = tree(lanes)
        if thread == 0:
            store(out + 8 * (int64_at(row + 8 * order.FIRST_SUM) + of_row), total)

    return sums
