"""The options of `python -m gpuadam plan`."""

import argparse
import math
import re
from pathlib import Path

from ... import strict_json
from ...options import STATE_DTYPES
from ...planning.machines import MACHINES
from ...planning.model import COLLECTIVES, MASTERS, PARAMS
from ...planning.prediction import MOST_DEVICES, Settings
from ...terminal.arguments import add_plot, folder, number, whole

CPU = "cpu"  # in the place of a kind of GPU
LEAST = 1e-9  # a byte of a GB
UNITS = {
    "N": whole,
    "GB": number(LEAST, unit=10**9),
    "MB": number(LEAST, unit=10**6),
    "GB/s": lambda text: number(LEAST)(text) * 10**9,
    "us": lambda text: number(LEAST)(text) * 1e-6,
}
# option -> (figure of a machine, its unit, help)
RATES = {
    "memory": ("memory", "GB", "of a device"),
    "bandwidth": ("device bandwidth", "GB/s", "of a device's memory"),
    "per-node": ("per_node", "N", "devices of a node"),
    "within": ("within bandwidth", "GB/s", "between the devices of a node"),
    "within-latency": ("within latency", "us", "of a message there"),
    "across": ("across bandwidth", "GB/s", "between nodes, of each device"),
    "across-latency": ("across latency", "us", "of a message there"),
    "pcie": ("pcie bandwidth", "GB/s", "between a device and its host"),
    "host-memory": ("host_memory", "GB", "of a node"),
    "host-bandwidth": ("host bandwidth", "GB/s", "of a node's memory"),
    "disk": ("disk", "GB", "of a node"),
    "disk-read": ("disk_read", "GB/s", "of a node"),
    "disk-write": ("disk_write", "GB/s", "of a node"),
}


def add(parser):
    """Add the options to a parser. They are stored by the names that `planning` has: of `update`, of Settings, of figures."""
    what = parser.add_argument_group("what is updated")
    one = what.add_mutually_exclusive_group(required=True)
    sizes = {"dest": "sizes", "default": argparse.SUPPRESS}
    one.add_argument("--parameters", type=whole, **sizes, metavar="N", help="how many numbers: 124439808, 7e9, 70B, 10T")
    one.add_argument("--shapes", type=shapes, **sizes, metavar="S,S", help="shapes, such as 768x3072,768")
    one.add_argument("--shapes-file", type=shapes_in, **sizes, metavar="FILE", help="a JSON file: name -> shape")
    what.add_argument("--param-dtype", dest="param", choices=PARAMS, default="float32", help="default %(default)s")
    what.add_argument("--grad-dtype", dest="grad", choices=PARAMS, help="default: that of the parameters")
    what.add_argument(
        "--state", choices=STATE_DTYPES, help="of the moments; default float32, or float64 with float64 parameters"
    )
    what.add_argument("--master", choices=tuple(MASTERS), help="of bfloat16 parameters (float32: float16 too)")
    what.add_argument("--amsgrad", action="store_true", help="the largest v of all steps is kept, and divides")
    what.add_argument("--ema", action="store_true", help="a running mean of the parameters")
    what.add_argument("--zero-grad", action="store_true", help="zeros are stored in the gradients")
    of_rounding = "bfloat16 or float16 parameters without a master are rounded up or down at random"
    what.add_argument("--stochastic-rounding", dest="stochastic", action="store_true", help=of_rounding)
    of_complex = "the parameters are complex, of parts of --param-dtype: one v for both parts, or one for each"
    shared = what.add_mutually_exclusive_group()
    shared.add_argument("--complex", choices=("joint", "parts"), help=of_complex)
    of_vectors = "numbers of a vector that share a v, as with Adam(components=...); default 1"
    shared.add_argument("--components", type=int, choices=(1, 2, 3, 4), default=1, help=of_vectors)

    where = parser.add_argument_group("where")
    gpus = (*MACHINES, CPU)
    where.add_argument("--gpu", choices=gpus, default="h100", help="kind of GPU, or this CPU; default %(default)s")
    where.add_argument("--world", type=devices, metavar="N", help="how many devices; default 1")
    of_pieces = "pieces that every parameter is cut into, each on devices of its own; auto: as few as fit; default 1"
    where.add_argument("--model-parallel", type=pieces, metavar="N|auto", help=of_pieces)
    reserve = number(0, unit=10**9)
    where.add_argument("--reserve", type=reserve, metavar="GB", help="of a device, for activations; default 0")
    of_step = "of an offloaded step, as in OffloadAdam; default 0.27"
    where.add_argument("--budget", type=UNITS["GB"], metavar="GB", help=of_step)
    where.add_argument("--bucket", type=UNITS["MB"], metavar="MB", help="of gradients in one collective; default 33.6")
    of_collective = "how the ranks exchange: in a ring, or with partners at halved distances; default %(default)s"
    where.add_argument("--collective", choices=COLLECTIVES, help=of_collective)
    parser.set_defaults(**Settings()._asdict())

    rates = parser.add_argument_group("rates in place of data sheets' (GB = 10^9 bytes, each direction by itself)")
    known = rates.add_mutually_exclusive_group()
    known.add_argument("--measure", action="store_true", help="measure this machine's memory, conversions and disk")
    known.add_argument("--constants", metavar="FILE", help="of plan --measure --json, or of bench --json")
    rates.add_argument("--seconds", type=number(LEAST), default=1.0, help="spent on each measurement (default 1)")
    rates.add_argument("--folder", type=folder, help="on the disk to measure; default that of temporary files")
    for option, (figure, unit, help) in RATES.items():
        rates.add_argument(f"--{option}", dest=figure, type=UNITS[unit], metavar=unit, help=help)
    add_plot(parser, "bench", "write time and memory against devices")


def pieces(text):
    return text if text == "auto" else devices(text)


def devices(text):
    return whole(text, most=MOST_DEVICES)


# Arguments of `planning` whose options have other names
NAMES = {"param": "param-dtype", "grad": "grad-dtype", "stochastic": "stochastic-rounding"}
ARGUMENTS = re.compile(
    rf"\b(param|grad|stochastic|state|master|complex|components|{'|'.join(Settings._fields)})=('?)([\w.]+)\2"
)


def named(message):
    """Return a message of `planning` with the command's options in the place of Python's arguments.

    >>> named("model_parallel=3 must divide world=8"), named("not with param='float64'")
    ('--model-parallel 3 must divide --world 8', 'not with --param-dtype float64')
    """
    return ARGUMENTS.sub(lambda found: f"--{NAMES.get(found[1], found[1].replace('_', '-'))} {found[3]}", message)


def shapes(text):
    """Return the elements of each shape.

    >>> shapes("768x3072,768")
    (2359296, 768)
    """
    return tuple(math.prod(map(whole, shape.split("x"))) for shape in text.split(","))


def shapes_in(path):
    """Return the elements of each shape in a JSON file: {"w": [768, 3072], "b": [768]}; a scalar has the shape []."""
    try:
        content = strict_json.parsed(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as JSON: {error}") from error
    shapes = content if isinstance(content, dict) else {}
    wrong = [
        repr(name)
        for name, shape in shapes.items()
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape)
    ]
    if wrong or not shapes:
        of_wrong = f", unlike {', '.join(wrong[:8])}" if wrong else ""
        raise argparse.ArgumentTypeError(
            f'{path} must hold names and shapes of integers above 0, such as {{"w": [768, 3072], "b": [768]}}{of_wrong}'
        )
    return tuple(math.prod(shape) for shape in shapes.values())
