"""How the commands answer: on a console, in JSON; how they end; and how they say what is missing."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..backends import BackendUnavailableError
from .console import Console

# Packages whose modules have another name
PACKAGES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "mpl_toolkits": "matplotlib", "numba_cuda": "numba-cuda"}


FULL = {errno.ENOSPC, errno.EDQUOT}  # of a disk


class CommandError(RuntimeError):
    """What a command was asked for cannot be done, for a reason that the user can mend. status: the exit status then."""

    status = 2


class NotWrittenError(CommandError):
    """The work was done, and its result could not be written."""

    status = 1


def need(extra: str, *modules: str) -> list[Any]:
    """Import modules of an extra, or raise CommandError with the command that installs it."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0], error.name)
        raise CommandError(f'{package} is not installed: pip install "gpuadam[{extra}]"') from error


def console(options):
    """Return a Console on standard output, or on standard error if the JSON goes to standard output."""
    return Console(sys.stderr if options.json == "-" else sys.stdout)


@contextlib.contextmanager
def ending_plainly(program=""):
    """End the process without a traceback: something is missing, a disk is full, a pipe's reader has gone, the user interrupts.

    What is missing, and what mends it, is a line on standard error, after the name of the program, and the exit status is 2.
    So is what could not be written, with the status 1. Otherwise the status is what a shell gives to a program that the signal
    ends: 141, as after `| head`, or 130.
    """

    def said(text):
        print(f"{program}: {text}" if program else text, file=sys.stderr)

    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BackendUnavailableError, CommandError) as error:
        said(error)
        sys.exit(getattr(error, "status", 2))
    except BrokenPipeError:
        _leave_standard_output()
        sys.exit(128 + 13)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _leave_standard_output()
        said(f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + 2)


def _leave_standard_output():
    """Let what is still to be written go nowhere: Python flushes once more at its end."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: of a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


BYTES = {"PB": 10**15, "TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def scaled(number, units):
    """Return a number in the unit in which it is read easiest. units: {name: how large it is}, the largest first.

    >>> scaled(28 * 10**9, BYTES), scaled(123, BYTES), scaled(0, BYTES)
    ('28 GB', '123 B', '0')
    >>> scaled(0.0123, SECONDS), scaled(98.7, SECONDS), scaled(4.5e-6, SECONDS), scaled(12345.6, SECONDS)
    ('12.3 ms', '98.7 s', '4.5 us', '12,346 s')
    """
    if not number:
        return "0"
    unit, size = next((each for each in units.items() if number >= each[1]), list(units.items())[-1])
    return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"


def counted(console, total, describe, every):
    """Yield 1 to total, print a line on the loop after every so many turns, and show on a terminal how far it is.

    describe(n) returns the line on the n-th turn.
    """
    began = shown = time.monotonic()
    for n in range(1, total + 1):
        yield n
        now = time.monotonic()
        if n == total or now > shown + 0.1:
            left = scaled((now - began) / n * (total - n), SECONDS)
            console.passing(f"{'#' * (30 * n // total):.<30} {100 * n // total}%, {left} left")
            shown = now
        if n % every == 0:
            console.print(describe(n))
    console.passing("")


def write_json(path, result):
    """Write to a file, to standard output if path is "-", or nowhere if it is None."""
    text = json.dumps(result, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    elif path:
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise NotWrittenError(f"{path} cannot be written: {error.strerror}") from error
