"""What do the pages of arrays change: huge ones of 2 MB, and small ones of 4 KB?

    python benchmarks/pages.py [--sizes 4,12] [--seconds 20] [--out FOLDER]

A size is a number of GPT-2 small's layers: each has 12 arrays, 7,087,872 elements. The step over the list of all arrays is
measured beside the step over one flat array of as many elements. "Small pages" are those of memory that asks for none of 2 MB
(MADV_NOHUGEPAGE), as torch's arrays have them on most systems. "As NumPy makes them": arrays of 4 MB and more then have huge
pages as far as these lie in each array. Another table, whatever --sizes says, has a step over 20 million elements whose param,
grad, m and v begin at multiples of 128 or 256 MB, or a little farther apart. 17 KB apart, they do not begin at the same place in
4 KB. Needs Linux.
"""

import functools
import math
import mmap
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import many
import numpy as np
import peers
import report

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import forms, measure, pages
from gpuadam.kernels import adam, huge_pages
from gpuadam.terminal import arguments

FLAT = "one flat array, huge pages"
HUGE, SMALL, NUMPYS, STATE, NONE = (
    "list, huge pages",
    "list, small pages but for gpuadam's state",
    "list as NumPy makes it, gpuadam's state",
    "list and state as NumPy makes them",
    "list and state, small pages",
)
# The distances between param, grad, m and v, in bytes; the last one is the measure of the others.
APART = {
    f"{mb} MB{f' and {kb} KB' if kb else ''} apart": (mb << 20) + (kb << 10) for mb in (256, 128) for kb in (0, 4, 16, 17)
}
APART_ELEMENTS = 20_000_000
OF_FORM = {FLAT: (None, None), HUGE: ("huge", None), SMALL: ("small", None), NUMPYS: ("numpy", None)}
OF_FORM |= {STATE: ("numpy", "numpy"), NONE: ("small", "small")}


def layers(count):
    """Return the shapes of so many layers of GPT-2 small."""
    embeddings = 2
    return many.gpt2_small()[embeddings : embeddings + 12 * count]


def on_small_pages(array):
    """Return a copy of an array in memory that has no huge pages."""
    memory = mmap.mmap(-1, max(array.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    there = np.frombuffer(memory, array.dtype).reshape(array.shape)
    huge_pages.advise(huge_pages.address_of(there) // mmap.PAGESIZE * mmap.PAGESIZE, len(memory), mmap.MADV_NOHUGEPAGE)
    there[...] = array
    return there


MADE = {"numpy": np.array, "small": on_small_pages}


def contender(backend, shapes, name):
    """Return the Contender of a name."""
    arrays, state = OF_FORM[name]
    if arrays in (None, "huge"):
        shapes = shapes if arrays else [(sum(map(math.prod, shapes)),)]
        return peers.adam_class(backend, shapes)
    params, grads = map(list, zip(*(map(MADE[arrays], pair) for pair in peers.host_arrays(shapes, 2)), strict=True))
    opt = gpuadam.Adam(params, **peers.HYPERPARAMETERS)
    if state:
        for of_one in opt.state.values():
            of_one.update({key: MADE[state](of_one[key]) for key in ("m", "v")})
    held = [array for of_one in opt.state.values() for array in (of_one["m"], of_one["v"])]
    return peers.Contender(lambda: opt.step(grads), extents=lambda: pages.extents([*params, *grads, *held]))


def rows_of_distances(kernels, seconds):
    """Return the rows of steps over arrays at the same places of memory, or not."""
    case, operands = forms.FORMS["float32"], ("param", "grad", "m", "v")
    memory = huge_pages.zeros(len(operands) * max(APART.values()), 64)
    values = list(measure.data(APART_ELEMENTS, np.float32))
    launchers = {}
    for name, distance in APART.items():
        arrays = [memory[k * distance :][: 4 * APART_ELEMENTS].view(np.float32) for k in range(len(operands))]
        for array, numbers in zip(arrays, values, strict=True):
            array[...] = numbers
        launchers[name] = forms.launcher(kernels, case, arrays, adam)
    moved = 4 * report.ARRAYS_READ_AND_WRITTEN * APART_ELEMENTS
    rows = measure.rows_in_turn("pages", kernels, launchers, APART_ELEMENTS, seconds, moved=moved)
    return [row | {"huge_percent": pages.percent_huge(pages.extents([memory]))} for row in rows]


def over(rows, measure_of_all):
    """Return rows with their time over that of one of them."""
    return [row | {"x_flat": float(f"{row['p50_us'] / measure_of_all['p50_us']:.6g}")} for row in rows]


def measure_rows(backend, options, notes):
    if backend.memory != "CPU" or not hasattr(mmap, "MADV_HUGEPAGE"):
        sys.exit("pages: it measures the host's memory under Linux: --backend numba-cpu")
    notes += report.on_pages(backend)
    kernels = backends.load(backend.name)
    for count in report.numbers(options.sizes):
        shapes = layers(count)
        n = sum(map(math.prod, shapes))
        contenders = {name: contender(backend, shapes, name) for name in OF_FORM}
        steps = {name: one.step for name, one in contenders.items()}
        moved = 4 * report.ARRAYS_READ_AND_WRITTEN * n
        rows = measure.rows_in_turn("pages", kernels, steps, n, options.seconds, arrays=len(shapes), moved=moved)
        rows = [row | {"huge_percent": contenders[row["contender"]].percent_huge(backend)} for row in rows]
        rows[0]["arrays"] = 1  # FLAT
        yield over(rows, rows[0])
        del contenders, steps
    rows = rows_of_distances(kernels, options.seconds)
    yield over(rows, rows[-1])


def draw(rows, path):
    """Draw the time of each contender."""

    def title(backend, n, of_size):
        if of_size[0]["contender"] in APART:
            return f"param, grad, m and v of {n:,} elements"
        return f"{max(row['arrays'] for row in of_size)} arrays, {n:,} elements"

    report.draw_bars(rows, path, title, "median time of a step", width=7, height=3.6)


if __name__ == "__main__":
    sizes = {"CPU": "4,12", "CUDA": "4"}
    size, help_ = functools.partial(arguments.whole, most=12), "layers of GPT-2 small, up to 12, for the first kind of table"
    report.main("pages", __doc__, measure_rows, draw, seconds=20.0, sizes=sizes, sizes_help=help_, size=size)
