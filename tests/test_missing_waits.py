"""The stand-in for the driver notices a wait that is missing: each is taken out in turn, and the result is another.

Work is done as late as the order of streams and events allows, and by a seed in another order. So each test runs as it is, which
gives the CPU's bits, and without the wait, which gives others, or touches memory that is freed, under one of a few seeds.
"""

import contextlib

import numpy as np
import pytest
from gpu_work import Lent

import gpuadam
from gpuadam import testing
from gpuadam.kernels import gpu_table
from gpuadam.offload import chunks

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SEEDS = range(6)
SHAPES = {"w": (61, 77), "b": (5,), "u": (1234,)}


def host(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}


def on_gpu(cp, seed):
    return {name: cp.asarray(a) for name, a in host(seed).items()}


def a_step_on_another_stream(cp, backend):
    """The gradients are made on one stream, the step is taken on another, and the parameters are read on the first."""
    params, grads = on_gpu(cp, 0), on_gpu(cp, 1)
    opt = gpuadam.Adam(params, backend=backend)
    cp.cuda.Device().synchronize()
    first, second = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    with first:
        for grad in grads.values():
            grad *= 2
        opt.step(grads, stream=second)
        return [a.get() for a in params.values()]


def steps_by_turns_on_two_streams(cp, backend):
    """The table of the arrays is sent on the first stream, and read on the second."""
    params, grads = on_gpu(cp, 0), on_gpu(cp, 1)
    opt = gpuadam.Adam(params, backend=backend)
    cp.cuda.Device().synchronize()
    first, second = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    opt.step(grads, stream=first)
    opt.step(grads, stream=second)
    second.synchronize()
    first.synchronize()
    return [a.get() for a in params.values()]


def a_borrowed_gradient(cp, backend):
    """The lender drops its array at once, and its stream does not wait for the step's."""
    param = cp.asarray(host(0)["w"])
    m, v = cp.zeros_like(param), cp.zeros_like(param)
    cp.cuda.Device().synchronize()
    lender, stream = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    with lender:
        grad = cp.asarray(host(1)["w"])
        lender.synchronize()
    with stream:
        gpuadam.adam_step(*map(Lent, (param, grad, m, v)), 1, backend=backend)
        del grad
        lender.synchronize()
        return [param.get()]


def a_norm_that_the_host_reads(cp, backend):
    """The norm is computed on one stream, and copied to the host on the current one."""
    library = testing.array_backend(backend)
    grads = {name: library.array(a) for name, a in host(1).items()}
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    norm = gpuadam.global_norm(grads, backend=backend, stream=stream)
    return [cp.asarray(norm).get()]


def an_offloaded_step(cp, backend):
    params = on_gpu(cp, 0)
    opt = gpuadam.OffloadAdam(params, lr=0.1, update="device", budget=50_000, backend=backend)
    for step in range(2):
        opt.step(on_gpu(cp, 1 + step))
    return [a.get() for a in params.values()]


def nothing(*arguments, **options):
    """Wait for nothing."""


# What is done, and the wait that is taken out of it
MISSING = {
    "an event between streams": (a_step_on_another_stream, lambda k: (k, "order")),
    "the table's upload": (steps_by_turns_on_two_streams, lambda k: (k, "wait")),
    "borrowed memory": (a_borrowed_gradient, lambda k: (k, "keep_until_done")),
    "a norm's copy to the host": (a_norm_that_the_host_reads, lambda k: (k, "order")),
    "offload's slots": (an_offloaded_step, lambda k: (k, "finish")),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1 << 14)
    monkeypatch.setattr(gpu_table, "buffers", [])


def run(driver, cp, backend, action, seed):
    """Return the bytes of the result and what was forbidden, under a seed."""
    before, driver.work.seed = driver.work.seed, seed
    driver.begin()
    try:
        result = [a.tobytes() for a in action(cp, backend)]
        return result, driver.end()
    finally:
        driver.work.seed = before
        driver.begin()


@pytest.mark.parametrize("name", MISSING)
def test_a_wait_that_is_taken_out_is_noticed(driver, cp, backend, name, monkeypatch):
    action, where = MISSING[name]
    kernels = gpuadam.backends.load(backend)
    expected, problems = run(driver, cp, backend, action, 0)
    assert not problems
    for seed in SEEDS:
        assert run(driver, cp, backend, action, seed) == (expected, []), f"seed {seed}"
    monkeypatch.setattr(*where(kernels), nothing)
    noticed = []
    for seed in SEEDS:
        with contextlib.suppress(RuntimeError):  # of what a kernel touched
            result, problems = run(driver, cp, backend, action, seed)
            if result == expected and not problems:
                continue
        noticed.append(seed)
    print(f"{name} on {backend}: noticed with the seeds {noticed}")
    assert noticed
