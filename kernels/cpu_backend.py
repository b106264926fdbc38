"""The backend `numba-cpu`: NumPy arrays, and all arrays that share CPU memory by DLPack."""

import time
from array import array
from typing import Any

import numba
import numpy as np

from gpuadam.kernels import (
    adam,
    change_cpu,
    cpu_kernels,
    cpu_step,
    cpu_strided,
    cpu_threads,
    huge_pages,
    norm_cpu,
    numpy_struct,
)
from gpuadam.kernels.backend import Backend, Batch, refuse_stream
from gpuadam.kernels.layout import dense
from gpuadam.kernels.operands import operands_of_form, widened
from gpuadam.kernels.processor import CACHE_LINE
from gpuadam.kernels.view import on_cpu

NO_SCALARS = np.zeros(adam.MOST_SCALARS)  # of a kernel over no elements


class CpuBatch(Batch):
    """Updates that one launch makes: those of a table (`numpy_struct.py`), or without a table one update of any strides.

    n: how many elements a table has. updates: the `layout.Update`s. For a table, any object that keeps its arrays
    alive, or None if the caller does.
    """

    arguments: tuple[Any, ...]  # of the kernel
    __slots__ = ("arguments", "arrays", "begun", "group", "is_random", "kernel", "n", "names", "scalars", "table", "updates")

    def __init__(self, table, n, arrays, is_random, group=0, names=None, updates=None):  # faster than by super().__init__
        self.table, self.n, self.arrays, self.is_random, self.group = table, n, arrays, is_random, group
        self.names, self.updates, self.begun = names or ("param",), updates, False

    def prepare(self, rule, form, scalars, place, key=0):
        """As the base's. scalars: they may also be in memory, as float64, where they stay: then their address."""
        self.begun = False
        if type(scalars) is not int:
            self.scalars = array("d", scalars)
            scalars, _ = self.scalars.buffer_info()
        if self.table is not None and self.n < backend.PARALLEL_FROM:
            latest = backend.latest
            if latest[0] is not form or latest[1] is not rule or latest[2] is not backend.build:
                latest = backend.latest = form, rule, backend.build, backend.compiled(rule, form)
            self.kernel, self.arguments = latest[3], (self.table, 0, self.n, key, scalars)
            return
        kind, table, n = "", self.table, self.n
        if table is None:
            (update,) = self.updates
            kind, n, key = "strided ", update.views[0].size, update.key ^ key
            written = [operand.stores for operand in operands_of_form(form)]
            # elements are counted in C order where they are rounded by their number
            table = cpu_strided.table_of(update.views, written, update.start, self.is_random)
        n_threads = 1 if n < backend.PARALLEL_FROM else cpu_threads.n_threads()
        self.kernel = cpu_threads.run
        self.arguments = (lambda loop: backend.build(rule, form, kind + loop)), table, n, n_threads, (key, scalars)
        over_nothing = *self.arguments[:2], 0, *self.arguments[3:]
        backend.rehearse((rule, form, kind, n_threads > 1, backend.build), self.kernel, over_nothing)

    def launch(self):
        self.begun = True
        self.kernel(*self.arguments)


class NumbaCpu(Backend):
    """Loops that Numba compiles for the CPU (`cpu_kernels.py`), in one thread or in several (`cpu_threads.py`)."""

    name, memory, boundary = "numba-cpu", "CPU", CACHE_LINE

    numpy_struct, cpu_step = numpy_struct, cpu_step
    n_threads = staticmethod(cpu_threads.n_threads)
    one_thread = staticmethod(cpu_threads.one_thread)
    view = staticmethod(on_cpu)

    def __init__(self):
        # of the instance, because Python looks them up at each step of a small array
        self.build = cpu_kernels.build
        # The form, the rule, `build` and the kernel of the last launch: to hash a form takes as long as to update 300 elements
        self.latest: tuple = None, None, None, None
        # Elements from which two threads finish sooner than one. `benchmarks/cpu_threads.py` shows where the lines cross.
        self.PARALLEL_FROM = 1 << 16
        self._rehearsed: set[tuple] = set()

    def compiled(self, rule, form):
        """Return the serial loop, compiled."""
        kernel, operands = self.build(rule, form, "serial"), operands_of_form(form)
        kernel(np.zeros((0, numpy_struct.PARAM + len(operands)), np.int64), 0, 0, 0, NO_SCALARS.ctypes.data)
        return kernel

    def rehearse(self, what, kernel, over_nothing):
        """Run a kernel once over no elements, which compiles it: between two launches that could fail."""
        if what not in self._rehearsed:
            kernel(*over_nothing)
            self._rehearsed.add(what)

    def status(self):
        if numba.config.DISABLE_JIT:
            return False, "NUMBA_DISABLE_JIT=1: no compiled kernels", "unset NUMBA_DISABLE_JIT before Python starts"
        return True, f"Numba {numba.__version__}"

    batch_of = CpuBatch  # of a table whose arrays the caller keeps alive: `update.py` makes them

    def batches(self, updates, arrays):
        rows, together, apart = [], [], []
        random = arrays.random
        for update in updates:
            views, names = update.views, [update.views[0].name]
            if dense(views, random) and all(view.array.flags.aligned for view in views):
                rows.append([views[0].size, update.key, update.start, *(view.pointer for view in views)])
                together.append(update)
            else:
                apart.append(CpuBatch(None, 0, arrays, random, names=names, updates=[update]))
        if not rows:
            return apart
        table, names = np.array(rows), [update.views[0].name for update in together]
        n = table[:, numpy_struct.SIZE].sum().item()
        return [CpuBatch(table, n, arrays, random, names=names, updates=together), *apart]

    def norm(self, views, out, device, stream):
        refuse_stream(stream)
        result = np.empty(()) if out is None else out.array
        result[...] = norm_cpu.norm(views)
        return result

    def step_norms(self, params, device, out):
        return change_cpu.CpuNormPasses(self, params, device, out)

    norm_of_plan = staticmethod(norm_cpu.norm_of)
    chunk_sums = staticmethod(norm_cpu.chunk_sums)
    norm_of_chunks = staticmethod(norm_cpu.norm_of_chunks)

    def zeros(self, n, dtype, device):
        dtype = np.dtype(dtype)
        return huge_pages.zeros(n * dtype.itemsize, CACHE_LINE).view(dtype)

    def zeros_in_one(self, sizes, dtype, device, operands=()):
        dtype = np.dtype(dtype)
        parts = huge_pages.zeros_in_one([n * dtype.itemsize for n in sizes], CACHE_LINE, operands)
        return [part.view(dtype) for part in parts]

    def shaped(self, memory, shape, strides):
        return np.ndarray(shape, memory.dtype, memory, strides=strides)

    def fill_zero(self, view, stream=None):
        view.array[...] = 0

    def copy(self, to, source):
        np.copyto(to.array, source.array if to.dtype == source.dtype else widened(source.array, source.format))

    def copy_rows(self, to, source, rows):
        there = rows >= 0
        to.array[there] = source.array[rows[there]]

    def from_host(self, array):
        if not huge_pages.is_large(array.nbytes):
            return np.array(array)
        like = np.empty_like(array, subok=False)  # of which nothing but the order of memory is used
        there = self.shaped(self.zeros(array.size, array.dtype, None), array.shape, like.strides)
        there[...] = array
        return there

    def to_host(self, array):
        return np.array(array)

    def native(self, view):
        return view.array

    def now(self):
        return time.perf_counter()

    def seconds_between(self, start, end):
        return end - start


backend = NumbaCpu()
