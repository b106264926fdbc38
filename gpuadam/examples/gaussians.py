"""Fit a sum of 2-D Gaussians to a photograph, with gradients written by hand.

Each Gaussian has a centre, a width along each axis and an amplitude, which may be negative. It is a product of a factor along x
and one along y, so the sum over all Gaussians is one matrix product, and so is the way back to each factor.
The photograph is scikit-image's `camera`.
"""

import math

import numpy as np

import gpuadam

from . import command_line


def main(argv=None):
    """Fit, print the PSNR before and after, save a picture."""
    counts = {"steps": (300, "updates"), "size": (160, "width of the picture in pixels")}
    counts["count"] = (1200, "number of Gaussians")
    options = command_line.parser(__doc__, **counts, arrays="cupy", plot="gaussians.png").parse_args(argv)
    xp = command_line.array_module(options.arrays)
    target = xp.asarray(command_line.picture("camera", options.size))
    params = {name: xp.asarray(p) for name, p in initial_parameters(command_line.on_host(target), options.count).items()}
    before = picture(xp, params, options.size)

    fit(xp, params, target, options.steps)
    after = picture(xp, params, options.size)
    numbers = sum(p.size for p in params.values())
    print(
        f"{options.count} Gaussians, {numbers} numbers, for {target.size} pixels: "
        f"PSNR {psnr(before, target):.2f} dB before, {psnr(after, target):.2f} dB after {options.steps} steps"
    )
    shown = {
        f"start, {psnr(before, target):.1f} dB": before,
        f"after {options.steps} steps, {psnr(after, target):.1f} dB": after,
        "photograph": target,
    }
    command_line.save_pictures(options.plot, shown, f"{options.count} Gaussians fitted by gpuadam.Adam")


def initial_parameters(target, count):
    """Return Gaussians at random places, about as wide as they are apart, that add up to roughly the target."""
    rng = np.random.default_rng(0)
    x, y = rng.random((2, count), dtype="float32")
    brightness = target[(y * len(target)).astype(int), (x * len(target)).astype(int)]
    width = 0.6 / math.sqrt(count)
    log_width = np.full(count, math.log(width), "float32")
    amplitude = brightness / (count * 2 * math.pi * width**2)  # the integral of a Gaussian is 2 pi width^2
    return {"x": x, "y": y, "log_width_x": log_width, "log_width_y": log_width.copy(), "amplitude": amplitude}


def fit(xp, params, target, steps):
    """Update params in place. Each kind has a learning rate of its own; all of them fall along a cosine."""

    def group(lr, *names):
        return {"params": {name: params[name] for name in names}, "lr": command_line.cosine(lr, steps)}

    groups = [group(5e-3, "x", "y"), group(1e-1, "log_width_x", "log_width_y"), group(2e-2, "amplitude")]
    opt = gpuadam.Adam(groups, betas=(0.9, 0.99))
    for _ in command_line.steps(steps, lambda: f"PSNR {psnr(picture(xp, params, len(target)), target):.2f} dB"):
        _, grads = loss_and_gradients(xp, params, target)
        opt.step(grads)


def along(xp, centre, log_width, size):
    """Return the pixels' distance from each centre, in widths, and the Gaussian of it; both (count, size)."""
    pixels = ((xp.arange(size) + 0.5) / size).astype(centre.dtype)
    distance = (pixels - centre[:, None]) * xp.exp(-log_width)[:, None]
    return distance, xp.exp(-distance * distance / 2)


def picture(xp, p, size):
    """Return the sum of the Gaussians p, of shape (size, size)."""
    _, along_x = along(xp, p["x"], p["log_width_x"], size)
    _, along_y = along(xp, p["y"], p["log_width_y"], size)
    return (p["amplitude"][:, None] * along_y).T @ along_x


def loss_and_gradients(xp, p, target):
    """Return half the sum of squared differences from the target, and its gradient for every parameter."""
    distance_x, along_x = along(xp, p["x"], p["log_width_x"], len(target))
    distance_y, along_y = along(xp, p["y"], p["log_width_y"], len(target))
    residual = (p["amplitude"][:, None] * along_y).T @ along_x - target
    # for each Gaussian and column, then each Gaussian and row: the residual under the Gaussian
    columns = (along_y @ residual) * along_x
    rows = (along_x @ residual.T) * along_y
    amplitude = p["amplitude"]
    return (residual * residual).sum() / 2, {
        "x": amplitude * xp.exp(-p["log_width_x"]) * (columns * distance_x).sum(axis=1),
        "y": amplitude * xp.exp(-p["log_width_y"]) * (rows * distance_y).sum(axis=1),
        "log_width_x": amplitude * (columns * distance_x * distance_x).sum(axis=1),
        "log_width_y": amplitude * (rows * distance_y * distance_y).sum(axis=1),
        "amplitude": columns.sum(axis=1),
    }


def psnr(picture, target):
    """Return the peak signal-to-noise ratio in dB: 20 dB are errors of a tenth of white."""
    return -10 * math.log10(float(((picture - target) ** 2).mean()))


if __name__ == "__main__":
    command_line.run(main)
