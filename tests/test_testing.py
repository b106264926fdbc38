"""What gpuadam.testing gives to other projects: exact comparison, faults and the float64 reference."""

import math
import subprocess
import sys
from pathlib import Path

import libraries
import numpy as np
import pytest
from cases import FORMS, state

import gpuadam
from gpuadam import testing

ROOT = Path(__file__).parent.parent


def test_array_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="name='cpu' must be one of 'cupy', 'numba-cuda', 'numba-cpu'"):
        testing.array_backend("cpu")


def test_require_backends_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="name='gpu' must be one of"):
        testing.require_backends("gpu")


# Bits

PAIRS = {
    "float16": (np.float16([1, np.nan]), np.float16([1.001, np.nan])),
    "float32": (np.float32([1, np.nan]), np.float32([1.0000001, np.nan])),
    "float64": (np.array([1, np.nan]), np.array([1.0000000000000002, np.nan])),
    "bfloat16": tuple(gpuadam.Bits(np.array([x, 0x7FC0], "u2"), "bfloat16") for x in (0x3F80, 0x3F81)),
}


@pytest.mark.parametrize("format", PAIRS)
def test_neighbouring_numbers_are_one_ulp_apart(format):
    one, other = PAIRS[format]
    testing.assert_same_bits(one, one)
    with pytest.raises(
        AssertionError, match=rf"1 of 2 elements differ in their bits \({format}\), by at most 1 ulp\n  at \[0\]"
    ):
        testing.assert_same_bits(one, other)


@pytest.mark.parametrize("a, b, said", [
    (0.0, -0.0, "0 ulp"),
    (np.float32(1e-45), np.float32(-1e-45), "at most 2 ulp"),
    (-math.inf, math.inf, "at most 18,437,736,874,454,810,624 ulp"),
    (1.0, math.nan, "1 NaN on one side alone"),
    (1, 2, r"at \[\]: 1, expected 2"),
    (True, False, "at .*: True, expected False"),
    (None, 1.0, "actual has no arrays, expected one array alone"),
    ([1.0], [1.0, 2.0], r"actual has the arrays \[0\], expected the arrays \[0\], \[1\]"),
    ({"a": 1.0}, {"b": 1.0}, r"actual has the arrays \['a'\], expected the arrays \['b'\]"),
    (np.float32([1]), np.float64([1]), "the elements are float32, expected float64"),
    (np.zeros((2, 1)), np.zeros((1, 2)), r"the shape is \(2, 1\), expected \(1, 2\)"),
])  # fmt: skip
def test_every_difference_is_said(a, b, said):
    with pytest.raises(AssertionError, match=said):
        testing.assert_same_bits(a, b)


def test_payloads_of_nan_are_free():
    payloads = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF], "u4").view("f4")
    testing.assert_same_bits(payloads, np.full(3, np.nan, "f4"))
    with pytest.raises(AssertionError):
        testing.assert_same_bits(payloads.view("u4"), np.full(3, np.nan, "f4").view("u4"))


def test_places_are_those_of_the_array_and_no_more_than_five_are_shown():
    a = np.zeros((4, 5), "f4")
    b = a.copy()
    b[1:, 2] = b[3, :] = 1
    with pytest.raises(AssertionError) as caught:
        testing.assert_same_bits({"w": [a.T]}, {"w": [b.T]}, "state")
    lines = str(caught.value).splitlines()
    assert lines[0] == "state['w'][0]: 7 of 20 elements differ in their bits (float32), by at most 1,065,353,216 ulp"
    assert lines[1] == "  at [0, 3]: 0.0 0x00000000, expected 1.0 0x3f800000, 1,065,353,216 ulp"
    assert len(lines) == 7 and lines[-1] == "  and 2 more"


