"""The norms of a step on the CPU: the sums of `change_sums.py` as Numba loops."""

import functools
from typing import Any

import numpy as np
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, cpu_threads, norm_cpu, numba_access, primitives, processor
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.backend import refuse_stream
from gpuadam.kernels.change_sums import NormPasses
from gpuadam.kernels.norm_order import QUARTER, WIDTH
from gpuadam.kernels.numba_memory import tuple_at
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
    fma, access = primitives.for_numba(intrinsic).fma, numba_access.functions(form, intrinsic)
    load, moved, FETCHED = access.load, access.moved, processor.FETCHED
    fetch = numba_access.fetch_of(form, intrinsic, FETCHED)
    N, GROUPED, NUMBERS = len(operands_of_form(form)), form.arrays.grouped, form.arrays.numbers
    RUN, operands_at = GROUP if GROUPED else WIDTH, tuple_at(intrinsic, N)
    scalars_at = numba_access.scalars_at(form, intrinsic)
    change_of = numba_access.change_of(form, compiled, intrinsic)
    element_of = numba_access.element_of(form, compiled, intrinsic)
    choose_vectors, AHEAD, MANY = numba_access.choose_vectors(intrinsic, how.wide), how.ahead, processor.cached(form)
    units: Any = access.units if GROUPED else None

    def near(lanes, at, i, n, s):
        """Add the numbers i ... i + n - 1 of arrays without gaps to neighbouring lanes."""
        choose_vectors()
        for j in range(n):
            x = change_of(load(at, (i + j) // NUMBERS), (i + j) % NUMBERS, True, s)
            lanes[j] = fma(x, x, lanes[j])

    def near_of_group(lanes, at, i, n, s):
        choose_vectors()
        unit, here = units(at, i // GROUP), moved(at, i)
        for j in range(n):
            x = change_of(load(here, j, unit), 0, True, s)
            lanes[j] = fma(x, x, lanes[j])

    def with_gaps(lanes, at, table, row, start, n, s):
        """Add n numbers from number `start` on, in C order, of arrays of any strides and alignment. table, row: addresses."""
        for i in range(n):
            here, lane = element_of(at, table, row, (start + i) // NUMBERS), i // QUARTER * WIDTH + i % WIDTH
            x = change_of(load(here, 0), (start + i) % NUMBERS, True, s)
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
            add_with_gaps(lanes, at, table.ctypes.data, table.ctypes.data + 8 * row, start, n, s)

    return compiled_cache.stored(norm_cpu.over_chunks(compiled, order.OPERANDS + N, add_chunk), __name__, form, how)
