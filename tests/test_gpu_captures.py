"""Captures: those by which gpuadam looks ahead, which may fail, and those of programs, in which steps are made."""

import contextlib
import gc
from types import SimpleNamespace

import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam import backends
from gpuadam.cli import doctor
from gpuadam.kernels import gpu_driver, gpu_table
from gpuadam.kernels.gpu_batch import Place

pytestmark = pytest.mark.gpu

LOADERS = ["cuModuleLoadData", "cuLibraryLoadData"]  # CuPy's and Numba's
SHAPES = {"w": (33, 70), "b": (5,), "u": (3000,), "s": (9, 10)}  # "s" will be strided: a launch of its own
GLOBAL, RELAXED = 0, 2  # the modes of torch.cuda.graph, and of CuPy


@pytest.fixture
def kernels(backend, monkeypatch):
    """A backend that has loaded no kernel yet."""
    kernels = backends.load(backend)
    for name, value in (("_rehearsed", set()), ("_launched", set()), ("capture_refused", "")):
        monkeypatch.setattr(kernels, name, value)
    return kernels


@pytest.fixture
def cold(cp, backend, kernels):
    """Have the libraries load each kernel anew."""
    if backend == "cupy":
        from gpuadam.kernels import cupy_kernels

        for build in (cupy_kernels.build, cupy_kernels.build_scalars, cupy_kernels.build_sums):
            build.cache_clear()
        cp.clear_memo()
    else:
        from gpuadam.kernels import numba_cuda_backend

        numba_cuda_backend.compiled.cache_clear()
        numba_cuda_backend._configured.cache_clear()


def numbers(seed, names=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(SHAPES[name]).astype("f4") for name in names}


def on_gpu(cp, given):
    strided = {name: cp.asarray(np.repeat(x, 2, axis=1))[:, ::2] for name, x in given.items() if name == "s"}
    arrays = {name: cp.asarray(x) for name, x in given.items()} | strided
    cp.cuda.Device().synchronize()
    return arrays


class Twins:
    """An optimizer on a GPU, and one on the CPU whose bits it should have."""

    def __init__(self, cp, backend, names=SHAPES, **options):
        self.cp, self.names = cp, names
        self.params, self.grads = (on_gpu(cp, numbers(seed, names)) for seed in range(2))
        self.on_host, lr = numbers(0, names), cp.full(1, 0.1) if options else 0.1
        self.opt = gpuadam.Adam(self.params, lr=lr, backend=backend, **options)
        self.reference = gpuadam.Adam(self.on_host, lr=0.1)
        self.synchronize = cp.cuda.Device().synchronize
        self.synchronize()

    def set(self, seed):
        """Write other numbers into the gradients."""
        write(self.cp, self.grads, numbers(seed, self.names))

    def step(self, seed, **options):
        self.set(seed)
        self.opt.step(self.grads, **options)
        self.reference.step(numbers(seed, self.names), **options)

    def check(self):
        self.synchronize()
        for name, x in self.params.items():
            assert x.get().tobytes() == self.on_host[name].tobytes(), name


def write(cp, arrays, given):
    """Write numbers of the host into arrays on the GPU, in the order of the current stream."""
    for name, x in given.items():
        if name == "s":
            arrays[name][...] = cp.asarray(x)
        else:
            arrays[name].set(x)


# Captures of gpuadam's own

LAUNCHES, READS = "it was ended before the launch", "its graph cannot be read"
FAILURES = {
    "it does not begin": ("UNSUPPORTED", ["cuStreamBeginCapture_v2"]),
    "it ends invalid": ("INVALIDATED", ["cuStreamEndCapture"]),
    LAUNCHES: ("INVALIDATED", ["cuLaunchKernel", "cuLaunchKernelEx"]),
    READS: ("UNSUPPORTED", ["cuGraphGetNodes"]),
}
ONCE_AND_ALWAYS = [
    (what, often) for what in FAILURES for often in ("once", "always") if (what, often) != (LAUNCHES, "always")
]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("what, often", ONCE_AND_ALWAYS)
def test_a_capture_that_fails_leaves_the_step_as_it_is(cp, backend, driver, kernels, what, after, often):
    """Each launch is made once, in a step of two batches, whichever capture fails."""
    (error, names), always = FAILURES[what], often == "always"
    twins = Twins(cp, backend)
    for seed in range(1, 6):  # the first rehearses the kernels, the second records the launches
        twins.set(seed)
        driver.listen()
        if seed <= 2 or always:
            driver.fail(after, f"STREAM_CAPTURE_{error}", names, always)
        twins.opt.step(twins.grads)
        came = not driver.fail_no_more()
        assert len(driver.launches) == 2 and not driver.captures
        assert came == (seed == 2 or (seed == 1 and what != READS) or (seed > 2 and not always))
        twins.reference.step(numbers(seed))
        twins.check()
    not_recorded = [not batch.recorded for batch in twins.opt.kept_batches()]
    assert sum(not_recorded) == (2 if always and (after == 0 or what == READS) else 1)  # each graph is read by two calls


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["host", "capturable"])
def test_where_a_capture_loads_no_kernel_the_launch_does(cp, backend, driver, cold, kernels, options):
    """As with drivers of CUDA 12.2 and before."""
    driver.loads_while_capturing = False
    twins = Twins(cp, backend, ["w", "b"], **options)
    driver.listen()
    for seed in range(1, 5):
        twins.step(seed)
    loads = [name for name in driver.calls if name in LOADERS]
    assert len(loads) == 2 * (1 + len(options))  # each is refused first, in its rehearsal
    assert "STREAM_CAPTURE_UNSUPPORTED" in kernels.capture_refused
    twins.check()
    if not options:
        assert all(batch.recorded for batch in twins.opt.kept_batches())  # by then the kernel is there


