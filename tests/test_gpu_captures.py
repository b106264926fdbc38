"""Captures by which gpuadam looks ahead, which may fail."""

import numpy as np
import pytest

import gpuadam
from gpuadam import backends
from gpuadam.cli import doctor

pytestmark = pytest.mark.gpu

LOADERS = ["cuModuleLoadData", "cuLibraryLoadData"]  # CuPy's and Numba's
SHAPES = {"w": (33, 70), "b": (5,), "u": (3000,), "s": (9, 10)}  # "s" will be strided: a launch of its own


@pytest.fixture
def kernels(backend, monkeypatch):
    """A backend that has loaded no kernel yet."""
    kernels = backends.load(backend)
    for name, value in (("_rehearsed", set()), ("capture_refused", "")):
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
