"""Does `python -m gpuadam plan` predict what is then measured?

    python benchmarks/plan.py [--backend numba-cpu] [--sizes 3e5,3e6,3e7] [--forms NAME,NAME] [--seconds 10] [--out FOLDER]

In memory: `gpuadam/planning/model.py` predicts the step of every form and size from constants alone: for each form how many
elements a second its conversions and arithmetic allow, on small arrays; and the memory's rate, which is what the limit kernel
moves of float32. So the rows say whether bytes, or else elements, explain the times of all forms. On a busy machine,
NUMBA_NUM_THREADS=1 keeps threads from waiting for one another.

Over two ranks of MPI on this machine, of one thread each: `planning.Prediction` has the step from the rates of both processors
while both work, and from the latency and the bandwidth of their collectives, which a program that does nothing else measures on
40 million elements. With state in files, likewise: from how much longer the limit kernel takes over other files, of half a GB in
the system's cache, than over memory. Both are measured at the largest size and at twice that: what fits in the processors' caches
is faster, and of small steps in files most is what says on the disk that a step is under way.

No constant is fitted to the steps. Constants and steps are measured in turn, those of two ranks within a minute: a machine that
is shared is not as fast in one minute as in another. error_percent is (predicted / measured - 1) * 100, of 20th percentiles:
other programs take time from both. GPUs, networks and disks are not in it: what they would add has no row here.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jobs
import numpy as np
import peers
import report
import sharded

import gpuadam
from gpuadam import backends, planning, transports
from gpuadam.cli.measuring import constants, forms, measure, plots
from gpuadam.kernels import adam, limit
from gpuadam.kernels.operands import Arrays, bytes_moved_of, operands_of
from gpuadam.offload import folder as of_step
from gpuadam.offload import mapped, pipeline
from gpuadam.offload.chunks import SMALLEST_CHUNK
from gpuadam.planning import machines
from gpuadam.planning.machines import Link, Processor
from gpuadam.planning.model import kernel_seconds
from gpuadam.sharded.layout import CELL
from gpuadam.terminal import figures, output
from gpuadam.terminal.console import Table

# Forms of the step: the arguments of `planning.update`.
FORMS = {
    "float32": {},
    "bfloat16 param and grad": {"param": "bfloat16"},
    "bfloat16 param and grad + 16 bits": {"param": "bfloat16", "master": "remainder"},
    "float32 + bfloat16 copy and grad": {"param": "bfloat16", "master": "float32"},
    "bfloat16 state": {"state": "bfloat16"},
    "8-bit state": {"state": "8bit"},
    "AMSGrad": {"amsgrad": True},
    "EMA": {"ema": True},
    "float64": {"param": "float64"},
}
TWO_RANKS, IN_FILES = "float32 over 2 ranks", "float32 with state in files"
MESSAGE, FILE = 40_000_000, 480_000_000  # elements of the collectives, and bytes of the files, that constants are of
SLICES, ROUNDS = 6, 4  # of the time: in each of the slices constants are measured, then that many rounds of steps, or more
AIM = 25  # percent


def in_memory(backend, options, notes):
    """Yield rows of steps in memory."""
    kernels = backends.load(backend.name)
    updates = {name: planning.update(1, **FORMS[name]) for name in options.forms if name in FORMS}
    if not updates:
        return
    plain = Arrays()
    for n in report.numbers(options.sizes):
        needs = {name: sum(o.nbytes(n) for o in operands_of(update.arrays)) for name, update in updates.items()}
        fitting, left_out = peers.in_memory(needs, backend, n, taken=16 * n)  # by the limit's arrays
        notes += report.listed(left_out)
        if not fitting:
            continue
        contenders = {name: constants.launcher(kernels, updates[name].arrays, n, adam) for name in fitting}
        functions = [constants.launcher(kernels, plain, n, limit), *contenders.values()]
        formats = [updates[name].arrays for name in contenders]
        processor, times = _processor_and_steps(backend, kernels, formats, functions, n, options.seconds)
        rates = ", ".join(
            f"{name} {processor.rates[updates[name].arrays] / 1e9:.2f}e9" for name in contenders if processor.rates
        )
        notes.append(
            f"{n:,} elements: the limit kernel moves {processor.bandwidth / 1e9:.1f} GB/s; {1e6 * processor.launch:.1f} us a "
            f"launch; elements a second of each form: {rates or 'none, on a GPU'}"
        )
        yield [
            _row(backend, name, updates[name].arrays, n, seconds, processor)
            for name, seconds in zip(contenders, times, strict=True)
        ]
        del contenders, functions
        peers.release(backend)


def _processor_and_steps(backend, kernels, formats, functions, n, seconds):
    """Return the Processor and the seconds of the steps, all measured in turn. functions: the limit kernel, then the steps."""
    on_cpu = backend.memory == "CPU"
    small = [constants.launcher(kernels, Arrays(), constants.FEW, adam)]
    # a GPU's caches hold what it updates within a launch's time: what that takes says nothing of a rate
    small += [constants.in_caches(kernels, arrays) for arrays in formats if on_cpu]
    of_small: list[list[float]] = [[] for _ in small]
    of_steps: list[list[float]] = [[] for _ in functions]
    for _ in range(SLICES):
        found = measure.in_turn(kernels, small, seconds / SLICES / 4, **constants.ON_END)
        found += measure.in_turn(kernels, functions, seconds / SLICES, at_least=ROUNDS)
        for times, more in zip(of_small + of_steps, found, strict=True):
            times += more
    launch, *each = map(constants.typical, of_small)
    rates = {arrays: constants.rate(taken, launch) for arrays, taken in zip(formats, each, strict=False)}
    moving, *times = of_steps
    return Processor(bytes_moved_of(operands_of(Arrays()), n) / constants.typical(moving), launch, rates), times


def over_ranks(backend, options, notes):
    """Yield rows of sharded steps over two ranks."""
    if TWO_RANKS not in options.forms or backend.memory != "CPU":
        return
    try:
        found = jobs.run(__file__, 2, options.seconds, seconds=options.seconds)
    except output.CommandError as error:
        notes += report.listed({TWO_RANKS: error})
        return
    own = found["processor"]
    processor = Processor(own["bandwidth"], own["launch"], constants.rates_of(own))
    link = Link(found["bandwidth"], found["latency"])
    machine = machines.cpu_only("", processor, 1 << 40, 1 << 40, 1.0, 1.0)._replace(per_node=2, within=link)
    notes.append(
        f"two ranks: {own['bandwidth'] / 1e9:.1f} GB/s of memory each; a collective takes {1e6 * link.latency:.0f} us and "
        f"moves {link.bandwidth / 1e9:.2f} GB/s"
    )
    for n in _large(options):
        update = planning.update(n)
        predicted = planning.Prediction(planning.Way(True, "device"), update, machine, planning.Settings(world=2))
        measured = sharded.timed_job(2, sharded.VIEWS, n, options.seconds / 2)["seconds"]
        yield [_compared(backend, TWO_RANKS, n, measured, predicted.seconds, "collectives")]


def _large(options):
    largest = max(report.numbers(options.sizes))
    return largest, 2 * largest


def rank_main(seconds):
    """Measure, on a rank, what its collectives and its processor do while the others do the same; rank 0 prints it."""
    transport = transports.MPI()
    found = constants.of_processor("numba-cpu", [Arrays()], seconds / 4)
    bandwidths = transport.exchange(found["bandwidth"])
    small, large = (_collectives(transport, n) for n in (CELL * transport.size, MESSAGE))
    times: list[list[float]] = [[], []]
    until = time.perf_counter() + seconds / 2
    while transport.exchange(len(times[0]) < 5 or time.perf_counter() < until)[0]:
        for function, own in zip((small, large), times, strict=True):
            transport.exchange(None)
            began = time.perf_counter()
            function()
            own.append(time.perf_counter() - began)
    (latency, _), (taken, buckets) = ((constants.typical(own), f()) for own, f in zip(times, (small, large), strict=True))
    messages = transport.size - 1
    latency /= 2 * messages
    moved = 2 * messages / transport.size * 4 * MESSAGE
    found |= {"bandwidth": float(np.mean(bandwidths))}
    if transport.rank == 0:
        of_link = {"latency": latency, "bandwidth": moved / (taken - 2 * messages * buckets * latency)}
        print(json.dumps(of_link | {"processor": found}), flush=True)


def _collectives(transport, n):
    """Return a function that sums and collects n elements as a step does, in buckets, and returns how many those are."""
    part = CELL * transport.size
    n, bucket = -(-n // part) * part, min(planning.Settings().bucket // 4, n) // part * part
    whole, sums = np.ones(n, np.float32), np.ones(n // transport.size, np.float32)
    edges = [(start, min(start + bucket, n)) for start in range(0, n, bucket)]

    def collect():
        work = [
            transport.reduce_scatter(whole[start:stop], sums[start // transport.size : stop // transport.size])
            for start, stop in edges
        ]
        for one in work:
            one.wait()
        for one in [transport.all_gather(whole[start:stop]) for start, stop in edges]:
            one.wait()
        return len(edges)

    return collect


def in_files(backend, options, notes):
    """Yield rows of steps whose state is in files, which the system has in its cache."""
    if IN_FILES not in options.forms or backend.memory != "CPU":
        return
    kernels = backends.load(backend.name)
    own = constants.of_processor(backend.name, [Arrays()], options.seconds / 4)
    with tempfile.TemporaryDirectory(prefix="gpuadam-plan-") as folder, contextlib.ExitStack() as optimizers:
        pairs = _limits(kernels, Path(folder))
        for n in _large(options):
            opt = gpuadam.OffloadAdam(np.zeros(n, np.float32), state=Path(folder) / f"{n}")
            optimizers.enter_context(opt)
            pairs.append((opt.flush, functools.partial(opt.step, *measure.data({"grad": n}, "float32"))))
        before, functions = zip(*pairs, strict=True)
        times = measure.in_turn(kernels, functions, 2 * options.seconds, at_least=5, before=before)
        in_memory, of_files, *steps = times
    moving = constants.typical(in_memory)
    rate = 2 * FILE / (constants.typical(of_files) - moving)
    processor = Processor(7 * FILE / 2 / moving, own["launch"], constants.rates_of(own))
    machine = machines.cpu_only("", processor, 1 << 40, 1 << 40, rate, rate)
    notes.append(
        f"over files: the limit kernel moves {processor.bandwidth / 1e9:.1f} GB/s of memory; files in the cache are mapped and "
        f"let go at {rate / 1e9:.0f} GB/s"
    )
    for n, measured in zip(_large(options), steps, strict=True):
        update = planning.update(n)
        predicted = planning.Prediction(planning.Way(False, "files"), update, machine, planning.Settings())
        yield [_compared(backend, IN_FILES, n, measured, predicted.seconds, "bytes")]


def _limits(kernels, folder):
    """Return pairs of what prepares a run of the limit kernel, and the run: over arrays in memory, then over m and v in files.

    In chunks, as a step has them. The difference is what mapping files in the cache and letting go of them takes.
    """
    n, slots, case = FILE // 8, os.cpu_count() or 1, forms.FORMS["float32"]
    arrays = dict(zip(("param", "grad", "m", "v"), measure.data(n, "float32"), strict=True))
    in_files = dict(arrays)
    for name in ("m", "v"):
        of_step.reserve(folder / name, FILE // 2)
        in_files[name] = np.memmap(folder / name, np.float32, "r+")
        in_files[name][...] = arrays[name]
    maps = [(mapped.mapping_of(in_files[name]), in_files[name].ctypes.data) for name in ("m", "v")]
    mapped.drop_mapped([in_files["m"], in_files["v"]])
    size = SMALLEST_CHUNK // 8
    edges = [(start, min(start + size, n)) for start in range(0, n, size)]

    def fetch(edge, slot):
        for mapping, start in maps:
            mapping.populate(*(start + 4 * at for at in edge), writes=True)

    def update(edge, slot):
        with kernels.one_thread():
            forms.launcher(kernels, case, [array[slice(*edge)] for array in in_files.values()], limit)()

    def store(edge, slot):
        for mapping, start in maps:
            mapping.drop(*(start + 4 * at for at in edge))

    def flush():
        for name in ("m", "v"):
            in_files[name].flush()

    in_memory = forms.launcher(kernels, case, arrays.values(), limit)
    return [(flush, in_memory), (flush, lambda: pipeline.run(edges, fetch, update, store, slots))]


MEASURED = (in_memory, over_ranks, in_files)


def measure_rows(backend, options, notes):
    for measured in MEASURED:
        yield from measured(backend, options, notes)


def _row(backend, name, arrays, n, seconds, processor):
    predicted = kernel_seconds(arrays, operands_of(arrays), n, processor)
    moved = bytes_moved_of(operands_of(arrays), n)
    bound = "elements" if n / processor.rates.get(arrays, np.inf) > moved / processor.bandwidth else "bytes"
    return _compared(backend, name, n, seconds, predicted, bound, moved=moved)


def _compared(backend, name, n, seconds, predicted, bound, moved=None):
    """Return the row of a step that was measured, beside its prediction."""
    clock = "device" if backend.memory == "CUDA" else "host"
    contender = measure.KERNEL if name in FORMS else {TWO_RANKS: sharded.VIEWS, IN_FILES: "gpuadam.OffloadAdam"}[name]
    row = measure.row(
        "plan", contender, backend.name, n, state="in turn", clock=clock, dtype=name, seconds=seconds, moved=moved
    )
    error = 100 * (predicted / constants.typical(seconds) - 1)
    return row | {"bound": bound, "predicted_us": float(f"{1e6 * predicted:.6g}"), "error_percent": float(f"{error:.4g}")}


def table(rows):
    """Return the table of one size: a line for each form."""
    first = rows[0]
    title = f"plan: {first['elements']:,} elements, {first['backend']}, in turn"
    lines = []
    for row in rows:
        times = [report.time(row[key]) for key in ("p20_us", "p50_us", "p80_us")]
        predicted, error = report.time(row["predicted_us"]), f"{row['error_percent']:+.1f} %"
        lines.append([row["dtype"], predicted, row["bound"], *times, error])
    worst = max(abs(row["error_percent"]) for row in rows)
    caption = f"largest error {worst:.1f} %; the aim is {AIM} %"
    return Table(title, ("", "predicted", "bound by", "p20", "median", "p80", "error"), lines, caption=caption)


def draw(rows, path):
    """Draw predicted against measured times of all sizes and forms; within the band is within the aim."""
    figure, axes = figures.panels(1, 1, width=7, height=6)
    axis = axes[0][0]
    ends = [f(row[key] for row in rows for key in ("p20_us", "predicted_us")) for f in (min, max)]
    line = [ends[0] / 1.5, ends[1] * 1.5]
    axis.plot(line, line, color=plots.LIMIT, linewidth=1)
    axis.fill_between(line, [0.75 * x for x in line], [1.25 * x for x in line], color=plots.OTHER, alpha=0.25, linewidth=0)
    styles = itertools.product("os", (plots.OURS, *report.LINES, plots.OTHER))
    for name, (marker, color) in zip(dict.fromkeys(row["dtype"] for row in rows), styles, strict=False):
        own = [row for row in rows if row["dtype"] == name]
        axis.plot(
            [r["p20_us"] for r in own], [r["predicted_us"] for r in own], marker, color=color, markersize=5, label=name
        )
    axis.set(xscale="log", yscale="log", xlabel="measured us (20th percentile)", ylabel="predicted us")
    title = f"One update, predicted and measured; the band is {AIM} %"
    axis.set_title(title)
    axis.legend(fontsize=8, frameon=False)
    axis.grid()
    plots.save(figure, path, rows)


if __name__ == "__main__":
    sizes = {"CPU": "3e5,3e6,3e7", "CUDA": "4e6,6e7"}
    arguments = {"seconds": 10.0, "sizes": sizes, "table": ("backend", "elements"), "show": table}
    if "--rank" in sys.argv[1:2]:
        rank_main(float(sys.argv[2]))
    else:
        report.main("plan", __doc__, measure_rows, draw, **arguments, forms=[*FORMS, TWO_RANKS, IN_FILES])
