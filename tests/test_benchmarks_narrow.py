"""The benchmarks of narrow formats, of the mixed-precision step and of training quality, at tiny sizes: what they write."""

import argparse
import json
import sys
from pathlib import Path

import libraries
import numpy as np
import pytest
from test_benchmarks import run

from gpuadam import backends, testing
from gpuadam.cli.measuring import forms, measure
from gpuadam.kernels import adam, limit
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.operands import Arrays, operands_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import amp_step
import conversion
import narrow
import quality
import report

CPU = backends.BACKENDS["numba-cpu"]
QUICK = ("--backend", "numba-cpu", "--seconds", "0")
FORMS = ("bfloat16 state", "8-bit state", "all bfloat16")


def rows_of(script, folder, *arguments):
    """Run a script and return its rows, which its CSV and its JSON have alike; it draws its plot."""
    name = script.__name__
    one_thread = {"OMP_NUM_THREADS": "1"}  # of torch, whose threads spin while they wait
    printed = json.loads(run(name, *QUICK, *arguments, "--out", str(folder), "--json", "-", **one_thread).stdout)
    rows = report.read_csv(folder / f"{name}.csv", report.NUMBERS)
    assert rows == printed["rows"]
    for row in rows:
        assert list(row) == [*measure.COLUMNS, *report.FURTHER]
        assert row["benchmark"] == name and row["backend"] == "numba-cpu" and row["samples"] >= 11
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_element"] * row["elements"] / row["p50_us"] / 1e3, rel=1e-4)
    identities = [tuple(row[key] for key in measure.COLUMNS[:8]) for row in rows]
    assert len(set(identities)) == len(identities)
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return rows


@pytest.fixture(scope="module")
def narrow_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    return rows_of(narrow, folder, "--sizes", "1000", "--forms", ",".join(FORMS)), folder


@pytest.mark.exhaustive
def test_each_form_is_measured_beside_float32_and_its_limit(narrow_rows):
    rows, _ = narrow_rows
    by_name = {(row["dtype"], row["contender"]): row for row in rows}
    contenders = (narrow.KERNEL, measure.LIMIT, narrow.CALL)
    assert set(by_name) == {(form, c) for form in ("float32", *FORMS) for c in contenders}
    for (form, contender), row in by_name.items():
        base, of_limit = by_name["float32", contender], by_name[form, measure.LIMIT]
        assert row["x_float32"] == pytest.approx(row["p50_us"] / base["p50_us"], rel=1e-4)
        assert row["x_float32_bytes"] == pytest.approx(row["bytes_per_element"] / 28, rel=1e-4)
        assert row["x_limit"] == pytest.approx(row["p50_us"] / of_limit["p50_us"], rel=1e-4)


def test_the_bytes_of_every_form_are_known():
    assert {name: forms.bytes_moved(case) for name, case in forms.FORMS.items()} == {
        "float32": 28,
        "float64": 56,
        "bfloat16 state": 20,
        "8-bit state": 16.5,
        "bfloat16 param and grad": 22,
        "all bfloat16": 14,
        "float16 param and grad": 22,
        "bfloat16 param and grad + 16 bits": 26,
        "float32 + bfloat16 copy and grad": 28,
        "AMSGrad": 36,
        "EMA": 36,
        "NAdam": 28,
        "RAdam": 28,
        "AdaMax": 28,
        "optax's formula": 28,
        "where": 29,
        "lr_scale": 32,
        "change": 24,
        "clip_value and bounds": 28,
        "eps-hat": 28,
        "joint complex64": 48,
        "components=3": 68,
        "bounds of arrays": 36,
    }


def test_the_bytes_of_every_form_are_those_of_the_arrays_that_it_is_measured_on():
    n = 64
    for name, case in forms.FORMS.items():
        arrays = forms.new_arrays(numba_cpu, case, n)
        once = {"grad", "param_copy", "where", "lr_scale", "change", "low", "high"}  # are read or written, all others both
        not_read = {"param"} if case.arrays.change else set()  # there is no decay
        moved = sum(a.nbytes * (1 if operand in once else 2) for operand, a in arrays.items() if operand not in not_read)
        assert moved == n * forms.bytes_moved(case), name


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_call_does_the_same_step_as_the_kernel_of_its_form(form, monkeypatch):
    launched = []

    def build(rule, form, loop):
        return lambda table, first, last, *others: launched.append((rule, form)) if last else None

    monkeypatch.setattr(numba_cpu, "build", build)
    case = forms.FORMS[form]
    arrays = forms.new_arrays(numba_cpu, case, 64)
    forms.caller(numba_cpu, case, arrays)()
    forms.launcher(numba_cpu, case, arrays.values(), adam)()
    assert launched == 2 * [(adam, forms.form_and_scalars(case)[0])]


