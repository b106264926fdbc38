"""The facts of a measurement: the processor, the GPU, and the version of every package that can change the result."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import llvmlite.binding

from ... import __version__, backends

PACKAGES = (
    *("numpy", "numba", "llvmlite", "cupy-cuda12x", "cupy-cuda13x", "cupy", "numba-cuda", "cuda-bindings"),
    *("torch", "jax", "optax", "deepspeed"),
)


def versions():
    """Return {package: version} of every package that can change a result; None for one that is not installed."""
    return {"gpuadam": __version__, "python": platform.python_version()} | versions_of(PACKAGES)


def versions_of(packages):
    """Return {package: version, or None if it is not installed}, without importing any."""
    installed: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def machine():
    """Return date, operating system, processor and number of cores."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpu_name():
    """Return the name of the processor, and LLVM's of its kind, which says more: a virtual machine may be told "EPYC" alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())} ({llvmlite.binding.get_host_cpu_name()})"


@functools.cache
def of_backend(name):
    """Return the facts in a row: of the machine, of the GPU if the backend has one, and the versions."""
    facts = machine()
    device, driver = _gpu(name) if backends.BACKENDS[name].memory == "CUDA" else (facts["cpu"], None)
    return facts | {"device": device, "driver": driver} | versions()


def _gpu(backend):
    """Return the GPU's name and its driver's version."""
    name = backends.load(backend).device_name()
    if not shutil.which("nvidia-smi"):
        return name, "unknown: there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return name, "unknown: nvidia-smi did not answer"
    return name, done.stdout.splitlines()[0] if done.returncode == 0 else f"unknown: nvidia-smi failed ({done.returncode})"
