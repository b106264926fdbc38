"""Skip a test that needs something which is not here, or fail it where that is required."""

from __future__ import annotations

from .. import backends, checks
from ..kernels import switches


def skip(reason, required_by=""):
    """Skip the test, or the file, that calls it; fail it if `required_by` has a setting that forbids to skip."""
    import pytest

    if required_by:
        pytest.fail(f"{required_by}, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def skip_without_gpu(reason):
    """Likewise for want of a GPU, which GPUADAM_REQUIRE_GPU=1 requires."""
    skip(reason, switches.is_on("GPUADAM_REQUIRE_GPU") and "GPUADAM_REQUIRE_GPU=1")


def require_backends(*names: str) -> None:
    """Skip the test that calls it unless these backends can run here; the reason says what mends it. For tests under pytest.

    With GPUADAM_REQUIRE_GPU=1 a GPU backend that cannot run is a failure. Raises ValueError for an unknown name.

    >>> require_backends("numba-cpu")
    """
    for name in names:
        status = backends.backend_status()[checks.one_of(backends.BACKENDS, "name", name)]
        if not status.available:
            on_gpu = backends.BACKENDS[name].memory == "CUDA"
            (skip_without_gpu if on_gpu else skip)(f"{name}: {status.reason}. To mend it: {status.fix}")
