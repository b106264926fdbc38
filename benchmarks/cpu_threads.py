"""From how many elements is a parallel loop faster than a serial one on this CPU?

    python benchmarks/cpu_threads.py

`PARALLEL_FROM` in kernels/numba_cpu.py is set from it.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpuadam
from gpuadam import hyperparameters
from gpuadam.cli import bench
from gpuadam.kernels import adam, numba_cpu


def main():
    h = hyperparameters.checked(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    form, scalars = hyperparameters.form_and_scalars(h, 10, np.dtype("float32"), False)
    print(gpuadam.__version__, "float32, medians in us")
    print(f"{'elements':>12}{'serial':>10}{'parallel':>10}{'own pool':>10}{'parallel/serial':>17}")
    for n in [1 << k for k in range(11, 25)]:
        arrays = list(bench.data(n, "float32"))
        arguments = [*arrays, arrays[3]]
        serial, parallel = (numba_cpu.build(adam, form, loop) for loop in ("serial", "parallel"))
        functions = [
            lambda f=serial, a=arguments: f(*a, *scalars),
            lambda f=parallel, a=arguments: f(*a, *scalars),
            lambda f=serial, a=arguments, n=n: numba_cpu._in_own_threads(f, n, a, scalars),
        ]
        times = [1e6 * np.median(t) for t in bench.in_turn(numba_cpu, functions, 1.0)]
        print(f"{n:12,}" + "".join(f"{t:10,.1f}" for t in times) + f"{times[1] / times[0]:17.2f}")


if __name__ == "__main__":
    main()
