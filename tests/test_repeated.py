"""Steps that are as the last one are made in one compiled call: they have the bits of the long way, and miss no change."""

import copy
import dataclasses
import gc
import itertools
import math
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest
from cases import few

import gpuadam
from gpuadam import functional, hyperparameters, repeated, repeated_on_cpu
from gpuadam.kernels import cpu_step, step_objects
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.scalars import on_host, powers_on_host
from gpuadam.repeated import RepeatedGroup
from gpuadam.repeated_on_cpu import RepeatedCall
from gpuadam.step_norms import StepNorms

CLASSES = {
    "Adam": gpuadam.Adam, "AdamW": gpuadam.AdamW, "RAdam": gpuadam.RAdam, "AdaMax": gpuadam.AdaMax, "NAdam": gpuadam.NAdam,
}  # fmt: skip
CLIPPED, NORMS = {"max_norm": 0.5}, {"norms": True}  # options of a step
OPTIONS = [
    {},
    {"amsgrad": True},
    {"ema_decay": 0.9},
    {"zero_grad": True},
    {"clip_value": 0.5},
    {"formula": "optax", "eps_root": 1e-9},
]


def numbers(shape, seed, dtype="f4"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(a, b):
    return a.dtype == b.dtype and a.tobytes("A") == b.tobytes("A")


def long_way(opt):
    """Let every step of an optimizer go the long way."""
    opt._repeated.does = lambda *step: False
    return opt


def everything(opt):
    arrays = [param for group in opt.groups for param in group["params"]]
    states = [(key, value) for state in opt.state.values() for key, value in state.items()]
    return arrays, states, opt.steps


def assert_same(one, other):
    (arrays, states, steps), (theirs, their_states, their_steps) = everything(one), everything(other)
    assert steps == their_steps and all(map(same, arrays, theirs))
    for (key, value), (their_key, their_value) in zip(states, their_states, strict=True):
        assert key == their_key and (same(value, their_value) if isinstance(value, np.ndarray) else value == their_value)


def given(kind, arrays):
    return {"one": arrays[0], "list": arrays, "tuple": tuple(arrays), "dict": {f"w{k}": a for k, a in enumerate(arrays)}}[
        kind
    ]


@pytest.mark.parametrize("kind", ["one", "list", "tuple", "dict"])
@pytest.mark.parametrize("name", few(CLASSES, "Adam", "NAdam"))
def test_repeated_steps_have_the_bits_of_the_long_way(name, kind):
    if name == "NAdam":
        kind = "list"
    pair = []
    for _ in range(2):
        arrays = [numbers((5, 3), 1), np.asfortranarray(numbers((4, 6), 2)), numbers(7, 3)][: 1 if kind == "one" else 3]
        pair.append((CLASSES[name](given(kind, arrays), lr=0.1), arrays))
    grads = [numbers(a.shape, 9 + k) if k != 1 else np.asfortranarray(numbers(a.shape, 9)) for k, a in enumerate(pair[0][1])]
    long_way(pair[1][0])
    for k in range(6):
        for opt, _ in pair:
            opt.groups[0]["lr"] = 0.1 / (k + 1)
            opt.step(given(kind, grads))
        assert_same(pair[0][0], pair[1][0])
    assert pair[0][0]._repeated.ready == (name != "NAdam")  # whose shares only the long way knows


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("dtype", few(["f4", "f8"], "f4"))
def test_so_they_have_with_each_option(options, dtype):
    opts = [gpuadam.AdamW([numbers(33, 1, dtype), numbers(4, 2, dtype)], weight_decay=0.1, **options) for _ in range(2)]
    long_way(opts[1])
    for k in range(5):
        for opt in opts:
            opt.step([numbers(33, k + 10, dtype), numbers(4, k + 20, dtype)])
        assert_same(*opts)
    assert opts[0]._repeated.ready


GROUPS = {  # how gradients of two groups may be given, by how the parameters were
    "dict of all": (dict, lambda of_groups: of_groups[0] | of_groups[1]),
    "dicts": (dict, list),
    "tuple of dicts": (dict, tuple),
    "lists": (lambda group: list(group.values()), lambda of_groups: [list(group.values()) for group in of_groups]),
    "arrays": (
        lambda group: group["w0"] if "w0" in group else [group["w2"]],
        lambda of_groups: [of_groups[0]["w0"], [of_groups[1]["w2"]]],
    ),
}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_so_have_steps_of_one_group_in_a_list(dtype):
    """Such a step is made once: by the call that compares it, or by the launch after that, and not by both."""
    opts = [gpuadam.AdamW([{"params": {"w0": numbers(5, 1, dtype)}}], lr=0.1) for _ in range(2)]
    long_way(opts[1])
    for k in range(6):
        for opt, as_given in zip(opts, (lambda x: x, lambda x: [x]), strict=True):
            opt.step(as_given({"w0": numbers(5, 10 + k, dtype)}))
        assert_same(*opts)
    assert opts[0]._repeated.ready


@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=["minimize", "maximize"])
def test_so_have_steps_with_another_grad_scale_each(options):
    opts = [gpuadam.Adam([numbers(33, 1), numbers(4, 2)], **options) for _ in range(2)]
    long_way(opts[1])
    taken = []
    for k, grad_scale in enumerate([0.5, 0.25, -3.0, 1.0, 1e-20, 0.1, 1e-42, 0.3]):
        for opt in opts:
            opt.step([numbers(33, k + 10), numbers(4, k + 20)], grad_scale=grad_scale)
        assert_same(*opts)
        taken.append(opts[0]._repeated.ready)
    assert taken == [False, *[True] * 5, False, False]  # 1e-42 is subnormal in float32, and the long way's to round