def test_arrays_of_all_libraries_on_the_cpu_are_compared():
    ml_dtypes, torch = libraries.imported("ml_dtypes"), libraries.imported("torch")
    x = np.float32([1, -2.5, 3])
    for torchs in (torch.from_numpy(x.copy()), torch.from_numpy(x.copy()).requires_grad_()):
        testing.assert_same_bits(torchs, x)
    narrow = x.astype(ml_dtypes.bfloat16)
    for other in (torch.from_numpy(x).to(torch.bfloat16), gpuadam.Bits(narrow.view("u2"), "bfloat16")):
        testing.assert_same_bits(other, narrow)
    testing.assert_same_bits(x.astype(">f4"), x)
    testing.assert_same_bits(x.astype("c8"), x.astype("c8"))
    with pytest.raises(TypeError, match="the arrays has dtype <U1: bits are compared of float16, bfloat16"):
        testing.assert_same_bits(np.array(["a"]), np.array(["a"]))


def test_a_backend_that_is_in_use_does_not_matter_to_a_comparison():
    with gpuadam.use_backend("cupy"):
        testing.assert_same_bits(np.ones(3), np.ones(3))
        assert testing.inject(np.ones(3), at=1)[0].place == (1,)


# Arrays


def test_arrays_of_every_backend_come_back_as_they_were(library):
    for a in (np.float32(3), np.zeros((0, 2)), np.arange(12.0).reshape(3, 4)[::-1, ::2], np.arange(6).reshape(2, 3).T):
        testing.assert_same_bits(library.numpy(library.array(a)), np.asarray(a))
    testing.assert_same_bits(library.numpy(library.zeros((2, 3))), np.zeros((2, 3), "f4"))
    testing.assert_same_bits(library.numpy(library.flag(True)), np.ones(1, "f4"))


def test_bfloat16_goes_to_every_backend_and_comes_back_as_numbers(library):
    ml_dtypes = libraries.imported("ml_dtypes")
    x = np.array([1.5, -2], ml_dtypes.bfloat16)
    there = library.array(x)
    opt = gpuadam.Adam(there, lr=0.0)
    opt.step(library.array(x))
    testing.assert_same_bits(np.asarray(library.numpy(there), "f4"), x.astype("f4"))


# Faults

GRADS = {"w": (3, 4), "b": (2,), "s": (), "e": (0,)}


def grads(make=np.array):
    return {name: make(np.full(shape, 0.5, "f4")) for name, shape in GRADS.items()}


def test_a_fault_is_written_where_it_is_asked_for_and_nowhere_else(library):
    there = grads(library.array)
    found = testing.inject(there, -math.inf, at={"w": (1, -1), "s": ()})
    assert found == [("grads['w']", (1, 3), -math.inf), ("grads['s']", (), -math.inf)]
    expected = grads()
    expected["w"][1, 3] = expected["s"][()] = -math.inf
    testing.assert_same_bits({name: library.numpy(a) for name, a in there.items()}, expected)


def test_random_places_are_the_same_for_a_seed_and_all_different():
    one, other, third = grads(), grads(), grads()
    assert testing.inject(one, seed=1, count=7) != testing.inject(third, seed=2, count=7)
    testing.inject(other, seed=1, count=7)
    testing.assert_same_bits(one, other)
    assert sum(np.isnan(a).sum() for a in one.values()) == 7


def test_every_element_can_be_hit():
    everything = grads()
    assert len(testing.inject(everything, count=15)) == 15
    assert all(np.isnan(a).all() for a in everything.values())


@pytest.mark.parametrize("format", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "huge", 1.0])
def test_every_value_is_exact_in_every_format(format, value):
    if format == "bfloat16":
        grad = gpuadam.Bits(np.zeros(3, "u2"), format)
        testing.inject(grad, value, at=2)
        found = float((grad.array.astype("u4") << 16).view("f4")[2])
        huge = 3.3895313892515355e38
    else:
        grad = np.zeros(3, format)
        testing.inject(grad, value, at=2)
        found, huge = float(grad[2]), float(np.finfo(format).max)
    np.testing.assert_equal(found, huge if value == "huge" else value)


