"""Adam and AdamW: groups, gradients that are missing, schedules, state, and a whole step or nothing."""

import copy
import math
import pickle

import numpy as np
import pytest
from cases import different_bits, form_and_scalars, state

import gpuadam


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((3, 4)).astype("f4"), "b": rng.standard_normal(4).astype("f4")}


def grads(seed=1):
    return params(seed)


def everything(opt):
    """Every byte an optimizer could change."""
    moments = {n: {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in s.items()} for n, s in opt.state.items()}
    return moments, [p.tobytes() for g in opt.groups for p in g["params"]], opt.steps


@pytest.mark.parametrize("make, decoupled", [(gpuadam.Adam, False), (gpuadam.AdamW, True)])
def test_steps_are_those_of_adam_step(library, make, decoupled):
    param, _, m, v, _ = state(1000)
    m[:] = v[:] = 0
    one, other = library.array(param), library.array(param)
    m, v = library.array(m), library.array(v)
    opt = make(one, lr=1e-2, weight_decay=0.1)
    for step in range(1, 6):
        grad = library.array(state(1000, seed=step)[1])
        opt.step(grad)
        gpuadam.adam_step(other, grad, m, v, step, lr=1e-2, weight_decay=0.1, decoupled=decoupled)
    assert different_bits(library.numpy(one), library.numpy(other)) == 0
    assert different_bits(library.numpy(opt.state["0"]["v"]), library.numpy(v)) == 0


def test_adamw_decays_by_default_and_adam_does_not():
    assert gpuadam.AdamW(np.ones(2)).groups[0]["weight_decay"] == 1e-2
    assert gpuadam.Adam(np.ones(2)).groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    "shape_of",
    [
        lambda p: list(p.values()),
        lambda p: tuple(p.values()),
        lambda p: dict(p),
        lambda p: iter(p.values()),
        lambda p: p.values(),
        lambda p: [{"params": [p["w"]]}, {"params": p["b"]}],
        lambda p: [{"params": {"w": p["w"]}, "lr": 1e-3}, {"params": {"b": p["b"]}}],
    ],
)
def test_every_structure_of_params_takes_gradients_of_the_same(shape_of):
    expected, given = params(), params()
    opt = gpuadam.Adam(expected)
    other = gpuadam.Adam(shape_of(given))
    for seed in (1, 2):
        opt.step(grads(seed))
        other.step(
            shape_of(grads(seed)) if not isinstance(shape_of({"w": 0, "b": 0}), list) else _bare(shape_of(grads(seed)))
        )
    for name in expected:
        assert different_bits(given[name], expected[name]) == 0


def _bare(structure):
    """Gradients of groups: a list of what each group's "params" holds."""
    return [g["params"] if isinstance(g, dict) else g for g in structure]


def test_gradients_of_groups_may_be_dicts_with_params():
    p = params()
    opt = gpuadam.Adam([{"params": [p["w"]]}, {"params": [p["b"]], "lr": 0.5}])
    opt.step([{"params": [grads()["w"]]}, {"params": [None]}])
    assert (p["w"] != params()["w"]).all() and (p["b"] == params()["b"]).all()


def test_a_group_has_its_own_hyperparameters_and_they_may_change():
    p = params()
    opt = gpuadam.Adam([{"params": [p["w"]], "lr": 0.0}, {"params": [p["b"]]}], lr=0.1)
    opt.step([[grads()["w"]], [grads()["b"]]])
    assert (p["w"] == params()["w"]).all() and (p["b"] != params()["b"]).all()
    opt.groups[0]["lr"] = 0.1
    opt.step([[grads()["w"]], [grads()["b"]]])
    assert (p["w"] != params()["w"]).all()


def test_none_skips_an_array_and_its_step_count():
    p = params()
    opt = gpuadam.Adam(p)
    opt.step({"w": grads()["w"], "b": None})
    opt.step(grads())
    assert (opt.state["w"]["step"], opt.state["b"]["step"], opt.steps) == (2, 1, 2)
    expected, m, v = params()["b"], np.zeros(4, "f4"), np.zeros(4, "f4")
    gpuadam.adam_step(expected, grads()["b"], m, v, 1)
    assert different_bits(p["b"], expected) == 0


