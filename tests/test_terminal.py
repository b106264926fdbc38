"""What the commands and the examples share: types of options, texts and tables on terminals and in pipes, pictures."""

import argparse
import io
import re
from pathlib import Path

import libraries
import pytest

from gpuadam.terminal import arguments, figures, output
from gpuadam.terminal.console import Console, Table


class Stream(io.StringIO):
    """A terminal, or a pipe."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture(autouse=True)
def of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def counted(terminal):
    stream = Stream(terminal)
    asked: list[int] = []
    turns = list(output.counted(Console(stream), 100, lambda n: asked.append(n) or f"turn {n}", every=25))
    assert turns == list(range(1, 101))
    return asked, stream.getvalue()


def test_in_a_pipe_a_long_loop_prints_some_plain_lines():
    assert counted(terminal=False) == ([25, 50, 75, 100], "turn 25\nturn 50\nturn 75\nturn 100\n")


def test_on_a_terminal_a_long_loop_shows_how_far_it_is():
    asked, shown = counted(terminal=True)
    assert asked == [25, 50, 75, 100] and "turn 100\n" in shown and "100%" in shown
    assert [line.split("\r\x1b[K")[-1] for line in shown.split("\n")] == ["turn 25", "turn 50", "turn 75", "turn 100", ""]


HEADS = ("way", "size", *(f"column {k}" for k in range(12)))
TABLE = Table(
    "a title", HEADS, [[f"{way}, updated", "20,000,000", *["1.75 GB"] * 12] for way in ("host", "device")], labels=2
)


def printed(what, terminal=True):
    stream = Stream(terminal)
    Console(stream).print(what)
    return stream.getvalue()


@pytest.mark.parametrize("columns", [20, 40, 80, 120, 200])
def test_a_table_keeps_every_column_and_every_figure_however_narrow_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(TABLE).splitlines()
    assert max(map(len, lines[1:])) <= max(columns, 38)  # the labels and one figure
    for head in HEADS:
        assert sum(f"{head} " in f"{line} " for line in lines) >= 1
    assert sum(line.count("1.75 GB") for line in lines) == 2 * 12
    assert all("20,000,000" in line for line in lines if "1.75 GB" in line)


def test_in_a_pipe_lines_are_whole_and_without_codes():
    in_pipe = printed(TABLE._replace(styles=["bold", "dim"]), terminal=False)
    assert len(in_pipe.splitlines()) == 1 + 4 + 1 and "\x1b" not in in_pipe


@pytest.mark.parametrize("variable, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_codes_gets_none(monkeypatch, variable, value):
    styled = TABLE._replace(styles=["bold", "dim"])
    assert printed(styled).count("\x1b") == 2 * (1 + 2 * 3)  # the title and two lines of three parts
    monkeypatch.setenv(variable, value)
    assert "\x1b" not in printed(styled)


def test_words_are_not_broken():
    text = "bounds of arrays, cudaErrorInsufficientDriver, float32-and-no-other " * 3
    lines = printed(text).splitlines()
    assert max(map(len, lines)) <= 80 and " ".join(lines).split() == text.split()


@pytest.mark.parametrize("ends, kind", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("", b"\x89PNG")])
def test_a_picture_is_of_the_kind_that_its_name_says(tmp_path, ends, kind):
    libraries.imported("matplotlib")
    path = arguments.picture(str(tmp_path / f"plot.{ends}".rstrip(".")))
    figure, _ = figures.panels(1, 1, width=2, height=2)
    figures.save(figure, path)
    assert Path(path).read_bytes().startswith(kind)


@pytest.mark.parametrize("name", ["plot.jpg", "plot.gif", "plot.v2"])
def test_a_picture_of_another_kind_is_refused(name):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape("must end in .png, .pdf, .svg")):
        arguments.picture(name)


@pytest.mark.parametrize(
    "text, said",
    [
        ("many", "not a number such as"),
        ("0.5", "not a whole number from 1"),
        ("nan", "not a whole number"),
        ("1e30", "not a whole number from 1 to 1e18"),
        ("1e1000000", "not a number such as"),
    ],
)
def test_what_is_no_whole_number_is_refused(text, said):
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        arguments.whole(text)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", "11"])
def test_what_is_no_number_in_the_range_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a number from 0 to 10"):
        arguments.number(0, 10)(text)
    assert arguments.number(0, 10)("10") == 10


def test_sizes_that_are_given_twice_are_measured_once():
    assert arguments.wholes("1e3,2000,1000,1K") == (1000, 2000)


def test_units_may_be_small_letters():
    assert arguments.whole("7b") == arguments.whole("7B") == 7 * 10**9 and arguments.whole("3m") == 3 * 10**6
