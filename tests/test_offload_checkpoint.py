"""Checkpoints of OffloadAdam: Adam goes on from them bit for bit, and OffloadAdam from Adam's."""

import ml_dtypes
import numpy as np
import pytest

import gpuadam
from gpuadam.checkpoint import CheckpointError, saving
from gpuadam.offload import chunks, loading, mapped

ODD = {"w": (301, 77), "empty": (0, 3), "b": (5,), "scalar": (), "u": (64, 33)}
NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1 << 12)


def arrays(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape)).astype(dtype) for name, shape in ODD.items()}


def copies(params):
    return {name: p.copy() for name, p in params.items()}


def train(opt, first, n=2):
    for step in range(first, first + n):
        opt.step(arrays(100 + step) | ({"b": None} if step == 1 else {}))


def assert_same(one, other, params, expected):
    for name in ODD:
        assert params[name].tobytes() == expected[name].tobytes(), name
        assert one.state[name]["step"] == other.state[name]["step"]
        for key in set(one.state[name]) - {"step", "master"}:
            assert one.state[name][key].tobytes() == other.state[name][key].tobytes(), (name, key)
    assert one.steps == other.steps


STATES = {
    "float32": {},
    "AdamW with AMSGrad": {"amsgrad": True, "weight_decay": 0.1, "decoupled": True, "ema_decay": 0.5},
    "bfloat16": {"state_dtype": "bfloat16", "seed": 7, "clip_value": 0.5, "bounds": (-1, None)},
    "8bit": {"state_dtype": "8bit", "seed": 7},
    "a remainder": {"master": "remainder"},
}


def pair(state, tmp_path, where="files"):
    """Return (OffloadAdam, its parameters, Adam or AdamW with the same options, its parameters)."""
    options = STATES[state] | {"lr": 0.1}
    make = gpuadam.AdamW if "decoupled" in options else gpuadam.Adam
    dtype = ml_dtypes.bfloat16 if state == "a remainder" else "float32"
    params, others = arrays(dtype=dtype), arrays(dtype=dtype)
    adam = make(others, **{key: value for key, value in options.items() if key != "decoupled"})
    place = tmp_path / "s" if where == "files" else "memory"
    return gpuadam.OffloadAdam(params, state=place, budget=40_000, **options), params, adam, others


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("where", ["memory", "files"])
def test_adam_goes_on_from_the_checkpoint_of_an_offloadadam(state, where, tmp_path):
    opt, params, adam, others = pair(state, tmp_path, where)
    with opt:
        train(opt, 0)
        train(adam, 0)
        opt.save(tmp_path / "a", with_params=True)
        with pytest.raises(CheckpointError, match="not saved: "):
            opt.save(tmp_path)
    again_params = {name: np.zeros_like(p) for name, p in params.items()}
    again = gpuadam.load(tmp_path / "a", again_params, with_params=True)
    assert type(again) is type(adam) and again.options == adam.options
    train(adam, 2)
    train(again, 2)
    assert_same(again, adam, again_params, others)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("where", ["memory", "files"])
