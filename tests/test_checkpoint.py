"""Checkpoints: training goes on bit for bit, what does not fit is refused by name, and the file is what its page says."""

import copy
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import libraries
import numpy as np
import pytest
from cases import few

import gpuadam
from gpuadam import groups
from gpuadam.checkpoint import stored
from gpuadam.kernels import array_bytes
from gpuadam.testing import unchanged

ml_dtypes = libraries.imported("ml_dtypes", reason="ml_dtypes, which has NumPy's bfloat16, is not installed")
BF16 = np.dtype(ml_dtypes.bfloat16)


def params(dtype="f4", shapes=None):
    rng = np.random.default_rng(0)
    shapes = shapes or {"w": (33, 5), "s": (), "e": (0, 3), "b": (70,)}
    return {name: np.array(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def grads(like, seed):
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(p.shape)).astype(p.dtype) for name, p in like.items()}


def copies(arrays):
    return {name: a.copy(order="K") for name, a in arrays.items()}


def content(opt):
    """Every bit and count of an optimizer."""
    states = {
        name: {key: x if type(x) is int else (np.asarray(x).dtype.str, np.asarray(x).tobytes()) for key, x in state.items()}
        for name, state in opt.state.items()
    }
    settings = [{key: value for key, value in g.items() if key not in ("params", "lr")} for g in opt.groups]
    return type(opt), opt.steps, states, settings, opt.options


