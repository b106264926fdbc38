"""The rule in kernels of users: `gpuadam.Rule` gives the bits of adam_step, whatever the options of the kernel."""

import sys

import numba
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, few
from rules import KEYS, OPTIONS, arrays_of, assert_steps, in_adam_step, over_elements

import gpuadam
from gpuadam.kernels import element_numba

LOOP = "    for i in range(param.size):\n        "


@pytest.mark.in_short("name")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", few(OPTIONS, KEYS[-1], "nadam"))
def test_njit_code_gives_adam_steps_bits(name, dtype):
    rule = gpuadam.Rule(dtype, **OPTIONS[name])
    kernel = numba.njit(over_elements(rule, rule.for_njit(), LOOP))
    assert_steps(OPTIONS[name], rule, lambda arrays, s: kernel(*arrays, s))


def test_the_fastmath_of_njit_code_does_not_reach_the_update():
    name = "all with adamw"
    element_numba.build.cache_clear()  # code is compiled with the options of the first that calls it
    rule = gpuadam.Rule("float32", **OPTIONS[name])
    kernel = numba.njit(fastmath=True, error_model="python")(over_elements(rule, rule.for_njit(), LOOP))
    assert_steps(OPTIONS[name], rule, lambda arrays, s: kernel(*arrays, s))


def test_the_numbers_of_a_step_change_from_step_to_step():
    options = {"weight_decay": 0.1, "decoupled": True, "grad_scale": 0.5, "clip_value": 2.0, "bounds": (-1, 1)}
    rule = gpuadam.Rule("float32", **options)
    kernel = numba.njit(over_elements(rule, rule.for_njit(), LOOP))
    arrays = arrays_of(rule)
    every = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2, "clip_value": 1.0, "bounds": (None, 0.5)}
    for changes in (every, {"lr": 0.0}, {"grad_scale": 1.0}, {"grad_scale": 1e-3}):
        expected = in_adam_step(options | changes, arrays, rule.arguments, 3)
        kernel(*arrays, rule.scalars(3, **changes))
        assert_same_bits(arrays, expected, f"with {changes}")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight_decay": 0.1}, r"weight_decay=0\.1 needs another kernel than a Rule made with weight_decay=0\.0"),
        ({"betas": (0.9, 0.3)}, r"betas=\(0\.9, 0\.3\) needs another kernel"),
        ({"grad_scale": 0.5}, r"grad_scale=0\.5 needs another kernel"),
        ({"bounds": (0, None)}, r"bounds=\(0, None\) needs another kernel"),
        ({"clip_value": 1}, "clip_value=1 needs another kernel"),
        ({"lr": -1}, "lr=-1.0 must be finite and not negative"),
        ({"step": 0}, "step=0 must be at least 1"),
    ],
)
def test_numbers_that_the_kernel_cannot_take_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        gpuadam.Rule("float32").scalars(**{"step": 1} | changes)


@pytest.mark.parametrize("name", ["decoupled", "amsgrad", "ema_decay", "x" * 1000])
def test_what_no_step_can_change_is_refused(name):
    with pytest.raises(TypeError, match=r"a step cannot change .*make another Rule") as raised:
        gpuadam.Rule("float32").scalars(1, **{name: True})
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16' must be float32 or float64, .* converts narrower numbers"),
        ({"dtype": None}, ValueError, "dtype=None must be float32 or float64"),
        ({"algorithm": "sgd"}, ValueError, "algorithm='sgd' must be one of"),
        ({"algorithm": "nadam", "amsgrad": True}, ValueError, "AMSGrad is a variant of Adam, and NAdam has none"),
        ({"algorithm": "radam", "formula": "optax"}, ValueError, "formula='optax' is one of Adam's"),
        ({"amsgrad": 1}, TypeError, "amsgrad must be True or False, not 1"),
        ({"eps": 1e-60}, ValueError, "eps=1e-60 rounds to 0 in float32"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay=1\.0 must be in \[0, 1\)"),
        ({"bounds": (1, 0)}, ValueError, r"bounds=\(1, 0\) must be two numbers, the first not above the second"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        gpuadam.Rule(**options)


@pytest.mark.parametrize("namespace", ["a b", "", "2d", None, "n" * 999 + "-"])
def test_a_namespace_is_an_identifier(namespace):
    for text in (gpuadam.Rule().for_cuda_c, gpuadam.Rule().for_elementwise):
        with pytest.raises(ValueError, match="must be an identifier of CUDA C") as raised:
            text(namespace)
        assert len(str(raised.value)) < 500


def test_a_number_of_another_type_is_refused_when_njit_code_is_compiled():
    rule = gpuadam.Rule("float32")
    kernel = numba.njit(over_elements(rule, rule.for_njit(), LOOP, grad="2.0 * grad[i]"))
    with pytest.raises(numba.TypingError, match=r"grad is float64, and must be float32: float32\(grad\)"):
        kernel(*arrays_of(rule), rule.scalars(1))
    kernel = numba.njit(over_elements(rule, rule.for_njit(), LOOP))
    with pytest.raises(numba.TypingError, match=r"s is UniTuple.*, and must be what scalars.* of the same Rule returns"):
        kernel(*arrays_of(rule), gpuadam.Rule("float64").scalars(1))


def test_equal_rules_have_one_function_and_other_numbers_are_none_of_it():
    assert gpuadam.Rule("float32").for_njit() is gpuadam.Rule(np.float32, lr=3.0, betas=(0.8, 0.99)).for_njit()
    assert gpuadam.Rule("float32").for_cuda_c() != gpuadam.Rule("float64").for_cuda_c()


def test_without_numba_cuda_the_error_says_what_mends_it(monkeypatch):
    if "numba-cuda" in gpuadam.available_backends():
        pytest.skip("Numba CUDA works here")
    monkeypatch.setitem(sys.modules, "gpuadam.kernels.numba_cuda_kernels", None)
    with pytest.raises(gpuadam.BackendUnavailableError, match=r"backend 'numba-cuda' is not available: .*To mend it: "):
        gpuadam.Rule().for_cuda_jit()