def test_an_offloadadam_goes_on_from_the_checkpoint_of_adam(state, where, tmp_path):
    opt, _, adam, others = pair(state, tmp_path, "memory")
    opt.close()
    train(adam, 0)
    adam.save(tmp_path / "a", with_params=True)
    place = {"state": tmp_path / "new" if where == "files" else "memory", "budget": 40_000}
    params = {name: np.zeros_like(p) for name, p in others.items()}
    with gpuadam.load_offload(tmp_path / "a", params, with_params=True, **place) as again:
        assert again.groups[0]["lr"] == 0.1 and again.decoupled == adam.decoupled
        train(adam, 2, 1)
        train(again, 2, 1)
        assert_same(again, adam, params, others)
    if where == "memory":
        return
    with gpuadam.OffloadAdam(params, lr=0.1, **place, **STATES[state]) as again:  # the folder goes on, too
        train(adam, 3, 1)
        train(again, 3, 1)
        assert_same(again, adam, params, others)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_float32_master_is_saved_as_the_parameter(dtype, tmp_path):
    """The same training three times: with masters in files, as Adam of float32 parameters, and from one to the other."""
    params = arrays(dtype=NARROW[dtype]) | {"b": arrays()["b"]}
    masters = {name: p.astype("f4") for name, p in params.items()}
    narrow = {name: None if name == "b" else np.zeros_like(p) for name, p in params.items()}
    adam = gpuadam.Adam(masters, lr=1e-3, param_copies=narrow)
    place = {"state": tmp_path / "s", "budget": 40_000, "master": "float32"}
    with gpuadam.OffloadAdam(params, lr=1e-3, **place) as opt:
        train(opt, 0)
        train(adam, 0)
        opt.save(tmp_path / "a", with_params=True)
        opt.save(tmp_path / "without")
    # OffloadAdam -> Adam
    again_masters, again_narrow = (
        {n: None if p is None else np.zeros_like(p) for n, p in x.items()} for x in (masters, narrow)
    )
    again = gpuadam.load(tmp_path / "a", again_masters, param_copies=again_narrow, with_params=True)
    train(again, 2)
    # Adam -> OffloadAdam
    adam.save(tmp_path / "b", with_params=True)
    of_adam = {name: np.zeros_like(p) for name, p in params.items()}
    own = {"state": tmp_path / "t", "budget": 40_000, "master": "float32"}
    with gpuadam.load_offload(tmp_path / "b", of_adam, with_params=True, **own) as third:
        for name, p in of_adam.items():
            assert p.tobytes() == (masters if name == "b" else narrow)[name].tobytes(), name
        train(adam, 2)
        train(third, 2)
        for name, master in masters.items():
            assert third.state[name].get("master", of_adam[name]).tobytes() == master.tobytes(), name
    assert_same(again, adam, again_masters, masters)
    assert_same(third, adam, of_adam, narrow | {"b": masters["b"]})
    assert all(again_narrow[n] is None or again_narrow[n].tobytes() == narrow[n].tobytes() for n in ODD)
    # OffloadAdam -> OffloadAdam, whose masters are state, and come without being asked for; the parameters are the caller's
    with gpuadam.load_offload(tmp_path / "without", copies(params), master="float32") as fourth:
        train(fourth, 2)
        for name in set(ODD) - {"b"}:
            assert fourth.state[name]["master"].tobytes() == masters[name].tobytes()


@pytest.mark.parametrize("master", [None, "float32"])
def test_parameters_of_every_backend_are_saved_and_loaded(library, master, tmp_path):
    on_host = arrays(dtype=ml_dtypes.bfloat16)
    params = {name: library.array(p) for name, p in on_host.items()}
    opt = gpuadam.OffloadAdam(params, lr=1e-2, master=master, update="host")
    opt.step({name: library.array(g) for name, g in arrays(1).items()})
    opt.save(tmp_path / "a", with_params=True)
    zeros = {name: library.array(np.zeros_like(p)) for name, p in on_host.items()}
    again = gpuadam.load_offload(tmp_path / "a", zeros, with_params=True, master=master, update="host")
    for one, own in ((opt, params), (again, zeros)):
        one.step({name: library.array(g) for name, g in arrays(2).items()})
        library.synchronize()
        assert one.steps == 2
        on_host |= {f"{name} of {id(one)}": library.numpy(p) for name, p in own.items()}
    for name in ODD:
        found = [on_host[f"{name} of {id(one)}"] for one in (opt, again)]
        assert found[0].tobytes() == found[1].tobytes()
        for key in set(opt.state[name]) - {"step"}:
            assert opt.state[name][key].tobytes() == again.state[name][key].tobytes()


