"""What the examples share outside their subject: options, the array module, pictures, and errors in one line."""

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np

from ..backends import BackendUnavailableError, load
from ..cli.arguments import whole, writable
from ..cli.measuring import plots
from ..cli.output import MissingExtraError, counted, need


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
    """Add an option that is a whole number of at least `least`."""
    count = functools.partial(whole, least=least)
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


def picture(name, size):
    """Return a grey picture of scikit-image's, float32 from 0 to 1, of shape (size, size)."""
    data, transform = need("examples", "skimage.data", "skimage.transform")
    return transform.resize(getattr(data, name)(), (size, size), anti_aliasing=True).astype("float32")


def cosine(lr, steps, end=0.02):
    """Return a learning rate that falls from lr to a fraction of it, along half a cosine."""
    return lambda step: lr * (end + (1 - end) * (1 + math.cos(math.pi * step / steps)) / 2)


def steps(total, describe):
    """Count 1 to total, and show how it goes: describe() is asked for a few words some ten times."""
    (console,) = need("examples", "rich.console")
    width = len(str(total))
    return counted(console.Console(), total, lambda n: f"step {n:{width}}  {describe()}", every=max(1, total // 10))


def save_panels(path, shown, draw, title, **of_panels):
    """Write square panels side by side as PNG, and say where.

    shown: title -> what is drawn. draw: called with a panel and that. of_panels: as in `plots.panels`.
    """
    figure, (axes,) = plots.panels(1, len(shown), width=3.2, height=3.5, **of_panels)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for axis, (name, each) in zip(axes, shown.items(), strict=True):
        draw(axis, on_host(each))
        axis.set_title(name, loc="center", fontweight="normal")
        axis.set_axis_off()
    plots.save(figure, path)
    print(f"picture: {path}")


def save_pictures(path, pictures, title):
    """Write grey pictures side by side. pictures: title -> 2-D array, black 0 and white 1."""
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    save_panels(path, pictures, lambda axis, picture: axis.imshow(picture, **grey), title)


def run(main):
    """Run an example's main and end the process; what is missing here is one line and exit status 2."""
    try:
        sys.exit(main())
    except (BackendUnavailableError, MissingExtraError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
