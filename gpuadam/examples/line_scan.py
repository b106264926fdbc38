"""Sharpen a photograph while it is scanned: only the rows that the present lines reach may move.

A camera passes over the Moon and reads one line after another. Its optics blur each line with its neighbours, and readings are
noisy. Memory holds a window of lines; Adam takes some steps on the rows that they reach, then the window moves on and the lines
that it leaves are lost. `where=` keeps the other rows, and their moments, as they are. Without it their gradients are 0, but
momentum moves them further, and no reading is left that would bring them back. Minimized is half the sum of squared differences
from the readings, plus a little total variation. The photograph is scikit-image's `moon`.
"""

from typing import Any

import numpy as np

import gpuadam

from . import command_line, tomography

WINDOW, NEW = 24, 16  # lines that are held, and by how many the window moves on
REACH = 4  # the optics reach so many rows to each side of a line
RATES, SHOWN = (0.005, 0.01, 0.02, 0.04, 0.08), 0.04  # learning rates, and that of the picture


def main(argv: list[str] | None = None) -> None:
    """Scan with several learning rates in both ways, print the errors and save a picture."""
    counts = {"steps": (40, "updates for each window"), "size": (160, "number of lines, and of pixels in each", WINDOW)}
    options = command_line.options(argv, __doc__, **counts, arrays="cupy", plot="line_scan.png")
    xp, steps = command_line.array_module(options.arrays), options.steps
    photograph = xp.asarray(command_line.picture("moon", options.size + 2 * REACH))
    blur = optics(xp, options.size)
    noise = np.random.default_rng(0).standard_normal((options.size, options.size), dtype="float32")
    readings = blur @ photograph @ blur.T + 0.01 * xp.asarray(noise)
    truth = photograph[REACH:-REACH, REACH:-REACH]

    shown, without = {"photograph": truth, f"readings, error {error(readings, truth):.1%}": readings}, {}
    print(f"error of the readings themselves: {error(readings, truth):.2%} of white")
    for rate in RATES:
        rows, without[rate] = (scan(xp, blur, readings, rate, steps, only_rows) for only_rows in (True, False))
        print(f"learning rate {rate}: error {error(rows, truth):.2%} with where=, {error(without[rate], truth):.2%} without")
        if rate == SHOWN:
            shown[f"with where=, rate {rate}, {error(rows, truth):.1%}"] = rows
    for rate in (SHOWN, min(RATES, key=lambda rate: error(without[rate], truth))):
        shown[f"without, rate {rate}, {error(without[rate], truth):.1%}"] = without[rate]
    command_line.save_panels(
        options.plot, shown, "The Moon, line by line, by gpuadam.Adam; the last without where= at its best rate", draw
    )


def draw(axis: Any, image: Any) -> None:
    """Draw an image with more contrast: there is little on the Moon."""
    command_line.grey(axis, 2.5 * (image - 0.2))


def optics(xp: Any, size: int) -> Any:
    """Return the blur along one axis: a matrix of shape (size, size + 2 * REACH), of which each row adds up to 1."""
    distance = xp.arange(size + 2 * REACH) - xp.arange(REACH, REACH + size)[:, None]
    weights = xp.exp(-((distance / 1.5) ** 2) / 2) * (abs(distance) <= REACH)
    return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")


def scan(xp: Any, blur: Any, readings: Any, rate: float, steps: int, only_rows: bool) -> Any:
    """Return what Adam makes of the readings, in one pass. only_rows: those outside the window stay."""
    image = xp.full((blur.shape[1], blur.shape[1]), float(readings[:WINDOW].mean()), "float32")
    falls = command_line.cosine(rate, steps)  # and begins anew for each window
    opt = gpuadam.Adam(image, lr=lambda step: falls((step - 1) % steps + 1), betas=(0.9, 0.99), bounds=(0, 1))
    for first in range(0, len(readings) - WINDOW + NEW, NEW):
        lines, rows = slice(first, first + WINDOW), slice(first, first + WINDOW + 2 * REACH)
        present = xp.zeros(len(image), bool)
        present[first + 2 * REACH if first else 0 : rows.stop] = True  # a line that is lost has read the rows before
        gradient = xp.zeros_like(image)
        for _ in range(steps):
            residual = blur[lines, rows] @ image[rows] @ blur.T - readings[lines]
            gradient[rows] = blur[lines, rows].T @ residual @ blur + 0.002 * tomography.total_variation(xp, image[rows])[1]
            opt.step(gradient * present[:, None], where=present if only_rows else None)
    return image[REACH:-REACH, REACH:-REACH]


def error(image: Any, truth: Any) -> Any:
    """Return the root of the mean squared difference."""
    return float(((image - truth) ** 2).mean()) ** 0.5


if __name__ == "__main__":
    command_line.run(main)
