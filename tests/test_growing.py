"""Parameters that grow, shrink, come and go: state goes with the rows, and nothing else changes."""

import copy

import ml_dtypes
import numpy as np
import pytest

import gpuadam
from gpuadam.kernels.operands import GROUP
from gpuadam.testing import unchanged

K = 32  # elements of a row
ROWS = np.array([2, 2, -1, 0, 5, -1, 1])
OPTIONS = {
    "plain": {},
    "amsgrad and ema": {"amsgrad": True, "ema_decay": 0.9},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "8 bits": {"state_dtype": "8bit", "ema_decay": 0.9},
    "remainder": {"dtype": ml_dtypes.bfloat16, "master": "remainder", "ema_decay": 0.9},
    "capturable": {"capturable": True},
    "float64": {"dtype": "f8", "ema_decay": 0.5},
}


@pytest.mark.in_short()
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("of", ["f4", "f8", "bfloat16", "joint"])
def test_the_ema_of_a_new_parameter_begins_at_it(of, capturable):
    dtype, options = (
        {"bfloat16": ml_dtypes.bfloat16, "joint": "c8"}.get(of, of),
        {"complex": "joint"} if of == "joint" else {},
    )
    params = {name: np.full((3, 2), number).astype(dtype) for name, number in (("a", 5), ("b", 7))}
    opt = gpuadam.Adam({"a": params["a"]}, lr=0.0, ema_decay=0.5, capturable=capturable, **options)
    for _ in range(3):
        opt.step({"a": np.ones((3, 2), dtype)})
    opt.add("b", params["b"])
    opt.step({name: np.ones((3, 2), dtype) for name in "ab"})
    for name, number in (("a", 5), ("b", 7)):
        ema = opt.state[name]["ema"]
        assert (ema.view("c8") if of == "joint" else ema == number).all()


def numbers(seed, n, dtype="f4"):
    return np.random.default_rng(seed).standard_normal((n, K)).astype(dtype)


def trained(xp=np, order="C", steps=3, dtype="f4", **options):
    """Return the parameters and their optimizer, of which the first is to grow."""
    params = {"points": xp.asarray(numbers(0, 6, dtype), order=order), "gain": xp.asarray(numbers(1, 1))}
    opt = gpuadam.AdamW(params, lr=0.1, **options)
    for k in range(steps):
        opt.step({"points": xp.asarray(numbers(k, 6)), "gain": xp.asarray(numbers(k + 9, 1))})
    return params, opt


def grown(param, rows, xp=np):
    """Return a parameter with other rows, as a program makes it."""
    host = param if xp is np else xp.asnumpy(param)
    new = host[np.maximum(rows, 0)]
    new[rows < 0] = 7
    return xp.asarray(new)


