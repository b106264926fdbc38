"""The benchmark scripts, as they are run, at tiny sizes: what they write, not how fast anything is."""

import ctypes
import doctest
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import in_process
import libraries
import numba
import numpy as np
import pytest
from cases import few, in_memory

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import forms, measure
from gpuadam.cli.measuring import pages as measured_pages
from gpuadam.kernels import adam, huge_pages
from gpuadam.kernels.cpu_backend import backend as numba_cpu

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import amp_step
import collectives
import in_caches
import jobs
import large
import many
import memory
import narrow
import offload
import pages as of_pages
import peers
import plan
import report
import sharded
import small
import timing
import what_binds

CPU = backends.BACKENDS["numba-cpu"]
FOLDER = Path(__file__).parent.parent / "benchmarks"
# those of them that are not installed are left out, and named
PEERS = ("--peers", "torch fused,torch foreach,plain NumPy")
QUICK = ("--backend", "numba-cpu", "--seconds", "0")
SCRIPTS = {
    "large": (*PEERS, "--sizes", "100,1e3"),
    "small": (*PEERS, "--sizes", "1,1000"),
    "many": (*PEERS, "--sizes", "3x100"),
    "memory": ("--peers", "plain NumPy", "--sizes", "4e6"),
    "first_call": ("--peers", "none"),
    "norms": ("--sizes", "100,1000"),
    "in_caches": ("--sizes", "100,1000", "--forms", "float32,8-bit state"),
}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the resident set's high-water mark is Linux's")


def run(script, *arguments, code=0, **env):
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[ON_LINUX] * (name == "memory") + [pytest.mark.exhaustive] * (name != "small"))
        for name in SCRIPTS
    ],
)
def test_a_script_writes_its_rows_and_a_plot_and_can_draw_them_again(name, tmp_path):
    printed = json.loads(run(name, *QUICK, *SCRIPTS[name], "--out", str(tmp_path), "--json", "-").stdout)
    rows = report.read_csv(tmp_path / f"{name}.csv", measure.NUMBERS)
    assert rows == printed["rows"]
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    for row in rows:
        assert list(row) == list(measure.COLUMNS)
        assert row["benchmark"] == name and row["backend"] == "numba-cpu" and row["samples"] >= 1
        assert all(row[fact] for fact in ("device", "cpu", "cores", "system", "date", "python", "gpuadam", "numpy", "numba"))
        if name != "memory":
            quantiles = [row[f"p{q:02}_us"] for q in measure.QUANTILES]
            assert quantiles == sorted(quantiles) and quantiles[0] > 0
    identities = [tuple(row[key] for key in measure.COLUMNS[:8]) for row in rows]
    assert len(set(identities)) == len(identities)
    (tmp_path / f"{name}.png").unlink()
    run(name, "--rows", str(tmp_path / f"{name}.csv"), "--out", str(tmp_path))
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_ratios_and_throughput_are_of_the_medians_of_one_run():
    options = SimpleNamespace(sizes=["1000"], seconds=0, peers=["none"])
    (found,) = large.measure_rows(CPU, options, [])
    rows = {row["contender"]: row for row in found}
    assert set(rows) == {peer.name for peer in peers.OURS}
    for row in rows.values():
        assert row["gb_per_s"] == pytest.approx(28 * 1000 / row["p50_us"] / 1e3, rel=1e-4)
        assert row["x_limit"] == pytest.approx(row["p50_us"] / rows["limit"]["p50_us"], rel=1e-4)
        assert row["x_torch_fused"] is None


def test_small_arrays_are_measured_in_two_states():
    options = SimpleNamespace(sizes=["10"], seconds=0, peers=["none"])
    rows = [row for of_state in small.measure_rows(CPU, options, []) for row in of_state]
    names = {peer.name for peer in peers.OURS} | {"empty Numba function"}
    assert {(row["contender"], row["state"]) for row in rows} == {(n, s) for n in names for s in ("warm", "in turn")}


@pytest.mark.exhaustive
def test_files_of_rows_are_merged_and_summed_up(tmp_path):
    run("many", *QUICK, "--sizes", "2x10", "--peers", "none", "--out", str(tmp_path), "--json", str(tmp_path / "many.json"))
    results = str(tmp_path / "results.csv")
    run("report", "merge", results, str(tmp_path / "many.csv"), str(tmp_path / "many.json"))
    rows = report.read_csv(results, measure.NUMBERS)
    assert len(rows) == 6 and rows[:3] == rows[3:]
    assert run("report", "summary", results).stdout.count("gpuadam.Adam.step, one flat array") == 2


def test_rows_are_added_and_those_measured_again_take_the_place_of_the_old(tmp_path):
    def row(n, seconds, ranks=None):
        return measure.row("large", "limit", "numba-cpu", n, state="in turn", seconds=[seconds]) | {"ranks": ranks}

    files = []
    for rows in ([row(1, 1e-3), row(2, 2e-3)], [row(2, 3e-3), row(2, 4e-3, ranks=2)]):
        files.append(tmp_path / f"{len(files)}.csv")
        report.write_csv(files[-1], rows)
        run("report", "add", str(tmp_path / "results.csv"), str(files[-1]))
    found = report.read_csv(tmp_path / "results.csv", report.NUMBERS)
    assert [(r["elements"], r["ranks"], r["p50_us"]) for r in found] == [(1, None, 1e3), (2, None, 3e3), (2, 2, 4e3)]


