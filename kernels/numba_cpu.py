"""A rule as a Numba loop over memory of the CPU: the backend `numba-cpu`.

A launch takes a table of arrays and goes through it as through one long array, so that one array and a thousand cost one call.
LLVM vectorises the loop, and the vector body, the scalar tail and any split between threads give the same bits, because every
operation is rounded by itself.
"""

import contextlib
import functools
import itertools
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numba
import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from gpuadam.kernels import adam, compiled_cache, numba_access, primitives
from gpuadam.kernels import numpy_struct as numpy_struct
from gpuadam.kernels.layout import Update, dense, offset_like, strides_like
from gpuadam.kernels.numpy_struct import KEY, PARAM, SIZE, START
from gpuadam.kernels.operands import GROUP, operands_of_form, widened
from gpuadam.kernels.view import on_cpu

name = "numba-cpu"

# Elements from which two threads finish sooner than one. `benchmarks/cpu_threads.py` shows where the lines cross.
PARALLEL_FROM = 1 << 16

CACHE_LINE = 64  # bytes


view = on_cpu


def zeros_like(view, dtype=None):
    """Return zeros for the state of an array: the same shape and order of memory, cache lines at the same elements.

    dtype: another one than the array's.
    """
    dtype = view.dtype if dtype is None else dtype
    memory = np.zeros(view.size * dtype.itemsize + 2 * CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE + offset_like(view, dtype, CACHE_LINE) * dtype.itemsize
    return np.ndarray(view.shape, dtype, memory, start, strides_like(view, dtype))


def fill_zero(view, stream=None):
    """Store zeros in an array. stream: only GPUs have them."""
    view.array[...] = 0


def zeros(n, dtype, device):
    """Return a 1-D array of n zeros."""
    return np.zeros(n, dtype)


def from_host(array):
    """Return a copy of a NumPy array in this backend's memory."""
    return np.array(array)


def to_host(array):
    """Return a copy of an array of this backend as a NumPy array."""
    return np.array(array)


def now():
    """Return a moment for `seconds_between`."""
    return time.perf_counter()


def seconds_between(start, end):
    """Return the time between two moments."""
    return end - start


copies_any_layout = True


def copy(to, source):
    """Copy one array into another of the same shape, of its dtype or of a wider one."""
    np.copyto(to.array, source.array if to.dtype == source.dtype else widened(source.array, source.format))


def native(view):
    """Return an array as NumPy's."""
    return view.array


def launch(form, views, scalars, rule=adam, stream=None, key=0):
    """Update NumPy arrays in place.

    views: of the arrays, in the order of `operands.operands_of`, of one shape, checked; those that are None are left out.
    scalars: `adam.Scalars` of form.dtype. stream: only GPUs have them. key: of the step, for random rounding.
    """
    for batch in batches([Update([view for view in views if view is not None])], form.arrays):
        batch.prepare(rule, form, scalars, batch.place(stream), key)
        batch.launch()


def batches(updates, arrays):
    """Return the launches of several `layout.Update`s, of any shapes: one for all dense arrays, one for each other."""
    rows, apart = [], []
    for update in updates:
        views = update.views
        if dense(views, arrays.random) and all(view.array.flags.aligned for view in views):
            rows.append([views[0].size, update.key, update.start, *(view.pointer for view in views)])
        else:
            apart.append(Batch(arrays, arrays.random, [update], names=[views[0].name]))
    if not rows:
        return apart
    table, names = np.array(rows), [update.views[0].name for update in updates]
    return [Batch(arrays, arrays.random, updates, table, table[:, SIZE].sum().item(), names), *apart]


class Batch:
    """Updates that one launch makes, short of the form and the scalars.

    Their arrays are in a table, or they are one update of arrays of any strides. updates: `layout.Update`s, which keep the arrays
    alive; None where the caller does.
    """

    lasts, device = False, None

    __slots__ = ("arrays", "begun", "group", "is_random", "n", "names", "prepared", "table", "updates")

    def __init__(self, arrays, is_random, updates, table=None, n=0, names=(), group=0):
        self.arrays, self.is_random, self.updates, self.table, self.n = arrays, is_random, updates, table, n
        self.names, self.group, self.begun = names, group, False

    def place(self, given):
        if given is not None:
            raise TypeError("stream is for arrays on a GPU; these are on the CPU, which has no streams")

    def check(self, place, on_device):
        """A GPU's batch refuses here what a captured graph cannot hold."""

    def prepare(self, rule, form, scalars, place, key=0):
        self.prepared, self.begun = (rule, form, scalars, key), False

    def launch(self):
        rule, form, scalars, key = self.prepared
        self.begun = True
        if self.table is not None:
            launch_table(form, self.table, self.n, scalars, rule, key)
            return
        (update,) = self.updates
        views = update.views
        shape = np.array(views[0].shape, np.int64)
        strides = np.array([view.strides for view in views], np.int64).reshape(len(views), shape.size).T.copy()
        at = tuple(view.pointer for view in views)
        build(rule, form, "strided")(at, shape, strides, update.start, update.key ^ key, *scalars)

    def release(self):
        """Nothing is held."""


def batch_of(table, n, arrays, is_random, group=0, names=None):
    """Return the Batch of a table of numpy_struct.py with n elements, whose arrays the caller keeps alive."""
    return Batch(arrays, is_random, None, table, n, names or ("param",), group)


def launch_table(form, table, n, scalars, rule=adam, key=0):
    """Update the n elements of a table of arrays (see numpy_struct.py): without gaps, at multiples of their elements' size."""
    n_threads = 1 if n < PARALLEL_FROM else _n_threads()
    if n_threads == 1:
        build(rule, form, "serial")(table, 0, n, key, *scalars)
    else:
        in_threads(functools.partial(build, rule, form), table, n, n_threads, (key, *scalars))


@functools.cache
def build(rule, form, loop):
    """Return the compiled kernel of a form. loop: "serial", "parallel" or "strided"."""
    if loop == "parallel":
        return parallel_of(build(rule, form, "serial"), ", ".join(["key", *adam.scalar_names(form)]))
    # Numba's default error model tests every divisor for zero: the loop would not vectorise, and would raise half-way
    # through the arrays.
    compiled = njit(error_model="numpy", nogil=True)
    element = compiled_cache.named(rule.in_python(form, primitives.for_numba(intrinsic)), rule, form)
    update = njit(error_model="numpy")(element)
    access = numba_access.functions(form, intrinsic)
    load, store, moved, stepped = access.load, access.store, access.moved, access.stepped
    operands_at = numba_access.tuple_at(intrinsic, len(operands_of_form(form)))
    PARAM_SIZE = operands_of_form(form)[0].itemsize

    def serial(table, first, last, key, s):
        """Update the elements first ... last - 1, counted through all rows. s: the scalars."""
        end = 0
        for row in range(table.shape[0]):
            begin, end = end, end + table[row, SIZE]
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                at = operands_at(table.ctypes.data + (row * table.shape[1] + PARAM) * 8)
                row_key, index = key ^ table[row, KEY], table[row, START]
                # NumPy's large arrays start 16 bytes after a cache line, and half of LLVM's vectors would lie across two lines:
                # a tenth slower. So what is before the first line of param is a part of its own.
                line = start + min(-(table[row, PARAM] + start * PARAM_SIZE) % CACHE_LINE // PARAM_SIZE, stop - start)
                while start < stop:
                    high = (index + start) >> 32
                    end_of_part = min(line if start < line else stop, ((high + 1) << 32) - index)
                    here, first_here = moved(at, start), index + start
                    for i in range(end_of_part - start):
                        store(here, i, update(*load(here, i), s), first_here, high, row_key)
                    start = end_of_part

    def strided(at, shape, strides, index, key, s):
        """Update every element. strides: bytes, by dimension and operand. Elements are counted in C order."""
        ndim, size = shape.size, 1
        for d in range(ndim):
            size *= shape[d]
        for i in range(size):
            here, rest = at, i
            for d in range(ndim - 1, -1, -1):
                here = stepped(here, operands_at(strides.ctypes.data + d * strides.shape[1] * 8), rest % shape[d])
                rest //= shape[d]
            store(here, 0, update(*load(here, 0), s), index + i, (index + i) >> 32, key)

    if form.arrays.grouped:
        serial = _over_groups(form, update, operands_at)
    own, arguments = (
        (strided, "at, shape, strides, index, key") if loop == "strided" else (serial, "table, first, last, key")
    )
    body = njit(error_model="numpy")(compiled_cache.named(own, rule, form))
    function = compiled_cache.named(_taking(arguments, form, body=body), rule, form)
    return compiled_cache.of_rule(compiled(function), rule, form)


def _taking(arguments, form, **names):
    """Return a function that calls body with its arguments and a tuple of its scalars.

    Each scalar is an argument: to pass a tuple, or some for `*scalars`, takes Python longer than the update of a small array.
    They come as Python floats, which Numba is quicker to take than NumPy's.
    """
    listed = ", ".join(adam.scalar_names(form))
    text = f"def kernel({arguments}, {listed}):\n    body({arguments}, to_reals(({listed},)))"
    # a kernel is found in the cache by the name of its module
    namespace = {"__name__": __name__, "to_reals": numba_access.to_reals(form, intrinsic)} | names
    exec(compile(text, __file__, "exec"), namespace)
    return namespace["kernel"]


def _over_groups(form, update, operands_at):
    groups = numba_access.functions(form, intrinsic)
    load, units, store, magnitudes, codec = groups.load, groups.units, groups.store, groups.magnitudes, groups.codec
    scales, encode, keep, kept = groups.scales, groups.encode, groups.keep, groups.kept
    moved, ZERO = groups.moved, np.int32(0)

    def serial(table, first, last, key, s):
        """Update the groups that begin among the elements first ... last - 1, counted through all rows. s: the scalars."""
        memory = np.empty(3 * GROUP, np.float32)
        scratch = memory.ctypes.data
        end = 0
        for row in range(table.shape[0]):
            size = table[row, SIZE]
            begin, end = end, end + size
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                at = operands_at(table.ctypes.data + (row * table.shape[1] + PARAM) * 8)
                row_key, index = key ^ table[row, KEY], table[row, START]
                for group in range((start + GROUP - 1) // GROUP, (stop + GROUP - 1) // GROUP):
                    i = group * GROUP
                    high = (index + i) >> 32  # of all: a parameter's groups begin at multiples of GROUP
                    unit, here, first_here = units(at, group), moved(at, i), index + i
                    n = min(GROUP, size - i)
                    m, root = ZERO, ZERO
                    for j in range(n):
                        new = update(*load(here, j, unit), s)
                        store(here, j, new, first_here, high, row_key)
                        keep(scratch, j, new)
                        own_m, own_root = magnitudes(new, 1)
                        m, root = max(m, own_m), max(root, own_root)
                    scales(at, group, m, root)
                    how = codec(m, root)
                    for j in range(n):
                        encode(here, j, kept(scratch, j), how, first_here, high, row_key)

    return serial


def parallel_of(serial, names):
    """Return a loop that runs the parts of a serial one in Numba's threads, and how many of them ended without an error.

    names: of the arguments after the three that say which part.
    """
    text = f"""
def parallel(table, n, n_threads, {names}):
    ended = 0
    for k in prange(n_threads):
        serial(table, n * k // n_threads, n * (k + 1) // n_threads, {names})
        ended += 1
    return ended
"""
    namespace = {"serial": serial, "prange": prange}
    exec(compile(text, __file__, "exec"), namespace)
    # Not kept on disk: Numba names the body of a parallel loop by an address, which two processes may have in common.
    return njit(error_model="numpy", nogil=True, parallel=True)(namespace["parallel"])


# Numba's threads: "workqueue" ends the process when two Python threads start a parallel loop at once, "omp" when a forked child
# starts its first, and NUMBA_THREADING_LAYER may ask for one that is not installed. In these cases plain Python threads run
# parts of the serial loop instead: as fast from some 4 million elements, slower below, never wrong.
_one_at_a_time = threading.Lock()
_forked = False


def _after_fork_in_child():
    global _forked, _one_at_a_time
    _forked, _one_at_a_time = True, threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _numba_threads_are_safe():
    return not _forked and _threading_layer() not in (None, "workqueue")


@functools.cache
def _threading_layer():
    try:
        numba.get_num_threads()  # starts the threads; before that the layer is not known
        return numba.threading_layer()
    except ValueError:  # no such layer here
        return None


def _n_threads():
    return numba.get_num_threads() if _threading_layer() else numba.config.NUMBA_NUM_THREADS


def n_threads():
    """Return how many threads an update may take."""
    return _n_threads()


@contextlib.contextmanager
def one_thread():
    """Let updates that this thread launches take no others: there are as many of it as there are processors."""
    if _threading_layer() is None:
        yield
        return
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def in_threads(build, table, n, n_threads, rest):
    """Run a loop over n elements in several threads. build(loop): its kernel. rest: what a kernel takes beside table and part."""
    if not _numba_threads_are_safe():
        _in_own_threads(build("serial"), table, n, n_threads, rest)
        return
    with _one_at_a_time:
        ended = build("parallel")(table, n, n_threads, *rest)
    # Numba drops what its threads raise. These loops raise nothing but a MemoryError.
    if ended < n_threads:
        raise MemoryError(
            f"{n_threads - ended} of {n_threads} parts of a loop were not done, because a thread found no memory for itself. If "
            "it was a step, parameters and state are of two steps: go on from a state that was saved before"
        )


@functools.cache
def _pool(n_threads):
    return ThreadPoolExecutor(n_threads, thread_name_prefix="gpuadam")


def _in_own_threads(serial, table, n, n_threads, scalars):
    """Run the parts of the serial loop in the calling thread and in those of a pool, as far as there are any.

    What a part raises is raised here, when no part runs any more. Parts that were not begun are then left out.
    """
    edges = [n * k // n_threads for k in range(n_threads + 1)]
    parts: list[tuple[Future, int, int]] = [(Future(), first, last) for first, last in itertools.pairwise(edges)]

    def work(future, first, last):
        if future.set_running_or_notify_cancel():  # else the calling thread has taken the part
            try:
                future.set_result(serial(table, first, last, *scalars))
            except BaseException as error:  # noqa: BLE001 - of a thread; it is raised in the calling one
                future.set_exception(error)

    try:
        with contextlib.suppress(RuntimeError):  # the system has no more threads, or the interpreter is ending
            for part in parts[1:]:
                _pool(n_threads).submit(work, *part)
        for future, first, last in parts:
            if future.cancel():  # no thread has begun the part
                serial(table, first, last, *scalars)
    finally:
        begun = [future for future, *_ in parts if not future.cancel()]
        _wait(begun)
    for future in begun:
        future.result()


def _wait(begun):
    """Wait until all Futures are done, also if Ctrl-C is raised meanwhile: their threads still write arrays."""
    try:
        wait(begun)
    finally:
        if not all(future.done() for future in begun):
            _wait(begun)