def test_a_callable_lr_is_called_with_the_number_of_the_step():
    called, p = [], params()
    opt = gpuadam.Adam(p, lr=lambda step: called.append(step) or 0.1 / step)
    called.clear()
    opt.step(grads())
    opt.step({"w": None, "b": grads()["b"]})
    assert called == [1, 2]
    with pytest.raises(ValueError, match="lr=-1"):
        gpuadam.Adam(params(), lr=lambda step: -1.0)


def test_grad_scale_divides_a_loss_scale_out():
    one, other = params(), params()
    gpuadam.Adam(one).step(grads())
    gpuadam.Adam(other).step({k: g * 1024 for k, g in grads().items()}, grad_scale=1 / 1024)
    assert all(different_bits(one[k], other[k]) == 0 for k in one)


def test_moments_have_the_order_of_memory_of_their_parameter():
    p = np.asfortranarray(np.ones((3, 5), "f4"))
    opt = gpuadam.Adam([p])
    assert opt.state["0"]["m"].strides == p.strides
    assert gpuadam.Adam([np.ones(10, "f4")[::2]]).state["0"]["m"].flags.c_contiguous


def test_amsgrad_keeps_the_largest_v():
    p = params()
    opt = gpuadam.Adam(p, amsgrad=True, betas=(0.9, 0.5))
    opt.step({k: g * 100 for k, g in grads().items()})
    opt.step({k: g * 0 for k, g in grads().items()})
    assert (opt.state["w"]["max_v"] > opt.state["w"]["v"]).all()