@pytest.mark.parametrize("grad_scale", [2, np.float64(0.5)])
def test_a_grad_scale_of_another_type_is_as_good_as_a_float(grad_scale, calls):
    opts = [gpuadam.Adam(numbers(33, 1)) for _ in range(2)]
    for k in range(4):
        for opt, scale in zip(opts, (grad_scale, float(grad_scale)), strict=True):
            opt.step(numbers(33, k), grad_scale=scale)
    assert_same(*opts)
    assert opts[0]._repeated.ready
    arrays = arrays_of_one()
    for step in range(1, 5):
        gpuadam.adam_step(*arrays, step=step, grad_scale=grad_scale)
    assert calls[-1]
    with pytest.raises(ValueError, match="grad_scale is too large"):
        opts[0].step(numbers(33, 1), grad_scale=10**400)


@pytest.mark.parametrize("options", [CLIPPED, NORMS], ids=["clipped", "norms"])
def test_what_was_known_of_a_step_is_let_go_when_the_next_is_another(options):
    opt, held = gpuadam.Adam([numbers(5, 1), numbers(4, 2)]), []
    for k in range(3):
        grads = [numbers(5, k), numbers(4, k)]
        norms = opt.step(grads, **options)
        held.append(weakref.ref(grads[0]))
    del grads
    assert opt._repeated._further and [ref() for ref in held] == [None] * 3
    held = [weakref.ref(x) for x in norms or ()]
    del norms
    opt.step([numbers(5, 1), None], **options)
    assert opt._repeated._further is None and [ref() for ref in held] == [None] * len(held)


def test_no_gradient_is_kept_alive_by_an_interrupt_of_its_norm(monkeypatch):
    opt = gpuadam.Adam([numbers(5, 1)])
    for k in range(3):
        opt.step([numbers(5, k)], **CLIPPED)
    grad = numbers(5, 9)
    held = weakref.ref(grad)
    monkeypatch.setattr(type(numba_cpu), "norm_of_plan", lambda *plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step([grad], **CLIPPED)
    del grad
    gc.collect()
    assert held() is None


def test_a_grad_scale_that_no_kernel_can_take_is_refused_in_a_repeated_step():
    param, grad = numbers(3, 1), numbers(3, 2)
    opt = gpuadam.Adam(param)
    for _ in range(4):
        opt.step(grad, grad_scale=0.5)
    for wrong, error in ((math.nan, "finite"), (1e39, "overflows"), (1e-60, "rounds to 0")):
        before = param.tobytes()
        with pytest.raises(ValueError, match=error):
            opt.step(grad, grad_scale=wrong)
        assert param.tobytes() == before


CLIPS = {  # options of steps that depend on the norm of the gradients
    "clipped": {"max_norm": 0.5},
    "seldom clipped": {"max_norm": 1e3},
    "clipped and scaled": {"max_norm": 0.5, "grad_scale": 0.125},
    "checked": {"check_finite": True},
    "clipped and checked": {"max_norm": 2.0, "check_finite": True},
    "norms": {"norms": True},
    "norms, scaled": {"norms": True, "grad_scale": 0.125},
    "norms, clipped and scaled": {"norms": True, "max_norm": 0.5, "grad_scale": 0.125},
}


@pytest.mark.parametrize("in_groups", [False, True], ids=["together", "in groups"])
@pytest.mark.parametrize("of", few(["f2", "f4", "f8", "c8", "maximize"], "f4", "c8"))
@pytest.mark.parametrize("options", CLIPS.values(), ids=CLIPS)
def test_so_have_steps_with_norms(options, of, in_groups):
    dtype = "f4" if of == "maximize" else of
    more = {"c8": {"complex": "joint"}, "maximize": {"maximize": True}}.get(of, {})
    shapes, opts = ((5, 3), (0,), (9000,), (2,)), []

    def arrays(seed):
        some = [numbers(shape, seed + k, dtype) for k, shape in enumerate(shapes)]
        if dtype == "c8":
            some = [a + 1j * numbers(a.shape, seed + 10 + k, dtype) for k, a in enumerate(some)]
        return [some[:1], some[1:]] if in_groups else some

    for _ in range(2):
        opts.append(
            gpuadam.AdamW([{"params": part} for part in arrays(1)] if in_groups else arrays(1), weight_decay=0.1, **more)
        )
    long_way(opts[1])
    returned = []
    for k in range(6):
        results = [opt.step(arrays(20 * k + 20), **options) for opt in opts]
        assert_same(*opts)
        assert opts[0]._repeated.ready == (k > 0)
        if "norms" in options:
            returned.append((results[0], [x.item() for x in results[1]]))
            assert [type(x) for x in results] == [StepNorms] * 2 and len({type(x) for x in itertools.chain(*results)}) == 1
        else:
            assert results == [None, None]
    assert all([x.item() for x in ours] == theirs and ours.change > 0 for ours, theirs in returned)  # in arrays of their own


@pytest.mark.parametrize(
    "options",
    [{"check_finite": True}, {"max_norm": 1.0, "check_finite": True}, {"max_norm": 1.0}, {"max_norm": 1.0, "norms": True}],
)
@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38, 0.0])
def test_a_norm_that_is_not_finite_or_0_is_as_ever(options, number):
    opts = [gpuadam.Adam([numbers(9, 1), numbers(4, 2)]) for _ in range(2)]
    long_way(opts[1])
    for k in range(8):
        results = []
        for opt in opts:
            grads = [numbers(9, k), numbers(4, k)]
            if k in (3, 7):
                grads[1][:], grads[0][:] = number, 0.0
            results.append(opt.step(grads, **options))
        assert opts[0].steps == opts[1].steps
        np.testing.assert_array_equal(*(np.array(result, "f8") for result in results))
        assert [a.tobytes() for group in opts[0].groups for a in group["params"]] == [
            a.tobytes() for group in opts[1].groups for a in group["params"]
        ]


