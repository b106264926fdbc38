"""python -m gpuadam plan: what a step needs in every memory and how long it takes, on up to 100,000 GPUs, before there are any.

The model is that of `gpuadam/performance_model.py` and `gpuadam/planning.py`. Times are predictions: from data sheets' rates they
say what can be hoped for, and nobody has measured them. `benchmarks/plan.py` compares predictions with measurements.
"""

import dataclasses
import sys

from ... import planning
from ...planning import model as performance_model
from ...planning.machines import Machine
from ...planning.model import ROLES
from .. import output
from . import machine as plan_machine

STAGES = ("all-reduce", "reduce-scatter", "all-gather", "update", "to the device", "to the host", "host memory", "disk")

SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "reduce-scatter": "reduce",
    "all-gather": "gather",
    "to the device": "up",
    "to the host": "down",
    "host memory": "host mem",
}


def run(options):
    """Print the tables; return 0 if a way fits, 1 if none does, 2 for what makes no sense."""
    rich_console, _ = output.need("bench", "rich.console", "rich.table")
    if options.plot:
        output.need("bench", "matplotlib")
    console = rich_console.Console(stderr=options.json == "-")
    if not console.is_terminal:
        console = rich_console.Console(stderr=options.json == "-", width=150)  # a file has no width
    try:
        asked = Asked.of(options)
        predictions = planning.plan(asked.update, asked.machine, asked.settings, asked.auto)
    except (ValueError, OSError) as error:  # OSError: of the disk that is measured
        print(f"gpuadam plan: {error}", file=sys.stderr)
        return 2
    best = planning.best(predictions)
    if not best and not asked.auto:
        asked = dataclasses.replace(asked, cut=planning.plan(asked.update, asked.machine, asked.settings, auto=True))
    _print(console, asked, predictions, best)
    if options.plot:
        from . import plot as plan_plot

        plan_plot.draw(options.plot, asked)
        console.print(f"plot: {options.plot}")
    if options.json:
        output.write_json(options.json, as_json(asked, predictions, best))
    return 0 if best else 1


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a plan was asked for."""

    update: performance_model.Update
    machine: Machine
    settings: planning.Settings
    auto: bool  # whether the model is cut into as few pieces as fit
    sources: dict  # where the machine's figures are from
    constants: dict | None
    cut: list | None = None  # the ways with as few pieces as fit, if none fits as asked

    @classmethod
    def of(cls, options):
        """Return what the command's options say."""
        update = performance_model.update(
            [options.parameters] if options.parameters else options.shapes or options.shapes_file,
            options.param_dtype,
            options.grad_dtype,
            options.state,
            options.master,
            options.amsgrad,
            options.ema,
            options.zero_grad,
            options.stochastic_rounding,
        )
        formats = [update.arrays, planning.of_shard(update.arrays)] if options.world > 1 else [update.arrays]
        machine, sources, found = plan_machine.of(options, formats)
        auto = options.model_parallel == "auto"
        settings = planning.Settings(
            options.world,
            1 if auto else options.model_parallel,
            round(options.reserve * 10**9),
            collective=options.collective,
        )
        if options.budget:
            settings = settings._replace(budget=max(round(options.budget * 10**9), 1))
        if options.bucket:
            settings = settings._replace(bucket=max(round(options.bucket * 10**6), 1))
        return cls(update, machine, settings, auto, sources, found)

    @property
    def formats(self):
        """The formats in words."""
        a, u = self.update.arrays, self.update
        said = [f"{a.param_copy or a.param} parameters", f"{a.grad} gradients", f"{a.state} state".replace("8bit", "8-bit")]
        said += ["float32 masters"] * bool(a.param_copy) + ["16 bits of a master"] * a.remainder
        said += ["AMSGrad"] * a.amsgrad + ["a running mean"] * bool(a.ema) + ["gradients set to 0"] * u.zero_grad
        return ", ".join(said)


def _print(console, asked, predictions, best):
    title = f"{sum(asked.update.sizes):,} parameters on {asked.settings.world:,} x {asked.machine.name}: {asked.formats}"
    console.print(title, highlight=False)
    console.print(_memory_table(asked, predictions))
    console.print(_time_table(predictions, best))
    for line in said(asked, predictions, best):
        console.print(line, highlight=False)


def said(asked, predictions, best):
    """Return what the tables come to, and where their figures are from, in sentences."""
    lines = []
    if best:
        lines.append(f"best: {_summed_up(best)}")
        ours = planning.best([p for p in predictions if p.made_by])
        larger = planning.predict(best.way, asked.update, asked.machine, _with_larger_buckets(asked, best))
        if larger.seconds < 0.8 * best.seconds:
            lines.append(
                f"its collectives wait for latency: with --bucket {_with_larger_buckets(asked, best).bucket / 10**6:,.0f} "
                f"it would take {seconds(larger.seconds)}"
            )
        if not best.made_by:
            lines.append(
                f"best that gpuadam has a class for: {_summed_up(ours)}" if ours else "gpuadam has no class for what fits"
            )
    else:
        cut = planning.best(asked.cut or [])
        lines.append(
            f"nothing fits. With --model-parallel {cut.model_parallel} it would: {_summed_up(cut)}"
            if cut
            else "nothing fits, in however many pieces: take more devices, narrower formats or more memory"
        )
    lines.append(
        "host, files: bytes of a node. up, down: over PCIe. reduce, gather: reduce-scatter of gradients, all-gather of parameters"
    )
    if not asked.settings.reserve:
        lines.append("all of a device's memory is taken to be free: --reserve GB keeps some for activations")
    lines += [f"{source}: {', '.join(fields)}" for source, fields in _by_source(asked.sources).items()]
    unknown = _without_rate(asked)
    if unknown:
        lines.append(f"no rate of conversions is known of {' and '.join(unknown)}: only bytes bind there")
    return lines


