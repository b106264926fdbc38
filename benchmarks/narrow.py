"""What do fewer bytes save? The time of one update in every format of its arrays, beside float32's.

    python benchmarks/narrow.py [--backend numba-cpu] [--sizes 2e7] [--forms "8-bit state,EMA"] [--seconds 20] [--out FOLDER]

A step is bound by memory, so it should take as many times float32's time as it moves bytes: what it takes beyond that is
arithmetic, mostly of conversions and random rounding. Each form's kernel runs in turn with all others and with the limit
rule in the same form, which converts and rounds the same numbers and computes nothing with them (`kernels/limit.py`). Calls
of `gpuadam.adam_step` are measured too for the forms that are used most.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peers
import report

from gpuadam import backends
from gpuadam.cli.measuring import forms, measure, plots
from gpuadam.cli.measuring.measure import CALL, KERNEL
from gpuadam.kernels.operands import operands_of
from gpuadam.terminal import figures
from gpuadam.terminal.console import Table

FLOAT32 = "float32"
# float64 has no fewer bytes, and eps-hat is float32's kernel.
FORMS = {name: case for name, case in forms.FORMS.items() if name not in ("float64", "eps-hat")}
CALLED = (
    *(FLOAT32, "bfloat16 state", "8-bit state", "all bfloat16"),
    *("bfloat16 param and grad + 16 bits", "float32 + bfloat16 copy and grad"),
)


def measure_rows(backend, options, notes):
    kernels = backends.load(backend.name)
    clock = "device" if backend.memory == "CUDA" else "host"
    names = list(dict.fromkeys([FLOAT32, *options.forms]))
    for n in report.numbers(options.sizes):
        fitting, left_out = peers.in_memory({name: bytes_held(name, n) for name in names}, backend, n)
        notes += report.listed(left_out)
        if FLOAT32 not in fitting:  # the measure of all others
            continue
        contenders = {(name, contender): f for name in fitting for contender, f in contenders_of(kernels, name, n).items()}
        times = measure.in_turn(kernels, list(contenders.values()), options.seconds)
        measured = dict(zip(contenders, times, strict=True))
        del contenders
        peers.release(backend)
        yield rows_of(backend, n, clock, measured)


def rows_of(backend, n, clock, measured):
    """Return the rows of one run. measured: {(name of the form, contender): seconds}."""
    rows = []
    for (name, contender), seconds in measured.items():
        n_bytes = forms.bytes_moved(FORMS[name])
        facts = {"state": "in turn", "clock": clock, "dtype": name, "seconds": seconds, "moved": n_bytes * n}
        row = measure.row("narrow", contender, backend.name, n, **facts) | dict.fromkeys(report.FURTHER)
        rows.append(row | {"bytes_per_element": n_bytes, "x_float32_bytes": n_bytes / forms.bytes_moved(FORMS[FLOAT32])})
    rows = [row for of_form in measure.groups(rows, "dtype").values() for row in measure.add_ratios(of_form)]
    float32 = {row["contender"]: row["p50_us"] for row in rows if row["dtype"] == FLOAT32}  # of the limit its fastest mover
    for row in rows:
        row["x_float32"] = float(f"{row['p50_us'] / float32[row['contender']]:.6g}")
        row["x_float32_bytes"] = float(f"{row['x_float32_bytes']:.6g}")
    return rows


def bytes_held(name, n):
    """Return the bytes of all arrays of all contenders of a form."""
    arrays = FORMS[name].arrays
    return sum(operand.nbytes(n) for operand in operands_of(arrays)) * (1 + (name in CALLED) + arrays.grouped)


def contenders_of(kernels, name, n):
    """Return {contender: function that does, or enqueues, one step} of a form."""
    case = FORMS[name]
    found = forms.kernel_and_movers(kernels, case, forms.new_arrays(kernels, case, n))
    if name in CALLED:
        found[CALL] = forms.caller(kernels, case, forms.new_arrays(kernels, case, n))
    return found


def table(rows):
    """Return the table of one run: a line for each form."""
    first = rows[0]
    title = f"narrow: {first['elements']:,} elements, {first['backend']}, in turn, {first['clock']} clock"
    heads = ("", "bytes", "median", "p20", "p80", "GB/s", "x float32", "its bytes", "x limit", "adam_step")
    lines = []
    for (form,), of_form in measure.groups(rows, "dtype").items():
        kernel = next(row for row in of_form if row["contender"] == KERNEL)
        times = [report.time(kernel[key]) for key in ("p50_us", "p20_us", "p80_us")]
        ratios = [f"{kernel[key]:.3f}" for key in ("x_float32", "x_float32_bytes", "x_limit")]
        call = next((report.time(row["p50_us"]) for row in of_form if row["contender"] == CALL), "")
        lines.append([form, f"{kernel['bytes_per_element']:.4g}", *times, f"{kernel['gb_per_s']:,.1f}", *ratios, call])
    return Table(title, heads, lines)


def draw(rows, path):
    """Draw, for each backend and its largest size, each form's time, with marks at its bytes and its limit's time."""
    backends_of = measure.groups(rows, "backend")
    figure, axes = figures.panels(1, len(backends_of), width=8, height=4.6)
    for axis, ((backend,), of_backend) in zip(axes[0], backends_of.items(), strict=True):
        n = max(row["elements"] for row in of_backend)
        largest = [row for row in of_backend if row["elements"] == n]
        _draw_panel(axis, largest)
        title = f"{n:,} elements, {backend}: time over float32's"
        axis.set_title(title)
    plots.save(figure, path, rows)


def _draw_panel(axis, rows):
    of_forms = {
        form: {row["contender"]: row for row in of_form} for (form,), of_form in measure.groups(rows, "dtype").items()
    }
    ends, float32 = [], of_forms[FLOAT32][KERNEL]["p50_us"]
    for at, of_form in enumerate(reversed(of_forms.values())):
        kernel, by_limit = of_form[KERNEL], of_form[measure.LIMIT]["p50_us"] / float32
        labels = ("its bytes over float32's", "its limit's time") if at == 0 else (None, None)
        axis.barh(at, kernel["x_float32"], 0.62, color=plots.OURS)
        axis.plot([kernel["x_float32_bytes"]] * 2, [at - 0.42, at + 0.42], color=plots.LIMIT, linewidth=2, label=labels[0])
        axis.plot(by_limit, at, "d", color="white", markeredgecolor=plots.LIMIT, markersize=6, label=labels[1])
        ends.append(max(kernel["x_float32"], kernel["x_float32_bytes"], by_limit))
        text = f"{kernel['x_float32']:.2f}   {report.time(kernel['p50_us'])}, {kernel['bytes_per_element']:.4g} B an element"
        axis.annotate(text, (ends[-1], at), (7, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(of_forms)), reversed(of_forms), fontsize=9)
    axis.set_ylim(-0.6, len(of_forms) + 0.9)  # the legend's place
    axis.set_xlim(0, 1.5 * max(ends))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(fontsize=8, loc="upper right", frameon=False, ncols=2)


if __name__ == "__main__":
    sizes = {"CPU": "2e7", "CUDA": str(1 << 26)}
    arguments = {"seconds": 20.0, "sizes": sizes, "table": ("backend", "elements"), "forms": list(FORMS), "show": table}
    report.main("narrow", __doc__, measure_rows, draw, **arguments)
