"""What every benchmark does with its rows: options, tables on the terminal, a CSV file, JSON and a plot.

    python benchmarks/report.py merge RESULTS.csv ROWS...    merges CSV and JSON files of rows into one CSV file
    python benchmarks/report.py add RESULTS.csv ROWS...      adds them to one that is there, or makes it
    python benchmarks/report.py summary RESULTS.csv          prints a short table: gpuadam and torch's fused Adam

A benchmark is a function measure_rows(backend, options, notes), which yields lists of rows that were measured together and
adds to the notes what was left out, and a function draw(rows, path).
"""

import argparse
import csv
import functools
import io
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers

import gpuadam
from gpuadam import backends
from gpuadam.checkpoint import atomic_file
from gpuadam.cli.measuring import facts, measure, pages, plots
from gpuadam.cli.measuring.measure import CALL, KERNEL
from gpuadam.kernels import messages
from gpuadam.terminal import arguments, figures, output
from gpuadam.terminal.console import Table

# of lines of contenders that are neither ours nor the limit
LINES = ("#b5651d", "#5b8c5a", "#8a5a9e", "#b04a5a", "#4a8f9e", "#8c8c3a", "#70757a")
ARRAYS_READ_AND_WRITTEN = 7  # of a step: reads param, grad, m and v; writes param, m and v
TABLE = ("backend", "elements", "state", "clock")
# Columns that some benchmarks have beyond measure.COLUMNS: the bytes that a step moves of each element; and of a form of the
# step, how many times float32's time and bytes it takes.
FURTHER = ("bytes_per_element", "x_float32", "x_float32_bytes")
OF_PAGES = ("x_flat",)  # a time over that of one flat array on huge pages
# Likewise of many ranks: the phases of a step, what a rank sends, and that over the least that it could.
OF_RANKS = (
    "ranks",
    "sent_mb",
    "x_minimum",
    *(f"{p}_us" for p in ("agree", "reduce_scatter", "update", "all_gather", "rest")),
)
OF_CALLS = ("x_present",)  # of MPI: the time over that of its non-blocking collective
# Those of a prediction: what binds it, the time, and how far it is from what was measured.
PREDICTED = ("bound", "predicted_us", "error_percent")
NUMBERS = {*measure.NUMBERS, *FURTHER, *OF_RANKS, *OF_CALLS, *OF_PAGES, *PREDICTED} - {"bound"}


