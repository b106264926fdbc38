"""How much memory does a step take beyond its state?

    python benchmarks/memory.py [--backend numba-cpu] [--sizes 1e8] [--out FOLDER]

State is param, grad and the moments. Each contender does five steps in a fresh process; what the last one had at its peak beyond
what was there before it is reported. On the CPU it is the resident set, as the kernel counts it (its high-water mark is reset
before the step, which needs Linux), and, by tracemalloc, what Python and NumPy allocated. On a GPU it is what the library's
pool gave out, by CuPy's, torch's and JAX's own counts; for Numba, which has none, what the driver gave out while freeing was put
off.
"""

import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report

from gpuadam import backends
from gpuadam.cli.measuring import measure

ROOT = Path(__file__).parent.parent
OURS = ("gpuadam.adam_step", "gpuadam.Adam.step")
RESIDENT, TRACED, POOL = "resident set", "tracemalloc", "memory pool"


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, options.peers)
    notes += report.listed(absent)
    ours = [peer for peer in peers.OURS if peer.name in OURS]
    for n in report.numbers(options.sizes):
        measured = []
        deadline = time.perf_counter() + options.seconds
        samples: dict[tuple[str, str], list[float]] = {}
        for peer in [*ours, *present]:
            need = 4 * (peer.floats + 2) * n  # two more while the arrays are made
            if need > peers.free_bytes(backend):
                notes += report.listed({peer.name: f"it needs {need / 1e9:.1f} GB"})
            else:
                measured.append(peer)
        if not measured:
            continue
        while not samples or time.perf_counter() < deadline:
            for peer in measured:
                for state, peak in _in_fresh_process(backend, peer, n).items():
                    samples.setdefault((peer.name, state), []).append(peak)
        yield [
            report.with_peak(measure.row("memory", name, backend.name, n, state=state, clock=None), peaks)
            for (name, state), peaks in samples.items()
        ]


def _in_fresh_process(backend, peer, n):
    code = "import sys, memory; memory.report_peaks(*sys.argv[1:])"
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH"))))
    # glibc: every large array is mapped by itself and given back when it is freed, so that the resident set shows it
    env = os.environ | {"PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", code, backend.name, peer.name, str(n)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_peaks(backend_name, name, n):
    """Print the peaks of a step of one contender, in bytes; in a process of its own."""
    backend = backends.BACKENDS[backend_name]
    kernels = backends.load(backend.name)
    peer = next(peer for peer in (*peers.OURS, *peers.PEERS) if peer.name == name)
    contender = peer.build(backend, [(int(n),)])
    wait = peers.wait_for_all([contender], kernels)

    def step():
        contender.step()
        wait()

    for _ in range(4):  # compiles; torch makes its moments in the first one, and in the third ours repeats a step
        step()
    gc.collect()
    if backend.memory == "CUDA":
        pool = {"torch": _torch_pool, "optax": _jax_pool}.get(peer.package)
        pool = pool or {"cupy": _cupy_pool, "numba-cuda": _numba_driver}[backend.name]
        print(json.dumps({POOL: pool(step)}))
    else:
        print(json.dumps({RESIDENT: _resident(step), TRACED: _traced(step)}))


def _resident(step):
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _status("VmHWM")
    step()
    return _status("VmHWM") - before


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _traced(step):
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before


def _cupy_pool(step):
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    step()
    return pool.total_bytes() - before  # it keeps what it got until it is told to free it


def _numba_driver(step):
    from numba import cuda

    context = cuda.current_context()
    with cuda.defer_cleanup():
        before = context.get_memory_info().free
        step()
        return before - context.get_memory_info().free


def _torch_pool(step):
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _jax_pool(step):
    import jax

    device = jax.devices("gpu")[0]
    before = device.memory_stats()["bytes_in_use"]
    step()
    return device.memory_stats()["peak_bytes_in_use"] - before  # of all the steps so far, which are alike


def draw(rows, path):
    """Draw, for each backend and size, the peak of each contender."""

    def title(backend, n, of_size):
        return f"What a step allocates: {backend}, {n:,} float32\nOne array has {_megabytes(4 * n / 1e6)}"

    panels = {"width": 7, "height": 4, "lines": (), "columns": ("backend", "elements")}
    of_bars = {"value": "peak_mb", "text": _megabytes, "series": ("state",), "log": False}
    report.draw_bars(rows, path, title, "peak beyond its state", **panels, **of_bars)


def _megabytes(mb):
    return f"{mb:,.0f} MB" if mb >= 1 else f"{1000 * mb:,.0f} kB"


if __name__ == "__main__":
    sizes = dict.fromkeys(("CPU", "CUDA"), "1e8")
    report.main("memory", __doc__, measure_rows, draw, seconds=0.0, sizes=sizes, table=("backend", "elements"))
