"""How the benchmarks draw: gpuadam in blue, the limit in black and dashed, all others muted; every value is written out."""

import itertools
import textwrap

from .. import output
from . import measure

OURS, LIMIT, OTHER = "#1261c9", "#111111", "#9aa3ad"
MARKERS = "o^s"  # of gpuadam's lines, which share a colour
LINES = ("#b5651d", "#5b8c5a", "#8a5a9e", "#b04a5a", "#4a8f9e", "#8c8c3a", "#70757a")


def panels(n_rows, n_columns, width, height):
    """Return a figure and its axes, n_rows x n_columns panels of width x height inches."""
    matplotlib, pyplot = output.need("bench", "matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    size = (width * n_columns, height * n_rows + 0.35)
    return pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")


def save(figure, path, rows):
    """Write the figure as PNG, below it what it was measured on and with."""
    first = rows[0]
    versions = [name for name in output.versions() if first.get(name)]
    where = ", ".join(dict.fromkeys(str(first[key]) for key in ("device", "cpu", "cores", "date")))
    where = where.replace(f", {first['cores']},", f", {first['cores']} cores,")
    note = f"{where}; {', '.join(f'{name} {first[name]}' for name in versions)}"
    characters = int(18 * figure.get_figwidth())  # that fit into a line
    figure.supxlabel(textwrap.fill(note, characters), fontsize=7, color="#555555")
    (pyplot,) = output.need("bench", "matplotlib.pyplot")
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def is_ours(contender):
    return contender.startswith(("gpuadam", "import gpuadam"))


def throughput(axis, rows, title):
    """Draw GB/s against elements, a line for each contender, named at its end."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    muted, markers = itertools.cycle(LINES), itertools.cycle(MARKERS)
    ends = []
    for name in sorted(names, key=is_ours):  # ours last, on top
        points = sorted((row["elements"], row["gb_per_s"]) for row in rows if row["contender"] == name)
        if name == measure.LIMIT:
            style = {"color": LIMIT, "linestyle": "--", "linewidth": 1.6, "zorder": 4}
        elif is_ours(name):
            style = {"color": OURS, "marker": next(markers), "markersize": 6, "linewidth": 2, "zorder": 5}
        else:
            style = {"color": next(muted), "marker": ".", "linewidth": 1.2}
        axis.plot(*zip(*points, strict=True), **style)
        ends.append((points[-1], name, style))
    axis.set_xscale("log")
    axis.set(xlabel="elements", ylabel="GB/s", ylim=(0, 1.08 * max(row["gb_per_s"] for row in rows)))
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    _name_ends(axis, ends)


def _name_ends(axis, ends):
    """Write each line's name and last value at the right of the panel, far enough apart to be read."""
    bottom, top = axis.get_ylim()
    gap = (top - bottom) * 0.055
    heights: list[float] = []
    for (_, y), _, _ in sorted(ends, key=lambda end: end[0][1]):
        heights.append(max(y, heights[-1] + gap) if heights else y)
    if heights and heights[-1] > top:  # no room above: push down from the top
        heights[-1] = top
        for k in range(len(heights) - 2, -1, -1):
            heights[k] = min(heights[k], heights[k + 1] - gap)
    symbols = {"o": "\u25cf ", "^": "\u25b2 ", "s": "\u25a0 "}
    for height, ((_, y), name, style) in zip(heights, sorted(ends, key=lambda end: end[0][1]), strict=True):
        axis.annotate(
            f"{symbols.get(style.get('marker'), '')}{name}  {y:.3g}",
            (1.02, height),
            xycoords=("axes fraction", "data"),
            color=style["color"],
            fontsize=8,
            va="center",
            fontweight="bold" if is_ours(name) else "normal",
            annotation_clip=False,
        )


def bars(axis, rows, value, text, title, xlabel, series=("state", "clock"), log=False):
    """Draw a horizontal bar for each contender and state, the smallest at the top, its value at its end.

    value: the column. text: what of a value is written at the bar's end. series: the columns that tell a contender's bars apart.
    """
    if not rows:  # not measured on this backend
        axis.set_axis_off()
        return
    kinds = list(dict.fromkeys(_kind(row, series) for row in rows))
    shades = [1 - 0.55 * k / max(1, len(kinds) - 1) for k in range(len(kinds))]
    of_name: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: kinds.index(_kind(row, series))):
        of_name.setdefault(row["contender"], []).append(row)
    names = sorted(of_name, key=lambda name: -of_name[name][0][value])
    thick = 0.8 / len(kinds)
    for at, name in enumerate(names):
        color = OURS if is_ours(name) else LIMIT if name == measure.LIMIT else OTHER
        for k, row in enumerate(of_name[name]):
            y = at + thick * ((len(of_name[name]) - 1) / 2 - k)
            axis.barh(y, row[value], 0.9 * thick, color=color, alpha=shades[kinds.index(_kind(row, series))])
            axis.annotate(text(row[value]), (row[value], y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    for label in axis.get_yticklabels():
        if is_ours(label.get_text()):
            label.set(color=OURS, fontweight="bold")
    longest, shortest = (f(row[value] for row in rows) for f in (max, min))
    if log:
        axis.set_xscale("log")
        axis.set_xlim(shortest / 2, 2 * longest * (longest / shortest) ** 0.2)
    else:
        axis.set_xlim(0, 1.25 * longest or 1)
    axis.set_xticks([], minor=True)  # the values are at the bars
    axis.set_xticks([])
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(f"{xlabel} (logarithmic)" if log else xlabel, fontsize=9)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    if len(kinds) > 1:
        (patches,) = output.need("bench", "matplotlib.patches")
        varying = [k for k in range(len(series)) if len({kind[k] for kind in kinds}) > 1]
        labels = [", ".join(kind[k] for k in varying) for kind in kinds]
        handles = [
            patches.Patch(facecolor=OURS, alpha=shade, label=label) for shade, label in zip(shades, labels, strict=True)
        ]
        axis.legend(handles=handles, fontsize=8, loc="upper right", frameon=False)


def _kind(row, series):
    return tuple(row[key] for key in series)
