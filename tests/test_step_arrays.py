"""`change`, `lr_scale` and `where`: the change instead of the parameter, a rate for each element, a part of an array."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import assert_sentinels, at_offset, few

import gpuadam
from gpuadam import reference, transports
from gpuadam.kernels.operands import Arrays, bytes_moved_of, is_written, operands_of
from gpuadam.testing import unchanged

CLASSES = ("Adam", "AdamW", "NAdam", "RAdam", "AdaMax")
SHAPE = (9, 7)


def random(seed, dtype="float32", shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def grads(k, dtype="float32", shape=SHAPE):
    grad = random(k, dtype, shape)
    grad[np.random.default_rng(k + 50).random(shape) < 0.4] = 0
    return grad


def flags(k, shape=SHAPE):
    return np.random.default_rng(k).random(shape) < 0.6


def given(what, k, dtype="float64"):
    """Return the arrays of step k, for `adam_step`."""
    makers = {
        "lr_scale": lambda: {"lr_scale": np.abs(random(k + 7, dtype))},
        "where": lambda: {"where": flags(k)},
        "nonzero": lambda: {"where": "nonzero"},
    }
    return {key: value for part in what.split(" and ") for key, value in makers[part]().items()}


# What they compute


@pytest.mark.in_short()
@pytest.mark.parametrize("what", ["lr_scale", "where", "nonzero", "lr_scale and where", "lr_scale and nonzero"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_training_is_that_of_the_reference(cls, what):
    param = random(100, "float64")
    opt = getattr(gpuadam, cls)(param, lr=0.1, weight_decay=0.01, ema_decay=0.9)
    exact, m, v, ema = param.copy(), 0.0 * param, 0.0 * param, param.copy()
    options = {"algorithm": opt.algorithm, "decoupled": opt.decoupled, "weight_decay": 0.01, "lr": 0.1}
    for k in range(6):
        opt.step(grads(k, "float64"), **given(what, k))
        exact, m, v, _, ema = reference.adam_step(
            exact, grads(k, "float64"), m, v, k + 1, ema=ema, ema_decay=0.9 if k else 0.0, **options, **given(what, k)
        )
    state = opt.state["0"]
    for ours, theirs in ((param, exact), (state["m"], m), (state["v"], v), (state["ema"], ema)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.in_short()
@pytest.mark.parametrize("cls", few(CLASSES, "AdamW", "NAdam"))
@pytest.mark.parametrize("bounds", [None, (-0.5, 0.5)])
def test_the_change_is_what_the_step_would_add(cls, bounds):
    param, change = random(100, "float64"), np.full(SHAPE, np.nan)
    ours, other = (getattr(gpuadam, cls)(p, lr=0.1, weight_decay=0.1, bounds=bounds) for p in (param, param.copy()))
    for k in range(6):
        before = param.copy()
        other.groups[0]["params"][0][...] = param
        ours.step(grads(k, "float64"), change=change)
        other.step(grads(k, "float64"))
        assert param.tobytes() == before.tobytes()
        np.testing.assert_allclose(param + change, other.groups[0]["params"][0], rtol=1e-13, atol=1e-14)
        for key in ("m", "v"):
            assert ours.state["0"][key].tobytes() == other.state["0"][key].tobytes()
        param += change


def test_small_changes_are_not_lost_in_a_large_parameter():
    param, change = np.full(3, 1e8, "f4"), np.zeros(3, "f4")
    gpuadam.Adam(param, lr=0.25).step(np.float32([1, -1, 0]), change=change)
    np.testing.assert_allclose(change, [-0.25, 0.25, 0.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_the_change_may_have_another_dtype(dtype):
    changes = np.zeros(SHAPE, "f4"), np.zeros(SHAPE, dtype)
    for change in changes:
        gpuadam.Adam(random(1)).step(grads(1), change=change)
    assert changes[1].tobytes() == changes[0].astype(dtype).tobytes()


def test_elements_that_stay_keep_their_bits_and_what_is_not_finite_spoils_nothing():
    param, grad, where = random(1), grads(1), flags(1)
    grad[~where], param[0, 0] = np.nan, np.float32(np.nan)
    where[0, 0] = False
    opt = gpuadam.Adam(param, lr=0.1, weight_decay=0.1, amsgrad=True)
    opt.step(grads(2))
    arrays = [param, *(opt.state["0"][key] for key in ("m", "v", "max_v"))]
    before = [array[~where].tobytes() for array in arrays]
    opt.step(grad, where=where)
    assert before == [array[~where].tobytes() for array in arrays]
    assert np.isfinite(param[where]).all()


def test_flags_are_bool_or_uint8_and_a_nan_is_not_zero():
    for where in (flags(1), flags(1).astype("u1") * 200):
        param = random(1)
        gpuadam.Adam(param).step(random(2), where=where)
        assert ((param != random(1)) == flags(1)).all()
    param, grad = np.zeros(4, "f4"), np.float32([0, -0.0, np.nan, 1e-40])
    gpuadam.Adam(param).step(grad, where="nonzero")
    np.testing.assert_array_equal(param != 0, [False, False, True, True])


@pytest.mark.in_short()
@pytest.mark.parametrize("shape", [(9,), (), (9, 7)])
@pytest.mark.parametrize("order", "CF")
def test_rows_are_as_their_elements(shape, order):
    of_rows = {"lr_scale": np.asarray(np.abs(random(5, shape=shape))), "where": np.asarray(flags(6, shape))}
    behind = (1,) * (2 - len(shape))
    whole = {name: np.broadcast_to(a.reshape(shape + behind), SHAPE).copy() for name, a in of_rows.items()}
    for operand in ("lr_scale", "where"):
        found = []
        for further in (of_rows, whole):
            param = np.array(random(1), order=order)
            opt = gpuadam.AdamW(param, lr=0.1, ema_decay=0.9)
            opt.step(random(4), **{operand: further[operand]})
            found.append([a.tobytes("A") for a in (param, *(opt.state["0"][key] for key in ("m", "v", "ema")))])
        assert found[0] == found[1]


def test_zero_grad_zeroes_every_gradient():
    grad = random(1)
    gpuadam.Adam(random(2), zero_grad=True).step(grad, where=flags(1))
    assert not grad.any()


# Memory


@pytest.mark.parametrize("n", [1, 5, 33, 1000, 70_001])
def test_any_start_in_memory_has_the_same_bits_and_nothing_beside_is_written(n):
    made = {"param": random(1, shape=n), "grad": grads(2, shape=n), "m": random(3, shape=n), "v": random(4, shape=n) ** 2}
    made |= {"change": np.zeros(n, "f4"), "lr_scale": np.abs(random(5, shape=n)), "where": flags(6, n)}
    expected = None
    for offset in (0, 1, 3):
        placed = {name: at_offset(array, offset + (k if offset else 0)) for k, (name, array) in enumerate(made.items())}
        arrays = {name: array for name, (array, _) in placed.items()}
        gpuadam.adam_step(**arrays, step=3)
        for name, (_, around) in placed.items():
            assert_sentinels(*around, name)
        found = [a.tobytes() for a in arrays.values()]
        expected = expected or found
        assert found == expected


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["all", "where", "change"])
def test_any_strides_have_the_same_bits(layout, of):
    def stepped(lay_out):
        arrays = {"param": random(1), "grad": grads(2), "m": random(3), "v": random(4) ** 2, "change": np.zeros(SHAPE, "f4")}
        arrays |= {"lr_scale": np.abs(random(5)), "where": flags(6)}
        arrays = {name: lay_out(a) if of in ("all", name) else a for name, a in arrays.items()}
        gpuadam.adam_step(**arrays, step=3)
        return [np.ascontiguousarray(a).tobytes() for a in arrays.values()]

    assert stepped(LAYOUTS[layout]) == stepped(np.array)


def test_what_is_only_read_may_be_read_only_and_shared():
    shared, where = np.ones(SHAPE, "f4"), flags(1)
    params = {"a": random(1), "b": random(2)}
    for array in (shared, where, params["a"]):
        array.flags.writeable = False
    changes = {"a": np.zeros(SHAPE, "f4"), "b": np.zeros(SHAPE, "f4")}
    with pytest.raises(ValueError, match="read-only"):
        gpuadam.Adam(params)
    m, v = (np.zeros(SHAPE, "f4") for _ in range(2))
    gpuadam.adam_step(params["a"], shared, m, v, 1, lr_scale=shared, where=where, change=changes["a"])
    assert changes["a"].any()
    opt = gpuadam.Adam({"a": random(1), "b": random(2)})
    opt.step({"a": random(3), "b": random(4)}, lr_scale={"a": shared, "b": shared}, where={"a": where, "b": where})


def test_they_move_the_bytes_that_they_must():
    moved = {
        name: bytes_moved_of(operands_of(arrays), 1)
        for name, arrays in {
            "plain": Arrays(),
            "change": Arrays(change="float32"),
            "lr_scale": Arrays(lr_scale="float32"),
            "where": Arrays(where="array"),
            "nonzero": Arrays(where="nonzero"),
        }.items()
    }
    assert moved == {"plain": 28, "change": 28, "lr_scale": 32, "where": 29, "nonzero": 28}
    assert not is_written("where", ["where"], True)


# Optimizers


def test_a_parameter_may_have_none_and_groups_have_their_own():
    params = [random(1), random(2, shape=5), random(3, "float64", 4)]
    before = [p.copy() for p in params]
    opt = gpuadam.Adam([{"params": params[:2]}, {"params": {"c": params[2]}, "lr": 0.5}], lr=0.1)
    new = [[random(4), random(5, shape=5)], {"c": random(6, "float64", 4)}]
    change, where = np.zeros(SHAPE, "f4"), np.array([1, 0, 1, 0], bool)
    opt.step(new, change=[[change, None], {"c": None}], where=[[None, None], {"c": where}])
    assert params[0].tobytes() == before[0].tobytes() and change.all()
    assert (params[1] != before[1]).all()
    assert ((params[2] != before[2]) == where).all()
    assert opt.steps == 1 and {state["step"] for state in opt.state.values()} == {1}


@pytest.mark.parametrize("options", [{"capturable": True}, {"state_dtype": "bfloat16"}, {"max_norm": 0.5}], ids=str)
def test_they_go_with_other_options(options):
    step = {"max_norm": options.pop("max_norm")} if "max_norm" in options else {}
    found = []
    for one_by_one in (False, True):
        params = {"a": random(1), "b": random(2)}
        opt = gpuadam.Adam(params, lr=0.1, **options)
        for k in range(3):
            new = {"a": grads(k), "b": grads(k + 9)}
            where = "nonzero" if one_by_one else {name: grad != 0 for name, grad in new.items()}
            opt.step(new, where=where, **step)
        found.append([p.tobytes() for p in params.values()])
    assert found[0] == found[1]


def test_a_step_that_is_left_out_leaves_the_change():
    change = np.full(SHAPE, 5, "f4")
    opt = gpuadam.Adam(random(1))
    opt.step(random(2), change=change, found_inf=True)
    assert (change == 5).all() and opt.steps == 0


def adam_step(**arrays):
    made = {"param": random(1), "grad": random(2), "m": random(3), "v": random(4) ** 2}
    gpuadam.adam_step(**made | arrays, step=1)


def eight_bits(**arrays):
    gpuadam.Adam(random(1), state_dtype="8bit").step(random(2), **arrays)


def of_opt(**arrays):
    gpuadam.Adam({"a": random(1), "b": random(2)}).step({"a": random(3), "b": random(4)}, **arrays)


SAME = random(9)
BAD = {
    "a word": (adam_step, {"where": "zero"}, ValueError, "where='zero' must be an array of flags, or 'nonzero'"),
    "where is float": (adam_step, {"where": random(1)}, TypeError, "where has dtype float32; it must be bool or uint8"),
    "where has a shape": (
        adam_step,
        {"where": flags(1, 5)},
        ValueError,
        r"where has shape \(5,\).*or its leading dimensions",
    ),
    "lr_scale is int": (adam_step, {"lr_scale": np.ones(SHAPE, int)}, TypeError, "lr_scale has dtype int64"),
    "lr_scale is a number": (adam_step, {"lr_scale": 0.5}, TypeError, "lr_scale"),
    "change and ema": (adam_step, {"change": random(5), "ema": random(6)}, TypeError, "with change= param stays .*no ema"),
    "change and copy": (adam_step, {"change": random(5), "param_copy": random(6)}, TypeError, "change.*no param_copy"),
    "change is the gradient": (
        adam_step,
        {"change": SAME, "grad": SAME},
        ValueError,
        "share memory",
    ),
    "change is param": (adam_step, {"change": SAME, "param": SAME}, ValueError, "share memory"),
    "where lies in param": (adam_step, {"param": SAME, "where": SAME.view("u1")[:, :7]}, ValueError, "share memory"),
    "8 bits and where": (eight_bits, {"where": flags(1)}, TypeError, "where= cannot leave elements of 8-bit state"),
    "8 bits and nonzero": (eight_bits, {"where": "nonzero"}, TypeError, "where= cannot leave elements of 8-bit state"),
    "lr_scale is a number for all": (of_opt, {"lr_scale": {"a": 2.0, "b": None}}, TypeError, "multiply lr, .* np.full"),
    "where is a slice": (
        of_opt,
        {"where": {"a": slice(3), "b": None}},
        TypeError,
        r"w = np.zeros\(shape, bool\), then w\[x\]",
    ),
    "where is indices": (adam_step, {"where": np.arange(3)}, TypeError, r"x != 0 has flags .* then w\[x\] = True, has them"),
    "columns": (adam_step, {"lr_scale": random(1, shape=7)}, ValueError, r"lr_scale has shape \(7,\)"),
    "a word for one": (of_opt, {"where": {"a": "nonzero", "b": None}}, ValueError, "where='nonzero' for all parameters"),
    "names": (of_opt, {"where": {"a": flags(1)}}, ValueError, r"where must be a dict with the names .*it lacks \['b'\]"),
    "one array": (of_opt, {"lr_scale": random(1)}, ValueError, "lr_scale must be a dict with the names"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said(what):
    call, arrays, kind, match = BAD[what]
    checked = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    with unchanged(**checked), pytest.raises(kind, match=match):
        call(**arrays)


def test_optimizers_that_take_them_not_say_so():
    with pytest.raises(ValueError, match="OffloadAdam takes no change, lr_scale or where"):
        gpuadam.OffloadAdam({"a": random(1)}, budget=1_000_000).step({"a": random(2)}, where="nonzero")
    with pytest.raises(TypeError, match="unexpected keyword argument 'where'"):
        gpuadam.ShardedAdam({"a": random(1)}, transports.Local()).step({"a": random(2)}, where="nonzero")


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_a_gpu_has_the_same_bits_whatever_the_step_before_had(cp, backend, capturable):
    def steps(xp, **options):
        params = {name: xp.asarray(random(k)) for k, name in enumerate("ab")}
        opt = gpuadam.AdamW(params, lr=0.1, capturable=capturable, **options)
        further = {name: xp.asarray(np.abs(random(k + 5))) for k, name in enumerate("ab")}
        where = {name: xp.asarray(flags(k)) for k, name in enumerate("ab")}
        rows = {name: xp.asarray(flags(k, 9)) for k, name in enumerate("ab")}
        new = {name: xp.asarray(grads(k + 20)) for k, name in enumerate("ab")}
        # the same arrays in other places
        ways = ({}, {"where": "nonzero"}, {"lr_scale": further}, {"change": further}, {"where": where}, {"where": rows}, {})
        for way in itertools.chain(ways, ways[::-1]):
            opt.step(new, **way)
        arrays = [*params.values(), *further.values(), *(opt.state[name][key] for name in "ab" for key in ("m", "v"))]
        return [(a if xp is np else cp.asnumpy(a)).tobytes() for a in arrays]

    assert steps(cp, backend=backend) == steps(np)


@pytest.mark.gpu
def test_a_group_that_a_device_counts_has_the_same_arrays_for_all(cp, backend):
    params = {"a": cp.ones(3, "f4"), "b": cp.ones(3, "f4")}
    opt = gpuadam.Adam(params, capturable=True, backend=backend)
    with pytest.raises(ValueError, match=r"with capturable=True all parameters of a group have the same of change"):
        opt.step(params, where={"a": cp.ones(3, bool), "b": None})
