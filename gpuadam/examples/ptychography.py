"""Find a complex object and the complex beam that lights it from diffraction patterns, which have no phases.

The beam lights one small patch of the object after another, and the patches overlap. A detector counts photons: their mean is
|Fourier transform of beam * patch|^2. Minimized is half the sum of squared differences from roots of counts (Yeh et al. 2015,
Optics Express 23, 33214). Gradients are dL/dRe + i dL/dIm. With `complex="joint"` a number has one v, of |gradient|: a phase that
all share makes no difference. Beside it is ePIE (Maiden & Rodenburg 2009). Amplitude and phase: scikit-image's camera, coins.
"""

import math
from typing import Any

import numpy as np

import gpuadam

from . import command_line

WIDTH, APART, BATCH = 32, 6, 4  # pixels of a patch, pixels between patches, patterns in a step of Adam
PHOTONS = 1e6  # in a pattern
INNER = (slice(WIDTH // 2, -WIDTH // 2),) * 2  # outside of it there was little light


def main(argv: list[str] | None = None) -> None:
    """Simulate patterns, find object and beam from them in both ways, print the errors and save a picture."""
    counts = {"steps": (30, "passes over the patterns"), "size": (128, "width of the object in pixels", 2 * WIDTH)}
    options = command_line.options(argv, __doc__, **counts, arrays="cupy", plot="ptychography.png")
    xp = command_line.array_module(options.arrays)
    amplitude, phase = (xp.asarray(command_line.picture(name, options.size)) for name in ("camera", "coins"))
    truth = (0.3 + 0.7 * amplitude) * xp.exp(1.5j * phase)
    beam, guess, patches = focused(xp, 25), focused(xp, 30), places(options.size)
    means = xp.stack([abs(xp.fft.fft2(beam * truth[patch], norm="ortho")) ** 2 for patch in patches])
    amplitudes = xp.sqrt(xp.asarray(np.random.default_rng(0).poisson(command_line.on_host(means)), "float32"))

    sought, differences = command_line.on_host(truth)[INNER], {}
    for name, method in (("ePIE", epie), ("Adam", adam)):
        found = xp.ones(truth.shape, "complex64")
        method(xp, found, guess.copy(), amplitudes, patches, options.steps, sought)
        relative, found = error(found, sought)
        print(f"{len(patches)} patterns, {options.steps} passes over them: error {relative:.2%} by {name}")
        differences[f"15 times the error of {name}, {relative:.1%}"] = 15 * abs(found - sought)
    of_epie, of_adam = differences.items()
    shown = dict([("amplitude", abs(sought)), ("amplitude by Adam", abs(found)), of_epie])
    shown |= dict([("phase", np.angle(sought) / 1.5), ("phase by Adam", np.angle(found) / 1.5), of_adam])
    title = f"An object from {len(patches)} diffraction patterns after {options.steps} passes, by gpuadam.Adam"
    command_line.save_panels(options.plot, shown, title, rows=2)


def focused(xp: Any, defocus: Any) -> Any:
    """Return a beam: the picture of a round aperture, so far out of focus."""
    frequency = 2 * xp.fft.fftfreq(WIDTH)
    squared = frequency**2 + frequency[:, None] ** 2
    beam = xp.fft.fftshift(xp.fft.ifft2((squared < 0.36) * xp.exp(1j * defocus * squared)))
    return (beam * (PHOTONS / (abs(beam) ** 2).sum()) ** 0.5).astype("complex64")


def places(size: int) -> Any:
    """Return the slices of all patches: shifted from a regular grid, whose period would otherwise appear in the result."""
    rng, grid = np.random.default_rng(1), range(0, size - WIDTH + 1, APART)
    corners = np.array([(y, x) for y in grid for x in grid])
    corners = np.clip(corners + rng.integers(-2, 3, corners.shape), 0, size - WIDTH)
    return [(slice(y, y + WIDTH), slice(x, x + WIDTH)) for y, x in corners.tolist()]


def epie(xp: Any, found: Any, beam: Any, amplitudes: Any, patches: Any, steps: int, sought: Any) -> None:
    """Update object and beam with one pattern after another, as ePIE does with its steps of 1."""
    rng = np.random.default_rng(2)
    for _ in command_line.steps(steps, lambda: f"ePIE: error {error(found, sought)[0]:.2%}"):
        for k in rng.permutation(len(patches)):
            lit = found[patches[k]].copy()
            _, gradient = loss_and_gradient_of(xp, beam * lit, amplitudes[k])
            found[patches[k]] -= beam.conj() * gradient / (abs(beam) ** 2).max()
            beam -= lit.conj() * gradient / (abs(lit) ** 2).max()


def adam(xp: Any, found: Any, beam: Any, amplitudes: Any, patches: Any, steps: int, sought: Any) -> None:
    """Update object and beam with some patterns in each step."""
    rng, total = np.random.default_rng(2), steps * math.ceil(len(patches) / BATCH)
    rates = ("object", found, 0.1), ("beam", beam, 0.1 * float(abs(beam).mean()))
    groups: list[gpuadam.typing.Group] = [{"params": {k: p}, "lr": command_line.cosine(rate, total)} for k, p, rate in rates]
    opt = gpuadam.Adam(groups, betas=(0.9, 0.99), complex="joint")
    for _ in command_line.steps(steps, lambda: f"Adam: error {error(found, sought)[0]:.2%}"):
        order = rng.permutation(len(patches))
        for start in range(0, len(patches), BATCH):
            chosen = order[start : start + BATCH]
            counted = amplitudes[xp.asarray(chosen)]
            opt.step(loss_and_gradients(xp, found, beam, counted, [patches[k] for k in chosen])[1])


def loss_and_gradients(xp: Any, found: Any, beam: Any, amplitudes: Any, patches: Any) -> Any:
    """Return half the sum of squared differences of amplitudes, and its gradients, dL/dRe + i dL/dIm."""
    lit, grads = xp.stack([found[patch] for patch in patches]), {"object": xp.zeros_like(found)}
    loss, of_waves = loss_and_gradient_of(xp, beam * lit, amplitudes)
    grads["beam"] = (lit.conj() * of_waves).sum(axis=0)
    for patch, gradient in zip(patches, beam.conj() * of_waves, strict=True):
        grads["object"][patch] += gradient
    return loss, grads


def loss_and_gradient_of(xp: Any, waves: Any, amplitudes: Any) -> Any:
    """Return the loss of waves behind the object, of shape (..., WIDTH, WIDTH), and its gradient for them."""
    spectrum = xp.fft.fft2(waves, norm="ortho")
    residual = spectrum - amplitudes * xp.exp(1j * xp.angle(spectrum))
    return (abs(residual) ** 2).sum() / 2, xp.fft.ifft2(residual, norm="ortho")


def error(found: Any, sought: Any) -> Any:
    """Return the relative error of an object, and the object without the factor and phase ramp that no pattern determines."""
    found, across = command_line.on_host(found)[INNER], np.arange(len(sought)) - len(sought) / 2
    for _ in range(5):
        ratio = sought * found.conj()
        angle, weight = np.angle(ratio * ratio.sum().conj()), abs(ratio)
        for along in (across, across[:, None]):
            found = found * np.exp(1j * along * (weight * angle * along).sum() / (weight * along**2).sum())
    found *= (sought * found.conj()).sum() / (abs(found) ** 2).sum()
    return float(np.linalg.norm(found - sought) / np.linalg.norm(sought)), found


if __name__ == "__main__":
    command_line.run(main)