@output.ending_plainly()
def main(
    name,
    doc,
    measure_rows,
    draw,
    *,
    seconds,
    sizes,
    sizes_help="elements, such as 1e5,2e7",
    size=arguments.whole,
    table=TABLE,
    forms=(),
    show=None,
):
    """Measure, or read rows that were measured before; print them; write what the options say.

    sizes: the default for "CPU" and for "CUDA" memory; None if the benchmark has none. size: a type of argparse that refuses what
    is no size. table: rows alike in these share a
    table. forms: of the step, that --forms chooses from. show: makes another `Table` of rows than `tabulated`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--backend", choices=list(backends.BACKENDS), help="default: the first that works")
    if sizes:
        listed_sizes = functools.partial(_sizes, size=size)
        parser.add_argument(
            "--sizes", type=listed_sizes, metavar="N,N", help=f"{sizes_help}; default {' or '.join({*sizes.values()})}"
        )
    parser.add_argument("--seconds", type=float, default=seconds, help="for each table, about; default %(default)s")
    of_peers = "only these libraries; none for gpuadam alone; default all"
    names_of_peers = arguments.names([*(peer.name for peer in peers.PEERS), "none"], "peer")
    parser.add_argument("--peers", type=names_of_peers, metavar="NAME,NAME", help=of_peers)
    if forms:
        of_forms, names = f"only these of {', '.join(forms)}; default all", arguments.names(forms, "form")
        parser.add_argument("--forms", type=names, default=forms, metavar="NAME,NAME", help=of_forms)
    parser.add_argument("--out", metavar="FOLDER", type=Path, help=f"write {name}.csv and {name}.png into it")
    parser.add_argument(
        "--json", type=arguments.writable, metavar="FILE", help="write the rows as JSON; - for standard output alone"
    )
    of_add = "add the rows to those of this file, after each table, as report.py add does; nothing is drawn"
    parser.add_argument("--add", metavar="RESULTS.csv", type=arguments.writable, help=of_add)
    parser.add_argument("--rows", metavar="CSV", help="measure nothing: print and draw the rows of this file")
    options = parser.parse_args()
    if options.backend is None and not options.rows:  # only then: each backend that is looked at takes seconds
        options.backend = next(iter(gpuadam.available_backends()), "numba-cpu")
    with output.ending_plainly(name):
        _measure_and_show(name, measure_rows, draw, options, sizes, table, show or tabulated)


def _sizes(text, size):
    """Return the texts of sizes, each of which `size` takes."""
    texts = arguments.items(text, "sizes with one comma between two")
    for each in texts:
        size(each)
    return texts


def _measure_and_show(name, measure_rows, draw, options, sizes, table, show):
    console = output.console(options)
    if not options.rows:
        backends.load(options.backend)
    if options.out:
        output.need("bench", "matplotlib")
        options.out.mkdir(parents=True, exist_ok=True)
    rows, notes = [], []
    if options.rows:
        rows = [row for row in read_rows(options.rows) if row["benchmark"] == name]
        for group in measure.groups(rows, *table).values():
            console.print(show(group))
    else:
        backend = backends.BACKENDS[options.backend]
        if sizes:
            options.sizes = options.sizes or sizes[backend.memory].split(",")
        for group in measure_rows(backend, options, notes):
            rows += group
            console.print(show(group))
            # after each table: a run that is cut short keeps what it has
            if options.out:
                write_csv(options.out / f"{name}.csv", rows)
            if options.add:
                add_rows(options.add, group)
    for note in dict.fromkeys(notes):
        console.print(note)
    if not rows:
        sys.exit(f"{name}: " + (f"{options.rows} has no rows of {name}.py" if options.rows else "nothing was measured"))
    if note := measure.on_busy_machine(rows):
        console.print(note)
    _print_machine(console, rows[0])
    if options.out:
        draw(rows, options.out / f"{name}.png")
    if options.json:
        output.write_json(options.json, {"rows": rows})


def numbers(sizes):
    """Return sizes such as 1e5 as integers."""
    return [arguments.whole(size) for size in sizes]


def with_peak(row, peaks):
    """Return a row with the memory that was allocated at the peak. peaks: samples, in bytes."""
    if not len(peaks):
        return row
    return row | {"samples": row["samples"] or len(peaks), "peak_mb": float(f"{statistics.median(peaks) / 1e6:.6g}")}


def listed(absent):
    """Return a note on each contender that was not measured: `absent` says why."""
    return [f"not measured: {name} ({reason})" for name, reason in absent.items()]


def on_pages(backend):
    """Return a note on the pages of the arrays, if they are on a CPU."""
    return [pages.described(pages.system())] if backend.memory == "CPU" else []


def time(microseconds):
    """Return a time as it is read easiest.

    >>> time(12.345), time(98765.4), time(2345678.9)
    ('12.3 us', '98.8 ms', '2.35 s')
    """
    return output.scaled(microseconds / 1e6, output.SECONDS)


def draw_bars(rows, path, title, label, *, width, height, lines=("backend",), columns=("elements",), log=True, **of_bars):
    """Draw `bars` of the rows that are alike in some keys: those of `lines` one below the other, those of `columns` side by side.

    title: of (the values of all these keys, the rows). of_bars: options of `bars`.
    """
    of_lines, of_columns = measure.groups(rows, *lines), measure.groups(rows, *columns)
    figure, axes = figures.panels(len(of_lines), len(of_columns), width=width, height=height)
    for of_axes, (line, of_line) in zip(axes, of_lines.items(), strict=True):
        panels = measure.groups(of_line, *columns)
        for axis, column in zip(of_axes, of_columns, strict=True):
            if column in panels:
                bars(axis, panels[column], title(*line, *column, panels[column]), label, log=log, **of_bars)
            else:  # not measured
                axis.set_axis_off()
    plots.save(figure, path, rows)


def bars(axis, rows, title, xlabel, *, value="p50_us", text=time, series=("state", "clock"), log=False):
    """Draw a horizontal bar for each contender and state, the smallest at the top, its value at its end.

    value: the column. text: what of a value is written at the bar's end. series: the columns that tell a contender's bars apart.
    """
    kinds = list(dict.fromkeys(_kind(row, series) for row in rows))
    shades = [1 - 0.55 * k / max(1, len(kinds) - 1) for k in range(len(kinds))]
    of_name: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: kinds.index(_kind(row, series))):
        of_name.setdefault(row["contender"], []).append(row)
    names = sorted(of_name, key=lambda name: -of_name[name][0][value])
    thick = 0.8 / len(kinds)
    for at, name in enumerate(names):
        color = plots.OURS if is_ours(name) else plots.LIMIT if name.startswith(measure.LIMIT) else plots.OTHER
        for k, row in enumerate(of_name[name]):
            y = at + thick * ((len(of_name[name]) - 1) / 2 - k)
            axis.barh(y, row[value], 0.9 * thick, color=color, alpha=shades[kinds.index(_kind(row, series))])
            axis.annotate(text(row[value]), (row[value], y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    for label in axis.get_yticklabels():
        if is_ours(label.get_text()):
            label.set(color=plots.OURS, fontweight="bold")
    longest, shortest = (f(row[value] for row in rows) for f in (max, min))
    if log:
        axis.set_xscale("log")
        axis.set_xlim(shortest / 2, 2 * longest * (longest / shortest) ** 0.2)
    else:
        axis.set_xlim(0, 1.25 * longest or 1)
    axis.set_xticks([], minor=True)  # the values are at the bars
    axis.set_xticks([])
    axis.set_title(title)
    axis.set_xlabel(f"{xlabel} (logarithmic)" if log else xlabel, fontsize=9)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    if len(kinds) > 1:
        (patches,) = output.need("bench", "matplotlib.patches")
        varying = [k for k in range(len(series)) if len({kind[k] for kind in kinds}) > 1]
        labels = [", ".join(kind[k] for k in varying) for kind in kinds]
        handles = [
            patches.Patch(facecolor=plots.OURS, alpha=shade, label=label)
            for shade, label in zip(shades, labels, strict=True)
        ]
        axis.legend(handles=handles, loc="upper right")


def is_ours(contender):
    return contender.startswith(("gpuadam", "import gpuadam"))


def _kind(row, series):
    return tuple(row[key] for key in series)


def tabulated(rows):
    """Return a `Table` with a line for each row."""
    first = rows[0]
    head = [f"{first['elements']:,} {first['dtype']}", first["backend"]]
    varying = [key for key in ("state", "clock", "arrays") if len({row[key] for row in rows}) > 1]
    head += [first["state"]] * ("state" not in varying)
    head += [f"{first['clock']} clock"] * bool(first["clock"])
    columns = {
        "p20_us": time,
        "p50_us": time,
        "p80_us": time,
        "gb_per_s": lambda x: f"{x:,.1f}",
        "x_limit": lambda x: f"{x:,.3f}",
        "x_torch_fused": lambda x: f"{x:,.3f}",
        "peak_mb": lambda x: f"{x:,.3f}",
        "bytes_per_element": lambda x: f"{x:,.4g}",
        "x_flat": lambda x: f"{x:,.3f}",
        "huge_percent": lambda x: f"{x:.0f} %",
    }
    heads = {"p20_us": "p20", "p50_us": "median", "p80_us": "p80", "gb_per_s": "GB/s", "peak_mb": "peak MB beyond state"}
    heads |= {"bytes_per_element": "bytes an element", "huge_percent": "huge pages"}
    used = [column for column in columns if any(row.get(column) is not None for row in rows)]
    lines = []
    for row in rows:
        labels = [f"{row[key]:,}" if key == "arrays" else row[key] or "" for key in varying]
        figures = {c: "" if row.get(c) is None else columns[c](row[c]) for c in used}
        if measure.is_busy(row):
            figures["p80_us"] += "*"
        lines.append([row["contender"], *labels, *figures.values()])
    of_columns = [heads.get(column, column.replace("x_", "x ").replace("_", " ")) for column in used]
    title = f"{first['benchmark']}: {', '.join(head)}"
    return Table(title, ("", *varying, *of_columns), lines, labels=1 + len(varying))


def _print_machine(console, row):
    machine = dict.fromkeys(str(row[key]) for key in ("device", "driver", "cpu", "system", "date") if row[key])
    versions = [f"{name} {row[name]}" for name in facts.versions() if row.get(name)]
    console.print(f"{', '.join(machine)}; {messages.how_many(int(row['cores']), 'core')}\n{', '.join(versions)}")


def write_csv(path, rows):
    """Write rows, dicts with the same keys, with a header; None becomes an empty field. A kill leaves the old file whole."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file.replacing(path, follow=True, durable=False) as file:
        file.write(text.getvalue().encode())


