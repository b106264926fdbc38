"""python -m gpuadam: demo, bench, plan, doctor."""

import argparse
import importlib
import math
import sys

from . import __version__
from .backends import BACKENDS, BackendUnavailableError
from .cli.output import MissingExtraError, writable
from .cli.plan import options as plan_options


def main(argv=None):
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="gpuadam", description="The fused Adam update: try it, time it, check it.")
    parser.add_argument("--version", action="version", version=f"gpuadam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,bench,plan,doctor}")

    demo = commands.add_parser("demo", help="train on real data, here and now, on the best backend there is")
    demo.add_argument("--plot", type=writable, metavar="FILE", help="write the loss and accuracy curves as PNG")

    bench = commands.add_parser("bench", help="throughput, in GB/s and in percent of the measured limit")
    bench.add_argument("--sizes", type=_sizes, metavar="N,N", help="elements, such as 1e5,2e7; by default a sweep")
    bench.add_argument(
        *("--forms", "--dtypes"),
        type=_forms,
        default=("float32", "float64"),
        metavar="NAME,NAME",
        help='formats, formulas and algorithms, such as "float32,8-bit state,NAdam", or all; default float32,float64',
    )
    bench.add_argument("--seconds", type=_seconds, default=1.0, help="time spent on each row (default 1)")
    bench.add_argument("--plot", type=writable, metavar="FILE", help="write throughput against size as PNG")

    plan = commands.add_parser("plan", help="memory and time of a step in memory, sharded, offloaded, on up to 100,000 GPUs")
    plan_options.add(plan)

    doctor = commands.add_parser("doctor", help="what is installed, what works, how to mend it")
    for command in (demo, bench):
        command.add_argument("--backend", choices=list(BACKENDS), help="default: the best available (bench: all)")
    for command in (demo, bench, plan, doctor):
        command.add_argument("--json", type=writable, metavar="FILE", help="write the result as JSON; - for standard output")

    options = parser.parse_args(argv)
    try:
        return importlib.import_module(f"gpuadam.cli.{options.command}").run(options)
    except (BackendUnavailableError, MissingExtraError) as error:
        print(f"gpuadam {options.command}: {error}", file=sys.stderr)
        return 2


def _sizes(text):
    try:
        sizes = [int(float(size)) for size in text.split(",")]
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1e5,2e7") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("sizes must be at least 1")
    return sizes


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _forms(text):
    from .cli.measuring import forms  # which other commands do not need

    return forms.chosen(text)


if __name__ == "__main__":
    sys.exit(main())
