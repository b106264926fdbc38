"""python -m gpuadam bench: throughput, in GB/s and in percent of the limit.

An Adam step of float32 moves 28 bytes an element: it reads param, grad, m and v, and writes param, m and v. The limit is what a
kernel of the same shape that moves the same bytes and computes next to nothing takes (`kernels/limit.py`), in the same run,
on the same arrays, in turn with the step, so that what else the machine does touches both.
"""

import time

import numpy as np

import gpuadam

from .. import backends
from ..kernels import adam, limit
from . import measure, output, plots
from .measure import data, gpu, in_turn

__all__ = ["data", "gpu", "in_turn", "run"]

SIZES = {"CPU": (10**3, 10**4, 10**5, 10**6, 10**7, 2 * 10**7), "CUDA": tuple(1 << k for k in range(16, 27, 2))}
KERNEL, CALL = measure.KERNEL, "gpuadam.adam_step"


def run(options):
    """Print the table; return 0."""
    rich_console, rich_progress = output.need("bench", "rich.console", "rich.progress")
    if options.plot:
        output.need("bench", "matplotlib")
    console = rich_console.Console(stderr=options.json == "-")
    names = [options.backend] if options.backend else gpuadam.available_backends()
    for name in names:
        backends.load(name)
    cases = [
        (name, dtype, n)
        for name in names
        for dtype in options.dtypes
        for n in options.sizes or SIZES[backends.BACKENDS[name].memory]
    ]
    rows = []
    with rich_progress.Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for name, dtype, n in cases:
            progress.update(task, description=f"{name} {dtype} {n:,}")
            rows += rows_of(name, dtype, n, options.seconds)
            progress.advance(task)

    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in rows):
        console.print(_table([row for row in rows if (row["backend"], row["dtype"]) == (backend, dtype)]))
    console.print(
        "One step of Adam, kernel and launch. % of limit: the limit kernel's time over the step's, medians of one run in turn.\n"
        "call: host time of one gpuadam.adam_step, its checks included (on a GPU it returns before the step is done).",
        highlight=False,
    )
    machine = rows[0]
    console.print(", ".join(dict.fromkeys(machine[key] for key in ("device", "cpu", "system", "date"))), highlight=False)
    if options.plot:
        plot(options.plot, rows)
        console.print(f"plot: {options.plot}")
    if options.json:
        output.write_json(options.json, {"rows": rows})
    return 0


def _table(rows):
    rich_table, rich_box = output.need("bench", "rich.table", "rich.box")
    title = f"{rows[0]['backend']}, {rows[0]['dtype']}"
    table = rich_table.Table(title=title, title_justify="left", box=rich_box.SIMPLE_HEAD)
    for column in ("elements", "p20 us", "p50 us", "p80 us", "GB/s", "% of limit", "call us"):
        table.add_column(column, justify="right")
    calls = {row["elements"]: row["p50_us"] for row in rows if row["contender"] == CALL}
    for row in rows:
        if row["contender"] == KERNEL:
            n = row["elements"]
            figures = (row["p20_us"], row["p50_us"], row["p80_us"], row["gb_per_s"], 100 / row["x_limit"], calls[n])
            table.add_row(f"{n:,}", *(f"{figure:,.1f}" for figure in figures))
    return table


def rows_of(name, dtype, n, seconds):
    """Return the rows of one size: the step and the limit kernel in turn, for about `seconds`, and the host's time of a call."""
    kernels = backends.load(name)
    param, grad, m, v = arrays = [kernels.from_host(a) for a in data(n, dtype)]
    times = in_turn(kernels, [measure.launcher(kernels, arrays, rule) for rule in (adam, limit)], seconds)
    calls = []
    for step in range(1, min(len(times[0]), 200) + 1):
        began = time.perf_counter()
        gpuadam.adam_step(param, grad, m, v, step, backend=name)
        calls.append(time.perf_counter() - began)
    moved = measure.ARRAYS_READ_AND_WRITTEN * n * np.dtype(dtype).itemsize
    clock = "device" if backends.BACKENDS[name].memory == "CUDA" else "host"
    rows = [
        measure.row("bench", contender, name, n, state="in turn", clock=clock, dtype=dtype, seconds=seconds, moved=moved)
        for contender, seconds in zip((KERNEL, measure.LIMIT), times, strict=True)
    ]
    call = measure.row("bench", CALL, name, n, state="warm", clock="host", dtype=dtype, seconds=calls)
    return [*measure.add_ratios(rows), call]


def plot(path, rows):
    """Write throughput against size, the step beside its limit: one panel for each backend and dtype."""
    groups = dict.fromkeys((row["backend"], row["dtype"]) for row in rows)
    figure, axes = plots.panels(1, len(groups), width=6, height=4)
    for axis, (backend, dtype) in zip(axes[0], groups, strict=True):
        plots.throughput(
            axis,
            [row for row in rows if (row["backend"], row["dtype"]) == (backend, dtype) and row["gb_per_s"]],
            title=f"{backend}, {dtype}",
        )
    plots.save(figure, path, rows)
