"""Backends that a test needs: without them it skips, or fails where a GPU is required."""

from __future__ import annotations

import os

from .. import backends, checks


def gpu_is_required():
    """Whether GPUADAM_REQUIRE_GPU=1 is set: a test that would skip for want of a GPU fails."""
    return os.environ.get("GPUADAM_REQUIRE_GPU") == "1"


def require_backends(*names: str) -> None:
    """Skip the test that calls it unless these backends can run here; the reason says what mends it. For tests under pytest.

    With GPUADAM_REQUIRE_GPU=1 a GPU backend that cannot run is a failure. Raises ValueError for an unknown name.

    >>> require_backends("numba-cpu")
    """
    import pytest

    for name in names:
        status = backends.backend_status()[checks.one_of(backends.BACKENDS, "name", name)]
        reason = f"{name}: {status.reason}. To mend it: {status.fix}"
        if not status.available and gpu_is_required() and backends.BACKENDS[name].memory == "CUDA":
            pytest.fail(f"GPUADAM_REQUIRE_GPU=1, but {reason}", pytrace=False)
        if not status.available:
            pytest.skip(reason)
