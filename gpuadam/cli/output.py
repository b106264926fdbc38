"""What the commands share: JSON and CSV files, tables and plots by libraries that are extras, and facts about the machine."""

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

from .. import __version__


class MissingExtraError(RuntimeError):
    """A command needs a library that is not installed."""


def need(extra, *modules):
    """Import modules of an extra, or raise MissingExtraError with the command that installs it.

    extra: None for a package that no extra brings.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        wanted = f'"gpuadam[{extra}]"' if extra else error.name
        raise MissingExtraError(f"{error.name} is not installed: pip install {wanted}") from error


def console(extra, options):
    """Return a rich Console on standard output, or on standard error if that is where the JSON goes."""
    (rich_console,) = need(extra, "rich.console")
    found = rich_console.Console(stderr=options.json == "-")
    return found if found.is_terminal else rich_console.Console(stderr=options.json == "-", width=130)  # a file has no width


def writable(text):
    """Return the path of a file to write, whose folder is there: a type for argparse, so that it is known before the work."""
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(Path(text).parent)!r}: make it first")
    return text


def write_json(path, data):
    """Write to a file, or to standard output if path is "-"."""
    text = json.dumps(data, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


def write_csv(path, rows):
    """Write rows, dicts with the same keys, with a header; None becomes an empty field."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path, numbers):
    """Read what `write_csv` wrote: the columns in `numbers` as numbers, an empty field as None."""
    with Path(path).open(newline="") as file:
        return [
            {key: None if not text else json.loads(text) if key in numbers else text for key, text in row.items()}
            for row in csv.DictReader(file)
        ]


def versions():
    """Return the version of everything that can have a say in a result; None for what is not installed."""
    packages = [
        "numpy",
        "numba",
        "llvmlite",
        "cupy-cuda12x",
        "cupy-cuda13x",
        "cupy",
        "numba-cuda",
        "cuda-bindings",
        "torch",
        "jax",
        "optax",
        "deepspeed",
    ]
    return {"gpuadam": __version__, "python": platform.python_version()} | versions_of(packages)


def versions_of(packages):
    """Return {package: version, or None if it is not installed}, without importing any."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine():
    """Return date, operating system, processor and number of cores."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
