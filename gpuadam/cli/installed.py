"""What works beside the backends: checkpoints, and the parts that need an optional package. No package is imported for it."""

import importlib.metadata
import re
import tempfile
from pathlib import Path

import numpy as np

from .. import backends, optimizer
from ..checkpoint import CheckpointError, loading
from . import contract, output

TORCH = (2, 4)  # the oldest that gpuadam.torch takes
# As in pyproject.toml: the extras whose packages a user imports through gpuadam.
EXTRAS = {
    "demo": ("rich", "scikit-learn", "matplotlib"),
    "bench": ("rich", "matplotlib", "ml_dtypes"),
    "examples": ("rich", "scikit-learn", "matplotlib", "scikit-image"),
}
FURTHER = ("ml_dtypes", "safetensors", "mpi4py", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "pytest")
PACKAGES = tuple(dict.fromkeys((*FURTHER, *(package for needed in EXTRAS.values() for package in needed))))


def parts():
    """Return {part: {"works", "reason", "fix"}}; works is None for a part whose packages are not installed."""
    return {
        "checkpoints": _checkpoints(),
        "gpuadam.torch": _torch(),
        "pytest plugin": _pytest_plugin(),
        **{extra: _extra(extra) for extra in EXTRAS},
    }


def _part(works, reason, fix=""):
    return {"works": works, "reason": reason, "fix": fix}


def _checkpoints():
    """Save and load state that holds every kind of number. No step is made, so nothing is compiled for it."""
    param, _, *state = contract.arrays_of(contract.CONTRACTS["float32"])
    try:
        opt = optimizer.Adam({"w": param}, amsgrad=True, backend="numba-cpu")
        for name, values in zip(("m", "v", "max_v"), state, strict=True):
            opt.state["w"][name][...] = values
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adam.safetensors")
            opt.save(path)
            loaded = loading.load(path, {"w": param}, backend="numba-cpu")
    except backends.BackendUnavailableError as error:
        return _part(False, f"not tried: {error}", backends.backend_status()["numba-cpu"].fix)
    except (OSError, CheckpointError) as error:
        return _part(False, f"a save and a load failed: {error}", "set TMPDIR to a folder that can be written, and has room")
    same = all(
        np.array_equal(loaded.state["w"][name].view("u4"), values.view("u4"))
        for name, values in zip(("m", "v", "max_v"), state, strict=True)
    )
    if same:
        return _part(True, "state that was saved and loaded has the same bits")
    return _part(False, "state that was saved and loaded has other bits", "please report it with this page")


def _torch():
    (version,) = output.versions_of(["torch"]).values()
    install = 'pip install "gpuadam[torch]"'
    if version is None:
        return _part(None, "torch is not installed", install)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < TORCH:
        return _part(False, f"torch {version} is older than {'.'.join(map(str, TORCH))}", install)
    return _part(True, f"torch {version}")


def _pytest_plugin():
    plugins = importlib.metadata.entry_points(group="pytest11", name="pytest_gpuadam")
    if not plugins:
        return _part(None, "not registered, because gpuadam runs from its folder", "pip install .")
    return _part(True, f"registered as {next(iter(plugins)).value}")


def _extra(name):
    versions = output.versions_of(EXTRAS[name])
    if missing := [package for package, version in versions.items() if version is None]:
        return _part(None, f"{', '.join(missing)} not installed", f'pip install "gpuadam[{name}]"')
    return _part(True, ", ".join(f"{package} {version}" for package, version in versions.items()))
