"""Threads, forks and processes: no threading layer of Numba aborts, hangs, or changes a bit.

What has to survive runs in processes of their own, which import this file and print what they find; the bits must be those of
the serial loop, computed here.
"""

import atexit
import ctypes
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import libraries
import numba
import numpy as np
import pytest
from cases import assert_same_bits, few, form_and_scalars, in_memory, state, table_of, wide_state

import gpuadam
from gpuadam import functional
from gpuadam.cli.measuring import forms as measured
from gpuadam.kernels import adam, change_cpu, cpu_step, cpu_threads, norm_cpu, norm_order
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.numpy_struct import PARAM
from gpuadam.kernels.operands import operands_of_form
from gpuadam.kernels.view import on_cpu
from gpuadam.repeated_on_cpu import RepeatedCall

N, STEPS, AT_ONCE = 100_003, 80, 4
SIZES = (0, 1, 7, 1_000, 20_011, 60_013)
ROOT = Path(__file__).parent.parent


# What the processes do


def digest(arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def steps_of_one(steps=STEPS):
    param, grad, m, v, _ = state(N)
    for k in range(1, steps + 1):
        gpuadam.adam_step(param, grad, m, v, k)
    return digest([param, m, v])


def steps_of_many(steps=STEPS):
    params, grads = [state(n, seed=n)[0] for n in SIZES], [state(n, seed=n)[1] for n in SIZES]
    opt = gpuadam.Adam(params)
    for _ in range(steps):
        opt.step(grads)
    return digest(a for p, s in zip(params, opt.state.values(), strict=True) for a in (p, s["m"], s["v"]))


def steps():
    return [steps_of_one(), steps_of_many()]


def steps_at_once():
    """What AT_ONCE threads get that do the same, without repetition."""
    results, ready = [], threading.Barrier(AT_ONCE)

    def work():
        ready.wait()
        results.append(steps())

    threads = [threading.Thread(target=work) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == AT_ONCE
    return sorted(set(map(tuple, results)))


def steps_in_a_fork():
    """What a forked child gets, one of whose parent's threads is amid a step, and its exit code."""
    stop = threading.Event()

    def go_on():
        arrays = state(N)[:4]
        while not stop.is_set():
            gpuadam.adam_step(*arrays, 1)

    busy = threading.Thread(target=go_on)
    busy.start()
    ours, childs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(childs, json.dumps([steps(), steps_at_once()]).encode())
        os._exit(0)  # as multiprocessing ends it
    os.close(childs)
    stop.set()
    busy.join()
    with os.fdopen(ours) as pipe:
        alone, at_once = json.loads(pipe.read() or "[null, null]")
    return alone, at_once, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def recorded():
    """From here on, append (loop, thread's name, the two integers that bound the work) of each launch to what is returned."""
    launches, build = [], numba_cpu.build
    build(
        adam, form_and_scalars("adam", "float32")[0], "parallel"
    )  # it asks for the serial loop itself, and not to launch it

    def recording(rule, form, loop):
        def call(table, *rest):
            if rest[0] != (rest[1] if loop == "serial" else 0):  # else it is over no elements, to compile the kernel
                launches.append((loop, threading.current_thread().name.rstrip("0123456789"), *rest[:2]))
            return build(rule, form, loop)(table, *rest)

        return call

    numba_cpu.build = recording
    return launches


def everything(compiled):
    """What a process finds. compiled: whether compiled calls may start threads; else launches are recorded."""
    launches = [] if compiled else recorded()
    steps_of_one(3)  # Numba's tbb layer can be forked if the main thread has started it
    launches.clear()
    found = {"at once": steps_at_once(), "compiled": starts_threads(functional._REPEATED._plan)}
    found["launches"] = sorted({launch[:2] for launch in launches})
    found["layer"] = cpu_threads.threading_layer()
    if hasattr(os, "fork"):
        found["fork"] = steps_in_a_fork()
        found["after the fork"] = steps()
    return found


def starts_threads(plan):
    """Whether the compiled call of a Plan starts threads."""
    return plan is not None and bool(plan.memory[cpu_step.IN_THREADS] and cpu_threads.safe[0])


# What they must find


@functools.cache
def expected():
    """The digests of `steps`, by the serial loop."""

    def serially(arrays, k):
        form, scalars = form_and_scalars("adam", "float32", step=k)
        numba_cpu.build(adam, form, "serial")(table_of(arrays), 0, arrays[0].size, 0, in_memory(scalars))

    one = state(N)[:4]
    many = [[*state(n, seed=n)[:2], np.zeros(n, "f4"), np.zeros(n, "f4")] for n in SIZES]
    for arrays in [one, *many]:
        for k in range(1, STEPS + 1):
            serially(arrays, k)
    return [digest([one[0], *one[2:]]), digest(a for param, _, m, v in many for a in (param, m, v))]


def process(code, **environment):
    """Return what a process prints as JSON that runs code in this module."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    if environment["NUMBA_THREADING_LAYER"] == "tbb":  # where a wheel puts libtbb; Numba finds it as the loader does
        environment["LD_LIBRARY_PATH"] = str(Path(sys.prefix, "lib"))
    environment = os.environ | {"PYTHONPATH": path} | environment
    code = f"import json, test_cpu_threads as t; print(json.dumps(t.{code}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    # Numba's tbb layer may print a warning of its own at a fork
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Unable to join threads")]
    return json.loads("\n".join(lines))


@functools.cache
def found(layer, compiled=False):
    return process(f"everything({compiled})", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="3")


def over(*layers):
    """Parametrize over threading layers; under pytest-xdist, the tests of one are in one process, which asks once."""
    more = {layer: [pytest.mark.exhaustive] for layer in ("tbb", "safe", "nonsense")}  # they do as omp, omp and workqueue do
    marks = {layer: [pytest.mark.xdist_group(layer), *more.get(layer, [])] for layer in layers}
    return pytest.mark.parametrize("layer", [pytest.param(layer, marks=marks[layer]) for layer in layers])


# Numba's own; its name for those safe in every way, which is tbb if it is there; and one that it does not know
LAYERS = ("workqueue", "omp", "tbb", "safe", "nonsense")


def test_the_sizes_here_are_worth_several_threads():
    assert min(N, sum(SIZES)) >= numba_cpu.PARALLEL_FROM


@over(*LAYERS)
def test_python_threads_at_once_get_the_bits_of_the_serial_loop(layer):
    """Numba's workqueue layer ends the process when two threads start a parallel loop at once."""
    assert found(layer)["at once"] == found(layer, compiled=True)["at once"] == [expected()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@over(*LAYERS)
def test_a_forked_child_gets_the_bits_of_the_serial_loop(layer):
    """Numba's omp layer ends a forked child at its first parallel loop."""
    assert found(layer)["fork"] == found(layer, compiled=True)["fork"] == [expected(), [expected()], 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@over(*LAYERS)
def test_a_process_that_forked_goes_on(layer):
    assert found(layer)["after the fork"] == found(layer, compiled=True)["after the fork"] == expected()


@over("omp", "tbb")
def test_a_layer_that_allows_it_runs_numbas_parallel_loop(layer):
    if found(layer)["layer"] is None:
        pytest.skip(f"Numba cannot load its {layer} layer here")
    assert found(layer)["layer"] == layer
    assert "parallel" in {loop for loop, _ in found(layer)["launches"]}, found(layer)
    assert found(layer, compiled=True)["compiled"] and not found(layer)["compiled"]


@over("workqueue", "nonsense")
def test_a_layer_that_does_not_allow_it_or_is_not_there_leaves_the_work_to_our_own_threads(layer):
    loops, threads = map(set, zip(*found(layer)["launches"], strict=True))
    assert loops == {"serial"} and "gpuadam_" in threads
    assert found(layer)["layer"] == {"workqueue": "workqueue", "nonsense": None}[layer]
    assert not found(layer, compiled=True)["compiled"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("layer", few(["omp", "nonsense"], "omp"))
def test_a_forked_child_starts_threads_of_its_own_and_ends_like_any_process(layer):
    """Neither Numba's threads nor those of the parent's pool are in the child."""
    found = process("threads_in_a_fork()", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="3")
    assert found == ["serial"] * 3 + [0]


def threads_in_a_fork():
    steps_of_one(1)
    ours, childs = os.pipe()
    child = os.fork()
    if child == 0:
        launches = recorded()
        steps_of_one(1)
        os.write(childs, json.dumps([loop for loop, *_ in launches]).encode())
        sys.exit(0)
    os.close(childs)
    with os.fdopen(ours) as pipe:
        loops = json.loads(pipe.read())
    return [*loops, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


# How many threads


def threads_used(numbers):
    """The number of threads that a step uses after each numba.set_num_threads, and the loop."""
    launches, used = recorded(), []
    for number in numbers:
        if number is not None:
            numba.set_num_threads(number)
        launches.clear()
        steps_of_one(1)
        (loop, *_), *_ = launches
        if loop == "serial":
            assert sorted(launch[2:] for launch in launches) == list(
                itertools.pairwise(N * k // len(launches) for k in range(len(launches) + 1))
            )
        used.append(launches[0][3] if loop == "parallel" else len(launches))
    return used


@pytest.mark.parametrize("layer", few(["default", "workqueue"], "default"))
def test_the_number_of_threads_follows_numbas(layer):
    asked = [None, 1, 2, 4, 1, 3]
    used = process(f"threads_used({asked})", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="4")
    assert used == [4, 1, 2, 4, 1, 3]


@pytest.mark.parametrize("layer", few(["default", "workqueue", "nonsense"], "default"))
def test_one_thread_is_the_caller_itself(layer):
    found = process("launches_of_a_step()", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="1")
    assert found == [["serial", "MainThread", 0, N]]


def launches_of_a_step():
    launches = recorded()
    steps_of_one(1)
    return launches


def test_a_small_step_stays_in_the_callers_thread(monkeypatch):
    monkeypatch.setattr(numba_cpu, "build", numba_cpu.build)  # put back afterwards
    launches = recorded()
    n = numba_cpu.PARALLEL_FROM - 1
    gpuadam.adam_step(*state(n)[:4], 1)
    assert launches == [("serial", threading.current_thread().name, 0, n)]


@pytest.mark.parametrize("n_threads", [2, 3, 7])
def test_our_own_threads_give_the_bits_of_the_serial_loop(monkeypatch, n_threads):
    monkeypatch.setattr(cpu_threads, "numba_threads_are_safe", lambda: False)
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: n_threads)
    form, scalars = form_and_scalars("amsgrad", "float32")
    given = wide_state(N, amsgrad=True)
    serial, ours = [a.copy() for a in given], [a.copy() for a in given]
    numba_cpu.build(adam, form, "serial")(table_of(serial), 0, N, 0, in_memory(scalars))
    numba_cpu.launch(form, [on_cpu("", a) for a in ours], scalars)
    assert_same_bits(ours, serial)


# Threads that compiled calls start. A function in C that is Python takes the place of the loop.


@pytest.fixture
def safe_threads():
    """Skip a test where the only layer is one that no compiled call may start."""
    if not cpu_threads.numba_threads_are_safe():
        pytest.skip(f"Numba's threading layer is {cpu_threads.threading_layer()}: compiled calls start no threads of it")


@pytest.fixture
def launched(safe_threads):
    """Return a function that makes the large update of a call that is repeated, and returns what its loop was given.

    repeat: makes the call. plan: returns its Plan. seen: is called in the place of the loop. Of the scalars both the address and
    the numbers that are there meanwhile are returned.
    """

    def launch(repeat, plan, seen=lambda: None):
        given = []

        def loop(_result, _error, *arguments):
            numbers = (ctypes.c_double * plan().scalars.size).from_address(arguments[-1])
            given.append((*arguments, list(numbers)))
            seen()
            return 0

        for _ in range(5):  # until it is repeated in threads
            repeat()
        assert starts_threads(plan())
        of_array = [ctypes.c_int64] * 9  # how Numba passes one of two dimensions: the fifth is the address of its data
        kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, *of_array, *[ctypes.c_int64] * 4)
        function, memory = kind(loop), plan().memory
        loop_at = memory[cpu_step.IN_THREADS]
        memory[cpu_step.IN_THREADS] = ctypes.cast(function, ctypes.c_void_p).value
        repeat()
        memory[cpu_step.IN_THREADS] = loop_at
        (arguments,) = given
        return arguments[4], *arguments[9:]

    return launch


def an_optimizer(n=N):
    params, grads = [np.ones(n, "f4"), np.ones(5, "f4")], [np.ones(n, "f4"), np.ones(5, "f4")]
    opt = gpuadam.Adam(params)
    return opt, functools.partial(opt.step, grads), lambda: opt._repeated._known[0].plan._plan


@pytest.fixture
def a_call(monkeypatch):
    """adam_step on arrays of ones, and the Plan of what was called last."""
    monkeypatch.setattr(functional, "_REPEATED", repeated := RepeatedCall())
    arrays, steps = [np.ones(N, "f4") for _ in range(4)], itertools.count(1)
    return lambda: gpuadam.adam_step(*arrays, next(steps)), lambda: repeated._plan


def test_compiled_calls_start_as_many_threads_as_numba_may(launched, a_call):
    (_, *of_step), before = an_optimizer(), numba.get_num_threads()
    try:
        for n_threads in (before, 1):
            numba.set_num_threads(n_threads)
            assert launched(*of_step)[1:4] == (N + 5, n_threads, 0)
            assert launched(*a_call)[1:4] == (N, n_threads, 0)
    finally:
        numba.set_num_threads(before)


def test_an_optimizers_arrays_are_kept_alive_while_threads_update_them(launched):
    """Another thread may drop an array from a list meanwhile."""
    opt, step, plan = an_optimizer()
    arrays, counts = [opt.state[name][key] for name in opt.state for key in "mv"], []

    def count():
        counts.append([sys.getrefcount(array) for array in arrays])

    count()
    launched(step, plan, count)
    count()
    before, meanwhile, after = counts
    assert after == before and meanwhile == [one + 1 for one in before]


def test_a_second_step_amid_the_update_of_the_first_is_refused_and_no_reference_is_lost(launched):
    opt, step, plan = an_optimizer()
    others, said = [np.ones(N, "f4"), np.ones(5, "f4")], []

    def step_again():
        try:
            opt.step(others)
        except ValueError as error:
            said.append(str(error))

    before = [sys.getrefcount(array) for array in others]
    launched(step, plan, step_again)
    assert "is under way in another thread" in said[0]
    assert [sys.getrefcount(array) for array in others] == before


def test_threads_update_a_calls_own_table_with_scalars_of_its_own(launched, a_call):
    """Another thread may make a call of the same Plan meanwhile."""
    repeat, plan = a_call
    table, *_, scalars_at, scalars = launched(repeat, plan)
    begin, n_bytes = plan().memory.ctypes.data, plan().memory.nbytes
    assert not any(begin <= address < begin + n_bytes for address in (table, scalars_at))
    assert scalars == plan().scalars.tolist()


@pytest.mark.usefixtures("safe_threads")
def test_other_python_threads_run_while_threads_update():
    """One that asks for Python's lock all the time gets it amid a step. It would never be given it by the interpreter."""
    _, step, plan = an_optimizer(2_000_000)
    for _ in range(5):
        step()
    assert starts_threads(plan())
    turns, stop, interval = [0], threading.Event(), sys.getswitchinterval()

    def take_turns():
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)

    other = threading.Thread(target=take_turns)
    other.start()
    sys.setswitchinterval(1000)
    try:
        ran = 0
        for _ in range(300):
            before = turns[0]
            step()
            ran += turns[0] > before
            if ran == 5:
                break
        assert ran == 5  # a request from before the interval was set may be granted once
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()


# What a thread raises


@pytest.mark.parametrize("fails", ["a thread of the pool", "the calling thread", "both"])
def test_an_error_of_a_part_is_raised_when_no_part_runs_any_more(fails):
    at_once, ended, pool = threading.Barrier(3), [], itertools.count()

    def serial(table, first, last):
        at_once.wait(timeout=60)  # each part has a thread of its own
        caller = threading.current_thread() is threading.main_thread()
        if (caller and fails != "a thread of the pool") or (not caller and not next(pool) and fails != "the calling thread"):
            raise ArithmeticError(f"of elements {first} to {last}")
        if not caller:
            time.sleep(0.3)
        ended.append((first, last))

    with pytest.raises(ArithmeticError, match="of elements"):
        cpu_threads.in_python_threads(serial, None, 30, 3, ())
    assert len(ended) == (1 if fails == "both" else 2)


def can_raise(function, *arguments):
    """Whether the machine code of a function has an exception to raise, or asks for memory."""
    afresh = numba.njit(error_model="numpy")(function)  # what comes out of the cache on disk has no text
    afresh(*arguments)
    (code,) = afresh.inspect_llvm().values()
    return "picklebuf" in code or "NRT_Allocate" in code or "NRT_MemInfo_alloc" in code


def test_what_can_raise_is_found():
    def refuses(x):
        if x < 0:
            raise ValueError("negative")
        return x

    assert can_raise(refuses, 1) and can_raise(lambda n: np.zeros(n)[0], 1)
    assert not can_raise(lambda x, y: x / y, 1, 2)


FORMS = {name: measured.form_and_scalars(case) for name, case in measured.FORMS.items()}


@pytest.mark.parametrize("name", few(FORMS, "float32", "8-bit state"))
def test_a_loop_raises_nothing_because_numba_drops_what_its_threads_raise(name):
    form, scalars = FORMS[name]
    table = np.zeros((0, PARAM + len(operands_of_form(form))), np.int64)
    assert not can_raise(numba_cpu.build(adam, form, "serial").py_func, table, 0, 0, 0, in_memory(scalars))


def test_nor_does_a_loop_of_sums():
    norm = norm_cpu.build(norm_order.Form(), "serial").py_func
    assert not can_raise(norm, np.zeros(norm_order.COLUMNS, np.int64), 0, 0, 0, 1, 0, 0)
    form, scalars = FORMS["8-bit state"]
    table = np.zeros(norm_order.OPERANDS + len(operands_of_form(form)), np.int64)
    change = change_cpu.build(form, "serial").py_func
    assert not can_raise(change, table, 0, 0, 0, 1, 0, np.array(scalars, np.float64).ctypes.data)


@pytest.mark.parametrize("call", ["a step", "a norm"])
def test_a_part_that_fails_in_a_thread_fails_the_call(monkeypatch, call):
    monkeypatch.setattr(cpu_threads, "numba_threads_are_safe", lambda: False)
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 2)
    both = threading.Barrier(2)

    def build(*form):
        def serial(table, first, last, *arguments):
            if first == last:
                return
            both.wait(timeout=60)
            if threading.current_thread() is not threading.main_thread():
                raise MemoryError("no room")

        return serial

    for module in (numba_cpu, norm_cpu):
        monkeypatch.setattr(module, "build", build)
    arrays = [np.ones(1 << 19, "f4") for _ in range(4)]
    with pytest.raises(RuntimeError if call == "a step" else MemoryError, match="no room"):
        gpuadam.adam_step(*arrays, 1) if call == "a step" else gpuadam.global_norm(arrays)


# When no thread can be had


def a_step_when_no_thread_starts():
    """What a step raises where the second thread of a pool cannot be started, and the array."""
    _ = steps_of_one(0), cpu_threads.n_threads()
    arrays, start, started = [np.ones(N, "f4") for _ in range(4)], threading.Thread.start, []

    def refuses(thread):
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    threading.Thread.start = refuses
    gpuadam.adam_step(*arrays, 1)
    return digest(arrays[:1])


@pytest.mark.parametrize("layer", few(["default", "workqueue"], "workqueue"))
def test_a_step_is_whole_when_the_system_gives_no_more_threads(layer):
    param = np.ones(1, "f4")
    gpuadam.adam_step(param, *(np.ones(1, "f4") for _ in range(3)), 1)
    got = process("a_step_when_no_thread_starts()", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="3")
    assert got == digest([np.repeat(param, N)])


@pytest.mark.parametrize("layer", few(["default", "workqueue"], "workqueue"))
def test_a_step_at_exit_is_done(layer):
    found = process("steps_at_exit()", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    assert found == [None, expected()[0]]


def steps_at_exit():
    steps_of_one(1)
    atexit.register(lambda: print(f', "{steps_of_one()}"]'))
    print("[", end="")


# Processes


def _steps_into(queue):
    queue.put(steps())


METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", few(METHODS, METHODS[0]))
@pytest.mark.exhaustive
def test_a_process_of_multiprocessing_gets_the_bits_of_the_serial_loop(method):
    found = process(f"steps_of_a_process({method!r})", NUMBA_THREADING_LAYER="default", NUMBA_NUM_THREADS="2")
    assert found == [expected(), 0]


def steps_of_a_process(method):
    steps_of_one(1)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_steps_into, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    return found, child.exitcode


RANK = """
import sys
from mpi4py import MPI
import test_cpu_threads as t
comm = MPI.COMM_WORLD
found = comm.gather((comm.rank, t.steps(), t.steps_at_once()))
if comm.rank == 0:
    print(t.json.dumps(found), flush=True)
"""


@pytest.mark.parametrize("layer", few(["default", "workqueue"], "workqueue"))
@pytest.mark.exhaustive
def test_ranks_of_mpi_get_the_bits_of_the_serial_loop(layer):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "NUMBA_NUM_THREADS": "2",
        "NUMBA_THREADING_LAYER": layer,
    }
    command = [libraries.mpiexec(), "-n", "2", sys.executable, "-m", "mpi4py", "-c", RANK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[rank, expected(), [expected()]] for rank in range(2)]
