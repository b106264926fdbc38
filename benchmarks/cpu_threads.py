"""From how many elements is a parallel loop faster than a serial one on this CPU?

    python benchmarks/cpu_threads.py [--seconds 1]

`PARALLEL_FROM` in kernels/cpu_backend.py is set from it. "own pool" is the Python threads that run where Numba's cannot.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpuadam
from gpuadam.cli.measuring import forms, measure
from gpuadam.kernels import adam, cpu_threads
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.terminal import output


@output.ending_plainly("cpu_threads")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size; default %(default)s")
    seconds = parser.parse_args().seconds
    print(f"gpuadam {gpuadam.__version__}, float32, medians in us")
    print(f"{'elements':>12}{'serial':>10}{'parallel':>10}{'own pool':>10}{'parallel/serial':>17}")
    for n in [1 << k for k in range(11, 25)]:
        launch = forms.launcher(numba_cpu, forms.FORMS["float32"], measure.data(n, "float32"), adam)
        functions = [
            _launch_with(launch, parallel_from=n + 1, threads_are_safe=lambda: True),
            _launch_with(launch, parallel_from=0, threads_are_safe=lambda: True),
            _launch_with(launch, parallel_from=0, threads_are_safe=lambda: False),
        ]
        times = [1e6 * np.median(t) for t in measure.in_turn(numba_cpu, functions, seconds)]
        print(f"{n:12,}" + "".join(f"{t:10,.1f}" for t in times) + f"{times[1] / times[0]:17.2f}")


def _launch_with(launch, parallel_from, threads_are_safe):
    """Return a function that makes the backend choose one of its three ways, and launches."""

    def run():
        numba_cpu.PARALLEL_FROM, cpu_threads.numba_threads_are_safe = parallel_from, threads_are_safe
        launch()

    return run


if __name__ == "__main__":
    main()
