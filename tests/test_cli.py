"""The commands, as a user runs them: in a pipe, with files, with what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpuadam
from gpuadam.cli import bench, doctor, measure
from gpuadam.kernels import adam, limit, numba_cpu

ROOT = Path(__file__).parent.parent


def run(*arguments, code=0, **env):
    done = subprocess.run(
        [sys.executable, "-m", "gpuadam", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_demo_solves_the_textbook_problem_and_reads_digits(tmp_path):
    pytest.importorskip("sklearn")
    plot, result = tmp_path / "demo.png", tmp_path / "demo.json"
    done = run("demo", "--backend", "numba-cpu", "--plot", str(plot), "--json", str(result))
    found = json.loads(result.read_text())
    first = {row["parameter"]: row for row in found["textbook"]["first_steps"][:2]}
    assert first["w"]["g"] == -33 and first["b"]["g"] == -9
    assert first["w"]["value"] == pytest.approx(0.6, abs=1e-7) and first["b"]["value"] == pytest.approx(0.1, abs=1e-7)
    assert first["w"]["m_hat"] == pytest.approx(-33) and first["w"]["v_hat"] == pytest.approx(1089)
    assert found["textbook"]["w"] == pytest.approx(2, abs=1e-5) and found["textbook"]["b"] == pytest.approx(0, abs=1e-5)
    digits = found["digits"]
    assert digits["test_accuracy"] >= 0.97 and digits["reference_test_accuracy"] >= 0.97
    assert 0 < digits["largest_difference_from_float64"] < 1e-2
    assert digits["test_images"] == 360 and digits["train_images"] == 1437
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "\x1b" not in done.stdout and "\r" not in done.stdout  # plain lines in a pipe
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("epoch")] == ["10", "20", "30", "40"]


def test_doctor_works_and_says_so(tmp_path):
    done = run("doctor", "--json", str(tmp_path / "doctor.json"))
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert "numba-cpu" in report["works"]
    assert report["versions"]["numpy"] == np.__version__
    assert "bits of a 1,024-element step: as the contract says" in done.stdout


def test_doctor_fails_where_nothing_works():
    code = (
        "import gpuadam.__main__ as m, gpuadam.cli.doctor as d, sys\n"
        "d.backends.backend_status = lambda: {n: d.backends.Status(False, 'none', 'get one') for n in d.backends.BACKENDS}\n"
        "sys.exit(m.main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "Works: nothing" in done.stdout


def test_doctor_notices_wrong_bits(monkeypatch):
    monkeypatch.setattr(doctor, "CONTRACT_BITS", "something else")
    found = doctor._examine("numba-cpu")
    assert not found["works"] and "wrong bits" in found["reason"]


def test_doctors_arrays_hold_every_kind_of_number():
    for array in doctor.contract_arrays():
        tiny = np.finfo("f4").smallest_normal
        assert np.isnan(array).any() and np.isinf(array).any() and (array == 0).any()
        assert ((array != 0) & (np.abs(array) < tiny)).any()
    _, _, _, v, max_v = doctor.contract_arrays()
    assert not (np.signbit(v).any() or np.signbit(max_v).any())


def test_bench_measures_and_draws(tmp_path):
    plot, result = tmp_path / "bench.png", tmp_path / "bench.json"
    run("bench", "--sizes", "1000,1e4", "--seconds", "0.05", "--plot", str(plot), "--json", str(result))
    rows = [r for r in json.loads(result.read_text())["rows"] if r["backend"] == "numba-cpu"]
    by_case = {(r["dtype"], r["elements"], r["contender"]): r for r in rows}
    contenders = ("gpuadam kernel + launch", "limit", "gpuadam.adam_step")
    assert list(by_case) == [(t, n, c) for t in ("float32", "float64") for n in (1000, 10000) for c in contenders]
    for (dtype, n, contender), r in by_case.items():
        assert r["p05_us"] <= r["p20_us"] <= r["p50_us"] <= r["p80_us"] <= r["p95_us"]
        assert r["device"] and r["date"] and r["python"] and r["numba"]
        if contender != "gpuadam.adam_step":
            assert r["gb_per_s"] == pytest.approx(7 * np.dtype(dtype).itemsize * n / r["p50_us"] / 1e3, rel=1e-4)
            assert r["x_limit"] == pytest.approx(r["p50_us"] / by_case[dtype, n, "limit"]["p50_us"], rel=1e-4)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_json_on_standard_output_is_json_alone():
    done = run("bench", "--sizes", "1000", "--dtypes", "float32", "--seconds", "0.01", "--json", "-")
    assert json.loads(done.stdout)["rows"]


def test_the_benchmarks_data_stay_finite_under_both_kernels():
    arrays = list(bench.data(1000, "float32"))
    step, move = (measure.launcher(numba_cpu, arrays, rule) for rule in (adam, limit))
    for _ in range(20_000):
        step()
    before = [a.copy() for a in arrays]
    move()
    assert all((a == b).all() for a, b in zip(arrays, before, strict=True))
    assert (arrays[3] >= np.finfo("f4").smallest_normal).all() and all(np.isfinite(a).all() for a in arrays)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "required"),
        (("train",), "invalid choice"),
        (("bench", "--sizes", "many"), "not a list of numbers"),
        (("bench", "--sizes", "0"), "at least 1"),
        (("bench", "--dtypes", "float16"), "choose from"),
        (("demo", "--backend", "gpu"), "invalid choice"),
    ],
)
def test_wrong_arguments_are_explained(arguments, said):
    assert said in run(*arguments, code=2).stderr


def test_a_backend_that_is_not_there_is_explained():
    if "cupy" in gpuadam.available_backends():
        pytest.skip("CuPy works here")
    error = run("demo", "--backend", "cupy", code=2).stderr
    assert "backend 'cupy' is not available" in error and f"Available: {', '.join(gpuadam.available_backends())}" in error
    assert "Traceback" not in error


def test_a_missing_extra_is_explained(tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ModuleNotFoundError('no rich', name='rich')")
    error = run("demo", code=2, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])).stderr
    assert error == 'gpuadam demo: rich is not installed: pip install "gpuadam[demo]"\n'
