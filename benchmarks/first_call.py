"""How long does the first step take in a fresh process?

    python benchmarks/first_call.py [--backend numba-cpu] [--seconds 60] [--out FOLDER]

From after `import numpy` to the end of the first step on 1,000 elements: importing, making arrays, compiling. "cold cache": the
folders in which Numba, CuPy and the CUDA driver keep compiled kernels are new and empty; "warm cache": a second process with the
same folders. The files themselves are in the operating system's cache in both. `import gpuadam` is also given alone.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report

from gpuadam.cli.measuring import measure

ROOT = Path(__file__).parent.parent
N = 1000
IMPORT, FIRST_STEP = "import gpuadam", "gpuadam.adam_step"
START = f"""
import time
import numpy as np
arrays = [np.ones({N}, "float32") for _ in range(4)]
began = time.perf_counter()
"""
OURS = """
import gpuadam
imported = time.perf_counter() - began
from gpuadam import backends
kernels = backends.load({backend!r})
arrays = [kernels.from_host(a) for a in arrays]
gpuadam.adam_step(*arrays, step=1)
moment = kernels.now()
kernels.seconds_between(moment, moment)
print(imported, time.perf_counter() - began)
"""
TORCH_FUSED = """
import torch
param = torch.nn.Parameter(torch.tensor(arrays[0], device={device!r}))
param.grad = torch.tensor(arrays[1], device={device!r})
torch.optim.Adam([param], fused=True).step()
if param.is_cuda:
    torch.cuda.synchronize()
print(time.perf_counter() - began)
"""
OPTAX = """
import jax, optax
adam = optax.adam(1e-3)
device = jax.devices({platform!r})[0]
param, grad = (jax.device_put(a, device) for a in arrays[:2])
@jax.jit
def step(param, state, grad):
    updates, state = adam.update(grad, state, param)
    return optax.apply_updates(param, updates), state
jax.block_until_ready(step(param, adam.init(param), grad))
print(time.perf_counter() - began)
"""


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, options.peers)
    names = [peer.name for peer in present]
    device, platform = ("cuda", "gpu") if backend.memory == "CUDA" else ("cpu", "cpu")
    codes = {"torch fused": TORCH_FUSED.format(device=device), "optax under jit": OPTAX.format(platform=platform)}
    notes += report.listed({name: why for name, why in absent.items() if name in codes})
    times: dict[tuple[str, str], list[float]] = {}

    def add(name, state, seconds):
        times.setdefault((name, state), []).append(seconds)

    ours = OURS.format(backend=backend.name)
    deadline = None
    while deadline is None or time.perf_counter() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold cache", "warm cache"):
                imported, first_step = _seconds(ours, folder)
                add(IMPORT, "fresh process", imported)
                add(FIRST_STEP, state, first_step)
            for name, code in codes.items():
                if name in names:
                    add(name, "fresh process", *_seconds(code, folder))
        if deadline is None:
            deadline = time.perf_counter() + options.seconds
            if options.seconds:  # the first round has read the files from disk and written the bytecode
                times.clear()
    yield [
        measure.row("first_call", name, backend.name, N, state=state, clock="host", seconds=seconds)
        for (name, state), seconds in times.items()
    ]


def _seconds(code, folder):
    """Run code in a fresh process, whose compile caches are in a folder, and return the seconds that it prints."""
    caches = {name: str(Path(folder) / name) for name in ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**os.environ, **caches, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": ""},  # which would compile it each time
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [float(figure) for figure in done.stdout.split()]


def draw(rows, path):
    """Draw, for each backend, the seconds of each contender."""

    def title(backend, of_backend):
        return f"The first step of a process, {backend}"

    named = [row | {"contender": f"{row['contender']}, {row['state']}"} if "cache" in row["state"] else row for row in rows]
    panels = {"width": 7, "height": 3, "lines": (), "columns": ("backend",)}
    report.draw_bars(named, path, title, "median", **panels, series=(), log=False)


if __name__ == "__main__":
    table = ("backend", "elements")
    report.main("first_call", __doc__, measure_rows, draw, seconds=60.0, sizes=None, table=table)
