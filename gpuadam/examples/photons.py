"""Clear a photograph of few photons, scikit-image's `camera`, with the gradient and its update in one kernel of your own.

Minimized is minus the log-likelihood of the counts (Poisson), plus smoothing * total variation. A step reads one image and writes
another, as a gradient needs the neighbours as they were. The same steps are taken in two kernels: the gradient, then adam_step.
"""

import math
import time
from typing import Any

import numpy as np

import gpuadam

from . import command_line, gaussians

WHITE, FAINT = 10.0, 1e-4  # photons of a white pixel; a number added to squares, because at 0 roots have no derivative
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.99), "bounds": (1e-3, 1)}


def main(argv: list[str] | None = None) -> None:
    """Count photons, find the picture in one kernel and in two, print how long a step takes, save a picture."""
    others = {"size": (512, "width in pixels"), "smoothing": (5.0, "weight of the total variation"), "arrays": "cupy"}
    options = command_line.options(argv, __doc__, steps=(200, "updates"), **others, plot="photons.png")
    xp, lr = command_line.array_module(options.arrays), command_line.cosine(0.05, options.steps)
    photograph = command_line.picture("camera", options.size)
    photons = xp.asarray(np.random.default_rng(0).poisson(WHITE * photograph).astype("float32"))
    kernels = (on_cpu if xp is np else on_gpu)(gpuadam.Rule("float32", **OPTIONS), options.smoothing, options.size)
    for steps in (1, options.steps):  # the first step compiles
        (image, in_one), (same, in_two) = (minimize(xp, photons, kernels, lr, steps, fuse) for fuse in (True, False))
    counted, differ = command_line.on_host(photons) / WHITE, np.count_nonzero(image.view("i4") != same.view("i4"))
    before, after = gaussians.psnr(counted, photograph), gaussians.psnr(image, photograph)
    print(f"{image.size} pixels: PSNR {before:.2f} dB as counted, {after:.2f} dB after {steps} steps")
    print(f"a step takes {in_one:.3f} ms in one kernel, {in_two:.3f} ms in two; their bits differ in {differ} pixels")
    shown = {f"photons, {before:.1f} dB": counted, f"after {steps} steps, {after:.1f} dB": image, "photograph": photograph}
    command_line.save_panels(options.plot, shown, f"{WHITE:.0f} photons for a white pixel, by gpuadam.Rule")


def minimize(xp: Any, photons: Any, kernels: Any, lr: Any, steps: int, fuse: bool) -> Any:
    """Return the image that Adam finds from a grey one, and the milliseconds of a step."""
    (fused, gradient_of, scalars), begin = kernels, time.perf_counter()
    image, new, m, v = (xp.full_like(photons, x) for x in (0.5, 0, 0, 0))
    for step in range(1, steps + 1):
        if fuse:
            fused(image, photons, new, m, v, scalars(step, lr=lr(step)))
            image, new = new, image
        else:
            gradient_of(image, photons, new)
            gpuadam.adam_step(image, new, m, v, step, lr=lr(step), **OPTIONS)
    return command_line.on_host(image), (time.perf_counter() - begin) / steps * 1e3


def on_cpu(rule: Any, smoothing: float, size: int) -> Any:
    """Return a function that takes a step, one that computes the gradient alone, and one that returns a step's scalars."""
    update = rule.for_njit()  # which says so if Numba is missing
    import numba

    white, faint, smooth = map(np.float32, (WHITE, FAINT, smoothing))  # Python's own would make all that they meet float64
    pull = numba.njit(lambda difference: difference / math.sqrt(difference * difference + faint), error_model="numpy")

    @numba.njit(error_model="numpy")
    def gradient_at(image: Any, photons: Any, y: Any, x: Any) -> Any:
        here = image[y, x]
        pulls = pull(here - image[max(y - 1, 0), x]) + pull(here - image[min(y + 1, size - 1), x])
        pulls += pull(here - image[y, max(x - 1, 0)]) + pull(here - image[y, min(x + 1, size - 1)])
        return white - photons[y, x] / here + smooth * pulls

    @numba.njit(parallel=True)
    def fused(image: Any, photons: Any, new: Any, m: Any, v: Any, s: Any) -> None:
        for y in numba.prange(size):
            for x in range(size):
                gradient = gradient_at(image, photons, np.int64(y), x)  # prange has no sign, and y - 1 would be a float64
                new[y, x], m[y, x], v[y, x] = update(image[y, x], gradient, m[y, x], v[y, x], s)

    @numba.njit(parallel=True)
    def gradient_of(image: Any, photons: Any, gradient: Any) -> None:
        for y in numba.prange(size):
            for x in range(size):
                gradient[y, x] = gradient_at(image, photons, np.int64(y), x)

    return fused, gradient_of, rule.scalars


def on_gpu(rule: Any, smoothing: float, size: int) -> Any:
    """Return the same for CuPy's arrays. For Numba's, kernels of cuda.jit call rule.for_cuda_jit() as those above do."""
    import cupy

    numbers = f"constexpr float WHITE = {WHITE}, FAINT = {FAINT}, SMOOTHING = {smoothing}; constexpr int SIZE = {size};"

    def launching(name: str) -> Any:  # with fmad one kernel might fuse a product and a sum, and the other not
        kernel = cupy.RawKernel(rule.for_cuda_c() + numbers + IN_CUDA_C, name, ("--fmad=false",))
        return lambda *arguments: kernel((-(-(size**2) // 128),), (128,), arguments)

    return launching("fused"), launching("gradient_of"), rule.struct


IN_CUDA_C = r"""
__device__ float pull(float difference) { return difference / sqrtf(difference * difference + FAINT); }
__device__ float gradient_at(const float* image, const float* photons, int y, int x) {
    const float here = image[y * SIZE + x];
    float pulls = pull(here - image[max(y - 1, 0) * SIZE + x]) + pull(here - image[min(y + 1, SIZE - 1) * SIZE + x]);
    pulls += pull(here - image[y * SIZE + max(x - 1, 0)]) + pull(here - image[y * SIZE + min(x + 1, SIZE - 1)]);
    return WHITE - photons[y * SIZE + x] / here + SMOOTHING * pulls;
}
extern "C" __global__ void fused(const float* image, const float* photons, float* next, float* m, float* v, gpuadam::Scalars s) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= SIZE * SIZE) return;
    next[i] = image[i];
    gpuadam::update(next[i], gradient_at(image, photons, i / SIZE, i % SIZE), m[i], v[i], s);
}
extern "C" __global__ void gradient_of(const float* image, const float* photons, float* gradient) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < SIZE * SIZE) gradient[i] = gradient_at(image, photons, i / SIZE, i % SIZE);
}
"""


if __name__ == "__main__":
    command_line.run(main)
