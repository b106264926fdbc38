"""How fast is a step whose state is larger than the memory that it may take?

    python benchmarks/offload.py [--backend numba-cpu] [--sizes 8/1] [--seconds 60] [--out FOLDER]

A size is GB of state / GB of budget. Parameters and gradients are bfloat16, the state is float32: m, v and the master. Files go
where TMPDIR says.

On the CPU all of it is in files. The limit is to read and write the same bytes of the same files, with as many chunks under way,
and to compute nothing: the fastest of three ways, by calls that copy them into memory and back, in chunks as large as the step's
and in ones that stay in a core's cache, and by mapping them, where `kernels/limit.py` moves them. Files larger than the memory
come from the disk and go there, others from the system's cache. Before each turn the files are flushed to the disk, untimed.
But where parameters and state fit in the budget their pages stay mapped, and nothing is flushed: the system would have to note
again that each page is written, as it does for a program at most every few seconds.

What was tried and changed nothing, with 2 GB of state in the system's cache: chunks of 8, 16, 64 and 128 MB, three and four
chunks under way on two cores, pages that come by faults and not by `Mapping.populate`. Of a step's processor time without flushes
half is the update, 0.3 is populate and 0.15 is drop, both in ext4's notes on blocks to be written. Steps that go through the
chunks forward and backward in turn read half as much from the disk where the cache holds 0.6 of the files, but take no less time:
writing binds them.

On a GPU all of it is in pinned memory of the host, and may be more than the GPU's. The limit is the copies alone, in chunks of
the same size, in both directions at once; each direction by itself stands beside it. Beside a step of parameters and gradients
in pinned memory stands one of NumPy's own arrays, which the driver copies through pinned memory of its own. Pinned memory is no
other program's, and the system may end a program that takes too much. So a size that asks for more than half of what is
available is cut to that, and a budget to a quarter of the GPU's free memory.

Places in every part of the arrays are compared with `adam_step` in memory, bit for bit.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import report

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import forms, measure
from gpuadam.kernels import limit
from gpuadam.kernels.operands import GROUP
from gpuadam.offload import mapped, pipeline
from gpuadam.terminal import arguments

STEP = "gpuadam.OffloadAdam.step"
PAGEABLE = f"{STEP}, NumPy's own arrays"
CALLS, SMALL_CALLS = "limit: read and write calls", "limit: small read and write calls"
MAPPED, BOTH_WAYS = "limit: mapped, no arithmetic", "limit: copies both ways"
BYTES = {"m": 4, "v": 4, "master": 4, "param": 2, "grad": 2}
BYTES_OF_ALL = sum(BYTES.values()) / 12  # for each byte of state
READ, WRITTEN = ("m", "v", "master", "grad"), ("m", "v", "master", "param")
LR = 1e-2
PLACES, ELEMENTS = 64, 1 << 14  # that are compared
FEWEST = 3  # turns
OF_AVAILABLE = 1 / 2  # of the memory that is available, for all arrays beside a GPU
OF_GPU = 1 / 4  # of a GPU's free memory, for the budget: two optimizers have one each, and the copies as much
# Files that say what a group of processes may hold, what it holds, and where a line says how much of that are files' pages
CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
    *[tuple(f"sys/fs/cgroup/memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat"))],
)
IN_CACHE = 1 << 20  # bytes of a chunk


def measure_rows(backend, options, notes):
    for size in options.sizes:
        state, budget = state_and_budget(size)
        if backend.memory == "CUDA":
            state, budget = fitting(state, budget, backends.load(backend.name).memory_info()[0], notes)
        n = state // 12 // GROUP * GROUP
        measured = in_files if backend.memory == "CPU" else on_gpu
        with tempfile.TemporaryDirectory(prefix="gpuadam-offload-") as folder:
            times, peaks, where = measured(backend, n, budget, options.seconds, Path(folder), notes)
        fastest = min(np.median(seconds) for name, seconds in times.items() if name.startswith("limit"))
        rows = []
        for name, seconds in times.items():
            moved = {"copies to the GPU": READ, "copies from the GPU": WRITTEN}.get(name, (*READ, *WRITTEN))
            identity = {"state": where, "dtype": "bfloat16", "moved": n * sum(BYTES[array] for array in moved)}
            row = measure.row("offload", name, backend.name, n, seconds=seconds, **identity)
            rows.append(
                report.with_peak(row, peaks.get(name, ())) | {"x_limit": float(f"{np.median(seconds) / fastest:.6g}")}
            )
        yield rows


def state_and_budget(size):
    """Return the bytes of state and of the budget of a size, such as 8/1; a type of argparse, too."""
    state, slash, budget = size.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{size!r} is not GB of state / GB of budget, such as 8/1")
    return tuple(arguments.number(1e-6, unit=10**9)(part) for part in (state, budget))


def fitting(state, budget, free, notes):
    """Return the bytes of state and of the budget that there is room for, and add to the notes what was cut. free: of the GPU."""
    room = available()
    if room is not None and BYTES_OF_ALL * state > OF_AVAILABLE * room:
        asked, state = state, int(OF_AVAILABLE * room / BYTES_OF_ALL)
        notes.append(
            f"{asked / 1e9:.3g} GB of state were asked for, and {state / 1e9:.3g} GB measured: with parameters and gradients "
            f"they take half of the {room / 1e9:.3g} GB that are available"
        )
    if budget > OF_GPU * free:
        asked, budget = budget, int(OF_GPU * free)
        notes.append(
            f"a budget of {asked / 1e9:.3g} GB was asked for, and one of {budget / 1e9:.3g} GB measured: a quarter of the "
            f"{free / 1e9:.3g} GB that are free on the GPU"
        )
    return state, budget


def available(root=Path("/")):
    """Return how many bytes of the host's memory this process may still take, as far as Linux says; else None."""
    known = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        known += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for paths in CGROUPS:
        limit, held, stat = (root / path for path in paths)
        if limit.exists() and limit.read_text().strip() != "max":
            pages = (line.split() for line in stat.read_text().splitlines())
            of_files = sum(int(n) for name, n in pages if name in ("inactive_file", "active_file"))
            known.append(int(limit.read_text()) - int(held.read_text()) + of_files)
    return max(0, min(known)) if known else None


