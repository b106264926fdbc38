"""The sums of `change_sums.py` as Numba CUDA kernels. Line by line they are IN_CUDA_C of `change_cuda_c.py`.

`numba_access.py` has the change of an element and the way to it.
"""

from numba import cuda, from_dtype, types
from numba.cuda.extending import intrinsic

from gpuadam.kernels import adam, numba_access, primitives
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.change_sums import PLACES
from gpuadam.kernels.norm_numba_cuda import NO_SUMS, chunk_of_warp_in, int64_at, place_of_warp, tree_of, tuple_of
from gpuadam.kernels.norm_order import LANES_PER_THREAD, WARP, WIDTH
from gpuadam.kernels.numba_memory import store_at, tuple_at
from gpuadam.kernels.operands import GROUP, operands_of_form
from gpuadam.kernels.scalars import REALS_AT, SKIP_AT


def build(form):
    """Return the kernel of an `adam.Form` as a Python function."""
    fma, access = primitives.for_numba(intrinsic, contracts=True).fma, numba_access.functions(form, intrinsic, addrspace=1)
    load, compiled = access.load, cuda.jit(device=True)
    change_of = numba_access.change_of(form, compiled, intrinsic, on_gpu=True)
    N, GROUPED, NUMBERS, SKIPS = len(operands_of_form(form)), form.arrays.grouped, form.arrays.numbers, form.skips
    operands_at, store = tuple_at(intrinsic, N, addrspace=1), store_at(intrinsic, types.float64, addrspace=1)
    tree, chunk_of_warp = tree_of(1), chunk_of_warp_in(order.OPERANDS + N)
    element_of = numba_access.element_of(form, compiled, intrinsic, addrspace=1)
    scalars_at = tuple_at(intrinsic, len(adam.scalar_names(form)), from_dtype(form.dtype), addrspace=1)

    if GROUPED:
        units = access.units

        @cuda.jit(device=True)
        def values_at(at, i):
            return load(at, i, units(at, i // GROUP))
    else:

        @cuda.jit(device=True)
        def values_at(at, i):
            return load(at, i // NUMBERS)

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
                x = change_of(values_at(element_of(at, table, row, k // NUMBERS), 0), k % NUMBERS, i < n, s)
                lanes = add_to_lane(lanes, lane, x)
        total = tree(lanes)
        if thread == 0:
            store(out + 8 * (int64_at(row + 8 * order.FIRST_SUM) + of_row), total)

    return sums
