"""The commands, as a user runs them: in a pipe, with files, with what is missing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import in_process
import libraries
import numpy as np
import pytest
from cases import few

import gpuadam
from gpuadam.__main__ import main
from gpuadam.cli import bench, contract, doctor, installed
from gpuadam.cli.measuring import facts, forms, measure
from gpuadam.kernels import adam, limit
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.operands import operands_of
from gpuadam.terminal import output
from gpuadam.terminal.arguments import names as type_of_names
from gpuadam.terminal.arguments import writable

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


def test_a_gpu_whose_driver_does_not_answer_has_an_unknown_version(monkeypatch):
    monkeypatch.setattr(facts.backends, "load", lambda name: SimpleNamespace(device_name=lambda: "a GPU"))
    monkeypatch.setattr(facts.shutil, "which", lambda name: name)
    monkeypatch.setattr(facts.subprocess, "run", Mock(side_effect=subprocess.TimeoutExpired("nvidia-smi", 30)))
    assert facts._gpu("cupy") == ("a GPU", "unknown: nvidia-smi did not answer")


@pytest.mark.exhaustive
def test_demo_solves_the_textbook_problem_and_reads_digits(tmp_path):
    libraries.imported("sklearn")
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


@pytest.fixture(scope="module")
def doctors(tmp_path_factory):
    """What doctor says in a process of its own, then which optional packages were imported there; and its report."""
    path = tmp_path_factory.mktemp("doctor") / "doctor.json"
    code = (
        "import gpuadam.__main__ as m, sys\n"
        "status = m.main(['doctor', '--json', sys.argv[1]])\n"
        "print([n for n in ('torch', 'safetensors', 'rich', 'mpi4py', 'pytest', 'pytest_gpuadam') if n in sys.modules])\n"
        "sys.exit(status)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


def test_doctor_works_and_says_so(doctors):
    said, report = doctors
    assert "numba-cpu" in report["works"]
    assert report["versions"]["numpy"] == np.__version__
    found = report["backends"]["numba-cpu"]
    assert (
        found["steps"] == dict.fromkeys(contract.CONTRACTS, "as the contract says")
        and found["bits"] == found["steps"]["float32"]
    )
    for name in contract.CONTRACTS:
        assert f"bits of a step, {name}: as the contract says" in said
    assert report["parts"]["checkpoints"]["works"] is True
    assert "state that was saved and loaded has the same bits" in said


def test_doctor_imports_no_optional_package(doctors):
    said, _ = doctors
    assert said.endswith("numba-cpu\n[]\n"), said


def test_doctor_fails_where_nothing_works(monkeypatch):
    nothing = dict.fromkeys(doctor.backends.BACKENDS, doctor.backends.Status(False, "none", "get one"))
    monkeypatch.setattr(doctor.backends, "backend_status", lambda: nothing)
    assert "Works: nothing" in in_process.command("doctor", code=1).stdout


@pytest.mark.parametrize("name", contract.CONTRACTS)
def test_doctor_notices_wrong_bits(monkeypatch, name):
    known = contract.CONTRACTS
    monkeypatch.setattr(contract, "CONTRACTS", known | {name: known[name]._replace(bits="something else")})
    found = doctor._examine("numba-cpu")
    assert not found["works"] and found["reason"] == f"a step ran and gave wrong bits ({name})" and found["fix"]
    assert {label for label, bits in found["steps"].items() if bits == "as the contract says"} == set(known) - {name}
    assert found["steps"][name] == f"differ: {known[name].bits}"


def test_doctor_goes_on_after_a_step_that_fails(monkeypatch):
    digest_on = contract.digest_on

    def of_others(name, known):
        if known.arrays.grouped:
            raise RuntimeError("no registers left")
        return digest_on(name, known)

    monkeypatch.setattr(contract, "digest_on", of_others)
    found = doctor._examine("numba-cpu")
    assert not found["works"] and found["reason"] == "a step failed (8-bit state): RuntimeError: no registers left"
    assert found["steps"] == dict.fromkeys(contract.CONTRACTS, doctor.AS_THE_CONTRACT) | {"8-bit state": "failed"}


def test_doctor_notices_steps_of_an_optimizer_that_fail(monkeypatch):
    def broken(name):
        raise RuntimeError("the driver reports CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr(doctor, "_launches", broken)
    found = doctor._examine("numba-cpu")
    assert found["reason"] == "steps of an optimizer failed: RuntimeError: the driver reports CUDA_ERROR_UNKNOWN"
    assert not found["works"] and found["fix"] and found["launches"] is None


def test_doctor_names_the_libraries_of_cuda_and_those_that_are_not_found(monkeypatch):
    """NumPy's library is in the place of those of CUDA: it has no such version."""
    path = np._core._multiarray_umath.__file__

    def load(library):
        if library == "nvJitLink":
            raise RuntimeError("Failure finding libnvJitLink.so.13\nin many folders")
        return SimpleNamespace(abs_path=path)

    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", SimpleNamespace(load_nvidia_dynamic_lib=load))
    found = doctor._cuda_libraries()
    assert found["nvvm"] == os.path.realpath(path)
    assert found["nvrtc"].startswith("not found: ") and "nvrtcVersion" in found["nvrtc"]
    assert found["nvJitLink"] == "not found: Failure finding libnvJitLink.so.13"
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    assert doctor._cuda_libraries() == {}


