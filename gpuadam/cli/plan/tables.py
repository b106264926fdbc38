"""What `python -m gpuadam plan` prints: a table of memory, one of time, and sentences."""

import functools

from ... import planning
from ...planning import model
from ...terminal.console import Table
from ...terminal.output import BYTES, SECONDS, scaled

size, time = functools.partial(scaled, units=BYTES), functools.partial(scaled, units=SECONDS)
# stages and roles, and the heads of their columns
STAGES = {"all-reduce": "all-reduce", "reduce-scatter": "reduce", "all-gather": "gather", "update": "update"}
STAGES |= {"to the device": "up", "to the host": "down", "host memory": "host mem", "disk": "disk"}
ROLES = dict(zip(model.ROLES, ("params", "grads", "moments", "masters", "mean", "buffers"), strict=True))


def memory_table(asked, predictions):
    used = [role for role in ROLES if any(p.bytes[role] for p in predictions)]
    heads = ["", *["pieces"] * asked.auto, "fits", "in all", *(ROLES[role] for role in used), "host", "files"]
    lines = []
    for p in predictions:
        short = ", ".join(f"{size(n)} short{'' if where == 'device' else f' ({where})'}" for where, n in p.short.items())
        n_bytes = (p.device_bytes, *(p.bytes[role] for role in used), p.host_bytes, p.file_bytes)
        lines.append([p.way.name, *[f"{p.model_parallel:,}"] * asked.auto, short or "yes", *map(size, n_bytes)])
    return Table(f"memory of a device, {size(asked.machine.memory - asked.settings.reserve)}", heads, lines)


def time_table(predictions, best):
    used = [stage for stage in STAGES if any(stage in p.stages for p in predictions)]
    heads = ["", "a step", *(STAGES[stage] for stage in used), "by"]
    lines, styles = [], []
    for p in predictions:
        stages = [time(p.stages[stage]) if stage in p.stages else "" for stage in used]
        lines.append([p.way.name, time(p.seconds), *stages, p.made_by.removeprefix("gpuadam.") or "-"])
        styles.append("bold" if p is best else None if p.fits else "dim")
    return Table("time of a step", heads, lines, styles)


def sentences(asked, predictions, best, cut):
    """Yield what the tables come to, and where their figures are from."""
    if best:
        yield f"best: {_summed_up(best)}"
        settings = asked.settings._replace(model_parallel=best.model_parallel, bucket=16 * asked.settings.bucket)
        larger = planning.Prediction(best.way, asked.update, asked.machine, settings)
        if larger.seconds < 0.8 * best.seconds:
            bucket, seconds = f"{settings.bucket / 10**6:,.0f}", time(larger.seconds)
            yield f"its collectives wait for latency: with --bucket {bucket} it would take {seconds}"
        ours = planning.best([p for p in predictions if p.made_by])
        if not best.made_by:
            yield f"best that gpuadam has a class for: {_summed_up(ours)}" if ours else "gpuadam has no class for what fits"
    elif cut:
        yield f"nothing fits. With --model-parallel {cut.model_parallel} it would: {_summed_up(cut)}"
    else:
        yield "nothing fits, in however many pieces: take more devices, narrower formats or more memory"
    collectives = "reduce, gather: reduce-scatter of gradients, all-gather of parameters"
    yield f"host, files: bytes of a node. up, down: over PCIe. {collectives}"
    if not asked.settings.reserve:
        yield "all of a device's memory is taken to be free: --reserve GB keeps some for activations"
    for source in dict.fromkeys(asked.sources.values()):
        yield f"{source}: {', '.join(in_words(figure) for figure, of in asked.sources.items() if of == source)}"
    processors = {"the device": asked.machine.device, "the host": asked.machine.host}
    unknown = [name for name, processor in processors.items() if processor and asked.update.arrays not in processor.rates]
    if unknown:
        yield f"no rate of conversions is known of {' and '.join(unknown)}: only bytes bind there"


def in_words(figure):
    """Return the name of a figure of a machine, in words.

    >>> in_words("disk_read"), in_words("per_node"), in_words("device bandwidth")
    ('disk read', 'devices of a node', 'device bandwidth')
    """
    return "devices of a node" if figure == "per_node" else figure.replace("_", " ")


def _summed_up(prediction):
    pieces = f", the model in {prediction.model_parallel:,} pieces" if prediction.model_parallel > 1 else ""
    step, memory = time(prediction.seconds), size(prediction.device_bytes)
    return (
        f"{prediction.way.name}{pieces}: {step} a step, {memory} a device, by {prediction.made_by or 'no class of gpuadam'}"
    )
