"""The plot of `python -m gpuadam plan`: time and memory against the number of devices, up to 100,000 and 10^13 parameters.

On the left is the model that was asked for, a line for each way of a step, faint where the way does not fit. On the right are
models of many sizes, each by its fastest way and in as few pieces as let that way fit.
"""

from ... import planning
from ...terminal import figures, output
from ...terminal.arguments import UNITS
from ..measuring import plots

MOST = 100_000
SIZES = tuple(10**k for k in range(9, 14))
COLORS = ("#e3a6cb", "#c871ac", "#a03f8b", "#6f2469", "#3b0f42")  # of the sizes, darker for the larger; HUES are of ways
HUES = {"device": plots.OURS, "host": "#d9730d", "files": "#2b8a57"}  # of a way, by where the state is
MARKERS = {"device": "o", "host": "s", "files": "D"}


def draw(asked):
    """Return the figure."""
    figure, axes = figures.panels(2, 2, width=7.6, height=4.2)
    of_ways, of_sizes = axes.T
    for way, predictions in by_way(asked).items():
        look = _marker(way) | {"color": HUES[way.state], "linestyle": "--" if way.updated_on == "host" else "-"}
        _line(of_ways, predictions, **look, alpha=0.2)
        _line(of_ways, [p for p in predictions if p.fits], **look, label=way.name)
    for n, color in zip(SIZES, COLORS, strict=True):
        best = best_of_size(asked, n)
        _line(of_sizes, best, color=color, label=scaled(n))
        for prediction in best:
            _line(of_sizes, [prediction], color=color, **_marker(prediction.way))
    pieces = asked.settings.model_parallel
    cut = ", the model in as few pieces as fit" if asked.auto else f", the model in {pieces:,} pieces" if pieces > 1 else ""
    of_ways[0].set_title(f"{scaled(sum(asked.update.sizes))} parameters{cut}")
    of_sizes[0].set_title("The fastest way, by parameters (darker: more); models in as few pieces as fit")
    for times, memory in axes.T:
        limit = (asked.machine.memory - asked.settings.reserve) / 1e9
        memory.axhline(limit, color=plots.LIMIT, linestyle="--", linewidth=1.2, zorder=1)
        beside = {
            "textcoords": "offset points",
            "fontsize": 8,
            "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        }
        memory.annotate(f"{limit:,.0f} GB of a device", (0.9, limit), (0, 5), **beside)
        _dress(times, "seconds of a step", room=12 if times is of_sizes[0] else 2)
        _dress(memory, "GB in a device's memory", room=1.6)
        memory.set_xlabel(f"devices: {asked.machine.name}")
    figure.legend(*of_ways[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=5)
    of_sizes[0].legend(title="parameters", loc="upper left", ncols=len(SIZES), alignment="left")
    rates = "rates of data sheets" if asked.constants is None else "rates in part measured"
    note = f"{asked.formats}. Predicted from {rates}; no figure of a step is measured"
    figure.suptitle(note, fontsize=9, color="#555555", x=0.01, ha="left")
    return figure


def worlds(machine):
    """Return the numbers of devices to draw: powers of two, and the most that are whole nodes."""
    return [*(1 << k for k in range(MOST.bit_length()) if 1 << k < MOST), MOST // machine.per_node * machine.per_node]


def by_way(asked):
    """Return {Way: [Prediction]} of the parameters that were asked for, in order of the devices."""
    of_ways: dict = {}
    for world in worlds(asked.machine):
        if world % asked.settings.model_parallel == 0:
            for prediction in asked._replace(settings=asked.settings._replace(world=world)).predictions():
                of_ways.setdefault(prediction.way, []).append(prediction)
    return of_ways


def best_of_size(asked, n):
    """Return the best Prediction for a model of n parameters at each number of devices where it fits."""
    update = asked.update._replace(sizes=(n,))
    settings = [asked.settings._replace(world=world, model_parallel=1) for world in worlds(asked.machine)]
    best = [planning.best(planning.plan(update, asked.machine, s, auto=True)) for s in settings]
    return [prediction for prediction in best if prediction]


def _line(axes, predictions, **look):
    """Draw seconds and GB of a device against devices, a line in each panel."""
    worlds = [p.settings.world for p in predictions]
    times, memory = axes
    times.plot(worlds, [p.seconds for p in predictions], linewidth=1.4, **look)
    memory.plot(worlds, [p.device_bytes / 1e9 for p in predictions], linewidth=1.4, **look)


def _marker(way):
    """Return the marker of a way: its form says where the state is, and it is filled if the state is sharded."""
    face = {} if way.sharded else {"markerfacecolor": "white"}
    return {"marker": MARKERS[way.state], "markersize": 4.5, **face}


def _dress(axis, label, room):
    """Scale and name the axes of a panel, with room at the top: how many times its highest value."""
    axis.set(xscale="log", yscale="log", xlim=(0.8, 1.3 * MOST), ylabel=label)
    axis.set_ylim(top=room * axis.dataLim.ymax)
    figures.plain_log(axis.xaxis)
    figures.plain_log(axis.yaxis)
    axis.grid()


def scaled(n):
    """Return a number of parameters in words.

    >>> scaled(7 * 10**9), scaled(10**13), scaled(124_439_808)
    ('7 B', '10 T', '124 M')
    """
    return output.scaled(n, dict(reversed(UNITS.items())) | {"": 1}).strip()