@pytest.mark.parametrize("options, error, said", [
    ({"at": {"w": (3, 0)}}, IndexError, r"at=\(3, 0\) is not an element of grads\['w'\], which has shape \(3, 4\)"),
    ({"at": {"w": 1}}, IndexError, "is not an element"),
    ({"at": {"x": 1}}, IndexError, r"at names grads\['x'\], and there are only grads\['w'\]"),
    ({"at": 3}, TypeError, "at=3 must be a dict or sequence"),
    ({"at": {"w": (0.5, 1)}}, TypeError, "float"),
    ({"count": 16}, ValueError, "count=16 must be at least 1 and at most 15"),
    ({"count": 0}, ValueError, "count=0"),
    ({"value": "large"}, TypeError, "value must be a real number"),
])  # fmt: skip
def test_a_fault_that_cannot_be_is_refused_before_anything_is_written(options, error, said):
    given = grads()
    with testing.unchanged(given=given), pytest.raises(error, match=said):
        testing.inject(given, **options)


@pytest.mark.parametrize("dtype", ["c8", "c16"])
def test_a_fault_in_complex_numbers_is_in_one_part(dtype):
    given = np.ones(3, dtype)
    assert testing.inject(given, math.inf, at=(2, 1))[0].place == (2, 1)
    assert given.tolist() == [1, 1, complex(1, math.inf)]


def test_gradients_that_cannot_be_written_are_refused():
    frozen = np.ones(3, "f4")
    frozen.flags.writeable = False
    for given, error, said in (
        (frozen, ValueError, "grads is read-only"),
        (np.ones(3, "i4"), TypeError, "grads has dtype int32"),
        ([None], ValueError, "no gradient"),
    ):
        with pytest.raises(error, match=said):
            testing.inject(given)


def test_faults_come_with_their_probability_and_a_seed_repeats_them():
    logs = []
    for _ in range(2):
        faults = testing.Faults(seed=3, probability=0.25, count=2)
        for _ in range(400):
            faults.inject(grads())
        logs.append(repr(faults.log))
        assert 60 <= sum(map(bool, faults.log)) <= 140 and all(len(found) in (0, 2) for found in faults.log)
    assert logs[0] == logs[1]
    assert {"nan", "inf", "-inf"} <= {str(fault.value) for found in faults.log for fault in found}
    with pytest.raises(ValueError, match=r"probability=1\.5 must be in"):
        testing.Faults(probability=1.5)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_loop_survives_every_kind_of_fault(capturable):
    params, faults = grads(), testing.Faults(seed=5, probability=0.3)
    opt = gpuadam.Adam(params, lr=0.1, capturable=capturable)
    for _ in range(30):
        new = grads()
        if faults.inject(new):
            with testing.unchanged(params=params, opt=opt):
                opt.step(new, check_finite=True)
        else:
            opt.step(new, check_finite=True)
    assert 0 < opt.state_dict()["state"]["w"]["step"] < 30
    assert all(np.isfinite(p).all() for p in params.values())


def test_a_step_that_is_not_left_out_is_noticed():
    w = np.ones((2, 3), "f4")
    opt = gpuadam.Adam(w)
    changed = r"^opt\['state'\]\['0'\]\['step'\]: 1 of 1 elements differ.*\n.*: 1, expected 0"
    with pytest.raises(AssertionError, match=changed), testing.unchanged(opt=opt):
        opt.step(w * np.nan)
    w[:] = 1
    with pytest.raises(AssertionError, match=r"^w: 6 of 6 elements .* 6 NaN on one side"), testing.unchanged(w=w):
        w[:] = np.nan


# On every backend


def test_a_fault_goes_into_bfloat16_of_every_backend(library):
    bits = gpuadam.Bits(library.array(np.zeros(4, "u2")), "bfloat16")
    testing.inject(bits, at=3)
    assert np.isnan(library.numpy(bits)).tolist() == [False, False, False, True]


