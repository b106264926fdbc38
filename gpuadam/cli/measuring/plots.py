"""How the commands, the examples and the benchmarks draw.

gpuadam is blue, the limit black and dashed, all others are muted; every value is written out.
"""

import itertools
import textwrap

from .. import output
from . import facts, measure

OURS, LIMIT, OTHER = "#1261c9", "#111111", "#9aa3ad"
LINES = ("#b5651d", "#5b8c5a", "#8a5a9e", "#b04a5a", "#4a8f9e", "#8c8c3a", "#70757a")
MARKERS = {"o": "\u25cf ", "^": "\u25b2 ", "s": "\u25a0 "}  # of gpuadam's lines, which share a colour; and as text
STYLE = {
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
APART = 0.052  # of two names at the ends of lines, in heights of a panel


def panels(n_rows, n_columns, width, height, **of_panels):
    """Return a figure and its axes, n_rows x n_columns panels of width x height inches. of_panels: as matplotlib's subplot_kw."""
    matplotlib, pyplot = output.need("bench", "matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    size = (width * n_columns, height * n_rows + 0.35)
    return pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", subplot_kw=of_panels)


def save(figure, path, rows=()):
    """Write the figure as PNG, below it what the rows were measured on and with, if there are rows."""
    if rows:
        first = rows[0]
        versions = [f"{name} {first[name]}" for name in facts.versions() if first.get(name)]
        machine = dict.fromkeys((first["device"], first["cpu"], f"{first['cores']} cores", first["date"]))
        note = f"{', '.join(machine)}; {', '.join(versions)}"
        characters = int(18 * figure.get_figwidth())  # that fit into a line
        figure.supxlabel(textwrap.fill(note, characters), fontsize=7, color="#555555")
    (pyplot,) = output.need("bench", "matplotlib.pyplot")
    figure.savefig(path, format="png")
    pyplot.close(figure)


def is_ours(contender):
    return contender.startswith(("gpuadam", "import gpuadam"))


def throughput(axis, rows, title):
    """Draw GB/s against elements, a line for each contender, named at its end."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    muted, markers = itertools.cycle(LINES), itertools.cycle(MARKERS)
    axis.set(xscale="log", xlabel="elements", ylabel="GB/s", ylim=(0, 1.08 * max(row["gb_per_s"] for row in rows)))
    axis.set_title(title)
    axis.grid()
    ends = []
    for name in sorted(names, key=is_ours):  # ours last, on top
        points = sorted((row["elements"], row["gb_per_s"]) for row in rows if row["contender"] == name)
        if name == measure.LIMIT:
            style: dict = {"color": LIMIT, "linestyle": "--", "linewidth": 1.6, "zorder": 4}
        elif is_ours(name):
            style = {"color": OURS, "marker": next(markers), "markersize": 6, "linewidth": 2, "zorder": 5}
        else:
            style = {"color": next(muted), "marker": ".", "linewidth": 1.2}
        axis.plot(*zip(*points, strict=True), **style)
        _, last = points[-1]
        text = f"{MARKERS.get(style.get('marker', ''), '')}{name}  {last:.3g}"
        ends.append((last, text, {"color": style["color"], "fontweight": "bold" if is_ours(name) else "normal"}))
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
