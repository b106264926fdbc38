"""What the examples share outside their subject: options, the array module, pictures, and errors in one line."""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..backends import home, load
from ..terminal import arguments, figures
from ..terminal.console import Console
from ..terminal.output import counted, ending_plainly
from ..terminal.output import need as need


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """The description in its paragraphs, as wide as the terminal, and the default of each option."""

    def _fill_text(self, text: str, width: int, indent: str) -> Any:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            p if p.startswith("    ") else super(_Help, self)._fill_text(p, width, indent) for p in paragraphs
        )


def options(
    argv: list[str] | None, text: str | None, *, arrays: Any = "", plot: Any = "", **others: Any
) -> argparse.Namespace:
    """Return the options of an example.

    arrays: the library of the arrays on a GPU; Numba's are the default where there is a GPU.
    plot: the default name of the picture. Without `arrays` or `plot` there is no such option.
    others: option -> (default, its meaning); of an integer also the least that it may be, if that is not 1.
    """
    parser = argparse.ArgumentParser(
        f"python -m gpuadam.examples {Path(sys.argv[0]).stem}", None, text, formatter_class=_Help
    )
    for option, (default, meaning, *least) in others.items():
        kind = functools.partial(arguments.whole, least=min(least, default=1)) if isinstance(default, int) else type(default)
        parser.add_argument(f"--{option}", type=kind, default=default, help=meaning)
    if arrays:
        default = "auto" if arrays == "numba" else "numpy"
        parser.add_argument("--arrays", choices=("numpy", arrays), default=default, help=f"{arrays} takes a GPU")
    if plot:
        arguments.add_plot(parser, "examples", "the picture", plot)
    return parser.parse_args(argv)


def array_module(name: str) -> Any:
    """Return numpy or cupy, or raise what is missing and what mends it."""
    if name == "cupy":
        load("cupy")
        return need("cuda13", "cupy")[0]
    return np


def on_host(array: Any) -> Any:
    """Return an array of NumPy, CuPy or Numba as NumPy's."""
    return load(home("array", array)).to_host(array)


def picture(name: str, size: int) -> Any:
    """Return a grey picture of scikit-image's, float32 from 0 to 1, of shape (size, size)."""
    data, transform = need("examples", "skimage.data", "skimage.transform")
    return transform.resize(getattr(data, name)(), (size, size), anti_aliasing=True).astype("float32")


def cosine(lr: float, steps: int, end: float = 0.02) -> Callable[[int], float]:
    """Return a learning rate that falls from lr to a fraction of it, along half a cosine."""
    return lambda step: lr * (end + (1 - end) * (1 + math.cos(math.pi * step / steps)) / 2)


def steps(total: int, describe: Any) -> Iterator[int]:
    """Count 1 to total, and show how it goes: describe() is asked for a few words some ten times."""
    width = len(str(total))
    return counted(Console(), total, lambda n: f"step {n:{width}}  {describe()}", every=max(1, total // 10))


def grey(axis: Any, picture: Any) -> None:
    """Draw a grey picture, a 2-D array: black 0 and white 1."""
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def save_panels(path: Any, shown: Any, title: str, draw: Any = grey, rows: int = 1, **of_panels: Any) -> None:
    """Write square panels, row after row, as one picture, and say where.

    shown: title -> what is drawn. draw: called with a panel and that. rows: of panels. of_panels: as in `figures.panels`.
    """
    figure, axes = figures.panels(rows, len(shown) // rows, width=3.2, height=3.5, **of_panels)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for axis, (name, each) in zip(axes.flat, shown.items(), strict=True):
        draw(axis, on_host(each))
        axis.set_title(name, loc="center", fontweight="normal")
        axis.set_axis_off()
    figures.save(figure, path)
    print(f"picture: {path}")


def run(main: Any) -> NoReturn:
    """Run an example's main and end the process."""
    with ending_plainly():
        sys.exit(main())
