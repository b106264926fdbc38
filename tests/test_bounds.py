"""`clip_value` and `bounds`: gradients that are clipped by value, parameters that stay between two numbers."""

import copy
import itertools
import math

import libraries
import ml_dtypes
import numpy as np
import pytest
from cases import few

import gpuadam
from gpuadam import checks, hyperparameters, reference, transports
from gpuadam.kernels.adam import Form
from gpuadam.kernels.operands import Arrays, bytes_per_element
from gpuadam.testing import unchanged

CLASSES = ("Adam", "AdamW", "NAdam", "RAdam", "AdaMax")
OPTIONS = {"clip_value": 0.7, "bounds": (-0.25, 0.5)}


def grads(k, shape=(7, 9), dtype="float32"):
    return np.random.default_rng(k).standard_normal(shape).astype(dtype)


def trained(cls="Adam", steps=5, dtype="float32", **options):
    """Return a parameter and its optimizer after some steps."""
    param = grads(100, dtype=dtype)
    opt = getattr(gpuadam, cls)({"w": param}, lr=0.1, **options)
    for k in range(steps):
        opt.step({"w": grads(k, dtype=dtype)})
    return param, opt


@pytest.mark.parametrize("cls", few(CLASSES, "AdamW"))
def test_a_training_is_that_of_the_reference(cls):
    param, opt = trained(cls, dtype="float64", weight_decay=0.01, **OPTIONS)
    exact, m, v = grads(100, dtype="float64"), 0.0, 0.0
    options = {"algorithm": opt.algorithm, "decoupled": opt.decoupled, "weight_decay": 0.01, **OPTIONS}
    for k in range(5):
        exact, m, v, _ = reference.adam_step(exact, grads(k, dtype="float64"), m, v, k + 1, lr=0.1, **options)
    np.testing.assert_allclose(param, exact, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(opt.state["w"]["m"], m, rtol=1e-12, atol=1e-14)
    assert param.min() == -0.25 and param.max() == 0.5 and (abs(param) < 0.25).any()


def test_it_is_the_step_between_two_calls_of_clip():
    param, m, v = grads(100), np.zeros((7, 9), "f4"), np.zeros((7, 9), "f4")
    for k in range(5):
        gpuadam.adam_step(param, np.clip(grads(k), -0.7, 0.7), m, v, k + 1, lr=0.1)
        np.clip(param, -0.25, 0.5, out=param)
    assert param.tobytes() == trained(**OPTIONS)[0].tobytes()


def test_scaled_gradients_are_clipped_before_they_decay():
    param, m, v = np.ones(2, "f4"), np.zeros(2, "f4"), np.zeros(2, "f4")
    gpuadam.adam_step(param, np.float32([3, -0.5]), m, v, 1, grad_scale=0.5, clip_value=1.0, weight_decay=1.0)
    np.testing.assert_allclose(m, np.float32([0.1 * (1 + 1), 0.1 * (-0.25 + 1)]))


def test_nan_and_what_is_out_of_bounds_before_the_step():
    param, grad = np.float32([np.nan, 9, -9, np.inf, 0.1]), np.float32([1, 0, 0, 0, np.nan])
    m, v = np.zeros(5, "f4"), np.zeros(5, "f4")
    gpuadam.adam_step(param, grad, m, v, 1, bounds=(-1, 1), clip_value=1)
    np.testing.assert_array_equal(param, np.float32([np.nan, 1, -1, 1, np.nan]))


@pytest.mark.parametrize(
    "bounds, low, high", [((0, None), 0, np.inf), ((None, 0.125), -np.inf, 0.125), ((0.5, 0.5), 0.5, 0.5)]
)
def test_either_bound_may_be_none_and_both_the_same(bounds, low, high):
    param, _ = trained(bounds=bounds)
    unbounded, _ = trained()
    assert param.min() >= low and param.max() <= high
    assert low == high or (unbounded.min() < low or unbounded.max() > high)


NARROW = {
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
    "bfloat16 rounded randomly": {"dtype": ml_dtypes.bfloat16, "stochastic_rounding": True},
    "float16 rounded randomly": {"dtype": "float16", "stochastic_rounding": True},
    "remainder": {"dtype": ml_dtypes.bfloat16, "master": "remainder"},
}


@pytest.mark.parametrize("what", few(NARROW, "bfloat16 rounded randomly", "remainder"))
def test_narrow_parameters_stay_between_bounds_rounded_to_their_dtype(what):
    low, high = -0.1, 0.3  # which none of these dtypes holds
    param, _ = trained(**NARROW[what], bounds=(low, high), steps=9)
    low, high = np.array([low, high], param.dtype)
    assert param.min() == low and param.max() == high


def test_a_bound_is_rounded_as_numpy_rounds_it():
    for x in np.random.default_rng(0).standard_normal(2000) * np.exp(np.random.default_rng(1).uniform(-80, 80, 2000)):
        for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float32", "f4"), ("float64", "f8")):
            h = hyperparameters.checked(0.1, (0.9, 0.99), 1e-8, 0.0, bounds=(x, None))
            wide = "float64" if name == "float64" else "float32"
            _, scalars = hyperparameters.form_and_scalars(h, 1, Arrays(name, name, wide))
            assert scalars.least == float(np.array(np.float32(x) if name == "bfloat16" else x).astype(dtype))


def test_ema_copies_and_8_bits_follow_the_bounded_parameter():
    copies = np.zeros((7, 9), "f2")
    param, opt = trained(**OPTIONS, ema_decay=0.5, param_copies={"w": copies}, state_dtype="8bit")
    assert copies.tobytes() == param.astype("f2").tobytes()
    assert opt.state["w"]["ema"].max() <= 0.5 and opt.state["w"]["ema"].min() >= -0.25


def test_each_group_has_its_own_and_they_may_be_changed_between_steps():
    a, b = np.zeros(3, "f4"), np.zeros(3, "f4")
    opt = gpuadam.Adam([{"params": a, "bounds": (-0.05, None)}, {"params": b, "clip_value": 0.5}], lr=0.1)
    for bounds, lowest in (((-0.05, None), -0.05), ((-0.15, None), -0.15)):
        opt.groups[0]["bounds"] = bounds
        for _ in range(2):
            opt.step([np.ones(3, "f4"), np.ones(3, "f4")])
        assert a.tolist() == [np.float32(lowest)] * 3
    assert b.max() < -0.35 and opt.state["1"]["m"].max() <= 0.5


def test_bounds_in_a_list_or_an_array_are_known_again():
    opt = gpuadam.Adam(np.ones(3, "f4"), bounds=[0.0, 0.5])
    for bounds in ([0.0, 0.5], np.float32([0, 0.5])):
        opt.groups[0]["bounds"] = bounds
        opt.step(np.ones(3, "f4"))
        before = hyperparameters.constants.cache_info().misses
        opt.step(np.ones(3, "f4"))
        assert hyperparameters.constants.cache_info().misses == before


def test_they_are_saved_and_older_state_dicts_have_none(tmp_path):
    _, opt = trained(**OPTIONS)
    state_dict = copy.deepcopy(opt.state_dict())
    opt.save(tmp_path / "a")
    for loaded in (gpuadam.load(tmp_path / "a", {"w": np.ones((7, 9), "f4")}), trained(steps=0)[1]):
        loaded.load_state_dict(state_dict)
        assert loaded.groups[0]["bounds"] == (-0.25, 0.5) and loaded.groups[0]["clip_value"] == 0.7
    for group in state_dict["groups"]:
        del group["clip_value"], group["bounds"]
    with pytest.raises(
        ValueError, match=r'group 0 of the optimizer has bounds, .* has none.*optimizer.groups\[0\]\["bounds"\]'
    ):
        opt.load_state_dict(state_dict)
    assert opt.groups[0]["bounds"] == (-0.25, 0.5)
    opt.groups[0]["bounds"] = None
    opt.load_state_dict(state_dict)
    assert opt.groups[0]["bounds"] is None and opt.groups[0]["clip_value"] is None


def test_bounds_are_not_taken_away_by_a_state_dict_but_may_be_written_into_it():
    without, (param, opt) = trained()[1].state_dict(), trained(steps=0, bounds=({"w": np.full((7, 9), -0.25, "f4")}, 0.5))
    with pytest.raises(ValueError, match="has none"):
        opt.load_state_dict(without)
    without["groups"][0]["bounds"] = opt.state_dict()["groups"][0]["bounds"]
    opt.load_state_dict(without)
    opt.step({"w": np.full((7, 9), 1e3, "f4")})
    assert opt.groups[0]["bounds"][0]["w"].shape == (7, 9) and opt.steps > 1 and param.min() >= -0.25


def test_offloaded_and_sharded_steps_have_the_same_bits():
    param, _ = trained(**OPTIONS)
    others = (
        lambda p: gpuadam.OffloadAdam({"w": p}, lr=0.1, budget=1_000_000, **OPTIONS),
        lambda p: gpuadam.ShardedAdam({"w": p}, transports.Local(), lr=0.1, bucket_bytes=64, **OPTIONS),
    )
    for make in others:
        other = grads(100)
        opt = make(other)
        for k in range(5):
            opt.step({"w": grads(k)})
        assert other.tobytes() == param.tobytes()


def test_capturable_on_the_cpu_has_the_same_bits():
    assert trained(**OPTIONS, capturable=True)[0].tobytes() == trained(**OPTIONS)[0].tobytes()


BAD = {
    "clip_value 0": ({"clip_value": 0}, ValueError, "clip_value=0 must be positive"),
    "clip_value -1": ({"clip_value": -1.0}, ValueError, "must be positive"),
    "clip_value NaN": ({"clip_value": math.nan}, ValueError, "clip_value.*must be finite"),
    "clip_value text": ({"clip_value": "1"}, TypeError, "clip_value.*must be a real number"),
    "clip_value large": ({"clip_value": 1e39}, ValueError, "clip_value is 1e.39, which overflows float32"),
    "clip_value small": ({"clip_value": 1e-60}, ValueError, "rounds to 0 in float32: choose a larger one, or None"),
    "one number": ({"bounds": 1.0}, ValueError, r"bounds must be two numbers, \(low, high\)"),
    "three": ({"bounds": (1, 2, 3)}, ValueError, "bounds must be two numbers"),
    "text": ({"bounds": ("a", "b")}, TypeError, "a number of bounds must be a real number"),
    "reversed": ({"bounds": (1, 0)}, ValueError, "the first not above the second"),
    "NaN": ({"bounds": (math.nan, 1)}, ValueError, "the first not above the second"),
    "infinite": ({"bounds": (0, math.inf)}, ValueError, "the first not above the second; None is for no bound"),
    "too large": ({"bounds": (0, 1e39)}, ValueError, "bounds: 1e.39 overflows float32"),
    "empty": ({"bounds": ()}, ValueError, "bounds must be two numbers"),
    "dict of pairs": ({"bounds": {"x": (0, 1), "y": (0, 1)}}, ValueError, "bounds must be a pair.* are a dict each"),
    "flag": ({"bounds": False}, ValueError, "bounds must be two numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said_before_anything_is_written(what):
    options, kind, match = BAD[what]
    opt = gpuadam.Adam({"w": np.ones(3, "f4")})
    arrays = [np.ones(3, "f4") for _ in range(4)]
    opt.groups[0] |= options
    with unchanged(opt=opt):
        for call in (
            lambda: gpuadam.adam_step(*arrays, 1, **options),
            lambda: gpuadam.Adam({"w": np.ones(3, "f4")}, **options),
            lambda: opt.step({"w": np.ones(3, "f4")}),
        ):
            with pytest.raises(kind, match=match):
                call()
    assert all((a == 1).all() for a in arrays)


F4 = np.float32
BAD_ARRAYS = {
    "low above high": ((F4([0, 2, 0]), F4([1, 1, 1])), ValueError, r"low is above high in 1 of 3 .* at \[1\]: 2.0 and 1.0"),
    "a number above an array": (
        (2, F4([3, 1, 0])),
        ValueError,
        r"low is above high in 2 of 3 elements, as at \[1\]: 2.0 and 1.0",
    ),
    "an array above a number": (
        (F4([3, 1, 0]), -1.5),
        ValueError,
        "low is above high in 3 of 3 .* Give the lower ends first",
    ),
    "another shape": ((None, np.ones(4, "f4")), ValueError, r"^high of params\['w'\] has shape \(4,\)"),
    "another dtype": ((np.ones(3), None), TypeError, r"^low of params\['w'\] has dtype float64.* no rounding leaves them"),
    "integers": ((np.ones(3, int), None), TypeError, r"^low of params\['w'\] has dtype int64; it must be"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bounds_in_arrays_are_checked_when_an_optimizer_is_made_and_when_a_parameter_comes(what):
    bounds, kind, match = BAD_ARRAYS[what]
    named = tuple({"w": end} if isinstance(end, np.ndarray) else end for end in bounds)
    w = np.ones(3, "f4")
    with pytest.raises(kind, match=match):
        gpuadam.Adam({"w": w}, bounds=named)
    opt = gpuadam.Adam({"a": np.ones(2, "f4")})
    opt.groups[0]["bounds"] = tuple(end | {"a": None} if isinstance(end, dict) else end for end in named)
    with unchanged(opt=opt), pytest.raises(kind, match=match):
        opt.add("w", w)
    opt = gpuadam.Adam({"w": np.ones(2, "f4")})
    opt.groups[0]["bounds"] = named
    with unchanged(opt=opt), pytest.raises(kind, match=match):
        opt.replace("w", w, [0, 1, 1])


def bfloat16(*x):
    return np.array(x, ml_dtypes.bfloat16)


@pytest.mark.parametrize("make", [F4, np.float64, bfloat16, np.float16], ids=["f4", "f8", "bf16", "f2"])
def test_bounds_in_arrays_are_compared_as_the_numbers_that_they_are(make):
    x, low, high, unbounded = (np.array(make(n)).repeat(2) for n in (0.0, -2.0, -1.0, np.nan))
    bits = gpuadam.Bits(x.view("u2"), str(x.dtype)) if x.itemsize == 2 else x
    for param, ends in itertools.product((x, bits), ((low, high), (unbounded, high), (low, -1), (high, high), (-2, high))):
        gpuadam.Adam(param, bounds=ends)
        gpuadam.Adam(param, bounds=(0.7, np.array(make(0.7)).repeat(2)))  # which is one number, once it is rounded
        if ends[0] is not unbounded and ends[0] is not ends[1]:
            with pytest.raises(ValueError, match="low is above high in 2 of 2"):
                gpuadam.Adam(param, bounds=ends[::-1])


def test_bounds_of_complex_parts_are_compared_part_by_part():
    x, low, high = np.zeros(2, "c8"), np.complex64([0, 0]), np.complex64([1 + 1j, 1 - 1j])
    with pytest.raises(ValueError, match=r"low is above high in 1 of 4 elements, as at \[1, 1\]: 0.0 and -1.0"):
        gpuadam.Adam(x, complex="parts", bounds=(low, high))
    with pytest.raises(ValueError, match="would need an order of complex numbers"):
        gpuadam.Adam(x, complex="joint", bounds=(low, high))


@pytest.mark.gpu
def test_bounds_in_arrays_on_a_gpu_are_checked_but_for_their_order(cp, backend):
    x = cp.zeros(3, "f4")
    for bad in (cp.zeros(4, "f4"), cp.zeros(3, "f8"), np.zeros(3, "f4")):
        with pytest.raises((ValueError, TypeError), match="low of params"):
            gpuadam.Adam(x, bounds=(bad, None), backend=backend)
    opt = gpuadam.Adam(x, bounds=(cp.ones(3, "f4"), cp.zeros(3, "f4")), backend=backend)
    opt.step(cp.ones(3, "f4"))
    assert (cp.asnumpy(x) == 0).all()


def test_torch_has_neither():
    libraries.imported("torch")
    for options in ({"clip_value": 1.0}, {"bounds": (0, 1)}):
        with pytest.raises(ValueError, match="torch's Adam has no clip_value and no bounds"):
            gpuadam.foreign_state.to_torch(trained(**options)[1])


def test_they_add_no_byte():
    plain, both = Form(), Form(clips=True, bounded=True)
    assert bytes_per_element(plain) == bytes_per_element(both)


def test_none_is_none():
    assert checks.bounds_of_param(None) == checks.bounds_of_param((None, None)) == (-math.inf, math.inf)
    h = hyperparameters.checked(0.1, (0.9, 0.99), 1e-8, 0.0, bounds=(None, None))
    form, _ = hyperparameters.form_and_scalars(h, 1, Arrays())
    assert form == Form()


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_a_gpu_has_the_same_bits(cp, backend, capturable):
    param, opt = trained("AdamW", **OPTIONS, ema_decay=0.9)
    on_gpu = cp.asarray(grads(100))
    other = gpuadam.AdamW({"w": on_gpu}, lr=0.1, ema_decay=0.9, capturable=capturable, backend=backend, **OPTIONS)
    for k in range(5):
        other.step({"w": cp.asarray(grads(k))})
    assert cp.asnumpy(on_gpu).tobytes() == param.tobytes()
    for key in ("m", "v", "ema"):
        assert cp.asnumpy(other.state["w"][key]).tobytes() == opt.state["w"][key].tobytes()
