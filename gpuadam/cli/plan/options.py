"""The options of `python -m gpuadam plan`."""

import argparse
import contextlib
import decimal
import json
import math
from pathlib import Path

from ...planning.machines import MACHINES
from ...planning.model import COLLECTIVES, PARAMS, STATES
from ..output import writable
from .machine import CPU

UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LEAST, MOST = 1e-9, 1e15


def add(parser):
    """Add the options to a parser."""
    what = parser.add_argument_group("what is updated")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument("--parameters", type=whole, metavar="N", help="how many numbers: 124439808, 7e9, 70B, 10T")
    one.add_argument("--shapes", type=shapes, metavar="S,S", help="shapes, such as 768x3072,768")
    one.add_argument("--shapes-file", type=shapes_in, metavar="FILE", help="a JSON file: name -> shape")
    what.add_argument("--param-dtype", choices=PARAMS, default="float32", help="default %(default)s")
    what.add_argument("--grad-dtype", choices=PARAMS, help="default: that of the parameters")
    what.add_argument("--state", choices=STATES, help="of the moments; default float32, or float64 with float64 parameters")
    what.add_argument("--master", choices=("remainder", "float32"), help="of bfloat16 parameters (float32: float16 too)")
    what.add_argument("--amsgrad", action="store_true")
    what.add_argument("--ema", action="store_true", help="a running mean of the parameters")
    what.add_argument("--zero-grad", action="store_true", help="zeros are stored in the gradients")
    what.add_argument("--stochastic-rounding", action="store_true")

    where = parser.add_argument_group("where")
    where.add_argument(
        "--gpu", choices=(*MACHINES, CPU), default="h100", help="kind of GPU, or this CPU; default %(default)s"
    )
    where.add_argument("--world", type=whole, default=1, metavar="N", help="how many devices; default 1")
    where.add_argument(
        "--model-parallel",
        type=pieces,
        default=1,
        metavar="N|auto",
        help="pieces that every parameter is cut into, each on devices of its own; auto: as few as fit; default 1",
    )
    where.add_argument(
        "--reserve", type=zero_or_positive, default=0.0, metavar="GB", help="of a device, for activations; default 0"
    )
    where.add_argument("--budget", type=positive, metavar="GB", help="of an offloaded step, as in OffloadAdam; default 0.27")
    where.add_argument("--bucket", type=positive, metavar="MB", help="of gradients in one collective; default 33.6")
    where.add_argument("--collective", choices=COLLECTIVES, default=COLLECTIVES[0], help="default %(default)s")

    rates = parser.add_argument_group("rates in place of data sheets' (GB = 10^9 bytes, each direction by itself)")
    known = rates.add_mutually_exclusive_group()
    known.add_argument("--measure", action="store_true", help="measure this machine's memory, conversions and disk")
    known.add_argument("--constants", metavar="FILE", help="of plan --measure --json, or of bench --json")
    rates.add_argument("--seconds", type=positive, default=1.0, help="spent on each measurement (default 1)")
    rates.add_argument(
        "--folder", type=folder, metavar="FOLDER", help="on the disk to measure; default that of temporary files"
    )
    for name, unit, said in (
        ("memory", "GB", "of a device"),
        ("bandwidth", "GB/s", "of a device's memory"),
        ("per-node", "N", "devices of a node"),
        ("within", "GB/s", "between the devices of a node"),
        ("within-latency", "us", "of a message there"),
        ("across", "GB/s", "between nodes, of each device"),
        ("across-latency", "us", "of a message there"),
        ("pcie", "GB/s", "between a device and its host"),
        ("host-memory", "GB", "of a node"),
        ("host-bandwidth", "GB/s", "of a node's memory"),
        ("disk", "GB", "of a node"),
        ("disk-read", "GB/s", "of a node"),
        ("disk-write", "GB/s", "of a node"),
    ):
        rates.add_argument(f"--{name}", type=whole if unit == "N" else positive, metavar=unit, help=said)
    parser.add_argument(
        "--plot", type=writable, metavar="FILE", help="write time and memory against the number of devices as PNG"
    )


def whole(text):
    """Return a whole number, exactly: 7e9 and 70B are numbers of digits, not floats.

    >>> whole("10T") == whole("1e13") == whole("10_000_000_000_000") == 10**13
    True
    """
    unit = UNITS.get(text[-1:], 1)
    try:
        number = decimal.Decimal(text[: -1 if unit > 1 else None]) * unit
    except decimal.InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 124439808, 7e9 or 70B") from None
    if not number.is_finite() or number != number.to_integral_value() or not 1 <= number <= 10**18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1e18")
    return int(number)


def positive(text):
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    if not LEAST <= number <= MOST:  # a byte of a GB; and more would make times that are infinite
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {LEAST:g} to {MOST:g}")
    return number


def zero_or_positive(text):
    with contextlib.suppress(ValueError):
        if float(text) == 0:
            return 0.0
    return positive(text)


def folder(text):
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text


def pieces(text):
    return text if text == "auto" else whole(text)


def shapes(text):
    """Return the elements of each shape.

    >>> shapes("768x3072,768")
    (2359296, 768)
    """
    return tuple(math.prod(whole(side) for side in shape.split("x")) for shape in text.split(","))


def shapes_in(path):
    """Return the elements of each shape in a JSON file: {"w": [768, 3072], "b": [768]}; a scalar has the shape []."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise argparse.ArgumentTypeError(f'{path} must hold names and shapes, such as {{"w": [768, 3072], "b": [768]}}')
    for name, shape in found.items():
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
            raise argparse.ArgumentTypeError(
                f"{path}: the shape of {name!r} is {shape!r}, and must be a list of integers above 0"
            )
    return tuple(math.prod(shape) for shape in found.values())
