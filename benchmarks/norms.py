"""What do the norms of a step cost, beside the step alone and beside norms by hand?

    python benchmarks/norms.py [--backend numba-cpu] [--sizes 1e5,2e7] [--seconds 20] [--out FOLDER]

All contenders have the same parameters and gradients, and an optimizer each, which then takes the same step again and again, as
in a program. "norms by hand" copies the parameters before the step and takes both norms after it, with NumPy or CuPy.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import forms, measure
from gpuadam.kernels import limit

STEP = "gpuadam.Adam.step"
MODULES = {"numba-cpu": "numpy", "cupy": "cupy"}  # that have the norms by hand


def measure_rows(backend, options, notes):
    kernels = backends.load(backend.name)
    for n in report.numbers(options.sizes):
        contenders = contenders_of(kernels, n)
        rows = measure.rows_in_turn("norms", kernels, contenders, n, options.seconds)
        del contenders
        peers.release(backend)
        yield measure.add_ratios(rows)


def contenders_of(kernels, n):
    """Return {contender: function that does, or enqueues, one step}."""
    param, grad = (kernels.from_host(a) for a in measure.data({"param": n, "grad": n}, "float32"))
    opt, with_norms, other = (gpuadam.Adam(param, **forms.HYPERPARAMETERS, backend=kernels.name) for _ in range(3))
    contenders = {STEP: lambda: opt.step(grad), f"{STEP}, norms=True": lambda: with_norms.step(grad, norms=True)}
    if kernels.name in MODULES:
        xp = importlib.import_module(MODULES[kernels.name])

        def by_hand():
            before = param.copy()
            other.step(grad)
            before -= param
            return xp.linalg.norm(before), xp.linalg.norm(param)

        contenders[f"{STEP}, norms by hand"] = by_hand
    arrays = [param, grad, opt.state["0"]["m"], opt.state["0"]["v"]]
    for name, rule in limit.movers(kernels.memory).items():
        contenders[measure.OF_MOVER + name] = forms.launcher(kernels, forms.FORMS["float32"], arrays, rule)
    return contenders


def draw(rows, path):
    """Draw, for each backend and size, the time of each contender."""
    report.draw_bars(rows, path, lambda backend, n, _: f"{backend}\n{n:,} elements", "median time", width=6.5, height=2.2)


if __name__ == "__main__":
    sizes = {"CPU": "1e5,2e7", "CUDA": f"{1 << 20},{1 << 26}"}
    report.main("norms", __doc__, measure_rows, draw, seconds=20.0, sizes=sizes)