def in_files(backend, n, budget, seconds, folder, notes):
    """Return the times and the peaks of memory of a step over files and of what bounds it, and where the state was."""
    given = {name: np.memmap(folder / name, np.uint16, "w+", shape=(n,)) for name in ("param", "grad")}
    fill(given)
    param, grad = (gpuadam.Bits(array, "bfloat16") for array in given.values())
    options = {"state": folder / "state", "budget": budget, "update": "host", "master": "float32", "backend": backend.name}
    with gpuadam.OffloadAdam({"w": param}, lr=LR, **options) as opt:
        arrays = given | {name: opt.state["w"][name] for name in ("m", "v", "master")}
        before = sampled(arrays)
        for _ in range(FEWEST):
            opt.step({"w": grad})
        compare(before, sampled(arrays), opt, notes)
        size = opt._runner.room // sum(BYTES.values()) // GROUP * GROUP  # of a chunk, in elements
        paths = {name: (folder if name in given else folder / "state") / name for name in arrays}

        def flush():
            if opt._runner.keeps:
                return
            for array in given.values():
                array.flush()
            opt.flush()

        contenders = {
            STEP: lambda: opt.step({"w": grad}),
            CALLS: lambda: by_calls(paths, n, size, opt._runner.n_slots),
            SMALL_CALLS: lambda: by_calls(paths, n, IN_CACHE // sum(BYTES.values()), opt._runner.n_slots),
            MAPPED: lambda: by_mapping(backends.load(backend.name), arrays, n, size, opt._runner),
        }
        times, held = in_turn(contenders, seconds, flush)
        where = "files in the budget" if opt._runner.keeps else "files"
    peak, more = held[STEP]
    notes.append(
        f"at its peak in a step the process held {peak / 1e6:,.0f} MB, {more / 1e6:,.0f} MB more than before; the budget is "
        f"{budget / 1e6:,.0f} MB"
    )
    return times, {name: [more] for name, (_, more) in held.items()}, where


def edges_of(n, size):
    """Return where chunks of some elements begin and end."""
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def by_calls(paths, n, size, slots):
    """Read what a step reads into memory, and write what it writes from there. size: of a chunk, in elements."""
    memory = [{name: np.zeros(size * BYTES[name], np.uint8) for name in paths} for _ in range(slots)]

    def transfer(names, transferred):
        def stage(edge, slot):
            start, stop = edge
            for name in names:
                part = memory[slot][name][: (stop - start) * BYTES[name]]
                if transferred(files[name].fileno(), part, start * BYTES[name]) != part.size:
                    raise OSError(f"{paths[name]} was not transferred in one call")

        return stage

    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(path.open("r+b", buffering=0)) for name, path in paths.items()}
        fetch = transfer(READ, lambda file, part, offset: os.preadv(file, [part], offset))
        pipeline.run(edges_of(n, size), fetch, lambda edge, slot: None, transfer(WRITTEN, os.pwrite), slots)


