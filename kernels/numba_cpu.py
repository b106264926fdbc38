"""A rule as a Numba loop over memory of the CPU: the backend `numba-cpu`.

A launch takes a table of arrays and goes through it as through one long array, so that one array and a thousand cost one call.
LLVM vectorises the loop, and the vector body, the scalar tail and any split between threads give the same bits, because every
operation is rounded by itself.
"""

import collections
import contextlib
import functools
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from gpuadam.arrays import on_cpu
from gpuadam.kernels import adam, compiled_cache, primitives
from gpuadam.kernels import numpy_struct as numpy_struct
from gpuadam.kernels.layout import dense
from gpuadam.kernels.numpy_struct import GRAD, MAX_V, PARAM, SIZE, M, V

NAME = "numba-cpu"

# Elements from which two threads finish sooner than one. `benchmarks/cpu_threads.py` shows where the lines cross.
PARALLEL_FROM = 1 << 16

CACHE_LINE = 64  # bytes


view = on_cpu


def zeros_like(view):
    """Return zeros for a moment of an array: the same shape, order of memory and offset from a cache line."""
    n_bytes = view.size * view.dtype.itemsize
    memory = np.zeros(n_bytes + CACHE_LINE, np.uint8)
    offset = (view.pointer - memory.ctypes.data) % CACHE_LINE // view.dtype.itemsize * view.dtype.itemsize
    return np.ndarray(view.shape, view.dtype, memory, offset, view.strides if dense([view]) else None)


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
    """Copy one array into another of the same shape and dtype."""
    np.copyto(to.array, source.array)


def launch(form, views, scalars, rule=adam, stream=None):
    """Update NumPy arrays in place.

    views: of param, grad, m, v, max_v (None without AMSGrad), of one shape and of form.dtype, checked.
    scalars: `adam.Scalars` of form.dtype. stream: only GPUs have them.
    """
    for batch in batches([views]):
        batch.launch(form, scalars, rule, batch.place(stream))


def batches(updates):
    """Return the launches of several updates, of any shapes: one for all dense arrays, one for each other."""
    rows, apart = [], []
    for views in updates:
        used = [view for view in views if view is not None]
        if dense(used) and all(view.array.flags.aligned for view in used):
            pointers = [0 if view is None else view.pointer for view in views]
            rows.append([*pointers, used[0].size, used[0].dtype.itemsize])
        else:
            apart.append(Batch(None, used))
    return ([Batch(np.array(rows), updates)] if rows else []) + apart


class Batch:
    """Updates that one launch makes, short of the form and the scalars. Without a table, one update of arrays of any strides."""

    lasts = False

    def __init__(self, table, views):
        self.table, self.views = table, views  # which keep the arrays alive

    def place(self, given):
        if given is not None:
            raise TypeError("stream is for arrays on a GPU; these are on the CPU, which has no streams")

    def check(self, place, on_device):
        """A GPU's batch refuses here what a captured graph cannot hold."""

    def launch(self, form, scalars, rule, place):
        if self.table is None:
            param, grad, m, v, *max_v = (view.array for view in self.views)
            build(rule, form, "strided")(param, grad, m, v, *(max_v or [v]), *scalars)
        else:
            launch_table(form, self.table, scalars, rule)

    def release(self):
        """Nothing is held."""


def launch_table(form, table, scalars, rule=adam):
    """Update the arrays of a table (see numpy_struct.py) in place: without gaps, at multiples of their elements' size."""
    n = table[0, SIZE].item() if len(table) == 1 else table[:, SIZE].sum().item()
    n_threads = 1 if n < PARALLEL_FROM else _n_threads()
    if n_threads == 1:
        build(rule, form, "serial")(table, 0, n, *scalars)
    elif _numba_threads_are_safe():
        with _one_at_a_time:
            build(rule, form, "parallel")(table, n, n_threads, *scalars)
    else:
        _in_own_threads(build(rule, form, "serial"), table, n, n_threads, scalars)