def read_csv(path, numbers):
    """Read what `write_csv` wrote: the columns in `numbers` as numbers, an empty field as None."""
    with Path(path).open(newline="") as file:
        return [
            {key: None if not text else json.loads(text) if key in numbers else text for key, text in row.items()}
            for row in csv.DictReader(file)
        ]


def read_rows(path):
    """Return the rows of a CSV file of `write_csv` or a JSON file of --json. Raises CommandError."""
    is_json = str(path).endswith(".json")
    try:
        rows = json.loads(Path(path).read_text())["rows"] if is_json else read_csv(path, NUMBERS)
        whole = all(row["benchmark"] and row["contender"] for row in rows)
    except OSError as error:
        raise output.CommandError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise output.CommandError(f"{path} is no file of rows, as --out and --json write them: {reason}") from error
    if not rows or not whole:
        reason = "a row names no benchmark" if rows else "it has none"
        raise output.CommandError(f"{path} is no file of rows, as --out and --json write them: {reason}")
    return rows


def merge(path, *sources):
    """Write the rows of CSV and JSON files into one CSV file."""
    _write([row for source in sources for row in read_rows(source)], path)


# What a row is of: a benchmark that is run again measures the same anew.
IDENTITY = (*measure.IDENTITY, "ranks")


def add(path, *sources):
    """Likewise add them to the rows that are in the file."""
    add_rows(path, [row for source in sources for row in read_rows(source)])