def _with_larger_buckets(asked, prediction):
    return asked.settings._replace(model_parallel=prediction.model_parallel, bucket=16 * asked.settings.bucket)


def _by_source(sources):
    found: dict[str, list[str]] = {}
    for field, source in sources.items():
        found.setdefault(source, []).append(field)
    return found


def _without_rate(asked):
    return [
        f"the {name}"
        for name, processor in (("device", asked.machine.device), ("host", asked.machine.host))
        if processor and asked.update.arrays not in processor.rates
    ]


def _summed_up(prediction):
    pieces = f", the model in {prediction.model_parallel:,} pieces" if prediction.model_parallel > 1 else ""
    made = prediction.made_by or "no class of gpuadam"
    step, memory = seconds(prediction.seconds), size(prediction.device_bytes)
    return f"{prediction.way.name}{pieces}: {step} a step, {memory} a device, by {made}"


def _memory_table(asked, predictions):
    (rich_table, rich_box) = output.need("bench", "rich.table", "rich.box")
    used = [role for role in ROLES if any(p.bytes[role] for p in predictions)]
    title = f"memory of a device, {size(asked.machine.memory - asked.settings.reserve)}"
    table = rich_table.Table(title=title, title_justify="left", box=rich_box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    pieces = asked.auto * ["pieces"]
    for column in (*pieces, *(SHORT.get(role, role) for role in used), "in all", "host", "files", "fits"):
        table.add_column(column, justify="right", no_wrap=column != "fits")
    for p in predictions:
        lacks = ", ".join(
            f"{size(lack)} short{'' if where == 'device' else f' ({where})'}" for where, lack in p.short.items()
        )
        cells = [f"{p.model_parallel:,}"] * asked.auto + [size(p.bytes[role]) for role in used]
        cells.append(size(p.device_bytes))
        table.add_row(p.way.name, *cells, size(p.host_bytes), size(p.file_bytes), lacks or "yes")
    return table


def _time_table(predictions, best):
    (rich_table, rich_box) = output.need("bench", "rich.table", "rich.box")
    used = [stage for stage in STAGES if any(stage in p.stages for p in predictions)]
    table = rich_table.Table(title="time of a step", title_justify="left", box=rich_box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in (*(SHORT.get(stage, stage) for stage in used), "a step", "by"):
        table.add_column(column, justify="right", no_wrap=True)
    for p in predictions:
        cells = [seconds(p.stages[stage]) if stage in p.stages else "" for stage in used]
        style = "bold" if p is best else None if p.fits else "dim"
        table.add_row(p.way.name, *cells, seconds(p.seconds), p.made_by.removeprefix("gpuadam.") or "-", style=style)
    return table


def size(n_bytes):
    """Return bytes as they are read easiest.

    >>> size(28 * 10**9), size(123), size(0)
    ('28 GB', '123 B', '0')
    """
    for unit, one in (("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= one:
            return f"{n_bytes / one:.3g} {unit}"
    return f"{n_bytes} B" if n_bytes else "0"


def seconds(time):
    """Return a time as it is read easiest.

    >>> seconds(0.0123), seconds(98.7), seconds(4.5e-6)
    ('12.3 ms', '98.7 s', '4.5 us')
    """
    for unit, one in (("s", 1.0), ("ms", 1e-3)):
        if time >= one:
            return f"{time / one:.3g} {unit}" if time < 1000 else f"{time:,.0f} s"
    return f"{time / 1e-6:.3g} us"


def as_json(asked, predictions, best):
    """Return all of a plan as JSON has it. Bytes are integers and exact, seconds floats."""

    def row(p):
        return {
            "way": p.way.name,
            **p.way._asdict(),
            "made_by": p.made_by or None,
            "model_parallel": p.model_parallel,
            "fits": p.fits,
            "bytes": p.bytes,
            "device_bytes": p.device_bytes,
            "host_bytes_of_node": p.host_bytes,
            "file_bytes_of_node": p.file_bytes,
            "short": p.short,
            "stages": p.stages,
            "seconds": p.seconds,
        }

    return {
        "parameters": sum(asked.update.sizes),
        "arrays": asked.update.arrays._asdict(),
        "zero_grad": asked.update.zero_grad,
        "settings": asked.settings._asdict(),
        "machine": plan_machine.described(asked.machine, asked.sources),
        "ways": [row(p) for p in predictions],
        "best": best.way.name if best else None,
        "fits_in_pieces": [row(p) for p in asked.cut or [] if p.fits],
        "constants": asked.constants,
        "versions": output.versions(),
    }