def by_rows(array):
    """Return an array of state on the host with a row for each of the parameter's."""
    array = np.asarray(array if isinstance(array, np.ndarray) else array.get())
    return array.reshape(-1, K // GROUP) if array.ndim == 1 else array


@pytest.mark.in_short()
@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("order", "CF")
def test_rows_take_their_state_along(what, order):
    if order == "F" and what == "8 bits":
        pytest.skip("8-bit state is of C order")
    params, opt = trained(order=order, **OPTIONS[what])
    old = {key: by_rows(array).copy() for key, array in opt.state["points"].items() if key != "step"}
    others, count = opt.state["gain"], opt.state_dict()["state"]["points"]["step"]
    new = np.asarray(grown(params["points"], ROWS), order=order)
    opt.replace("points", new, ROWS)
    for key, before in old.items():
        now = by_rows(opt.state["points"][key])
        assert (now[ROWS >= 0] == before[ROWS[ROWS >= 0]]).all()
        assert (now[ROWS < 0] == (7 if key == "ema" else 0)).all()
    assert opt.state["gain"] is others and opt.groups[0]["params"][0] is new
    assert opt.state_dict()["state"]["points"]["step"] == count == 3


@pytest.mark.parametrize("what", OPTIONS)
def test_what_stays_trains_on_as_before(what):
    params, opt = trained(**OPTIONS[what])
    rows = np.arange(6)
    other_params, other = trained(**OPTIONS[what])
    other_params["points"] = grown(params["points"], rows)
    other.replace("points", other_params["points"], rows)
    for k in range(2):
        grads = {"points": numbers(k + 30, 6), "gain": numbers(k + 40, 1)}
        opt.step(grads)
        other.step(grads)
    assert all(params[name].tobytes() == other_params[name].tobytes() for name in params)


def test_one_row_may_be_split_and_all_may_go():
    _, opt = trained(steps=1)
    m = opt.state["points"]["m"].copy()
    opt.replace("points", numbers(5, 2), [3, 3])
    assert (opt.state["points"]["m"] == m[[3, 3]]).all()
    opt.replace("points", numbers(5, 0), [])
    opt.step({"points": numbers(5, 0), "gain": numbers(1, 1)})
    opt.replace("points", numbers(5, 1), [-1])
    opt.step({"points": numbers(5, 1), "gain": numbers(1, 1)})


def test_copies_and_one_array_alone():
    param, halves = numbers(0, 3), np.zeros((3, K), "f2")
    opt = gpuadam.Adam(param, param_copies=halves)
    opt.step(numbers(1, 3))
    more, more_halves = numbers(2, 4), np.zeros((4, K), "f2")
    opt.replace("0", more, [0, 1, 2, -1], param_copy=more_halves)
    opt.step(numbers(1, 4))
    assert more_halves.tobytes() == more.astype("f2").tobytes() and halves[0].tobytes() != more_halves[0].tobytes()


@pytest.mark.parametrize("what", OPTIONS)
def test_it_is_saved_and_loaded_as_any_other(what, tmp_path):
    params, opt = trained(**OPTIONS[what])
    params["points"] = grown(params["points"], ROWS)
    opt.replace("points", params["points"], ROWS)
    opt.add("late", numbers(3, 2))
    opt.remove("gain")
    opt.save(tmp_path / "a", with_params=True)
    dtype = OPTIONS[what].get("dtype", "f4")
    into = {"points": np.zeros((7, K), dtype), "late": np.zeros((2, K), "f4")}
    loaded = gpuadam.load(tmp_path / "a", into, with_params=True)
    grads = {"points": numbers(1, 7), "late": numbers(2, 2)}
    for one in (opt, loaded):
        one.step(grads)
    assert into["points"].tobytes() == params["points"].tobytes()
    assert into["late"].tobytes() == opt.groups[0]["params"][1].tobytes()


def test_parameters_come_and_go():
    params, opt = trained(steps=2)
    late = numbers(7, 2)
    opt.add("late", late)
    opt.step({"points": numbers(1, 6), "gain": numbers(2, 1), "late": numbers(3, 2)})
    assert [opt.state[name]["step"] for name in ("points", "gain", "late")] == [3, 3, 1]
    alone = numbers(7, 2)
    gpuadam.AdamW(alone, lr=0.1).step(numbers(3, 2))
    assert late.tobytes() == alone.tobytes()
    before = params["gain"].copy()
    opt.remove("gain")
    opt.step({"points": numbers(1, 6), "late": numbers(3, 2)})
    assert params["gain"].tobytes() == before.tobytes() and list(opt.state) == ["points", "late"]
    with pytest.raises(ValueError, match="only it has"):
        opt.step({"points": numbers(1, 6), "late": numbers(3, 2), "gain": before})


def test_groups_keep_their_settings():
    a, b = numbers(0, 2), numbers(1, 2)
    opt = gpuadam.Adam([{"params": {"a": a}, "lr": 0.5}, {"params": {"b": b}}], lr=0.1)
    opt.add("c", numbers(2, 2), group=0)
    opt.groups[0]["lr"] = 0.25
    opt.step([{"a": numbers(4, 2), "c": numbers(3, 2)}, {"b": numbers(5, 2)}])
    assert [group["names"] for group in opt.groups] == [["a", "c"], ["b"]] and opt.groups[0]["lr"] == 0.25


def test_what_a_program_holds_of_the_optimizer_stays_good():
    _, opt = trained()
    groups, group, state = opt.groups, opt.groups[0], opt.state
    opt.replace("points", numbers(5, 2), [0, 1])
    opt.add("late", numbers(6, 1))
    opt.remove("gain")
    assert opt.groups is groups and opt.groups[0] is group and opt.state is state
    assert group["names"] == list(state) == ["points", "late"] and opt.parameters["late"].state is state["late"]


def test_a_captured_count_stays_where_it_is():
    _, opt = trained(capturable=True)
    step = opt.state["points"]["step"]
    opt.replace("points", numbers(5, 2), [0, 1])
    opt.add("late", numbers(6, 1))
    assert opt.state["points"]["step"] is opt.state["late"]["step"] is step and step[0] == 3


SAME = numbers(0, 3)
BAD = {
    "no such parameter": (lambda o: o.replace("x", SAME, [0, 1, 2]), ValueError, "there is no parameter 'x', only"),
    "another dtype": (
        lambda o: o.replace("points", SAME.astype("f8"), [0, 1, 2]),
        TypeError,
        "was float32 on numba-cpu.*float64",
    ),
    "other columns": (
        lambda o: o.replace("points", numbers(0, 3)[:, :5], [0, 1, 2]),
        ValueError,
        "all but the first dimension",
    ),
    "no rows": (lambda o: o.replace("points", np.zeros((), "f4"), []), ValueError, "all but the first dimension"),
    "too few": (
        lambda o: o.replace("points", SAME, [0, 1]),
        ValueError,
        r"rows has shape \(2,\): it must have a number for each",
    ),
    "too large": (
        lambda o: o.replace("points", SAME, [0, 1, 6]),
        ValueError,
        "numbers of the 6 old rows, or -1; they are from 0 to 6",
    ),
    "negative": (lambda o: o.replace("points", SAME, [0, 1, -2]), ValueError, "or -1; they are from -2 to 1"),
    "floats": (lambda o: o.replace("points", SAME, [0.0, 1, 2]), TypeError, "rows must be integers, not float64"),
    "flags": (
        lambda o: o.replace("points", SAME, [True, False, True]),
        TypeError,
        r"rows must be integers, not bool: np.flatnonzero\(mask\) makes them",
    ),
    "rows of rows": (
        lambda o: o.replace("points", SAME, [[0], [1, 2], 3]),
        TypeError,
        r"rows must be integers, not \[\[0\]",
    ),
    "a name that is an array": (lambda o: o.replace(np.array(["a", "b"]), SAME, [0]), ValueError, "no parameter array"),
    "another's moments": (lambda o: o.replace("points", o.state["gain"]["m"], [0]), ValueError, "share memory"),
    "moments as a parameter": (lambda o: o.add("c", o.state["gain"]["m"]), ValueError, "share memory"),
    "group True": (lambda o: o.add("c", SAME, group=False), ValueError, "there is no group False"),
    "another's memory": (lambda o: o.replace("points", o.groups[0]["params"][1], [0]), ValueError, "are one array"),
    "a copy": (lambda o: o.replace("points", SAME, [0, 1, 2], param_copy=SAME), ValueError, "share memory|has no copy"),
    "a copy where none was": (
        lambda o: o.replace("points", SAME, [0, 1, 2], param_copy=numbers(1, 3)),
        ValueError,
        "has no copy",
    ),
    "no array": (lambda o: o.replace("points", [1.0], [0]), TypeError, "points"),
    "a name twice": (lambda o: o.add("gain", SAME), ValueError, "must be a string that none has, not 'gain'"),
    "no name": (lambda o: o.add(3, SAME), ValueError, "must be a string"),
    "no group": (lambda o: o.add("c", SAME, group=1), ValueError, "there is no group 1: they are numbered from 0 to 0"),
    "memory twice": (lambda o: o.add("c", o.groups[0]["params"][0]), ValueError, "are one array"),
    "remove what is not there": (lambda o: o.remove("c"), ValueError, "there is no parameter 'c'"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said_and_nothing_changes(what):
    call, kind, match = BAD[what]
    params, opt = trained()
    held = opt.groups[0]["params"][0], opt.state["points"]
    with unchanged(opt=opt, **params), pytest.raises(kind, match=match):
        call(opt)
    assert held[0] is opt.groups[0]["params"][0] and held[1] is opt.state["points"]
    assert list(opt.state) == opt.arrangement.structures[0].names == ["points", "gain"]
    opt.step({"points": numbers(1, 6), "gain": numbers(2, 1)})


@pytest.mark.parametrize("key", ["m", "v"])
@pytest.mark.parametrize("shape, dtype", [((1, K), "f4"), ((9, K), "f4"), ((6, K), "f8"), ((6,), "f4")])
def test_state_that_is_not_as_its_optimizer_made_it_is_not_moved(key, shape, dtype):
    params, opt = trained()
    opt.state["points"][key] = np.ones(shape, dtype)
    new = numbers(1, 3)
    with (
        unchanged(opt=opt, **params),
        pytest.raises(ValueError, match=rf"{key} of params.*must have \(6, {K}\) and float32"),
    ):
        opt.replace("points", new, [5, 4, 3])


def test_a_parameter_without_dimensions_has_no_rows():
    opt = gpuadam.Adam({"a": np.array(1.0)})
    with pytest.raises(ValueError, match="all but the first dimension must be the same"):
        opt.replace("a", np.zeros(3), [0, 0, 0])


def test_nor_is_that_of_a_parameter_that_was_resized_in_place():
    params, opt = trained()
    params["points"].resize((7, K), refcheck=False)
    with unchanged(opt=opt, **params), pytest.raises(ValueError, match=r"has shape \(6, .* must have \(7, "):
        opt.replace("points", numbers(1, 3), [6, 4, 3])


BAD_COPIES = {
    "a shape": (np.zeros((2, K), "f2"), ValueError, r"param_copy of params.* has shape"),
    "a dtype": (np.zeros((3, K), "i4"), TypeError, "it must be float32 or"),
    "read-only": (np.broadcast_to(np.float16(0), (3, K)), ValueError, "share memory"),
    "a list": ([1.0], TypeError, "is a list, not an array"),
    "the parameter": (SAME, ValueError, "share memory"),
}


@pytest.mark.parametrize("what", BAD_COPIES)
def test_a_copy_is_checked_before_anything_changes(what):
    copies, kind, match = BAD_COPIES[what]
    opt = gpuadam.Adam(numbers(0, 3), param_copies=np.zeros((3, K), "f2"))
    held = opt.groups[0]["params"][0]
    with pytest.raises(kind, match=match):
        opt.replace("0", SAME, [0, 1, 2], param_copy=copies)
    with pytest.raises(kind, match=match.replace("'0'", "'c'")):
        gpuadam.Adam({"a": numbers(0, 3)}).add("c", SAME, param_copy=copies)
    assert opt.groups[0]["params"][0] is held
    opt.step(numbers(1, 3))


def test_a_copy_lies_in_memory_as_its_parameter_needs_it():
    for options in ({"state_dtype": "8bit"}, {"components": 4}):
        param, copies = np.zeros((3, 4), "f4"), np.zeros((3, 4), "f2", order="F")
        with pytest.raises(ValueError, match=r"param_copy of params\['c'\]"):
            gpuadam.Adam({"a": np.zeros((2, 4), "f4")}, **options).add("c", param, param_copy=copies)


def test_a_row_may_have_no_elements_and_a_group_a_number_of_numpys():
    opt = gpuadam.Adam({"a": np.zeros((4, 0), "f4")}, state_dtype="8bit")
    opt.replace("a", np.zeros((2, 0), "f4"), [0, 1])
    opt.add("b", numbers(0, 1), group=np.int64(0))
    opt.step({"a": np.zeros((2, 0), "f4"), "b": numbers(1, 1)})


def test_8_bit_rows_are_of_whole_groups():
    opt = gpuadam.Adam(np.ones((4, 10), "f4"), state_dtype="8bit")
    with pytest.raises(ValueError, match=r"a row of .* has 10 elements: with 8-bit state it must be a multiple of 32"):
        opt.replace("0", np.ones((2, 10), "f4"), [0, 1])


def test_who_cannot_grow_says_so():
    opt = gpuadam.Adam([numbers(0, 2), numbers(1, 2)])
    for call in (lambda: opt.add("c", SAME), lambda: opt.remove("0")):
        with pytest.raises(ValueError, match="have numbers for names: give them as a dict"):
            call()
    one = gpuadam.Adam({"a": numbers(0, 2)})
    with pytest.raises(ValueError, match="is the only parameter"):
        one.remove("a")
    with pytest.raises(ValueError, match="OffloadAdam has its parameters for good"):
        gpuadam.OffloadAdam({"a": numbers(0, 2)}, budget=1_000_000).replace("a", SAME, [0, 1, 1])


def test_a_step_that_was_cut_short_refuses_these_too():
    _, opt = trained()
    opt.under_way.begin()
    for call in (lambda: opt.replace("points", SAME, [0, 1, 2]), lambda: opt.add("c", SAME), lambda: opt.remove("gain")):
        with pytest.raises(ValueError, match="cut short"):
            call()


def test_a_state_dict_of_before_does_not_fit():
    _, opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    opt.replace("points", SAME, [0, 1, 2])
    with unchanged(opt=opt), pytest.raises(ValueError, match="shape"):
        opt.load_state_dict(saved)


@pytest.mark.gpu
@pytest.mark.parametrize("what", [what for what in OPTIONS if what != "remainder"])
@pytest.mark.parametrize("order", "CF")
def test_a_gpu_has_the_same_bits(cp, backend, what, order):
    if order == "F" and ("ema_decay" in OPTIONS[what] or what == "8 bits"):
        pytest.skip("of C order")
    found = []
    for xp, given in ((np, {}), (cp, {"backend": backend})):
        params, opt = trained(xp, order, **OPTIONS[what], **given)
        params["points"] = grown(params["points"], ROWS, xp)
        opt.replace("points", params["points"], ROWS)
        opt.step({"points": xp.asarray(numbers(1, 7)), "gain": xp.asarray(numbers(2, 1))})
        arrays = [
            *params.values(),
            *(array for state in opt.state.values() for key, array in state.items() if key != "step"),
        ]
        found.append([np.asarray(a if xp is np else cp.asnumpy(a)).tobytes() for a in arrays])
    assert found[0] == found[1]


@pytest.mark.gpu
def test_nothing_is_replaced_while_a_graph_is_captured(cp, backend):
    _, opt = trained(cp, capturable=True, backend=backend)
    more = cp.asarray(numbers(5, 6))
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="a graph is being captured"):
            opt.replace("points", more, range(6))
        stream.end_capture()


def test_a_mean_begins_at_the_numbers_of_half_floats_in_bits():
    def bits(*x):
        return gpuadam.Bits(np.float16(x).view("u2"), "float16")

    opt = gpuadam.Adam({"a": bits(1, 1)}, ema_decay=0.9)
    opt.step({"a": np.zeros(2, "f4")})
    opt.replace("a", bits(1, 1, 2), [0, 1, -1])
    opt.add("b", bits(3))
    assert opt.state["a"]["ema"].tolist() == [1, 1, 2] and opt.state["b"]["ema"].tolist() == [3]
