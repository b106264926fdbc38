"""`flatten`: one buffer, views in the old shapes, and the same training as with the arrays apart."""

import copy
import pickle

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, state

import gpuadam

SHAPES = {"w": (3, 7), "b": (5,), "empty": (0, 4), "scalar": (), "v": (16,)}


def arrays(dtype="float32", seed=0):
    return {name: state(int(np.prod(shape)), dtype, seed=seed)[0].reshape(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_hold_the_values_in_the_old_shapes(library, dtype):
    given = arrays(dtype)
    flat = gpuadam.flatten({name: library.array(a) for name, a in given.items()}, backend=library.name)
    assert list(flat.params) == list(flat.grads) == list(given)
    for name, a in given.items():
        assert flat.params[name].shape == flat.grads[name].shape == a.shape
        assert_same_bits([library.numpy(flat.params[name])], [a])
        assert not library.numpy(flat.grads[name]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_starts_at_16_bytes_in_one_buffer(dtype):
    flat = gpuadam.flatten(list(arrays(dtype).values()))
    for buffer, views in ((flat.param, flat.params), (flat.grad, flat.grads)):
        assert buffer.ndim == 1 and buffer.flags.c_contiguous
        for view in views:
            assert (view.ctypes.data - buffer.ctypes.data) % 16 == 0 and (view.size == 0 or np.shares_memory(view, buffer))


def test_training_the_buffer_is_training_the_arrays(library):
    apart = {name: library.array(a) for name, a in arrays().items()}
    flat = gpuadam.flatten(apart, backend=library.name)
    one = gpuadam.AdamW(flat.param, lr=0.1, amsgrad=True, backend=library.name)
    many = gpuadam.AdamW(apart, lr=0.1, amsgrad=True, backend=library.name)
    for k in range(3):
        grads = arrays(seed=k + 1)
        for name, grad in gpuadam.flatten(
            {n: library.array(g) for n, g in grads.items()}, backend=library.name
        ).params.items():
            copy_into(library, flat.grads[name], grad)
        one.step(flat.grad)
        many.step({name: library.array(g) for name, g in grads.items()})
    for name, a in apart.items():
        assert_same_bits([library.numpy(flat.params[name])], [library.numpy(a)])


def copy_into(library, to, source):
    if library.name == "numba-cuda":
        to.copy_to_device(source)
    else:
        to[...] = source


def test_a_list_gives_lists_and_an_array_gives_arrays():
    assert isinstance(gpuadam.flatten([np.ones(3)]).params, list)
    flat = gpuadam.flatten(np.ones((2, 2), "f4"))
    assert flat.params.shape == flat.grads.shape == (2, 2) and flat.param.shape == (4,)


def test_arrays_of_any_layout_are_taken():
    base = np.arange(24, dtype="f4").reshape(4, 6)
    flat = gpuadam.flatten([np.asfortranarray(base), base[:, ::2], base[::-1]])
    for view, a in zip(flat.params, (base, base[:, ::2], base[::-1]), strict=True):
        assert (view == a).all()


def test_the_arrays_given_are_left_as_they_are():
    a = np.ones(3, "f4")
    flat = gpuadam.flatten([a])
    flat.param[:] = 2
    assert (a == 1).all()


@pytest.mark.parametrize(
    "given, error, said",
    [
        ([], ValueError, "no arrays"),
        ({}, ValueError, "no arrays"),
        ([np.ones(3, "f4"), np.ones(3)], TypeError, r"arrays\[1\] has dtype float64, arrays\[0\] has float32"),
        ([np.ones(3, "i4")], TypeError, "int32"),
        ([None], TypeError, r"arrays\[0\] is None"),
        ([[1.0, 2.0]], TypeError, "not an array"),
        ([np.broadcast_to(np.float32(1), (5,))], ValueError, "elements share memory"),
    ],
)
def test_what_is_wrong_is_said(given, error, said):
    with pytest.raises(error, match=said):
        gpuadam.flatten(given)


def test_complex_arrays_stay_complex(library):
    given = {"w": np.arange(6).reshape(2, 3) + 1j, "scalar": np.array(2j), "b": np.ones(5, "c16")}
    flat = gpuadam.flatten({name: library.array(a) for name, a in given.items()}, backend=library.name)
    opt = gpuadam.Adam(flat.param, lr=0.1, complex="joint", backend=library.name)
    opt.step(library.array(np.full(flat.param.shape, 3 - 4j)))
    for name, a in given.items():
        after = library.numpy(flat.params[name])
        assert after.shape == a.shape and after.dtype == "c16"
        np.testing.assert_allclose(after, a - 0.1 * (0.6 - 0.8j))
    with pytest.raises(TypeError, match=r"arrays\[1\] has dtype float64"):
        gpuadam.flatten([given["b"], given["b"].real])


@pytest.mark.parametrize("as_list", [False, True])
def test_no_view_can_be_replaced_by_an_array_that_a_step_would_not_see(as_list):
    arrays = {0: np.ones(2, "f4"), 1: np.ones(3, "f4")}
    flat = gpuadam.flatten(list(arrays.values()) if as_list else arrays)
    for views in (flat.params, flat.grads):
        before = views[0]
        with pytest.raises(TypeError, match=r"^\[0\] is a view of a buffer.*: write into it, \[0\]\[\.\.\.\] = x"):
            views[0] = views[0] * 2
        views[0] += 2
        views[0][...] = 5
        assert views[0] is before and (before == 5).all()
    assert (flat.param[:2] == 5).all() and (flat.grad[:2] == 5).all()


CHANGES_OF_A_DICT = {
    "del": lambda views: views.__delitem__("a"),
    "clear": lambda views: views.clear(),
    "pop": lambda views: views.pop("a"),
    "popitem": lambda views: views.popitem(),
    "setdefault": lambda views: views.setdefault("c", np.ones(3, "f4")),
    "a new name": lambda views: views.__setitem__("c", np.ones(3, "f4")),
    "update": lambda views: views.update(c=None),
}
CHANGES_OF_A_LIST = {
    "del": lambda views: views.__delitem__(0),
    "+=": lambda views: views.__iadd__([np.ones(3, "f4")]),
    "*=": lambda views: views.__imul__(2),
    "append": lambda views: views.append(np.ones(3, "f4")),
    "clear": lambda views: views.clear(),
    "extend": lambda views: views.extend([np.ones(3, "f4")]),
    "insert": lambda views: views.insert(0, np.ones(3, "f4")),
    "pop": lambda views: views.pop(),
    "remove": lambda views: views.remove(views[0]),
    "reverse": lambda views: views.reverse(),
    "sort": lambda views: views.sort(key=len),
}


@pytest.mark.parametrize(
    "change, arrays",
    [(change, {"a": np.ones(2, "f4"), "b": np.ones(3, "f4")}) for change in CHANGES_OF_A_DICT.values()]
    + [(change, [np.ones(2, "f4"), np.ones(3, "f4")]) for change in CHANGES_OF_A_LIST.values()],
    ids=[*CHANGES_OF_A_DICT, *CHANGES_OF_A_LIST],
)
def test_no_view_comes_goes_or_moves(change, arrays):
    flat = gpuadam.flatten(arrays)
    for views in (flat.params, flat.grads):
        before = list(views.values()) if isinstance(views, dict) else list(views)
        with pytest.raises(TypeError, match="the views of a buffer stay those that flatten made"):
            change(views)
        after = list(views.values()) if isinstance(views, dict) else list(views)
        assert list(map(id, after)) == list(map(id, before))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_would_have_views_of_no_buffer_and_is_refused(copied):
    flat = gpuadam.flatten({"w": np.ones(3, "f4")})
    for what in (flat, (flat, gpuadam.Adam(flat.param)), (gpuadam.Adam(flat.params), flat)):
        with pytest.raises(TypeError, match="flatten the copies"):
            copied(what)
    assert copy.copy(flat) is flat


def test_no_view_can_be_replaced_by_an_update():
    flat = gpuadam.flatten({"w": np.ones(2, "f4")})
    grads = flat.grads
    with pytest.raises(TypeError, match=r"\['w'\] is a view"):
        grads.update({"w": np.ones(2, "f4")})
    with pytest.raises(TypeError, match=r"\['w'\] is a view"):
        grads |= {"w": np.ones(2, "f4")}
    assert not flat.grad.any()
    for copied in (copy.deepcopy(flat.grads), pickle.loads(pickle.dumps(flat.grads))):
        assert copied.keys() == {"w"}
