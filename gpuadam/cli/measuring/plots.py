"""How measurements are drawn: gpuadam in blue, the limit in black and dashed, all others muted; every value is written out."""

import itertools

from ...terminal import figures
from . import facts, measure

OURS, LIMIT, OTHER = "#1261c9", "#111111", "#9aa3ad"
LINES = ("#b5651d", "#5b8c5a", "#8a5a9e", "#b04a5a", "#4a8f9e", "#8c8c3a", "#70757a")
MARKERS = {"o": "\u25cf ", "^": "\u25b2 ", "s": "\u25a0 "}  # of gpuadam's lines, which share a colour; and as text


def save(figure, path, rows):
    """Write the figure as PNG, below it what the rows were measured on and with."""
    first = rows[0]
    versions = [f"{name} {first[name]}" for name in facts.versions() if first.get(name)]
    machine = dict.fromkeys((first["device"], first["cpu"], f"{first['cores']} cores", first["date"]))
    figures.save(figure, path, f"{', '.join(machine)}; {', '.join(versions)}")


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
    figures.name_ends(axis, ends, at=1.02, fontsize=8)
