"""python -m gpuadam bench: throughput, in GB/s and in percent of the limit.

An Adam step of float32 moves 28 bytes an element: it reads param, grad, m and v, and writes param, m and v. The limit is what a
kernel of the same shape that moves the same bytes and computes next to nothing takes (`kernels/limit.py`), in the same run,
on the same arrays, in turn with the step, so that what else the machine does touches both.
"""

import time

import numpy as np

import gpuadam

from .. import backends, hyperparameters
from ..kernels import adam, limit
from . import output

SIZES = {"CPU": (10**3, 10**4, 10**5, 10**6, 10**7, 2 * 10**7), "CUDA": tuple(1 << k for k in range(16, 27, 2))}
ARRAYS_READ_AND_WRITTEN = 7


def run(options):
    """Print the table; return 0."""
    rich_console, rich_table, rich_progress, rich_box = output.need(
        "bench", "rich.console", "rich.table", "rich.progress", "rich.box"
    )
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
            rows.append(measure(name, dtype, n, options.seconds))
            progress.advance(task)

    result = {"rows": rows, "machine": output.machine() | gpu(names), "versions": output.versions()}
    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in rows):
        table = rich_table.Table(title=f"{backend}, {dtype}", title_justify="left", box=rich_box.SIMPLE_HEAD)
        for column in ("elements", "p20 us", "p50 us", "p80 us", "GB/s", "% of limit", "call us"):
            table.add_column(column, justify="right")
        for row in rows:
            if (row["backend"], row["dtype"]) == (backend, dtype):
                times = (
                    f"{row[key]:,.1f}" for key in ("p20_us", "p50_us", "p80_us", "gb_per_s", "percent_of_limit", "call_us")
                )
                table.add_row(f"{row['elements']:,}", *times)
        console.print(table)
    console.print(
        "One step of Adam, kernel and launch. % of limit: the limit kernel's time over the step's, medians of one run in turn.\n"
        "call: host time of one gpuadam.adam_step, its checks included (on a GPU it returns before the step is done).",
        highlight=False,
    )
    facts = result["machine"]
    console.print(", ".join(str(facts[key]) for key in ("gpu", "cpu", "system", "date") if facts.get(key)), highlight=False)
    if options.plot:
        plot(options.plot, result)
        console.print(f"plot: {options.plot}")
    if options.json:
        output.write_json(options.json, result)
    return 0


def measure(name, dtype, n, seconds):
    """Return one row: times of the step and of the limit kernel in turn, for about `seconds`."""
    kernels = backends.load(name)
    param, grad, m, v = (kernels.from_host(a) for a in data(n, dtype))
    views = [kernels.view("", a) for a in (param, grad, m, v)] + [None]
    h = hyperparameters.checked(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    form, scalars = hyperparameters.form_and_scalars(h, 10, views[0].dtype, False)
    times = in_turn(
        kernels,
        [lambda rule=rule: kernels.launch(form, views, scalars, rule) for rule in (adam, limit)],
        seconds,
    )
    calls = []
    for step in range(1, min(len(times[0]), 200) + 1):
        began = time.perf_counter()
        gpuadam.adam_step(param, grad, m, v, step, backend=name)
        calls.append(time.perf_counter() - began)
    p20, p50, p80 = np.percentile(times[0], [20, 50, 80])
    limit50 = np.median(times[1])
    moved = ARRAYS_READ_AND_WRITTEN * n * form.dtype.itemsize
    return {
        "backend": name,
        "dtype": str(form.dtype),
        "elements": n,
        "p20_us": 1e6 * p20,
        "p50_us": 1e6 * p50,
        "p80_us": 1e6 * p80,
        "limit_p50_us": 1e6 * limit50,
        "gb_per_s": moved / p50 / 1e9,
        "limit_gb_per_s": moved / limit50 / 1e9,
        "percent_of_limit": 100 * limit50 / p50,
        "call_us": 1e6 * float(np.median(calls)),
        "samples": len(times[0]),
    }


def in_turn(kernels, functions, seconds, at_least=11):
    """Run functions one after the other, in a new order each round, and return the seconds of every run of each.

    The order matters: who runs after a function that empties the caches pays for it.
    """
    shuffle = np.random.default_rng(0).permutation
    for _ in range(3):  # compile, and warm the caches up
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < deadline:
        # several rounds are enqueued before the first is waited for, so that a GPU does not idle between them
        rounds = []
        for _ in range(4):
            order = shuffle(len(functions))
            moments = [kernels.now()]
            for k in order:
                functions[k]()
                moments.append(kernels.now())
            rounds.append((order, moments))
        for order, moments in rounds:
            for k, start, end in zip(order, moments, moments[1:], strict=False):
                times[k].append(kernels.seconds_between(start, end))
    return times


def data(n, dtype):
    """Return param, grad, m and v: random numbers, repeated, that stay ordinary under both kernels."""
    block = np.random.default_rng(0).standard_normal((4, min(n, 1 << 20))).astype(dtype)
    block[3] = 1 + block[3] ** 2
    return (np.resize(row, n) for row in block)


def gpu(names):
    """Return the GPU's facts if one was used."""
    if "cupy" in names:
        import cupy

        device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
        return {
            "gpu": properties["name"].decode(),
            "compute_capability": device.compute_capability,
            "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        }
    if "numba-cuda" in names:
        return {"gpu": backends.load("numba-cuda").device_name()}
    return {}


def plot(path, result):
    """Write throughput against size, the step beside its limit."""
    matplotlib, pyplot = output.need("bench", "matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    groups = dict.fromkeys((row["backend"], row["dtype"]) for row in result["rows"])
    for k, (backend, dtype) in enumerate(groups):
        rows = [row for row in result["rows"] if (row["backend"], row["dtype"]) == (backend, dtype)]
        sizes = [row["elements"] for row in rows]
        axis.semilogx(sizes, [r["gb_per_s"] for r in rows], "o-", color=f"C{k}", label=f"{backend} {dtype}")
        axis.semilogx(sizes, [r["limit_gb_per_s"] for r in rows], ":", color=f"C{k}", label="its limit")
    axis.set(
        xlabel="elements", ylabel="GB/s", title=result["machine"].get("gpu") or result["machine"]["cpu"], ylim=(0, None)
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
