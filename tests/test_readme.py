"""The Python of README.md and of the guide runs, and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "gpuadam/guide").glob("*.py"))]


def blocks():
    """Yield each fenced block of Python, marked with what it needs."""
    for page in PAGES:
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)):
            marks = [pytest.mark.gpu] if "import cupy" in block else []
            yield pytest.param(block, marks=marks, id=f"{page.name}-{number}")


@pytest.mark.parametrize("block", list(blocks()))
def test_a_block_runs_and_prints_what_its_comments_say(block):
    if "import torch" in block:
        pytest.importorskip("torch")
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "a block", "exec"), names)
    if "cupy" in names:
        names["cupy"].cuda.Device().synchronize()  # before its arrays go
    said = re.findall(r"^print\(.*?\)\s+# (.*)$", block, re.M)
    assert printed.getvalue().splitlines() == said


def test_readme_and_guide_have_python():
    pages = {param.id.rpartition("-")[0] for param in blocks()}
    assert pages == {"README.md", "pytorch.py", "whole_step.py"}


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
