"""The pytest plugin, as a project that has installed gpuadam meets it. `.ci/run` runs this under old versions of pytest too."""

import os
import re
from pathlib import Path

import pytest
from cases import few

from gpuadam import testing

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "gpuadam" / "testing" / "pytest_plugin"
SAMPLE = re.search(r"```python\n(.*?)```", testing.__doc__, re.S)[1]


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with the sample as its tests, in an environment where no GPU library works."""
    for package in ("cupy", "numba_cuda"):
        folder = pytester.path / "broken" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"raise ImportError('no {package} here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (pytester.path / "broken", ROOT, PLUGIN))))
    monkeypatch.delenv("GPUADAM_REQUIRE_GPU", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(test_training=SAMPLE)
    return pytester


SMALL = "def test(gpuadam_backend): assert gpuadam_backend.name == 'numba-cpu' and not gpuadam_backend.on_gpu"


def run(project, *options):
    return project.runpytest_subprocess("-p", "pytest_gpuadam", *options, timeout=120)


def line_of(result):
    """Return the line at the end of a run."""
    (line,) = [line for line in result.outlines if line.startswith("gpuadam:") and " for want of " in line]
    return line


def test_without_a_gpu_the_sample_runs_on_the_cpu_and_says_what_it_skipped(project):
    result = run(project, "-rs")
    result.assert_outcomes(passed=5, skipped=12)
    assert line_of(result) == (
        "gpuadam: 5 ran on numba-cpu; 6 skipped for want of cupy (it cannot be loaded: ImportError: no cupy here); "
        "6 skipped for want of numba-cuda (it cannot be loaded: ImportError: no numba_cuda here)"
    )
    result.stdout.fnmatch_lines(
        ["SKIPPED*cupy: it cannot be loaded: ImportError: no cupy here. To mend it: reinstall it: pip *"]
    )


@pytest.mark.exhaustive
def test_where_a_gpu_is_required_a_skip_is_a_failure(project, monkeypatch):
    monkeypatch.setenv("GPUADAM_REQUIRE_GPU", "1")
    project.makepyfile(test_training=SMALL)
    result = run(project)
    result.assert_outcomes(passed=1, errors=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*GPUADAM_REQUIRE_GPU=1, but cupy: it cannot be loaded: *To mend it: *"])
    assert "1 failed for want of cupy" in line_of(result)


@pytest.mark.exhaustive
def test_the_line_is_the_same_under_xdist(project):
    pytest.importorskip("xdist")
    result = run(project, "-n", "2")
    result.assert_outcomes(passed=5, skipped=12)
    assert sorted(line_of(result).removeprefix("gpuadam: ").split("; ")) == [
        "5 ran on numba-cpu",
        "6 skipped for want of cupy (it cannot be loaded: ImportError: no cupy here)",
        "6 skipped for want of numba-cuda (it cannot be loaded: ImportError: no numba_cuda here)",
    ]


def test_backends_are_chosen_and_the_header_says_so(project):
    project.makepyfile(test_training=SMALL)
    result = run(project, "--gpuadam-backends=numba-cpu")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpuadam: on numba-cpu, as --gpuadam-backends says", "gpuadam: 1 ran on numba-cpu"])


@pytest.mark.parametrize("given, required, said", [
    ("cuda", "", "--gpuadam-backends: there is no backend ['cuda'], only cupy, numba-cuda, numba-cpu"),
    ("", "", "--gpuadam-backends: there is no backend [''], only cupy"),
    ("numba-cpu", "1", "GPUADAM_REQUIRE_GPU=1, but --gpuadam-backends=numba-cpu has no GPU backend: add cupy or numba-cuda"),
    ("numba-cpu", "True", "GPUADAM_REQUIRE_GPU=1, but --gpuadam-backends=numba-cpu has no GPU backend"),
    ("numba-cpu", "please", "the environment variable GPUADAM_REQUIRE_GPU='please' must be one of 1, true, yes, on, or of 0,"),
])  # fmt: skip
def test_a_choice_that_cannot_be_is_explained(project, monkeypatch, given, required, said):
    monkeypatch.setenv("GPUADAM_REQUIRE_GPU", required)
    result = run(project, f"--gpuadam-backends={given}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and said in result.stderr.str()


@pytest.mark.parametrize("given", few(["['numba-cpu']", "{'numba-cpu'}", "numba_cpu", "None", ""], ""))
def test_a_marker_that_names_no_backend_is_explained(project, given):
    project.makepyfile(test_training=f"import pytest\nnumba_cpu = 3\n@pytest.mark.gpuadam_backends({given})\n{SMALL}")
    result = run(project)
    result.assert_outcomes(errors=1)
    said = "the marker gpuadam_backends of test_training.py::test: there is no backend *, only cupy, * names"
    result.stdout.fnmatch_lines(
        ["*_ ERROR collecting test_training.py _*", said, "*= short test summary info =*"], consecutive=True
    )


ANYTHING = """
import pytest