@pytest.mark.parametrize("form", ["float32", *FORMS])
def test_the_numbers_stay_ordinary_and_the_limit_changes_none(form):
    case = forms.FORMS[form]
    arrays, of_limit = (forms.new_arrays(numba_cpu, case, 100) for _ in range(2))
    before = {name: array.copy() for name, array in of_limit.items()}
    step, by_limit = (forms.launcher(numba_cpu, case, a.values(), rule) for a, rule in ((arrays, adam), (of_limit, limit)))
    for _ in range(100):
        step()
        by_limit()
    formats = {operand.name: operand.format for operand in operands_of(case.arrays)}
    for name, array in arrays.items():
        assert (of_limit[name] == before[name]).all()
        if formats[name] != "uint8":
            values = (array.astype("uint32") << 16).view("float32") if formats[name] == "bfloat16" else array
            assert np.isfinite(values).all() and (abs(values) > 1e-6).all() and (abs(values) < 1e6).all(), name


@pytest.mark.exhaustive
def test_rows_with_further_columns_are_merged_and_summed_up(narrow_rows, tmp_path, capsys):
    rows, folder = narrow_rows
    of_large = measure.row("large", "gpuadam.Adam.step", "numba-cpu", 10, state="in turn", seconds=[1e-3])
    report.write_csv(tmp_path / "large.csv", [of_large])
    report.merge(tmp_path / "results.csv", str(tmp_path / "large.csv"), str(folder / "narrow.csv"))
    merged = report.read_csv(tmp_path / "results.csv", report.NUMBERS)
    assert merged == [of_large | dict.fromkeys(report.FURTHER), *rows]
    report.summary(tmp_path / "results.csv")
    assert capsys.readouterr().out.count("8-bit state") == 1


@pytest.mark.exhaustive
def test_a_backend_that_was_measured_in_fewer_forms_is_drawn_beside_the_other(narrow_rows, tmp_path):
    rows, _ = narrow_rows
    fewer = [row | {"backend": "cupy"} for row in rows if row["dtype"] in ("float32", "8-bit state")]
    narrow.draw(rows + fewer, tmp_path / "narrow.png")
    assert (tmp_path / "narrow.png").read_bytes()[:4] == b"\x89PNG"


def test_a_form_that_there_is_not_is_named():
    assert (
        "there is no form '4-bit state' (did you mean '8-bit state'?), only all or float32,"
        in run("narrow", *QUICK, "--forms", "4-bit state", code=2).stderr
    )


@pytest.mark.gpu
def test_on_a_gpu_every_contender_is_measured_by_its_clock(backend):
    options = argparse.Namespace(sizes=["100"], seconds=0, forms=["8-bit state"])
    notes = []
    (rows,) = narrow.measure_rows(backends.BACKENDS[backend], options, notes)
    contenders = (narrow.KERNEL, measure.LIMIT, narrow.CALL)
    assert [(row["dtype"], row["contender"]) for row in rows] == [
        (f, c) for f in ("float32", "8-bit state") for c in contenders
    ]
    assert all(row["clock"] == "device" and row["p50_us"] > 0 for row in rows) and not notes


DONE = {
    narrow.KERNEL: lambda kernels, case, arrays: forms.launcher(kernels, case, arrays.values(), adam),
    measure.LIMIT: lambda kernels, case, arrays: forms.launcher(kernels, case, arrays.values(), limit),
    narrow.CALL: forms.caller,
}


@pytest.mark.gpu
@pytest.mark.parametrize("contender", DONE)
def test_a_contender_does_on_a_gpu_what_it_does_on_the_cpu(backend, contender):
    case, written = forms.FORMS["8-bit state"], []
    for kernels in (backends.load(backend), numba_cpu):
        written.append(forms.new_arrays(kernels, case, 100))
        step = DONE[contender](kernels, case, written[-1])
        for _ in range(2):
            step()
    testing.assert_same_bits(*written)


