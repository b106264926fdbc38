"""How does a step scale over ranks? Its phases, and the bytes that it sends, with 1, 2 and 4 ranks of MPI on one machine.

    python benchmarks/sharded.py [--sizes 2e7] [--seconds 20] [--out FOLDER]

strong: as many elements with any number of ranks. weak: as many for each rank. A rank has one thread, its gradients lie in their
places and the parameters are views, so that no step copies. Beside them `gpuadam.Adam` on one rank, and ShardedAdam on arrays
that it has to copy. A step's time is that of its slowest rank; the phases are the means of all ranks' medians: agree waits for
the last rank to come; reduce-scatter and all-gather are what is left of them after what overlaps; the rest is copies and Python.

All ranks share this machine's memory, whose bandwidth bounds the update: it shows what communication costs here and how it
grows, not how a network of machines scales. With more ranks than cores ranks wait for a core, too.

bytes sent are what each rank must send of the padded buffers, (ranks - 1) / ranks of them in each direction; x minimum is over
that of the elements alone, 2 * (ranks - 1) / ranks * 4 bytes. What an MPI library really moves is its own business.
"""

import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jobs
import numpy as np
import report

import gpuadam
from gpuadam import transports
from gpuadam.cli.measuring import facts, measure, plots
from gpuadam.kernels import messages
from gpuadam.terminal import figures
from gpuadam.terminal.console import Table

RANKS = (1, 2, 4)
VIEWS, ARRAYS, ADAM = "gpuadam.ShardedAdam, views", "gpuadam.ShardedAdam", "gpuadam.Adam"
PHASES = ("agree", "reduce_scatter", "update", "all_gather", "rest")
COLORS = ("#c9d2da", "#5b8c5a", plots.OURS, "#b5651d", "#70757a")


class Timed:
    """A transport that takes note of how long it was waited for, and of the bytes it was given."""

    def __init__(self, transport):
        self._transport = transport
        self.rank, self.size, self.memory, self.broadcast = (
            transport.rank,
            transport.size,
            transport.memory,
            transport.broadcast,
        )
        self.seconds, self.n_bytes = dict.fromkeys(PHASES, 0.0), 0

    def exchange(self, item):
        return self.timed("agree", self._transport.exchange, item)

    def reduce_scatter(self, buffer, part):
        return self._started("reduce_scatter", buffer, buffer, part)

    def all_gather(self, buffer):
        return self._started("all_gather", buffer, buffer)

    def _started(self, phase, buffer, *arguments):
        self.n_bytes += buffer.nbytes * (self.size - 1) // self.size
        return _Waited(self, phase, self.timed(phase, getattr(self._transport, phase), *arguments))

    def timed(self, phase, function, *arguments, **options):
        began = time.perf_counter()
        result = function(*arguments, **options)
        self.seconds[phase] += time.perf_counter() - began
        return result


class _Waited:
    def __init__(self, transport, phase, work):
        self._transport, self._phase, self._work = transport, phase, work

    def wait(self):
        self._transport.timed(self._phase, self._work.wait)


def rank_main(contender, n, seconds):
    """Time steps on this rank; rank 0 prints the seconds of each step and phase, those of the slowest rank, and the bytes."""
    transport = Timed(transports.MPI())
    block = np.random.default_rng(transport.rank).standard_normal(min(n, 1 << 20)).astype("f4")
    param, grad = np.zeros(n, "f4"), np.resize(block, n)
    if contender == ADAM:
        opt, grads = gpuadam.Adam(param), grad
    else:
        opt = gpuadam.ShardedAdam(param, transport, views=contender == VIEWS)
        for optimizer in filter(None, (bucket.optimizer for bucket in opt.buckets)):
            optimizer.step = functools.partial(transport.timed, "update", optimizer.step)
        grads = opt.grads if contender == VIEWS else grad
        opt.grads[...] = grad
    samples, phases = [], []
    for _ in range(2):  # compile, and touch all memory
        opt.step(grads)
    until = time.perf_counter() + seconds
    go_on = True
    while go_on:
        transport.seconds, transport.n_bytes = dict.fromkeys(PHASES, 0.0), 0
        began = time.perf_counter()
        opt.step(grads)
        samples.append(time.perf_counter() - began)
        phases.append(transport.seconds | {"rest": samples[-1] - sum(transport.seconds.values())})
        n_bytes = transport.n_bytes
        # rank 0's clock decides for all
        go_on = transport.exchange(len(samples) < 5 or time.perf_counter() < until)[0]
    everyone = transport.exchange((samples, phases))
    if transport.rank == 0:
        slowest = np.max([own for own, _ in everyone], axis=0).tolist()
        of_phases = {
            phase: statistics.mean(statistics.median(p[phase] for p in own) for _, own in everyone) for phase in PHASES
        }
        print(json.dumps({"seconds": slowest, "phases": of_phases, "n_bytes": n_bytes}), flush=True)


