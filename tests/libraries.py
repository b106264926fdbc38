"""What only some tests need: without it they skip, or fail where the environment says that it is there.

    torch = libraries.imported("torch", reason="torch is not installed")

GPUADAM_REQUIRE_LIBRARIES="torch jax" is as GPUADAM_REQUIRE_GPU=1: a skip for want of one of these libraries is a failure.
`-m beside` selects the tests that ask for a library of BESIDE, by themselves, in a fixture, or in a function that they call.
"""

import functools
import inspect
import os
import sys
import types
from pathlib import Path

import pytest

from gpuadam.testing import required

VARIABLE = "GPUADAM_REQUIRE_LIBRARIES"
BESIDE = ("torch", "jax", "optax", "thinc", "drjit")  # what gpuadam is compared with; no extra for tests brings them


def imported(module, reason=None):
    """Return a module of a library; without it, skip the test that asks, or the whole file if it asks while it is imported.

    One that is there and cannot be imported is a failure.
    """
    try:
        return pytest.importorskip(module, reason=reason, exc_type=ModuleNotFoundError)
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


def mark(items):
    """Mark the tests that ask for a library of BESIDE."""
    for item in items:
        definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        functions = [getattr(item, "function", None), *(found[-1].func for found in definitions.values())]
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        given = tuple(value for value in values if isinstance(value, str) and value in BESIDE)
        if _is_of(item) or any(_asks(function, given) for function in functions):
            item.add_marker("beside")


def _is_of(item):
    """Whether the file of a test has such a library as a name of its own, or is a docstring of `gpuadam.torch`."""
    module = getattr(item, "module", None)
    names = [value.__name__ for value in vars(module).values() if isinstance(value, types.ModuleType)] if module else []
    return bool({*names} & {*BESIDE}) or item.nodeid.startswith("gpuadam/torch/")


@functools.cache
def _asks(function, given, seen=()):
    """Whether a function, or one of its file that it names, calls `imported` with such a library, or with a value given to it."""
    if inspect.isclass(function):
        return any(_asks(method, given, seen) for method in vars(function).values() if inspect.isfunction(method))
    if not inspect.isfunction(function) or function in seen:
        return False
    code = function.__code__
    texts = [*given, *(x for x in code.co_consts if isinstance(x, str))]
    if "imported" in code.co_names and any(text.partition(".")[0] in BESIDE for text in texts):
        return True
    named = [function.__globals__.get(name) for name in code.co_names]
    own = [x for x in named if getattr(x, "__module__", None) == function.__module__]
    return any(_asks(x, given, (*seen, function)) for x in own if inspect.isfunction(x) or inspect.isclass(x))