def test_a_load_that_fails_once_for_a_capture_is_made_again(cp, backend, driver, cold, kernels):
    twins = Twins(cp, backend, ["w"])
    driver.fail(0, "STREAM_CAPTURE_INVALIDATED", LOADERS)
    for seed in range(1, 4):
        twins.step(seed)
    assert not driver.fail_no_more()
    twins.check()


def test_a_kernel_that_was_launched_is_not_rehearsed_when_gradients_move(cp, backend, driver, kernels):
    """Else a driver that captures nothing is asked to at each step."""
    twins, n = Twins(cp, backend), []
    for seed in range(1, 4):
        twins.grads = on_gpu(cp, numbers(seed))
        driver.listen()
        driver.fail(0, "STREAM_CAPTURE_UNSUPPORTED", ["cuStreamBeginCapture_v2"], always=True)
        twins.step(seed)
        n.append(driver.calls.count("cuStreamBeginCapture_v2"))
    assert n == [2, 0, 0]
    twins.check()


@pytest.mark.parametrize("what", FAILURES)
def test_another_error_is_raised_before_anything_is_written(cp, backend, driver, kernels, what):
    twins = Twins(cp, backend)
    if what == READS:
        twins.step(1)
    driver.fail(0, "OUT_OF_MEMORY", FAILURES[what][1])
    with pytest.raises(Exception, match="OUT_OF_MEMORY"):
        twins.opt.step(twins.grads)
    assert not driver.fail_no_more()
    twins.check()
    twins.step(2)
    twins.check()


def test_doctor_says_why_no_launch_is_repeated(backend, driver, kernels):
    driver.fail(0, "STREAM_CAPTURE_UNSUPPORTED", ["cuStreamBeginCapture_v2"], always=True)
    said = doctor._launches(backend)
    assert said.startswith(doctor.BY_LIBRARY) and "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (cuStreamBeginCapture_v2)" in said
    assert not driver.fail_no_more()


# Captures of programs


@contextlib.contextmanager
def captured(stream, mode=GLOBAL):
    """Capture what is put on a stream. What is yielded has the `graph` afterwards, and how many `nodes` it has."""
    made = SimpleNamespace()
    with stream:
        stream.begin_capture(mode)
        try:
            yield made
        finally:
            made.graph = stream.end_capture()
    status, _, made.nodes = libraries.imported("cuda.bindings.driver").cuGraphGetNodes(made.graph.graph)
    assert not int(status)


@pytest.fixture
def streams(cp):
    return [cp.cuda.Stream(non_blocking=True) for _ in range(2)]


@pytest.mark.parametrize("names", [["w"], SHAPES], ids=["one array", "several"])
def test_a_step_whose_kernel_is_not_there_is_refused_and_the_capture_goes_on(cp, backend, cold, streams, names):
    twins, grads = Twins(cp, backend, names, capturable=True), on_gpu(cp, numbers(1, names))
    with captured(streams[0]) as empty, pytest.raises(RuntimeError, match="before the capture"):
        twins.opt.step(grads)
    assert empty.nodes == 0
    with streams[0]:
        twins.step(1)
        twins.step(2)
    with captured(streams[0]) as made:
        twins.opt.step(grads)
    made.graph.launch(streams[0])
    twins.reference.step(numbers(1, names))
    twins.check()


def test_a_kernel_of_as_many_dimensions_may_be_another_one(cp, backend, cold, streams):
    """Dimensions that are stepped through as one are merged, and the kernel has those that are left."""
    lr, whole = cp.full(1, 0.1), [cp.ones((9, 20), "f4") for _ in range(2)]
    merged, rows = ([x[:, ::2] for x in whole], [x[:, :10] for x in whole])
    ours, others = (gpuadam.Adam([param], lr=lr, capturable=True, backend=backend) for param, _ in (merged, rows))
    cp.cuda.Device().synchronize()
    with streams[0]:
        ours.step([merged[1]])
        streams[0].synchronize()
    with captured(streams[0]) as empty, pytest.raises(RuntimeError, match="before the capture"):
        others.step([rows[1]])
    assert empty.nodes == 0


