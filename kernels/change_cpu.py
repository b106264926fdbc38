"""The norms of a step on the CPU: the sums of `change_sums.py` as Numba loops."""

import functools
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from gpuadam.kernels import adam, compiled_cache, cpu_threads, norm_cpu, numba_access, primitives, processor
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.backend import refuse_stream
from gpuadam.kernels.change_sums import NormPasses
from gpuadam.kernels.norm_order import QUARTER, WIDTH
from gpuadam.kernels.numba_access import FETCHED
from gpuadam.kernels.numba_memory import load_at, tuple_at
from gpuadam.kernels.operands import GROUP, operands_of_form

# Elements from which two threads finish sooner than one, as in an update.
PARALLEL_FROM = 1 << 16


class CpuNormPasses(NormPasses):
    """The norms of a step over NumPy arrays."""

    def place(self, stream):
        refuse_stream(stream)

    def prepare_part(self, part):
        _, form, scalars, *_ = part.prepared
        part.scalars = np.array(scalars, np.float64)
        part.threads = 1 if part.elements < PARALLEL_FROM else min(cpu_threads.n_threads(), part.chunks)
        self.backend.rehearse((build, form, part.threads > 1), _run, (form, part, 0, 0))

    def launch_part(self, part):
        _run(part.prepared[1], part, part.chunks, self.sums.ctypes.data)

    def prepare(self, stream):
        refuse_stream(stream)
        self.sums = np.zeros(self.total)
        self.plan, self.plan_of_sums = order.plan(self.params), order.plan([], n_sums=self.total)
        for plan in self.plan, self.plan_of_sums:
            norm_cpu.rehearse(plan)
        if self.out:
            self.result = tuple(view.array for view in self.out)
        else:
            self.renew()

    def again_with(self, plan):
        """Be those of further steps of as many elements, all of which change. plan: of the norm of their parameters."""
        self.plan, self.params, self.out = plan, [], None
        for part in self.parts:  # which lets the arrays go
            part.updates = part.views = []

    def renew(self):
        """Let the next norms go into new arrays."""
        self.result = np.empty(()), np.empty(())

    def launch(self):
        change, param = self.result
        change[...] = norm_cpu.norm_of(self.plan_of_sums, self.sums)
        param[...] = norm_cpu.norm_of(self.plan)


def _run(form, part, chunks, sums):
    """Sum the first chunks of a part, in its threads. sums: the address of those of all parameters."""
    build_loop = functools.partial(build, form)
    cpu_threads.run(build_loop, part.table, chunks, part.threads, (0, part.n_rows, sums, part.scalars.ctypes.data))


@functools.cache
def build(form, loop, how=None):
    """Return the compiled kernel of an `adam.Form`. loop, how: as in `norm_cpu.build`."""
    if loop == "parallel":
        return cpu_threads.parallel_of(build(form, "serial", how))
    how = how or processor.loop_of_sums()
    compiled = compiled_cache.compiler(__name__, form, how)
    op = primitives.for_numba(intrinsic)
    fma, sub = op.fma, op.sub
    update, access = numba_access.update_of(adam, form, intrinsic), numba_access.functions(form, intrinsic)
    load, moved, stepped, fetch = access.load, access.moved, access.stepped, access.fetch
    N, CHANGE, GROUPED = len(operands_of_form(form)), form.arrays.change != "", form.arrays.grouped
    NUMBERS, SEVERAL = form.arrays.numbers, form.arrays.numbers > 1
    RUN, operands_at = GROUP if GROUPED else WIDTH, tuple_at(intrinsic, N)
    scalars_at, int64_at = numba_access.scalars_at(form, intrinsic), load_at(intrinsic, types.int64)
    choose_vectors, AHEAD, MANY = numba_access.choose_vectors(intrinsic, how.wide), how.ahead, processor.cached(form)
    units: Any = access.units if GROUPED else None

    @compiled
    def number(x, k):
        """Return number k of a value. It may be one alone."""
        return x[k] if SEVERAL else x

    @compiled
    def change_of(values, k, s):
        new = np.float64(number(update(values, s)[0], k))
        return new if CHANGE else sub(new, np.float64(number(values[0], k)))

    def near(lanes, at, i, n, s):
        """Add the numbers i ... i + n - 1 of arrays without gaps to neighbouring lanes."""
        choose_vectors()
        for j in range(n):
            x = change_of(load(at, (i + j) // NUMBERS), (i + j) % NUMBERS, s)
            lanes[j] = fma(x, x, lanes[j])

    def near_of_group(lanes, at, i, n, s):
        choose_vectors()
        unit, here = units(at, i // GROUP), moved(at, i)
        for j in range(n):
            x = change_of(load(here, j, unit), 0, s)
            lanes[j] = fma(x, x, lanes[j])

    def with_gaps(lanes, at, dims, ndim, start, n, s):
        """Add n numbers from number `start` on, in C order, of arrays of any strides and alignment. dims: an address."""
        for i in range(n):
            here, rest = at, (start + i) // NUMBERS
            for d in range(ndim - 1, -1, -1):
                dimension = dims + 8 * d * (N + 1)
                length = int64_at(dimension) if d else rest + 1
                here = stepped(here, operands_at(dimension + 8), rest % length)
                rest //= length
            x, lane = change_of(load(here, 0), (start + i) % NUMBERS, s), i // QUARTER * WIDTH + i % WIDTH
            lanes[lane] = fma(x, x, lanes[lane])

    add_near = compiled(near_of_group if GROUPED else near)
    add_with_gaps: Any = None if GROUPED else compiled(with_gaps)  # 8-bit state has none

    @compiled
    def add_chunk(lanes, table, row, start, n, scalars):
        at, s = operands_at(table.ctypes.data + 8 * (row + order.OPERANDS)), scalars_at(scalars)
        if GROUPED or table[row + order.RUN]:
            for i in range(0, n, RUN):
                if AHEAD and (start + i) % (FETCHED * NUMBERS) < RUN and table[row + order.SIZE] > NUMBERS * MANY:
                    fetch(at, (start + i) // NUMBERS + AHEAD)
                lane = i // QUARTER * WIDTH + i % WIDTH
                add_near(lanes[lane : lane + RUN], at, start + i, min(RUN, n - i), s)
        if not GROUPED and not table[row + order.RUN]:
            dims = table.ctypes.data + 8 * table[row + order.DIMS]
            add_with_gaps(lanes, at, dims, table[row + order.NDIM], start, n, s)

    return compiled_cache.stored(norm_cpu.over_chunks(compiled, order.OPERANDS + N, add_chunk), __name__, form, how)