def by_mapping(kernels, arrays, n, size, runner):
    """Map what a step reads and writes, move the bytes by the limit's kernel, and let go what a step lets go."""
    maps = {name: (mapped.mapping_of(array), array.ctypes.data) for name, array in arrays.items()}

    def over(action, names):
        def stage(edge, slot):
            for name in names:
                mapping, address = maps[name]
                action(mapping, name, *(address + k * BYTES[name] for k in edge))

        return stage

    def update(edge, slot):
        own = [arrays[name][slice(*edge)] for name in ("master", "grad", "m", "v", "param")]
        with kernels.one_thread():
            forms.launcher(kernels, forms.FORMS["float32 + bfloat16 copy and grad"], own, limit)()

    fetch = over(lambda mapping, name, start, end: mapping.populate(start, end, name in WRITTEN), maps)
    store = over(lambda mapping, name, start, end: mapping.drop(start, end), ["grad"] if runner.keeps else maps)
    pipeline.run(edges_of(n, size), fetch, update, store, runner.n_slots)


def on_gpu(backend, n, budget, seconds, folder, notes):
    """Return the times of a step over pinned memory of the host and of its copies alone, no peaks, and where the state was."""
    kernels = backends.load(backend.name)
    room = available()
    opt, grad, arrays, before = offloaded(kernels, n, budget, kernels.pinned)
    numpys = None
    if room is not None and 2 * sum(BYTES.values()) * n > OF_AVAILABLE * room:
        notes.append(f"not measured: {PAGEABLE} (with a state of its own it would take more than half of the memory)")
    else:
        numpys = offloaded(kernels, n, budget, lambda n_bytes: np.empty(n_bytes, np.uint8))
        numpys[0].step({"w": numpys[1]})
    opt.step({"w": grad})
    size = opt._runner.room // sum(BYTES.values()) // GROUP * GROUP
    edges = edges_of(n, size)
    memory = {name: [kernels.device_bytes(size * BYTES[name]) for _ in range(2)] for name in arrays}
    (up, up_handle), (down, down_handle) = kernels.new_stream(), kernels.new_stream()
    flat = {name: array.view(np.uint8) for name, array in arrays.items()}

    def copies(read, written):
        for start, stop in edges:
            for name in read:
                part = flat[name][start * BYTES[name] : stop * BYTES[name]]
                kernels.send(memory[name][0][1], part, part.size, up_handle)
            for name in written:  # to where nothing is lost
                part = sink[name][: (stop - start) * BYTES[name]]
                kernels.receive(part, memory[name][1][1], part.size, down_handle)
        for handle in (up_handle, down_handle):
            kernels.finish_stream(handle)

    sink = {name: kernels.pinned(size * BYTES[name]) for name in WRITTEN}
    contenders = {
        STEP: lambda: opt.step({"w": grad}),
        **({PAGEABLE: lambda: numpys[0].step({"w": numpys[1]})} if numpys else {}),
        BOTH_WAYS: lambda: copies(READ, WRITTEN),
        "copies to the GPU": lambda: copies(READ, ()),
        "copies from the GPU": lambda: copies((), WRITTEN),
    }
    times, _ = in_turn(contenders, seconds, lambda: None)
    compare(before, sampled(arrays), opt, notes)
    if numpys:
        opt, _, arrays, before = numpys
        compare(before, sampled(arrays), opt, notes)
    del up, down
    return times, {}, "pinned memory"


