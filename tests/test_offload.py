"""OffloadAdam on the CPU: the bits of Adam through chunks, files and budgets; memory; folders that go on, or are refused."""

import copy
import json
import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import libraries
import ml_dtypes
import numpy as np
import pytest

import gpuadam
from gpuadam.kernels.operands import Operand
from gpuadam.offload import chunks, folder, mapped, pipeline, runner

ODD = {"w": (301, 77), "empty": (0, 3), "b": (5,), "scalar": (), "u": (64, 33)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1 << 12)


def arrays(seed=0, shapes=ODD, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def in_files(given, path):
    """Return copies of arrays in memory-mapped files."""
    path.mkdir(exist_ok=True)
    found = {}
    for name, array in given.items():
        found[name] = array.copy()
        if array.size:
            found[name] = np.memmap(path / name, array.dtype, "w+", shape=array.shape)
            found[name][...] = array
    return found


def assert_same_state(one, other, params, expected):
    for name, array in expected.items():
        assert params[name].tobytes() == array.tobytes(), name
    for name, state in one.state.items():
        assert state["step"] == other.state[name]["step"]
        for key in set(state) - {"step", "master"}:
            assert state[key].tobytes() == other.state[name][key].tobytes(), (name, key)


def steps(optimizers, n, start=1, shapes=ODD, dtype="float32", **options):
    """Take n steps with the same gradients; the second step of all skips a parameter."""
    for step in range(start, start + n):
        grads = arrays(100 + step, shapes, dtype) | ({"b": None} if step == 2 else {})
        for opt in optimizers:
            opt.step(grads, **options)


STATES = {
    "float32": {},
    "float32 AMSGrad": {"amsgrad": True, "weight_decay": 0.1, "decoupled": True},
    "bfloat16": {"state_dtype": "bfloat16", "seed": 7},
    "8bit": {"state_dtype": "8bit", "seed": 7},
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "where, edge", [("memory", chunks.EDGE), ("files", chunks.EDGE), ("files", 96)]
)  # 96: of tiny pages
def test_a_step_in_chunks_has_the_bits_of_adam(state, where, edge, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "EDGE", edge)
    options = STATES[state] | {"lr": 0.1}
    make = gpuadam.AdamW if "decoupled" in options else gpuadam.Adam
    expected, params = arrays(), arrays()
    adam = make(expected, **{key: value for key, value in options.items() if key != "decoupled"})
    with gpuadam.OffloadAdam(
        params, state=tmp_path / "s" if where == "files" else "memory", budget=40_000, **options
    ) as opt:
        steps([adam, opt], 4, grad_scale=0.5)
        assert_same_state(opt, adam, params, expected)
        assert ("in 1 chunk of" in opt.describe()) == (where == "memory")  # nothing has to move


@pytest.mark.parametrize("budget", [3_300, 12_345, 10**6])
def test_parameters_and_gradients_in_files_have_the_same_bits(budget, tmp_path):
    expected = arrays()
    params = in_files(expected, tmp_path)
    adam = gpuadam.Adam(expected, lr=0.1)
    with gpuadam.OffloadAdam(params, lr=0.1, state=tmp_path / "state", budget=budget, update="host") as opt:
        for step in range(3):
            grads = arrays(step)
            (tmp_path / "g").mkdir(exist_ok=True)
            adam.step(grads)
            opt.step(in_files(grads, tmp_path / "g"))
        assert_same_state(opt, adam, params, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_master_is_what_is_updated_and_the_parameter_its_copy(dtype, tmp_path):
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    params = arrays(dtype=narrow) | {"b": arrays()["b"]}
    masters = {name: p.astype("float32") for name, p in params.items()}
    copies = {name: None if name == "b" else np.zeros_like(p) for name, p in params.items()}
    adam = gpuadam.Adam(masters, lr=1e-4, param_copies=copies, zero_grad=True)
    with gpuadam.OffloadAdam(params, lr=1e-4, state=tmp_path, budget=40_000, master="float32", zero_grad=True) as opt:
        for step in range(3):
            grads = [arrays(step, dtype=narrow) for _ in range(2)]
            adam.step(grads[0])
            opt.step(grads[1])
            assert not any(array.astype("f4").any() for array in grads[1].values())
        for name, array in params.items():
            master = opt.state[name].get("master", array)
            assert master.tobytes() == masters[name].tobytes(), name
            assert "master" not in opt.state["b"]
            assert array.tobytes() == (masters if name == "b" else copies)[name].tobytes(), name


def test_a_remainder_lies_in_files_too(tmp_path):
    expected, params = (arrays(dtype=ml_dtypes.bfloat16) for _ in range(2))
    adam = gpuadam.Adam(expected, lr=1e-4, master="remainder")
    with gpuadam.OffloadAdam(params, lr=1e-4, master="remainder", state=tmp_path, budget=40_000) as opt:
        steps([adam, opt], 3, dtype=ml_dtypes.bfloat16)
        assert_same_state(opt, adam, params, expected)


def test_groups_schedules_and_clipping_are_those_of_adam(tmp_path):
    def groups(p):
        return [
            {"params": {"w": p["w"], "b": p["b"]}, "lr": lambda step: 0.1 / step},
            {"params": {"u": p["u"]}, "betas": (0.5, 0.9)},
        ]

    expected, params = arrays(), arrays()
    adam = gpuadam.Adam(groups(expected))
    with gpuadam.OffloadAdam(groups(params), state=tmp_path, budget=40_000) as opt:
        for step in range(3):
            for one in (adam, opt):
                g = arrays(step)
                one.step([{"w": g["w"], "b": g["b"]}, {"u": g["u"]}], max_norm=1.0, check_finite=True)
        assert_same_state(opt, adam, params, expected)
        bad = arrays(9)
        bad["u"][0, 0] = np.inf
        opt.step([{"w": bad["w"], "b": bad["b"]}, {"u": bad["u"]}], check_finite=True)
        assert opt.steps == 3
        assert_same_state(opt, adam, params, expected)


# Folders


def test_a_folder_goes_on_where_it_was_closed(tmp_path):
    expected, params = arrays(), arrays()
    adam = gpuadam.Adam(expected, lr=0.1)
    for first in (1, 3):
        with gpuadam.OffloadAdam(params, lr=0.1, state=str(tmp_path / "state"), budget=40_000) as opt:
            assert opt.steps == first - 1
            steps([adam, opt], 2, start=first)
    assert opt.state["b"]["step"] == 3  # it was skipped once
    assert_same_state(opt, adam, params, expected)


def test_a_step_without_any_gradient_is_counted_in_the_folder(tmp_path):
    params = arrays()
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        opt.step(dict.fromkeys(params))
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        assert (opt.steps, opt.state["w"]["step"]) == (1, 0)


CHANGED = {
    "decoupled": ({"decoupled": True}, "decoupled=False, this optimizer with decoupled=True"),
    "state": ({"state_dtype": "bfloat16"}, "state_dtype=None, this optimizer with state_dtype='bfloat16'"),
    "seed": ({"seed": 3}, "seed=0"),
    "shape": (
        {"params": arrays(shapes=ODD | {"b": (6,)})},
        r"params\['b'\].shape=\[5\], this optimizer with params\['b'\].shape=\[6\]",
    ),
    "dtype": (
        {"params": arrays(dtype="float64")},
        r"params\['w'\].format='float32', this optimizer with params\['w'\].format='float64'",
    ),
    "names": (
        {"params": {"v": np.zeros(3, "f4")}},
        r"names of parameters=\['b', 'empty'.*, this optimizer with the names of parameters=\['v'\]",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_folder_of_something_else_is_refused_by_name(what, tmp_path):
    gpuadam.OffloadAdam(arrays(), state=tmp_path).close()
    options, match = CHANGED[what]
    with pytest.raises(ValueError, match=match):
        gpuadam.OffloadAdam(**{"params": arrays(), "state": tmp_path} | options)
    gpuadam.OffloadAdam(arrays(), state=tmp_path).close()  # which was left as it was


def test_a_folder_is_continued_with_its_names_in_another_order(tmp_path):
    params, alone = arrays(), arrays()
    expected = gpuadam.Adam(alone)
    steps([expected], 3)
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        steps([opt], 2)
    with gpuadam.OffloadAdam(dict(reversed(params.items())), state=tmp_path) as opt:
        steps([opt], 1, start=3)
        assert [opt.state[name]["step"] for name in ODD] == [expected.state[name]["step"] for name in ODD]
    assert all(params[name].tobytes() == alone[name].tobytes() for name in ODD)


def test_another_order_in_a_folder_is_refused_where_random_bits_go_by_the_place(tmp_path):
    gpuadam.OffloadAdam(arrays(), state=tmp_path, state_dtype="bfloat16").close()
    match = r"names of parameters=\['w'.*, this optimizer with the names of parameters=\['u'"
    with pytest.raises(ValueError, match=match):
        gpuadam.OffloadAdam(dict(reversed(arrays().items())), state=tmp_path, state_dtype="bfloat16")


def test_a_folder_with_other_files_is_refused_and_they_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"thesis.tex.*a folder of its own"):
        gpuadam.OffloadAdam(arrays(), state=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_files_that_only_have_the_names_of_state_are_refused_too(tmp_path):
    (tmp_path / "m").write_text("masses")
    for _ in range(2):  # the first attempt leaves nothing that lets the second through
        with pytest.raises(ValueError, match=r"\['m'\] in it and no state.json"):
            gpuadam.OffloadAdam(arrays(), state=tmp_path)
    assert (tmp_path / "m").read_text() == "masses"
    with pytest.raises(
        ValueError, match=r"^state=.*m'\) is no folder, and something else is there: give the path of a folder"
    ):
        gpuadam.OffloadAdam(arrays(), state=tmp_path / "m")


def test_files_of_a_process_that_was_killed_while_it_made_them_are_made_anew(tmp_path):
    gpuadam.OffloadAdam(arrays(), state=tmp_path).close()
    (tmp_path / "state.json").unlink()
    (tmp_path / ".gpuadam-0123.tmp").write_text("{")
    (tmp_path / "v").write_bytes(b"\xff" * 100)
    with gpuadam.OffloadAdam(arrays(), state=tmp_path) as opt:
        assert not opt.state["w"]["v"].any() and not list(tmp_path.glob("*.tmp"))


def test_state_after_steps_is_not_begun_anew_because_its_description_was_lost(tmp_path):
    params = arrays()
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        steps([opt], 2)
    description, m = (tmp_path / "state.json").read_bytes(), (tmp_path / "m").read_bytes()
    (tmp_path / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"after 2 steps, and no state.json.*put that file back. If .*delete the folder"
        ):
            gpuadam.OffloadAdam(params, state=tmp_path)
    assert (tmp_path / "m").read_bytes() == m
    (tmp_path / "state.json").write_bytes(description)
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        assert opt.steps == 2


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with gpuadam.OffloadAdam(arrays(), state="./state") as opt:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        steps([opt], 1)
    assert json.loads((tmp_path / "state" / "steps.json").read_text())["steps"] == 1
    assert not list((tmp_path / "elsewhere").iterdir())


DAMAGE = {
    "cut off": ("state.json", '{"layout"', r"state.json cannot be read .*Delete the folder"),
    "a list": ("state.json", "[]", "state.json cannot be read ..*Delete the folder"),
    "without options": ("state.json", '{"layout": 1}', r"state.json cannot be read .'?KeyError.*Delete the folder"),
    "of no counts": ("steps.json", "{}", r"steps.json cannot be read .KeyError.*Delete the folder"),
    "of a negative count": (
        "steps.json",
        '{"steps": -1, "behind": {}, "under_way": false, "unflushed": null}',
        "does not say how many steps",
    ),
    "cut off in the counts": ("steps.json", "", r"steps.json cannot be read .*Delete the folder"),
    "of another count": (
        "steps.json",
        '{"steps": 1, "behind": {}, "under_way": false, "unflushed": null, "crc32": "00000000"}',
        r"steps.json cannot be read .*its checksum differs.*Delete the folder",
    ),
    "of a damaged checksum's name": (
        "steps.json",
        '{"steps": 1, "behind": {}, "under_way": false, "unflushed": null, "crc33": "00000000"}',
        r"'crc33'.*, and must have \['behind', 'steps', 'under_way', 'unflushed'\]",
    ),
    "nested too deep": ("steps.json", "[" * 10_000, r"steps.json cannot be read .*recursion depth.*Delete the folder"),
    "too long": ("state.json", " " * 2_000_000, r"state.json cannot be read .*more than the [\d,]+ bytes that are expected"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_description_is_named_with_what_mends_it(what, tmp_path):
    gpuadam.OffloadAdam(arrays(), state=tmp_path).close()
    file, content, match = DAMAGE[what]
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=match):
        gpuadam.OffloadAdam(arrays(), state=tmp_path)
    (tmp_path / file).unlink()
    if file == "steps.json":
        with pytest.raises(ValueError, match="No such file"):
            gpuadam.OffloadAdam(arrays(), state=tmp_path)


def test_files_of_older_versions_have_no_checksums(tmp_path):
    params = arrays()
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        steps([opt], 2)
    for name in ("state.json", "steps.json"):
        content = json.loads((tmp_path / name).read_text())
        assert content.pop("crc32")
        (tmp_path / name).write_text(json.dumps(content))
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:
        assert opt.steps == 2


def test_numbers_of_any_type_are_described_in_files(tmp_path):
    options = {"ema_decay": Fraction(9, 10), "formula": "optax", "eps_root": np.float32(0.5), "seed": np.int64(3)}
    with gpuadam.OffloadAdam(arrays(), state=tmp_path, **options) as opt:
        opt.steps = opt.state["w"]["step"] = np.int64(7)
        steps([opt], 1)
    with gpuadam.OffloadAdam(arrays(), state=tmp_path, **options | {"ema_decay": 0.9}) as opt:
        assert (opt.steps, opt.state["w"]["step"], opt.state["b"]["step"]) == (8, 8, 1)


def test_a_folder_that_is_open_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    with gpuadam.OffloadAdam(arrays(), state=tmp_path), pytest.raises(ValueError, match="is open"):
        gpuadam.OffloadAdam(arrays(), state=tmp_path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    gpuadam.OffloadAdam(arrays(), state=tmp_path).close()
    os.truncate(tmp_path / "v", 64)
    with pytest.raises(ValueError, match="v should have"):
        gpuadam.OffloadAdam(arrays(), state=tmp_path)


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_disk_without_room_for_the_state_is_left_as_it_was(tmp_path, monkeypatch):
    reserve = folder.reserve
    with monkeypatch.context() as patch:
        patch.setattr(folder, "reserve", lambda path, n: full_disk() if path.name == "v" else reserve(path, n))
        with pytest.raises(OSError, match=r"no file of [\d,]+ bytes can be made: No space left") as raised:
            gpuadam.OffloadAdam(arrays(), state=tmp_path)
    assert raised.value.errno == 28 and list(tmp_path.iterdir()) == []
    gpuadam.OffloadAdam(arrays(), state=tmp_path).close()


@pytest.mark.parametrize("call", ["step", "close"])
def test_a_disk_that_is_full_at_a_mark_leaves_the_state_as_it_was(call, tmp_path, monkeypatch):
    params = arrays()
    opt = gpuadam.OffloadAdam(params, state=tmp_path)
    steps([opt], 1)
    before = {name: array.tobytes() for name, array in params.items()}
    with monkeypatch.context() as patch:
        patch.setattr(folder.json, "dumps", full_disk)
        with pytest.raises(OSError, match="No space left"):
            steps([opt], 1) if call == "step" else opt.close()
    assert before == {name: array.tobytes() for name, array in params.items()}
    opt.close()
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:  # neither locked nor taken for one that was cut short
        assert opt.steps == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.exhaustive
def test_a_forked_process_neither_steps_nor_keeps_nor_deletes_the_folder(tmp_path):
    code = """
import os, sys, numpy as np, gpuadam
params, grads = ({"w": np.ones(3, "f4")} for _ in range(2))
opt = gpuadam.OffloadAdam(params, state=sys.argv[1])
opt.step(grads)
are_ready, go_on = os.pipe(), os.pipe()
if not os.fork():
    if os.fork():  # the other goes on to have the folder's files open
        try:
            opt.step(grads)
        except ValueError as error:
            print("forked" in str(error), flush=True)
        try:
            opt.discard()
        except ValueError as error:
            print("forked" in str(error), flush=True)
        opt.close()
    os.close(go_on[1])
    os.write(are_ready[1], b"x")
    os.read(go_on[0], 1)
    os._exit(0)
os.read(are_ready[0], 1) + os.read(are_ready[0], 1)
opt.step(grads)
try:
    gpuadam.OffloadAdam(params, state=sys.argv[1])
except ValueError as error:
    print("is open" in str(error), flush=True)
opt.close()
with gpuadam.OffloadAdam(params, state=sys.argv[1]) as opt:
    print(opt.steps, flush=True)
os.write(go_on[1], b"xx")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True", "True", "2"], done.stdout + done.stderr


def fail_in_chunk(monkeypatch, number, stage="update"):
    """Let the disk fail at some chunk, if it is the last thing it does."""
    original, calls = getattr(runner.Runner, stage), iter(range(10**6))

    def failing(self, chunk, slot):
        if next(calls) == number:
            raise OSError(5, "the disk has died")
        original(self, chunk, slot)

    monkeypatch.setattr(runner.Runner, stage, failing)


@pytest.mark.parametrize("stage", ["fetch", "update", "store"])
def test_a_step_that_was_cut_short_stops_this_optimizer_and_the_next(stage, tmp_path, monkeypatch):
    params = arrays()
    opt = gpuadam.OffloadAdam(params, state=tmp_path, budget=40_000)
    steps([opt], 1)
    saved = copy.deepcopy({"params": params, **opt.state_dict()})
    with monkeypatch.context() as patch:
        fail_in_chunk(patch, 3, stage)
        with pytest.raises(OSError, match="the disk has died"):
            steps([opt], 1)
    with pytest.raises(ValueError, match=r"cut short.*load_state_dict"):
        steps([opt], 1)
    with pytest.raises(ValueError, match=r"cut short.*load_state_dict"):
        opt.state_dict()
    left = saved | {"steps": 2, "state": {k: dict(s) for k, s in opt.state.items()}}
    with pytest.raises(ValueError, match="the optimizer's own array"):
        opt.load_state_dict(left)
    opt.close()
    with pytest.raises(ValueError, match=r"cut short.*Delete the folder"):
        gpuadam.OffloadAdam(params, state=tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with gpuadam.OffloadAdam(params, state=tmp_path) as opt:  # what the error says mends it
        checkpoint = opt.state_dict() | {"steps": 1}
        checkpoint["state"] = {k: s | {"step": int(s["step"])} for k, s in saved["state"].items()}
        opt.load_state_dict(checkpoint)
        for name, array in saved["params"].items():
            params[name][...] = array
        expected = arrays()
        adam = gpuadam.Adam(expected)
        steps([adam], 1)
        steps([adam, opt], 1, start=5)
        assert_same_state(opt, adam, params, expected)


def test_state_that_a_stop_of_the_machine_may_have_torn_is_refused(tmp_path, monkeypatch):
    params = arrays()
    opt = gpuadam.OffloadAdam(params, state=tmp_path)
    steps([opt], 1)
    opt.flush()
    steps([opt], 1)
    unflushed = (tmp_path / "steps.json").read_text()
    opt.close()
    monkeypatch.setattr(folder, "_boot", lambda: "the next day")
    gpuadam.OffloadAdam(params, state=tmp_path).close()
    (tmp_path / "steps.json").write_text(unflushed)
    with pytest.raises(ValueError, match=r"not flushed before the machine stopped"):
        gpuadam.OffloadAdam(params, state=tmp_path)


def test_errors_come_before_a_byte_or_the_folder_changes(tmp_path):
    params = arrays()
    with gpuadam.OffloadAdam(params, state=tmp_path, budget=40_000) as opt:
        steps([opt], 1)
        before = {name: array.tobytes() for name, array in params.items()}, (tmp_path / "steps.json").read_text()
        bad = [
            ({"u": np.zeros((33, 64), "f4")}, "shape"),
            ({"u": np.zeros((33, 64), "f4").T}, "not C-contiguous"),
            ({"w": params["w"]}, "share memory"),
        ]
        for changed, match in bad:
            with pytest.raises(ValueError, match=match):
                opt.step(arrays(1) | changed)
        with pytest.raises(TypeError, match="int32"):
            opt.step(arrays(1) | {"u": np.zeros((64, 33), "i4")})
        with pytest.raises(TypeError, match="no streams"):
            opt.step(arrays(1), stream=5)
        assert before == ({name: array.tobytes() for name, array in params.items()}, (tmp_path / "steps.json").read_text())
        steps([opt], 1)


REFUSED = {
    "capturable": ({"capturable": True}, ValueError, "cannot be capturable"),
    "budget": ({"budget": 0}, ValueError, "budget=0"),
    "budget as text": ({"budget": "1GB"}, TypeError, "must be a number of bytes, such as"),
    "state": ({"state": 5}, TypeError, 'must be "memory" or the path'),
    "update": ({"update": "gpu"}, ValueError, "'auto', 'device', 'host'"),
    "master": ({"master": "float64"}, ValueError, "'float32', 'remainder'"),
    "two copies": ({"master": "float32", "param_copies": arrays()}, ValueError, "leave param_copies out"),
    "rounding with a master": (
        {"master": "float32", "stochastic_rounding": True},
        ValueError,
        "leave stochastic_rounding out",
    ),
    "strides": ({"params": np.zeros((3, 4), "f4").T}, ValueError, "not C-contiguous"),
    "unknown": ({"momentum": 0.9}, TypeError, "momentum"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_argument_is_refused(what, tmp_path):
    options, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        gpuadam.OffloadAdam(**{"params": arrays(), "state": tmp_path} | options)
    assert not list(tmp_path.iterdir())


def test_an_update_on_a_gpu_that_is_not_there_is_refused():
    if any(name != "numba-cpu" for name in gpuadam.available_backends()):
        pytest.skip("there is a GPU")
    with pytest.raises(gpuadam.BackendUnavailableError, match=r"update='device' needs a GPU.*doctor"):
        gpuadam.OffloadAdam(arrays(), update="device")
    assert "no backend for a GPU is available" in gpuadam.OffloadAdam(arrays()).describe()


def test_a_budget_that_is_too_small_is_named_with_what_is_needed(tmp_path):
    with (
        gpuadam.OffloadAdam(arrays(), state=tmp_path, budget=100) as opt,
        pytest.raises(ValueError, match="768 is the least for these arrays"),
    ):
        steps([opt], 1)


@pytest.mark.parametrize("place", ["files", "memory"])
def test_a_closed_optimizer_says_so_and_copies_are_refused(tmp_path, place):
    opt = gpuadam.OffloadAdam(arrays(), state=tmp_path if place == "files" else "memory")
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(opt)
    opt.close()
    opt.close()
    for call in (
        lambda: steps([opt], 1),
        opt.flush,
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.save(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert opt.steps == 0


def test_a_closed_optimizer_discards_nothing(tmp_path):
    first = gpuadam.OffloadAdam(arrays(), state=tmp_path / "s")
    first.close()
    with gpuadam.OffloadAdam(arrays(), state=tmp_path / "s") as second:
        before = sorted(path.name for path in (tmp_path / "s").iterdir())
        with pytest.raises(ValueError, match="closed"):
            first.discard()
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == before
        second.discard()
    assert not (tmp_path / "s").exists()


def test_a_lock_file_is_deleted_while_it_is_locked(tmp_path, monkeypatch):
    opt, was_there = gpuadam.OffloadAdam(arrays(), state=tmp_path / "s"), []
    unlock = folder.unlock
    monkeypatch.setattr(folder, "unlock", lambda file: (was_there.append((tmp_path / "s" / "lock").exists()), unlock(file)))
    opt.discard()
    assert was_there == [False]


@pytest.mark.parametrize("n_deleted", range(5))  # of steps.json, state.json, m, v and the lock
def test_a_discard_that_is_cut_short_leaves_a_folder_that_says_so_or_begins_anew(n_deleted, tmp_path, monkeypatch):
    opt, unlink, left = gpuadam.OffloadAdam(arrays(), state=tmp_path), Path.unlink, iter(range(n_deleted))
    steps([opt], 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "unlink", lambda path, **given: full_disk() if next(left, None) is None else unlink(path, **given)
        )
        with pytest.raises(OSError, match="No space left"):
            opt.discard()
    if n_deleted == 1:
        with pytest.raises(ValueError, match=r"steps.json cannot be read.*Delete the folder, make the optimizer anew"):
            gpuadam.OffloadAdam(arrays(), state=tmp_path)
    else:
        with gpuadam.OffloadAdam(arrays(), state=tmp_path) as again:
            assert again.steps == (2 if n_deleted == 0 else 0)


def test_an_optimizer_that_cannot_be_made_leaves_no_folder_of_its_own(tmp_path):
    with pytest.raises(UserWarning, match="does nothing here"):
        gpuadam.OffloadAdam(arrays(), master="float32", state=tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("was_there", [False, True])
def test_a_folder_that_cannot_be_filled_is_left_as_it_was(was_there, tmp_path, monkeypatch):
    place = tmp_path if was_there else tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(folder, "reserve", full_disk)
        with pytest.raises(OSError, match="No space left"):
            gpuadam.OffloadAdam(arrays(), state=place)
    assert list(tmp_path.iterdir()) == []
    gpuadam.OffloadAdam(arrays(), state=place).close()


def test_an_interrupt_in_a_folder_whose_files_cannot_be_deleted_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "reserve", interrupted)
    monkeypatch.setattr(Path, "unlink", full_disk)
    with pytest.raises(KeyboardInterrupt):
        gpuadam.OffloadAdam(arrays(), state=tmp_path)


def test_an_optimizer_that_cannot_be_made_leaves_a_folder_that_was_there(tmp_path, monkeypatch):
    with gpuadam.OffloadAdam(arrays(), state=tmp_path) as opt:
        steps([opt], 2)
    with monkeypatch.context() as patch:
        patch.setattr(gpuadam.OffloadAdam, "_chosen_side", full_disk)
        with pytest.raises(OSError, match="No space left"):
            gpuadam.OffloadAdam(arrays(), state=tmp_path)
    with gpuadam.OffloadAdam(arrays(), state=tmp_path) as opt:
        assert opt.steps == 2


def test_state_goes_from_adam_to_files_and_back(tmp_path):
    expected, params = arrays(), arrays()
    adam = gpuadam.Adam(expected, lr=0.1)
    steps([adam], 2)
    with gpuadam.OffloadAdam(params, lr=0.1, state=tmp_path, budget=40_000) as opt:
        opt.load_state_dict(adam.state_dict())
        for name in params:
            params[name][...] = expected[name]
        steps([adam, opt], 1, start=3)
        assert_same_state(opt, adam, params, expected)
        other = gpuadam.Adam(arrays(), lr=0.1)
        other.load_state_dict(opt.state_dict())
        assert_same_state(other, adam, params, expected)


def test_a_bar_is_shown_if_asked_for(tmp_path, capsys):
    libraries.imported("rich")
    with gpuadam.OffloadAdam(arrays(), state=tmp_path, budget=40_000, progress=True) as opt:
        steps([opt], 1)
    assert capsys.readouterr().out


def test_a_bar_without_rich_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(
        ImportError, match=r'progress=True needs rich.*: pip install "gpuadam\[progress\]", or leave progress'
    ):
        gpuadam.OffloadAdam(arrays(), state=tmp_path / "state", budget=40_000, progress=True)
    assert not (tmp_path / "state").exists()


# The chunk's way: pieces, stages, pages


def job(sizes, copied, n):
    formats = {4: "float32", 2: "bfloat16"}
    kinds = [Operand("", formats[size], True, True, False, "", "", None) for size in sizes]
    view = gpuadam.kernels.view.on_cpu("", np.zeros(0))
    operands = [chunks.PlacedOperand(kind, view, None, of) for kind, of in zip(kinds, copied, strict=True)]
    return chunks.Job(operands, n, 0, None)


def test_pieces_cover_every_element_once_in_order_and_fit():
    jobs = [job([4, 4, 2], (False, True, True), n) for n in (0, 1, 31, 1000, 5, 33, 4096, 12)]
    for room in (320, 1000, 7777, 10**6):
        seen: dict = {}
        for chunk in chunks.cut(jobs, room):
            assert sum(piece.job.bytes_of(piece.stop - piece.start) for piece in chunk) <= room
            for piece in chunk:
                assert piece.start == seen.get(id(piece.job), 0) and piece.start % 32 == 0 < piece.stop - piece.start
                seen[id(piece.job)] = piece.stop
        assert [seen.get(id(one), 0) for one in jobs] == [one.size for one in jobs]
    assert max(one.least() for one in jobs) <= 320


def test_large_arrays_are_cut_at_the_edges_of_large_pages_and_fill_their_chunks():
    edge, itemsizes = chunks.EDGE, [4, 4, 4, 4]
    cuts = list(chunks.cut([job(itemsizes, (True,) * 4, 10 * edge + 7)], 4 * edge * sum(itemsizes)))
    assert [(piece.start, piece.stop) for chunk in cuts for piece in chunk] == [
        (0, 4 * edge),
        (4 * edge, 8 * edge),
        (8 * edge, 10 * edge + 7),
    ]
    cuts = list(chunks.cut([job(itemsizes, (True,) * 4, n) for n in (1000, 3 * edge)], 2 * edge * sum(itemsizes)))
    assert [[piece.stop for piece in chunk] for chunk in cuts] == [[1000, edge], [3 * edge]]


def test_what_does_not_move_is_one_chunk():
    assert len(list(chunks.cut([job([4, 4], (False, False), n) for n in (10**9, 3, 7)], 1))) == 1


def test_stages_keep_their_order_and_a_slot_is_of_one_chunk_at_a_time():
    log, holding, lock = [], {}, threading.Lock()

    def stage(name):
        def run(chunk, slot):
            with lock:
                log.append((name, chunk))
                if name == "fetch":
                    assert slot not in holding
                    holding[slot] = chunk
                assert holding[slot] == chunk
                if name == "store":
                    del holding[slot]

        return run

    pipeline.run(range(50), stage("fetch"), stage("update"), stage("store"), slots=3)
    for chunk in range(50):
        assert [name for name, own in log if own == chunk] == ["fetch", "update", "store"]
    assert not holding


def test_a_chunk_is_fetched_while_another_is_updated_and_a_third_stored():
    together = threading.Barrier(3, timeout=20)  # breaks unless all three stages are in it at once

    def stage(at_chunk):
        return lambda chunk, slot: together.wait() if chunk == at_chunk else None

    pipeline.run(range(3), stage(2), stage(1), stage(0), slots=3)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_a_stage_is_raised_and_no_thread_is_left(stage, error):
    fetched = []

    def fails(chunk, slot):
        if chunk == 2:
            raise error("here")

    functions = [lambda chunk, slot: fetched.append(chunk), *[lambda chunk, slot: None] * 2]
    functions[stage] = fails
    with pytest.raises(error, match="here"):
        pipeline.run(range(1000), *functions, slots=3)
    assert len(fetched) < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpuadam chunks")]


def test_pages_that_are_dropped_keep_what_was_written(tmp_path):
    array = np.memmap(tmp_path / "file", np.uint8, "w+", shape=(1 << 20,))
    part = mapped.mapping_of(np.asarray(array)[5:].reshape(-1))
    start = array.ctypes.data
    part.populate(start + 5, start + 300_000, writes=True)
    array[:] = 7
    part.drop(start + 5, start + 300_000)
    assert (array == 7).all()


def test_an_older_system_has_its_pages_touched_instead(tmp_path, monkeypatch):
    array = np.memmap(tmp_path / "file", np.uint8, "w+", shape=(1 << 20,))
    monkeypatch.setattr(mapped, "POPULATE", {False: 9999, True: 9999})
    mapped.mapping_of(array).populate(array.ctypes.data, array.ctypes.data + array.size, writes=True)


def test_a_private_map_is_ordinary_memory(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    assert mapped.mapping_of(np.memmap(tmp_path / "file", np.uint8, "c")) is None
    assert mapped.mapping_of(np.memmap(tmp_path / "file", np.uint8, "r")) is not None
    assert mapped.mapping_of(np.zeros(3)) is None


LIMITED = """
import json, resource, sys
import numpy as np
import gpuadam
from gpuadam.offload.mapped import drop_mapped

def held(which):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(which))

n, budget, folder = 25_000_000, 20_000_000, sys.argv[1]
block = np.random.default_rng(0).standard_normal(1 << 20).astype("f4")
param, grad = (np.memmap(f"{folder}/{name}", np.float32, "w+", shape=(n,)) for name in ("param", "grad"))
for start in range(0, n, block.size):
    grad[start : start + block.size] = block[: n - start]
    drop_mapped([grad])
gpuadam.OffloadAdam(np.zeros(9, "f4")).step(np.ones(9, "f4"))  # compiles
with gpuadam.OffloadAdam(param, state=f"{folder}/state", budget=budget) as opt:
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = held("VmRSS")
    opt.step(grad)
    opt.step(grad)
    peak = held("VmHWM")
    state = sum(opt.state["0"][name].nbytes for name in "mv")
    same = []
    for start in (0, 12_345_664, n - 1000):
        p, m, v = (np.zeros(1000, "f4") for _ in range(3))
        for step in (1, 2):
            gpuadam.adam_step(p, grad[start : start + 1000], m, v, step)
        same.append(all((a == b[start : start + 1000]).all() for a, b in ((p, param), (m, opt.state["0"]["m"]))))
print(json.dumps({"state": state, "budget": budget, "more": peak - before, "same": same}))
"""


@pytest.mark.parametrize("budget, stays", [(1 << 20, True), (1 << 17, False)])
def test_parameters_and_state_that_all_fit_in_the_budget_stay_in_memory_between_steps(budget, stays, tmp_path, monkeypatch):
    """Gradients are let go in any case: the next ones may lie elsewhere. Half of the parameters would fit in either budget."""
    params, grads = (in_files(arrays(seed, {"a": (9000,), "b": (9000,)}), tmp_path / str(seed)) for seed in range(2))
    dropped = set()
    drop = mapped.Mapping.drop
    monkeypatch.setattr(mapped.Mapping, "drop", lambda own, start, end: (dropped.add(own.start), drop(own, start, end)))
    gradients = {mapped.mapping_of(grad).start for grad in grads.values()}
    with gpuadam.OffloadAdam(params, state=tmp_path / "state", budget=budget, update="host") as opt:
        for of_step in (grads | {"b": None}, grads | {"a": None}, grads):
            dropped.clear()
            opt.step(of_step)
            assert dropped & gradients
        assert (dropped <= gradients) == stays
        dropped.clear()
    state = {mapped.mapping_of(opt.state["a"][key]).start for key in "mv"}
    assert state | {mapped.mapping_of(param).start for param in params.values()} <= dropped  # by close


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_ten_times_the_budget_of_state_is_updated_within_the_budget(tmp_path):
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}  # no parallel loop has to be compiled
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"] == 10 * found["budget"] and all(found["same"])
    assert found["more"] < found["budget"] + 8_000_000, found  # what Python and the threads' stacks take


@pytest.mark.skipif(sys.platform != "linux", reason="the limit by calls is by those of Linux")
@pytest.mark.exhaustive
def test_the_benchmark_compares_its_bits_and_writes_its_rows(tmp_path):
    libraries.imported("rich")
    script = Path(__file__).parent.parent / "benchmarks" / "offload.py"
    environment = os.environ | {"TMPDIR": str(tmp_path), "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, script, "--backend", "numba-cpu", "--sizes", "0.003/0.01", "--seconds", "0", "--json", "-"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    limits = ["read and write calls", "small read and write calls", "mapped, no arithmetic"]
    names = ["gpuadam.OffloadAdam.step", *(f"limit: {name}" for name in limits)]
    assert [row["contender"] for row in rows] == names and all(row["samples"] == 3 for row in rows)
    assert "\n0 different bytes" in done.stderr
    (tmp_path / "rows.json").write_text(done.stdout)
    report = [sys.executable, script.with_name("report.py")]
    subprocess.run([*report, "merge", tmp_path / "rows.csv", tmp_path / "rows.json"], check=True)
    summary = subprocess.run([*report, "summary", tmp_path / "rows.csv"], capture_output=True, text=True, check=True).stdout
    assert all(name in summary for name in (names[0], names[1], names[3]))
