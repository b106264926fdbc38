"""What the short run leaves out has something that stands for it, and what is kept of earlier runs is what was made."""

import itertools
import os

import kept
import pytest
import short_run
from cases import ARCHITECTURES, COMPILERS, DTYPES, FORMS, few

NAMES = ("compiler", "arch", "name", "dtype")
PLACES = [dict(zip(NAMES, p, strict=True)) for p in itertools.product(COMPILERS, ARCHITECTURES, FORMS, DTYPES)]


def test_each_value_is_there_and_each_combination_that_is_asked_for():
    found = [PLACES[k] for k in short_run.cover(PLACES, ("compiler", "name"))]
    assert len(found) == len(COMPILERS) * len(FORMS)
    assert {(p["compiler"], p["name"]) for p in found} == set(itertools.product(COMPILERS, FORMS))
    assert {p["arch"] for p in found} == set(ARCHITECTURES) and {p["dtype"] for p in found} == set(DTYPES)


def test_each_value_is_there_once_if_nothing_is_asked_for():
    found = [PLACES[k] for k in short_run.cover(PLACES)]
    assert len(found) == len(FORMS)
    for name, values in zip(NAMES, (COMPILERS, ARCHITECTURES, FORMS, DTYPES), strict=True):
        assert {p[name] for p in found} == set(values)


def test_a_few_of_the_values_will_do_where_that_is_said():
    found = [PLACES[k] for k in short_run.cover(PLACES, ("compiler",), any_of=("name", "arch"))]
    assert {p["compiler"] for p in found} == set(COMPILERS) and len(found) == len(COMPILERS)
    assert {p["dtype"] for p in found} == set(DTYPES) and len({p["arch"] for p in found}) == len(COMPILERS)


def test_a_combination_that_is_missing_loses_no_value():
    places = [p for p in PLACES if p["compiler"] != "cupy" or p["arch"] == "sm_90"]
    found = [places[k] for k in short_run.cover(places)]
    assert {p["compiler"] for p in found} == set(COMPILERS) and {p["name"] for p in found} == set(FORMS)


def test_only_values_that_there_are_stay_in_the_short_run():
    assert [getattr(value, "values", value) for value in few([1, 2, 3], 2)] == [(1,), 2, (3,)]
    with pytest.raises(AssertionError):
        few([1, 2, 3], 4)


TESTS = """
import cases, pytest

@pytest.mark.parametrize("k", cases.few(range(3), 1))
def test_values(k): pass

@pytest.mark.in_short()
@pytest.mark.parametrize("a", "xy")
@pytest.mark.parametrize("b", "xy")
def test_combinations(a, b): pass

def test_examples(examples):
    assert examples(False, True) == cases.exhaustive

@pytest.mark.gpu
@pytest.mark.in_short()
@pytest.mark.parametrize("a", "xy")
@pytest.mark.parametrize("b", "xy")
def test_gpu(a, b): pass

def test_other(): pass
"""
CONFTEST = """
import cases, pytest, short_run

def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true")
    parser.addoption("--part")

def pytest_configure(config):
    cases.exhaustive = config.getoption("--exhaustive")

@pytest.fixture(scope="session")
def examples():
    return cases.examples

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    short_run.select(config, items)
"""


@pytest.mark.parametrize("options, passed", [([], 9), (["--exhaustive"], 13), (["--exhaustive", "-m", "exhaustive"], 5)])
def test_the_two_runs_have_all_between_them(pytester, monkeypatch, options, passed):
    """Nine tests in the short run; four more and the examples in the other."""
    monkeypatch.setattr("cases.exhaustive", False)  # put back afterwards
    pytester.makepyfile(test_it=TESTS)
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers =\n  gpu\n  exhaustive\n  in_short")
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:gpuadam", *options)
    result.assert_outcomes(passed=passed, deselected=13 - passed)


@pytest.mark.parametrize("options, passed", [([], 2), (["--exhaustive"], 6)])
def test_a_test_of_compiled_code_is_by_one_compiler_in_the_short_run(pytester, monkeypatch, options, passed):
    monkeypatch.setattr("cases.exhaustive", False)  # put back afterwards
    pytester.makepyfile(
        test_it="""
import pytest

@pytest.mark.in_short("compiler", "name")
@pytest.mark.parametrize("compiler", ["cupy", "cupy-cuda12", "numba-cuda"])
@pytest.mark.parametrize("name", "xy")
def test_code(compiler, name): pass
"""
    )
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers =\n  gpu\n  exhaustive\n  in_short")
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:gpuadam", *options)
    result.assert_outcomes(passed=passed, deselected=6 - passed)


def test_the_parts_of_a_run_have_each_test_once(pytester, monkeypatch):
    monkeypatch.setattr("cases.exhaustive", False)  # put back afterwards
    pytester.makepyfile(test_it=TESTS)
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers =\n  gpu\n  exhaustive\n  in_short")
    passed = []
    for k in range(3):
        result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:gpuadam", "--exhaustive", "--part", f"{k}/3", "-v")
        passed += [line.split()[0] for line in result.outlines if " PASSED" in line]
    assert len(passed) == len(set(passed)) == 13


# What is kept


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "folder", lambda: tmp_path)
    return tmp_path


def made(kind, key, content):
    return kept.text(kind, key, lambda: content)


def test_what_was_made_is_found_by_its_key(folder):
    assert [made("a", ("x",), "1"), made("a", ("y",), "2"), made("a", ("x",), "3")] == ["1", "2", "1"]
    assert made("b", ("x",), "4") == "4" and kept.get("a", ("z",)) is None
    assert len(list(folder.iterdir())) == 3


def test_parts_of_a_key_are_not_run_together(folder):
    assert [made("a", ("x", "y"), "1"), made("a", ("xy", ""), "2"), made("a", ("x", "y"), "3")] == ["1", "2", "1"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:-1] + b"?", lambda b: b + b"?"])
def test_what_is_damaged_is_made_again(folder, damage):
    kept.put("a", ("x",), b"content")
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert kept.data("a", ("x",), lambda: b"again") == b"again" == kept.get("a", ("x",))


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_what_another_user_could_have_written_is_made_again(folder, tmp_path, monkeypatch):
    kept.put("a", ("x",), b"content")
    (path,) = folder.iterdir()
    path.chmod(0o666)
    assert kept.get("a", ("x",)) is None
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.undo()
    monkeypatch.setenv("GPUADAM_TEST_CACHE", str(tmp_path / "open"))
    assert kept.folder.__wrapped__() is None


def test_a_file_in_the_place_of_another_is_not_taken(folder):
    kept.put("a", ("x",), b"of x")
    (of_x,) = folder.iterdir()
    kept.put("a", ("y",), b"of y")
    (of_y,) = set(folder.iterdir()) - {of_x}
    of_y.write_bytes(of_x.read_bytes())
    assert kept.get("a", ("y",)) is None


def test_without_a_folder_all_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "folder", lambda: None)
    assert [made("a", ("x",), "1"), made("a", ("x",), "2")] == ["1", "2"]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept, "folder", lambda: tmp_path / "file" / "below")
    assert [made("a", ("x",), "1"), made("a", ("x",), "2")] == ["1", "2"]
