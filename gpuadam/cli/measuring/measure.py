"""Timing, and the rows in which the benchmarks report: shared by `python -m gpuadam bench` and the scripts in benchmarks/.

Contenders take turns in one run, in a new order each round. So the machine's other work touches all of them alike, and each runs
equally often after one that empties the caches.
"""

import itertools
import math
import time

import numpy as np

from ...kernels import messages
from . import facts

QUANTILES = (5, 20, 50, 80, 95)
ROUNDS = 4  # that are enqueued before the first is waited for
MARGIN = 1.5  # times the host's time: it is another one in each burst
MOST_FILLED = 0.05  # seconds: of rounds that take the host longer fewer are enqueued, down to one
OF_FREE = 1 / 256  # of a GPU's memory, which is filled in about 0.1 ms, whichever GPU it is
BUSY = 1.5  # times: on an idle machine p80 is within a few percent of p20
KERNEL, CALL = "gpuadam kernel + launch", "gpuadam.adam_step"
LIMIT, TORCH_FUSED = "limit", "torch fused"
OF_MOVER = f"{LIMIT}: "  # before the name of one of several ways to move the bytes; the fastest of them is the limit
MEASURED = (
    "samples",
    *(f"p{q:02}_us" for q in QUANTILES),
    "gb_per_s",
    "x_limit",
    "x_torch_fused",
    "peak_mb",
    "huge_percent",
    "mover",  # the fastest, whose time is the limit
)
# The columns of a row: its identity, then its figures, then the facts of the measurement.
IDENTITY = ("benchmark", "contender", "backend", "dtype", "elements", "arrays", "state", "clock")
COLUMNS = (*IDENTITY, *MEASURED, "device", "cpu", "cores", "system", "driver", "date", *facts.versions())
NUMBERS = {"elements", "arrays", "cores", *MEASURED} - {"mover"}


def data(sizes, dtype):
    """Yield random numbers for each name. They stay ordinary however often the step and the limit kernel run on them.

    sizes: name of the operand -> how many numbers, or one size, of param, grad, m and v.
    """
    rng = np.random.default_rng(0)
    for name, n in (sizes if isinstance(sizes, dict) else dict.fromkeys(("param", "grad", "m", "v"), sizes)).items():
        block = rng.standard_normal(min(n, 1 << 20)).astype(dtype)
        yield np.resize(1 + block**2 if name in ("v", "max_v", "lr_scale") else block, n)


def in_turn(kernels, functions, seconds, at_least=11, untimed=0, timed=1, before=()):
    """Run functions one after the other, in a new order each round, and return the seconds of every timed run of each.

    The device's clock counts, so on a GPU each takes until its work is done. They run for about `seconds` in all.
    untimed, timed: runs of a function on end, in its turn. The untimed ones come first, and bring its arrays into the caches.
    before: functions, each of which comes before a turn of the one at its place, and is not timed.

    A GPU that idles when a moment is recorded passes it at once, and the host's time until the launch counts as the GPU's. So
    each burst of rounds is enqueued behind other work that outlasts the host.
    """
    shuffle = np.random.default_rng(0).permutation
    fill = filler(kernels)

    def prepare(k):
        if before:
            before[k]()

    def burst(rounds, host):
        """Enqueue rounds, which take so many seconds of the host, and return (function's number, moments) of each turn."""
        turns, caught_up = [], True
        for k in itertools.chain.from_iterable(shuffle(len(functions)) for _ in range(rounds)):
            if fill and caught_up:
                fill(host)
            prepare(k)
            for _ in range(untimed):
                functions[k]()
            moments = [kernels.now()]
            for _ in range(timed):
                functions[k]()
                moments.append(kernels.now())
            turns.append((k, moments))
            caught_up = fill and kernels.done(moments[0])  # as after a function that waits for the device
        return turns

    for _ in range(2):  # compile, and warm the caches up
        for k, function in enumerate(functions):
            prepare(k)
            function()
    drain(kernels)
    began = time.perf_counter()
    burst(1, 0)
    of_round = MARGIN * (time.perf_counter() - began)
    rounds = max(1, min(ROUNDS, int(MOST_FILLED / of_round))) if fill else ROUNDS
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < deadline:
        for k, moments in burst(rounds, rounds * of_round):
            times[k] += [kernels.seconds_between(*ends) for ends in itertools.pairwise(moments)]
    return times


def drain(kernels):
    """Wait until the device has done all that was enqueued."""
    moment = kernels.now()
    kernels.seconds_between(moment, moment)


