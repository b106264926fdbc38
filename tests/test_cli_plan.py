"""`python -m gpuadam plan`: its tables, JSON, plot and options, and the constants that it measures and reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import libraries
import pytest

from gpuadam import planning
from gpuadam.__main__ import main
from gpuadam.cli.measuring import constants
from gpuadam.kernels.operands import Arrays
from gpuadam.planning import MACHINES

ROOT = Path(__file__).parent.parent


def run(capsys, *arguments):
    try:
        code = main(["plan", *arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    return code, said.out, said.err


SCHEMA = {
    "way": str,
    "sharded": bool,
    "state": str,
    "updated_on": str,
    "made_by": (str, type(None)),
    "model_parallel": int,
    "fits": bool,
    "bytes": dict,
    "device_bytes": int,
    "host_bytes_of_node": int,
    "file_bytes_of_node": int,
    "short": dict,
    "stages": dict,
    "seconds": float,
}


def test_json_has_all_of_a_plan(capsys):
    code, out, _ = run(
        capsys, "--parameters", "7B", "--param-dtype", "bfloat16", "--master", "remainder", "--world", "8", "--json", "-"
    )
    found = json.loads(out)
    assert code == 0 and found["parameters"] == 7 * 10**9 and found["arrays"]["remainder"] is True
    assert len(found["ways"]) == 10 and found["best"] in {row["way"] for row in found["ways"]}
    for row in found["ways"]:
        assert dict.fromkeys(SCHEMA, True) == {key: isinstance(value, SCHEMA[key]) for key, value in row.items()}
        assert row["device_bytes"] == sum(row["bytes"].values())
    assert found["machine"]["device bandwidth"] == {"value": 3350e9, "source": "data sheet"}
    assert all(set(figure) == {"value", "source"} for name, figure in found["machine"].items() if name != "name")


def test_the_tables_name_every_way_and_the_best(capsys):
    code, out, _ = run(capsys, "--shapes", "768x3072,768", "--world", "2")
    assert code == 0 and "2,360,064 parameters on 2 x H100 SXM 80 GB" in out
    for way in planning.ways(MACHINES["h100"], 2):
        assert out.count(f"\n{way.name} ") == 2
    assert "best: " in out and "data sheet: " in out and "assumed: " in out and "_" not in out


def test_what_does_not_fit_ends_with_1_and_says_what_would(capsys):
    code, out, _ = run(capsys, "--parameters", "10T", "--world", "100000", "--param-dtype", "bfloat16")
    assert code == 1 and "nothing fits. With --model-parallel" in out
    code, out, _ = run(capsys, "--parameters", "10T", "--world", "8")
    assert code == 1 and "in however many pieces" in out


def test_rates_that_are_given_take_the_place_of_data_sheets(capsys):
    given_ = ("--bandwidth", "1000", "--memory", "50", "--per-node", "4", "--reserve", "0")
    _, out, _ = run(capsys, "--parameters", "1e9", *given_, "--json", "-")
    found = json.loads(out)
    assert (
        found["machine"]["memory"] == {"value": 50 * 10**9, "source": "given"} and found["machine"]["per_node"]["value"] == 4
    )
    assert found["ways"][0]["seconds"] == pytest.approx(0.028 + 10e-6)


def test_shapes_come_from_a_json_file(capsys, tmp_path):
    file = tmp_path / "shapes.json"
    file.write_text('{"w": [768, 3072], "b": [768], "scale": []}')
    _, out, _ = run(capsys, "--shapes-file", str(file), "--json", "-")
    assert json.loads(out)["parameters"] == 768 * 3072 + 768 + 1


CONSTANTS = {
    "cpu": {
        "name": "a CPU",
        "bandwidth": 28e9,
        "launch": 0.0,
        "memory": 10**11,
        "cache": 0,
        "rates": [{"arrays": Arrays()._asdict(), "elements_per_second": 1e8}],
    }
}


def test_measured_constants_bind_a_cpu_by_elements(capsys, tmp_path):
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"constants": CONSTANTS}))
    _, out, _ = run(capsys, "--parameters", "1e9", "--gpu", "cpu", "--constants", str(file), "--json", "-")
    found = json.loads(out)
    assert found["ways"][0]["seconds"] == pytest.approx(10.0)  # by bytes it would be 1
    assert found["machine"]["device bandwidth"]["source"] == "measured, a CPU"
    _, out, _ = run(capsys, "--parameters", "1e9", "--constants", str(file), "--json", "-")
    by_host = next(row for row in json.loads(out)["ways"] if (row["state"], row["updated_on"]) == ("host", "host"))
    assert by_host["stages"]["update"] == pytest.approx(10.0)


def test_constants_are_read_from_bench(capsys, tmp_path):
    common = {"backend": "numba-cpu", "dtype": "float32", "device": "a CPU", "cores": 2, "date": "2026-01-01"}
    kernel, limit = common | {"contender": "gpuadam kernel + launch"}, common | {"contender": "limit"}
    rows = [
        kernel | {"elements": 1000, "p50_us": 5.0},
        kernel | {"elements": 10**5, "p50_us": 50.0},
        limit | {"elements": 1000, "p50_us": 4.0, "gb_per_s": 7.0},
        limit | {"elements": 10**5, "p50_us": 40.0, "gb_per_s": 70.0},
    ]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"rows": rows}))
    options = ("--gpu", "cpu", "--constants", str(file), "--memory", "100", "--json", "-")
    _, out, _ = run(capsys, "--parameters", "1e9", *options)
    assert json.loads(out)["ways"][0]["seconds"] == pytest.approx(0.5 + 5e-6)  # 2e9 elements a second; by bytes 0.4


def test_this_machine_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "LARGE", 100_000)
    monkeypatch.setattr(constants, "IN_CACHE", 1000)
    monkeypatch.setattr(constants, "DISK_BYTES", 1 << 23)
    measured = ("--gpu", "cpu", "--measure", "--seconds", "0.01", "--folder", str(tmp_path), "--json", "-")
    code, out, _ = run(capsys, "--parameters", "1e6", *measured)
    found = json.loads(out)
    cpu, disk = found["constants"]["cpu"], found["constants"]["disk"]
    assert code == 0 and found["machine"]["device bandwidth"]["value"] == cpu["bandwidth"] > 0
    assert [rate["arrays"] for rate in cpu["rates"]] == [Arrays()._asdict()] and cpu["rates"][0]["elements_per_second"] > 0
    assert found["machine"]["disk_read"]["value"] == disk["read"] > 0 and disk["write"] > 0
    assert not list(tmp_path.iterdir())  # what was written is gone
    file = tmp_path / "again.json"
    file.write_text(out)
    _, again, _ = run(capsys, "--parameters", "1e6", "--gpu", "cpu", "--constants", str(file), "--json", "-")
    assert [row["seconds"] for row in json.loads(again)["ways"][:1]] == [row["seconds"] for row in found["ways"][:1]]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "is required"),
        (("--parameters", "many"), "not a number such as"),
        (("--parameters", "0.5"), "not a whole number"),
        (("--parameters", "nan"), "not a whole number"),
        (("--parameters", "1e30"), "not a whole number from 1 to 1e18"),
        (("--parameters", "1e9", "--shapes", "3"), "not allowed with"),
        (("--shapes", "3x"), "not a number such as"),
        (("--parameters", "1e9", "--gpu", "h1000"), "invalid choice"),
        (("--parameters", "1e9", "--bandwidth", "0"), "'0' is not a number from 1e-09 to 1e+15"),
        (("--shapes-file", "/nowhere.json"), "cannot be read as JSON"),
        (("--parameters", "1e9", "--world", "0"), "'0' is not a whole number from 1 to 10,000,000"),
        (("--parameters", "1e9", "--world", "1e9"), "'1e9' is not a whole number from 1 to 10,000,000"),
        (("--parameters", "1e9", "--reserve", "nan"), "'nan' is not a number from 0 to 1e+15"),
        (("--parameters", "1e9", "--memory", "inf"), "not a number from 1e-09 to 1e+15"),
        (("--parameters", "1e9", "--budget", "1e300"), "not a number from 1e-09 to 1e+15"),
        (("--parameters", "1e9", "--bandwidth", "1e-320"), "not a number from 1e-09 to 1e+15"),
        (("--parameters", "1e9", "--measure", "--folder", "/nowhere"), "there is no folder '/nowhere'"),
        (("--parameters", "1e9", "--json", ""), "'' is not the name of a file"),
        (("--parameters", "1e9", "--plot", "/"), "'/' is not the name of a file"),
    ],
)
def test_wrong_arguments_are_explained(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and said in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--gpu", "cpu"), "--measure measures this machine's"),
        (("--world", "8", "--model-parallel", "3"), "--model-parallel 3 must divide --world 8: give 1, 2, 4 or 8"),
        (("--param-dtype", "float64", "--state", "8bit"), "--state 8bit does not go with --param-dtype float64"),
        (("--stochastic-rounding",), "not of --param-dtype float32: leave it out"),
        (("--reserve", "90"), "less than the 80,000,000,000 of a device"),
        (("--master", "remainder"), "--master remainder goes with bfloat16 parameters, not with float32"),
        (("--constants", "/nowhere.json"), "cannot be read as JSON"),
        (("--budget", "1e-6"), "must be an integer of at least 32,768"),
    ],
)
def test_what_makes_no_sense_ends_with_2(capsys, arguments, said):
    code, out, err = run(capsys, "--parameters", "1e9", *arguments)
    assert code == 2 and out == "" and err.startswith("gpuadam plan: ") and said in err


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "has neither"),
        ('{"rows": []}', "no float32 rows of the limit kernel"),
        ('{"constants": {"cpu": {"bandwidth": -1}}}', "must be a number above 0"),
        ('{"constants": {"cpu": {"bandwidth": 1}}}', "the launch of its cpu is None"),
        ('{"constants": {"cpu": {"bandwidth": 1, "rates": [{}]}}}', "must be a list of formats"),
        ("{", "cannot be read as JSON"),
        ('{"constants": {"cpu": {"bandwidth": NaN}}}', "cannot be read as JSON: NaN is no number"),
        pytest.param("[" * 100_000, "cannot be read as JSON: maximum recursion depth", id="nested too deep"),
        ('{"constants": {"cpu": {"bandwidth": 1e999}}}', "must be a number above 0"),
        ('{"constants": {"cpu": []}}', "its cpu is []"),
        ('{"constants": {"disk": {"read": 1}, "cpu": CPU}}', "the write of its disk is None"),
        ('{"constants": {"gpu": CPU, "cpu": {}}}', "the bandwidth of its cpu is None"),
        ('{"rows": [{"backend": "numba-cpu"}]}', "has neither constants"),
    ],
)
def test_a_file_without_constants_is_refused(capsys, tmp_path, content, said):
    file = tmp_path / "constants.json"
    file.write_text(content.replace("CPU", json.dumps(CONSTANTS["cpu"])))
    code, _, err = run(capsys, "--parameters", "1e9", "--constants", str(file))
    assert code == 2 and said in err


@pytest.mark.parametrize(
    "key, value", [("launch", "1"), ("launch", -1.0), ("memory", 0), ("memory", 1.5), ("cache", None), ("name", 3)]
)
def test_a_constant_that_is_none_is_named(capsys, tmp_path, key, value):
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"constants": {"cpu": CONSTANTS["cpu"] | {key: value}}}))
    code, _, err = run(capsys, "--parameters", "1e9", "--constants", str(file))
    assert code == 2 and f"the {key} of its cpu is {value!r}" in err


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[" * 100_000, id="nested too deep"),
        '{"w": [NaN]}',
        '{"w": [0]}',
        '{"w": 3}',
        '{"w": [1.5]}',
        '{"w": [true]}',
        "[]",
        "{}",
    ],
)
def test_a_file_without_shapes_is_refused(capsys, tmp_path, content):
    file = tmp_path / "shapes.json"
    file.write_text(content)
    code, _, err = run(capsys, "--shapes-file", str(file))
    assert code == 2 and str(file) in err


def test_the_plot_is_made(capsys, tmp_path):
    libraries.imported("matplotlib")
    file = tmp_path / "plan"  # the name is the caller's, whatever its end
    code, out, _ = run(capsys, "--parameters", "7B", "--param-dtype", "bfloat16", "--plot", str(file))
    assert code == 0 and f"plot: {file}" in out.replace("\n", "")
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 50_000


def test_a_plan_imports_no_library_of_arrays_and_compiles_nothing():
    code = (
        "import sys, gpuadam.__main__ as m\n"
        "code = m.main(['plan', '--parameters', '7B', '--json', '-'])\n"
        "found = {'cupy', 'torch', 'jax', 'numba', 'safetensors', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 7 * 10**9