BAD_STEPS = {
    "a wrong shape": (lambda g: g | {"b": g["b"][:3]}, ValueError, r"gradient of params\['b'\] has shape \(3,\)"),
    "a wrong dtype": (lambda g: g | {"b": g["b"].astype("c8")}, TypeError, r"params\['b'\]"),
    "a missing name": (lambda g: {"w": g["w"]}, ValueError, r"names \['w', 'b'\]"),
    "a strange name": (lambda g: g | {"c": g["b"]}, ValueError, "names"),
    "a list": (lambda g: list(g.values()), ValueError, "must be a dict"),
    "an array": (lambda g: g["w"], ValueError, "must be a dict"),
    "nothing": (lambda g: None, ValueError, "must be a dict"),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_one_bad_gradient_stops_the_whole_step(what):
    spoil, error, match = BAD_STEPS[what]
    opt = gpuadam.Adam(params())
    opt.step(grads())
    before = everything(opt)
    with pytest.raises(error, match=match):
        opt.step(spoil(grads()))
    assert everything(opt) == before


@pytest.mark.parametrize(
    "key, value, error",
    [
        ("lr", -1.0, ValueError),
        ("lr", "fast", TypeError),
        ("betas", (), ValueError),
        ("eps", math.nan, ValueError),
        ("eps", 1e-60, ValueError),
        ("weight_decay", -1.0, ValueError),
        ("amsgrad", True, ValueError),
        ("learning_rate", 0.1, ValueError),
    ],
)
def test_one_bad_value_in_a_group_stops_the_whole_step(key, value, error):
    p = params()
    opt = gpuadam.Adam([{"params": [p["w"]]}, {"params": [p["b"]]}])
    opt.groups[1][key] = value
    before = everything(opt)
    with pytest.raises(error):
        opt.step([[grads()["w"]], [grads()["b"]]])
    assert everything(opt) == before


def test_a_gradient_that_is_another_parameter_is_refused():
    p = {"a": np.ones(4, "f4"), "b": np.ones(4, "f4")}
    opt = gpuadam.Adam(p)
    with pytest.raises(ValueError, match="share memory"):
        opt.step({"a": np.ones(4, "f4"), "b": p["a"]})
    assert (p["a"] == 1).all()


def test_one_gradient_for_two_parameters_is_fine():
    p, g = [np.ones(4, "f4"), np.ones(4, "f4")], np.ones(4, "f4")
    gpuadam.Adam(p).step([g, g])
    assert (p[0] == p[1]).all()


w = np.ones((2, 3), "f4")


@pytest.mark.parametrize(
    "given, error, match",
    [
        ([], ValueError, "no parameters"),
        ({}, ValueError, "no parameters"),
        ([{"params": []}], ValueError, "no parameters"),
        ([{"lr": 0.1}], ValueError, 'needs "params"'),
        ([{"params": [w], "learning_rate": 0.1}], ValueError, r"unknown \['learning_rate'\]"),
        ([w, w], ValueError, "are one array"),
        ([w, w[:1]], ValueError, "share memory"),
        ([{"params": [w]}, {"params": [w.T]}], ValueError, "share memory"),
        ({1: w}, TypeError, "must be strings"),
        ([{"params": {"a": w}}, {"params": {"a": w.copy()}}], ValueError, "two parameters are named 'a'"),
        ([w, None], TypeError, "None"),
        ([w, [w]], TypeError, "list"),
        ("w", TypeError, "str"),
        ([{"params": [w], "names": ["a"]}], ValueError, r"unknown \['names'\]"),
        ([w.astype("i4")], TypeError, "int32"),
        ([np.broadcast_to(np.float32(1), (3,))], ValueError, "params"),
    ],
)
def test_bad_parameters_are_refused_at_construction(given, error, match):
    with pytest.raises(error, match=match):
        gpuadam.Adam(given)


def test_state_dict_resumes_bit_for_bit():
    one, other = params(), params()
    straight = gpuadam.AdamW(one, lr=0.01, amsgrad=True)
    for seed in range(6):
        straight.step(grads(seed))
    first = gpuadam.AdamW(other, lr=0.01, amsgrad=True)
    for seed in range(3):
        first.step(grads(seed))
    resumed_params = {k: v.copy() for k, v in other.items()}
    resumed = gpuadam.AdamW(resumed_params, lr=0.5, amsgrad=True)
    resumed.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        resumed.step(grads(seed))
    assert everything(resumed) == everything(straight)
    assert resumed.groups[0]["lr"] == 0.01


def in_groups(arrays, reverse=False):
    """Return three groups by names, of different settings; reverse: they and the names in them in the other order."""
    groups = [{"params": {"w": arrays["w"]}, "lr": 0.1}, {"params": {}}, {"params": dict(arrays), "eps": 0.5}]
    del groups[2]["params"]["w"]
    return [group | {"params": dict(reversed(group["params"].items()))} for group in reversed(groups)] if reverse else groups


@pytest.mark.parametrize("to", ["a state_dict", "a file"])
def test_names_and_groups_may_come_in_another_order(to, tmp_path):
    own = params() | {"c": np.ones(3, "f4")}
    opt = gpuadam.AdamW(in_groups(own))
    opt.step(grads() | {"c": None})
    others = {name: p.copy() for name, p in own.items()}
    if to == "a file":
        opt.save(tmp_path / "a")
        other = gpuadam.load(tmp_path / "a", in_groups(others, reverse=True))
    else:
        other = gpuadam.AdamW(in_groups(others, reverse=True), lr=0.5)
        other.load_state_dict(opt.state_dict())
    for _ in range(2):
        for one in (opt, other):
            one.step(grads(2) | {"c": np.ones(3, "f4")})
    assert [group["names"] for group in other.groups] == [["c", "b"], [], ["w"]]
    settings = [
        [{k: x for k, x in group.items() if k not in ("params", "names")} for group in o.groups] for o in (opt, other)
    ]
    assert settings[1] == settings[0][::-1] and settings[0][0]["lr"] == 0.1
    assert everything(other)[0] == everything(opt)[0] and all(different_bits(own[n], others[n]) == 0 for n in own)


@pytest.mark.filterwarnings("ignore:stochastic_rounding=True does nothing here")  # for these, of float32
@pytest.mark.parametrize(
    "options", [{"stochastic_rounding": True}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}], ids=str
)
def test_another_order_is_refused_where_random_bits_go_by_the_place(options, tmp_path):
    opt, other = gpuadam.Adam(params(), **options), gpuadam.Adam(dict(reversed(params().items())), **options)
    opt.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"another order, by which numbers are rounded randomly: they were \['w', 'b'\]"):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(gpuadam.CheckpointError, match="another order, by which numbers are rounded randomly"):
        gpuadam.load(tmp_path / "a", dict(reversed(params().items())))
    # the order of groups alone is one of parameters too
    opt, other = (gpuadam.Adam(in_groups(params(), reverse), **options) for reverse in (False, True))
    with pytest.raises(ValueError, match="another order, by which numbers"):
        other.load_state_dict(opt.state_dict())


