"""python -m gpuadam plan: what a step needs in every memory and how long it takes, on up to 100,000 GPUs, before there are any.

`gpuadam.planning` has the model. Times are predictions: from data sheets' rates they say what can be hoped for, and nobody has
measured them. `benchmarks/plan.py` compares predictions with measurements.
"""

from typing import NamedTuple

from ... import planning
from ...planning.prediction import of_shard
from ...terminal import figures, output
from ..measuring import facts
from . import machine as plan_machine
from . import options as plan_options
from . import plot, tables

HELP = "memory and time of a step in memory, sharded, offloaded, on up to 100,000 GPUs"
OF_UPDATE = ("param", "grad", "state", "master", "amsgrad", "ema", "zero_grad", "stochastic", "complex", "components")
add_options = plan_options.add


def run(options):
    """Print the tables; return 0 if a way fits, 1 if none does."""
    console = output.console(options)
    try:
        asked = Asked.of(options)
        predictions = asked.predictions()
    except (ValueError, OSError) as error:  # OSError: of the disk that is measured
        raise output.CommandError(plan_options.named(str(error))) from error
    best = planning.best(predictions)
    cut = [] if best or asked.auto else asked._replace(auto=True).predictions()
    n, devices = sum(asked.update.sizes), f"{asked.settings.world:,} x {asked.machine.name}"
    console.print(f"{n:,} parameters on {devices}: {asked.formats}")
    for table in (tables.memory_table(asked, predictions), tables.time_table(predictions, best)):
        console.print(table)
    for line in tables.sentences(asked, predictions, best, planning.best(cut)):
        console.print(line)
    if options.plot:
        figures.save(plot.draw(asked), options.plot)
        console.print(f"plot: {options.plot}")
    output.write_json(options.json, as_json(asked, predictions, best, cut))
    return 0 if best else 1


class Asked(NamedTuple):
    """What a plan was asked for."""

    update: planning.Update
    machine: planning.Machine
    settings: planning.Settings
    auto: bool  # whether the model is cut into as few pieces as fit
    sources: dict  # where the machine's figures are from
    constants: dict | None

    @classmethod
    def of(cls, options):
        """Return what the command's options say."""
        update = planning.update(options.sizes, **{name: getattr(options, name) for name in OF_UPDATE})
        formats = [update.arrays, of_shard(update.arrays)] if options.world > 1 else [update.arrays]
        machine, sources, constants = plan_machine.of(options, formats)
        auto = options.model_parallel == "auto"
        settings = planning.Settings(*(getattr(options, name) for name in planning.Settings._fields))
        return cls(update, machine, settings._replace(model_parallel=1) if auto else settings, auto, sources, constants)

    def predictions(self):
        return planning.plan(self.update, self.machine, self.settings, self.auto)

    @property
    def formats(self):
        """The formats in words."""
        a, zero_grad = self.update.arrays, self.update.zero_grad
        said = [f"{a.param_copy or a.param} parameters", f"{a.grad} gradients", f"{a.state} state".replace("8bit", "8-bit")]
        said += ["float32 masters"] * bool(a.param_copy) + ["16 bits of a master"] * a.remainder
        said += [f"a v for every {a.numbers} numbers"] * (a.numbers > 1)
        said += ["AMSGrad"] * a.amsgrad + ["a running mean"] * bool(a.ema) + ["gradients set to 0"] * zero_grad
        return ", ".join(said)


def as_json(asked, predictions, best, cut):
    """Return all of a plan as JSON has it. Bytes are integers and exact, seconds floats."""

    def row(p):
        step = {"way": p.way.name, **p.way._asdict(), "made_by": p.made_by or None}
        of_device = {"model_parallel": p.model_parallel, "fits": p.fits, "bytes": p.bytes, "device_bytes": p.device_bytes}
        of_node = {"host_bytes_of_node": p.host_bytes, "file_bytes_of_node": p.file_bytes, "short": p.short}
        return step | of_device | of_node | {"stages": p.stages, "seconds": p.seconds}

    values = asked.machine.figures()
    of_machine = {figure: {"value": value, "source": asked.sources[figure]} for figure, value in values.items()}
    return {
        "parameters": sum(asked.update.sizes),
        "arrays": asked.update.arrays._asdict(),
        "zero_grad": asked.update.zero_grad,
        "settings": asked.settings._asdict(),
        "machine": {"name": asked.machine.name, **of_machine},
        "ways": [row(p) for p in predictions],
        "best": best.way.name if best else None,
        "fits_in_pieces": [row(p) for p in cut if p.fits],
        "constants": asked.constants,
        "versions": facts.versions(),
    }
