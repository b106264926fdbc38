"""Fit a sum of 2-D Gaussians to a photograph, with gradients written by hand.

Each Gaussian has a centre, a width along each axis and an amplitude, which may be negative. It is a product of a factor along x
and one along y, so the sum over all Gaussians is one matrix product, and so is the way back to each factor.
The photograph is scikit-image's `camera`.
"""

import math

import numpy as np

import gpuadam

from . import command_line

# Each kind of parameter has a learning rate of its own; all of them fall along a cosine.
RATES = {"x": 5e-3, "y": 5e-3, "log_width_x": 1e-1, "log_width_y": 1e-1, "amplitude": 2e-2}


def main(argv=None):
    """Fit, print the PSNR before and after, save a picture."""
    counts = {"size": (160, "width of the picture in pixels"), "count": (1200, "number of Gaussians")}
    options = command_line.options(argv, __doc__, steps=(300, "updates"), **counts, arrays="cupy", plot="gaussians.png")
    xp, steps = command_line.array_module(options.arrays), options.steps
    photograph = command_line.picture("camera", options.size)
    target = xp.asarray(photograph)
    params = {name: xp.asarray(p) for name, p in initial_parameters(photograph, options.count).items()}
    before = picture(xp, params, options.size)

    groups = [{"params": {name: params[name]}, "lr": command_line.cosine(lr, steps)} for name, lr in RATES.items()]
    opt = gpuadam.Adam(groups, betas=(0.9, 0.99))
    for _ in command_line.steps(steps, lambda: f"PSNR {psnr(picture(xp, params, options.size), target):.2f} dB"):
        _, grads = loss_and_gradients(xp, params, target)
        opt.step(grads)

    after = picture(xp, params, options.size)
    from_psnr, to_psnr = psnr(before, target), psnr(after, target)
    print(
        f"{options.count} Gaussians, {sum(p.size for p in params.values())} numbers, for {target.size} pixels: "
        f"PSNR {from_psnr:.2f} dB before, {to_psnr:.2f} dB after {steps} steps"
    )
    shown = {f"start, {from_psnr:.1f} dB": before, f"after {steps} steps, {to_psnr:.1f} dB": after, "photograph": target}
    command_line.save_panels(options.plot, shown, f"{options.count} Gaussians fitted by gpuadam.Adam")


def initial_parameters(target, count):
    """Return Gaussians at random places, about as wide as they are apart, that add up to roughly the target."""
    rng = np.random.default_rng(0)
    x, y = rng.random((2, count), dtype="float32")
    brightness = target[(y * len(target)).astype(int), (x * len(target)).astype(int)]
    width = 0.6 / math.sqrt(count)
    log_width = np.full(count, math.log(width), "float32")
    amplitude = brightness / (count * 2 * math.pi * width**2)  # the integral of a Gaussian is 2 pi width^2
    return {"x": x, "y": y, "log_width_x": log_width, "log_width_y": log_width.copy(), "amplitude": amplitude}


def along(xp, p, axis, size):
    """Return the pixels' distance along "x" or "y" from each centre, in widths, and the Gaussian of it; both (count, size)."""
    pixels = ((xp.arange(size) + 0.5) / size).astype(p[axis].dtype)
    distance = (pixels - p[axis][:, None]) * xp.exp(-p[f"log_width_{axis}"])[:, None]
    return distance, xp.exp(-distance * distance / 2)


def picture(xp, p, size):
    """Return the sum of the Gaussians p, of shape (size, size)."""
    (_, along_x), (_, along_y) = (along(xp, p, axis, size) for axis in "xy")
    return (p["amplitude"][:, None] * along_y).T @ along_x


def loss_and_gradients(xp, p, target):
    """Return half the sum of squared differences from the target, and its gradient for every parameter."""
    (distance_x, along_x), (distance_y, along_y) = (along(xp, p, axis, len(target)) for axis in "xy")
    residual = (p["amplitude"][:, None] * along_y).T @ along_x - target
    # for each Gaussian and column, then each Gaussian and row: the residual under the Gaussian
    columns = (along_y @ residual) * along_x
    rows = (along_x @ residual.T) * along_y
    grads = {"amplitude": columns.sum(axis=1)}
    for axis, under, distance in (("x", columns, distance_x), ("y", rows, distance_y)):
        grads[axis] = p["amplitude"] * xp.exp(-p[f"log_width_{axis}"]) * (under * distance).sum(axis=1)
        grads[f"log_width_{axis}"] = p["amplitude"] * (under * distance * distance).sum(axis=1)
    return (residual * residual).sum() / 2, grads


def psnr(picture, target):
    """Return the peak signal-to-noise ratio in dB: 20 dB are errors of a tenth of white."""
    return -10 * math.log10(float(((picture - target) ** 2).mean()))


if __name__ == "__main__":
    command_line.run(main)
