"""python -m gpuadam bench: throughput of every form of the step, in GB/s and in percent of the limit.

An Adam step of float32 moves 28 bytes an element: it reads param, grad, m and v, and writes param, m and v. Other forms
(`measuring/forms.py`) move other bytes. The limit is the time of a kernel of the same shape, which moves the same bytes of the
same formats and computes next to nothing (`kernels/limit.py`). It is measured in the same run, in turn with the step, so that the
machine's other work touches both.
"""

import time

import gpuadam

from .. import backends
from ..terminal import arguments, figures, output
from .measuring import forms, measure, plots
from .measuring.measure import CALL, KERNEL

HELP = "throughput, in GB/s and in percent of the measured limit"
SIZES = {"CPU": (10**3, 10**4, 10**5, 10**6, 10**7, 2 * 10**7), "CUDA": tuple(1 << k for k in range(16, 27, 2))}
PANELS = 3  # beside each other, in a plot
FOOTNOTE = """\
One step, kernel and launch. % of limit: the limit kernel's time over the step's, medians of one run in turn.
bytes: read and written of an element. call: host time of one gpuadam.adam_step, its checks included
(on a GPU it returns before the step is done)."""


def add_options(parser):
    parser.add_argument(
        "--sizes", type=arguments.wholes, metavar="N,N", help="elements, such as 1e5,2e7; by default a sweep"
    )
    parser.add_argument(
        *("--forms", "--dtypes"),
        type=forms.chosen,
        default=("float32", "float64"),
        metavar="NAME,NAME",
        help='formats, formulas and algorithms, such as "float32,8-bit state,NAdam", or all; default float32,float64',
    )
    parser.add_argument("--seconds", type=arguments.number(0), default=1.0, help="time spent on each row (default 1)")
    parser.add_argument("--plot", type=arguments.writable, metavar="FILE", help="write throughput against size as PNG")
    parser.add_argument("--backend", choices=list(backends.BACKENDS), help="default: all that there are")


def run(options):
    """Print the tables; return 0."""
    console = output.console("bench", options)
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

    def described(number):
        name, form, n = cases[min(number, len(cases) - 1)]  # the next one, which takes the time
        return f"{name} {form} {n:,}"

    for number in output.counted(console, len(cases), described, every=len(cases) + 1):
        name, form, n = cases[number - 1]
        rows += rows_of(name, form, n, options.seconds)
    for table in tables(rows):
        console.print(table)
    console.print(FOOTNOTE, highlight=False)
    console.print(", ".join(dict.fromkeys(rows[0][key] for key in ("device", "cpu", "system", "date"))), highlight=False)
    if options.plot:
        plots.save(plot(rows), options.plot, rows)
        console.print(f"plot: {options.plot}")
    output.write_json(options.json, {"rows": rows})
    return 0


def rows_of(name, form, n, seconds):
    """Return the rows of one size: the step and the limit kernel in turn, for about `seconds`, and the host's time of a call."""
    kernels, case = backends.load(name), forms.FORMS[form]
    arrays = forms.new_arrays(kernels, case, n)
    contenders = forms.kernel_and_limit(kernels, case, arrays)
    times = measure.in_turn(kernels, list(contenders.values()), seconds)
    call, calls = forms.caller(kernels, case, arrays), []
    for _ in range(min(len(times[0]), 200)):
        began = time.perf_counter()
        call()
        calls.append(time.perf_counter() - began)
    n_bytes = forms.bytes_moved(case)
    clock = "device" if backends.BACKENDS[name].memory == "CUDA" else "host"
    of_device = {"state": "in turn", "clock": clock, "dtype": form, "moved": n_bytes * n}
    rows = [
        measure.row("bench", contender, name, n, **of_device, seconds=of_contender)
        for contender, of_contender in zip(contenders, times, strict=True)
    ]
    measure.add_ratios(rows)
    rows.append(measure.row("bench", CALL, name, n, state="warm", clock="host", dtype=form, seconds=calls))
    return [row | {"bytes_per_element": n_bytes} for row in rows]


def tables(rows):
    """Yield a table for each form, with a line for each size; or one for each size if there are more forms."""
    n_forms, n_sizes = (len({row[key] for row in rows}) for key in ("dtype", "elements"))
    by, of_lines = ("dtype", "elements") if n_forms <= n_sizes else ("elements", "dtype")
    for (backend, shared), group in measure.groups(rows, "backend", by).items():
        calls = {row[of_lines]: row["p50_us"] for row in group if row["contender"] == CALL}
        lines = []
        for row in group:
            if row["contender"] == KERNEL:
                figures = [row[key] for key in ("p20_us", "p50_us", "p80_us", "gb_per_s")]
                figures += [100 / row["x_limit"], calls[row[of_lines]]]
                line = [f"{row[of_lines]:,}" if of_lines == "elements" else row[of_lines], f"{row['bytes_per_element']:g}"]
                lines.append(line + [f"{figure:,.1f}" for figure in figures])
        title = f"{backend}, {shared:,} elements" if by == "elements" else f"{backend}, {shared}"
        heads = ("bytes", "p20 us", "p50 us", "p80 us", "GB/s", "% of limit", "call us")
        yield output.table(title, ("elements" if of_lines == "elements" else "", *heads), lines)


def plot(rows):
    """Return a figure of throughput, the step beside its limit: a panel for each backend and form, or bars of a single size."""
    rows = [row for row in rows if row["gb_per_s"]]
    return _curves(rows) if len({row["elements"] for row in rows}) > 1 else _bars(rows)


def _bars(rows):
    """Return a figure with a bar for each form, in the frame of its limit."""
    of_backends = measure.groups(rows, "backend")
    n_forms = len({row["dtype"] for row in rows})
    figure, axes = figures.panels(1, len(of_backends), width=8, height=1.2 + 0.34 * n_forms)
    for axis, ((name,), of_backend) in zip(axes.flat, of_backends.items(), strict=True):
        steps, limits = ([row for row in of_backend if row["contender"] == of] for of in (KERNEL, measure.LIMIT))
        forms_of_axis = [step["dtype"] for step in steps]
        axis.barh(forms_of_axis, [step["gb_per_s"] for step in steps], 0.62, color=plots.OURS)
        frame = {"facecolor": "none", "edgecolor": plots.LIMIT, "linestyle": "--", "label": "its limit"}
        frames = axis.barh(forms_of_axis, [limit["gb_per_s"] for limit in limits], 0.84, **frame)
        texts = [
            f"{step['gb_per_s']:.3g}   {100 / step['x_limit']:.0f} % of its limit, {step['bytes_per_element']:g} B each"
            for step in steps
        ]
        axis.bar_label(frames, texts, padding=7, fontsize=8)
        axis.set(xticks=[], xlim=(0, 1.8 * max(row["gb_per_s"] for row in of_backend)), ylim=(n_forms - 0.4, -1.5))
        axis.set_title(f"{name}, {rows[0]['elements']:,} elements: GB/s")
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.legend(loc="upper right")
    return figure


def _curves(rows):
    of_panels = measure.groups(rows, "backend", "dtype")
    columns = min(len(of_panels), PANELS)
    figure, axes = figures.panels(-(-len(of_panels) // columns), columns, width=6, height=4)
    for axis in axes.flat[len(of_panels) :]:
        axis.set_axis_off()
    for axis, (of_panel, of_rows) in zip(axes.flat, of_panels.items(), strict=False):
        plots.throughput(axis, of_rows, title=", ".join(of_panel))
    return figure
