"""Text and tables that fit a terminal, and whole lines in a pipe. It needs the standard library alone."""

import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

STYLES = {"bold": "\x1b[1m", "dim": "\x1b[2m"}
END_OF_STYLE = "\x1b[0m"


class Table(NamedTuple):
    """A table. Its first column is aligned at the left, the others, which hold figures, at the right.

    title: a text. heads: of the columns. lines: a sequence of texts for each line. styles: for each line "bold", "dim" or None.
    labels: how many of the first columns say what a line is of. caption: a line below the table.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    styles: Sequence[str | None] | None = None
    labels: int = 1
    caption: str = ""

    def parts(self, width):
        """Yield the lines of each part of the table, as texts. Nothing is cut: a table wider than `width` has several parts.

        width: in characters, or None for one part. Each part has the labels, and the parts are of about the same width.

        >>> for part in Table("", ("", "GB", "seconds"), [["in memory", "16", "0.02"]]).parts(19):
        ...     print(*part, sep=chr(10))
                   GB
        -------------
        in memory  16
                   seconds
        ------------------
        in memory     0.02
        """
        cells = [self.heads, *self.lines]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        gap = 2 if width is None or sum(widths) + 2 * len(widths) - 2 <= width else 1
        parts = self._split(widths, gap, width)
        if len(parts) > 1:
            gap = 2
            most = len(self._split(widths, gap, width))
            even = (self._split(widths, gap, narrower) for narrower in range(width, 0, -1))
            *_, parts = itertools.takewhile(lambda each: len(each) == most, even)
        for columns in parts:
            texts = [
                (" " * gap).join(f"{line[k]:{'>' if k else '<'}{widths[k]}}" for k in columns).rstrip() for line in cells
            ]
            yield [texts[0], "-" * max(map(len, texts)), *texts[1:]]

    def _split(self, widths, gap, width):
        """Return the columns of each part: the labels, and as many others as fit."""
        labels = list(range(self.labels))
        of_labels = sum(widths[k] for k in labels) + gap * (self.labels - 1)
        parts, used = [[*labels]], of_labels
        for k in range(self.labels, len(widths)):
            if width is not None and used + gap + widths[k] > width and len(parts[-1]) > self.labels:
                parts.append([*labels])
                used = of_labels
            parts[-1].append(k)
            used += gap + widths[k]
        return parts


class Console:
    """Prints texts and tables on a stream.

    On a terminal, lines are broken between words, and tables continue below where it is too narrow. In a pipe or a file no line
    is broken. Bold and dim lines are for terminals, unless NO_COLOR is set.
    """

    def __init__(self, stream=None):
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._styled = self.is_terminal and not os.environ.get("NO_COLOR")
        self._passing = ""

    @property
    def width(self):
        """The width in characters, or None if lines may have any length."""
        return max(shutil.get_terminal_size().columns, 20) if self._stream.isatty() else None

    def print(self, what="", indent=0):
        """Print a text or a `Table`. indent: in characters, of the lines on which a line of the text continues."""
        self.passing("")
        lines = self._table(what) if isinstance(what, Table) else self._broken(str(what), indent)
        self._stream.write("".join(f"{line}\n" for line in lines))
        self._stream.flush()  # so that what goes to another stream comes after it

    def passing(self, text):
        """Show a line on a terminal until something else is printed or passes; "" takes it away."""
        if self.is_terminal and text != self._passing:
            self._stream.write(f"\r\x1b[K{text[: self.width - 1]}")
            self._stream.flush()
            self._passing = text

    def _broken(self, text, indent):
        for line in text.split("\n"):
            if self.width and len(line) > self.width:
                of_next = " " * min(indent, self.width // 2)
                yield from textwrap.wrap(
                    line, self.width, subsequent_indent=of_next, break_on_hyphens=False, break_long_words=False
                )
            else:
                yield line

    def _table(self, table):
        styles = table.styles or [None] * len(table.lines)
        if table.title:
            yield from (self._painted(line, "bold") for line in self._broken(table.title, 0))
        for n, (head, rule, *lines) in enumerate(table.parts(self.width)):
            yield from ("",) * bool(n)
            yield from (head, rule)
            yield from map(self._painted, lines, styles)
        if table.caption:
            yield from self._broken(table.caption, 0)
        yield ""

    def _painted(self, line, style):
        return f"{STYLES[style]}{line}{END_OF_STYLE}" if style and self._styled else line
