"""The Python of README.md and of the guide runs and prints what it says; links and paths lead to files."""

import contextlib
import io
import re
from pathlib import Path

import libraries
import pytest

ROOT = Path(__file__).parent.parent
GUIDE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gpuadam/guide").glob("*.py"))
PACKAGES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "gpuadam").glob("*/__init__.py") if path.parent.name != "guide"
)


def blocks():
    """Yield each fenced block of Python, marked with what it needs."""
    for page in ("README.md", *GUIDE):
        text = (ROOT / page).read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)):
            marks = [pytest.mark.gpu] if "import cupy" in block else []
            yield pytest.param(block, marks=marks, id=f"{page}-{number}")


@pytest.mark.parametrize("block", list(blocks()))
def test_a_block_runs_and_prints_what_its_comments_say(block):
    if "import torch" in block:
        libraries.imported("torch")
    if "import jax" in block:
        libraries.imported("jax")
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "a block", "exec"), names)
    if "cupy" in names:
        names["cupy"].cuda.Device().synchronize()  # before its arrays go
    said = re.findall(r"^print\(.*?\)\s+# (.*)$", block, re.M)
    assert printed.getvalue().splitlines() == said


def test_readme_and_guide_have_python():
    pages = {param.id.rpartition("-")[0] for param in blocks()}
    assert pages == {"README.md", *(f"gpuadam/guide/{name}.py" for name in ("own_kernels", "pytorch", "whole_step"))}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a clone has every file that the pages name")
@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", *GUIDE, *PACKAGES])
def test_links_lead_to_files_and_paths_exist(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    links = [folder / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    paths = [ROOT / path for path in re.findall(r"`((?:kernels|gpuadam|tests|benchmarks|\.pdoc|\.ci)/[\w./-]*)", text)]
    assert [str(path) for path in links + paths if not path.exists()] == []


def test_the_map_of_kernels_has_every_file_and_no_other():
    _, _, the_map = (ROOT / "kernels/__init__.py").read_text(encoding="utf-8").partition("## The files")
    there = {path.name for path in (ROOT / "kernels").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", the_map)) == there


def test_the_readme_is_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
