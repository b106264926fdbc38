"""Launches that the driver repeats: the bits of the library's own, the scalars of each step, and nothing left behind."""

import gc
import threading

import numpy as np
import pytest

import gpuadam
from gpuadam import backends, testing
from gpuadam.kernels import gpu_driver, gpu_launch

pytestmark = pytest.mark.gpu
ALONE = gpu_launch.alone  # before a fixture replaces it


def optimizer(backend, n_arrays=1, strided=False, **options):
    """Return an optimizer, its parameters and its gradients."""
    library, rng = testing.array_backend(backend), np.random.default_rng(3)

    def arrays():
        numbers = [rng.standard_normal((9, 10)).astype("f4") for _ in range(n_arrays)]
        return [library.array(x)[:, ::2] if strided else library.array(x) for x in numbers]

    params, grads = arrays(), arrays()
    return gpuadam.Adam(params, lr=0.1, backend=backend, **options), params, grads


CASES = {
    "contiguous": {},
    "table": {"n_arrays": 3},
    "strided": {"strided": True},
    "with random bits": {"state_dtype": "bfloat16"},
    "8-bit": {"state_dtype": "8bit"},
    "RAdam": {"algorithm": "radam"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_driver_repeats_a_launch_with_the_bits_of_the_library(backend, case, monkeypatch):
    options = CASES[case] if case != "RAdam" else {}
    maker = gpuadam.RAdam if case == "RAdam" else None
    kernels, outcomes = backends.load(backend), []
    for repeats in (True, False):
        with monkeypatch.context() as patched:
            opt, params, grads = optimizer(backend, **options)
            opt = maker(params, lr=0.1, backend=backend) if maker else opt
            if not repeats:
                patched.setattr(type(kernels), "changing", lambda *arguments: None)
            opt.step(grads)
            opt.step(grads)
            run, runs = kernels.run, []
            patched.setattr(kernels, "run", lambda *arguments, run=run, runs=runs: runs.append(1) or run(*arguments))
            for rate in (0.3, 0.2, 0.1):
                opt.groups[0]["lr"] = rate
                opt.step(grads)
            assert len(runs) == (0 if repeats else 3)
            outcomes.append([testing.array_backend(backend).numpy(param).tobytes() for param in params])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_has_as_many_parameters_as_the_backend_says(backend, case, driver, monkeypatch):
    recorded, numbers = gpu_launch.recorded, []

    def noted(graph, changing, *arguments):
        (node,) = driver.graphs[graph.handle].nodes
        numbers.append((len(node.kernel.values), changing.n))
        return recorded(graph, changing, *arguments)

    monkeypatch.setattr(gpu_launch, "recorded", noted)
    opt, _, grads = optimizer(backend, **({} if case == "RAdam" else CASES[case]))
    for _ in range(3):
        opt.step(grads)
    ((there, said),) = numbers
    assert there == said


@pytest.mark.parametrize("shift", ["scalars", "key"])
def test_a_launch_that_is_not_as_it_should_be_is_left_to_the_library(backend, shift, monkeypatch):
    kernels = backends.load(backend)
    changing = type(kernels).changing

    def shifted(self, batch, form):
        found = changing(self, batch, form)
        return found._replace(scalars=found.scalars - 1) if shift == "scalars" else found._replace(key=0)

    recorded, results = gpu_launch.recorded, []
    monkeypatch.setattr(type(kernels), "changing", shifted)
    monkeypatch.setattr(gpu_launch, "recorded", lambda *arguments: results.append(recorded(*arguments)) or results[-1])
    (opt, params, grads), (other, same, _) = (optimizer(backend, state_dtype="bfloat16") for _ in range(2))
    other.repeats = False
    for _ in range(5):
        opt.step(grads)
        other.step(grads)
    assert results == [None, None]
    library = testing.array_backend(backend)
    assert library.numpy(params[0]).tobytes() == library.numpy(same[0]).tobytes()


@pytest.mark.parametrize("operations", [0, 1, 2])
def test_a_graph_without_a_kernel_alone_is_no_launch(cp, backend, operations):
    kernels, array = backends.load(backend), cp.zeros(5, "f4")
    owner, stream = kernels.new_stream()

    def enqueue():
        for value in range(operations):
            gpu_driver.call("cuMemsetD8Async", array.data.ptr, 1 + value, array.nbytes, stream)

    with kernels.on(0, stream):
        assert gpu_driver.Graph(stream, enqueue).kernel() is None
    del owner
    assert (array == 0).all()


def test_a_launch_goes_with_its_optimizer(backend, driver):
    gc.collect()
    before = len(driver.graphs)
    opt, _, grads = optimizer(backend)
    for _ in range(4):
        opt.step(grads)
    assert len(driver.graphs) == before + 1
    del opt
    gc.collect()
    assert len(driver.graphs) == before


def test_where_the_driver_does_not_tell_of_a_launch_the_library_makes_it(backend, driver):
    (opt, params, grads), (other, same, _) = (optimizer(backend) for _ in range(2))
    opt.step(grads)
    other.step(grads)
    driver.fail(0, "NOT_SUPPORTED", ["cuGraphKernelNodeGetParams_v2"])
    opt.step(grads)
    assert not driver.fail_no_more()
    other.step(grads)
    opt.step(grads)
    other.step(grads)
    library = testing.array_backend(backend)
    assert library.numpy(params[0]).tobytes() == library.numpy(same[0]).tobytes()


def test_a_launch_that_fails_says_so_and_changes_nothing(backend, driver):
    opt, params, grads = optimizer(backend)
    library = testing.array_backend(backend)
    for _ in range(4):
        opt.step(grads)
    before = library.numpy(params[0])
    driver.fail(0, "LAUNCH_OUT_OF_RESOURCES", ["cuLaunchKernelEx"])
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx"):
        opt.step(grads)
    assert (library.numpy(params[0]) == before).all() and opt.steps == 4
    opt.step(grads)
    assert (library.numpy(params[0]) != before).any() and opt.steps == 5


def test_nothing_is_captured_while_another_thread_might_wait_for_the_device(backend, monkeypatch):
    """A capture would make its wait fail, and would fail itself: the first one of a kernel, and the one of a launch to repeat."""
    monkeypatch.setattr(gpu_launch, "alone", ALONE)
    kernels, ended = backends.load(backend), threading.Event()
    for known in ("_rehearsed", "_launched"):
        monkeypatch.setattr(kernels, known, set())
    library, outcomes = testing.array_backend(backend), []
    thread = threading.Thread(target=ended.wait)
    for other_thread in (True, False):
        opt, params, grads = optimizer(backend, capturable=True)
        plain, *_ = optimizer(backend)
        with monkeypatch.context() as patched:
            if other_thread:
                thread.start()
                patched.setattr(kernels, "_captured", lambda *arguments: pytest.fail("a capture"))
            try:
                for _ in range(4):
                    opt.step(grads, max_norm=1.0)
                    plain.step(grads)
            finally:
                ended.set()
                thread.join()
        outcomes.append([library.numpy(param).tobytes() for param in params])
    assert outcomes[0] == outcomes[1]
