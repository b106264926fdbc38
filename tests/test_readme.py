"""The README's Python runs, and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)


NEEDS = [[pytest.mark.gpu] if "import cupy" in block else [] for block in BLOCKS]


@pytest.mark.parametrize("block", [pytest.param(block, marks=marks) for block, marks in zip(BLOCKS, NEEDS, strict=True)])
def test_a_block_runs_and_prints_what_its_comments_say(block):
    if "import torch" in block:
        pytest.importorskip("torch")
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(block, str(README), "exec"), names)
    if "cupy" in names:
        names["cupy"].cuda.Device().synchronize()  # before its arrays go
    said = re.findall(r"^print\(.*?\)\s+# (.*)$", block, re.M)
    assert printed.getvalue().splitlines() == said


def test_there_is_python_in_the_readme():
    assert BLOCKS