@pytest.mark.parametrize("options", [CLIPPED, NORMS], ids=["clipped", "norms"])
def test_steps_with_norms_of_arrays_in_fortrans_order_go_the_long_way(options):
    """The order of a norm is C's."""
    opts, ready = [gpuadam.Adam(np.asfortranarray(numbers((40, 50), 1, "f8"))) for _ in range(2)], []
    long_way(opts[1])
    for k in range(5):
        for opt in opts:
            opt.step(np.asfortranarray(numbers((40, 50), 9 + k, "f8")), **options)
        ready.append(opts[0]._repeated.ready)
        assert_same(*opts)
    assert ready == [False, True, False, False, True]  # the third was found to be another one


def test_norms_of_a_group_without_elements_are_repeated():
    opts = [gpuadam.Adam([{"params": {"a": numbers(5, 1)}}, {"params": {"b": numbers((0, 3), 1)}}]) for _ in range(2)]
    long_way(opts[1])
    for k in range(5):
        ours, theirs = (opt.step([{"a": numbers(5, k)}, {"b": numbers((0, 3), k)}], norms=True) for opt in opts)
        assert list(map(float, ours)) == list(map(float, theirs)) and opts[0]._repeated.ready == (k > 0)


def test_a_step_that_fails_in_the_short_way_is_tried_again_in_the_long_one(monkeypatch):
    opt = gpuadam.Adam([numbers(5, 1)])
    for k in range(3):
        opt.step([numbers(5, k)], **CLIPPED)
    with monkeypatch.context() as patch:
        patch.setattr(type(numba_cpu), "norm_of_plan", lambda *plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.step([numbers(5, 4)], **CLIPPED)
        assert not opt._repeated.ready
    opt.step([numbers(5, 4)], **CLIPPED)
    assert opt.steps == 4


@pytest.mark.parametrize("options", [CLIPPED, NORMS], ids=["clipped", "norms"])
def test_the_order_of_a_norm_is_cs_also_after_steps_in_fortrans_order(options):
    for seed in range(40):  # of which 11 differed while sums went by the strides of the first arrays
        opts, results = [], []
        for to_the_long_way in (lambda opt: opt, long_way):
            param = np.asfortranarray(numbers((40, 50), seed, "f8"))
            opts.append(to_the_long_way(gpuadam.Adam(param, lr=0.1)))
            for k in range(2):
                opts[-1].step(np.asfortranarray(numbers((40, 50), seed + k, "f8")), **options)
            param.resize(2000, refcheck=False)
            opts[-1].state["0"].update(m=numbers(2000, seed + 2, "f8"), v=numbers(2000, seed + 3, "f8") ** 2)
            results.append(opts[-1].step(numbers(2000, seed + 4, "f8"), **options))
        assert_same(*opts)
        np.testing.assert_array_equal(*(np.array(result, "f8") for result in results))


@pytest.mark.parametrize("options", [CLIPPED, NORMS], ids=["clipped", "norms"])
@pytest.mark.parametrize("n", [3, 30])
def test_arrays_of_another_size_in_their_place_are_noticed_in_a_step_with_norms(n, options):
    opts = []
    for to_the_long_way in (lambda opt: opt, long_way):
        params = [numbers(9, 1), numbers(4, 2)]
        opt = to_the_long_way(gpuadam.Adam(params))
        opts.append(opt)
        for k in range(4):
            opt.step([numbers(9, k), numbers(4, k)], **options)
        params[1].resize(n, refcheck=False)
        opt.state["1"].update(m=numbers(n, 4), v=numbers(n, 5) ** 2)
        for k in range(3):
            norms = opt.step([numbers(9, k), numbers(n, k)], **options)
        assert norms is None or norms.param == gpuadam.global_norm(params)
    assert_same(*opts)


@pytest.mark.parametrize("kind", GROUPS)
def test_so_have_steps_of_several_groups(kind):
    as_params, as_grads = GROUPS[kind]

    def of_groups(seed):
        first = {"w0": numbers((5, 3), seed), "w1": np.asfortranarray(numbers((4, 6), seed + 1))}
        return [first, {"w2": numbers(7, seed + 2)}]

    opts = []
    for _ in range(2):
        decayed, plain = map(as_params, of_groups(1))
        opts.append(gpuadam.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": plain, "lr": 0.01}], lr=0.1))
    long_way(opts[1])
    for k in range(6):
        for opt in opts:
            opt.groups[1]["lr"] = 0.1 / (k + 1)
            opt.step(as_grads(of_groups(10 + k)))
        assert_same(*opts)
    assert opts[0]._repeated.ready


def test_so_have_steps_of_groups_of_several_dtypes():
    opts = [gpuadam.Adam([{"params": [numbers(9, 1, dtype)]} for dtype in ("f4", "f8")], lr=0.1) for _ in range(2)]
    long_way(opts[1])
    for k in range(5):
        for opt in opts:
            opt.step([[numbers(9, k, "f4")], [numbers(9, k, "f8")]])
        assert_same(*opts)
    assert opts[0]._repeated.ready


def test_another_threads_step_of_another_dtype_changes_nothing(monkeypatch):
    """The other step comes while the first one is taken over to be repeated, which compiles and so takes long."""
    opts = [gpuadam.Adam(numbers(70_000, 1, "f8"), lr=0.1) for _ in range(2)]
    other = gpuadam.Adam(numbers(3, 1, "f4"), lr=0.1)
    other.repeats = False
    long_way(opts[1])
    plan_of = repeated_on_cpu.plan_of

    def plan_beside_a_step(*args, **kwargs):
        plan = plan_of(*args, **kwargs)
        thread = threading.Thread(target=other.step, args=[numbers(3, 2, "f4")])
        thread.start()
        thread.join()
        return plan

    monkeypatch.setattr(repeated_on_cpu, "plan_of", plan_beside_a_step)
    for k in range(4):
        for opt in opts:
            opt.step(numbers(70_000, k, "f8"))
        assert_same(*opts)
    assert opts[0]._repeated.ready


@pytest.mark.parametrize("in_groups", [False, True])
def test_large_arrays_are_left_to_several_threads(in_groups):
    n = numba_cpu.PARALLEL_FROM + 5

    def as_given(large, small):
        return [[large], [small]] if in_groups else [large, small]

    opts = []
    for _ in range(2):
        params = as_given(numbers(n, 1), numbers(3, 2))
        opts.append(gpuadam.Adam([{"params": group} for group in params] if in_groups else params))
    long_way(opts[1])
    for k in range(5):
        for opt in opts:
            opt.step(as_given(numbers(n, k + 10), numbers(3, k)))
        assert_same(*opts)
    assert opts[0]._repeated.ready


# What may change between two steps: each is done to an optimizer whose steps repeat and to one that goes the long way. Both must
# do the same, or say the same.


def set_in(opt, key, value):
    opt.groups[0][key] = value


def set_state(opt, key, value):
    opt.state["w0"][key] = value


def in_all_places(opt, params, array):
    params["w1"] = opt.groups[0]["params"][1] = array


CHANGES = {
    "another array in all places": lambda opt, p, g: in_all_places(opt, p, numbers(4, 7)),
    "lr nan": lambda opt, p, g: set_in(opt, "lr", math.nan),
    "lr below 0": lambda opt, p, g: set_in(opt, "lr", -1.0),
    "lr -0.0": lambda opt, p, g: set_in(opt, "lr", -0.0),
    "lr infinite": lambda opt, p, g: set_in(opt, "lr", math.inf),
    "lr too large": lambda opt, p, g: set_in(opt, "lr", 1e39),
    "lr an int": lambda opt, p, g: set_in(opt, "lr", 1),
    "lr a callable": lambda opt, p, g: set_in(opt, "lr", lambda step: 0.5 / step),
    "lr a string": lambda opt, p, g: set_in(opt, "lr", "0.1"),
    "betas": lambda opt, p, g: set_in(opt, "betas", (0.5, 0.9)),
    "betas wrong": lambda opt, p, g: set_in(opt, "betas", (0.5, 1.0)),
    "weight_decay": lambda opt, p, g: set_in(opt, "weight_decay", 0.25),
    "eps": lambda opt, p, g: set_in(opt, "eps", 1e-3),
    "maximize": lambda opt, p, g: set_in(opt, "maximize", True),
    "amsgrad": lambda opt, p, g: set_in(opt, "amsgrad", True),
    "clip_value": lambda opt, p, g: set_in(opt, "clip_value", 1e-3),
    "bounds": lambda opt, p, g: set_in(opt, "bounds", (-0.1, 0.1)),
    "a key too many": lambda opt, p, g: set_in(opt, "momentum", 0.9),
    "a key too few": lambda opt, p, g: opt.groups[0].pop("eps"),
    "no lr": lambda opt, p, g: opt.groups[0].pop("lr"),
    "no params": lambda opt, p, g: opt.groups[0].pop("params"),
    "names": lambda opt, p, g: opt.groups[0]["names"].__setitem__(0, "other"),
    "one name fewer": lambda opt, p, g: opt.groups[0]["names"].pop(),
    "params": lambda opt, p, g: opt.groups[0]["params"].__setitem__(1, numbers(4, 77)),
    "one param fewer": lambda opt, p, g: opt.groups[0]["params"].pop(),
    "a group more": lambda opt, p, g: opt.groups.append(dict(opt.groups[0])),
    "no group": lambda opt, p, g: opt.groups.clear(),
    "rebound": lambda opt, p, g: p.__setitem__("w1", p["w1"] * 2),
    "rebound to a view": lambda opt, p, g: p.__setitem__("w1", p["w1"][:]),
    "taken away": lambda opt, p, g: p.pop("w0"),
    "another name": lambda opt, p, g: p.__setitem__("x", numbers(3, 5)),
    "grad shape": lambda opt, p, g: g.__setitem__("w1", numbers(5, 1)),
    "grad dtype": lambda opt, p, g: g.__setitem__("w1", numbers(4, 1, "f8")),
    "grad int": lambda opt, p, g: g.__setitem__("w1", np.ones(4, "i4")),
    "grad strided": lambda opt, p, g: g.__setitem__("w1", numbers(8, 1)[::2]),
    "grad big-endian": lambda opt, p, g: g.__setitem__("w1", numbers(4, 1, ">f4")),
    "grad masked": lambda opt, p, g: g.__setitem__("w1", np.ma.masked_array(numbers(4, 1), [0, 1, 0, 0])),
    "grad a list": lambda opt, p, g: g.__setitem__("w1", [1.0, 2.0, 3.0, 4.0]),
    "grad None": lambda opt, p, g: g.__setitem__("w1", None),
    "grad missing": lambda opt, p, g: g.pop("w1"),
    "grad too many": lambda opt, p, g: g.__setitem__("w2", numbers(4, 1)),
    "grads in another order": lambda opt, p, g: g.update({"w0": g.pop("w0")}),
    "grad is param": lambda opt, p, g: g.__setitem__("w1", p["w1"]),
    "grad is in m": lambda opt, p, g: g.__setitem__("w1", opt.state["w1"]["m"]),
    "grad new": lambda opt, p, g: g.__setitem__("w1", numbers(4, 8)),
    "grad read-only": lambda opt, p, g: g["w1"].setflags(write=False),
    "param read-only": lambda opt, p, g: p["w1"].setflags(write=False),
    "param shape": lambda opt, p, g: setattr(p["w1"], "shape", (2, 2)),
    "param dtype": lambda opt, p, g: setattr(p["w1"], "dtype", np.int32),
    "m other": lambda opt, p, g: set_state(opt, "m", numbers(6, 3)),
    "m wrong": lambda opt, p, g: set_state(opt, "m", numbers(5, 3)),
    "m missing": lambda opt, p, g: opt.state["w0"].pop("m"),
    "m is v": lambda opt, p, g: set_state(opt, "m", opt.state["w0"]["v"]),
    "step": lambda opt, p, g: set_state(opt, "step", 41),
    "step of no int": lambda opt, p, g: set_state(opt, "step", 3.5),
    "step below 0": lambda opt, p, g: set_state(opt, "step", -2),
    "under way": lambda opt, p, g: opt.under_way.begin(),
    "backend": lambda opt, p, g: setattr(opt, "backend", "cupy"),
    "loaded": lambda opt, p, g: opt.load_state_dict(copy.deepcopy(opt.state_dict()) | {"steps": 30}),
    "replaced": lambda opt, p, g: opt.replace("w0", numbers(6, 31), np.arange(6)),
}  # fmt: skip
# Likewise of w2, which is in a second group
CHANGES_OF_GROUPS = {
    "lr": lambda opt, p, g: opt.groups[1].__setitem__("lr", 0.5),
    "lr nan": lambda opt, p, g: opt.groups[1].__setitem__("lr", math.nan),
    "weight_decay": lambda opt, p, g: opt.groups[1].__setitem__("weight_decay", 0.5),
    "rebound": lambda opt, p, g: p.__setitem__("w2", p["w2"] * 2),
    "a group fewer": lambda opt, p, g: opt.groups.pop(),
    "the other order": lambda opt, p, g: opt.groups.reverse(),
    "grad shape": lambda opt, p, g: g.__setitem__("w2", numbers(5, 1)),
    "grad None": lambda opt, p, g: g.__setitem__("w2", None),
    "grad missing": lambda opt, p, g: g.pop("w2"),
    "grad is a param of the first": lambda opt, p, g: g.__setitem__("w2", p["w0"]),
    "grad of the first is its param": lambda opt, p, g: g.__setitem__("w0", p["w2"]),
    "grad of the first, too": lambda opt, p, g: g.__setitem__("w2", g["w0"]),  # which is allowed
    "m is the first's": lambda opt, p, g: opt.state["w2"].__setitem__("m", opt.state["w0"]["m"]),
    "m wrong": lambda opt, p, g: opt.state["w2"].__setitem__("m", numbers(5, 3)),
    "step": lambda opt, p, g: opt.state["w2"].__setitem__("step", 41),
    "step of no int": lambda opt, p, g: opt.state["w2"].__setitem__("step", 3.5),
    "replaced": lambda opt, p, g: opt.replace("w2", numbers(6, 31), np.arange(6)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype):DeprecationWarning")  # of NumPy 2.5; it can still be done
@pytest.mark.parametrize(
    ("groups", "change"),
    [(1, name) for name in CHANGES] + [(2, name) for name in CHANGES] + [(3, name) for name in CHANGES_OF_GROUPS],
)
@pytest.mark.parametrize("options", few([{}, CLIPPED, NORMS], {}, CLIPPED), ids=["plain", "clipped", "norms"])
def test_a_change_between_steps_is_noticed(groups, change, options):
    outcomes = []
    for to_the_long_way in (lambda opt: opt, long_way):
        params, grads = {"w0": numbers(6, 1), "w1": numbers(4, 2)}, {"w0": numbers(6, 3), "w1": numbers(4, 4)}
        if groups > 1:
            params["w2"], grads["w2"] = numbers(6, 5), numbers(6, 6)
        opt = to_the_long_way(gpuadam.AdamW(gpuadam.decay_groups(params, "w2") if groups > 1 else params, lr=0.1))
        for _ in range(4):
            opt.step(grads, **options)
        outcome = []
        repeats = opt._repeated.ready
        (CHANGES_OF_GROUPS if groups == 3 else CHANGES)[change](opt, params, grads)
        for _ in range(3):
            try:
                outcome += [np.array(x).tobytes() for x in opt.step(grads, **options) or ()]
            except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
                outcome.append((type(error), str(error)))
        states = [(name, key, np.array(x)) for name, state in opt.state.items() for key, x in state.items()]
        outcome += [opt.steps, *((name, key, x.tobytes()) for name, key, x in states)]
        outcome += [np.array(x).tobytes() for x in (*params.values(), *(g for g in grads.values() if g is not None))]
        outcomes.append((repeats, outcome))
    (repeats, one), (_, other) = outcomes
    assert repeats and one == other


@pytest.mark.parametrize("kind", ["one", "list", "dict"])
@pytest.mark.parametrize("as_kind", ["one", "list", "tuple", "dict", "numbered", "generator", "array"])
def test_gradients_in_another_form_are_taken_or_refused_as_ever(kind, as_kind):
    outcomes = []
    for to_the_long_way in (lambda opt: opt, long_way):
        params, grads = [numbers((3, 4), 1), numbers((3, 4), 2)], [numbers((3, 4), 3), numbers((3, 4), 4)]
        if kind == "one":
            params, grads = params[:1], grads[:1]
        opt = to_the_long_way(gpuadam.Adam(given(kind, params)))
        for _ in range(4):
            opt.step(given(kind, grads))
        ready = opt._repeated.ready
        others = {
            "numbered": {str(k): g for k, g in enumerate(grads)},
            "generator": iter(grads),
            "array": np.array(grads),
        }
        outcome = []
        try:
            opt.step(others[as_kind] if as_kind in others else given(as_kind, grads))
        except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
            outcome = [type(error), str(error)]
        outcomes.append((ready, [*outcome, *(p.tobytes() for p in params)]))
    (ready, one), (_, other) = outcomes
    assert ready and one == other


def test_options_of_a_step_are_noticed():
    for option in (
        {"grad_scale": 0.5},
        {"grad_scale": 1},
        {"max_norm": 0.1},
        {"check_finite": True},
        {"found_inf": 1},
        {"norms": True},
        {"where": "nonzero"},
    ):
        opts = [gpuadam.Adam(numbers(9, 1)), long_way(gpuadam.Adam(numbers(9, 1)))]
        for k in range(8):
            results = [opt.step(numbers(9, k), **option if k in (3, 6) else {}) for opt in opts]
            assert (
                np.array_equal(*map(np.array, results))
                if option == {"norms": True} and results[0]
                else results == [None, None]
            )
            assert_same(*opts)


def test_steps_that_never_repeat_are_looked_at_less_and_less():
    opt = gpuadam.Adam(numbers(5, 1))
    looks = []
    for k in range(100):
        opt.groups[0]["eps"] = 1e-8 * (k + 1)
        opt.step(numbers(5, k))
        looks.append(opt._repeated.ready)
    assert 0 < sum(looks) < 8


def test_steps_that_cannot_repeat_are_looked_at_less_and_less(monkeypatch):
    looks, of = [], RepeatedGroup.of
    monkeypatch.setattr(RepeatedGroup, "of", lambda *group: looks.append(1) or of(*group))
    opt = gpuadam.NAdam(numbers(5, 1))
    for k in range(100):
        opt.step(numbers(5, k))
    assert 0 < len(looks) < 8


def test_a_copy_of_an_optimizer_has_its_own_arrays():
    opt = gpuadam.Adam({"w": numbers(5, 1)})
    for k in range(4):
        opt.step({"w": numbers(5, k)})
    before = opt.groups[0]["params"][0].copy()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert not other._repeated.ready
        for k in range(4):
            other.step({"w": numbers(5, k)})
        assert same(opt.groups[0]["params"][0], before) and not same(other.groups[0]["params"][0], before)


@pytest.mark.parametrize("how", ["list", "dict", "groups"])
def test_a_step_in_several_threads_keeps_its_arrays_alive_and_lets_them_go(how, monkeypatch):
    """Another thread may drop an array from a list while it is updated without Python's lock."""
    arrays = [numbers(40_000, k) for k in range(3)]
    params, make = given("list" if how == "list" else "dict", arrays), lambda grads: given(how, grads)
    if how == "groups":
        params, make = [{"params": arrays[:1]}, {"params": arrays[1:]}], lambda grads: [grads[:1], grads[1:]]
    opt = gpuadam.Adam(params, lr=0.1)
    of_step, held, launch = [], [], repeated_on_cpu.launch

    def counts():
        return [sys.getrefcount(array) for array in of_step]

    def launched(*arguments, **options):
        held.append(counts())
        launch(*arguments, **options)

    for module in (repeated_on_cpu, repeated):
        monkeypatch.setattr(module, "launch", launched)
    for k in range(6):
        grads = make([numbers(40_000, 9 + k) for _ in arrays])
        of_step[:] = [opt.state[name][key] for name in opt.state for key in "mv"]
        before = counts()
        opt.step(grads)
        assert counts() == before
        assert held == [] or held.pop() == [count + 1 for count in before]
    assert opt._repeated.ready
    alive = weakref.ref(grads[0][0] if how == "groups" else grads["w0"] if how == "dict" else grads[0])
    del grads
    assert alive() is None


def test_arrays_among_the_settings_of_a_call_are_not_kept_alive():
    arrays = [np.ones(3, "f4"), np.ones(3, "f4"), np.zeros(3, "f4"), np.zeros(3, "f4")]
    max_v = np.zeros(3, "f4")
    alive = weakref.ref(max_v)
    for k in range(1, 4):
        gpuadam.adam_step(*arrays, k, max_v=max_v)
    del max_v
    assert alive() is None


class OtherSettings(dict):
    def __getitem__(self, key):
        return 0.5 if key == "weight_decay" else super().__getitem__(key)


CHANGED_BEHIND = {
    "repeats": lambda opt: setattr(opt, "repeats", False),
    "options": lambda opt: setattr(opt, "options", dataclasses.replace(opt.options, zero_grad=True)),
    "a group of another class": lambda opt: opt.groups.__setitem__(0, OtherSettings(opt.groups[0])),
}


@pytest.mark.parametrize("what", CHANGED_BEHIND)
def test_what_is_changed_behind_the_interface_is_noticed_as_in_the_long_way(what):
    opts = [gpuadam.Adam(numbers(9, 1), lr=0.1) for _ in range(2)]
    long_way(opts[1])
    for k in range(6):
        if k == 4:
            assert opts[0]._repeated.ready
            for opt in opts:
                CHANGED_BEHIND[what](opt)
        grads = [numbers(9, k) for _ in opts]
        for opt, grad in zip(opts, grads, strict=True):
            opt.step(grad)
        assert_same(*opts)
        assert same(*grads)


def test_integers_in_place_of_bits_are_refused_after_calls_with_bits():
    param, grad, m, v = np.ones(8, "f4"), np.full(8, 0x3F80, "u2"), np.zeros(8, "f4"), np.zeros(8, "f4")
    for k in range(1, 5):
        gpuadam.adam_step(param, gpuadam.Bits(grad, "bfloat16"), m, v, k)
    before = param.copy()
    with pytest.raises(TypeError, match="grad has dtype uint16"):
        gpuadam.adam_step(param, grad, m, v, 5)
    assert same(param, before)


def test_threads_with_settings_of_their_own_get_the_bits_of_their_settings():
    """Both take over settings again and again, which another thread may see half done."""
    decays, outcomes = (0.1, 0.2), {}

    def train(decay):
        arrays = [np.ones(3, "f4") for _ in range(2)] + [np.zeros(3, "f4") for _ in range(2)]
        for k in range(1, 400):
            gpuadam.adam_step(*arrays, k, lr=0.01, weight_decay=decay + k // 7 % 3)
        outcomes[decay] = arrays

    alone = {}
    for decay in decays:
        train(decay)
        alone[decay] = outcomes.pop(decay)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=train, args=[decay]) for decay in decays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for decay in decays:
        assert all(map(same, outcomes[decay], alone[decay]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_whose_compilation_is_cut_short_has_done_nothing(error, monkeypatch):
    """The call is compiled for the first step that repeats another, and takes a second where nothing is on disk."""
    failures, compiled = [error], cpu_step.compiled

    def failing_once(*key):
        def call(*arguments):
            if failures:
                raise failures.pop()
            return compiled(*key)(*arguments)

        return call

    monkeypatch.setattr(cpu_step, "compiled", failing_once)
    (opt, other), failed = (gpuadam.Adam({"w": numbers(5, 1)}) for _ in range(2)), 0
    long_way(other)
    for k in range(5):
        grads = {"w": numbers(5, k)}
        try:
            opt.step(grads)
        except error:
            failed += 1
            assert_same(opt, other)
            opt.step(grads)
        other.step(grads)
        assert_same(opt, other)
    assert failed == 1 and opt._repeated.ready


def test_random_bits_and_a_count_in_an_array_take_the_long_way():
    for options in ({"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}, {"capturable": True}):
        opt = gpuadam.Adam(numbers(64, 1), **options)
        for k in range(4):
            opt.step(numbers(64, k))
        assert not opt._repeated.ready, options


# adam_step


def arrays_of_one(n=40):
    return [numbers(n, 1), numbers(n, 2), np.zeros(n, "f4"), np.zeros(n, "f4")]


@pytest.fixture
def calls(monkeypatch):
    """How many calls of adam_step were repeated."""
    repeated, counted = RepeatedCall(), []
    does = repeated.does

    def counting(*arguments):
        counted.append(does(*arguments))
        return counted[-1]

    repeated.does = counting
    monkeypatch.setattr(functional, "_REPEATED", repeated)
    return counted


def test_calls_with_the_settings_of_the_last_one_repeat_it(calls, monkeypatch):
    one, other = arrays_of_one(), arrays_of_one()
    for step in range(1, 7):
        gpuadam.adam_step(*one, step=step, lr=0.1 * step, weight_decay=0.01)
    assert calls == [False, False, True, True, True, True]
    monkeypatch.setattr(functional._REPEATED, "does", lambda *arguments: False)
    for step in range(1, 7):
        gpuadam.adam_step(*other, step=step, lr=0.1 * step, weight_decay=0.01)
    assert all(map(same, one, other))


@pytest.mark.parametrize(
    "change",
    [
        {"step": 0}, {"step": True}, {"step": 2.5}, {"step": 1 << 70}, {"lr": -1.0}, {"lr": -0.0}, {"lr": math.nan}, {"lr": 1e39},
        {"eps": -1.0}, {"betas": [0.9, 0.999]}, {"betas": (0.9, 1.0)}, {"grad_scale": math.inf}, {"max_v": np.zeros(40, "f4")},
        {"grad": numbers(41, 2)}, {"grad": numbers(40, 2, "f8")}, {"grad": None}, {"m": np.zeros(40)}, {"algorithm": "radam"},
        {"decoupled": 1}, {"backend": "cupy"}, {"stream": 3}, {"where": "nonzero"}, {"seed": 1.5}, {"v": numbers(40, 1)[::-1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_change_between_calls_is_noticed(change, monkeypatch):
    outcomes = []
    for does in (RepeatedCall.does, lambda *arguments: False):
        monkeypatch.setattr(RepeatedCall, "does", does)
        monkeypatch.setattr(functional, "_REPEATED", RepeatedCall())
        named = dict(zip(("param", "grad", "m", "v"), arrays_of_one(), strict=True))
        for step in range(1, 5):
            gpuadam.adam_step(**named, step=step)
        outcome = []
        try:
            gpuadam.adam_step(**named | {"step": 5} | copy.deepcopy(change))
        except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
            outcome = [type(error), str(error)]
        outcomes.append([*outcome, *(array.tobytes() for array in named.values())])
    assert outcomes[0] == outcomes[1]


def test_a_list_of_betas_may_change_between_calls(calls):
    betas, arrays = [0.9, 0.999], arrays_of_one()
    for step in range(1, 5):
        gpuadam.adam_step(*arrays, step=step, betas=betas)
    assert not any(calls)  # a list may hold other numbers the next time


def test_arrays_that_overlap_are_refused_in_a_repeated_call(calls):
    memory = np.zeros(80, "f4")
    for step in range(1, 4):
        gpuadam.adam_step(*arrays_of_one(), step=step)
    overlapping = memory[:40], memory[39:79], np.zeros(40, "f4"), np.zeros(40, "f4")
    for _ in range(2):  # the second call finds the arrays where the first one found them
        with pytest.raises(ValueError, match="share"):
            gpuadam.adam_step(*overlapping, step=4)
    assert calls[-3:] == [True, False, False]


# The compiled code


def test_tuples_and_lists_are_laid_out_as_the_compiled_code_reads_them(monkeypatch):
    assert step_objects.known()
    for name in ("ITEMS_OF_TUPLE", "SIZE_OF_MANY", "TUPLE", "LIST"):
        with monkeypatch.context() as patched:
            patched.setattr(step_objects, name, getattr(step_objects, name) - 8)
            assert not step_objects.known.__wrapped__(), name


@pytest.mark.parametrize("name", few(["Adam", "AdamW", "RAdam", "AdaMax"], "AdamW"))
def test_the_compiled_formula_has_the_bits_of_pythons(name):
    opt = CLASSES[name](numbers(3, 1), lr=0.37, weight_decay=0.11)
    for k in range(4):
        opt.step(numbers(3, k), grad_scale=0.5)
    plan, rng = opt._repeated._known[0].plan._plan, np.random.default_rng(5)
    fixed = hyperparameters.checked(
        lr=0.37, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.11, algorithm=opt.algorithm, decoupled=opt.decoupled
    ).fixed
    formula = on_host(fixed.variant, opt.decoupled)
    for t in [1, 2, 3, 5, *rng.integers(4, 1 << 40, 30).tolist()]:
        powers = powers_on_host(0.9, 0.999, t)
        assert formula.powers(t, 0.9, 0.999) == powers
        opt.state["0"]["step"] = t - 1
        lr = float(rng.uniform(0, 2))
        opt.groups[0]["lr"] = lr
        grad_scale = float(rng.uniform(-2, 2))
        opt.step(numbers(3, 4), grad_scale=grad_scale)
        eps = float(np.float32(1e-8))
        expected = formula.of_step(t, *powers, lr, 0.999, 0.11, eps)
        got = [plan.scalars[cpu_step.Scalars._fields.index(name)] for name in cpu_step.VARYING]
        assert tuple(got) == (grad_scale, *expected), t
    assert opt._repeated.ready
