"""Does `python -m gpuadam plan` predict what is then measured?

    python benchmarks/plan.py [--backend numba-cpu] [--sizes 3e5,3e6,3e7] [--seconds 10] [--out FOLDER]

`gpuadam/performance_model.py` predicts the step of every form and size from constants alone: for each form how many elements a
second its conversions and arithmetic allow, which are measured first, on small arrays; and the memory's rate, which is what the
limit kernel moves of float32, measured in turn with all the steps. So the rows say whether bytes, or else elements, explain the
times of all forms. No constant is fitted to the steps. On a busy machine, NUMBA_NUM_THREADS=1 keeps threads from waiting for one
another.

error_percent is (predicted / measured - 1) * 100, of 20th percentiles: other programs take time from both. What is predicted and
cannot be measured on one machine without ranks, collectives and PCIe, has no row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import peers
import report

from gpuadam import backends, performance_model
from gpuadam.cli import constants, measure, output, plots
from gpuadam.kernels import adam, limit
from gpuadam.kernels.storage import Arrays, bytes_moved_of, operands
from gpuadam.machines import Processor

# Forms of the step: what `performance_model.update` takes.
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
AIM = 25  # percent


def in_memory(backend, options, notes):
    """Yield rows of steps in memory."""
    kernels = backends.load(backend.name)
    updates = {name: performance_model.update(1, **FORMS[name]) for name in options.forms}
    found = constants.of_processor(backend.name, [u.arrays for u in updates.values()], options.seconds)
    processor = Processor(found["bandwidth"], found["launch"], constants.rates_of(found))
    notes.append(f"{1e6 * processor.launch:.1f} us a launch; elements a second of each form: {_rates(updates, processor)}")
    for n in report.numbers(options.sizes):
        contenders = {}
        free = 0.85 * peers.free_bytes(backend) - 16 * n  # the limit's
        for name, update in updates.items():
            need = sum(o.nbytes(n) for o in operands(update.arrays))
            if need > free:
                notes += report.listed({f"{name} at {n:,} elements": f"no memory left: it needs {need / 1e9:.1f} GB"})
                continue
            free -= need
            contenders[name] = constants.launcher(kernels, update.arrays, n, adam)
        plain = Arrays()
        limit_kernel = constants.launcher(kernels, plain, n, limit)
        moving, *times = measure.in_turn(kernels, [limit_kernel, *contenders.values()], options.seconds)
        bandwidth = bytes_moved_of(operands(plain), n) / float(np.percentile(moving, 20))
        notes.append(f"{n:,} elements: the limit kernel moves {bandwidth / 1e9:.1f} GB/s")
        yield [
            _row(backend, name, updates[name].arrays, n, seconds, processor._replace(bandwidth=bandwidth))
            for name, seconds in zip(contenders, times, strict=True)
        ]
        del contenders, limit_kernel
        peers.release(backend)


# A function for each way of a step that can be measured; those of sharded and offloaded steps predict by `planning.predict`.
MEASURED = (in_memory,)


def measure_rows(backend, options, notes):
    for measured in MEASURED:
        yield from measured(backend, options, notes)


def _rates(updates, processor):
    known = {name: processor.rates.get(update.arrays) for name, update in updates.items()}
    return ", ".join(f"{name} {rate / 1e9:.2f}e9" for name, rate in known.items() if rate) or "none, on a GPU"


def _row(backend, name, arrays, n, seconds, processor):
    predicted = performance_model.kernel_seconds(arrays, operands(arrays), n, processor)
    moved = bytes_moved_of(operands(arrays), n)
    clock = "device" if backend.memory == "CUDA" else "host"
    row = measure.row(
        "plan", measure.KERNEL, backend.name, n, state="in turn", clock=clock, dtype=name, seconds=seconds, moved=moved
    )
    error = 100 * (predicted / float(np.percentile(seconds, 20)) - 1)
    bound = "elements" if n / processor.rates.get(arrays, np.inf) > moved / processor.bandwidth else "bytes"
    return row | {"bound": bound, "predicted_us": float(f"{1e6 * predicted:.6g}"), "error_percent": float(f"{error:.4g}")}


def table(rows):
    """Return the table of one size: a line for each form."""
    rich_table, rich_box = output.need("bench", "rich.table", "rich.box")
    first = rows[0]
    title = f"plan: {first['elements']:,} elements, {first['backend']}, in turn"
    shown = rich_table.Table(title=title, title_justify="left", box=rich_box.SIMPLE_HEAD)
    for head in ("", "predicted", "bound by", "p20", "median", "p80", "error"):
        shown.add_column(head, justify="right" if head else "left")
    for row in rows:
        times = [report.time(row[key]) for key in ("p20_us", "p50_us", "p80_us")]
        shown.add_row(row["dtype"], report.time(row["predicted_us"]), row["bound"], *times, f"{row['error_percent']:+.1f} %")
    worst = max(abs(row["error_percent"]) for row in rows)
    shown.caption = f"largest error {worst:.1f} %; the aim is {AIM} %"
    return shown


def draw(rows, path):
    """Draw predicted against measured times of all sizes and forms; within the band is within the aim."""
    figure, axes = plots.panels(1, 1, width=7, height=6)
    axis = axes[0][0]
    ends = [f(row[key] for row in rows for key in ("p20_us", "predicted_us")) for f in (min, max)]
    line = [ends[0] / 1.5, ends[1] * 1.5]
    axis.plot(line, line, color=plots.LIMIT, linewidth=1)
    axis.fill_between(line, [0.75 * x for x in line], [1.25 * x for x in line], color=plots.OTHER, alpha=0.25, linewidth=0)
    colors = dict(zip(dict.fromkeys(row["dtype"] for row in rows), (plots.OURS, *plots.LINES, plots.OTHER), strict=False))
    for name, color in colors.items():
        own = [row for row in rows if row["dtype"] == name]
        axis.plot([r["p20_us"] for r in own], [r["predicted_us"] for r in own], "o", color=color, markersize=5, label=name)
    axis.set(xscale="log", yscale="log", xlabel="measured us (20th percentile)", ylabel="predicted us")
    title = f"One update, predicted and measured; the band is {AIM} %"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    plots.save(figure, path, rows)


if __name__ == "__main__":
    sizes = {"CPU": "3e5,3e6,3e7", "CUDA": "4e6,6e7"}
    arguments = {"seconds": 10.0, "sizes": sizes, "table": ("backend", "elements"), "forms": list(FORMS), "show": table}
    report.main("plan", __doc__, measure_rows, draw, **arguments)
