"""How the commands answer: on a terminal or in a pipe, in tables, in JSON; and how they say what is missing."""

import importlib
import json
import sys
from pathlib import Path


class CommandError(RuntimeError):
    """What a command was asked for cannot be done, for a reason that the user can mend."""


class MissingExtraError(CommandError):
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


def console(extra, options, width=130):
    """Return a rich Console on standard output, or on standard error if the JSON goes to standard output.

    extra: the extra that has rich, and matplotlib too if a plot is wanted. width: in characters, where there is no terminal.
    """
    rich_console, *_ = need(extra, "rich.console", *["matplotlib"] * bool(getattr(options, "plot", None)))
    stream = sys.stderr if options.json == "-" else sys.stdout
    return rich_console.Console(file=stream, width=None if stream.isatty() else width)


def table(title, heads, lines, styles=None):
    """Return a rich Table. Its first column is aligned at the left, the others, which hold figures, at the right.

    lines: a list of texts for each line. styles: of the lines, as rich names them.
    """
    rich_table, rich_box = need("bench", "rich.table", "rich.box")
    made = rich_table.Table(title=title, title_justify="left", box=rich_box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        # the last column may be folded, where the terminal is narrow
        made.add_column(head, justify="right" if number else "left", no_wrap=number < len(heads) - 1)
    for line, style in zip(lines, styles or [None] * len(lines), strict=True):
        made.add_row(*line, style=style)
    return made


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
    """Yield 1 to total, print a line on the loop after every so many turns, and show a bar on a terminal.

    describe(n) returns the line on the n-th turn.
    """
    (rich_progress,) = need("demo", "rich.progress")
    bar = rich_progress.track(range(1, total + 1), "", console=console, transient=True, disable=not console.is_terminal)
    for n in bar:
        yield n
        if n % every == 0:
            console.print(describe(n), highlight=False)


def write_json(path, result):
    """Write to a file, to standard output if path is "-", or nowhere if it is None."""
    text = json.dumps(result, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    elif path:
        Path(path).write_text(text)
