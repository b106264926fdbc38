"""Learning rates that are callables of the step: what they may return, and optax's schedules as they are."""

import math
from fractions import Fraction

import libraries
import numpy as np
import pytest
from cases import different_bits

import gpuadam

STEPS = 12


def trained(lr):
    """Return a parameter after some steps; lr is a schedule, or the learning rate of each step."""
    param = np.linspace(-1, 1, 40).astype("f4")
    opt = gpuadam.Adam(param, lr=lr if callable(lr) else lr[0])
    for step in range(STEPS):
        if not callable(lr):
            opt.groups[0]["lr"] = lr[step]
        opt.step(2 * param)
    return param


@pytest.fixture
def optax():
    libraries.imported("jax", reason="JAX, by which optax computes, is not installed")
    return libraries.imported("optax", reason="optax is not installed")


@pytest.fixture(params=["warmup_cosine", "linear", "exponential", "joined"])
def schedule(request, optax):
    """A schedule of optax, which returns a JAX array of no dimensions or a number."""
    return {
        "warmup_cosine": lambda: optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, STEPS),
        "linear": lambda: optax.linear_schedule(0.1, 0.01, STEPS),
        "exponential": lambda: optax.exponential_decay(0.1, 3, 0.5),
        "joined": lambda: optax.join_schedules([optax.constant_schedule(0.1), optax.linear_schedule(0.1, 0.0, 6)], [6]),
    }[request.param]()


def test_a_schedule_of_optax_is_a_learning_rate(schedule):
    rates = [float(schedule(step)) for step in range(1, STEPS + 1)]
    assert len(set(rates)) > 2
    assert different_bits(trained(schedule), trained(rates)) == 0


def test_one_step_earlier_a_schedule_is_as_in_optax(optax):
    """optax counts from 0: its first update has schedule(0)."""
    jax = libraries.imported("jax")
    schedule = optax.warmup_cosine_decay_schedule(0.01, 0.1, 4, STEPS)
    theirs = jax.numpy.linspace(-1, 1, 40).astype("float32")
    adam = optax.adam(schedule)
    state = adam.init(theirs)
    for _ in range(STEPS):
        updates, state = adam.update(2 * theirs, state)
        theirs = optax.apply_updates(theirs, updates)
    ours, direct = trained(lambda step: schedule(step - 1)), trained(schedule)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)  # optax rounds other intermediate results
    assert np.abs(direct - theirs).max() > 1e-3


@pytest.mark.parametrize(
    "number",
    [np.float32, np.float64, Fraction, lambda x: np.array(x, "f4"), lambda x: np.array(x, "f8")],
    ids=["float32", "float64", "Fraction", "an array of float32", "an array of float64"],
)
def test_a_schedule_may_return_any_number_or_an_array_of_no_dimensions(number):
    rates = [float(number(0.1 / step)) for step in range(1, STEPS + 1)]
    assert different_bits(trained(lambda step: number(0.1 / step)), trained(rates)) == 0


def test_a_schedule_may_return_a_tensor_of_no_dimensions():
    torch = libraries.imported("torch")
    rates = [0.125 / 2**step for step in range(STEPS)]
    assert different_bits(trained(lambda step: torch.tensor(0.25 / 2**step)), trained(rates)) == 0


def test_an_integer_array_is_a_number_too():
    assert different_bits(trained(lambda step: np.array(1)), trained([1.0] * STEPS)) == 0


@pytest.mark.parametrize(
    "value, error, match",
    [
        (
            None,
            TypeError,
            r"not None \(NoneType\): the function that was given as lr returned it for step 2",
        ),
        ("0.1", TypeError, "lr must be a real number, not '0.1'"),
        (np.array([0.1]), TypeError, "lr must be a real number, not array"),
        (np.array(True), TypeError, "lr must be a real number, not True"),
        (np.array(0.1j), TypeError, "lr must be a real number, not 0.1j"),
        (np.array(None), TypeError, "lr must be a real number, not None"),
        (np.array(-0.1), ValueError, "lr=-0.1"),
        (np.array(math.nan, "f4"), ValueError, "lr=nan"),
        (np.float32(math.inf), ValueError, "lr=inf"),
    ],
)
def test_what_is_no_learning_rate_stops_the_step_before_anything_is_written(value, error, match):
    param = np.ones(3, "f4")
    opt = gpuadam.Adam(param, lr=lambda step: 0.1 if step < 2 else value)
    opt.step(param * 2)
    before = param.copy(), opt.state["0"]["m"].copy()
    with pytest.raises(error, match=match):
        opt.step(param * 2)
    assert (param == before[0]).all() and (opt.state["0"]["m"] == before[1]).all() and opt.steps == 1


def test_each_group_has_a_schedule_of_its_own():
    a, b = np.ones(3, "f4"), np.ones(3, "f4")
    opt = gpuadam.Adam([{"params": [a], "lr": lambda step: np.array(0.0)}, {"params": [b]}], lr=lambda step: 0.1 * step)
    for _ in range(3):
        opt.step([[2 * a], [2 * b]])
    assert (a == 1).all() and b == pytest.approx(1 - 0.1 - 0.2 - 0.3, abs=0.05)


def test_a_schedule_goes_on_where_a_loaded_state_left_off():
    seen = []
    one, other = np.ones(3, "f4"), np.ones(3, "f4")
    first = gpuadam.Adam(one, lr=lambda step: np.array(0.1 / step))
    for _ in range(3):
        first.step(2 * one)
    second = gpuadam.Adam(other, lr=lambda step: seen.append(step) or np.array(0.1 / step))
    second.load_state_dict(first.state_dict())
    seen.clear()
    second.step(2 * other)
    assert seen == [4]


def test_a_capturable_optimizer_takes_schedules_on_the_cpu():
    param, other = np.ones(3, "f4"), np.ones(3, "f4")
    schedule = lambda step: np.array(0.1 / step, "f4")  # noqa: E731
    one, two = gpuadam.Adam(param, lr=schedule, capturable=True), gpuadam.Adam(other, lr=schedule)
    for _ in range(3):
        one.step(2 * param)
        two.step(2 * other)
    assert different_bits(param, other) == 0