def test_rows_are_added_after_each_table_and_nothing_is_drawn(monkeypatch, tmp_path):
    """As `gpu.sh` has them written: a process that is killed keeps its rows, and needs no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results, found = tmp_path / "results.csv", []
    for sizes in ("100", "100,200"):
        done = in_process.script(FOLDER / "norms.py", *QUICK, "--sizes", sizes, "--add", str(results))
        assert "norms: 100 float32" in done.stdout
        found.append(report.read_csv(results, report.NUMBERS))
    assert {row["elements"] for row in found[0]} == {100} and {row["elements"] for row in found[1]} == {100, 200}
    assert len(found[1]) == 2 * len(found[0]) and list(tmp_path.iterdir()) == [results]


def test_a_table_that_cannot_be_written_leaves_the_rows_before_it(tmp_path):
    report.write_csv(tmp_path / "a.csv", [{"a": 1}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        report.write_csv(tmp_path / "a.csv", [{"a": 2}, {"b": 3}])
    assert report.read_csv(tmp_path / "a.csv", {"a"}) == [{"a": 1}]


def test_the_summary_marks_what_was_disturbed(tmp_path, capsys):
    def row(contender, seconds):
        return measure.row("large", contender, "numba-cpu", 1000, state="in turn", seconds=seconds)

    report.write_csv(tmp_path / "a.csv", [row(report.STEP, [1e-3] * 9), row(report.KERNEL, [1e-3] * 6 + [3e-3] * 5)])
    report.summary(tmp_path / "a.csv")
    *_, quiet, busy, note = capsys.readouterr().out.splitlines()
    assert " 1 ms " in quiet and "*" not in quiet and " 1 ms*" in busy
    assert note.startswith("* p80 is 1.5 times p20 or more")
    report.write_csv(tmp_path / "a.csv", [row(report.STEP, [1e-3] * 9)])
    report.summary(tmp_path / "a.csv")
    assert "*" not in capsys.readouterr().out


def test_what_is_not_there_is_explained():
    if "cupy" not in gpuadam.available_backends():
        error = run("large", "--backend", "cupy", code=2).stderr
        assert error.startswith("large: backend 'cupy' is not available") and "Traceback" not in error
    assert (
        "there is no peer 'troch', only all or gpuadam.torch.Adam" in run("large", *QUICK, "--peers", "troch", code=2).stderr
    )


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("large", ("--sizes", "x"), "large.py: error: argument --sizes: 'x' is not a number such as"),
        ("many", ("--sizes", "5"), "'5' is neither gpt2 nor COUNTxSIZE, such as 1000x1000"),
        ("amp_step", ("--sizes", "axb"), "'a' is not a number such as"),
        ("offload", ("--sizes", "5"), "'5' is not GB of state / GB of budget, such as 8/1"),
        ("pages", ("--sizes", "0"), "'0' is not a whole number from 1 to 12"),
        ("large", ("--rows", "/nowhere.csv"), "large: /nowhere.csv cannot be read: No such file or directory"),
        (
            "large",
            ("--rows", "README.md"),
            "large: README.md is no file of rows, as --out and --json write them: ",
        ),
        ("report", ("summary", "README.md"), "report: README.md is no file of rows"),
        ("report", ("summary", "/nowhere.csv"), "report: /nowhere.csv cannot be read"),
        ("report", (), "the following arguments are required"),
        ("report", ("merge",), "the following arguments are required: RESULTS.csv, ROWS"),
        ("killed_rank", ("abc",), "'abc' is not a number such as"),
        ("launch_shapes", ("--arch", "foo"), "invalid choice: 'foo' (choose from"),
        ("in_flight", ("--arch", "sm_9"), "there is no architecture 'sm_9' (did you mean 'sm_90'?), only all or sm_75, "),
        ("quality", ("--tasks", "digits,"), 'an empty item beside a comma: give names such as "digits,text"'),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, script, arguments, said):
    monkeypatch.chdir(FOLDER)
    error = in_process.script(FOLDER / f"{script}.py", *arguments, code=2).stderr
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("script", ["report", "killed_rank", "in_flight", "cpu_threads"])
def test_help_is_printed(script):
    assert in_process.script(FOLDER / f"{script}.py", "--help").stdout.startswith(f"usage: {script}.py ")


def test_mpiexec_is_beside_python_or_on_the_path_or_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs.output, "need", lambda extra, module: None)
    monkeypatch.setattr(jobs.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(jobs.shutil, "which", lambda name: None)
    with pytest.raises(jobs.output.CommandError, match=r'there is no mpiexec beside .*: pip install "gpuadam\[mpi\]"'):
        jobs.mpiexec()
    monkeypatch.setattr(jobs.shutil, "which", lambda name: f"/elsewhere/{name}")
    assert jobs.mpiexec() == "/elsewhere/mpiexec"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpiexec").touch()
    assert jobs.mpiexec() == str(tmp_path / "bin" / "mpiexec")


def test_a_job_has_one_thread_a_rank_and_says_why_it_fails(monkeypatch):
    ended = SimpleNamespace(returncode=0, stdout='{"seconds": 1}')
    asked = []
    monkeypatch.setattr(jobs, "mpiexec", lambda: "mpiexec")
    monkeypatch.setattr(jobs.subprocess, "run", lambda command, **options: asked.append((command, options)) or ended)
    assert jobs.run("/x/sharded.py", 2, "Adam", 100, seconds=1, OTHER="3") == {"seconds": 1}
    ((command, options),) = asked
    assert command == ["mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", "/x/sharded.py", "--rank", "Adam", "100"]
    assert options["env"].items() >= {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OTHER": "3"}.items()
    ended = SimpleNamespace(returncode=3, stderr="rank 1: no memory")
    with pytest.raises(RuntimeError, match=r"^2 ranks of sharded\.py Adam 100 ended with 3: rank 1: no memory$"):
        jobs.run("/x/sharded.py", 2, "Adam", 100, seconds=1)


@pytest.mark.parametrize("script", few(["sharded", "collectives", "killed_rank"], "sharded"))
def test_ranks_without_mpi4py_are_explained(script, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError('no mpi4py', name='mpi4py')")
    backend = () if script == "killed_rank" else QUICK
    error = run(script, *backend, code=2, PYTHONPATH=str(tmp_path)).stderr
    assert error == f'{script}: mpi4py is not installed: pip install "gpuadam[mpi]"\n'


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    missing = peers.Peer("another Adam", peers.adam_step, package="another_adam")
    monkeypatch.setattr(peers, "PEERS", (missing,))
    assert peers.chosen(backends.BACKENDS["numba-cpu"]) == ([], {"another Adam": "another_adam is not installed"})


def test_contenders_that_do_not_fit_or_are_too_slow_are_named(monkeypatch):
    cpu = backends.BACKENDS["numba-cpu"]
    quick, slow = peers.Peer("quick", peers.adam_step), peers.Peer("slow", peers.adam_step, passes=13)
    monkeypatch.setattr(peers, "free_bytes", lambda backend: 3e9)
    assert peers.fitting([quick, slow], 10**6, cpu) == ([quick, slow], {})
    kept, absent = peers.fitting([quick, slow, quick._replace(name="second")], 10**8, cpu)
    assert kept == [quick] and "too slow" in absent["slow"] and "no memory" in absent["second"]


@pytest.mark.parametrize("script", [large, many, memory, narrow, amp_step, plan])
def test_where_nothing_fits_in_memory_each_contender_is_named_and_there_are_no_rows(monkeypatch, script):
    monkeypatch.setattr(peers, "free_bytes", lambda backend: 1000)
    options = SimpleNamespace(sizes=["3x1000" if script is many else "3000"], seconds=0, peers=["none"], forms=["float32"])
    assert not list(script.measure_rows(CPU, options, notes := []))
    assert {"large": 4, "many": 3, "memory": 2, "narrow": 1, "amp_step": 2, "plan": 1}[script.__name__] == sum(
        note.startswith("not measured: ") and "it needs 0.0 GB" in note for note in notes
    )


def test_gpt2_small_has_its_parameters():
    shapes = many.gpt2_small()
    assert len(shapes) == 148 and sum(map(math.prod, shapes)) == 124_439_808


def test_the_plain_code_is_adam():
    ours, plain = ([a.copy() for a in measure.data(1000, "float32")] for _ in range(2))
    for step in range(1, 6):
        gpuadam.adam_step(*ours[:4], step)
        peers.plain_step(np, *plain, step)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # roundings of 5 steps in another order


@ON_LINUX
def test_a_step_of_ours_allocates_nothing_and_plain_numpy_one_array():
    n, cpu = 4_000_000, backends.BACKENDS["numba-cpu"]
    by_name = {peer.name: peer for peer in (*peers.OURS, *peers.PEERS)}
    ours = memory._in_fresh_process(cpu, by_name["gpuadam.Adam.step"], n)
    numpy = memory._in_fresh_process(cpu, by_name["plain NumPy"], n)
    for state in (memory.RESIDENT, memory.TRACED):
        assert ours[state] < 1e6
        assert numpy[state] == pytest.approx(4 * n, rel=0.1)  # the kernel counts pages, a few hundred of them late


ON_HUGE = [(1023, 1024), (8,), (1024, 1024)]  # of more than 8 MB in all; the second and the third begin within a huge page


def built(name, shapes=ON_HUGE):
    peer = next(peer for peer in (*peers.OURS, *peers.PEERS) if peer.name == name)
    if peer not in (*peers.OURS, *peers.chosen(CPU, own=True)[0]):
        pytest.skip(f"{name} cannot be measured here")
    contender = peer.build(CPU, shapes)
    contender.step()
    return contender


@ON_LINUX
@pytest.mark.parametrize(
    "name",
    few(["gpuadam.adam_step", "gpuadam.Adam.step", "limit", "torch fused", "plain NumPy"], "gpuadam.Adam.step", "limit"),
)
def test_contenders_have_arrays_in_aligned_memory_moments_included(name):
    starts = [start for start, _ in built(name).extents()]
    allocations = 3 if name == "gpuadam.Adam.step" else 4  # which has one for both moments
    assert len(starts) == 4 * len(ON_HUGE)
    assert sum(start % huge_pages.page_bytes() < huge_pages.SMALL_PAGE for start in starts) == allocations


@pytest.mark.parametrize("n, shared", [(4999, False), (5000, True)])
def test_small_contenders_share_no_arrays_and_large_ones_all(n, shared, monkeypatch):
    monkeypatch.setattr(peers, "SHARED_FROM", 5000)
    ours = peers.with_movers({peer.name: peer.build(CPU, [(n,)]) for peer in peers.OURS})
    assert len(ours) > len(peers.OURS)  # ways of the limit among them
    starts = [start for contender in ours.values() for start, _ in contender.extents()]
    assert len(set(starts)) == (4 if shared else len(starts))


@ON_LINUX
@pytest.mark.parametrize("name", ["torch fused (its own memory)", "optax under jit", "optax under jit (its own memory)"])
def test_contenders_say_where_the_arrays_of_their_library_lie(name):
    contender = built(name)
    n_bytes = sum(4 * math.prod(shape) for shape in ON_HUGE)
    assert sum(size for _, size in contender.extents()) == 4 * n_bytes
    assert 0 <= contender.percent_huge(CPU) <= 100


def test_moments_that_are_given_to_torch_are_its_own_beginning():
    libraries.imported("torch", reason="torch is not installed")
    ours, own = (built(name, [(50, 3), (7,)]) for name in ("torch fused", "torch fused (its own memory)"))
    for _ in range(3):
        ours.step()
        own.step()
    for a, b in zip(ours.extents(), own.extents(), strict=True):
        assert bytes_at(*a) == bytes_at(*b)


def bytes_at(address, n_bytes):
    return ctypes.string_at(address, n_bytes)


def test_contenders_begin_with_the_same_host_arrays_and_write_to_copies(monkeypatch):
    made, data = [], measure.data
    monkeypatch.setattr(measure, "data", lambda *arguments: made.append(1) or data(*arguments))
    peers.release(CPU)
    for name in ("gpuadam.Adam.step", "gpuadam.adam_step", "gpuadam.Adam.step (NumPy's memory)", "plain NumPy"):
        built(name, [(50, 3), (7,)])
    assert len(made) == 2  # of each shape
    for arrays, (param, grad, *_) in zip(
        peers.host_arrays([(50, 3), (7,)], 4), ([*data(150, "f4")], [*data(7, "f4")]), strict=True
    ):
        assert (arrays[0].ravel() == param).all() and (arrays[1].ravel() == grad).all()
    peers.release(CPU)
    assert peers._host_arrays.cache_info().currsize == 0


def test_a_backend_that_is_named_is_measured_without_a_look_at_the_others(monkeypatch):
    monkeypatch.setattr(gpuadam, "available_backends", lambda: pytest.fail("the others were looked at"))
    done = in_process.script(FOLDER / "norms.py", "--backend", "numba-cpu", "--sizes", "100", "--seconds", "0")
    assert "norms: 100 float32, numba-cpu" in done.stdout


def test_each_peer_can_be_named_in_a_list():
    assert not any("," in peer.name for peer in peers.PEERS)


def test_rows_in_the_libraries_own_memory_are_of_large_arrays():
    assert not any(peer.own for peer in peers.chosen(CPU)[0])
    assert any(peer.own for peer in peers.chosen(CPU, own=True)[0])


@ON_LINUX
def test_pages_are_compared_with_one_flat_array(monkeypatch):
    monkeypatch.setattr(of_pages, "layers", lambda count: count * [(40, 3), (7,)])
    monkeypatch.setattr(of_pages, "APART_ELEMENTS", 1000)
    monkeypatch.setattr(of_pages, "APART", {"near": 4096, "far": 8192})
    options = SimpleNamespace(sizes=["2"], seconds=0)
    rows, of_distances = of_pages.measure_rows(CPU, options, notes := [])
    assert [(row["contender"], row["elements"]) for row in of_distances] == [("near", 1000), ("far", 1000)]
    assert of_distances[1]["x_flat"] == 1
    assert [row["contender"] for row in rows] == list(of_pages.OF_FORM) and [row["arrays"] for row in rows] == [1] + 5 * [4]
    for row in rows:
        assert row["x_flat"] == pytest.approx(row["p50_us"] / rows[0]["p50_us"], rel=1e-4)
    assert notes[0].startswith("Huge pages")


@ON_LINUX
def test_arrays_on_small_pages_have_no_others():
    array = of_pages.on_small_pages(np.full((1024, 2048), 3, "f4"))
    assert (array == 3).all() and measured_pages.percent_huge(measured_pages.extents([array])) == 0


def test_all_contenders_run_equally_often_and_in_changing_order():
    order = []
    functions = [lambda k=k: order.append(k) for k in range(3)]
    times = measure.in_turn(numba_cpu, functions, 0)
    assert {len(t) for t in times} == {12} and all(t >= 0 for of_one in times for t in of_one)
    rounds = {tuple(order[at : at + 3]) for at in range(9, len(order), 3)}
    assert len(rounds) > 1 and all(sorted(r) == [0, 1, 2] for r in rounds)


def test_what_comes_before_a_turn_comes_before_each_of_it():
    order = []
    functions, before = ([lambda k=k, name=name: order.append((name, k)) for k in range(2)] for name in ("step", "before"))
    measure.in_turn(numba_cpu, functions, 0, before=before)
    assert order[::2] == [("before", k) for _, k in order[1::2]] and len(order) == 2 * 2 * 15


def test_the_available_memory_is_what_the_system_and_the_group_of_processes_leave(tmp_path):
    def write(folder, **texts):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (tmp_path / folder / name.replace("_", ".", 1)).write_text(text)

    assert offload.available(tmp_path) is None
    write("proc", meminfo="MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert offload.available(tmp_path) == 1_024_000
    write("sys/fs/cgroup", memory_max="max\n", memory_current="5\n", memory_stat="anon 5\n")
    assert offload.available(tmp_path) == 1_024_000
    of_files = "anon 400\ninactive_file 50\nactive_file 150\n"
    write("sys/fs/cgroup", memory_max="900\n", memory_current="600\n", memory_stat=of_files)
    assert offload.available(tmp_path) == 500
    # as the first version of groups has it
    write("sys/fs/cgroup/memory", memory_limit_in_bytes="300\n", memory_usage_in_bytes="350\n", memory_stat="cache 0\n")
    assert offload.available(tmp_path) == 0


@pytest.mark.parametrize(
    "size, room, free, fitted, said",
    [
        ("72/8", 300e9, 80e9, (72e9, 8e9), []),
        ("72/8", None, 80e9, (72e9, 8e9), []),
        ("72/8", 120e9, 80e9, (45e9, 8e9), ["72 GB of state were asked for, and 45 GB measured: "]),
        ("8/8", 120e9, 6e9, (8e9, 1.5e9), ["a budget of 8 GB was asked for, and one of 1.5 GB measured: "]),
    ],
)
def test_offloaded_arrays_that_half_of_the_memory_does_not_hold_are_cut(monkeypatch, size, room, free, fitted, said):
    monkeypatch.setattr(offload, "available", lambda: room)
    notes: list[str] = []
    assert offload.fitting(*offload.state_and_budget(size), free, notes) == fitted
    assert len(notes) == len(said) and all(map(str.startswith, notes, said))


@pytest.mark.gpu
@pytest.mark.parametrize("room", [None, 40e6], ids=["room for both", "room for one"])
def test_offloaded_steps_are_measured_with_pinned_parameters_and_if_there_is_room_with_numpys(cp, monkeypatch, room):
    monkeypatch.setattr(offload, "available", lambda: room)
    options, notes = SimpleNamespace(sizes=["0.012/0.003"], seconds=0), []
    (rows,) = offload.measure_rows(backends.BACKENDS["cupy"], options, notes)  # which arrays of the host go to
    contenders = [row["contender"] for row in rows]
    assert (offload.PAGEABLE in contenders) == (room is None) and {offload.STEP, offload.BOTH_WAYS} <= {*contenders}
    assert sum(note.startswith("0 different bytes") for note in notes) == contenders.count(offload.PAGEABLE) + 1


MEMSETS = {"cuMemsetD8Async", "runtime_cudaMemsetAsync"}
WAITS = {"cuEventSynchronize", "cuCtxSynchronize", "cuStreamSynchronize"}


def enqueued(driver, kernels, functions, **options):
    """Return what `in_turn` enqueues between two waits, of memsets and events: lists of names."""
    driver.listen()
    measure.in_turn(kernels, functions, 0, **options)
    calls = [name for name in driver.calls if name in {"cuEventRecord", *MEMSETS, *WAITS}]
    return [list(between) for waits, between in itertools.groupby(calls, WAITS.__contains__) if not waits]


@pytest.mark.gpu
def test_on_a_gpu_the_moments_of_a_burst_are_enqueued_behind_other_work(backend, driver):
    """Else a moment is passed before the host has enqueued what comes after it, and the host's time counts as the GPU's."""
    kernels = backends.load(backend)
    case = forms.FORMS["float32"]
    contenders = list(forms.kernel_and_movers(kernels, case, forms.new_arrays(kernels, case, 1000)).values())
    for burst in enqueued(driver, kernels, contenders)[-2:]:
        assert [is_memset for is_memset, _ in itertools.groupby(burst, MEMSETS.__contains__)] == [True, False]
        n = burst.count("cuEventRecord")  # before and after each turn
        assert n and n % (2 * len(contenders)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("of_round, rounds", [(0.0, measure.ROUNDS), (0.02, 1), (0.2, 1)])
def test_fewer_rounds_are_enqueued_where_they_take_the_host_long(backend, driver, monkeypatch, of_round, rounds):
    kernels, now = backends.load(backend), itertools.count(step=1e-6)
    waited, filled = [], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now) + sum(waited))
    monkeypatch.setattr(measure, "filler", lambda kernels: filled.append)
    bursts = enqueued(driver, kernels, [lambda: waited.append(of_round)], at_least=9)
    assert bursts[-1].count("cuEventRecord") == 2 * rounds
    assert filled[-1] == pytest.approx(measure.MARGIN * rounds * of_round, abs=1e-4)


@pytest.mark.gpu
def test_a_gpu_that_has_caught_up_with_the_host_gets_other_work_again(backend, driver):
    kernels = backends.load(backend)
    driver.listen()
    measure.in_turn(kernels, [lambda: measure.drain(kernels)], 0)
    calls = [name for name in driver.calls if name in {"cuEventQuery", "cuEventElapsedTime", *MEMSETS}]
    timed = calls[calls.index("cuEventQuery") + 1 :]
    queries = [k for k, name in enumerate(timed) if name == "cuEventQuery"]
    assert len(queries) >= 11 and all(timed[k - 2] in MEMSETS for k in queries)


@pytest.mark.gpu
def test_the_work_before_a_burst_has_its_bounds_in_time_and_memory(backend, driver, monkeypatch):
    kernels = backends.load(backend)
    clock = itertools.count(step=1e-3)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))  # 8 memsets take 1 ms
    free, total = kernels.memory_info()
    fill = measure.filler(kernels)
    for seconds, n in ((0, 0), (1e-3, 8), (1e9, 8 * 1e3 * measure.MOST_FILLED)):
        driver.listen()
        fill(seconds)
        assert sum(name in MEMSETS for name in driver.calls) == n
    assert free - kernels.memory_info()[0] <= total / 200


def test_on_a_cpu_nothing_comes_before_a_burst():
    assert measure.filler(numba_cpu) is None


def test_a_burst_leaves_its_first_calls_out(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls, waits = [], []
    times = timing.on_host([lambda: calls.append(1)], lambda: waits.append(1), 0, calls=50, at_least=2)
    assert len(calls) == 3 + 2 * 50 and len(waits) == 3 + 2
    assert times == [[1 / 40, 1 / 40]]  # one tick of the clock, over the 40 calls that are timed


def test_the_times_in_tables_are_readable():
    assert doctest.testmod(report).failed == 0


@pytest.mark.parametrize("script", [large, many])
def test_a_backend_that_was_not_measured_at_a_size_leaves_its_panel_empty(tmp_path, script):
    def row(backend, n):
        facts = {"state": "in turn", "clock": "host", "seconds": [1e-3], "moved": 28 * n}
        return measure.row(script.__name__, "limit", "numba-cpu", n, **facts) | {"backend": backend}

    script.draw([row("cupy", 1), row("cupy", 10), row("numba-cuda", 1)], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"


# Many ranks


def job(ranks, contender, n, seconds):
    """What a job would have found that took a millisecond a step for each rank."""
    phases = dict.fromkeys(sharded.PHASES, ranks * 0.0001)
    return {"seconds": [ranks * 1e-3] * 5, "phases": phases, "n_bytes": 2 * (ranks - 1) * 4 * 8192 // ranks}


@pytest.mark.exhaustive
def test_the_scaling_over_ranks_is_tabulated_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(sharded, "timed_job", job)
    notes, options = [], SimpleNamespace(sizes=["4096"], seconds=0.0)
    strong, weak = sharded.measure_rows(backends.BACKENDS["numba-cpu"], options, notes)
    of_views = [row for row in (*strong, *weak) if row["contender"] == sharded.VIEWS]
    assert [(row["state"], row["ranks"], row["elements"]) for row in of_views] == [
        *(("strong", ranks, 4096) for ranks in (1, 2, 4)),
        *(("weak", ranks, ranks * 4096) for ranks in (1, 2, 4)),
    ]
    assert [row["x_minimum"] for row in of_views] == [None, 2.0, 2.0, None, 1.0, 0.5]  # 8192 elements are sent each time
    report.write_csv(tmp_path / "sharded.csv", strong + weak)
    assert report.read_csv(tmp_path / "sharded.csv", report.NUMBERS) == strong + weak
    printed = run("sharded", "--rows", str(tmp_path / "sharded.csv"), "--out", str(tmp_path)).stdout
    assert "strong scaling" in printed and "weak scaling" in printed
    assert (tmp_path / "sharded.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.exhaustive
def test_ranks_are_timed_and_send_the_padded_buffers():
    libraries.mpiexec()
    found = sharded.timed_job(2, sharded.VIEWS, 5000, 0.0)
    assert len(found["seconds"]) == 5 and min(found["seconds"]) > 0
    assert set(found["phases"]) == set(sharded.PHASES) and min(found["phases"].values()) > 0
    assert found["n_bytes"] == 2 * 4 * 8192 // 2  # two cells, of which each rank sends the other's, twice


@pytest.mark.exhaustive
def test_the_calls_of_mpi_are_compared_and_each_has_the_sum_of_the_ranks(monkeypatch, tmp_path):
    """A job ends with an error if one has another sum."""
    libraries.mpiexec()
    for name, value in {"RANKS": (3,), "ROUNDS": 1, "FEWEST": 1, "SETTINGS": collectives.SETTINGS[:1]}.items():
        monkeypatch.setattr(collectives, name, value)
    options = SimpleNamespace(sizes=["3e4"], seconds=0.0)
    sums, gathers = collectives.measure_rows(backends.BACKENDS["numba-cpu"], options, [])
    assert {row["state"] for row in sums} == {"reduce-scatter"} and {row["state"] for row in gathers} == {"all-gather"}
    order = {row["contender"]: row["sum"] for row in sums}
    assert order["gpuadam.transports.MPI"] == order["shared memory + sum"] == "in order"
    assert any("tsp_recexch" in name for name in order) == sums[0]["driver"].startswith("MPICH")
    for rows in (sums, gathers):
        assert all(row["x_present"] > 0 and row["x_limit"] > 0 for row in rows)
        assert len(collectives.table(rows).lines) == len(rows)
    report.write_csv(tmp_path / "collectives.csv", sums + gathers)
    assert report.read_csv(tmp_path / "collectives.csv", report.NUMBERS) == sums + gathers
    collectives.draw(sums + gathers, tmp_path / "collectives.png")
    assert (tmp_path / "collectives.png").read_bytes()[:4] == b"\x89PNG"


def test_what_binds_is_read_from_the_profilers_rows(monkeypatch, capsys, tmp_path):
    """ncu is played: it writes its CSV, with a row for each counter of each launch, into the file that it is told."""
    asked = []

    def ncu(command, check):
        asked.append(command)
        counters = command[command.index("--metrics") + 1].split(",")
        lines = [
            f'"{k}","k","sec","{counter}","unit","{1000 * k + n:,}"' for k in range(4) for n, counter in enumerate(counters)
        ]
        head = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
        Path(command[command.index("--log-file") + 1]).write_text("\n".join(["==PROF== connected", head, *lines]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(what_binds.subprocess, "run", ncu)
    monkeypatch.setattr(what_binds.shutil, "which", lambda name: name)
    monkeypatch.setattr(what_binds.backends, "load", lambda name: None)
    monkeypatch.setattr(what_binds.facts, "of_backend", lambda backend: {"device": "no GPU"})
    monkeypatch.setattr(sys, "argv", ["what_binds", "--forms", "float32,8-bit state", "--out", str(tmp_path)])
    what_binds.main()
    rows = json.loads((tmp_path / "what_binds-cupy.json").read_text())["rows"]
    assert [(row["form"], row["kernel"]) for row in rows] == [
        (form, kernel) for form in ("float32", "8-bit state") for kernel in ("step", "limit")
    ]
    assert [row["nanoseconds"] for row in rows] == [0, 1000, 2000, 3000] and rows[1]["dram_percent"] == 1001
    assert {"--launch", "--backend", "cupy"} <= set(asked[0])
    assert "8-bit state, limit" in capsys.readouterr().out


@pytest.mark.parametrize("name", [in_caches.STEP, *in_caches.RULES])
def test_a_step_without_an_operation_has_none_of_it(name):
    """Else `in_caches.py` would find that the operation costs nothing."""
    case, rule = forms.FORMS["float32"], in_caches.RULES.get(name, adam)
    form, scalars = forms.form_and_scalars(case)
    whole = numba.njit(error_model="numpy")(numba_cpu.build(rule, form, "serial").py_func)  # not from a cache
    whole(np.zeros((0, 7), np.int64), 0, 0, 0, in_memory(scalars))
    (code,) = whole.inspect_llvm().values()
    there = {operation for operation, text in {"div": " fdiv ", "sqrt": "@llvm.sqrt"}.items() if text in code}
    assert there == {"div", "sqrt"} - set(in_caches.LEFT_OUT.get(name.removeprefix(f"{in_caches.STEP}, "), ()))


# gpu.sh

BASH = pytest.mark.skipif(sys.platform != "linux", reason="gpu.sh is for Linux")
NOT_ON_A_GPU = {
    "collectives", "conversion", "cpu_threads", "in_caches", "in_flight", "jobs", "killed_rank", "pages", "peers", "quality",
    "report", "sharded", "timing",
}  # fmt: skip


def gpu_sh(*arguments, code=0, **env):
    command = ["bash", str(FOLDER / "gpu.sh"), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def played(name, folder, *lines):
    """Have a script of the shell play a program, which writes down what it is asked for. Return the environment that has it.

    There a script of the name python is Python.
    """
    (folder / name).write_text("\n".join(["#!/bin/sh", f'echo "{name} $*" >>"{folder}/asked"', *lines, ""]))
    (folder / name).chmod(0o755)
    return {"PYTHON": str(folder / "python"), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "GPUADAM_GPU": ""}


@BASH
def test_the_list_of_sections_is_complete_and_a_wrong_name_is_refused(tmp_path):
    text = (FOLDER / "gpu.sh").read_text()
    listed = gpu_sh("--list").stdout
    sections = re.findall(r"^[* ] ([\w-]+) +\d+ s  \S", listed, re.M)
    assert sections == re.findall(r"^section ([\w-]+) \d+ ", text, re.M)
    assert sorted(sections) == sorted(re.findall(r"^section_([\w-]+)\(\)", text, re.M))
    scripts = {path.stem for path in FOLDER.glob("*.py")} - NOT_ON_A_GPU
    measured = set(re.findall(r"\b(?:benchmark|both) ([a-z_]+) (?:cupy |numba-cuda )?\d", text))
    assert scripts == {name for name in scripts if name in measured or f"benchmarks/{name}.py" in text}
    assert measured <= report.SUMMARY.keys()
    of_default = re.findall(r"^\* ([\w-]+) +(\d+) s", listed, re.M)
    *others, (last, _) = of_default
    # of the 360 that all may take 20 are left for the table; the last one takes what the others leave, a minute at least
    assert last == "tests-gpu" and sum(int(seconds) for _, seconds in others) <= 360 - 20 - 60
    for wrong in (("out", "larg"), ("--with", "out"), ("--within", "soon", "out"), ()):
        error = gpu_sh(*(tmp_path / a if a == "out" else a for a in wrong), code=2).stderr
        assert error.endswith(listed) and "usage" in error
    assert "no section larg" in gpu_sh(tmp_path / "out", "large", "larg", code=2).stderr
    assert not (tmp_path / "out").exists()


@BASH
def test_its_help_is_its_usage():
    said = gpu_sh("--help").stdout
    assert said.startswith("usage: benchmarks/gpu.sh ") and said.endswith(gpu_sh("--list").stdout)


@BASH
def test_a_python_without_gpuadam_or_numba_is_refused_before_any_section(tmp_path):
    (tmp_path / "numba.py").write_text("raise ModuleNotFoundError('no numba here')")
    error = gpu_sh(tmp_path / "out", code=2, PYTHON=sys.executable, PYTHONPATH=str(tmp_path)).stderr
    assert "cannot import gpuadam and numba: ModuleNotFoundError: no numba here\n" in error and "Activate the env" in error
    assert not (tmp_path / "out").exists()


@BASH
def test_a_section_that_fails_does_not_cost_the_others(tmp_path):
    """Python, ncu and compute-sanitizer are played: they write down what they are asked for."""
    broken = 'case "$*" in *small.py*) echo broken; exit 3; esac'
    env = [played(name, tmp_path, broken) for name in ("ncu", "compute-sanitizer", "python")][-1]
    done = gpu_sh(tmp_path / "out", "all", code=1, **env)
    names = re.findall(r"^section ([\w-]+) \d+ ", (FOLDER / "gpu.sh").read_text(), re.M)
    assert re.findall(r"^== ([\w-]+):", done.stdout, re.M) == names
    assert f"{len(names) - 2} of {len(names)} sections passed; FAILED: small peers;" in done.stdout.splitlines()[-1]
    asked = (tmp_path / "asked").read_text()
    for name in ("large", "many", "small", "narrow", "amp_step", "memory", "first_call"):
        assert all(f"{name}.py --backend {backend} " in asked for backend in ("cupy", "numba-cuda"))
    assert all(f"compute-sanitizer --tool {tool} " in asked for tool in ("memcheck", "racecheck", "initcheck"))
    again = gpu_sh(tmp_path / "out", "many", "large", "many", **env)
    assert again.stdout.count("\n== ") == 4  # with its head and the summary
    assert "broken" in (tmp_path / "out" / "log.txt").read_text()  # which later calls add to
    late = gpu_sh("--within", "12", tmp_path / "out", "many", "large", code=1, **env)
    assert "0 of 2 sections passed; NOT REACHED: many large;" in late.stdout


@BASH
@pytest.mark.parametrize("works", [["numba-cpu"], ["cupy", "numba-cpu"], ["cupy", "numba-cuda", "numba-cpu"]])
def test_nothing_is_measured_where_doctor_finds_no_gpu_backend_that_works(tmp_path, works):
    """Python is played, but for what reads doctor's report."""
    (tmp_path / "found.json").write_text(json.dumps({"works": works}))
    report = f'*"-m gpuadam doctor"*) cp "{tmp_path}/found.json" "$5";;'
    env = played("python", tmp_path, f'case "$*" in {report} *json.load*) exec {sys.executable} "$@";; esac')
    done = gpu_sh(tmp_path / "out", "doctor", "large", code=0 if "numba-cuda" in works else 1, **env)
    assert ("cupy does not work" in done.stdout, "numba-cuda does not work" in done.stdout) == (
        "cupy" not in works, "numba-cuda" not in works,
    )  # fmt: skip
    measured = "large.py" in (tmp_path / "asked").read_text()
    assert measured == ("cupy" in works)
    assert ("not reached: no GPU backend works" in done.stdout) != measured