def test_numbers_as_names_are_places():
    opt = gpuadam.Adam([np.ones(3, "f4"), np.zeros(3, "f4")])
    d = opt.state_dict()
    with pytest.raises(ValueError, match="another order where numbers are their names"):
        opt.load_state_dict(d | {"groups": [d["groups"][0] | {"names": ["1", "0"]}]})
    named = gpuadam.Adam({"1": np.ones(3, "f4"), "0": np.zeros(3, "f4")})
    named.load_state_dict(d)  # here somebody has said which is which
    with pytest.raises(ValueError, match="another order where numbers are their names"):
        opt.load_state_dict(named.state_dict())


def test_loading_copies():
    opt, other = gpuadam.Adam(params()), gpuadam.Adam(params())
    opt.step(grads())
    other.load_state_dict(opt.state_dict())
    kept = other.state["w"]["m"].copy()
    opt.step(grads())
    assert (other.state["w"]["m"] == kept).all()


def saved(amsgrad=False):
    opt = gpuadam.Adam(params(), amsgrad=amsgrad)
    opt.step(grads())
    return opt.state_dict()


def renamed(d):
    return d | {"state": {"w": d["state"]["w"], "c": d["state"]["b"]}}


def changed(d, name, **state):
    return d | {"state": d["state"] | {name: d["state"][name] | state}}


@pytest.mark.parametrize("key", ["lr", "betas", "bounds", "params", "names"])
def test_a_setting_that_is_missing_is_named(key):
    opt = gpuadam.Adam(params())
    del opt.groups[0][key]
    for use in (lambda: opt.step(grads()), opt.state_dict):
        with pytest.raises(ValueError, match=rf"a group lacks \['{key}'\]"):
            use()


@pytest.mark.parametrize(
    "spoil, error, match",
    [
        (lambda d: {}, ValueError, "state_dict has"),
        (lambda d: None, ValueError, "state_dict has"),
        (renamed, ValueError, r"names differ: it lacks \['b'\] and only it has \['c'\]"),
        (lambda d: changed(d, "b", m=np.zeros(5, "f4")), ValueError, r"shape \(5,\)"),
        (lambda d: changed(d, "b", m=np.zeros(4, "f8")), ValueError, "dtype float64"),
        (lambda d: changed(d, "b", m=None), TypeError, "None"),
        (lambda d: changed(d, "b", m=[0.0] * 4), TypeError, "list"),
        (lambda d: changed(d, "b", step=-1), ValueError, "step"),
        (lambda d: changed(d, "b", step=0.0), TypeError, "step"),
        (lambda d: d | {"steps": -1}, ValueError, "steps"),
        (lambda d: d | {"groups": ["a"]}, ValueError, "groups"),
        (lambda d: d | {"groups": None}, ValueError, "groups"),
        (lambda d: d | {"state": ["w", "b"]}, ValueError, "state"),
        (lambda d: d | {"groups": [d["groups"][0] | {"params": [0, 1]}]}, ValueError, "params"),
        (lambda d: changed(d, "b", max_v=np.zeros(4, "f4")), ValueError, "state of 'b'"),
        (lambda d: saved(amsgrad=True), ValueError, "amsgrad|state of"),
        (lambda d: d | {"steps": "3"}, TypeError, "steps"),
        (lambda d: d | {"groups": [d["groups"][0] | {"lr": -1}]}, ValueError, "lr"),
        (lambda d: d | {"groups": [d["groups"][0] | {"lr": None}]}, ValueError, "callable"),
        (lambda d: d | {"groups": []}, ValueError, "in other groups.*groups of \\[\\]"),
        (lambda d: d | {"groups": d["groups"] * 2}, ValueError, "in other groups.*groups of \\[2, 2\\]"),
        (lambda d: d | {"groups": [d["groups"][0] | {"names": ["w", "w"]}]}, ValueError, "in other groups"),
        (lambda d: d | {"groups": [d["groups"][0] | {"names": ["w", 1]}]}, ValueError, "list of strings"),
        (lambda d: d | {"groups": [d["groups"][0] | {"names": "wb"}]}, ValueError, "list of strings"),
    ],
)
def test_a_bad_state_dict_changes_nothing(spoil, error, match):
    opt = gpuadam.Adam(params())
    opt.step(grads(5))
    before = everything(opt), [dict(g) for g in opt.groups]
    with pytest.raises(error, match=match):
        opt.load_state_dict(spoil(saved()))
    assert everything(opt) == before[0]
    assert {k: v for k, v in opt.groups[0].items() if k != "params"} == {
        k: v for k, v in before[1][0].items() if k != "params"
    }