@pytest.mark.parametrize("name", contract.CONTRACTS)
def test_doctors_arrays_hold_every_kind_of_number(name):
    known = contract.CONTRACTS[name]
    for operand, array in zip(operands_of(known.arrays), contract.arrays_of(known), strict=True):
        if known.arrays.grouped and operand.name not in ("param", "grad"):
            assert not array.any()
            continue
        values = (array.astype("u4") << 16).view("f4") if operand.format == "bfloat16" else array
        tiny = np.finfo("f4").smallest_normal
        assert np.isnan(values).any() and np.isinf(values).any() and (values == 0).any()
        assert ((values != 0) & (np.abs(values) < tiny)).any()
        assert np.signbit(values).any() != (operand.name in ("v", "max_v"))


def test_every_nan_is_one_in_a_digest_and_every_other_bit_counts():
    for known in contract.CONTRACTS.values():
        arrays = contract.arrays_of(known)
        before = contract.digest_of(known, arrays)
        for operand, array in zip(operands_of(known.arrays), arrays, strict=True):
            bits = array.reshape(-1).view(f"u{array.itemsize}")
            bits[-1] ^= 1
            assert contract.digest_of(known, arrays) != before
            bits[-1] ^= 1
            if operand.name == "param":
                assert np.isnan((bits[3:4].astype("u4") << 16 if bits.itemsize == 2 else bits[3:4]).view("f4"))
                bits[3] |= 1
                assert contract.digest_of(known, arrays) == before


def test_doctor_says_that_checkpoints_cannot_be_saved_and_why(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installed.tempfile, "TemporaryDirectory", full)
    found = installed.parts()["checkpoints"]
    assert found["works"] is False and "No space left" in found["reason"] and "TMPDIR" in found["fix"]


def test_doctor_notices_state_that_comes_back_otherwise(monkeypatch):
    load = gpuadam.load

    def one_bit_off(*arguments, **options):
        opt = load(*arguments, **options)
        opt.state["w"]["max_v"].view("u4")[7] ^= 1
        return opt

    monkeypatch.setattr(gpuadam, "load", one_bit_off)
    assert installed.parts()["checkpoints"]["works"] is False


@pytest.mark.parametrize(
    "version, works",
    [(None, None), ("2.3.1", False), ("1.13.1+cu117", False), ("2.4.0a0+git1", True), ("2.13.0+cpu", True), ("3.0", True)],
)
def test_doctor_knows_which_torch_is_new_enough(monkeypatch, version, works):
    monkeypatch.setattr(facts, "versions_of", lambda packages: dict.fromkeys(packages, version))
    found = installed.parts()["gpuadam.torch"]
    assert found["works"] is works and str(version or "not installed") in found["reason"]
    assert works or found["fix"] == 'pip install "gpuadam[torch]"'


def test_doctor_names_what_an_extra_lacks(monkeypatch):
    monkeypatch.setattr(facts, "versions_of", lambda packages: {p: None if p == "matplotlib" else "1" for p in packages})
    found = installed.parts()["bench"]
    assert found == {"works": None, "reason": "matplotlib not installed", "fix": 'pip install "gpuadam[bench]"'}


def test_doctor_takes_mpi4py_without_the_package_of_an_mpi(monkeypatch):
    monkeypatch.setattr(facts, "versions_of", lambda packages: {p: None if p == "mpich" else "4.1" for p in packages})
    assert installed.parts()["mpi"] == installed.part(True, "mpi4py 4.1, without the package mpich")
    monkeypatch.setattr(facts, "versions_of", lambda packages: dict.fromkeys(packages))
    assert installed.parts()["mpi"]["fix"] == 'pip install "gpuadam[mpi]"'