def filler(kernels):
    """Return a function that enqueues work which takes a GPU some seconds, MOST_FILLED at most; None on a CPU."""
    if kernels.memory == "CPU":
        return None
    free, _ = kernels.memory_info()
    scratch = kernels.view("scratch", kernels.zeros(max(1, int(free * OF_FREE)), np.uint8, kernels.current_device()))
    kernels.fill_zero(scratch)
    drain(kernels)
    n, began = 8, time.perf_counter()
    for _ in range(n):
        kernels.fill_zero(scratch)
    drain(kernels)
    each = (time.perf_counter() - began) / n

    def fill(seconds):
        for _ in range(math.ceil(min(seconds, MOST_FILLED) / each)):
            kernels.fill_zero(scratch)

    return fill


def rows_in_turn(benchmark, kernels, functions, elements, seconds, *, of_turns=None, **of_rows):
    """Run functions, {contender: function}, as `in_turn` does, and return a row for each.

    of_turns: options of `in_turn`. of_rows: as `row` has them; by default the state is "in turn", and the clock that of
        the kernels' memory.
    """
    times = in_turn(kernels, list(functions.values()), seconds, **of_turns or {})
    of_rows = {"state": "in turn", "clock": "device" if kernels.memory == "CUDA" else "host"} | of_rows
    return rows_of(benchmark, kernels, elements, dict(zip(functions, times, strict=True)), **of_rows)


def rows_of(benchmark, kernels, elements, times, **of_rows):
    """Return a row for each of {contender: seconds}. of_rows: as `row` has them."""
    return [row(benchmark, name, kernels.name, elements, seconds=own, **of_rows) for name, own in times.items()]


def row(benchmark, contender, backend, elements, *, seconds=(), moved=None, **identity):
    """Return one row of the report, with the machine and the versions in it.

    seconds: samples of the time. moved: bytes that a step moves, if its throughput is of interest. identity: the others of
    IDENTITY; state: of the caches, such as "warm"; clock: "host" or "device".
    """
    identity = {"clock": "host", "dtype": "float32", "arrays": 1} | identity
    identity |= {"benchmark": benchmark, "contender": contender, "backend": backend, "elements": elements}
    result = dict.fromkeys(COLUMNS) | facts.of_backend(backend) | identity
    result["samples"] = len(seconds)
    if len(seconds):
        quantiles = zip(QUANTILES, np.percentile(seconds, QUANTILES), strict=True)
        result |= {f"p{q:02}_us": _short(1e6 * value) for q, value in quantiles}
    if moved:
        result["gb_per_s"] = _short(moved / np.median(seconds) / 1e9)
    return result


def of_fastest_mover(rows):
    """Return rows with that of the fastest mover, as LIMIT, in the place of those of all movers. Its "mover" is their name."""
    movers = [row for row in rows if row["contender"].startswith(OF_MOVER)]
    if not movers:
        return rows
    fastest = min(movers, key=lambda row: row["p50_us"])
    fastest = fastest | {"contender": LIMIT, "mover": fastest["contender"].removeprefix(OF_MOVER)}
    kept = [row for row in rows if row not in movers]
    kept.insert(rows.index(movers[0]), fastest)
    return kept


def add_ratios(rows):
    """Return rows with the median of each over the limit's, and over torch fused's, of the same run: see `of_fastest_mover`."""
    rows = of_fastest_mover(rows)
    by_name = {row["contender"]: row["p50_us"] for row in rows}
    for column, base in (("x_limit", LIMIT), ("x_torch_fused", TORCH_FUSED)):
        if base in by_name:
            for each in rows:
                each[column] = _short(each["p50_us"] / by_name[base])
    return rows


def is_busy(row):
    """Return whether other work disturbed a measurement.

    Its p80 is far above its p20 then, so that another run would have another median.
    """
    return bool(row["p20_us"]) and row["p80_us"] > BUSY * row["p20_us"]


def on_busy_machine(rows):
    """Return a sentence on the rows that other work disturbed, or "" if there are none."""
    rows = [row for row in rows if row["p20_us"] and row["contender"] != CALL]
    busy = [row for row in rows if is_busy(row)]
    if not busy:
        return ""
    worst = max(busy, key=lambda row: row["p80_us"] / row["p20_us"])
    name = f"{worst['contender']}, {worst['dtype']}, {messages.how_many(worst['elements'], 'element')}"
    return (
        f"BUSY (*): in {len(busy)} of {messages.how_many(len(rows), 'measurement')} p80 is {BUSY} times p20 or more, at worst "
        f"{worst['p80_us'] / worst['p20_us']:.2f} times ({name}). Measure again when the machine is idle."
    )


def groups(rows, *keys):
    """Return {values of the keys: the rows that have them}, in the order of the rows."""
    of_values: dict[tuple, list[dict]] = {}
    for row in rows:
        of_values.setdefault(tuple(row[key] for key in keys), []).append(row)
    return of_values


def _short(x):
    return float(f"{x:.6g}")
