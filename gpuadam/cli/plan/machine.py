"""Which machine a plan is for: a kind of GPU or this machine's CPU, with what was measured or given in place of its figures."""

import shutil
import tempfile

from ...planning import machines
from ...planning.machines import GB, Link, Processor
from ..measuring import constants

CPU = "cpu"  # in the place of a kind of GPU
# option -> (where it goes, what one of its units is)
GIVEN = {
    "memory": (("memory",), GB),
    "bandwidth": (("device", "bandwidth"), GB),
    "per_node": (("per_node",), 1),
    "within": (("within", "bandwidth"), GB),
    "within_latency": (("within", "latency"), 1e-6),
    "across": (("across", "bandwidth"), GB),
    "across_latency": (("across", "latency"), 1e-6),
    "pcie": (("pcie", "bandwidth"), GB),
    "host_memory": (("host_memory",), GB),
    "host_bandwidth": (("host", "bandwidth"), GB),
    "disk": (("disk",), GB),
    "disk_read": (("disk_read",), GB),
    "disk_write": (("disk_write",), GB),
}
WHOLE = ("memory", "per_node", "host_memory", "disk")  # what is a number of bytes or devices
ASSUMED_DISK = 5.0 * GB, 4.0 * GB


def of(options, formats):
    """Return (Machine, {field: where it is from}, constants or None). options: of the command. formats: to measure rates of."""
    found = None
    if options.constants:
        found = constants.read(options.constants)
    elif options.measure:
        found = constants.measured(formats, options.folder, options.seconds)
    machine = _cpu(found, options) if options.gpu == CPU else machines.MACHINES[options.gpu]
    sources = dict.fromkeys(_figures(machine), "assumed")
    if options.gpu != CPU:
        sources |= dict.fromkeys(
            ("memory", "device bandwidth", "per_node", "within bandwidth", "pcie bandwidth"), "data sheet"
        )
        sources |= dict.fromkeys(("within latency", "across latency", "pcie latency"), "NCCL's tuning")
        if machine.per_node == 8 and options.gpu != "l40s":
            sources |= dict.fromkeys(("across bandwidth", "host_memory", "host bandwidth", "disk"), "data sheet")
    machine, of_constants = _with_constants(machine, found or {})
    sources |= of_constants
    for option, (field, unit) in GIVEN.items():
        value = getattr(options, option)
        if value is None:
            continue
        if len(field) > 1 and getattr(machine, field[0]) is None:
            raise ValueError(f"--{option.replace('_', '-')} is of machines with GPUs, and this plan is for a CPU")
        machine = _with(machine, field, round(value * unit) if option in WHOLE else value * unit)
        sources[" ".join(field)] = "given"
    if options.gpu == CPU and options.memory is not None:
        machine = machine._replace(host_memory=machine.memory)
    return machine, sources, found


def _cpu(found, options):
    cpu = (found or {}).get("cpu")
    if cpu is None:
        raise ValueError(
            "no rates of a CPU are known: --measure measures this machine's, --constants FILE reads what was measured"
        )
    memory = cpu.get("memory") or (options.memory and round(options.memory * GB))
    if not memory:
        raise ValueError("how much memory the CPU has is not in the constants: give --memory GB")
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    return machines.cpu_only(cpu["name"], Processor(cpu["bandwidth"]), memory, free, *ASSUMED_DISK)


def _with_constants(machine, found):
    """Return a Machine with measured rates in it, and where its figures are from."""
    sources: dict[str, str] = {}
    for part, field in (("cpu", "host" if machine.host else "device"), ("gpu", "device")):
        if part in found and (part == "cpu" or machine.host):
            own = found[part]
            processor = Processor(own["bandwidth"], own["launch"], constants.rates_of(own), own["cache"])
            machine = machine._replace(**{field: processor})
            measured = f"measured, {own['name']}"
            sources |= {f"{field} bandwidth": measured, f"{field} launch": measured}
            if own["memory"] and field == "device":
                machine = machine._replace(memory=own["memory"])
                sources["memory"] = measured
    if "disk" in found:
        machine = machine._replace(
            disk_read=found["disk"]["read"], disk_write=found["disk"]["write"], disk=found["disk"]["free"]
        )
        sources |= dict.fromkeys(("disk_read", "disk_write", "disk"), "measured")
    return machine, sources


def _with(machine, field, value):
    if len(field) == 1:
        return machine._replace(**{field[0]: value})
    return machine._replace(**{field[0]: getattr(machine, field[0])._replace(**{field[1]: value})})


def _figures(machine):
    """Return {field: number} of all that is known of a machine."""
    figures: dict[str, float] = {}
    for field, value in machine._asdict().items():
        if isinstance(value, (Processor, Link)):
            own = {key: number for key, number in value._asdict().items() if key not in ("rates", "cache")}
            figures |= {f"{field} {key}": number for key, number in own.items()}
        elif isinstance(value, (int, float)):
            figures[field] = value
    return figures


def described(machine, sources):
    """Return what JSON says of a machine: {field: {"value", "source"}}."""
    figures = {field: {"value": value, "source": sources[field]} for field, value in _figures(machine).items()}
    return {"name": machine.name, **figures}
