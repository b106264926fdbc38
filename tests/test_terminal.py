"""What the commands and the examples share: types of options, and how far a long loop is."""

import argparse
import io

import pytest

from gpuadam.terminal import arguments, output


def counted(terminal):
    console = output.need("examples", "rich.console")[0].Console(file=io.StringIO(), force_terminal=terminal, width=60)
    asked: list[int] = []
    turns = list(output.counted(console, 100, lambda n: asked.append(n) or f"turn {n}", every=25))
    assert turns == list(range(1, 101))
    return asked, console.file.getvalue()


def test_in_a_pipe_a_long_loop_prints_some_plain_lines():
    assert counted(terminal=False) == ([25, 50, 75, 100], "turn 25\nturn 50\nturn 75\nturn 100\n")


def test_on_a_terminal_a_long_loop_has_a_bar():
    asked, shown = counted(terminal=True)
    assert asked == [25, 50, 75, 100] and "turn 100" in shown and "100%" in shown


@pytest.mark.parametrize(
    "text, said",
    [
        ("many", "not a number such as"),
        ("0.5", "not a whole number from 1"),
        ("nan", "not a whole number"),
        ("1e30", "not a whole number from 1 to 1e18"),
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
