"""Without a library a test skips; where the environment requires the library, the test fails."""

import re
import sys
from pathlib import Path

import libraries
import pytest

IN_A_TEST = 'import libraries\ndef test_it(): libraries.imported("no_such.module", reason="it is not installed")'
IN_A_FILE = 'import libraries\nlibraries.imported("no_such", reason="it is not installed")\ndef test_it(): pass'
ASKED_BY_PYTEST_ITSELF = {"gpu_code", "gpuadam", "xdist", "pytest_subtests", "tomllib"}


def outcome(pytester, monkeypatch, text, required):
    monkeypatch.setenv(libraries.VARIABLE, required)
    pytester.makepyfile(text)
    return pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:gpuadam", "-rs")


@pytest.mark.parametrize("required", ["", "another", "no_such_other"])
@pytest.mark.parametrize("text", [IN_A_TEST, IN_A_FILE], ids=["in a test", "in a file"])
def test_a_library_that_is_not_there_is_a_skip(pytester, monkeypatch, text, required):
    result = outcome(pytester, monkeypatch, text, required)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*it is not installed*"])


@pytest.mark.parametrize(
    "text, counts", [(IN_A_TEST, {"failed": 1}), (IN_A_FILE, {"errors": 1})], ids=["in a test", "in a file"]
)
def test_where_it_is_required_that_is_a_failure(pytester, monkeypatch, text, counts):
    result = outcome(pytester, monkeypatch, text, "another no_such")
    result.assert_outcomes(**counts)
    result.stdout.fnmatch_lines(["*GPUADAM_REQUIRE_LIBRARIES has no_such, but it is not installed*"])


def test_a_library_that_is_there_and_broken_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("raise ImportError('a file of it is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="a file of it is missing"):
        libraries.imported("broken_library", reason="it is not installed")


def test_a_library_that_is_there_is_returned(monkeypatch):
    monkeypatch.setenv(libraries.VARIABLE, "pytest")
    assert libraries.imported("pytest") is pytest


def test_no_file_skips_for_want_of_a_library_by_itself():
    found = set()
    for path in set(Path(__file__).parent.glob("*.py")) - {Path(libraries.__file__)}:
        asked = re.findall(r"\bpytest\.importorskip\(\"(\w+)", path.read_text(encoding="utf-8"))
        found |= {f"{path.name}: {name}" for name in {*asked} - ASKED_BY_PYTEST_ITSELF - sys.stdlib_module_names}
    assert found == set()


MARKED = """
import json
import libraries
import pytest

@pytest.fixture
def optax():
    return libraries.imported("optax")

@pytest.fixture
def schedule(optax): pass

class OfTorch:
    def __init__(self): libraries.imported("torch")

def made(): return OfTorch()
def of(library): return libraries.imported(library)

def test_by_itself(): libraries.imported("jax.numpy")
def test_by_a_fixture(schedule): pass
def test_by_functions(): made()
@pytest.mark.parametrize("library", ["thinc", "json"])
def test_by_a_value(library): of(library)

@pytest.mark.parametrize("name", ["optax"])
def test_of_that_name(name): pass
def test_of_another(): libraries.imported("json")
"""
MARKING = """
import libraries

def pytest_configure(config): config.addinivalue_line("markers", "beside")
def pytest_collection_modifyitems(items): libraries.mark(items)
"""


def test_the_tests_that_ask_for_a_library_can_be_selected(pytester):
    pytester.makeconftest(MARKING)
    pytester.makepyfile(MARKED)
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-m", "beside", "--collect-only", "-q")
    found = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    assert found == ["test_by_itself", "test_by_a_fixture", "test_by_functions", "test_by_a_value[thinc]"]


def test_a_file_that_is_about_a_library_is_selected_as_a_whole(pytester):
    pytester.makeconftest(MARKING)
    pytester.makepyfile(test_file="import sys, types; thinc = types.ModuleType('thinc')\ndef test_it(): pass")
    pytester.runpytest_inprocess("-p", "no:xdist", "-m", "beside").assert_outcomes(passed=1)
