"""How fast is one step over many arrays?

    python benchmarks/many.py [--backend numba-cpu] [--sizes gpt2,1000x1000] [--seconds 20] [--out FOLDER]

gpt2: the 148 parameter arrays of GPT-2 small, 124,439,808 elements (Radford et al. 2019). 1000x1000: so many arrays of so many
elements. Beside the step over the list stands the step on one flat array of as many elements, and the limit on it: the difference
is what the arrays' number costs. On a GPU the host's time until the step returns is measured too.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report
import timing

from gpuadam import backends
from gpuadam.cli.measuring import measure
from gpuadam.terminal import arguments


def gpt2_small():
    """Return the shapes of GPT-2 small's parameters, as transformers' `GPT2Model` has them."""
    d, vocabulary, context, layers = 768, 50257, 1024, 12
    layer_norm = [(d,), (d,)]
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (context, d), *layers * (layer_norm + attention + layer_norm + mlp), *layer_norm]


def shapes_of(case):
    """Return the shapes of a case of --sizes; a type of argparse, too."""
    if case == "gpt2":
        return gpt2_small()
    count, times, size = case.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"{case!r} is neither gpt2 nor COUNTxSIZE, such as 1000x1000")
    return arguments.whole(count) * [(arguments.whole(size),)]


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, options.peers, own=True)
    notes += report.listed(absent)
    notes += report.on_pages(backend)
    # each pass over each of a thousand arrays takes a handful of microseconds
    present = [peer for peer in present if peer.passes < peers.SLOW_PASSES]
    over_the_list, limit = (peer for peer in peers.OURS if peer.name in ("gpuadam.Adam.step", measure.LIMIT))
    flat = [over_the_list._replace(name="gpuadam.Adam.step, one flat array"), limit]
    kernels = backends.load(backend.name)
    for case in options.sizes:
        shapes = shapes_of(case)
        n = sum(map(math.prod, shapes))
        fitting, left_out = peers.fitting([over_the_list, *flat, *present], n, backend)
        notes += report.listed(left_out)
        if not fitting:
            continue
        shapes_for = {peer.name: [(n,)] if peer in flat else shapes for peer in fitting}
        contenders = peers.with_movers({peer.name: peer.build(backend, shapes_for[peer.name]) for peer in fitting})
        whole = {name: contender.whole(kernels) for name, contender in contenders.items()}
        seconds = options.seconds if backend.memory == "CPU" else options.seconds / 2  # for each clock
        rows = measure.rows_in_turn("many", kernels, whole, n, seconds, moved=4 * report.ARRAYS_READ_AND_WRITTEN * n)
        if backend.memory == "CUDA":  # the host's clock of a GPU's step says nothing of the memory
            wait = peers.wait_for_all(contenders.values(), kernels)
            times = timing.on_host([contender.step for contender in contenders.values()], wait, seconds)
            rows += measure.rows_of("many", kernels, n, dict(zip(contenders, times, strict=True)), state="in turn")
        for row in rows:
            row["arrays"] = len(shapes_for.get(row["contender"], [n]))  # the limit moves one flat array
            row["huge_percent"] = contenders[row["contender"]].percent_huge(backend)
        del contenders, whole
        peers.release(backend)
        for of_clock in measure.groups(rows, "clock").values():
            yield measure.add_ratios(of_clock)


def draw(rows, path):
    """Draw, for each backend and case, the time of each contender; on a GPU by both clocks."""

    def title(backend, n, of_case):
        return f"{backend}: {max(row['arrays'] for row in of_case):,} arrays\n{n:,} elements"

    report.draw_bars(rows, path, title, "median time of a step", width=6.5, height=4.2)


if __name__ == "__main__":
    sizes = dict.fromkeys(("CPU", "CUDA"), "gpt2,1000x1000")
    report.main(
        "many", __doc__, measure_rows, draw, seconds=20.0, sizes=sizes, sizes_help="gpt2 or COUNTxSIZE", size=shapes_of
    )
