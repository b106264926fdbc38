"""Types of command-line options, for argparse: each returns what a text says, or explains what is wrong with it."""

import argparse
import decimal
import difflib
import math
import os
import re
from pathlib import Path

from ..kernels.messages import shown
from .output import CommandError, need

UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
MOST = 10**18
PICTURES = (".png", ".pdf", ".svg")


def whole(text, least=1, most=MOST):
    """Return a whole number from `least` to `most`, exactly: 7e9 and 70B are numbers of digits, not floats.

    >>> whole("10T") == whole("10t") == whole("1e13") == whole("10_000_000_000_000") == 10**13
    True
    """
    unit = next((n for name, n in UNITS.items() if text[-1:].lower() == name.lower()), 1)
    try:
        number = decimal.Decimal(text[: -1 if unit > 1 else None]) * unit
    except decimal.DecimalException:  # it is no number, or one with a larger exponent than decimals have
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 124439808, 7e9 or 70B") from None
    if not number.is_finite() or number != number.to_integral_value() or not least <= number <= most:
        highest = f"{most:,}" if most < MOST else "1e18"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {highest}")
    return int(number)


def wholes(text):
    """Return the whole numbers of a list, each once.

    >>> wholes("1e5,20M,100k")
    (100000, 20000000)
    """
    return tuple(dict.fromkeys(map(whole, items(text, "numbers such as 1e5,2e7"))))


def items(text, wanted):
    """Return the items of a list, between its commas. wanted: what to give instead, in words, where one is empty.

    >>> items("a, b", "names")
    ['a', 'b']
    """
    found = [item.strip() for item in text.split(",")]
    if "" in found:
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty item beside a comma: give {wanted}" if text else f"give {wanted}"
        )
    return found


def names(among, what):
    """Return a type of lists of names, each once; "all" is all of them. what: a word for one, such as "form".

    >>> names(("thin", "wide", "very wide"), "line")("wide,thin,wide")
    ['wide', 'thin']
    """

    def parsed(text):
        if text == "all":
            return list(among)
        found = list(dict.fromkeys(items(text, f'names such as "{",".join(list(among)[:2])}"')))
        if unknown := [name for name in found if name not in among]:
            said = ", ".join(f"{shown(name)}{_meant(name, among)}" for name in unknown)
            raise argparse.ArgumentTypeError(f"there is no {what} {said}, only all or {', '.join(among)}")
        return found

    return parsed


def _meant(name, among):
    """Return a question after a name that is not among others: which one may be meant, or "" if none is like it."""
    beginning = re.sub(r"\W", "", name).lower()
    like = [other for other in among if beginning and re.sub(r"\W", "", other).lower().startswith(beginning)]
    like = like or difflib.get_close_matches(name, among, 1)
    return f" (did you mean {shown(like[0])}?)" if like else ""


def number(least, most=1e15, unit=None):
    """Return a type of numbers from `least` to `most`. unit: how many each one stands for, if they are to be whole numbers.

    >>> number(0, unit=10**9)("0.5")
    500000000
    """

    def number(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return round(value * unit) if unit else value

    return number


def writable(text):
    """Return the path of a file to write, or "-". A file that cannot be written is to be known before the work is done."""
    path = Path(text)
    try:
        if not text or path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
        folder(str(path.parent))
        if path.is_file():
            path.open("r+b").close()
        elif text != "-" and not path.exists():  # not of a pipe, which may be opened only once
            new = Path(os.path.realpath(text))  # a link may lead to it
            new.open("xb").close()
            new.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    return text


def picture(text):
    """Return the path of a picture to write. Its end says of which kind it is; without one it is PNG.

    >>> picture("loss.svg")
    'loss.svg'
    """
    if Path(text).suffix.lower() not in ("", *PICTURES):
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(PICTURES)}, or have no such end, for PNG")
    return writable(text)


def add_plot(parser, extra, what, default=None):
    """Add the option --plot to a parser, of which a picture is the value.

    extra: the one that brings matplotlib. what: is drawn, in words for the help.
    """

    def path(text):
        try:
            need(extra, "matplotlib")  # so that its absence is reported before the work begins
        except CommandError as error:
            parser.exit(error.status, f"{parser.prog}: {error}\n")
        return picture(text)

    parser.add_argument("--plot", type=path, metavar="FILE", default=default, help=f"{what}: FILE.png, .pdf or .svg")


def folder(text):
    """Return the path of a folder that is there."""
    try:
        is_there = Path(text).is_dir()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be reached: {error.strerror}") from error
    if not is_there:
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}: make it first")
    return text