def test_a_flag_leaves_the_step_out_and_no_bit_changes(library):
    params = {"w": library.array(np.ones((3, 4), "f4"))}
    opt = gpuadam.Adam(params, lr=0.1, capturable=True, backend=library.name)
    given = {"w": library.array(np.full((3, 4), 0.5, "f4"))}
    testing.inject(given, at={"w": (0, 0)})
    with testing.unchanged(params=params, opt=opt):
        opt.step(given, found_inf=library.flag(1))
    with pytest.raises(AssertionError, match=r"params\['w'\]: 12 of 12"), testing.unchanged(params=params):
        opt.step(given, found_inf=library.flag(0))


# The reference


def train(dtype, name, step_of=None, steps=60, scale=1.0):
    """Take steps of a form beside the reference, and return it and the parameters. step_of: another update than ours."""
    options = dict(FORMS[name])
    options.pop("step", None), options.pop("grad_scale", None)
    amsgrad, lr = options.pop("amsgrad", False), 0.01
    param = {"w": state(500, "float32")[0].astype(dtype)}
    m, v, max_v = (np.zeros(500, "f8" if dtype == "float64" else "f4") for _ in range(3))
    exact = testing.Reference(param, lr=lr, amsgrad=amsgrad, **options)
    rng = np.random.default_rng(2)
    for step in range(1, steps + 1):
        grad = (scale * rng.standard_normal(500)).astype(dtype)
        update = step_of or gpuadam.adam_step
        update(param["w"], grad, m, v, step, lr=lr, max_v=max_v if amsgrad else None, **options)
        exact.step({"w": grad})
    return exact, param


@pytest.mark.parametrize("name, dtype", [*((n, d) for n in FORMS for d in ("float32", "float64")), ("adam", "float16")])
def test_every_form_stays_within_the_tolerance(name, dtype):
    for scale in (1.0, 1e-4, 1e3):
        exact, param = train(dtype, name, scale=scale)
        exact.assert_close(param)


WRONG = {
    "lr a thousandth too large": lambda o: o | {"lr": o["lr"] * 1.001},
    "no eps": lambda o: o | {"eps": 0.0},
    "another beta2": lambda o: o | {"betas": (0.9, 0.998)},
    "coupled decay": lambda o: o | {"decoupled": False},
    "less decay": lambda o: o | {"weight_decay": 0.09},
}


@pytest.mark.parametrize("what", WRONG)
def test_an_update_that_is_not_adam_is_noticed(what):
    def wrong(param, grad, m, v, step, **options):
        gpuadam.adam_step(param, grad, m, v, step, **WRONG[what](options))

    exact, param = train("float32", "adamw", wrong, scale=1e-4)
    with pytest.raises(
        AssertionError, match=r"params\['w'\]: .* of 500 elements differ .* in 60 steps\n  at \[\d+\]: .*tolerance"
    ):
        exact.assert_close(param)


def test_lr_may_be_a_function_and_a_gradient_none():
    params = {"a": np.ones(3, "f4"), "b": np.ones(2, "f4")}
    lr = {"lr": lambda step: 0.1 / step}
    opt, exact = gpuadam.Adam(params, **lr), testing.Reference(params, **lr)
    for k in range(6):
        given = {"a": np.float32([1, -2, 3]) * (k - 2.5), "b": None if k % 2 else np.ones(2, "f4")}
        opt.step(given, grad_scale=0.5)
        exact.step(given, grad_scale=0.5)
    exact.assert_close(params)
    params["b"][0] += np.float32(1e-4)
    with pytest.raises(AssertionError, match=r"params\['b'\]: 1 of 2"):
        exact.assert_close(params)
    exact.assert_close(params, atol=1e-4)