def test_doctor_names_the_cache_of_cupy_where_cupy_is_installed_only(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "CuPy" not in doctor._caches()


def test_doctor_finds_the_pytest_plugin_where_it_is_registered(monkeypatch):
    metadata = installed.importlib.metadata
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    assert installed.parts()["pytest plugin"]["works"] is None
    registered = metadata.EntryPoint("pytest_gpuadam", "pytest_gpuadam", "pytest11")
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: [registered] if registered.matches(**wanted) else [])
    assert installed.parts()["pytest plugin"]["works"] is True


def test_the_extras_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for extra, packages in installed.EXTRAS.items():
        named = [
            r
            for needed in declared[extra.removeprefix("gpuadam.")]
            for r in (declared["demo"] if needed == "gpuadam[demo]" else [needed])
        ]
        assert sorted(re.match(r"[\w-]+", requirement)[0] for requirement in named) == sorted(packages)
    assert declared["torch"] == [f"torch>={'.'.join(map(str, installed.OLDEST['torch']))}"]
    assert project["entry-points"]["pytest11"] == {"pytest_gpuadam": "pytest_gpuadam"}


def test_bench_measures_and_draws(tmp_path):
    plot, result = tmp_path / "bench.png", tmp_path / "bench.json"
    assert not main(["bench", "--sizes", "1000,1e4", "--seconds", "0.05", "--plot", str(plot), "--json", str(result)])
    rows = [r for r in json.loads(result.read_text())["rows"] if r["backend"] == "numba-cpu"]
    by_case = {(r["dtype"], r["elements"], r["contender"]): r for r in rows}
    contenders = ("gpuadam kernel + launch", "limit", "gpuadam.adam_step")
    assert list(by_case) == [(t, n, c) for t in ("float32", "float64") for n in (1000, 10000) for c in contenders]
    for (dtype, n, contender), r in by_case.items():
        assert r["p05_us"] <= r["p20_us"] <= r["p50_us"] <= r["p80_us"] <= r["p95_us"]
        assert r["device"] and r["date"] and r["python"] and r["numba"]
        if contender != "gpuadam.adam_step":
            assert r["bytes_per_element"] == 7 * np.dtype(dtype).itemsize
            assert r["gb_per_s"] == pytest.approx(r["bytes_per_element"] * n / r["p50_us"] / 1e3, rel=1e-4)
            assert r["x_limit"] == pytest.approx(r["p50_us"] / by_case[dtype, n, "limit"]["p50_us"], rel=1e-4)
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.exhaustive
def test_bench_measures_forms_by_their_names_in_one_table_and_draws_bars(tmp_path):
    plot, result = tmp_path / "bench.png", tmp_path / "bench.json"
    names = ["8-bit state", "all bfloat16", "optax's formula"]
    arguments = ("--backend", "numba-cpu", "--forms", ",".join(names), "--sizes", "1000", "--seconds", "0.01")
    printed = run("bench", *arguments, "--plot", str(plot), "--json", str(result)).stdout
    rows = json.loads(result.read_text())["rows"]
    assert [r["dtype"] for r in rows if r["contender"] == "limit"] == names
    lines = [re.split(r"  +", line.strip()) for line in printed.splitlines() if line.strip().startswith(tuple(names))]
    assert [line[:3] for line in lines] == [[name, "1,000", n] for name, n in zip(names, ("16.5", "14", "28"), strict=True)]
    assert printed.startswith("numba-cpu")
    for r in rows:
        if r["contender"] != "gpuadam.adam_step":
            assert r["gb_per_s"] == pytest.approx(r["bytes_per_element"] * 1000 / r["p50_us"] / 1e3, rel=1e-4)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_forms_are_chosen_by_name_once_each_or_all():
    chosen = type_of_names(forms.FORMS, "form")
    assert chosen("8-bit state, float32,8-bit state") == ["8-bit state", "float32"]
    assert chosen("all") == list(forms.FORMS)


@pytest.mark.gpu
def test_bench_measures_and_draws_on_a_gpu(backend, tmp_path, capsys):
    plot, result = tmp_path / "bench.png", tmp_path / "bench.json"
    sizes = "--sizes", "1000,1e4", "--seconds", "0.01"
    assert not main(["bench", "--backend", backend, *sizes, "--plot", str(plot), "--json", str(result)])
    rows = json.loads(result.read_text())["rows"]
    assert {row["backend"] for row in rows} == {backend} and all(row["huge_percent"] is None for row in rows)
    assert plot.read_bytes()[:4] == b"\x89PNG" and "% of limit" in capsys.readouterr().out


