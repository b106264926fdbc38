"""A rule as a Numba loop over NumPy arrays: the backend `numba-cpu`.

LLVM vectorises the loop, and the vector body, the scalar tail and any split between threads give the same bits, because
every operation is rounded by itself.
"""

import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from gpuadam.arrays import on_cpu
from gpuadam.kernels import adam, primitives

# Elements from which two threads finish sooner than one. `benchmarks/cpu_threads.py` shows where the lines cross.
PARALLEL_FROM = 1 << 16


view = on_cpu


def zeros_like(view):
    """Return zeros for a moment of an array: the same shape and, without gaps, the same order of memory."""
    return np.zeros_like(view.array, subok=False)


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


def launch(form, views, scalars, rule=adam):
    """Update NumPy arrays in place.

    views: of param, grad, m, v, max_v (None without AMSGrad), of one shape and of form.dtype, checked.
    scalars: `adam.Scalars` of form.dtype.
    """
    param, grad, m, v, max_v = views
    arrays = [view.array for view in (param, grad, m, v, max_v or v)]
    flat = _in_memory_order(arrays)
    if flat is None:
        build(rule, form, "strided")(*arrays, *scalars)
    else:
        launch_flat(form, flat, scalars, rule)


def launch_flat(form, arrays, scalars, rule=adam):
    """Likewise for 1-D C-contiguous arrays themselves; without AMSGrad, max_v is v once more."""
    n = arrays[0].size
    if n < PARALLEL_FROM or _n_threads() == 1:
        build(rule, form, "serial")(*arrays, *scalars)
    elif _numba_threads_are_safe():
        with _one_at_a_time:
            build(rule, form, "parallel")(*arrays, *scalars)
    else:
        _in_own_threads(build(rule, form, "serial"), n, arrays, scalars)


@functools.cache
def build(rule, form, loop):
    """Return the compiled kernel of a form. loop: "serial", "parallel" or "strided"."""
    update = njit(error_model="numpy")(rule.in_python(form, primitives.for_numba(intrinsic)))
    AMSGRAD = form.amsgrad

    def contiguous(param, grad, m, v, max_v, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        for i in prange(param.size):
            param[i], m[i], v[i], x = update(
                param[i], grad[i], m[i], v[i], max_v[i], grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr
            )
            if AMSGRAD:
                max_v[i] = x

    def strided(param, grad, m, v, max_v, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        for i in np.ndindex(param.shape):
            param[i], m[i], v[i], x = update(
                param[i], grad[i], m[i], v[i], max_v[i], grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr
            )
            if AMSGRAD:
                max_v[i] = x

    # Numba's default error model tests every divisor for zero: the loop would not vectorise, and would raise half-way
    # through the arrays.
    compiled = njit(error_model="numpy", nogil=True, parallel=loop == "parallel")
    return compiled(strided if loop == "strided" else contiguous)


def _in_memory_order(arrays):
    """Return 1-D views in the order of memory, or None where the arrays' layouts differ or have gaps."""
    if all(a.flags.c_contiguous for a in arrays):
        return [a.reshape(-1) for a in arrays]
    strides = arrays[0].strides
    if any(a.strides != strides for a in arrays):
        return None
    outer_first = sorted(range(len(strides)), key=lambda k: -strides[k])
    turned = [a.transpose(outer_first) for a in arrays]
    return [a.reshape(-1) for a in turned] if turned[0].flags.c_contiguous else None


# Numba's threads: "workqueue" ends the process when two Python threads start a parallel loop at once, "omp" when a forked child
# starts its first, and NUMBA_THREADING_LAYER may ask for one that is not installed. In these cases plain Python threads run
# slices of the serial loop instead: as fast from some 4 million elements, slower below, never wrong.
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


def _in_own_threads(kernel, n, arrays, scalars):
    n_threads = _n_threads()
    chunk = -(-n // n_threads)
    slices = [slice(start, start + chunk) for start in range(0, n, chunk)]
    for future in [_pool(n_threads).submit(kernel, *(a[s] for a in arrays), *scalars) for s in slices]:
        future.result()
