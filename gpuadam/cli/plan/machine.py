"""Which machine a plan is for: a kind of GPU or this machine's CPU, some of its figures replaced by measured or given ones."""

import shutil
import tempfile

from ...planning import machines
from ...planning.machines import GB, Processor
from ..measuring import constants
from .options import CPU, RATES

ASSUMED_DISK = 5.0 * GB, 4.0 * GB


def of(options, formats):
    """Return (Machine, {figure: where it is from}, constants or None).

    options: of the command. formats: the `operands.Arrays` whose rates are measured, if rates are.
    """
    known = None
    if options.constants:
        known = constants.read(options.constants)
    elif options.measure:
        known = constants.measured(formats, options.folder, options.seconds)
    if options.gpu == CPU:
        machine = _cpu(known or {}, options)
        sources = dict.fromkeys(machine.figures(), "assumed")
    else:
        machine, sources = machines.MACHINES[options.gpu], machines.sources(options.gpu)
    machine, measured = _with_constants(machine, known or {})
    sources |= measured
    for option, (figure, _, _) in RATES.items():
        if (value := getattr(options, figure)) is not None:
            if figure not in sources:
                raise ValueError(f"--{option} is of machines with GPUs, and this plan is for a CPU")
            machine = machine.with_figure(figure, value)
            sources[figure] = "given"
    if options.gpu == CPU and options.memory is not None:
        machine = machine._replace(host_memory=machine.memory)
    return machine, sources, known


def _cpu(known, options):
    if "cpu" not in known:
        raise ValueError(
            "no rates of a CPU are known: --measure measures this machine's, --constants FILE reads what was measured"
        )
    cpu = known["cpu"]
    memory = cpu.get("memory") or options.memory
    if not memory:
        raise ValueError("how much memory the CPU has is not in the constants: give --memory GB")
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    return machines.cpu_only(cpu["name"], Processor(cpu["bandwidth"]), memory, free, *ASSUMED_DISK)


def _with_constants(machine, known):
    """Return a Machine with measured rates in it, and {figure: where it is from} of those."""
    sources: dict[str, str] = {}
    for part, place in (("cpu", "host" if machine.host else "device"), ("gpu", "device")):
        if part in known and (part == "cpu" or machine.host):
            values = known[part]
            processor = Processor(values["bandwidth"], values["launch"], constants.rates_of(values), values["cache"])
            machine = machine._replace(**{place: processor})
            source = f"measured, {values['name']}"
            sources |= {f"{place} bandwidth": source, f"{place} launch": source}
            if values["memory"] and place == "device":
                machine = machine._replace(memory=values["memory"])
                sources["memory"] = source
    if "disk" in known:
        disk = known["disk"]
        machine = machine._replace(disk_read=disk["read"], disk_write=disk["write"], disk=disk["free"])
        sources |= dict.fromkeys(("disk_read", "disk_write", "disk"), "measured")
    return machine, sources


def described(machine, sources):
    """Return what JSON says of a machine: its name, and {figure: {"value", "source"}}."""
    figures = {name: {"value": value, "source": sources[name]} for name, value in machine.figures().items()}
    return {"name": machine.name, **figures}
