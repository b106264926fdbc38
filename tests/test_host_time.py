"""The host's time of a step on a GPU, measured over a driver that answers in no time."""

import sys
from pathlib import Path

import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam import testing

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import report

from gpuadam.cli.measuring import measure

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.gpu
def test_answers_of_no_time_run_no_kernel_and_the_stand_in_answers_again_after_them(backend, driver):
    from stand_in import instant

    library = testing.array_backend(backend)
    param, grad = library.array(np.ones(5, "float32")), library.array(np.ones(5, "float32"))
    opt = gpuadam.Adam([param])
    for _ in range(4):
        opt.step([grad])
    before = library.numpy(param).copy()
    driver.listen()
    with instant.answers(driver):
        opt.step([grad])
        gpuadam.adam_step(param, grad, opt.state_dict()["state"]["0"]["m"], opt.state_dict()["state"]["0"]["v"], 5)
    assert not driver.launches
    assert (library.numpy(param) == before).all()
    opt.step([grad])
    assert (library.numpy(param) != before).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_the_script_measures_both_steps_beside_bare_launches(name, tmp_path):
    libraries.imported("cupy" if name == "cupy" else "numba_cuda")
    from test_benchmarks import run

    run("host_time", "--backend", name, "--seconds", "0", "--sizes", "1,2", "--out", str(tmp_path), GPUADAM_GPU="host")
    rows = report.read_csv(tmp_path / "host_time.csv", measure.NUMBERS)
    names = [row["contender"] for row in rows if row["arrays"] == 1]
    assert [row["arrays"] for row in rows] == [n for n in (1, 2) for _ in names]
    steps = [f"gpuadam.Adam.step{what}" for what in ("", ", max_norm", ", mixed precision")]
    assert names[:-1] == ["gpuadam.adam_step", *steps, "gpuadam.global_norm"]
    assert names[-1].startswith("bare ")
