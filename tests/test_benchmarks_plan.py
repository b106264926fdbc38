"""The benchmark that compares plans with measurements, at tiny sizes: what it writes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import libraries
import pytest

from gpuadam import backends, transports
from gpuadam.cli.measuring import measure
from gpuadam.kernels.operands import Arrays

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plan")


def test_what_the_benchmark_measures_over_ranks_it_compares_with_a_plan(benchmark, monkeypatch):
    arrays = {"arrays": Arrays()._asdict(), "elements_per_second": 1e12}
    found = {
        "latency": 0.0,
        "bandwidth": 1e9,
        "processor": {"bandwidth": 2.8e10, "launch": 0.0, "rates": [arrays], "cache": 0},
    }
    monkeypatch.setattr(benchmark.jobs, "run", lambda *a, **o: found)
    monkeypatch.setattr(benchmark.sharded, "timed_job", lambda *a: {"seconds": [0.1] * 5})
    options = SimpleNamespace(forms=[benchmark.TWO_RANKS], sizes=["8e6"], seconds=1.0)
    notes = []
    rows = [row for (row,) in benchmark.over_ranks(backends.BACKENDS["numba-cpu"], options, notes)]
    assert [row["elements"] for row in rows] == [8_000_000, 16_000_000] and "two ranks" in notes[0]
    seconds = 2 * 0.5 * 32e6 / 1e9 + 14 * 8e6 / 2.8e10  # both collectives, and half of 28 bytes an element
    assert rows[0]["predicted_us"] == pytest.approx(1e6 * seconds, rel=2e-3)
    assert rows[0]["error_percent"] == pytest.approx(100 * (seconds / 0.1 - 1), rel=1e-2)


@pytest.mark.exhaustive
def test_the_benchmark_measures_steps_in_files_and_what_a_plan_says_of_them(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "FILE", 800_000)
    options = SimpleNamespace(forms=[benchmark.IN_FILES], sizes=["1e4"], seconds=0.01)
    notes = []
    rows = [row for (row,) in benchmark.in_files(backends.BACKENDS["numba-cpu"], options, notes)]
    assert [row["elements"] for row in rows] == [10_000, 20_000] and "files in the cache" in notes[0]
    assert all(row["samples"] >= 5 for row in rows)


def test_the_benchmark_collects_as_a_step_does(benchmark, monkeypatch):
    transport = transports.Local()
    calls = []
    monkeypatch.setattr(
        transport, "all_gather", lambda buffer: calls.append(buffer.size) or transports.Work(), raising=False
    )
    assert benchmark._collectives(transport, 20_000_000)() == 3  # buckets of 2**23 elements
    assert calls == [1 << 23, 1 << 23, 20_000_768 - (1 << 24)]


@pytest.mark.exhaustive
def test_the_benchmark_measures_what_it_predicts(benchmark, tmp_path):
    libraries.imported("matplotlib")
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--backend", "numba-cpu", "--seconds", "0.01"]
    command += ["--sizes", "2000", "--forms", "float32,AMSGrad", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = benchmark.report.read_csv(tmp_path / "plan.csv", {*measure.NUMBERS, "predicted_us", "error_percent"})
    assert [row["dtype"] for row in rows] == ["float32", "AMSGrad"] and (tmp_path / "plan.png").exists()
    for row in rows:
        assert row["bound"] in ("bytes", "elements") and row["predicted_us"] > 0
        assert row["error_percent"] == pytest.approx(100 * (row["predicted_us"] / row["p20_us"] - 1), rel=1e-2, abs=0.01)
