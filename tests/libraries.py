"""What only some tests need: without it they skip, or fail where the environment says that it is there.

    torch = libraries.imported("torch", reason="torch is not installed")

GPUADAM_REQUIRE_LIBRARIES="torch jax" is as GPUADAM_REQUIRE_GPU=1: a skip for want of one of these libraries is a failure.
"""

import os
import sys
from pathlib import Path

import pytest

from gpuadam.testing import required

VARIABLE = "GPUADAM_REQUIRE_LIBRARIES"


def imported(module, reason=None):
    """Return a module of a library; without it, skip the test that asks, or the whole file if it asks while it is imported."""
    try:
        return pytest.importorskip(module, reason=reason, exc_type=ImportError)
    except pytest.skip.Exception as skipped:
        name = module.partition(".")[0]
        return required.skip(str(skipped), name in os.environ.get(VARIABLE, "").split() and f"{VARIABLE} has {name}")


def mpiexec():
    """Return the path of mpiexec, which mpi4py starts ranks with."""
    imported("mpi4py", reason="mpi4py is not installed")
    found = Path(sys.executable).parent / "mpiexec"
    if not found.exists():
        pytest.skip(f"mpiexec is not installed beside {Path(sys.executable).name}: pip install mpich")
    return found