def test_only_parameters_that_are_no_masters_are_told_where_they_are_not_loaded(tmp_path):
    params = {"w": np.ones(3, "f2"), "b": np.ones(3, "f4")}
    gpuadam.OffloadAdam(params, master="float32").save(tmp_path / "without")  # but with the master of w
    gpuadam.load_offload(tmp_path / "without", copies(params), master="float32")
    gpuadam.OffloadAdam(params, master="float32").save(tmp_path / "a", with_params=True)
    with pytest.warns(UserWarning, match="has parameters, which are not loaded"):
        gpuadam.load_offload(tmp_path / "a", copies(params), master="float32")


def test_a_warning_that_is_an_error_leaves_no_folder(tmp_path):
    gpuadam.Adam(arrays()).save(tmp_path / "a", with_params=True)
    with pytest.raises(UserWarning, match="has parameters"):
        gpuadam.load_offload(tmp_path / "a", arrays(), state=tmp_path / "s")
    with pytest.raises(UserWarning, match="does nothing here"):
        gpuadam.load_offload(tmp_path / "a", arrays(), state=tmp_path / "s", master="float32")
    assert not (tmp_path / "s").exists()


def test_a_step_after_loading_notices_a_parameter_that_was_rebound(tmp_path):
    gpuadam.Adam(arrays()).save(tmp_path / "a")
    opt = gpuadam.load_offload(tmp_path / "a", params := arrays())
    params["w"] = params["w"] * 2
    with pytest.raises(ValueError, match="no longer the array that the optimizer updates"):
        opt.step(arrays(1))


def test_state_changes_its_format_on_the_way(tmp_path):
    adam = gpuadam.Adam(arrays(), lr=0.1)
    train(adam, 0)
    adam.save(tmp_path / "a")
    expected = gpuadam.load(tmp_path / "a", arrays(), state_dtype="8bit")
    with gpuadam.load_offload(tmp_path / "a", arrays(), state=tmp_path / "s", state_dtype="8bit") as opt:
        for name in ODD:
            for key in ("m", "v", "m_scale", "v_scale"):
                assert opt.state[name][key].tobytes() == expected.state[name][key].tobytes()


def test_a_checkpoint_of_many_ranks_is_taken(tmp_path):
    sharded = gpuadam.ShardedAdamW(arrays(), gpuadam.transports.Local(), lr=0.1)
    sharded.step(arrays(1))
    sharded.save(tmp_path / "ranks")
    with gpuadam.load_offload(tmp_path / "ranks", arrays()) as opt:
        assert opt.decoupled and opt.steps == 1


def adam_file(make, tmp_path, **options):
    make(arrays(), **options).save(tmp_path / "a")
    return tmp_path / "a"


