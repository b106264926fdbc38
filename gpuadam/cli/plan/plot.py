"""The plot of `python -m gpuadam plan`: time and memory against the number of devices, up to 100,000 and 10^13 parameters.

On the left the parameters that were asked for, each way of a step a line; what does not fit is faint. On the right models of many
sizes by their fastest way, each way with the model in as few pieces as let it fit.
"""

from ... import planning
from .. import output
from ..measuring import plots

MOST = 100_000
SIZES = tuple(10**k for k in range(9, 14))
HUES = {"device": plots.OURS, "host": "#d9730d", "files": "#2b8a57"}  # of a way, by where the state is
MARKERS = {"device": "o", "host": "s", "files": "D"}
OF_SIZES = ("#7a4fa3", "#1261c9", "#2b8a57", "#c28f0e", "#c0392b")
NEAREST = 0.052  # of two names at the ends of lines, in heights of a panel


def draw(path, asked):
    """Write the plot."""
    figure, axes = plots.panels(2, 2, width=7.6, height=4.2)
    n = sum(asked.update.sizes)
    pieces = "as few pieces as fit" if asked.auto else f"{asked.settings.model_parallel:,} pieces"
    whole = not asked.auto and asked.settings.model_parallel == 1
    _draw_ways(axes[0][0], axes[1][0], asked)
    ends = _draw_sizes(axes[0][1], axes[1][1], asked)
    titles = (
        f"{named(n)} parameters{'' if whole else f', the model in {pieces}'}",
        "The fastest way, by parameters; models in as few pieces as fit",
    )
    for column, title in enumerate(titles):
        _dress(axes[0][column], "seconds of a step", title)
        _dress(axes[1][column], "GB in a device's memory", "")
        _draw_limit(axes[1][column], asked)
        axes[1][column].set_xlabel(f"devices: {asked.machine.name}")
    for axis, of_axis in ends.items():
        _name_ends(axis, of_axis)
    (pyplot,) = output.need("bench", "matplotlib.pyplot")
    rates = "rates of data sheets" if asked.constants is None else "rates in part measured"
    note = f"{asked.formats}. Predicted from {rates}; no figure of a step is measured"
    figure.suptitle(note, fontsize=9, color="#555555", x=0.01, ha="left")
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def worlds(machine):
    """Return the numbers of devices to draw: powers of two, and the most that are whole nodes."""
    return [*(1 << k for k in range(MOST.bit_length()) if 1 << k < MOST), MOST // machine.per_node * machine.per_node]


def by_way(asked):
    """Return {Way: [(world, Prediction)]} of the parameters that were asked for."""
    found: dict = {}
    for world in worlds(asked.machine):
        settings = asked.settings._replace(world=world)
        if world % settings.model_parallel == 0:
            for p in planning.plan(asked.update, asked.machine, settings, asked.auto):
                found.setdefault(p.way, []).append((world, p))
    return found


def by_size(asked):
    """Return {parameters: [(world, best Prediction)]}."""
    found = {}
    for n in SIZES:
        update = asked.update._replace(sizes=(n,))
        settings = [asked.settings._replace(world=world, model_parallel=1) for world in worlds(asked.machine)]
        best = [(s.world, planning.best(planning.plan(update, asked.machine, s, auto=True))) for s in settings]
        found[n] = [(world, p) for world, p in best if p]
    return found


def _draw_ways(times, memory, asked):
    (lines,) = output.need("bench", "matplotlib.lines")
    handles = []
    for way, points in by_way(asked).items():
        style = _style(way) | {"color": HUES[way.state], "linestyle": "--" if way.updated_on == "host" else "-"}
        for axis, of in ((times, _time), (memory, _memory)):
            _line(axis, points, of, style)
        handles.append(lines.Line2D([], [], label=way.name, **style, linewidth=1.4))
    times.figure.legend(handles=handles, fontsize=9, frameon=False, loc="outside lower center", ncols=5)


def _draw_sizes(times, memory, asked):
    """Draw a line for each size, and return {axis: (value, name, color) of the ends}."""
    ends: dict = {times: [], memory: []}
    for (n, points), color in zip(by_size(asked).items(), OF_SIZES, strict=True):
        for axis, of in ((times, _time), (memory, _memory)):
            if points:
                axis.plot([world for world, _ in points], [of(p) for _, p in points], color=color, linewidth=1.4, zorder=3)
                ends[axis].append((of(points[-1][1]), named(n), color))
            for world, p in points:
                axis.plot(world, of(p), **_style(p.way), color=color, zorder=4)
    return ends


def _time(prediction):
    return prediction.seconds


def _memory(prediction):
    return prediction.device_bytes / 1e9


def _style(way):
    """Return the marker of a way: its form says where the state is, and it is filled if the state is sharded."""
    face = {} if way.sharded else {"markerfacecolor": "white"}
    return {"marker": MARKERS[way.state], "markersize": 4.5, **face}


def _line(axis, points, of, style):
    """Draw a line: faint where it does not fit."""
    axis.plot([world for world, _ in points], [of(p) for _, p in points], **style, linewidth=1.2, alpha=0.2, zorder=2)
    fitting = [(world, of(p)) for world, p in points if p.fits]
    if fitting:
        axis.plot(*zip(*fitting, strict=True), **style, linewidth=1.4, zorder=3)


def _name_ends(axis, ends):
    """Write the names of lines at their ends, far enough apart to be read."""
    to_fraction = axis.transData + axis.transAxes.inverted()
    placed: list[float] = []
    for value, _, _ in sorted(ends):
        _, height = to_fraction.transform((1, value))
        placed.append(max(height, placed[-1] + NEAREST) if placed else height)
    down = max(placed[-1] - 1, 0) if placed else 0  # none above the panel
    for height, (_, name, color) in zip(placed, sorted(ends), strict=True):
        axis.annotate(
            name, (0.915, height - down), xycoords="axes fraction", va="center", color=color, fontsize=9, fontweight="bold"
        )


def _draw_limit(axis, asked):
    limit = (asked.machine.memory - asked.settings.reserve) / 1e9
    axis.axhline(limit, color=plots.LIMIT, linestyle="--", linewidth=1.2, zorder=1)
    axis.annotate(f"{limit:,.0f} GB of a device", (0.9, limit), (0, 4), textcoords="offset points", fontsize=8)


def _dress(axis, label, title):
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.8, 3.5e5)
    axis.set_xticks([10**k for k in range(6)], [f"{10**k:,}" for k in range(6)])
    low, high = axis.get_ylim()
    (ticker,) = output.need("bench", "matplotlib.ticker")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if high / low > 1000 else (1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.5g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_ylabel(label)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def named(n):
    """Return a number of parameters in words.

    >>> named(7 * 10**9), named(10**13), named(124_439_808)
    ('7 B', '10 T', '124 M')
    """
    for unit, one in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if n >= one:
            return f"{n / one:.3g} {unit}"
    return f"{n:,}"