def test_a_read_only_moment_stops_a_load_before_anything_has_changed():
    opt = gpuadam.Adam(params())
    opt.state["b"]["v"].flags.writeable = False
    before = everything(opt)
    with pytest.raises(ValueError, match="v of params\\['b'\\] is read-only"):
        opt.load_state_dict(saved())
    assert everything(opt) == before


def test_loading_moments_that_are_the_optimizers_own():
    opt = gpuadam.Adam(params())
    opt.step(grads())
    before = everything(opt)
    opt.load_state_dict(opt.state_dict())
    assert everything(opt) == before
    crossed = changed(opt.state_dict(), "b", m=opt.state["b"]["v"], v=opt.state["b"]["m"])
    with pytest.raises(ValueError, match="share memory"):
        opt.load_state_dict(crossed)
    assert everything(opt) == before


def test_loaded_step_counts_do_not_wrap():
    opt = gpuadam.Adam(params())
    opt.load_state_dict(changed(saved(), "b", step=np.uint8(255)) | {"steps": np.uint8(255)})
    opt.step(grads())
    assert opt.state["b"]["step"] == 256 and opt.steps == 256


@pytest.mark.parametrize(
    "spoil",
    [
        lambda opt: opt.groups[0]["params"].append(np.ones(2, "f4")),
        lambda opt: opt.groups[0]["params"].pop(),
        lambda opt: opt.groups[0]["names"].reverse(),
        lambda opt: opt.groups.append(dict(opt.groups[0])),
        lambda opt: opt.groups.clear(),
    ],
)
def test_arrays_cannot_be_added_to_groups_later(spoil):
    opt = gpuadam.Adam(params())
    spoil(opt)
    before = everything(opt)
    with pytest.raises(ValueError, match=r"cannot be changed|cannot be added"):
        opt.step(grads())
    assert everything(opt) == before


def test_a_copied_or_pickled_optimizer_goes_on_as_the_first():
    import copy
    import pickle

    opt = gpuadam.Adam(params())
    opt.step(grads())
    others = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    opt.step(grads(2))
    for other in others:
        other.step(grads(2))
        assert everything(other) == everything(opt)


def test_a_shallow_copy_would_share_half_of_an_optimizer_and_is_refused():
    own = params()
    opt = gpuadam.AdamW(own)
    opt.step(grads(1))
    with pytest.raises(
        TypeError, match=r"copy.copy of this AdamW .*: use copy.deepcopy\(optimizer\), or copy.deepcopy\(\(params"
    ):
        copy.copy(opt)
    theirs, other = copy.deepcopy((own, opt))
    other.step(grads(2))
    opt.step(grads(2))
    assert all(different_bits(theirs[name], own[name]) == 0 for name in own)
    with pytest.raises(TypeError, match="an OffloadAdam is not copied"):
        copy.copy(gpuadam.OffloadAdam(params()))


def test_a_schedule_is_not_state():
    opt = gpuadam.Adam(params(), lr=lambda step: 0.1)
    d = opt.state_dict()
    assert d["groups"][0]["lr"] is None
    opt.load_state_dict(d)
    assert callable(opt.groups[0]["lr"])


def test_no_kernel_is_compiled_again_for_the_second_step():
    from gpuadam.kernels import adam
    from gpuadam.kernels.cpu_backend import backend as numba_cpu

    opt = gpuadam.Adam(params(), lr=lambda step: 0.1 / step)
    opt.step(grads())
    form, _ = form_and_scalars("adam", "float32")
    kernel, count = numba_cpu.build(adam, form, "serial"), numba_cpu.build.cache_info().currsize
    signatures = len(kernel.signatures)
    opt.step(grads())
    assert numba_cpu.build.cache_info().currsize == count and len(kernel.signatures) == signatures > 0


def test_the_backend_in_use_when_the_optimizer_was_made_stays_in_use():
    with gpuadam.use_backend("numba-cpu"):
        opt = gpuadam.Adam(params())
    with gpuadam.use_backend("cupy"):
        opt.step(grads())


