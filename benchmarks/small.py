"""What does one call on a small array cost?

    python benchmarks/small.py [--backend numba-cpu] [--sizes 1,1000,10000] [--seconds 3] [--out FOLDER]

In two states. "warm": each contender makes 50 calls in its turn, the first ten not timed, as in a loop that does little else. "in
turn": one call each, so that each finds the caches as all the others left them, as between the forward and backward passes of a
real training step. On a GPU it is the host's time until the call returns; beside it stands the same library's launch of a kernel
that does nothing with the same arguments. A call that the driver repeats (`kernels/gpu_launch.py`) may be faster than that.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import peers
import report
import timing

from gpuadam import backends
from gpuadam.cli.measuring import measure

CALLS = {"warm": 50, "in turn": 1}
N_SCALARS = 7


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, options.peers)
    notes += report.listed(absent)
    kernels = backends.load(backend.name)
    on_gpu = backend.memory == "CUDA"
    for n in report.numbers(options.sizes):
        contenders = {peer.name: peer.build(backend, [(n,)]) for peer in (*peers.OURS, *present)}
        name, launch_nothing = EMPTY[backend.name](kernels, n)
        contenders[name] = peers.Contender(launch_nothing)
        functions = [c.step if on_gpu else c.whole(kernels) for c in contenders.values()]
        wait = peers.wait_for_all(contenders.values(), kernels)
        for state, calls in CALLS.items():
            times = timing.on_host(functions, wait, options.seconds / len(CALLS), calls)
            times = dict(zip(contenders, times, strict=True))
            yield measure.add_ratios(measure.rows_of("small", kernels, n, times, state=state))


def empty_numba_function(kernels, n):
    import numba

    @numba.njit
    def nothing(param, grad, m, v, max_v, a, b, c, d, e, f, g):
        pass

    arguments = [*_float32(n, 5), *_scalars()]
    return "empty Numba function", lambda: nothing(*arguments)


def empty_numba_kernel(kernels, n):
    from numba import cuda

    @cuda.jit(lto=False)  # as the package's kernels are compiled
    def nothing(addresses, head, vectors, threads, start, key, scalars):
        pass

    configured = nothing[1, 128]
    addresses = tuple(range(1 << 40, (1 << 40) + 4))  # these and counts are 64-bit integers
    arguments = [addresses, 0, n, n, 0, 0, tuple(_scalars())]
    return "empty Numba kernel", lambda: configured(*arguments)


def empty_cupy_kernel(kernels, n):
    import cupy

    nothing = cupy.ElementwiseKernel(
        "raw float32 grad, int64 head, int64 vectors, " + ", ".join(f"float32 s{k}" for k in range(N_SCALARS)),
        "raw float32 param, raw float32 m, raw float32 v",
        ";",
        "nothing",
    )
    param, grad, m, v = (kernels.from_host(a) for a in _float32(n, 4))
    scalars = _scalars()
    return "empty CuPy kernel", lambda: nothing(grad, 0, n, *scalars, param, m, v, size=n)


EMPTY = {"numba-cpu": empty_numba_function, "numba-cuda": empty_numba_kernel, "cupy": empty_cupy_kernel}


def _float32(n, count):
    return [np.ones(n, "float32") for _ in range(count)]


def _scalars():
    return [np.float32(k + 1) for k in range(N_SCALARS)]


def draw(rows, path):
    """Draw, for each backend and size, both states of each contender."""

    def title(backend, n, of_size):
        return f"{backend}\n{n:,} element{'s' * (n > 1)}"

    report.draw_bars(rows, path, title, "median time of a call", width=4.6, height=5)


if __name__ == "__main__":
    sizes = dict.fromkeys(("CPU", "CUDA"), "1,1000,10000")
    report.main("small", __doc__, measure_rows, draw, seconds=3.0, sizes=sizes)