@pytest.mark.parametrize("where", [None, "arrays", "nonzero"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}], ids=str)
def test_rates_and_flags_of_elements_rows_and_vectors_are_those_of_a_step(where, options):
    rng = np.random.default_rng(0)
    params = {
        "elements": rng.standard_normal((5, 4)).astype("f4"),
        "rows": rng.standard_normal((5, 4)),
        "none": np.ones(2, "f4"),
    }
    shapes = {"elements": (5, 4), "rows": (5,)}
    opt, exact = gpuadam.Adam(params, lr=0.1, **options), testing.Reference(params, lr=0.1, **options)
    for _ in range(5):
        grads = {
            name: rng.standard_normal(p.shape).astype(p.dtype) * (rng.random(p.shape) < 0.5) for name, p in params.items()
        }
        of_step = {"lr_scale": {name: np.float32(rng.random(shape) * 3) for name, shape in shapes.items()} | {"none": None}}
        flags = {name: rng.random(shape) < 0.5 for name, shape in shapes.items()} | {"none": None}
        of_step["where"] = flags if where == "arrays" else where
        opt.step(grads, **of_step)
        exact.step(grads, **of_step)
    exact.assert_close(params)
    params["elements"] += np.float32(1e-3)
    with pytest.raises(AssertionError, match=r"params\['elements'\]: .* of 20 elements differ"):
        exact.assert_close(params)


@pytest.mark.parametrize("options", [{"complex": "joint"}, {"complex": "parts"}, {"components": 2}], ids=str)
def test_rates_and_flags_go_with_complex_numbers_and_vectors(options):
    rng = np.random.default_rng(0)

    def numbers():
        pairs = rng.standard_normal((6, 3, 2)).astype("f4")
        return pairs.view("c8")[..., 0] if "complex" in options else pairs

    param = numbers()
    opt, exact = gpuadam.Adam(param, lr=0.1, **options), testing.Reference(param, lr=0.1, **options)
    for k in range(4):
        shape, grad = ((6, 3), (6,))[k % 2], numbers()
        for one in (opt, exact):
            made = np.random.default_rng(k)
            one.step(grad, lr_scale=made.random(shape), where=(made.random(shape) < 0.5).astype("u1"))
        grad[1] = 0
        for one in (opt, exact):
            one.step(grad, where="nonzero")
    exact.assert_close(param)


def test_what_does_not_fit_the_reference_is_refused():
    exact = testing.Reference([np.ones(3, "f4")])
    for given, said in (
        ([np.ones(2, "f4")], r"gradients of params\[0\] of \(2,\); the parameters have the shapes .*\(3,\)"),
        ([None, np.ones(3, "f4")], r"gradients of params\[1\] of \(3,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            exact.step(given)
    for of_step, said in (
        (
            {"where": [np.ones(2, "?")]},
            r"where of params\[0\] has shape \(2,\): it must have the shape \(3,\), or its leading",
        ),
        ({"lr_scale": [None, np.ones(3)]}, r"there is lr_scale of params\[1\], and there are the parameters params\[0\]"),
        ({"where": "zero"}, "where='zero' must be an array of flags, or 'nonzero'"),
    ):
        with pytest.raises(ValueError, match=said):
            exact.step([np.ones(3, "f4")], **of_step)
    for params, said in (
        ([np.ones(3)], "began with float32"),
        ([np.ones(2, "f4")], "of shape"),
        ({}, "params has no arrays"),
    ):
        with pytest.raises(AssertionError, match=said):
            exact.assert_close(params)
    with pytest.raises(TypeError, match="dtype int64"):
        testing.Reference(np.ones(3, "i8"))
    assert exact.steps == 0


def test_nan_in_both_is_close_and_in_one_is_not():
    w = np.ones(2, "f4")
    exact = testing.Reference(w)
    exact.step(np.float32([np.nan, 1]))
    with pytest.raises(AssertionError, match="1 of 2"):
        exact.assert_close(np.float32([1, 0.999]))
    exact.assert_close(np.float32([np.nan, 0.999]))


def test_importing_the_tools_loads_no_gpu_library_and_no_pytest(monkeypatch):
    code = "import gpuadam.testing, sys; print(sorted({'cupy', 'numba', 'pytest', 'torch', 'ml_dtypes'} & set(sys.modules)))"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