def test_what_a_dtype_cannot_hold_is_refused_at_construction_and_on_loading():
    with pytest.raises(ValueError, match="eps=1e-60 rounds to 0 in float32"):
        gpuadam.Adam(params(), eps=1e-60)
    gpuadam.Adam(np.ones(3), eps=1e-60)
    opt = gpuadam.Adam(params())
    d = saved()
    d["groups"][0]["eps"] = 1e-60
    with pytest.raises(ValueError, match="eps=1e-60 rounds to 0 in float32"):
        opt.load_state_dict(d)


@pytest.mark.parametrize("make", [gpuadam.AdamW, lambda p: gpuadam.ShardedAdam(p, gpuadam.transports.Local())])
@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"])
def test_a_hyperparameter_is_no_attribute_that_would_have_no_effect(make, name):
    opt = make(np.ones(3, "f4"))
    with pytest.raises(
        AttributeError, match=rf"{name} belongs to a group of parameters: read or set groups\[0\]\['{name}'\]"
    ):
        setattr(opt, name, 0.5)
    assert not hasattr(opt, name)


@pytest.mark.parametrize("key", ["m", "step"])
@pytest.mark.parametrize("make", [gpuadam.Adam, gpuadam.OffloadAdam])
def test_what_was_taken_out_of_the_state_is_named(make, key):
    p = params()
    opt = make(p)
    opt.step(grads(1))
    state_dict, before = copy.deepcopy(opt.state_dict()), p["w"].copy()
    del opt.state["w"][key]
    for call in (
        lambda: opt.step(grads(2)),
        lambda: opt.state_dict(),
        lambda: opt.load_state_dict(state_dict),
        lambda: opt.replace("w", p["w"].copy(), range(len(p["w"]))),
    ):
        with pytest.raises(ValueError, match=rf"the state of params\['w'\] is not as .* made it: it lacks \['{key}'\]"):
            call()
    assert different_bits(p["w"], before) == 0
    assert "2 parameters" in repr(opt)


def test_a_key_error_of_a_schedule_is_its_own():
    opt = gpuadam.Adam(params())
    opt.groups[0]["lr"] = {}.__getitem__
    with pytest.raises(KeyError, match="1"):
        opt.step(grads(1))


def test_another_dict_in_the_place_of_a_state_is_refused():
    opt = gpuadam.Adam(params())
    for copied in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        for change in (
            lambda state: state.__setitem__("w", dict(state["w"])),
            lambda state: state.__setitem__("other", {}),
            lambda state: state.update(w={}),
            lambda state: state.__ior__({"w": {}}),
            lambda state: state.setdefault("other", {}),
            lambda state: state.pop("w"),
            lambda state: state.popitem(),
            lambda state: state.__delitem__("w"),
            lambda state: state.clear(),
        ):
            with pytest.raises(TypeError, match=r"dicts that its steps use.*state\[name\].update\(m=m"):
                change(copied.state)
        copied.state["w"].update(m=np.full((3, 4), 5, "f4"))
        assert copied.state["w"] is copied.parameters["w"].state and copied.state["b"]["step"] == 0
        copied.step(grads())
        assert (copied.state["w"]["m"] > 4).all()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_count_that_is_set_is_followed_or_refused(capturable):
    param = np.ones(3, "f4")
    opt = gpuadam.Adam({"w": param}, lr=0.1, capturable=capturable)
    if capturable:
        opt.state["w"]["step"][...] = 1 << 40
        opt.step({"w": np.ones(3, "f4")})
        opt.state["w"]["step"] = 7
        with pytest.raises(ValueError, match=r"the step of params\['w'\] is counted in an array.*\['step'\]\[\.\.\.\] = n"):
            opt.step({"w": np.ones(3, "f4")})
    else:
        opt.state["w"]["step"] = 1 << 40
        opt.step({"w": np.ones(3, "f4")})
    expected = 1 - 0.1 * 0.1 / np.sqrt(1e-3)  # nothing is corrected
    np.testing.assert_allclose(param, expected, rtol=1e-5)


def test_a_count_that_is_an_integer_of_numpy_does_not_wrap():
    opt = gpuadam.Adam({"w": np.ones(3, "f4")})
    for count in (np.int32(2**31 - 1), np.uint8(255)):
        opt.state["w"]["step"] = count
        for _ in range(3):
            opt.step({"w": np.ones(3, "f4")})
        assert opt.state["w"]["step"] == int(count) + 3