@BASH
@pytest.mark.parametrize(
    "given, home, path",
    [
        ({"CUDA_HOME": "no nvvm", "CUDA_PATH": "whole"}, "whole", "whole"),
        ({"CUDA_HOME": "whole", "CUDA_PATH": "other"}, "whole", "unset"),
        ({"CUDA_PATH": "no nvvm", "nvcc": "whole"}, "whole", "unset"),
    ],
)
def test_numba_finds_libnvvm_in_one_toolkit(tmp_path, given, home, path):
    if "nvcc" in given and Path("/usr/local/cuda/nvvm").is_dir():
        pytest.skip("a toolkit in /usr/local/cuda comes first")
    for folder in ("whole/nvvm", "whole/bin", "other/nvvm", "no nvvm"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "whole" / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "whole" / "bin" / "nvcc").chmod(0o755)
    env = played("python", tmp_path, f'echo "$CUDA_HOME, ${{CUDA_PATH-unset}}" >>"{tmp_path}/asked"')
    if "nvcc" in given:
        (tmp_path / "nvcc").symlink_to(tmp_path / "whole" / "bin" / "nvcc")
    of_env = {key: str(tmp_path / folder) for key, folder in given.items() if key != "nvcc"}
    gpu_sh(tmp_path / "out", "norms", **{"CUDA_HOME": "", "CUDA_PATH": ""} | of_env | env)
    last = (tmp_path / "asked").read_text().splitlines()[-1]
    assert last == f"{tmp_path / home}, {'unset' if path == 'unset' else tmp_path / path}"


