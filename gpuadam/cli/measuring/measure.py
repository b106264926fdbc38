"""Timing, and the rows in which the benchmarks report: shared by `python -m gpuadam bench` and the scripts in benchmarks/.

Contenders take turns in one run, in a new order each round: what else the machine does touches all of them, and none runs more
often than another after one that empties the caches.
"""

import functools
import shutil
import subprocess
import time

import numpy as np

from ... import backends
from .. import output

ARRAYS_READ_AND_WRITTEN = 7  # reads param, grad, m and v; writes param, m and v
QUANTILES = (5, 20, 50, 80, 95)
KERNEL, CALL = "gpuadam kernel + launch", "gpuadam.adam_step"
LIMIT, TORCH_FUSED = "limit", "torch fused"
MEASURED = ("samples", *(f"p{q:02}_us" for q in QUANTILES), "gb_per_s", "x_limit", "x_torch_fused", "peak_mb")
# What identifies a row; what was measured; then what it was measured on and with.
COLUMNS = (
    *("benchmark", "contender", "backend", "dtype", "elements", "arrays", "state", "clock"),
    *MEASURED,
    *("device", "cpu", "cores", "system", "driver", "date", *output.versions()),
)
NUMBERS = {"elements", "arrays", "cores", *MEASURED}


def data(n, dtype, names=("param", "grad", "m", "v")):
    """Yield an array for each name: random numbers, repeated, that stay ordinary under step and limit, however often they run."""
    rng = np.random.default_rng(0)
    for name in names:
        block = rng.standard_normal(min(n, 1 << 20)).astype(dtype)
        yield np.resize(1 + block**2 if name in ("v", "max_v") else block, n)


def in_turn(kernels, functions, seconds, at_least=11):
    """Run functions one after the other, in a new order each round, and return the seconds of every run of each.

    The device's clock counts, so on a GPU each takes until its work is done. They run for about `seconds` in all.
    """
    shuffle = np.random.default_rng(0).permutation
    for _ in range(3):  # compile, and warm the caches up
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < deadline:
        # several rounds are enqueued before the first is waited for, so that a GPU does not idle between them
        rounds = []
        for _ in range(4):
            order = shuffle(len(functions))
            moments = [kernels.now()]
            for k in order:
                functions[k]()
                moments.append(kernels.now())
            rounds.append((order, moments))
        for order, moments in rounds:
            for k, start, end in zip(order, moments, moments[1:], strict=False):
                times[k].append(kernels.seconds_between(start, end))
    return times


def on_host(functions, finish, seconds, calls=1, at_least=11):
    """Likewise by the host's clock: the time until a call returns, which on a GPU is before its work is done.

    calls: how many each function makes in its turn. The first fifth of several finds the caches as the others left them and is
        not timed; of the rest the mean is one sample.
    finish: waits for whatever is still running. It is called between the turns and not timed, so that no queue fills up.
    """
    shuffle = np.random.default_rng(0).permutation
    for _ in range(3):
        for function in functions:
            function()
            finish()
    untimed = range(calls // 5)
    timed = range(calls - len(untimed))
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < deadline:
        for k in shuffle(len(functions)):
            function = functions[k]
            for _ in untimed:
                function()
            began = time.perf_counter()
            for _ in timed:
                function()
            times[k].append((time.perf_counter() - began) / len(timed))
            finish()
    return times


def drain(kernels):
    """Wait until the device has done all that was enqueued."""
    moment = kernels.now()
    kernels.seconds_between(moment, moment)


def row(
    benchmark,
    contender,
    backend,
    elements,
    *,
    state,
    clock="host",
    dtype="float32",
    arrays=1,
    seconds=(),
    moved=None,
    peak_bytes=(),
):
    """Return one row of the report, with the machine and the versions in it.

    state: in what state of caches, or of what, it was measured. clock: "host" or "device".
    seconds: samples of the time. moved: bytes that a step moves, if its throughput is of interest.
    peak_bytes: samples of the memory that was allocated at the peak.
    """
    result = dict.fromkeys(COLUMNS) | facts(backend)
    result |= {"benchmark": benchmark, "contender": contender, "backend": backend, "dtype": dtype, "elements": elements}
    result |= {"arrays": arrays, "state": state, "clock": clock, "samples": len(seconds) or len(peak_bytes)}
    if len(seconds):
        quantiles = zip(QUANTILES, np.percentile(seconds, QUANTILES), strict=True)
        result |= {f"p{q:02}_us": _short(1e6 * value) for q, value in quantiles}
    if moved:
        result["gb_per_s"] = _short(moved / np.median(seconds) / 1e9)
    if len(peak_bytes):
        result["peak_mb"] = _short(np.median(peak_bytes) / 1e6)
    return result


def add_ratios(rows):
    """Fill in how many times the limit's time and torch fused's each row of one run took, by the medians."""
    by_name = {row["contender"]: row["p50_us"] for row in rows}
    for column, base in (("x_limit", LIMIT), ("x_torch_fused", TORCH_FUSED)):
        if base in by_name:
            for each in rows:
                each[column] = _short(each["p50_us"] / by_name[base])
    return rows


def _short(x):
    return float(f"{x:.6g}")


@functools.cache
def facts(backend):
    """Return what a row says of the machine and of the versions."""
    machine = output.machine()
    on_gpu = gpu([backend])
    return {
        "device": on_gpu.get("gpu", machine["cpu"]),
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "system": machine["system"],
        "driver": on_gpu.get("driver"),
        "date": machine["date"],
    } | output.versions()


def gpu(names):
    """Return the GPU's facts if a backend among the names uses one."""
    if "cupy" in names:
        import cupy

        device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
        found = {"gpu": properties["name"].decode(), "compute_capability": device.compute_capability}
    elif "numba-cuda" in names:
        found = {"gpu": backends.load("numba-cuda").device_name()}
    else:
        return {}
    return found | {"driver": _driver()}


def _driver():
    if not shutil.which("nvidia-smi"):
        return "unknown: there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0] if done.returncode == 0 else f"unknown: nvidia-smi failed ({done.returncode})"
