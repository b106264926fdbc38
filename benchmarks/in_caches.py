"""Which unit of the processor binds a step whose arrays lie in the caches?

    python benchmarks/in_caches.py [--sizes 1e4,1e5,1e6] [--seconds 10] [--out FOLDER]

Where the memory does not bind, arithmetic may: a step of one element has a division and a square root, and a processor has one
unit for both, which is busy for several cycles with each vector. So the step stands beside the same loop without its division,
without its root and without both, which computes nonsense, and beside the fastest way to move its bytes. Whatever is left out and
makes the loop as fast as the bytes move is what binds. All have the same arrays, and run many times on end.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import report

from gpuadam import backends
from gpuadam.cli.measuring import forms, measure
from gpuadam.kernels import adam

STEP = measure.KERNEL
LEFT_OUT = {"without its division": ("div",), "without its root": ("sqrt",), "without both": ("div", "sqrt")}
ON_END = {"untimed": 2, "timed": 8}  # runs, so that the arrays stay in the caches


class Without:
    """Adam's rule without some operations, which become cheap ones of as many numbers."""

    def __init__(self, operations):
        self.operations, self.__name__ = operations, f"adam_without_{'_and_'.join(operations)}"

    def in_python(self, form, op):
        """Return the rule for Numba."""
        cheap = {"div": op.mul, "sqrt": op.neg}
        return adam.in_python(form, SimpleNamespace(**vars(op) | {name: cheap[name] for name in self.operations}))


RULES = {f"{STEP}, {name}": Without(operations) for name, operations in LEFT_OUT.items()}


def measure_rows(backend, options, notes):
    kernels, case = backends.load(backend.name), forms.FORMS["float32"]
    for n in report.numbers(options.sizes):
        arrays = forms.new_arrays(kernels, case, n)
        contenders = forms.kernel_and_movers(kernels, case, arrays)
        contenders |= {name: forms.launcher(kernels, case, arrays.values(), rule) for name, rule in RULES.items()}
        times = measure.in_turn(kernels, list(contenders.values()), options.seconds, **ON_END)
        moved = forms.bytes_moved(case) * n
        yield measure.add_ratios(
            [
                measure.row("in_caches", name, backend.name, n, state="warm", seconds=seconds, moved=moved)
                for name, seconds in zip(contenders, times, strict=True)
            ]
        )


def draw(rows, path):
    """Draw, for each size, the time of each contender."""
    report.draw_bars(rows, path, lambda backend, n, _: f"{n:,} elements", "median time of a launch", width=6.5, height=2.6)


if __name__ == "__main__":
    report.main("in_caches", __doc__, measure_rows, draw, seconds=10.0, sizes={"CPU": "1e4,1e5,1e6"})
