"""What does a step on a GPU cost the host, beside bare launches of kernels over as many arrays?

    python benchmarks/host_time.py [--backend cupy] [--sizes 1,148,1000] [--seconds 6] [--out FOLDER]

--sizes are numbers of arrays, of 1,000 elements each. Beside `adam_step` over each array, `Adam.step` over all, which may clip to
the norm of all gradients, and `global_norm` stands the library's own launch of as much: Adam as one writes it, in an
ElementwiseKernel of CuPy and in a kernel of Numba, which take four arrays and four numbers. The bare launches are one for each
array; `Adam.step` makes one for all. Times are the host's, until the call returns.

With GPUADAM_GPU=host it measures without a GPU: the libraries run over tests/stand_in, whose driver then answers from compiled
code in no time and runs no kernel (tests/stand_in/instant.py). What is left is Python's time and the libraries'.
"""

import contextlib
import itertools
import math
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if os.environ.get("GPUADAM_GPU") == "host":  # before CuPy and numba-cuda ask for a device
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import stand_in
    from stand_in import instant

    DRIVER = stand_in.start()
else:
    DRIVER = None

import numpy as np
import peers
import report
import timing

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import measure

ELEMENTS = 1000  # of each array
BARE = {"cupy": "bare ElementwiseKernel", "numba-cuda": "bare Numba kernel"}


def steps(kernels, arrays):
    """Return {contender: function that takes a step on all arrays}. arrays: lists of param, grad, m and v."""
    count, params = itertools.count(1), [row[0] for row in arrays]
    opt, clips = (gpuadam.Adam(params, **peers.HYPERPARAMETERS) for _ in range(2))
    mixed, scale = gpuadam.Adam(params, **peers.HYPERPARAMETERS, capturable=True), kernels.from_host(np.array([0.5]))
    grads = [row[1] for row in arrays]

    def adam_steps():
        number = next(count)
        for param, grad, m, v in arrays:
            gpuadam.adam_step(param, grad, m, v, number, **peers.HYPERPARAMETERS)

    return {
        "gpuadam.adam_step": adam_steps,
        "gpuadam.Adam.step": lambda: opt.step(grads),
        "gpuadam.Adam.step, max_norm": lambda: clips.step(grads, max_norm=1.0),
        "gpuadam.Adam.step, mixed precision": lambda: mixed.step(grads, grad_scale=scale, max_norm=1.0, check_finite=True),
        "gpuadam.global_norm": lambda: gpuadam.global_norm(grads),
    }


def bare_numba_kernel(backend, shapes):
    """A Numba kernel whose body is Adam as one writes it: the arguments of `peers.one_element_a_thread`."""
    from numba import cuda

    @cuda.jit(lto=False)  # as the package's kernels are compiled
    def kernel(grad, lr, one_minus_beta1, one_minus_beta2, eps, param, m, v):
        i = cuda.grid(1)
        if i < param.size:
            m[i] += one_minus_beta1 * (grad[i] - m[i])
            v[i] += one_minus_beta2 * (grad[i] * grad[i] - v[i])
            param[i] -= lr * m[i] / (math.sqrt(v[i]) + eps)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size")  # of arrays too small to fill a GPU
        configured = kernel[-(-ELEMENTS // 128), 128]
    arrays, (beta1, beta2) = peers.own_arrays(backend, shapes), peers.BETAS

    def step():
        for param, grad, m, v in arrays:
            configured(grad, peers.LR, 1 - beta1, 1 - beta2, peers.EPS, param, m, v)

    return peers.Contender(step)


def measure_rows(backend, options, notes):
    kernels = backends.load(backend.name)
    if backend.memory != "CUDA":
        notes.append("a step on a CPU takes its time on the host: see small.py and many.py")
        return
    for n in report.numbers(options.sizes):
        shapes = n * [(ELEMENTS,)]
        bare = (peers.one_element_a_thread if backend.name == "cupy" else bare_numba_kernel)(backend, shapes).step
        contenders = steps(kernels, peers.own_arrays(backend, shapes)) | {BARE[backend.name]: bare}
        for function in [*contenders.values()] * 3:  # compiled, and known to the optimizer
            function()
        measure.drain(kernels)
        calls = max(1, 50 // n)
        with instant.answers(DRIVER) if DRIVER else contextlib.nullcontext():
            finish = (lambda: None) if DRIVER else lambda: measure.drain(kernels)
            times = timing.on_host(list(contenders.values()), finish, options.seconds / len(options.sizes), calls)
        times = dict(zip(contenders, times, strict=True))
        yield measure.rows_of("host_time", kernels, n * ELEMENTS, times, state="warm", arrays=n)


def draw(rows, path):
    """Draw, for each backend and number of arrays, the host's time of each contender."""

    def title(backend, n, of_size):
        return f"{backend}: {n:,} array{'s' * (n > 1)} of {ELEMENTS:,}"

    report.draw_bars(rows, path, title, "median time of a call", width=4.6, height=3.2, columns=("arrays",))


if __name__ == "__main__":
    sizes = dict.fromkeys(("CPU", "CUDA"), "1,148,1000")
    report.main("host_time", __doc__, measure_rows, draw, seconds=6.0, sizes=sizes, sizes_help="numbers of arrays")