REFUSED = {
    "another algorithm": (gpuadam.NAdam, {}, {}, CheckpointError, "its class is 'NAdam'"),
    "capturable": (gpuadam.Adam, {"capturable": True}, {}, CheckpointError, "capturable optimizer"),
    "a master that was not saved": (
        gpuadam.Adam,
        {},
        {"narrow": True, "master": "float32"},
        CheckpointError,
        r"not have \['w.param",
    ),
    "no master": (gpuadam.Adam, {}, {"narrow": True}, CheckpointError, "was float32 of shape"),
    "an unknown master": (
        gpuadam.Adam,
        {},
        {"master": "remainder"},
        ValueError,
        "master='remainder' must be one of 'float32'",
    ),
    "a small budget": (gpuadam.Adam, {}, {"budget": 0}, CheckpointError, "budget=0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_leaves_nothing_behind(what, tmp_path):
    make, of_adam, options, error, match = REFUSED[what]
    path = adam_file(make, tmp_path, **of_adam)
    options = dict(options)
    params = arrays(dtype=ml_dtypes.bfloat16 if options.pop("narrow", False) else "float32")
    before = copies(params)
    with pytest.raises(error, match=match):
        gpuadam.load_offload(path, params, state=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
    assert all(params[name].tobytes() == before[name].tobytes() for name in ODD)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_damaged_checkpoint_leaves_no_folder_but_one_that_was_there(was_there, tmp_path):
    adam = gpuadam.Adam(arrays())
    train(adam, 0)
    adam.save(tmp_path / "a")
    damaged = bytearray((tmp_path / "a").read_bytes())
    damaged[-9] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    if was_there:
        (tmp_path / "s").mkdir()
    with pytest.raises(CheckpointError, match="damaged"):
        gpuadam.load_offload(tmp_path / "a", arrays(), state=tmp_path / "s")
    assert (tmp_path / "s").exists() == was_there and not list(tmp_path.glob("s/*"))


def test_parameters_and_state_in_files_leave_the_memory_of_the_process_when_they_are_loaded(tmp_path, monkeypatch):
    gpuadam.Adam({"w": np.ones(1000, "float32")}).save(tmp_path / "a", with_params=True)
    params, dropped = {"w": np.memmap(tmp_path / "w", "float32", "w+", shape=1000)}, set()
    drop = mapped.Mapping.drop
    monkeypatch.setattr(mapped.Mapping, "drop", lambda self, start, end: (dropped.add((start, end)), drop(self, start, end)))
    with gpuadam.load_offload(tmp_path / "a", params, with_params=True, state=tmp_path / "s") as opt:
        arrays_of_one = params["w"], opt.state["w"]["m"], opt.state["w"]["v"]
        assert {(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays_of_one} <= dropped
        assert (params["w"] == 1).all()


def test_narrow_parameters_in_files_leave_the_memory_after_they_got_the_numbers_of_their_masters(tmp_path, monkeypatch):
    gpuadam.Adam({"w": np.ones(1000, "float32")}).save(tmp_path / "a", with_params=True)
    param, found = np.memmap(tmp_path / "w", "float16", "w+", shape=1000), []
    drop = mapped.Mapping.drop

    def noted(self, start, end):
        if start == param.ctypes.data:
            found.append(param[0])
        drop(self, start, end)

    monkeypatch.setattr(mapped.Mapping, "drop", noted)
    options = {"with_params": True, "master": "float32", "state": tmp_path / "s"}
    with gpuadam.load_offload(tmp_path / "a", {"w": param}, **options):
        assert found == [1]


def test_a_folder_with_state_is_not_overwritten(tmp_path):
    path = adam_file(gpuadam.Adam, tmp_path)
    gpuadam.OffloadAdam(arrays(), state=tmp_path / "s").close()
    with pytest.raises(ValueError, match="give another folder, or delete"):
        gpuadam.load_offload(path, arrays(), state=tmp_path / "s")
    gpuadam.OffloadAdam(arrays(), state=tmp_path / "s").close()


def test_a_process_that_is_killed_while_it_loads_leaves_a_folder_that_is_refused(tmp_path, monkeypatch):
    path = adam_file(gpuadam.Adam, tmp_path)
    monkeypatch.setattr(gpuadam.OffloadAdam, "discard", lambda self: None)  # as if nothing more could be done
    monkeypatch.setattr(loading, "fill", lambda opt, *_: (opt.under_way.begin(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        gpuadam.load_offload(path, arrays(), state=tmp_path / "s")
    with pytest.raises(ValueError, match=r"cut short|is open"):
        gpuadam.OffloadAdam(arrays(), state=tmp_path / "s")


def test_a_closed_optimizer_is_not_saved_nor_one_in_the_midst_of_a_step(tmp_path):
    opt = gpuadam.OffloadAdam(arrays(), state=tmp_path / "s")
    opt.under_way.begin()
    with pytest.raises(ValueError, match="cut short"):
        opt.save(tmp_path / "a")
    opt.under_way.end()
    opt.close()
    with pytest.raises(ValueError, match="closed"):
        opt.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_subclass_is_not_saved(tmp_path):
    class Own(gpuadam.OffloadAdam):
        pass

    with pytest.raises(TypeError, match="Own is not one of"):
        Own(arrays()).save(tmp_path / "a")
    assert saving.CLASSES