def test_a_norm_whose_kernels_are_not_there_is_refused_and_the_capture_goes_on(cp, backend, cold, streams):
    given, out = numbers(1), cp.zeros(())
    grads = on_gpu(cp, given)
    with captured(streams[0]) as empty, pytest.raises(RuntimeError, match="before the capture"):
        gpuadam.global_norm(grads, out=out, backend=backend)
    assert empty.nodes == 0
    with streams[1]:
        gpuadam.global_norm(grads, out=out, backend=backend)
        out.fill(0)
        streams[1].synchronize()
    with captured(streams[0]) as made:
        gpuadam.global_norm(grads, out=out, backend=backend)
    assert made.nodes == 2  # the passes: the table is there
    made.graph.launch(streams[0])
    streams[0].synchronize()
    assert out.get() == gpuadam.global_norm(given)


@pytest.mark.parametrize(
    "mode, loads, options",
    [(GLOBAL, True, {}), (GLOBAL, False, {"max_norm": 1.0, "check_finite": True}), (RELAXED, True, {})],
    ids=["global", "clipped, with an old driver", "relaxed"],
)
def test_a_graph_has_gradients_of_its_own_as_in_torchs_recipe(cp, backend, request, kernels, streams, mode, loads, options):
    """Steps on one stream, then a capture on another one with gradients at new addresses, then steps of both kinds in turn."""
    if not loads:
        request.getfixturevalue("driver").loads_while_capturing = False
    twins, (warm, stream) = Twins(cp, backend, capturable=True), streams
    static, grads = on_gpu(cp, numbers(1)), on_gpu(cp, numbers(1))
    double = cp.ElementwiseKernel("float32 x", "float32 y", "y = x + x", "double_of_a_test")

    def backward():
        for name, x in static.items():
            double(x, grads[name])

    with warm:
        backward()  # compiles
        twins.step(1, **options)
        twins.step(2, **options)
        warm.synchronize()
    with captured(stream, mode) as made:
        backward()
        twins.opt.step(grads, **options)
    assert made.nodes == len(SHAPES) + 3 + len(options)  # the scalars, the table, the strided array; two passes of the norm
    for seed in range(3, 7):
        write(cp, static, numbers(seed))
        twins.synchronize()
        made.graph.launch(stream)
        stream.synchronize()
        twins.reference.step({name: x + x for name, x in numbers(seed).items()}, **options)
        twins.check()
        twins.step(seed, **options)  # with a table that must not take the graph's place
        gpuadam.global_norm(on_gpu(cp, numbers(seed)), backend=backend)
        gc.collect()
    twins.check()


def test_the_same_arrays_are_captured_on_another_stream(cp, backend, kernels, streams):
    """The graph takes the table that is there, which stays its own when other gradients have a table."""
    twins = Twins(cp, backend, capturable=True)
    with streams[0]:
        twins.step(1)
        streams[0].synchronize()
    n_buffers = len(gpu_table.buffers)
    with captured(streams[1]) as made:
        twins.opt.step(twins.grads)
    assert made.nodes == 3 and len(gpu_table.buffers) == n_buffers
    for seed in range(2, 5):
        twins.grads, own = on_gpu(cp, numbers(seed)), twins.grads
        twins.step(seed)
        twins.grads = own
        twins.set(seed + 10)
        twins.synchronize()
        made.graph.launch(streams[1])
        streams[1].synchronize()
        twins.reference.step(numbers(seed + 10))
    twins.check()


def test_a_table_is_on_the_device_when_it_is_captured(cp, backend, driver, streams):
    """A graph may be launched on any stream, which has waited for none."""
    kernels, contents = backends.load(backend), np.arange(100, dtype=np.uint8)
    before, stream = streams
    with kernels.on(0, before.ptr):
        table = gpu_table.Table(kernels, 0, contents.size, lambda address: contents)
        table.on_stream(Place(before.ptr, [], False))
    with captured(stream) as empty:
        table.on_stream(Place(stream.ptr, [], True))
        with gpu_driver.allowed_while_capturing():
            assert kernels.done(table._sent)
    assert empty.nodes == 0
    with captured(stream) as empty:
        other = gpu_table.Table(kernels, 0, contents.size, lambda address: contents)
        address = other.on_stream(Place(stream.ptr, [], True))
        there = cp.ndarray(100, "u1", cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(address, 100, other, 0), 0))
    assert empty.nodes == 0 and (there.get() == contents).all()
    table.release()
    other.release()