@pytest.mark.parametrize("of_another", [([1], 2), ({}, {}), (1, 2, 3), 7, None, "ab", ("gpuadam_backend", 3)])
def test_properties(request, of_another):
    request.node.user_properties.append(of_another)

@pytest.mark.anything([1], {})
@pytest.mark.parametrize("of_another", [[1], {}])
def test_marks(of_another):
    pass
"""


def test_a_run_that_does_not_use_the_plugin_may_have_any_properties_and_marks(project):
    project.makepyfile(test_training=ANYTHING)
    result = run(project)
    result.assert_outcomes(passed=9)
    assert result.ret == 0 and "gpuadam: " not in result.stdout.str()


SUBTESTS = """
def test(gpuadam_backend, subtests):
    for number in range(3):
        with subtests.test(number=number):
            pass
"""


def test_a_test_that_has_subtests_is_counted_once(project):
    if not hasattr(pytest, "Subtests"):
        pytest.importorskip("pytest_subtests")
    project.makepyfile(test_training=SUBTESTS)
    assert line_of(run(project)).startswith("gpuadam: 1 ran on numba-cpu; 1 skipped for want of cupy")


AGAIN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item):
    runtestprotocol(item, nextitem=None)
"""


@pytest.mark.exhaustive
def test_a_test_that_is_run_again_is_counted_once(project):
    project.makeconftest(AGAIN)
    project.makepyfile(test_training=SMALL)
    assert line_of(run(project)).startswith("gpuadam: 1 ran on numba-cpu; 1 skipped for want of cupy")


UNUSED = """
import sys

def test_nothing_was_imported():
    assert "pytest_gpuadam" in sys.modules
    assert not {"gpuadam", "numpy", "numba", "cupy"} & set(sys.modules)
"""


def test_a_run_that_does_not_use_the_plugin_imports_nothing_and_prints_nothing(project, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others may import NumPy
    project.makepyfile(test_training=UNUSED)
    result = run(project)
    result.assert_outcomes(passed=1)
    assert "gpuadam: " not in result.stdout.str()


def entry_points():
    """Return [project.entry-points.pytest11] of pyproject.toml as an installed package has it."""
    table = (ROOT / "pyproject.toml").read_text().partition("[project.entry-points.pytest11]\n")[2].partition("\n\n")[0]
    assert table, "the plugin is not registered"
    return "[pytest11]\n" + table.replace('"', "") + "\n"


@pytest.mark.exhaustive
def test_an_installed_gpuadam_brings_the_plugin_and_p_no_gpuadam_leaves_it_out(project, monkeypatch):
    installed = project.mkdir("gpuadam-0.0.dist-info")
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gpuadam\nVersion: 0.0\n")
    (installed / "entry_points.txt").write_text(entry_points())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (project.path, ROOT, PLUGIN))))
    project.makepyfile(
        test_training="def test(pytestconfig): assert pytestconfig.pluginmanager.has_plugin('pytest_gpuadam')"
    )
    project.runpytest_subprocess().assert_outcomes(passed=1)
    project.makepyfile(test_training=SMALL)
    result = project.runpytest_subprocess("-p", "no:gpuadam")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'gpuadam_backend' not found"])
