"""Reconstruct a slice from few noisy X-ray projections, with gradients written by hand.

A ray's reading is the sum of the slice along it. Each pixel casts a shadow on a row of bins, shared between two neighbours:
`project` adds these shares up, and `back_project`, its transpose, gathers them again. Minimized is half the sum of squared
differences from the readings, plus smoothing * total variation (Rudin, Osher & Fatemi 1992), which prefers flat regions.
The slice is scikit-image's `shepp_logan_phantom`; filtered back-projection, the classical method, stands beside.
"""

import math
from typing import Any

import numpy as np

import gpuadam

from . import command_line


def main(argv: list[str] | None = None) -> None:
    """Project, add noise, reconstruct; print the errors and save a picture."""
    counts = {"size": (128, "width of the slice in pixels"), "angles": (30, "directions of projection")}
    others = {"smoothing": (1.0, "weight of the total variation"), "arrays": "cupy", "plot": "tomography.png"}
    options = command_line.options(argv, __doc__, steps=(300, "updates"), **counts, **others)
    xp = command_line.array_module(options.arrays)
    truth = xp.asarray(command_line.picture("shepp_logan_phantom", options.size))
    rays = Rays(xp, options.size, options.angles)
    readings = rays.project(truth)
    noise = np.random.default_rng(0).standard_normal(readings.shape, dtype="float32")
    readings += 0.01 * readings.max() * xp.asarray(noise)

    classical = rays.filtered_back_projection(readings)
    reconstructed = reconstruct(rays, readings, options.smoothing, options.steps)
    before, after = error(classical, truth), error(reconstructed, truth)
    print(
        f"{options.angles} projections of {rays.bins} readings for {truth.size} pixels, noise of 1 %: relative error "
        f"{before:.1%} by filtered back-projection, {after:.1%} after {options.steps} steps"
    )
    shown = {"slice": truth, f"filtered back-projection, error {before:.0%}": classical}
    shown[f"{options.steps} steps, error {after:.0%}"] = reconstructed
    command_line.save_panels(options.plot, shown, f"A slice from {options.angles} noisy projections, by gpuadam.Adam")


class Rays:
    """Parallel rays through a square slice, from directions evenly spread over half a turn."""

    def __init__(self, xp: Any, size: int, angles: Any) -> None:
        self.xp, self.size, self.angles = xp, size, angles
        self.bins = math.ceil(size * math.sqrt(2)) + 2
        across = xp.arange(size, dtype="float32") - (size - 1) / 2
        angle = (xp.arange(angles, dtype="float32") * (math.pi / angles))[:, None, None]
        shadow = xp.cos(angle) * across + xp.sin(angle) * across[:, None] + (self.bins - 1) / 2
        left = xp.floor(shadow)
        # of every angle and pixel: the first of the two bins, counted through all angles, and the share of the second
        self.first = left.astype("int64") + self.bins * xp.arange(angles)[:, None, None]
        self.share = (shadow - left).astype("float32")

    def project(self, image: Any) -> Any:
        """Return the readings of a slice, of shape (angles, bins)."""
        readings = self.xp.zeros(self.angles * self.bins)
        for bins, shares in ((self.first, 1 - self.share), (self.first + 1, self.share)):
            readings += self.xp.bincount(bins.ravel(), (shares * image).ravel(), minlength=len(readings))
        return readings.astype("float32").reshape(self.angles, self.bins)

    def back_project(self, readings: Any) -> Any:
        """Return the transpose of `project`, applied to readings: of shape (size, size)."""
        readings = readings.ravel()
        return ((1 - self.share) * readings[self.first] + self.share * readings[self.first + 1]).sum(axis=0)

    def filtered_back_projection(self, readings: Any) -> Any:
        """Return the classical reconstruction: a ramp filter along the bins, then back-projection."""
        fft, length = self.xp.fft, 2 * self.bins
        ramp = 2 * fft.rfftfreq(length)
        filtered = fft.irfft(fft.rfft(readings, length) * ramp, length)[:, : self.bins]
        return self.back_project(filtered.astype("float32")) * (math.pi / (2 * self.angles))


def reconstruct(rays: Any, readings: Any, smoothing: float, steps: int) -> Any:
    """Return the slice that Adam finds from a black one. No density is negative: the update itself keeps the bound."""
    xp = rays.xp
    image = xp.zeros((rays.size, rays.size), "float32")
    opt = gpuadam.Adam(image, lr=command_line.cosine(0.1, steps), betas=(0.9, 0.99), bounds=(0, None))
    for _ in command_line.steps(steps, lambda: f"readings met within {error(rays.project(image), readings):.2%}"):
        residual = rays.project(image) - readings
        opt.step(rays.back_project(residual) + smoothing * total_variation(xp, image)[1])
    return image


def total_variation(xp: Any, image: Any, rounding: float = 1e-2) -> Any:
    """Return the sum over pixels of |gradient of the image|, rounded off at 0, and its gradient."""
    down, right = xp.zeros_like(image), xp.zeros_like(image)
    down[:-1], right[:, :-1] = image[1:] - image[:-1], image[:, 1:] - image[:, :-1]
    length = xp.sqrt(down * down + right * right + rounding**2)
    down, right = down / length, right / length
    gradient = -down - right
    gradient[1:] += down[:-1]
    gradient[:, 1:] += right[:, :-1]
    return length.sum(), gradient


def error(image: Any, truth: Any) -> Any:
    """Return the norm of the difference over the norm of the truth."""
    return float(((image - truth) ** 2).sum() / (truth**2).sum()) ** 0.5


if __name__ == "__main__":
    command_line.run(main)