@functools.cache
def build(rule, form, loop):
    """Return the compiled kernel of a form. loop: "serial", "parallel" or "strided"."""
    if loop == "parallel":
        return _parallel(rule, form)
    # Numba's default error model tests every divisor for zero: the loop would not vectorise, and would raise half-way
    # through the arrays.
    compiled = njit(error_model="numpy", nogil=True)
    element = compiled_cache.named(rule.in_python(form, primitives.for_numba(intrinsic)), rule, form)
    update = njit(error_model="numpy")(element)
    AMSGRAD, ITEMSIZE, REAL = form.amsgrad, form.dtype.itemsize, form.dtype.type
    pointer = _pointer({"float32": types.float32, "float64": types.float64}[form.dtype.name])

    def serial(table, first, last, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        """Update the elements first ... last - 1, counted through all rows."""
        # Python floats, which Numba is quicker to take than NumPy's
        scalars = (
            REAL(grad_scale), REAL(decay), REAL(w1), REAL(w2), REAL(inv_sqrt_bias2), REAL(eps), REAL(neg_lr),
        )  # fmt: skip
        end = 0
        for row in range(table.shape[0]):
            begin, end = end, end + table[row, SIZE]
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                # NumPy's large arrays start 16 bytes after a cache line, and half of LLVM's vectors would lie across two lines:
                # a tenth slower. So what is before the first line of param is a part of its own.
                line = start + min(-(table[row, PARAM] + start * ITEMSIZE) % CACHE_LINE // ITEMSIZE, stop - start)
                for part in range(2):
                    at, n = (start * ITEMSIZE, line - start) if part == 0 else (line * ITEMSIZE, stop - line)
                    param, grad = carray(pointer(table[row, PARAM] + at), n), carray(pointer(table[row, GRAD] + at), n)
                    m, v = carray(pointer(table[row, M] + at), n), carray(pointer(table[row, V] + at), n)
                    max_v = carray(pointer(table[row, MAX_V] + at), n) if AMSGRAD else v
                    for i in range(n):
                        param[i], m[i], v[i], x = update(param[i], grad[i], m[i], v[i], max_v[i], *scalars)
                        if AMSGRAD:
                            max_v[i] = x

    def strided(param, grad, m, v, max_v, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        scalars = (
            REAL(grad_scale), REAL(decay), REAL(w1), REAL(w2), REAL(inv_sqrt_bias2), REAL(eps), REAL(neg_lr),
        )  # fmt: skip
        for i in np.ndindex(param.shape):
            param[i], m[i], v[i], x = update(param[i], grad[i], m[i], v[i], max_v[i], *scalars)
            if AMSGRAD:
                max_v[i] = x

    function = compiled_cache.named(strided if loop == "strided" else serial, rule, form)
    return compiled_cache.of_rule(compiled(function), rule, form)


def _parallel(rule, form):
    serial = build(rule, form, "serial")

    def parallel(table, n, n_threads, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        for k in prange(n_threads):
            first, last = n * k // n_threads, n * (k + 1) // n_threads
            serial(table, first, last, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr)

    # Not kept on disk: Numba names the body of a parallel loop by an address, which two processes may have in common.
    return njit(error_model="numpy", nogil=True, parallel=True)(parallel)


def _pointer(element):
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return pointer


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


@functools.cache
def _pool(n_threads):
    return ThreadPoolExecutor(n_threads, thread_name_prefix="gpuadam")


def _in_own_threads(serial, table, n, n_threads, scalars):
    """Run the parts of the serial loop in the calling thread and in those of a pool, as far as there are any."""
    edges = [n * k // n_threads for k in range(n_threads + 1)]
    parts, finished = collections.deque(itertools.pairwise(edges)), threading.Semaphore(0)

    def work():
        while parts:
            try:
                first, last = parts.popleft()
            except IndexError:  # another thread has taken the last
                return
            try:
                serial(table, first, last, *scalars)
            finally:
                finished.release()

    with contextlib.suppress(RuntimeError):  # the system has no more threads, or the interpreter is ending
        for _ in range(n_threads - 1):
            _pool(n_threads).submit(work)
    work()
    for _ in range(n_threads):
        finished.acquire()
