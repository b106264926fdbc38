import os

import numpy as np
import pytest

if os.environ.get("GPUADAM_GPU") == "host":  # before anything asks CuPy or numba-cuda for a device
    import stand_in

    DRIVER = stand_in.start()
else:
    DRIVER = None

from cases import ARCHITECTURES, COMPILERS, FORMS, KEY_FORMS

from gpuadam import testing
from gpuadam.backends import BACKENDS
from gpuadam.testing import required

pytest_plugins = ["pytester"]


def pytest_configure(config):
    if os.environ.get("GPUADAM_NO_POOL") == "1":  # each array is an allocation of its own, which compute-sanitizer watches
        pytest.importorskip("cupy").cuda.set_allocator(None)
    config.addinivalue_line("markers", "xdist_group(name): tests that pytest-xdist runs in one process")
    if np.float32(1e-38) * np.float32(0.01) == 0:
        raise pytest.UsageError("this thread flushes subnormal numbers to zero (FTZ), so no bits can be compared")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups there
def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if os.environ.get("GPUADAM_EVERY_ARCHITECTURE") != "1" and _is_one_too_many(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("library") in ("cupy", "numba-cuda"):
            item.add_marker("gpu")
        if "compiler" in params:  # under pytest-xdist, what one process has compiled serves all its tests
            item.add_marker(pytest.mark.xdist_group(f"{params['compiler']} {params.get('arch')}"))
        for job in {"of_eight", "of_four"} & {*getattr(item, "fixturenames", ()), params.get("of_job")}:
            item.add_marker(pytest.mark.xdist_group(job))  # what one job of ranks has found serves all its tests


def _is_one_too_many(item):
    """Whether a form is left out for an architecture: KEY_FORMS, which have every option, are for all, the others for two.

    GPUADAM_EVERY_ARCHITECTURE=1 leaves none out, and takes some minutes more.
    """
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name, arch = params.get("name"), params.get("arch")
    if "compiler" not in params or arch is None or name not in FORMS or name in KEY_FORMS:
        return False
    return arch not in ("sm_90", ARCHITECTURES[list(FORMS).index(name) % len(ARCHITECTURES)])


@pytest.fixture(autouse=True)
def nothing_a_gpu_would_not_do():
    """On the stand-in for the driver: what a test has enqueued is done at its end, and all of it was allowed."""
    if DRIVER is None:
        yield
        return
    DRIVER.begin()
    yield
    assert not DRIVER.end()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
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
    return pytest.importorskip("cupy")


@pytest.fixture
def cuda_torch():
    """PyTorch with CUDA, for tests with the marker gpu."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        (pytest.fail if required.gpu_is_required() else pytest.skip)("this torch has no CUDA")
    return torch


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return request.param


@pytest.fixture(params=COMPILERS)
def compiler(request):
    return request.param
