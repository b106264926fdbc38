"""What the examples share outside their subject: options, the array module, a picture, and errors in one line."""

import argparse
import sys
from pathlib import Path

import numpy as np

from ..backends import BackendUnavailableError, load
from ..cli.output import MissingExtraError, need, writable
from ..cli.progress import counted


def parser(text, *, steps, size):
    """Return a parser with the options that every example has. steps, size: as in `add_count`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m gpuadam.examples.{Path(sys.argv[0]).stem}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_count(parser, "--steps", *steps)
    add_count(parser, "--size", *size)
    return parser


def add_count(parser, option, default, what, least=1):
    """Add an option that is an integer of at least `least`."""

    def count(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return int(text)

    parser.add_argument(option, type=count, default=default, metavar="N", help=f"{what} (default {default})")


def add_arrays(parser, on_gpu="cupy", default="numpy"):
    help = f"{on_gpu} is a GPU, and " + ("numpy the default" if default else "the default where there is one")
    parser.add_argument("--arrays", choices=("numpy", on_gpu), default=default, help=help)


def add_plot(parser, name):
    def file(text):  # argparse passes the default too, so that what is missing is said before the work is done
        need("examples", "matplotlib")
        return writable(text)

    parser.add_argument("--plot", type=file, metavar="FILE", default=name, help=f"the picture, as PNG (default {name})")


def array_module(name):
    """Return numpy or cupy, or raise what is missing and what mends it."""
    if name == "cupy":
        load("cupy")
        return need("cuda13", "cupy")[0]
    return np


def on_host(array):
    """Return an array of NumPy, CuPy or Numba as NumPy's."""
    for copy in ("get", "copy_to_host"):
        if hasattr(array, copy):
            return getattr(array, copy)()
    return array


def steps(total, describe):
    """Count 1 to total, and show how it goes: describe() is asked for a few words some ten times."""
    (console,) = need("examples", "rich.console")
    width = len(str(total))
    return counted(console.Console(), total, lambda n: f"step {n:{width}}  {describe()}", every=max(1, total // 10))


def panels(count, title, **kind):
    """Return a figure with a title, and its square panels side by side."""
    matplotlib, pyplot = need("examples", "matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(1, count, figsize=(3.2 * count, 3.8), subplot_kw=kind, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure, axes


def save(figure, path):
    """Write a figure as PNG and say where."""
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")
    need("examples", "matplotlib.pyplot")[0].close(figure)
    print(f"picture: {path}")


def save_pictures(path, pictures, title):
    """Write grey pictures side by side, with their titles. pictures: title -> 2-D array, black 0 and white 1."""
    figure, axes = panels(len(pictures), title)
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(on_host(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=11)
        axis.set_axis_off()
    save(figure, path)


def run(main):
    """Run an example's main and end the process; what is missing here is one line and exit status 2."""
    try:
        sys.exit(main())
    except (BackendUnavailableError, MissingExtraError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
