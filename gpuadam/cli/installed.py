"""Which parts work beside the backends: checkpoints, and those that need an optional package. No package is imported for it."""

import importlib.metadata
import re
import tempfile
from pathlib import Path

import numpy as np

import gpuadam

from .. import backends
from . import contract
from .measuring import facts

OLDEST = {"torch": (2, 4)}
# As in pyproject.toml: the extras whose packages a user imports through gpuadam.
EXTRAS = {
    "gpuadam.torch": ("torch",),
    "demo": ("scikit-learn", "matplotlib"),
    "bench": ("matplotlib", "ml_dtypes"),
    "progress": ("rich",),
    "examples": ("scikit-learn", "matplotlib", "scikit-image"),
    "mpi": ("mpi4py", "mpich"),
}
ALSO_OF_THE_SYSTEM = ("mpich",)  # packages in whose place mpi4py takes a library of MPI that was there
OTHERS = ("ml_dtypes", "safetensors", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "pytest")
PACKAGES = tuple(dict.fromkeys((*OTHERS, *(package for packages in EXTRAS.values() for package in packages))))


def parts():
    """Return {name: `part`} of all parts."""
    return {
        "checkpoints": _checkpoints(),
        "pytest plugin": _pytest_plugin(),
        **{name: _extra(name) for name in EXTRAS},
    }


def part(works, reason, fix=""):
    """Return the report on a part. works: None if it is not installed. fix: how to mend it."""
    return {"works": works, "reason": reason, "fix": fix}


def _checkpoints():
    """Save and load state that holds every kind of number. No step is made, so nothing is compiled for it."""
    param, _, *moments = contract.arrays_of(contract.CONTRACTS["float32"])
    saved = dict(zip(("m", "v", "max_v"), moments, strict=True))
    try:
        opt = gpuadam.Adam({"w": param}, amsgrad=True, backend="numba-cpu")
        for name, values in saved.items():
            opt.state["w"][name][...] = values
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adam.safetensors")
            opt.save(path)
            loaded = gpuadam.load(path, {"w": param}, backend="numba-cpu").state["w"]
    except backends.BackendUnavailableError as error:
        return part(False, f"not tried: {error}", backends.backend_status()["numba-cpu"].fix)
    except (OSError, gpuadam.CheckpointError) as error:
        return part(False, f"a save and a load failed: {error}", "set TMPDIR to a folder that can be written, and has room")
    if all(np.array_equal(loaded[name].view("u4"), values.view("u4")) for name, values in saved.items()):
        return part(True, "state that was saved and loaded has the same bits")
    return part(False, "state that was saved and loaded has other bits", "please report it with this page")


def _pytest_plugin():
    plugins = importlib.metadata.entry_points(group="pytest11", name="pytest_gpuadam")
    if not plugins:
        return part(None, "not registered, because gpuadam runs from its folder", "pip install .")
    return part(True, f"registered as {next(iter(plugins)).value}")


def _extra(name):
    versions = facts.versions_of(EXTRAS[name])
    install = f'pip install "gpuadam[{name.removeprefix("gpuadam.")}]"'
    missing = [package for package, version in versions.items() if version is None]
    if [package for package in missing if package not in ALSO_OF_THE_SYSTEM]:
        return part(None, f"{', '.join(missing)} not installed", install)
    for package, oldest in OLDEST.items():
        if package in versions and tuple(map(int, re.findall(r"\d+", versions[package])[:2])) < oldest:
            return part(False, f"{package} {versions[package]} is older than {'.'.join(map(str, oldest))}", install)
    found = [f"{package} {version}" for package, version in versions.items() if version]
    return part(True, ", ".join(found + [f"without the package {package}" for package in missing]))
