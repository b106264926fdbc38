"""Fit a sum of 2-D Gaussians to a photograph, and split and prune them while Adam goes on.

Each Gaussian has a centre, a width along each axis and an amplitude, which may be negative. It is a product of a factor along x
and one along y, so the sum over all Gaussians is one matrix product, and so is the way back to each factor. As in 3-D Gaussian
splatting (Kerbl et al. 2023, arXiv:2308.04079) those that fit worst are split and faint ones pruned: `opt.replace` takes arrays
of other lengths, and moments of those that stay go along. Beside it all are fitted from the start, to scikit-image's `camera`.
"""

import math
from typing import Any

import numpy as np

import gpuadam

from . import command_line

# Each kind of parameter has a learning rate of its own; all of them fall along a cosine.
RATES = {"x": 5e-3, "y": 5e-3, "log_width_x": 1e-1, "log_width_y": 1e-1, "amplitude": 2e-2}
HALF = math.sqrt(0.5)  # halves with this amplitude, width and distance have the integral and the variance of the whole


def main(argv: list[str] | None = None) -> None:
    """Fit in both ways, print the PSNR of each, save a picture."""
    counts = {"size": (160, "width of the picture in pixels"), "count": (1200, "number of Gaussians in the end", 2)}
    others = {"seed": (0, "of the random places at the start", 0), "arrays": "cupy", "plot": "gaussians.png"}
    options = command_line.options(argv, __doc__, steps=(300, "updates"), **counts, **others)
    xp, steps, size, count = command_line.array_module(options.arrays), options.steps, options.size, options.count
    photograph = command_line.picture("camera", size)
    target = xp.asarray(photograph)
    shown = {"photograph": target}
    for start in (count, count // 2):
        params = {name: xp.asarray(p) for name, p in initial_parameters(photograph, start, options.seed).items()}
        fit(xp, params, target, steps, count)
        fitted = picture(xp, params, size)
        print(f"{len(params['x'])} Gaussians, {start} of them at the start: PSNR {psnr(fitted, target):.2f} dB")
        shown[f"{start} Gaussians at the start: {psnr(fitted, target):.1f} dB"] = fitted
    shown["centres of those that were split"] = xp.histogram2d(params["y"], params["x"], size, ((0, 1), (0, 1)))[0]
    command_line.save_panels(options.plot, shown, f"{count} Gaussians after {steps} steps by gpuadam.Adam")


def initial_parameters(target: Any, count: int, seed: int) -> Any:
    """Return Gaussians at random places, about as wide as they are apart, that add up to roughly the target."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((2, count), dtype="float32")
    brightness = target[(y * len(target)).astype(int), (x * len(target)).astype(int)]
    width = 0.6 / math.sqrt(count)
    log_width = np.full(count, math.log(width), "float32")
    amplitude = brightness / (count * 2 * math.pi * width**2)  # the integral of a Gaussian is 2 pi width^2
    return {"x": x, "y": y, "log_width_x": log_width, "log_width_y": log_width.copy(), "amplitude": amplitude}


def fit(xp: Any, params: Any, target: Any, steps: int, count: int) -> None:
    """Fit the Gaussians params, in place. If they are fewer than count, they are split in six rounds until they are count."""
    start, lr = len(params["x"]), {name: command_line.cosine(rate, steps) for name, rate in RATES.items()}
    opt = gpuadam.Adam([{"params": {name: p}, "lr": lr[name]} for name, p in params.items()], betas=(0.9, 0.99))
    rounds = {max(1, steps * k // 10): start + (count - start) * k // 6 for k in range(1, 7)}
    for step in command_line.steps(steps, lambda: f"PSNR {psnr(picture(xp, params, len(target)), target):.2f} dB"):
        opt.step(loss_and_gradients(xp, params, target)[1])
        if start < count and step in rounds:
            split, rows = split_and_prune(xp, params, target, rounds[step])
            for name, params[name] in split.items():
                opt.replace(name, params[name], rows)


def split_and_prune(xp: Any, p: Any, target: Any, count: int) -> Any:
    """Return count Gaussians, and for each the number of the one that it was, or -1 for the half of one."""
    bright, grads = xp.abs(p["amplitude"]) > 0.02, loss_and_gradients(xp, p, target, absolute=True)[1]
    order = xp.argsort(xp.where(bright, -xp.hypot(grads["x"], grads["y"]), xp.inf))[: int(bright.sum())]
    worst, whole = order[: count - len(order)], order[count - len(order) :]
    side = xp.repeat(xp.asarray([0, 1, -1], "float32"), [len(whole), len(worst), len(worst)])
    p = {name: param[xp.concatenate([whole, worst, worst])] for name, param in p.items()}
    wider = p["log_width_x"] > p["log_width_y"]
    for axis, longer in (("x", wider), ("y", ~wider)):
        p[axis] += HALF * side * longer * xp.exp(p[f"log_width_{axis}"])
        p[f"log_width_{axis}"] += math.log(HALF) * xp.abs(side) * longer
    p["amplitude"][len(whole) :] *= HALF
    return p, xp.concatenate([whole, xp.full(2 * len(worst), -1)])  # halves with the moments of the whole cost 3 dB


def along(xp: Any, p: Any, axis: Any, size: int) -> Any:
    """Return the pixels' distance along "x" or "y" from each centre, in widths, and the Gaussian of it; both (count, size)."""
    pixels = ((xp.arange(size) + 0.5) / size).astype(p[axis].dtype)
    distance = (pixels - p[axis][:, None]) * xp.exp(-p[f"log_width_{axis}"])[:, None]
    return distance, xp.exp(-distance * distance / 2)


def picture(xp: Any, p: Any, size: int) -> Any:
    """Return the sum of the Gaussians p, of shape (size, size)."""
    (_, along_x), (_, along_y) = (along(xp, p, axis, size) for axis in "xy")
    return (p["amplitude"][:, None] * along_y).T @ along_x


def loss_and_gradients(xp: Any, p: Any, target: Any, absolute: bool = False) -> Any:
    """Return half the sum of squared differences from the target, and its gradient for every parameter.

    absolute: add up |gradient| of each pixel: several may pull a Gaussian apart (AbsGS, Ye et al. 2024, arXiv:2404.10484).
    """
    (distance_x, along_x), (distance_y, along_y) = (along(xp, p, axis, len(target)) for axis in "xy")
    residual = (p["amplitude"][:, None] * along_y).T @ along_x - target
    if absolute:
        residual, distance_x, distance_y = xp.abs(residual), xp.abs(distance_x), xp.abs(distance_y)
    # for each Gaussian and column, then each Gaussian and row: the residual under the Gaussian
    columns = (along_y @ residual) * along_x
    rows = (along_x @ residual.T) * along_y
    grads = {"amplitude": columns.sum(axis=1)}
    for axis, under, distance in (("x", columns, distance_x), ("y", rows, distance_y)):
        grads[axis] = p["amplitude"] * xp.exp(-p[f"log_width_{axis}"]) * (under * distance).sum(axis=1)
        grads[f"log_width_{axis}"] = p["amplitude"] * (under * distance * distance).sum(axis=1)
    return (residual * residual).sum() / 2, grads


def psnr(picture: Any, target: Any) -> float:
    """Return the peak signal-to-noise ratio in dB: 20 dB are errors of a tenth of white."""
    return -10 * math.log10(float(((picture - target) ** 2).mean()))


if __name__ == "__main__":
    command_line.run(main)