def test_json_on_standard_output_is_json_alone(capsys):
    assert not main(["bench", "--sizes", "1000", "--dtypes", "float32", "--seconds", "0.01", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["rows"]


def test_the_benchmarks_data_stay_finite_under_both_kernels():
    arrays = forms.new_arrays(numba_cpu, forms.FORMS["float32"], 1000)
    step, move = (forms.launcher(numba_cpu, forms.FORMS["float32"], arrays.values(), rule) for rule in (adam, limit))
    for _ in range(20_000):
        step()
    before = {name: a.copy() for name, a in arrays.items()}
    move()
    assert all((a == before[name]).all() for name, a in arrays.items())
    assert (arrays["v"] >= np.finfo("f4").smallest_normal).all() and all(np.isfinite(a).all() for a in arrays.values())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "required"),
        (("doctor", "x"), "gpuadam doctor: error: unrecognized arguments: x"),
        (("demo", "--foo"), "gpuadam demo: error: unrecognized arguments: --foo"),
        (("train",), "invalid choice"),
        (("bench", "--sizes", "many"), "not a number such as"),
        (("bench", "--sizes", "1e5,0"), "'0' is not a whole number from 1"),
        (("bench", "--sizes", "1e5,"), "argument --sizes: '1e5,' has an empty item beside a comma: give numbers such as"),
        (("bench", "--dtypes", "int8"), "there is no form 'int8', only all or float32, float64"),
        (
            ("bench", "--dtypes", "float16"),
            "there is no form 'float16' (did you mean 'float16 param and grad'?), only all or",
        ),
        (("bench", "--forms", "8bit"), "there is no form '8bit' (did you mean '8-bit state'?)"),
        (("bench", "--forms", "flaot32"), "there is no form 'flaot32' (did you mean 'float32'?)"),
        (("bench", "--forms", "float32,"), "'float32,' has an empty item beside a comma: give names such as"),
        (("demo", "--backend", "gpu"), "invalid choice"),
    ],
)
def test_wrong_arguments_are_explained(arguments, said):
    assert said in in_process.command(*arguments, code=2).stderr


def test_a_backend_that_is_not_there_is_explained():
    if "cupy" in gpuadam.available_backends():
        pytest.skip("CuPy works here")
    error = in_process.command("demo", "--backend", "cupy", code=2).stderr
    assert "backend 'cupy' is not available" in error and f"Available: {', '.join(gpuadam.available_backends())}" in error
    assert "Traceback" not in error


