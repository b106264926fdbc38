"""python -m gpuadam bench: throughput of every form of the step, in GB/s and in percent of the limit.

An Adam step of float32 moves 28 bytes an element: it reads param, grad, m and v, and writes param, m and v. Other forms
(`forms.py`) move other bytes. The limit is what a kernel of the same shape that moves the same bytes of the same formats and
computes next to nothing takes (`kernels/limit.py`), in the same run, in turn with the step, so that what else the machine does
touches both.
"""

import time

import gpuadam

from .. import backends
from . import output
from .measuring import forms, measure, plots
from .measuring.measure import CALL, KERNEL

SIZES = {"CPU": (10**3, 10**4, 10**5, 10**6, 10**7, 2 * 10**7), "CUDA": tuple(1 << k for k in range(16, 27, 2))}
PANELS = 3  # beside each other, in a plot


def run(options):
    """Print the tables; return 0."""
    console = output.console("bench", options)
    (rich_progress,) = output.need("bench", "rich.progress")
    if options.plot:
        output.need("bench", "matplotlib")
    names = [options.backend] if options.backend else gpuadam.available_backends()
    for name in names:
        backends.load(name)
    cases = [
        (name, form, n)
        for name in names
        for form in options.forms
        for n in options.sizes or SIZES[backends.BACKENDS[name].memory]
    ]
    rows = []
    with rich_progress.Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for name, form, n in cases:
            progress.update(task, description=f"{name} {form} {n:,}")
            rows += rows_of(name, form, n, options.seconds)
            progress.advance(task)

    for table in tables(rows):
        console.print(table)
    console.print(
        "One step, kernel and launch. % of limit: the limit kernel's time over the step's, medians of one run in turn.\n"
        "bytes: read and written of an element. call: host time of one gpuadam.adam_step, its checks included\n"
        "(on a GPU it returns before the step is done).",
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


def rows_of(name, form, n, seconds):
    """Return the rows of one size: the step and the limit kernel in turn, for about `seconds`, and the host's time of a call."""
    kernels, case = backends.load(name), forms.FORMS[form]
    arrays = forms.own_arrays(kernels, case, n)
    contenders = forms.kernel_and_limit(kernels, case, arrays)
    times = measure.in_turn(kernels, list(contenders.values()), seconds)
    call, calls = forms.caller(kernels, case, arrays), []
    for _ in range(min(len(times[0]), 200)):
        began = time.perf_counter()
        call()
        calls.append(time.perf_counter() - began)
    n_bytes = forms.bytes_moved(case)
    clock = "device" if backends.BACKENDS[name].memory == "CUDA" else "host"
    facts = {"state": "in turn", "clock": clock, "dtype": form, "moved": n_bytes * n}
    rows = [
        measure.row("bench", contender, name, n, **facts, seconds=of_contender)
        for contender, of_contender in zip(contenders, times, strict=True)
    ]
    measure.add_ratios(rows)
    rows.append(measure.row("bench", CALL, name, n, state="warm", clock="host", dtype=form, seconds=calls))
    return [row | {"bytes_per_element": n_bytes} for row in rows]


def tables(rows):
    """Yield a table for each form, with a line for each size; or one for each size if there are more forms."""
    n_forms, n_sizes = (len({row[key] for row in rows}) for key in ("dtype", "elements"))
    by, of_lines = ("dtype", "elements") if n_forms <= n_sizes else ("elements", "dtype")
    for backend, shared in dict.fromkeys((row["backend"], row[by]) for row in rows):
        yield _table([row for row in rows if (row["backend"], row[by]) == (backend, shared)], by, of_lines)


def _table(rows, by, of_lines):
    rich_table, rich_box = output.need("bench", "rich.table", "rich.box")
    unit = " elements" if by == "elements" else ""
    title = f"{rows[0]['backend']}, {_said(rows[0][by])}{unit}"
    table = rich_table.Table(title=title, title_justify="left", box=rich_box.SIMPLE_HEAD)
    table.add_column("elements" if of_lines == "elements" else "", justify="right" if of_lines == "elements" else "left")
    for column in ("bytes", "p20 us", "p50 us", "p80 us", "GB/s", "% of limit", "call us"):
        table.add_column(column, justify="right")
    calls = {row[of_lines]: row["p50_us"] for row in rows if row["contender"] == CALL}
    for row in rows:
        if row["contender"] == KERNEL:
            figures = [row[key] for key in ("p20_us", "p50_us", "p80_us", "gb_per_s")]
            figures += [100 / row["x_limit"], calls[row[of_lines]]]
            table.add_row(_said(row[of_lines]), f"{row['bytes_per_element']:g}", *(f"{figure:,.1f}" for figure in figures))
    return table


def _said(shared):
    """Return the name of a form, or a number of elements, as a table has it."""
    return shared if isinstance(shared, str) else f"{shared:,}"


def plot(path, rows):
    """Write throughput as PNG, the step beside its limit: a panel for each backend and form, or bars if there is one size."""
    rows = [row for row in rows if row["gb_per_s"]]
    draw = _curves if len({row["elements"] for row in rows}) > 1 else _bars
    plots.save(draw(rows), path, rows)


def _bars(rows):
    names = list(dict.fromkeys(row["backend"] for row in rows))
    n_forms = len({row["dtype"] for row in rows})
    figure, axes = plots.panels(1, len(names), width=8, height=1.2 + 0.34 * n_forms)
    for axis, name in zip(axes.flat, names, strict=True):
        of_backend = [row for row in rows if row["backend"] == name]
        steps, limits = ([row for row in of_backend if row["contender"] == of] for of in (KERNEL, measure.LIMIT))
        for at, (step, limit) in enumerate(zip(reversed(steps), reversed(limits), strict=True)):
            axis.barh(at, step["gb_per_s"], 0.62, color=plots.OURS)
            label = "its limit" if at == 0 else None
            axis.plot([limit["gb_per_s"]] * 2, [at - 0.42, at + 0.42], color=plots.LIMIT, linewidth=2, label=label)
            text = (
                f"{step['gb_per_s']:.3g}   {100 / step['x_limit']:.0f} % of its limit, {step['bytes_per_element']:g} B each"
            )
            end = max(step["gb_per_s"], limit["gb_per_s"])
            axis.annotate(text, (end, at), (7, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(n_forms), [step["dtype"] for step in reversed(steps)], fontsize=9)
        axis.set_ylim(-0.6, n_forms + 0.5)  # the legend's place
        axis.set_xlim(0, 1.8 * max(row["gb_per_s"] for row in of_backend))
        axis.set_xticks([])
        axis.set_title(f"{name}, {rows[0]['elements']:,} elements: GB/s", loc="left", fontsize=11, fontweight="bold")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.legend(fontsize=8, loc="upper right", frameon=False)
    return figure


def _curves(rows):
    groups = dict.fromkeys((row["backend"], row["dtype"]) for row in rows)
    columns = min(len(groups), PANELS)
    figure, axes = plots.panels(-(-len(groups) // columns), columns, width=6, height=4)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (backend, form) in zip(axes.flat, groups, strict=False):
        of_panel = [row for row in rows if (row["backend"], row["dtype"]) == (backend, form)]
        plots.throughput(axis, of_panel, title=f"{backend}, {form}")
    return figure
