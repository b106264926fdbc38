"""python -m gpuadam bench: throughput of every form of the step, in GB/s and in percent of the limit.

An Adam step of float32 moves 28 bytes an element: it reads param, grad, m and v, and writes param, m and v. Other forms
(`measuring/forms.py`) move other bytes. The limit is the time of the fastest of several ways to move the same bytes of the same
arrays, which compute next to nothing (`kernels/limit.py`). They are measured in the same run, in turn with the step, so that the
machine's other work touches all of them.
"""

import time

from .. import backends
from ..kernels.messages import how_many
from ..terminal import arguments, figures, output
from ..terminal.console import Table
from .measuring import constants, forms, measure, pages, plots
from .measuring.measure import CALL

HELP = "throughput, in GB/s and in percent of the measured limit"
SIZES = {"CPU": (10**3, 10**4, 10**5, 10**6, 10**7, 2 * 10**7), "CUDA": tuple(1 << k for k in range(16, 27, 2))}
FOOTNOTE = """\
One step, kernel and launch.
% of limit: the time that moving the same bytes takes, as a percentage of the step's (medians, measured in turn).
bytes: read and written of an element.
call: host time of one gpuadam.adam_step, its checks included (on a GPU it returns before the step is done)."""

PAGES = "% huge: of the arrays, on huge pages (`python -m gpuadam doctor` has more on them)."


def add_options(parser):
    of_sizes = "elements, such as 1e5,2e7; by default a sweep"
    parser.add_argument("--sizes", type=arguments.wholes, metavar="N,N", help=of_sizes)
    of_forms = 'formats, formulas and algorithms, such as "float32,8-bit state,NAdam", or all; default %(default)s'
    names = {"type": arguments.names(forms.FORMS, "form"), "default": "float32,float64", "metavar": "NAME,NAME"}
    parser.add_argument("--forms", "--dtypes", **names, help=of_forms)
    parser.add_argument("--seconds", type=arguments.number(0), default=1.0, help="time spent on each row (default 1)")
    arguments.add_plot(parser, "bench", "write throughput by size")
    parser.add_argument("--backend", choices=list(backends.BACKENDS), help="default: all that there are")


def run(options):
    """Print the tables; return 0."""
    console = output.console(options)
    names = [options.backend] if options.backend else backends.some_available()
    cases = [
        (backends.load(name), form, n)
        for name in names
        for form in options.forms
        for n in options.sizes or SIZES[backends.BACKENDS[name].memory]
    ]
    for case in cases:
        _refuse_what_has_no_room(*case)
    rows: list[dict] = []
    for number, (kernels, form, n) in enumerate(cases, 1):
        console.passing(f"{number} of {len(cases)}: {kernels.name} {form} {n:,}")
        rows += rows_of(kernels, form, n, options.seconds)
    for (backend,), of_backend in measure.groups(rows, "backend").items():
        console.print(table(backend, of_backend))
    console.print(FOOTNOTE)
    movers = dict.fromkeys(row["mover"] for row in rows if row["mover"])
    console.print(f"The fastest way{'s' * (len(movers) > 1)} to move the bytes: {'; '.join(movers)}.")
    if any(row["huge_percent"] is not None for row in rows):
        console.print(PAGES)
    if note := measure.on_busy_machine(rows):
        console.print(note)
    console.print(", ".join(dict.fromkeys(rows[0][key] for key in ("device", "cpu", "system", "date"))))
    if options.plot:
        plots.save(plot(rows), options.plot, rows)
        console.print(f"plot: {options.plot}")
    output.write_json(options.json, {"rows": rows})
    return 0


def _refuse_what_has_no_room(kernels, form, n):
    held, (free, _) = forms.bytes_held(forms.FORMS[form], n, kernels.memory), constants.memory(kernels.name)
    if free is not None and held > free:
        needed, there = (output.scaled(size, output.BYTES) for size in (held, free))
        raise output.CommandError(
            f"{form} of {how_many(n, 'element')} needs {needed} of memory, and {there} are free for {kernels.name}: "
            "give smaller --sizes"
        )


