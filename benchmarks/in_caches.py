"""Which unit of the processor binds a step whose arrays lie in the caches?

    python benchmarks/in_caches.py [--sizes 1e4,1e5,1e6] [--forms "float32,8-bit state"] [--seconds 10] [--out FOLDER]

Where the memory does not bind, arithmetic may: a step of one element has a division and a square root, and a processor has one
unit for both, which is busy for several cycles with each vector. So the step stands beside the same loop without its division,
without its root and without both, which computes nonsense, and beside the fastest way to move its bytes. Whatever is left out and
makes the loop as fast as the bytes move is what binds. All have the same arrays, and run many times on end.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import report

from gpuadam import backends
from gpuadam.cli.measuring import forms, measure
from gpuadam.kernels import adam

FORMS = ["float32", "float64", "bfloat16 state", "8-bit state"]
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
    kernels = backends.load(backend.name)
    for n, form in itertools.product(report.numbers(options.sizes), options.forms):
        case = forms.FORMS[form]
        arrays = forms.new_arrays(kernels, case, n)
        contenders = forms.kernel_and_movers(kernels, case, arrays)
        contenders |= {name: forms.launcher(kernels, case, arrays.values(), rule) for name, rule in RULES.items()}
        of_rows = {"state": "warm", "dtype": form, "moved": forms.bytes_moved(case) * n}
        rows = measure.rows_in_turn("in_caches", kernels, contenders, n, options.seconds, of_turns=ON_END, **of_rows)
        yield measure.add_ratios(rows)


def draw(rows, path):
    """Draw, for each form and size, the time of each contender."""

    def title(form, n, of_size):
        return f"{n:,} elements, {form}"

    report.draw_bars(rows, path, title, "median time of a launch", width=6.5, height=2.6, lines=("dtype",))


if __name__ == "__main__":
    arguments = {"seconds": 10.0, "sizes": {"CPU": "1e4,1e5,1e6"}, "table": ("backend", "elements", "dtype"), "forms": FORMS}
    report.main("in_caches", __doc__, measure_rows, draw, **arguments)
