"""How fast is one step on one large array, beside the memory's limit and other libraries?

    python benchmarks/large.py [--backend numba-cpu] [--sizes 1e5,1e6,2e7,1e8] [--seconds 10] [--out FOLDER]

Every contender has arrays of its own and takes its turn again and again. An array of 1e8 float32 and its gradient and moments are
1.6 GB for each of them: those that do not fit, or would take minutes, are left out and named.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report

from gpuadam import backends
from gpuadam.cli.measuring import measure, plots
from gpuadam.terminal import figures


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, options.peers)
    notes += report.listed(absent)
    kernels = backends.load(backend.name)
    clock = "device" if backend.memory == "CUDA" else "host"
    for n in report.numbers(options.sizes):
        fitting, left_out = peers.fitting([*peers.OURS, *present], n, backend)
        notes += report.listed(left_out)
        contenders = [peer.build(backend, [(n,)]) for peer in fitting]
        times = measure.in_turn(kernels, [contender.whole(kernels) for contender in contenders], options.seconds)
        del contenders
        peers.release(backend)
        moved = 4 * measure.ARRAYS_READ_AND_WRITTEN * n
        yield measure.add_ratios(
            [
                measure.row("large", peer.name, backend.name, n, state="in turn", clock=clock, seconds=seconds, moved=moved)
                for peer, seconds in zip(fitting, times, strict=True)
            ]
        )


def draw(rows, path):
    """Draw, for each backend, GB/s against size, and beside it the largest size: how many times the limit's time each took."""
    backends_of = measure.groups(rows, "backend")
    figure, axes = figures.panels(len(backends_of), 2, width=6.5, height=4.4)
    for (throughput, bars), ((backend,), of_backend) in zip(axes, backends_of.items(), strict=True):
        plots.throughput(throughput, of_backend, f"One step on {backend}, float32")
        n = max(row["elements"] for row in of_backend)
        largest = [row for row in of_backend if row["elements"] == n]
        report.bars(bars, largest, "p50_us", report.time, f"{n:,} elements", "median time of a step")
    plots.save(figure, path, rows)


if __name__ == "__main__":
    sizes = {"CPU": "1e5,1e6,2e7,1e8", "CUDA": ",".join(str(1 << k) for k in (20, 25, 26, 28))}
    report.main("large", __doc__, measure_rows, draw, seconds=10.0, sizes=sizes)