def rows_of(kernels, form, n, seconds):
    """Return the rows of one size: the step and the limit kernel in turn, for about `seconds`, and the host's time of a call."""
    case = forms.FORMS[form]
    arrays = forms.new_arrays(kernels, case, n)
    contenders = forms.kernel_and_movers(kernels, case, arrays)
    n_bytes = forms.bytes_moved(case)
    rows = measure.rows_in_turn("bench", kernels, contenders, n, seconds, dtype=form, moved=n_bytes * n)
    call, calls = forms.caller(kernels, case, arrays), []
    for _ in range(min(rows[0]["samples"], 200)):
        began = time.perf_counter()
        call()
        calls.append(time.perf_counter() - began)
    rows = measure.add_ratios(rows)
    if kernels.memory == "CPU":
        huge = pages.percent_huge(pages.extents(arrays.values()))
        rows = [row | {"huge_percent": huge} for row in rows]
    rows.append(measure.row("bench", CALL, kernels.name, n, dtype=form, state="warm", seconds=calls))
    return [row | {"bytes_per_element": n_bytes} for row in rows]


def table(backend, rows):
    """Return the table of a backend, with a line for each form and size."""
    heads = ["", "elements", "bytes", "p20 us", "p50 us", "p80 us", "GB/s", "% of limit", "call us"]
    on_cpu = any(row["huge_percent"] is not None for row in rows)
    heads += ["% huge"] * on_cpu
    lines = []
    for (form, n), of_case in measure.groups(rows, "dtype", "elements").items():
        kernel, limit, call = of_case
        numbers = [kernel[key] for key in ("p20_us", "p50_us", "p80_us", "gb_per_s")]
        numbers += [100 / kernel["x_limit"], call["p50_us"]]
        texts = [f"{number:,.{0 if number >= 1000 else 1}f}" for number in numbers]
        texts[2] += "*" * measure.is_busy(kernel)
        texts[4] += "*" * measure.is_busy(limit)
        if on_cpu:
            texts.append(f"{kernel['huge_percent']:.0f}")
        lines.append([form, f"{n:,}", f"{kernel['bytes_per_element']:g}", *texts])
    return Table(backend, heads, lines, labels=2)


def plot(rows):
    """Return a figure of throughput, a panel for each backend: a bar for each form and size, in the frame of its limit."""
    of_backends = measure.groups([row for row in rows if row["gb_per_s"]], "backend")
    n_bars = max(map(len, of_backends.values())) // 2
    figure, axes = figures.panels(1, len(of_backends), width=8, height=1.2 + 0.34 * n_bars)
    for axis, ((backend,), of_backend) in zip(axes.flat, of_backends.items(), strict=True):
        steps, limits = of_backend[::2], of_backend[1::2]
        places = range(len(steps))
        axis.barh(places, [step["gb_per_s"] for step in steps], 0.62, color=plots.OURS)
        frame = {"facecolor": "none", "edgecolor": plots.LIMIT, "linestyle": "--", "label": "its limit"}
        frames = axis.barh(places, [limit["gb_per_s"] for limit in limits], 0.84, **frame)
        texts = [
            f"{step['gb_per_s']:.3g}   {100 / step['x_limit']:.0f} % of its limit, {step['bytes_per_element']:g} B each"
            for step in steps
        ]
        axis.bar_label(frames, texts, padding=7, fontsize=8)
        axis.set_yticks(places, [f"{step['dtype']}, {step['elements']:,}" for step in steps])
        axis.set(xticks=[], xlim=(0, 1.8 * max(row["gb_per_s"] for row in of_backend)), ylim=(len(steps) - 0.4, -1.5))
        axis.set_title(f"{backend}: GB/s")
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.legend(loc="upper right")
    return figure
