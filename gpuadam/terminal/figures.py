"""Figures of one look, drawn by matplotlib and written as PNG, PDF or SVG."""

import math
import textwrap
from pathlib import Path

from .output import need

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


def panels(n_rows, n_columns, width, height, **of_panels):
    """Return a figure and its axes, n_rows x n_columns panels of width x height inches. of_panels: as matplotlib's subplot_kw."""
    matplotlib, of_figure = need("bench", "matplotlib", "matplotlib.figure")
    matplotlib.rcParams.update(STYLE)
    figure = of_figure.Figure((width * n_columns, height * n_rows + 0.35), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, subplot_kw=of_panels)


def plain_log(axis):
    """Give a logarithmic axis, such as `axes.yaxis`, some three ticks or more, with numbers as they are read.

    A tick stands at each power of ten, and where the axis has few of them also between. Call it when the limits are known.
    """
    (ticker,) = need("bench", "matplotlib.ticker")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    between = (1,) if decades > 3 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    axis.set_major_locator(ticker.LogLocator(subs=between, numticks=12))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure, path, note=""):
    """Write the figure, with a note below it, as PNG, or as PDF or SVG where the path ends so."""
    characters = int(18 * figure.get_figwidth())  # that fit into a line
    figure.supxlabel(textwrap.fill(note, characters), fontsize=7, color="#555555")
    kind = Path(path).suffix.lower().removeprefix(".") or "png"
    figure.savefig(path, format=kind, bbox_inches="tight")  # tight: so that no title is cut off
