import os

import numpy as np
import pytest
from cases import ARCHITECTURES, COMPILERS
from libraries import LIBRARIES

import gpuadam


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): tests that pytest-xdist runs in one process")
    if np.float32(1e-38) * np.float32(0.01) == 0:
        raise pytest.UsageError("this thread flushes subnormal numbers to zero (FTZ), so no bits can be compared")


def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("library") in ("cupy", "numba-cuda"):
            item.add_marker("gpu")
        if "compiler" in params:  # under pytest-xdist, what one process has compiled serves all its tests
            item.add_marker(pytest.mark.xdist_group(f"{params['compiler']} {params.get('arch')}"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        name = getattr(item, "callspec", None) and item.callspec.params.get("library")
        for needed in [name] if name else ["cupy", "numba-cuda"]:
            status = gpuadam.backend_status()[needed]
            if not status.available:
                unavailable(f"{needed}: {status.reason}")


def unavailable(reason):
    """Skip, or fail where a GPU is required."""
    if os.environ.get("GPUADAM_REQUIRE_GPU") == "1":
        pytest.fail(f"GPUADAM_REQUIRE_GPU=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(params=list(LIBRARIES))
def library(request):
    """Every backend's own array library: the one fixture by which a test runs over all backends."""
    return LIBRARIES[request.param]()


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return request.param


@pytest.fixture(params=COMPILERS)
def compiler(request):
    return request.param
