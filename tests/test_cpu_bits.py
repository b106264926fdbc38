"""The CPU backend gives one set of bits: serial or parallel, body or tail, in pieces, strided, and whatever the threads."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
from cases import DTYPES, FORMS, assert_same_bits, at_offset, form_and_scalars, wide_state

import gpuadam
from gpuadam.arrays import on_cpu
from gpuadam.kernels import adam, numba_cpu

N = 100_003


def copies(arrays):
    return [None if a is None else a.copy() for a in arrays]


def launched(form, arrays, scalars):
    numba_cpu.launch(form, [None if a is None else on_cpu("", a) for a in arrays], scalars)
    return arrays


def through(loop, form, arrays, scalars):
    param, grad, m, v, max_v = arrays
    kernel = numba_cpu.build(adam, form, loop)
    if loop == "strided":
        kernel(param, grad, m, v, v if max_v is None else max_v, *scalars)
    else:
        table = np.array([[0 if a is None else a.ctypes.data for a in arrays] + [param.size, param.itemsize]])
        kernel(table, *((0, param.size) if loop == "serial" else (param.size, 3)), *scalars)
    return arrays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_every_loop_gives_the_same_bits(name, dtype):
    form, scalars = form_and_scalars(name, dtype)
    given = wide_state(N, dtype, form.amsgrad)
    expected = through("serial", form, copies(given), scalars)
    assert_same_bits(through("parallel", form, copies(given), scalars), expected, "parallel")
    assert_same_bits(through("strided", form, copies(given), scalars), expected, "strided")
    pieces = copies(given)
    for start, stop in [(0, 1), (1, 4), (4, 7), (7, 1031), (1031, N)]:
        through("serial", form, [None if a is None else a[start:stop] for a in pieces], scalars)
    assert_same_bits(pieces, expected, "in pieces")


def test_a_single_element_gives_the_bits_of_the_vector_body():
    form, scalars = form_and_scalars("all with l2", "float32")
    given = wide_state(500, "float32", True)
    expected = launched(form, copies(given), scalars)
    one_by_one = copies(given)
    for k in range(500):
        launched(form, [a[k : k + 1] for a in one_by_one], scalars)
    assert_same_bits(one_by_one, expected)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_alignment_changes_nothing(offset):
    form, scalars = form_and_scalars("amsgrad", "float32")
    given = wide_state(1003, "float32", True)
    expected = launched(form, copies(given), scalars)
    assert_same_bits(launched(form, [at_offset(a, offset)[0] for a in given], scalars), expected)


def test_an_array_off_its_elements_alignment_is_updated_too():
    form, scalars = form_and_scalars("adam", "float32")
    given = wide_state(1003)[:4]
    expected = launched(form, [*copies(given), None], scalars)
    shifted = []
    for a in given:
        shifted.append(np.frombuffer(bytearray(b"?" + a.tobytes()), "f4", offset=1))
    assert not shifted[0].flags.aligned
    assert_same_bits(launched(form, [*shifted, None], scalars), expected)


@pytest.mark.parametrize("name", ["adam", "all with l2"])
def test_the_loop_is_vectorised(name):
    form, scalars = form_and_scalars(name, "float32")
    # compiled afresh: what comes out of the cache on disk has no text
    kernel = numba.njit(error_model="numpy")(numba_cpu.build(adam, form, "serial").py_func)
    kernel(np.zeros((0, 7), np.int64), 0, 0, *scalars)
    (code,) = kernel.inspect_llvm().values()
    assert "x float> @llvm.fma" in code and "x float> @llvm.sqrt" in code


def test_numbas_threads_and_our_own_give_the_same_bits(monkeypatch):
    form, scalars = form_and_scalars("amsgrad", "float32")
    given = wide_state(N, "float32", True)
    expected = through("serial", form, copies(given), scalars)
    monkeypatch.setattr(numba_cpu, "_numba_threads_are_safe", lambda: False)
    monkeypatch.setattr(numba_cpu, "_n_threads", lambda: 3)
    assert_same_bits(launched(form, copies(given), scalars), expected)


def test_several_python_threads_at_once():
    form, scalars = form_and_scalars("adam", "float32")
    given = wide_state(N)
    expected = launched(form, copies(given), scalars)
    results = [copies(given) for _ in range(4)]
    threads = [threading.Thread(target=launched, args=(form, r, scalars)) for r in results]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        assert_same_bits(r, expected)


SURVIVES = """
import os, sys, threading
import numpy as np
import gpuadam

def step():
    arrays = [np.ones(100_000, "f4") for _ in range(4)]
    for k in range(1, 20):
        gpuadam.adam_step(*arrays, k)

threads = [threading.Thread(target=step) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        step()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("survived", __import__("numba").threading_layer())
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_threads_and_forks_survive_every_threading_layer(layer):
    """Numba's workqueue layer aborts on concurrent use, and its omp layer in a forked child."""
    env = os.environ | {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", SURVIVES], env=env, capture_output=True, text=True, timeout=120)
    if layer == "omp" and "could be loaded" in done.stderr:
        pytest.skip("this Numba has no omp layer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["survived", layer]


@pytest.mark.parametrize("layer", ["tbb", "safe", "nonsense"])
def test_a_threading_layer_that_is_not_there_does_not_matter(layer):
    code = "import numpy as np, gpuadam; gpuadam.adam_step(*(np.ones(1 << 17, 'f4') for _ in range(4)), 1); print('fine')"
    env = os.environ | {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def _step_of_ones(queue):
    arrays = [np.ones(N, "f4") for _ in range(4)]
    gpuadam.adam_step(*arrays, 1)
    queue.put(arrays[0].tobytes())


def test_a_spawned_process_works():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_step_of_ones, args=(queue,))
    process.start()
    child = queue.get(timeout=120)
    process.join()
    _step_of_ones(queue)
    assert child == queue.get(timeout=10)
