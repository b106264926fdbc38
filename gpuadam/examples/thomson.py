"""Spread charges over a sphere, with a gradient by a Numba CUDA kernel of your own.

Thomson's problem (1904): which places on a sphere give n equal charges the least energy, the sum of 1/distance over all pairs?
The device arrays are the program's, its kernel computes the gradient, and gpuadam updates in place. Without a GPU the function
of one charge is compiled for the CPU, and the arrays are NumPy's. A charge lies at p / |p|, where p is its parameter.
"""

import math
import warnings
from typing import Any

import numpy as np

import gpuadam

from ..backends import load
from . import command_line

# of so many charges, as Wales, McKay & Altschuler found: Physical Review B 79, 224115 (2009)
LEAST_KNOWN = {12: 49.165253, 32: 412.261275, 72: 2255.001191, 100: 4448.350634}


def main(argv: list[str] | None = None) -> None:
    """Find places for the charges, print the energy, save a picture."""
    counts = {"steps": (600, "updates"), "size": (32, "number of charges", 4)}
    options = command_line.options(argv, __doc__, **counts, arrays="numba", plot="thomson.png")
    n, steps, status = options.size, options.steps, gpuadam.backend_status()["numba-cuda"]
    if options.arrays == "auto":
        options.arrays = "numba" if status.available else "numpy"
        if not status.available:
            print(f"no GPU for Numba CUDA, so this is --arrays numpy: {status.reason}")
    start = np.random.default_rng(0).standard_normal((n, 3), dtype="float32")
    if options.arrays == "numba":
        load("numba-cuda")
        from numba import cuda

        warnings.filterwarnings("ignore", "Grid size")  # so few charges do not fill a GPU
        points, gradient, energies = cuda.to_device(start), cuda.device_array_like(start), cuda.device_array(n, "float32")
        compute = gradient_kernel(cuda)[-(-n // 128), 128]  # blocks of 128 threads
    else:
        load("numba-cpu")  # which says so if Numba is missing
        points, gradient, energies = start.copy(), np.empty_like(start), np.empty(n, "float32")
        compute = gradient_loop()

    opt = gpuadam.Adam(points, lr=command_line.cosine(0.05, steps, end=0.01))
    for _ in command_line.steps(steps, lambda: f"energy {command_line.on_host(energies).sum() / 2:.4f}"):
        compute(points, gradient, energies)
        opt.step(gradient)

    compute(points, gradient, energies)
    energy, known = command_line.on_host(energies).sum() / 2, LEAST_KNOWN.get(n)
    print(f"{n} charges: energy {energy:.4f}" + (f"; the least known is {known:.4f}" if known else ""))
    shown = {"start": start, f"after {steps} steps": points}
    command_line.save_panels(options.plot, shown, "Charges on a sphere, by gpuadam.Adam", draw, projection="3d")


def gradient_of(points: Any, k: Any, gradient: Any, energies: Any) -> None:
    """Write the gradient for charge k to gradient[k], of shape (3,), and the energy of its pairs to energies[k]."""
    one = np.float32(1)  # Numba's own literals are float64, and would make all that they meet so
    px, py, pz = points[k, 0], points[k, 1], points[k, 2]
    shrink = one / math.sqrt(px * px + py * py + pz * pz)
    x, y, z = px * shrink, py * shrink, pz * shrink
    gx = gy = gz = energy = np.float32(0)
    for j in range(points.shape[0]):
        if j != k:
            qx, qy, qz = points[j, 0], points[j, 1], points[j, 2]
            shrink_q = one / math.sqrt(qx * qx + qy * qy + qz * qz)
            dx, dy, dz = x - qx * shrink_q, y - qy * shrink_q, z - qz * shrink_q
            potential = one / math.sqrt(dx * dx + dy * dy + dz * dz)
            energy += potential
            cube = potential * potential * potential
            gx, gy, gz = gx - dx * cube, gy - dy * cube, gz - dz * cube
    energies[k] = energy
    outward = gx * x + gy * y + gz * z  # along the radius nothing changes
    for axis, g, along in ((0, gx, x), (1, gy, y), (2, gz, z)):
        gradient[k, axis] = (g - outward * along) * shrink


def gradient_kernel(cuda: Any) -> Any:
    """Return the kernel of all gradients, a thread for each charge. cuda: the module numba.cuda."""
    of_one = cuda.jit(device=True)(gradient_of)

    @cuda.jit
    def kernel(points: Any, gradient: Any, energies: Any) -> None:
        k = cuda.grid(1)
        if k < points.shape[0]:
            of_one(points, k, gradient, energies)

    return kernel


def gradient_loop() -> Any:
    """Return the same on the CPU: a loop over the charges."""
    import numba

    of_one = numba.njit(gradient_of)

    @numba.njit
    def loop(points: Any, gradient: Any, energies: Any) -> None:
        for k in range(points.shape[0]):
            of_one(points, k, gradient, energies)

    return loop


def draw(axis: Any, points: Any) -> None:
    """Draw the polyhedron whose corners are the charges."""
    hulls, art3d = command_line.need("examples", "scipy.spatial", "mpl_toolkits.mplot3d.art3d")
    on_sphere = points / np.linalg.norm(points, axis=1, keepdims=True)
    faces = on_sphere[hulls.ConvexHull(on_sphere).simplices]
    inward = np.linalg.det(faces) < 0
    faces[inward] = faces[inward, ::-1]
    axis.add_collection3d(art3d.Poly3DCollection(faces, facecolors="#9cc2f5", edgecolors="#1261c9", shade=True))
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axis.set_box_aspect((1, 1, 1), zoom=1.5)


if __name__ == "__main__":
    command_line.run(main)