# name -> (class, dtype of the parameters, options)
FORMS = {
    "float32": (gpuadam.AdamW, "f4", {"eps": 1e-7, "maximize": True}),
    "float64": (gpuadam.Adam, "f8", {}),
    "bfloat16 state": (gpuadam.Adam, "f4", {"state_dtype": "bfloat16", "seed": 2**63 + 5}),
    "8-bit state": (gpuadam.Adam, "f4", {"state_dtype": "8bit", "seed": -3}),
    "amsgrad": (gpuadam.Adam, "f4", {"amsgrad": True}),
    "a remainder": (gpuadam.Adam, BF16, {"master": "remainder"}),
    "random rounding": (gpuadam.Adam, BF16, {"stochastic_rounding": True, "seed": np.int64(7)}),
    "a running mean": (gpuadam.Adam, "f4", {"ema_decay": np.float32(0.9)}),
    "nadam": (gpuadam.NAdam, "f4", {}),
    "radam": (gpuadam.RAdam, "f4", {}),
    "adamax": (gpuadam.AdaMax, "f4", {}),
    "capturable": (gpuadam.AdamW, "f4", {"capturable": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_bit_for_bit(form, tmp_path):
    make, dtype, options = FORMS[form]
    straight_params = params(dtype)
    straight = make(straight_params, lr=0.01, **options)
    first_params = copies(straight_params)
    first = make(first_params, lr=0.01, **options)

    def run(opt, own, steps):
        for step in steps:
            given = grads(own, step)
            if step == 1 and form != "capturable":
                given["b"] = None  # so that step counts differ
            opt.step(given)

    run(straight, straight_params, range(6))
    run(first, first_params, range(3))
    first.save(tmp_path / "adam.safetensors")
    again_params = copies(first_params)
    again = gpuadam.load(tmp_path / "adam.safetensors", again_params)
    assert content(again)[:4] == content(first)[:4]
    run(again, again_params, range(3, 6))
    assert content(again)[:4] == content(straight)[:4]
    assert all(again_params[name].tobytes() == straight_params[name].tobytes() for name in again_params)


def test_groups_keep_their_hyperparameters(tmp_path):
    p = params()
    groups = [
        {"params": {"w": p["w"], "s": p["s"]}, "lr": 0.25, "betas": (0.5, 0.75)},
        {"params": {"e": p["e"], "b": p["b"]}, "weight_decay": 0.5, "amsgrad": True},
    ]
    opt = gpuadam.AdamW(groups, lr=0.125)
    opt.groups[1]["eps"] = np.float64(1e-3)
    opt.save(tmp_path / "a")
    again = gpuadam.load(tmp_path / "a", [{"params": g["params"]} for g in groups])
    assert content(again) == content(opt)
    assert [g["lr"] for g in again.groups] == [0.25, 0.125] and again.groups[1]["eps"] == 1e-3


@pytest.mark.parametrize("shape_of", [lambda p: p["w"], lambda p: [p["w"], p["b"]], lambda p: iter(p.values()), dict])
def test_params_come_in_any_form_that_adam_takes(shape_of, tmp_path):
    opt = gpuadam.Adam(shape_of(params()))
    opt.state["w" if shape_of is dict else "0"]["v"][...] = 3
    opt.save(tmp_path / "a")
    assert content(gpuadam.load(tmp_path / "a", shape_of(params()))) == content(opt)


ORDERS = {
    "F order": lambda x: np.asfortranarray(x),
    "strided": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "backwards": lambda x: x[::-1],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("chunk", [8, 1 << 22])
def test_any_order_of_memory_comes_back(order, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(array_bytes, "CHUNK", chunk)
    w = ORDERS[order](params()["w"])
    opt = gpuadam.Adam({"w": w})
    opt.state["w"]["m"][...] = np.arange(w.size).reshape(w.shape)
    opt.save(tmp_path / "a", with_params=True)
    other = np.zeros_like(w, order="C")
    again = gpuadam.load(tmp_path / "a", {"w": other}, with_params=True)
    assert (again.state["w"]["m"] == opt.state["w"]["m"]).all() and (other == w).all()
    back = ORDERS[order](np.zeros(w.shape, "f4"))
    gpuadam.load(tmp_path / "a", {"w": back}, with_params=True)
    assert (back == w).all()


def test_parameters_are_left_alone_unless_asked_for(tmp_path):
    p = params()
    gpuadam.Adam(p).save(tmp_path / "a", with_params=True)
    zeros = {name: np.zeros_like(a) for name, a in p.items()}
    gpuadam.load(tmp_path / "a", zeros, with_params=False)
    assert not any(a.any() for a in zeros.values())
    gpuadam.load(tmp_path / "a", zeros, with_params=True)
    assert all(zeros[name].tobytes() == p[name].tobytes() for name in p)


def test_bfloat16_parameters_come_back_as_bits(tmp_path):
    p = params(BF16)
    gpuadam.Adam(p).save(tmp_path / "a", with_params=True)
    zeros = {name: np.zeros(a.shape, "u2") for name, a in p.items()}
    bits = {name: gpuadam.Bits(a, "bfloat16") for name, a in zeros.items()}
    gpuadam.load(tmp_path / "a", bits, with_params=True)
    assert all(zeros[name].tobytes() == p[name].tobytes() for name in p)


def test_a_callable_learning_rate_is_given_again(tmp_path):
    gpuadam.Adam(params(), lr=lambda step: 0.1 / step).save(tmp_path / "a")
    with pytest.raises(gpuadam.CheckpointError, match="group 0 was a callable, which is not saved: give lr="):
        gpuadam.load(tmp_path / "a", params())

    def schedule(step):
        return 0.2

    assert gpuadam.load(tmp_path / "a", params(), lr=schedule).groups[0]["lr"] is schedule
    assert gpuadam.load(tmp_path / "a", params(), lr=0.5).groups[0]["lr"] == 0.5
    of_group = gpuadam.load(tmp_path / "a", [{"params": params(), "lr": schedule}])
    assert of_group.groups[0]["lr"] is schedule


def test_a_given_learning_rate_goes_before_the_saved_one(tmp_path):
    p = params()
    groups = [{"params": {"w": p["w"]}, "lr": 0.25}, {"params": {"b": p["b"]}}]
    gpuadam.Adam(groups, lr=0.5).save(tmp_path / "a")
    assert [g["lr"] for g in gpuadam.load(tmp_path / "a", groups).groups] == [0.25, 0.5]
    assert [g["lr"] for g in gpuadam.load(tmp_path / "a", groups, lr=[None, 1.0]).groups] == [0.25, 1.0]
    assert [g["lr"] for g in gpuadam.load(tmp_path / "a", groups, lr=2.0).groups] == [2.0, 2.0]
    with pytest.raises(ValueError, match="lr has 1 entries for 2 groups"):
        gpuadam.load(tmp_path / "a", groups, lr=[1.0])


def test_the_saved_rate_is_written_into_an_array_for_captured_graphs(tmp_path):
    opt = gpuadam.Adam(params(), lr=np.array([0.25]), capturable=True)
    opt.save(tmp_path / "a")
    assert gpuadam.load(tmp_path / "a", params()).groups[0]["lr"] == 0.25
    lr = np.array([9.0])
    again = gpuadam.load(tmp_path / "a", params(), lr=lr)
    assert again.groups[0]["lr"] is lr and lr[0] == 0.25


def test_copies_have_to_be_given_again(tmp_path):
    p = params()
    gpuadam.Adam(p, param_copies={name: a.astype("f2") for name, a in p.items()}).save(tmp_path / "a")
    with pytest.raises(gpuadam.CheckpointError, match=r"\['w', 's', 'e', 'b'\] had copies: give param_copies="):
        gpuadam.load(tmp_path / "a", p)
    gpuadam.load(tmp_path / "a", p, param_copies=dict.fromkeys(p))
    gpuadam.load(tmp_path / "a", p, param_copies={name: a.astype("f2") for name, a in p.items()})


MISFITS = {
    "a name less": (
        lambda p: {n: p[n] for n in "wse"},
        r"differ: only it has \['b'\].* saved, and then use opt.remove\('b'\)$",
    ),
    "a name more": (lambda p: p | {"c": p["b"].copy()}, r"it lacks \['c'\].* saved, and then use opt.add\('c', param\)$"),
    "another name": (
        lambda p: {"v": p["w"], "s": p["s"], "e": p["e"], "b": p["b"]},
        r"it lacks \['v'\] and only it has \['w'\].* Give names=\{'w': 'v'\} if .*remove\('w'\) and opt.add\('v', param\)$",
    ),
    "a list": (lambda p: list(p.values()), "State belongs to a name, never to a place"),
    "other groups": (
        lambda p: [{"params": {"w": p["w"]}}, {"params": {n: p[n] for n in "seb"}}],
        r"in other groups, .*: they were \['w', 's', 'e', 'b'\] in groups of \[4\]",
    ),
    "another shape": (
        lambda p: p | {"b": p["b"][:3].copy()},
        r"'b' was float32 of shape \[70\], and is float32 of shape \[3\]",
    ),
    "transposed": (lambda p: p | {"w": p["w"].T.copy()}, r"'w' was .* nothing is cast or reshaped"),
    "another dtype": (lambda p: p | {"b": p["b"].astype("f8")}, r"'b' was float32 .*, and is float64"),
    "shared memory": (lambda p: p | {"s": p["w"][0, 0:1].reshape(())}, "does not fit the arguments: .*share memory"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_named(what, tmp_path):
    spoil, match = MISFITS[what]
    gpuadam.Adam(params()).save(tmp_path / "a")
    with pytest.raises(gpuadam.CheckpointError, match=match) as raised:
        gpuadam.load(tmp_path / "a", spoil(params()))
    assert str(tmp_path / "a") in str(raised.value)


SCHEDULED = lambda step: 0.5  # noqa: E731
OTHER_SETTINGS = {
    "weight_decay": (
        {"weight_decay": 0.5},
        "group 0 has weight_decay=0.5, and was saved with weight_decay=0.0: leave it out, and",
    ),
    "betas": ({"betas": [0.5, 0.999]}, r"has betas=\(0.5, 0.999\), .*opt.groups\[0\]\['betas'\] of the loaded optimizer"),
    "a bound": ({"bounds": (None, 1)}, r"has bounds=\(None, 1\), and was saved with bounds=\(-1, 1\)"),
    "amsgrad": ({"amsgrad": True}, "has amsgrad=True, and was saved with amsgrad=False"),
    "a schedule": ({"lr": SCHEDULED}, "group 0 has a callable as lr, and was saved with lr=0.25: give lr= to say which"),
}


@pytest.mark.parametrize("what", OTHER_SETTINGS)
def test_hyperparameters_in_groups_that_are_not_the_saved_ones_are_refused(what, tmp_path):
    settings, match = OTHER_SETTINGS[what]
    gpuadam.Adam(params(), lr=0.25, bounds=(-1, 1)).save(tmp_path / "a")
    for load in (gpuadam.load, gpuadam.load_offload):
        with pytest.raises(gpuadam.CheckpointError, match=match):
            load(tmp_path / "a", [{"params": params(), **settings}])


def test_hyperparameters_in_groups_may_be_the_saved_ones_and_a_number_as_lr_another_one(tmp_path):
    first = {"betas": (0.5, 0.75), "weight_decay": 1, "bounds": [0, None], "maximize": True, "lr": 0.5}
    opt = gpuadam.Adam([{"params": params(), **first}])
    opt.groups[0]["lr"] = 0.125  # as a program does from step to step
    opt.save(tmp_path / "a")
    for given, lr in ((first, 0.125), (first | {"lr": SCHEDULED}, SCHEDULED)):
        again = gpuadam.load(tmp_path / "a", [{"params": params(), **given}], lr=lr if callable(lr) else None)
        assert again.groups[0]["lr"] == lr and again.groups[0]["betas"] == (0.5, 0.75)


def shuffled(opt):
    """Return the state of an optimizer by the names that parameters have after they were renamed."""
    return {name: {key: np.array(x).tobytes() for key, x in state.items()} for name, state in opt.state.items()}


RENAMED = {"w": "layer.w", "s": "e", "e": "s"}


def test_a_renamed_parameter_finds_its_state(tmp_path):
    old = params()
    opt = gpuadam.Adam(old, param_copies={name: a.astype("f2") for name, a in old.items()})
    opt.step(grads(old, 1))
    opt.save(tmp_path / "a", with_params=True)
    now = {RENAMED.get(name, name): np.zeros_like(a) for name, a in old.items()}
    loaded = gpuadam.load(tmp_path / "a", now, with_params=True, names=RENAMED, param_copies=dict.fromkeys(now))
    offloaded = gpuadam.load_offload(tmp_path / "a", now, names=RENAMED, param_copies=dict.fromkeys(now), with_params=False)
    made = gpuadam.Adam(now)
    made.load_state_dict(opt.state_dict(), names=RENAMED)
    expected = {RENAMED.get(name, name): state for name, state in shuffled(opt).items()}
    assert shuffled(loaded) == shuffled(made) == expected == shuffled(offloaded)
    assert all((now[RENAMED.get(name, name)] == a).all() for name, a in old.items())


def test_parameters_of_a_list_get_names_and_long_names_may_become_short_ones(tmp_path):
    old = list(params().values())
    opt = gpuadam.Adam(old)
    opt.step([np.ones_like(a) for a in old])
    opt.save(tmp_path / "a")
    numbers = {str(k): name for k, name in enumerate(params())}
    loaded = gpuadam.load(tmp_path / "a", params(), names=numbers)
    assert list(loaded.state) == list(params()) and list(shuffled(loaded).values()) == list(shuffled(opt).values())
    long = {name: name * 1_000_000 for name in "ab"}
    gpuadam.Adam({name: np.ones(3) for name in long.values()}).save(tmp_path / "b")
    gpuadam.load(tmp_path / "b", {"a": np.ones(3), "b": np.ones(3)}, names={old: new for new, old in long.items()})


BAD_RENAMINGS = {
    "no dict": ([("w", "v")], TypeError, "^names must be a dict of strings, old name of a parameter -> new name, not "),
    "a number": ({"w": 1}, TypeError, "^names must be a dict of strings"),
    "an unknown name": (
        {"v": "w"},
        ValueError,
        r"names has \['v'\], which were not saved. Its keys are old names; there are",
    ),
    "a name of another": ({"w": "b"}, ValueError, r"with names, \['w', 'b'\] would all be named 'b'"),
    "one name twice": ({"w": "v", "b": "v"}, ValueError, r"with names, \['w', 'b'\] would all be named 'v'"),
    "a new name that is not there": ({"w": "v"}, ValueError, r"it lacks \['w'\] and only it has \['v'\]"),
}


@pytest.mark.parametrize("what", BAD_RENAMINGS)
def test_what_is_no_renaming_is_refused(what, tmp_path):
    names, error, match = BAD_RENAMINGS[what]
    opt = gpuadam.Adam(params())
    opt.save(tmp_path / "a")
    calls = [
        lambda: gpuadam.load(tmp_path / "a", params(), names=names),
        lambda: gpuadam.load_sharded(tmp_path / "a", params(), gpuadam.transports.Local(), names=names),
        lambda: opt.load_state_dict(copy.deepcopy(opt.state_dict()), names=names),
    ]
    for call in calls:
        with unchanged(opt=opt), pytest.raises(error, match=match):
            call()


def test_what_is_no_parameter_is_refused_as_by_adam(tmp_path):
    gpuadam.Adam(params()).save(tmp_path / "a")
    for bad in (None, [1.0], "w"):
        with pytest.raises(TypeError, match="params"):
            gpuadam.load(tmp_path / "a", params() | {"w": bad})
    with pytest.raises(ValueError, match="no parameters"):
        gpuadam.load(tmp_path / "a", {})


def test_parameters_that_were_not_saved_are_missed(tmp_path):
    gpuadam.Adam(params()).save(tmp_path / "a")
    with pytest.raises(gpuadam.CheckpointError, match=r"'w.param'.* saved by save\(path, with_params=True\)"):
        gpuadam.load(tmp_path / "a", params(), with_params=True)


def test_every_option_of_the_constructor_is_kept(tmp_path):
    opt = gpuadam.Adam(params(), state_dtype="float64", ema_decay=0.5, zero_grad=np.bool_(True), seed=np.uint8(3))
    not_options = {"self", "params", "param_copies", "backend", *groups.HYPERPARAMETERS}
    assert set(opt.options.saved()) == set(inspect.signature(gpuadam.Adam.__init__).parameters) - not_options
    opt.save(tmp_path / "a")
    assert gpuadam.load(tmp_path / "a", params()).options == opt.options


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path):
    class Own(gpuadam.Adam):
        pass

    with pytest.raises(TypeError, match="Own is not one of Adam, AdamW"):
        Own(params()).save(tmp_path / "a")
    opt = gpuadam.Adam(params())
    opt.groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr=nan"):
        opt.save(tmp_path / "a")
    with pytest.raises(gpuadam.CheckpointError, match="no valid text"):
        gpuadam.Adam({"\udc80": np.ones(2)}).save(tmp_path / "a")
    with pytest.raises(TypeError, match="with_params"):
        gpuadam.Adam(params()).save(tmp_path / "a", with_params="yes")
    assert list(tmp_path.iterdir()) == []


SPOILED = {
    "m is gone": (lambda p, state: state.pop("m"), ValueError, r"params\['w'\] is not as .* made it: it lacks \['m'\]"),
    "step is gone": (lambda p, state: state.pop("step"), ValueError, r"it lacks \['step'\]"),
    "a max_v": (lambda p, state: state.update(max_v=state["v"].copy()), ValueError, r"only it has \['max_v'\]"),
    "an unknown array": (lambda p, state: state.update(x=state["v"].copy()), ValueError, r"only it has \['x'\]"),
    "m in the other byte order": (
        lambda p, state: state.update(m=state["m"].astype(">f4")),
        TypeError,
        r"m of params\['w'\] has dtype float32 in the other byte order \(>f4\); it must be float32",
    ),
    "a remainder in the other byte order": (
        lambda p, state: state.update(remainder=state["remainder"].astype(">i2")),
        TypeError,
        r"remainder of params\['w'\] has dtype int16 in the other byte order",
    ),
    "a parameter in the other byte order": (
        lambda p, state: setattr(p, "dtype", ">f4"),
        TypeError,
        r"^params\['w'\] has dtype float32 in the other byte order",
    ),
}


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype):DeprecationWarning")  # of NumPy 2.5; it can still be done
@pytest.mark.parametrize("what", SPOILED)
def test_state_that_could_not_be_loaded_leaves_the_file_as_it_was(what, tmp_path):
    spoil, error, match = SPOILED[what]
    own = params(BF16 if "remainder" in what else "f4")
    opt = gpuadam.Adam(own, master="remainder" if "remainder" in what else None)
    opt.step(grads(own, 1))
    opt.save(tmp_path / "f", with_params=True)
    before = (tmp_path / "f").read_bytes()
    spoil(own["w"], opt.state["w"])
    with pytest.raises(error, match=match):
        opt.save(tmp_path / "f", with_params=True)
    assert (tmp_path / "f").read_bytes() == before


def test_many_ranks_save_no_state_that_could_not_be_loaded(tmp_path):
    opt = gpuadam.ShardedAdam(params(), gpuadam.transports.Local())
    opt.save(tmp_path / "f")
    before = {file.name: file.read_bytes() for file in (tmp_path / "f").iterdir()}
    opt.shards[0].state["v"] = opt.shards[0].state["v"].astype(">f4")
    with pytest.raises(TypeError, match="other byte order"):
        opt.save(tmp_path / "f")
    del opt.shards[0].state["v"]
    with pytest.raises(ValueError, match=r"it lacks \['v'\]"):
        opt.save(tmp_path / "f")
    assert {file.name: file.read_bytes() for file in (tmp_path / "f").iterdir()} == before


@pytest.mark.parametrize("name", ["", "a.m", "__metadata__", 'quote" \\ back', "größe/層", "\n\0", "x" * 5000])
def test_a_parameter_may_have_any_name(name, tmp_path):
    opt = gpuadam.Adam({name: np.ones(3), "a": np.ones(3)})
    opt.state[name]["m"][:] = 5
    opt.save(tmp_path / "a")
    assert content(gpuadam.load(tmp_path / "a", {name: np.ones(3), "a": np.ones(3)})) == content(opt)


def test_the_file_is_what_its_page_says(tmp_path):
    safetensors = libraries.imported("safetensors", reason="an independent reader of the format")
    opt = gpuadam.AdamW(params(), state_dtype="bfloat16", lr=lambda step: 1.0)
    opt.state["w"]["v"].flat[:3] = [0x3F80, 0x4000, 0x7FC0]
    opt.save(tmp_path / "a", with_params=True)
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        assert set(file.keys()) == {f"{name}.{key}" for name in params() for key in ("m", "v", "param")}
        assert file.get_tensor("w.param").tobytes() == params()["w"].tobytes()
        assert (file.get_slice("w.v").get_dtype(), file.get_slice("w.v").get_shape()) == ("BF16", [33, 5])
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["class"]) == ("gpuadam.optimizer", "1", "AdamW")
    assert json.loads(metadata["groups"])[0] | {"names": 0} == {
        "lr": None, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False,
        "clip_value": None, "bounds": None, "complex": None, "components": 1, "names": 0,
    }  # fmt: skip
    assert json.loads(metadata["params"])["w"] == {"step": 0, "dtype": "float32", "shape": [33, 5]}
    assert json.loads(metadata["options"])["state_dtype"] == "bfloat16"


@pytest.mark.parametrize("what, match", [("metadata", "another program rewrote th"), (None, "are lost. Load")])
def test_a_file_that_another_program_rewrote_is_refused_with_what_happened(what, match, tmp_path):
    numpy = libraries.imported("safetensors.numpy")
    gpuadam.Adam(params()).save(tmp_path / "a")
    with libraries.imported("safetensors").safe_open(tmp_path / "a", "numpy") as file:
        metadata = file.metadata() if what else None
    numpy.save_file(numpy.load_file(tmp_path / "a"), tmp_path / "b", metadata=metadata)
    for load in (gpuadam.load, lambda path, p: gpuadam.load_sharded(path, p, gpuadam.transports.Local())):
        with pytest.raises(gpuadam.CheckpointError, match=match):
            load(tmp_path / "b", params())
    shutil.copy(tmp_path / "a", tmp_path / "b")
    gpuadam.load(tmp_path / "b", params())


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b"1", b'{"__metadata__":1}', b'{"__metadata__":{"x":"y"}}', b"\xff", b"{" * 9]
)
def test_a_file_of_another_kind_is_no_checkpoint(header, tmp_path):
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(gpuadam.CheckpointError, match="it is no checkpoint of gpuadam: its"):
        gpuadam.load(tmp_path / "a", params())


def test_a_rewritten_part_of_a_folder_is_refused_too(tmp_path):
    numpy = libraries.imported("safetensors.numpy")
    gpuadam.ShardedAdam(params(), gpuadam.transports.Local()).save(tmp_path / "a")
    part = next((tmp_path / "a").glob("part-*"))
    numpy.save_file(numpy.load_file(part), part)
    with pytest.raises(gpuadam.CheckpointError, match="another program rewrote it without its metadata"):
        gpuadam.load(tmp_path / "a", params())


def test_payloads_are_aligned_to_their_elements(tmp_path):
    gpuadam.Adam({"w": np.ones(3, "f2"), "x": np.ones(5, "f8")}).save(tmp_path / "a", with_params=True)
    from gpuadam.checkpoint.safetensors import ITEMSIZE, Reader

    with (tmp_path / "a").open("rb") as file:
        assert all(entry.start % ITEMSIZE[entry.dtype] == 0 for entry in Reader(file).tensors.values())


def test_the_file_has_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        gpuadam.Adam(params()).save(tmp_path / "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/real")
    for _ in range(2):  # to nothing yet, then to a file
        gpuadam.Adam(params()).save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "real").is_file()
    gpuadam.load(tmp_path / "link", params())
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["real"]


def test_saving_and_loading_take_a_few_megabytes(tmp_path):
    p = {"w": np.ones((1024, 8192), "f4"), "f": np.ones((1024, 2048), "f4", order="F")}
    opt = gpuadam.Adam(p)
    tracemalloc.start()
    try:
        opt.save(tmp_path / "a", with_params=True)
        saving = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        again = gpuadam.load(tmp_path / "a", p, with_params=True)
        loading = tracemalloc.get_traced_memory()[1] - sum(s[k].nbytes for s in again.state.values() for k in "mv")
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a").stat().st_size > 120e6
    assert saving < 16e6 and loading < 16e6


def test_no_library_is_imported_to_save_and_load(tmp_path):
    code = f"""
    import gpuadam, numpy as np, sys
    w = np.ones(3, "f4")
    gpuadam.Adam(w).save({str(tmp_path / "a")!r})
    gpuadam.load({str(tmp_path / "a")!r}, w)
    print(sorted({{"cupy", "torch", "safetensors", "ml_dtypes", "pickle5"}} & set(sys.modules)))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("character", few(["\U0001f600", "\x01", '"', "\\"], "\x01"))
def test_a_long_name_is_loaded_however_it_is_written_in_json(tmp_path, character):
    p = {character * 500_000: np.ones(1, "f4")}
    opt = gpuadam.Adam(p)
    opt.save(tmp_path / "a", with_params=True)
    assert content(gpuadam.load(tmp_path / "a", p, with_params=True)) == content(opt)


def test_autograd_is_told_of_parameters_that_are_loaded(tmp_path):
    torch = libraries.imported("torch", reason="torch is not installed")
    param = torch.nn.Parameter(torch.ones(3))
    gpuadam.Adam({"w": param}).save(tmp_path / "a", with_params=True)
    loss = (param**2).sum()
    gpuadam.load(tmp_path / "a", {"w": param}, with_params=False)
    version = param._version
    gpuadam.load(tmp_path / "a", {"w": param}, with_params=True)
    assert version == 0 and param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_list_of_names_is_searched_for_each_array_of_a_file(tmp_path):
    class NotSearched(list):
        __contains__ = None

    gpuadam.Adam(params()).save(tmp_path / "a")
    with stored.opened_file(tmp_path / "a", 10**6) as opened:
        for group in opened.saved.groups:
            group["names"] = NotSearched(group["names"])
        opened.arrange(opened.read_headers())
    assert len(opened.pieces) == 2 * len(params())


def test_state_goes_from_every_backend_to_the_cpu_and_back(library, tmp_path):
    p = params()
    on_cpu = gpuadam.Adam(p)
    on_cpu.step(grads(p, 1))
    on_cpu.save(tmp_path / "cpu", with_params=True)
    there = {name: library.array(np.zeros_like(a)) for name, a in p.items()}
    opt = gpuadam.load(tmp_path / "cpu", there, backend=library.name, with_params=True)
    assert all(library.numpy(there[name]).tobytes() == a.tobytes() for name, a in p.items())
    opt.save(tmp_path / "back", with_params=True)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "cpu").read_bytes()
    assert content(gpuadam.load(tmp_path / "back", p, with_params=False)) == content(on_cpu)


@pytest.mark.parametrize("saved, into", [(gpuadam.AdamW, gpuadam.Adam), (gpuadam.Adam, gpuadam.AdamW)])
def test_weight_decay_does_not_become_that_of_the_other_class(saved, into):
    params = [np.ones(3, "f4") for _ in range(2)]
    before, after = saved({"w": params[0]}, weight_decay=0.1), into({"w": params[1]}, weight_decay=0.1)
    before.step({"w": np.ones(3, "f4")})
    state_dict = before.state_dict()
    with pytest.raises(
        ValueError, match=r"the weight decay of the state_dict is .*make an optimizer of the class that was saved"
    ):
        after.load_state_dict(state_dict)
    assert after.steps == 0 and not after.state["w"]["m"].any()
    older = {key: value for key, value in state_dict.items() if key != "decoupled"}  # which does not say
    without = state_dict | {"groups": [group | {"weight_decay": 0.0} for group in state_dict["groups"]]}
    for loadable in (older, without):
        after.load_state_dict(copy.deepcopy(loadable))
        assert after.steps == 1 and (after.state["w"]["m"] == before.state["w"]["m"]).all()
