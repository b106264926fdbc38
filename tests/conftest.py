import gc
import os
import sys

import libraries
import numpy as np
import pytest

if os.environ.get("GPUADAM_GPU") == "host":  # before anything asks CuPy or numba-cuda for a device
    import stand_in

    DRIVER, WHY_NO_DRIVER = stand_in.start_or_say_why_not()
else:
    DRIVER, WHY_NO_DRIVER = None, ""

import cases
import kept
import short_run
from cases import ARCHITECTURES, COMPILERS

from gpuadam import testing
from gpuadam.backends import BACKENDS
from gpuadam.testing import required

sys.dont_write_bytecode = False  # tests start many processes, each of which would compile every file anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest_plugins = ["pytester"]

MADE_ONCE = {"of_eight", "of_four", "filled", "narrow_rows"}  # fixtures that take long


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run what takes long: see CONTRIBUTING.md")
    parser.addoption(
        "--part", metavar="K/N", help="only the K-th of N parts of the tests, K from 0; which one has a test is chance"
    )


def pytest_configure(config):
    cases.exhaustive = config.getoption("--exhaustive")
    if not hasattr(config, "workerinput"):  # in one process
        kept.tidy()
    if os.environ.get("GPUADAM_NO_POOL") == "1":  # each array is an allocation of its own, which compute-sanitizer watches
        libraries.imported("cupy").cuda.set_allocator(None)
    config.addinivalue_line("markers", "xdist_group(name): tests that pytest-xdist runs in one process")
    if np.float32(1e-38) * np.float32(0.01) == 0:
        raise pytest.UsageError("this thread flushes subnormal numbers to zero (FTZ), so no bits can be compared")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups there
def pytest_collection_modifyitems(config, items):
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("library") in ("cupy", "numba-cuda"):
            item.add_marker("gpu")
    short_run.select(config, items)
    libraries.mark(items)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "cuda_torch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_gpu("torch's CUDA runtime is its own"))
        if "compiler" in params:  # under pytest-xdist, what one process has compiled serves all its tests
            item.add_marker(pytest.mark.xdist_group(f"{params['compiler']} {params.get('arch')}"))
        for fixture in MADE_ONCE & {*getattr(item, "fixturenames", ()), params.get("of_job")}:
            item.add_marker(pytest.mark.xdist_group(fixture))  # what it has made in one process serves all its tests


def pytest_collection_finish(session):
    """Leave what is there now, millions of objects of tests to come, out of collections of garbage, a third of the run's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def nothing_a_gpu_would_not_do():
    """On the stand-in for the driver: what a test has enqueued is done at its end, and all of it was allowed."""
    if DRIVER is not None:
        DRIVER.begin()
    with pytest.MonkeyPatch.context() as patch:
        if DRIVER is not None or "PYTEST_XDIST_WORKER" in os.environ:  # its thread waits for no device
            patch.setattr("gpuadam.kernels.gpu_launch.alone", lambda: True)
        yield
    assert DRIVER is None or not DRIVER.end()


def pytest_runtest_setup(item):
    real = item.get_closest_marker("real_gpu")
    if real and DRIVER is not None:
        pytest.skip(f"only on a real GPU: {real.args[0]}")
    if item.get_closest_marker("gpu"):
        if WHY_NO_DRIVER:
            pytest.skip(WHY_NO_DRIVER)
        name = getattr(item, "callspec", None) and item.callspec.params.get("library")
        testing.require_backends(*([name] if name else ["cupy", "numba-cuda"]))


@pytest.fixture(params=list(BACKENDS))
def library(request):
    """Every backend's own array library: the one fixture by which a test runs over all backends."""
    return testing.array_backend(request.param)


@pytest.fixture(params=["cupy", "numba-cuda"])
def backend(request):
    """The name of each GPU backend, for tests with the marker gpu."""
    return request.param


@pytest.fixture
def cp():
    return libraries.imported("cupy")


@pytest.fixture(scope="session")
def torch():
    return libraries.imported("torch")


@pytest.fixture(params=["Adam", "AdamW"])
def pair(request, torch):
    """A class of gpuadam.torch, and torch's of the same name."""
    import gpuadam.torch

    return getattr(gpuadam.torch, request.param), getattr(torch.optim, request.param)


@pytest.fixture(scope="module")
def one_torch_thread(torch):
    """Have torch use one thread: its threads wait by spinning, and take the cores of tests that run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def driver():
    """The stand-in for the CUDA driver, for tests with the marker gpu that only it can tell the answer of."""
    if DRIVER is None:
        pytest.skip("looks into the stand-in for the driver: GPUADAM_GPU=host")
    return DRIVER


@pytest.fixture
def cuda_torch(torch):
    """PyTorch with CUDA, for tests with the marker gpu."""
    if not torch.cuda.is_available():
        required.skip_without_gpu("this torch has no CUDA")
    return torch


@pytest.fixture(scope="session")
def examples():
    """examples(few, many): how many examples of something a test looks at: few, or many with --exhaustive."""
    return cases.examples


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return request.param


@pytest.fixture(params=COMPILERS)
def compiler(request):
    return request.param
