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
    known: dict = {}
    if options.constants:
        known = constants.read(options.constants)
    elif options.measure:
        known = constants.measured(formats, options.folder, options.seconds)
    if options.gpu == CPU:
        machine = _cpu(known, options)
        sources = dict.fromkeys(machine.figures(), "assumed")
    else:
        machine, sources = machines.MACHINES[options.gpu], machines.sources(options.gpu)
    changes = _measured(known, machine)
    for option, (figure, _, _) in RATES.items():
        if (value := getattr(options, figure)) is not None:
            if figure not in sources:
                raise ValueError(f"--{option} is of machines with GPUs, and this plan is for a CPU")
            changes[figure] = value, "given"
    for figure, (value, source) in changes.items():
        machine = machine.with_figure(figure, value)
        sources[figure] = source
    return machine, sources, known or None


def _cpu(known, options):
    if "cpu" not in known:
        raise ValueError(
            "no rates of a CPU are known: --measure measures this machine's, --constants FILE reads what was measured"
        )
    cpu = known["cpu"]
    memory = options.memory or cpu.get("memory")
    if not memory:
        raise ValueError("how much memory the CPU has is not in the constants: give --memory GB")
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    return machines.cpu_only(cpu["name"], Processor(cpu["bandwidth"]), memory, free, *ASSUMED_DISK)


def _measured(known, machine):
    """Return {figure of a machine: (its value in constants, where it is from)}."""
    changes: dict[str, tuple] = {}
    places = {"cpu": "host", "gpu": "device"} if machine.host else {"cpu": "device"}
    for part, place in places.items():
        if part in known:
            values, source = known[part], f"measured, {known[part]['name']}"
            of_place = {key: values[key] for key in ("bandwidth", "launch", "cache")} | {"rates": constants.rates_of(values)}
            changes |= {f"{place} {key}": (value, source) for key, value in of_place.items()}
            if values.get("memory") and place == "device":
                changes["memory"] = values["memory"], source
    if "disk" in known:
        of_disk = {"disk_read": "read", "disk_write": "write", "disk": "free"}
        changes |= {figure: (known["disk"][key], "measured") for figure, key in of_disk.items()}
    return changes