def timed_job(ranks, contender, n, seconds):
    return jobs.run(__file__, ranks, contender, n, seconds, seconds=seconds)


def measure_rows(backend, options, notes):
    if backend.name != "numba-cpu":
        notes.append(f"not measured: {backend.name} (several ranks need several GPUs)")
        return
    jobs.mpiexec()  # before any work, so that its absence is reported
    cores = facts.of_backend(backend.name)["cores"]
    if max(RANKS) > cores:
        notes.append(f"{max(RANKS)} ranks share {messages.how_many(cores, 'core')}")
    for n in report.numbers(options.sizes):
        rows = {"strong": [], "weak": []}
        for contender in (ADAM, ARRAYS, VIEWS):
            for ranks in (1,) if contender == ADAM else RANKS:
                for state in ("strong", "weak") if ranks > 1 else ("strong",):
                    size = n if state == "strong" else n * ranks
                    rows[state].append(_row(ranks, contender, backend.name, size, state, options.seconds / 6))
        one = [row for row in rows["strong"] if row["ranks"] == 1]
        yield rows["strong"]
        yield [row | {"state": "weak"} for row in one] + rows["weak"]


def _row(ranks, contender, backend, n, state, seconds):
    found = timed_job(ranks, contender, n, seconds)
    row = measure.row("sharded", contender, backend, n, state=state, seconds=found["seconds"])
    minimum = 2 * (ranks - 1) / ranks * 4 * n
    row |= {"ranks": ranks, "sent_mb": found["n_bytes"] / 1e6, "x_minimum": None}
    if ranks > 1:
        row["x_minimum"] = round(found["n_bytes"] / minimum, 6)
    return row | {f"{phase}_us": round(1e6 * found["phases"][phase], 3) for phase in PHASES}


def table(rows):
    """Return the table of one kind of scaling: a line for each contender and number of ranks."""
    title = f"sharded: {rows[0]['state']} scaling, float32, {rows[0]['backend']}"
    phases = (phase.replace("_", "-") for phase in PHASES)
    heads = ("", "ranks", "elements", "median", *phases, "MB sent", "x minimum")
    lines = []
    for row in rows:
        phases = ["" if row["contender"] == ADAM else report.time(row[f"{phase}_us"]) for phase in PHASES]
        minimum = "" if row["x_minimum"] is None else f"{row['x_minimum']:.4f}"
        median, sent = report.time(row["p50_us"]), f"{row['sent_mb']:,.1f}"
        figures = (f"{row['ranks']:g}", f"{row['elements']:,.0f}", median, *phases, sent, minimum)
        lines.append([row["contender"].removeprefix("gpuadam."), *figures])
    return Table(title, heads, lines)


def draw(rows, path):
    """Draw the phases of ShardedAdam's step against the number of ranks, for both kinds of scaling."""
    figure, axes = figures.panels(1, 2, width=5.2, height=3.8)
    for axis, state in zip(axes[0], ("strong", "weak"), strict=True):
        of_state = [row for row in rows if (row["state"], row["contender"]) == (state, VIEWS)]
        for at, row in enumerate(of_state):
            left = 0.0
            for phase, color in zip(PHASES, COLORS, strict=True):
                milliseconds = row[f"{phase}_us"] / 1e3
                axis.barh(at, milliseconds, 0.6, left, color=color, label=phase.replace("_", "-") if at == 0 else None)
                left += milliseconds
            axis.annotate(
                report.time(row["p50_us"]), (left, at), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_yticks(
            range(len(of_state)),
            [f"{row['ranks']:g} rank{'s' * (row['ranks'] > 1)}\n{row['elements']:,}" for row in of_state],
            fontsize=8,
        )
        axis.set_xlabel("milliseconds of a step")
        axis.margins(x=0.2)
        axis.set_title(f"{state} scaling, {VIEWS}", loc="left", fontsize=10, fontweight="bold")
    axes[0][0].legend(fontsize=7, frameon=False, loc="lower right")
    plots.save(figure, path, rows)


if __name__ == "__main__":
    if "--rank" in sys.argv[1:2]:
        contender, n, seconds = sys.argv[2:]
        rank_main(contender, int(n), float(seconds))
    else:
        sizes = dict.fromkeys(("CPU", "CUDA"), "2e7")
        report.main("sharded", __doc__, measure_rows, draw, seconds=20.0, sizes=sizes, table=("state",), show=table)