@BASH
def test_the_gpus_clocks_and_load_are_noted_around_each_section(tmp_path):
    env = played("python", tmp_path)
    played("nvidia-smi", tmp_path, 'echo "1980 MHz, $*"')
    gpu_sh(tmp_path / "out", "large", "norms", **env)
    log = (tmp_path / "out" / "log.txt").read_text()
    noted = re.findall(r"^-- the GPU (before|after): 1980 MHz, .*clocks_event_reasons.active", log, re.M)
    assert noted == 2 * ["before", "after"]


@BASH
def test_what_is_not_to_be_had_has_not_passed(tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "cat", "date", "dirname", "env", "mkdir", "mktemp", "rm", "tee", "timeout"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "bin" / "python3").symlink_to(shutil.which("true"))
    env = {"PATH": str(tmp_path / "bin"), "PYTHON": "python3", "GPUADAM_GPU": ""}
    done = gpu_sh(tmp_path / "out", "launch_shapes", "what_binds", "sanitize-racecheck", **env)
    assert "1 of 3 sections passed; not to be had here: what_binds sanitize-racecheck;" in done.stdout
    assert "not to be had here: ncu" in done.stdout and "not to be had here: compute-sanitizer" in done.stdout
    gpu_sh(tmp_path / "out", "what_binds", code=1, **env)


@BASH
@pytest.mark.exhaustive
def test_without_a_gpu_it_runs_over_the_stand_in(tmp_path):
    libraries.imported("cupy")
    done = gpu_sh("--within", "115", tmp_path, "small", "sanitize-initcheck", GPUADAM_GPU="host", PYTHON=sys.executable)
    assert "1 of 2 sections passed; not to be had here: sanitize-initcheck;" in done.stdout
    assert "all times are meaningless" in done.stdout
    rows = report.read_csv(tmp_path / "results.csv", measure.NUMBERS)
    assert {(row["backend"], row["device"]) for row in rows} == {
        (backend, "gpuadam's stand-in for a GPU") for backend in ("cupy", "numba-cuda")
    }
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "results.csv"}