def offloaded(kernels, n, budget, allocate):
    """Return an optimizer on a GPU, the gradient, all arrays by name, and copies of places in them before the first step.

    allocate: of so many bytes of the host, for the parameter and the gradient.
    """
    given = {name: allocate(2 * n).view(np.uint16) for name in ("param", "grad")}
    fill(given)
    param, grad = (gpuadam.Bits(array, "bfloat16") for array in given.values())
    opt = gpuadam.OffloadAdam({"w": param}, lr=LR, budget=budget, update="device", master="float32")
    if opt._gpu is not kernels:
        sys.exit(f"offload: arrays of the host are updated by {opt._gpu.name} here: give --backend {opt._gpu.name}")
    arrays = given | {name: opt.state["w"][name] for name in ("m", "v", "master")}
    return opt, grad, arrays, sampled(arrays)


def in_turn(contenders, seconds, prepare):
    """Return the seconds of each run of each contender, and of each (the process's peak, how much more that is than before)."""
    times, held = {name: [] for name in contenders}, dict.fromkeys(contenders, (0, 0))
    deadline = time.perf_counter() + seconds
    while len(times[STEP]) < FEWEST or time.perf_counter() < deadline:
        for name, function in contenders.items():
            prepare()
            before = resident()
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
            peak = resident("VmHWM")
            held[name] = max(held[name], (peak, peak - before))
    return times, held


def resident(which="VmRSS"):
    """Return the bytes that the process holds, and begin to watch its peak; or the peak since. 0 where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return 0
    if which == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def fill(given):
    """Fill arrays with bfloat16 numbers of the size of weights and gradients, a block repeated."""
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * np.float32(0.02)
    block = (block.view(np.uint32) >> 16).astype(np.uint16)
    for array in given.values():
        block = np.roll(block, 1)
        for start in range(0, array.size, block.size):
            array[start : start + block.size] = block[: array.size - start]
            if isinstance(array, np.memmap):
                mapped.drop_mapped([array[start : start + block.size]])


def sampled(arrays):
    """Return copies of places in each array: the first, the last and some between."""
    n = arrays["param"].size
    length = min(ELEMENTS, n)
    starts = np.linspace(0, n - length, PLACES).astype(np.int64)
    copies = {name: np.stack([array[start : start + length] for start in starts]) for name, array in arrays.items()}
    mapped.drop_mapped(arrays.values())
    return copies


def compare(before, after, opt, notes):
    """Compare places with what `adam_step` makes of them, and end the process if a bit differs."""
    param, grad = (gpuadam.Bits(before[name], "bfloat16") for name in ("param", "grad"))
    for step in range(1, opt.steps + 1):
        gpuadam.adam_step(before["master"], grad, before["m"], before["v"], step, lr=LR, param_copy=param)
    different = sum(np.count_nonzero(before[name].view(np.uint8) != after[name].view(np.uint8)) for name in after)
    notes += [opt.describe(), f"{different} different bytes in {PLACES} places of each array after {opt.steps} steps"]
    if different or not np.count_nonzero(after["m"]):
        sys.exit(f"offload: {notes[-1]}")


def draw(rows, path):
    """Draw, for each backend and size, the time of each contender."""

    def title(backend, n, of_size):
        return f"{backend}: {n:,} elements\n{12 * n / 1e9:.3g} GB of state in {of_size[0]['state']}"

    report.draw_bars(rows, path, title, "median time of a step", width=6.5, height=2.8)


if __name__ == "__main__":
    sizes = dict.fromkeys(("CPU", "CUDA"), "8/1")
    report.main(
        "offload",
        __doc__,
        measure_rows,
        draw,
        seconds=60.0,
        sizes=sizes,
        sizes_help="GB of state / GB of budget",
        size=state_and_budget,
    )
