"""How fast is one step on one large array, beside the memory's limit and other libraries?

    python benchmarks/large.py [--backend numba-cpu] [--sizes 1e5,1e6,2e7,1e8] [--seconds 10] [--out FOLDER]

Contenders take their turns again and again. On a CPU those that take given memory have the same arrays from 10 million elements
on, because the place of an allocation can matter more than the arithmetic; all others have arrays of their own. An array of 1e8
float32 and its gradient and moments are 1.6 GB. Contenders that do not fit, or would take minutes, are left out and named.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report

from gpuadam import backends
from gpuadam.cli.measuring import measure, plots
from gpuadam.terminal import figures

APART = 0.052  # of two names at the ends of lines, in heights of a panel
MARKERS = {"o": "\u25cf ", "^": "\u25b2 ", "s": "\u25a0 "}  # of gpuadam's lines, which share a colour; and as text


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, options.peers, own=True)
    notes += report.listed(absent)
    notes += report.on_pages(backend)
    kernels = backends.load(backend.name)
    for n in report.numbers(options.sizes):
        fitting, left_out = peers.fitting([*peers.OURS, *present], n, backend)
        notes += report.listed(left_out)
        if not fitting:
            continue
        contenders = peers.with_movers({peer.name: peer.build(backend, [(n,)]) for peer in fitting})
        whole = {name: contender.whole(kernels) for name, contender in contenders.items()}
        moved = 4 * report.ARRAYS_READ_AND_WRITTEN * n
        rows = measure.rows_in_turn("large", kernels, whole, n, options.seconds, moved=moved)
        rows = [row | {"huge_percent": contenders[row["contender"]].percent_huge(backend)} for row in rows]
        del contenders, whole
        peers.release(backend)
        yield measure.add_ratios(rows)


def draw(rows, path):
    """Draw, for each backend, GB/s against size, and beside it the largest size: how many times the limit's time each took."""
    backends_of = measure.groups(rows, "backend")
    figure, axes = figures.panels(len(backends_of), 2, width=6.5, height=4.4)
    for (throughput, bars), ((backend,), of_backend) in zip(axes, backends_of.items(), strict=True):
        throughput_panel(throughput, of_backend, f"One step on {backend}, float32")
        n = max(row["elements"] for row in of_backend)
        largest = [row for row in of_backend if row["elements"] == n]
        report.bars(bars, largest, f"{n:,} elements", "median time of a step")
    plots.save(figure, path, rows)


def throughput_panel(axis, rows, title):
    """Draw GB/s against elements, a line for each contender, named at its end."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    muted, markers = itertools.cycle(report.LINES), itertools.cycle(MARKERS)
    axis.set(xscale="log", xlabel="elements", ylabel="GB/s", ylim=(0, 1.08 * max(row["gb_per_s"] for row in rows)))
    axis.set_title(title)
    axis.grid()
    ends = []
    for name in sorted(names, key=report.is_ours):  # ours last, on top
        points = sorted((row["elements"], row["gb_per_s"]) for row in rows if row["contender"] == name)
        if name == measure.LIMIT:
            style: dict = {"color": plots.LIMIT, "linestyle": "--", "linewidth": 1.6, "zorder": 4}
        elif report.is_ours(name):
            style = {"color": plots.OURS, "marker": next(markers), "markersize": 6, "linewidth": 2, "zorder": 5}
        else:
            style = {"color": next(muted), "marker": ".", "linewidth": 1.2}
        axis.plot(*zip(*points, strict=True), **style)
        _, last = points[-1]
        text = f"{MARKERS.get(style.get('marker', ''), '')}{name}  {last:.3g}"
        ends.append((last, text, {"color": style["color"], "fontweight": "bold" if report.is_ours(name) else "normal"}))
    name_ends(axis, ends, at=1.02, fontsize=8)


def name_ends(axis, ends, at, **of_all):
    """Write names at the ends of lines, far enough apart to be read. The axis must have its limits and scales already.

    ends: (a line's last value, its name, how the name is written). at: where, in widths of the panel.
    """
    to_panel = axis.transData + axis.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[0])
    heights: list[float] = []
    for value, _, _ in ends:
        _, height = to_panel.transform((1, value))
        heights.append(max(height, heights[-1] + APART) if heights else height)
    ceiling = 1.0
    for number in reversed(range(len(heights))):  # what is above the panel goes down, and pushes those below
        heights[number] = ceiling = min(heights[number], ceiling)
        ceiling -= APART
    for height, (_, name, style) in zip(heights, ends, strict=True):
        axis.annotate(name, (at, height), xycoords="axes fraction", va="center", annotation_clip=False, **style, **of_all)


if __name__ == "__main__":
    sizes = {"CPU": "1e5,1e6,2e7,1e8", "CUDA": ",".join(str(1 << k) for k in (25, 26, 28))}
    report.main("large", __doc__, measure_rows, draw, seconds=10.0, sizes=sizes)