@pytest.mark.usefixtures("torch")
def test_the_mixed_precision_step_is_measured_beside_torchs(tmp_path):
    rows = rows_of(amp_step, tmp_path, "--sizes", "1000,3x100")
    assert [(row["elements"], row["arrays"]) for row in rows] == 4 * [(1000, 1)] + 4 * [(300, 3)]
    by_name = {(row["arrays"], row["contender"]): row for row in rows}
    for (arrays, contender), row in by_name.items():
        base = amp_step.THEIRS + amp_step.COPIES * contender.endswith(amp_step.COPIES)
        assert row["x_torch_fused"] == pytest.approx(row["p50_us"] / by_name[arrays, base]["p50_us"], rel=1e-4)
        assert row["bytes_per_element"] == amp_step.BYTES[contender]


def test_the_mixed_precision_step_is_measured_without_torch_too():
    options = argparse.Namespace(sizes=["100"], seconds=0, peers=["none"])
    (rows,) = amp_step.measure_rows(CPU, options, [])
    assert [row["contender"] for row in rows] == [amp_step.OURS, amp_step.OURS + amp_step.COPIES]
    assert all(row["x_torch_fused"] is None for row in rows)


def test_the_bytes_of_the_mixed_precision_step_are_those_of_its_kernels():
    assert list(amp_step.BYTES.values()) == [36, 38, 52, 58]
    for contender, copy in ((amp_step.OURS, ""), (amp_step.OURS + amp_step.COPIES, "bfloat16")):
        moved = sum(o.itemsize * (o.loads + o.stores) for o in operands_of(Arrays(param_copy=copy), zero_grad=True))
        assert amp_step.BYTES[contender] == amp_step.NORM + moved


def test_gpuadam_and_torch_do_the_same_mixed_precision_step(one_torch_thread):
    shapes = [(30, 7), (5,), (), (128, 3)]
    found = {}
    for name, build in amp_step.BUILD.items():
        contender = build(CPU, shapes)
        for _ in range(5):
            contender.prepare()
            contender.step()
        found[name] = [p if isinstance(p, np.ndarray) else p.detach().numpy() for p in contender.params]
    (before, _), ours = amp_step._host_arrays(shapes), found[amp_step.OURS]
    for name, params in found.items():
        for a, b, c in zip(params, ours, before, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)  # roundings of 5 steps in another order
            assert (a != c).all()


@pytest.mark.usefixtures("torch")
def test_quality_has_a_row_for_each_optimizer_and_its_percentages(tmp_path):
    libraries.imported("sklearn")
    printed = run("quality", "--tasks", "digits", "--seeds", "2", "--steps", "3", "--out", str(tmp_path)).stdout
    rows = report.read_csv(tmp_path / "quality.csv", quality.NUMBERS)
    assert [row["contender"] for row in rows] == list(quality.CANDIDATES)
    for row in rows:
        losses = [float(loss) for loss in row["losses"].split()]
        assert len(losses) == row["seeds"] == 2 and row["steps"] == 3 and row["elements"] == 9610
        assert row["mean_loss"] == pytest.approx(np.mean(losses), abs=2e-6)
        assert row["sd_loss"] == pytest.approx(np.std(losses, ddof=1), abs=2e-6)
        assert row["percent_of_float32"] == pytest.approx(100 * row["mean_loss"] / rows[0]["mean_loss"], abs=2e-3)
        assert row["contender"] in printed and row["cpu"] and row["torch"]
    assert rows[0]["percent_of_float32"] == 100


@pytest.mark.usefixtures("torch")
def test_conversion_has_a_row_for_each_and_loses_nothing_on_the_way_back(tmp_path):
    libraries.imported("sklearn")
    run("conversion", "--seeds", "1", "--steps", "4", "--out", str(tmp_path))
    rows = report.read_csv(tmp_path / "conversion.csv", conversion.NUMBERS)
    assert [row["contender"] for row in rows] == list(conversion.CONVERSIONS)
    for row in rows:
        lost = [row[name] for name in conversion.ERRORS]
        assert all(0.01 < x < 10 for x in lost) if row["contender"].startswith("float32 to") else not any(lost)
        assert float(row["losses"]) == pytest.approx(row["mean_loss"], abs=2e-6) and row["elements"] == 9610


def test_the_text_task_learns(one_torch_thread):
    module, batches, _ = quality.text(seed=0, steps=10)
    training = quality.Training(module, quality.CANDIDATES["bfloat16 params, stochastic, and state"], seed=0)
    losses = []
    for loss_of_batch in batches:
        loss = loss_of_batch()
        losses.append(float(loss.detach()))
        training.step(loss)
    assert sum(p.numel() for p in module.parameters()) == 248_448
    assert losses[0] == pytest.approx(np.log(96), rel=0.1) and losses[-1] < losses[0] - 0.5
