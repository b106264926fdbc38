"""Threads for the loops of the CPU: Numba's where they are safe, else plain Python threads.

Of Numba's threading layers "workqueue" ends the process when two Python threads start a parallel loop at once, and "omp" when a
forked child starts its first. NUMBA_THREADING_LAYER may ask for one that is not installed. In these cases plain Python threads
run parts of the serial loop instead: as fast from some 4 million elements, slower below, never wrong.
"""

import contextlib
import ctypes
import functools
import inspect
import itertools
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numba
import numpy as np
from llvmlite import binding
from numba import njit, prange

_one_at_a_time = threading.Lock()
_forked = False
safe = np.zeros(1, np.int64)  # what `numba_threads_are_safe` found: compiled code looks here


def _after_fork_in_child():
    global _forked, _one_at_a_time
    _forked, _one_at_a_time, safe[0] = True, threading.Lock(), False
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)


def numba_threads_are_safe():
    """Whether Numba's threads may be used here and now."""
    found = not _forked and threading_layer() not in (None, "workqueue")
    safe[0] = found
    return found


@functools.cache
def threading_layer():
    """Return the name of Numba's threading layer, or None if the one that was asked for is not there."""
    try:
        numba.get_num_threads()  # starts the threads; before that the layer is not known
        return numba.threading_layer()
    except ValueError:  # no such layer here
        return None


def n_threads():
    """Return how many threads an update may take."""
    return _counter()() if threading_layer() else numba.config.NUMBA_NUM_THREADS


def counter_at():
    """Return the address of the function that counts Numba's threads, which have been started."""
    return binding.address_of_symbol("get_num_threads")


@functools.cache
def _counter():
    """Return this function. `numba.get_num_threads` first takes two locks, one of them between processes."""
    return ctypes.PYFUNCTYPE(ctypes.c_int)(counter_at())


@contextlib.contextmanager
def one_thread():
    """Return a context in which updates of this thread use this thread alone, for callers with one such thread per processor."""
    if threading_layer() is None:
        yield
        return
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def parallel_of(serial):
    """Return a loop that runs the parts of a serial one in Numba's threads.

    Numba drops what its threads raise. A serial loop raises nothing: it divides by no integer that could be 0, and asks for no
    memory.
    """
    # each argument by its name: Numba takes half a microsecond longer for some that are taken together
    names = ", ".join(str(parameter) for parameter in list(inspect.signature(serial.py_func).parameters.values())[3:])
    text = f"""
def parallel(table, n, n_threads, {names}):
    for k in prange(n_threads):
        serial(table, n * k // n_threads, n * (k + 1) // n_threads, {names})
"""
    namespace = {"serial": serial, "prange": prange}
    exec(compile(text, __file__, "exec"), namespace)
    # Not kept on disk: Numba names the body of a parallel loop by an address, which two processes may have in common.
    return njit(error_model="numpy", nogil=True, parallel=True)(namespace["parallel"])


def run(build, table, n, parts, arguments):
    """Run a loop over n elements of a table in some parts, each in a thread.

    build(loop): the compiled loop, "serial" or "parallel". arguments: of the loop, after the table and the bounds of a part.
    """
    if parts == 1:
        build("serial")(table, 0, n, *arguments)
    elif numba_threads_are_safe():
        with _one_at_a_time:
            build("parallel")(table, n, parts, *arguments)
    else:
        in_python_threads(build("serial"), table, n, parts, arguments)


@functools.cache
def _pool(n_threads):
    return ThreadPoolExecutor(n_threads, thread_name_prefix="gpuadam")


def in_python_threads(serial, table, n, n_threads, arguments):
    """Run the parts of the serial loop in the calling thread and in those of a pool, as far as there are any.

    An error of a part is raised here, when no part runs any more. Parts that were not begun are then left out.
    """
    edges = [n * k // n_threads for k in range(n_threads + 1)]
    parts: list[tuple[Future, int, int]] = [(Future(), first, last) for first, last in itertools.pairwise(edges)]

    def work(future, first, last):
        if future.set_running_or_notify_cancel():  # else the calling thread has taken the part
            try:
                future.set_result(serial(table, first, last, *arguments))
            except BaseException as error:  # noqa: BLE001 - of a thread; it is raised in the calling one
                future.set_exception(error)

    try:
        with contextlib.suppress(RuntimeError):  # the system has no more threads, or the interpreter is ending
            for part in parts[1:]:
                _pool(n_threads).submit(work, *part)
        for future, first, last in parts:
            if future.cancel():  # no thread has begun the part
                serial(table, first, last, *arguments)
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