def without(module, folder):
    """Return the PYTHONPATH with which a module cannot be imported."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(f"raise ModuleNotFoundError('no {module}', name='{module}')")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_a_missing_extra_is_explained(tmp_path):
    error = run("demo", code=2, PYTHONPATH=without("sklearn", tmp_path)).stderr
    assert error == 'gpuadam demo: scikit-learn is not installed: pip install "gpuadam[demo]"\n'


@pytest.mark.parametrize("command, extra", [("bench", "bench"), ("demo", "demo"), ("plan --parameters 1e9", "bench")])
def test_a_plot_without_matplotlib_is_refused_before_any_work(command, extra, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--plot", str(tmp_path / "x.png")])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err == f'gpuadam {command.split()[0]}: matplotlib is not installed: pip install "gpuadam[{extra}]"\n'


@pytest.mark.parametrize("module", ["scikit-learn", "scikit-image", "numba-cuda"])
def test_a_missing_package_has_the_name_that_pip_knows(monkeypatch, module):
    name = {"scikit-learn": "sklearn", "scikit-image": "skimage", "numba-cuda": "numba_cuda"}[module]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(output.CommandError, match=re.escape(f'{module} is not installed: pip install "gpuadam[test]"')):
        output.need("test", name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, which is always full")
@pytest.mark.parametrize(
    "command",
    few(["doctor", "plan --parameters 1e9", "bench --sizes 1000 --seconds 0.01 --json -"], "plan --parameters 1e9"),
)
def test_a_full_disk_ends_a_command_with_one_line(command):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpuadam", *command.split()],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    name = command.split()[0]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith(f"gpuadam {name}: the output cannot be written: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, which is always full")
@pytest.mark.parametrize("command", few(["bench --sizes 1000 --dtypes float32 --seconds 0.01", "doctor"], "doctor"))
def test_what_was_found_is_printed_though_its_file_cannot_be_written(command):
    name, *options = command.split()
    done = run(name, *options, "--json", "/dev/full", code=1)
    assert done.stderr == f"gpuadam {name}: /dev/full cannot be written: No space left on device\n"
    assert {"bench": "% of limit", "doctor": "Works: "}[name] in done.stdout


@pytest.mark.exhaustive
def test_no_command_needs_rich(tmp_path):
    path = without("rich", tmp_path)
    assert "best: " in run("plan", "--parameters", "1e9", PYTHONPATH=path).stdout
    assert "GB/s" in run("bench", "--sizes", "1000", "--seconds", "0.01", PYTHONPATH=path).stdout


@pytest.mark.parametrize("command", ["gpuadam plan --parameters 1e9", "gpuadam doctor", "gpuadam.examples"])
def test_a_reader_who_has_gone_ends_a_command_without_a_traceback(command):
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read()
    assert process.wait(timeout=60) == 141 and said == ""


def test_an_interrupt_ends_a_command_without_a_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 130


def test_measurements_that_other_work_disturbed_are_flagged():
    def row(n, *microseconds):
        return measure.row("bench", measure.KERNEL, "numba-cpu", n, seconds=[1e-6 * x for x in microseconds])

    calm, busy = row(1000, 10, 10, 10, 11, 12), row(2000, 10, 10, 20, 40, 40)
    assert measure.on_busy_machine([calm, row(1000)]) == ""
    said = measure.on_busy_machine([calm, busy])
    assert said.startswith(
        "BUSY (*): in 1 of 2 measurements p80 is 1.5 times p20 or more, at worst 4.00 times (gpuadam kernel"
    )


def test_a_star_stands_at_the_figure_that_was_disturbed():
    def rows(kernel, limit):
        of_all = {"gpuadam kernel + launch": kernel, "limit: a loop": limit}
        found = [
            measure.row("bench", name, "numba-cpu", 1, seconds=[1e-6 * x for x in own], moved=28)
            for name, own in of_all.items()
        ]
        call = measure.row("bench", measure.CALL, "numba-cpu", 1, seconds=[1e-6])
        return [row | {"bytes_per_element": 28, "huge_percent": None} for row in (*measure.add_ratios(found), call)]

    calm, busy = (10, 10, 10, 11, 12), (10, 10, 20, 40, 40)
    (of_kernel,), (of_limit,) = (bench.table("numba-cpu", rows(*both)).lines for both in ((busy, calm), (calm, busy)))
    assert [text.endswith("*") for text in of_kernel[5:8]] == [True, False, False]
    assert [text.endswith("*") for text in of_limit[5:8]] == [False, False, True]


@pytest.mark.parametrize("option", ["--plot", "--json"])
@pytest.mark.parametrize("command", ["demo", "bench", "plan"])
def test_a_folder_that_is_not_there_is_named_before_any_work(command, option, capsys):
    with pytest.raises(SystemExit):
        main([command, option, "no/such/x.png"])
    assert "there is no folder 'no/such': make it first" in capsys.readouterr().err


WRITERS = [(command, option) for command in ("demo", "bench", "plan --parameters 1e9") for option in ("--plot", "--json")]


@pytest.mark.parametrize(
    "file", ["x" * 300, "x" * 300 + "/y", "loop", "far", "locked/x", "read-only", "/sys/x"], ids=lambda file: file[-9:]
)
@pytest.mark.parametrize("command, option", [*WRITERS, ("doctor", "--json")])
def test_a_file_that_cannot_be_written_is_named_before_any_work(command, option, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("far").symlink_to("/no/such/file")
    Path("locked").mkdir(0o500)
    Path("read-only").touch(0o400)
    if os.access("locked", os.W_OK) and file in ("locked/x", "read-only"):
        pytest.skip("this user may write everywhere")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), option, file])
    assert ended.value.code == 2 and f"'{file}' cannot be written: " in capsys.readouterr().err


def test_looking_whether_a_file_can_be_written_changes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").write_text("as it was")
    Path("link").symlink_to("new")
    os.mkfifo("pipe")
    for file in ("old", "new", "link", "pipe", "-", "/dev/null"):
        assert writable(file) == file
    assert sorted(map(str, Path().iterdir())) == ["link", "old", "pipe"] and Path("old").read_text() == "as it was"


@pytest.mark.parametrize("sizes", ["1e12", "1000,1e18"])
def test_sizes_that_memory_has_no_room_for_are_refused_before_any_work(sizes):
    error = in_process.command("bench", "--backend", "numba-cpu", "--sizes", sizes, code=2).stderr
    expected = "float32 of 1,[0,]+ elements needs 24.* [TP]B of memory, and .* free for numba-cpu: give smaller --sizes"
    assert re.fullmatch(f"gpuadam bench: {expected}\n", error), error


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--seconds", seconds])
    assert "is not a number from 0" in capsys.readouterr().err