def add_rows(path, rows):
    """Add rows to those that are in a CSV file, if it is there. What was measured again takes the old row's place."""
    old = read_rows(path) if Path(path).exists() else []
    _write({tuple(row.get(key) for key in IDENTITY): row for row in (*old, *rows)}.values(), path)


def _write(rows, path):
    columns = dict.fromkeys(column for row in rows for column in row)
    write_csv(path, [dict.fromkeys(columns) | row for row in rows])


STEP = "gpuadam.Adam.step"
SUMMARY = {
    "large": (STEP, KERNEL),
    "bench": (KERNEL,),
    "many": (STEP, f"{STEP}, one flat array"),
    "narrow": (KERNEL,),
    "amp_step": (STEP, f"{STEP}, bfloat16 copies"),
    "small": (CALL, STEP),
    "norms": (STEP, f"{STEP}, norms=True", f"{STEP}, norms by hand"),
    "host_time": (CALL, STEP, "bare ElementwiseKernel", "bare Numba kernel"),
    "pages": ("one flat array, huge pages", "list, huge pages", "list and state, small pages"),
    "memory": (STEP, measure.TORCH_FUSED),
    "offload": (
        "gpuadam.OffloadAdam.step",
        "gpuadam.OffloadAdam.step, NumPy's own arrays",
        "limit: read and write calls",
        "limit: mapped, no arithmetic",
        "limit: copies both ways",
    ),
    "sharded": ("gpuadam.ShardedAdam, views", "gpuadam.Adam"),
    "first_call": ("import gpuadam", CALL, measure.TORCH_FUSED),
    "plan": (KERNEL, "gpuadam.ShardedAdam, views", "gpuadam.OffloadAdam"),
}


def summary(path):
    """Print a short table: gpuadam's own lines, beside torch's fused Adam."""
    columns = {
        "gb_per_s": "GB/s",
        "x_limit": "x limit",
        "x_torch_fused": "x torch",
        "x_float32": "x float32",
        "peak_mb": "MB",
        "error_percent": "% error",
    }
    rows, marked = read_rows(path), False
    print(f"{'elements':>14}{'':85}{'median':>10}" + "".join(f"{head:>10}" for head in columns.values()))
    for (benchmark, backend), of_benchmark in measure.groups(rows, "benchmark", "backend").items():
        print(f"-- {benchmark}, {backend}")
        for row in of_benchmark:
            if row["contender"] in SUMMARY.get(benchmark, ()):
                what = ", ".join(filter(None, (row["contender"], row["state"], row["clock"])))
                median = "" if row["p50_us"] is None else time(row["p50_us"]) + (" ", "*")[measure.is_busy(row)]
                marked |= measure.is_busy(row)
                others = (row.get(column) for column in columns)
                figures = "".join(f"{'' if figure is None else f'{figure:,.2f}':>10}" for figure in others)
                print(f"{row['elements']:14,} {row['dtype'] + '  ' + what:84}{median:>10}{figures}")
    if marked:
        print(
            f"* p80 is {measure.BUSY} times p20 or more: other work disturbed it, or the clock rate changed. Measure again."
        )


@output.ending_plainly("report")
def _command():
    parser = argparse.ArgumentParser(description="Join files of rows, or print the gist of one.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        merge: "write the rows of CSV and JSON files into one CSV file",
        add: "add them to the rows of a CSV file that is there, or make it",
        summary: "print a short table: gpuadam and torch's fused Adam",
    }
    for function, text in helps.items():
        command = commands.add_parser(function.__name__, help=text)
        command.add_argument("results", metavar="RESULTS.csv")
        if function is not summary:
            command.add_argument("rows", metavar="ROWS", nargs="+", help="CSV or JSON files of rows")
        command.set_defaults(function=function)
    options = parser.parse_args()
    options.function(options.results, *getattr(options, "rows", ()))


if __name__ == "__main__":
    _command()
