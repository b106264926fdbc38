"""Steps on a GPU that are as the last one: the same bits as the long way, and nothing that differs goes unnoticed."""

import copy
import gc
import weakref

import numpy as np
import pytest

import gpuadam
from gpuadam import repeated_on_gpu, testing, update
from gpuadam.repeated import RepeatedStep

pytestmark = pytest.mark.gpu

SHAPES = (5,), (3, 4), (1000,)


def arrays(library, seed):
    rng = np.random.default_rng(seed)
    return [library.array(rng.standard_normal(shape).astype("float32")) for shape in SHAPES]


def numbers(library, some):
    return [library.numpy(a).copy() for a in some]


class Twins:
    """An optimizer, and another that takes the same steps the long way."""

    def __init__(self, backend, **options):
        self.library = testing.array_backend(backend)
        self.params, self.others, self.grads = (arrays(self.library, seed) for seed in (1, 1, 2))
        self.quick, self.slow = gpuadam.Adam(self.params, **options), gpuadam.Adam(self.others, **options)
        self.slow.repeats = False

    def step(self, *grads, times=1, **options):
        for _ in range(times):
            self.quick.step(*(grads or (self.grads,)), **options)
            self.slow.step(*(grads or (self.grads,)), **options)

    def assert_same(self):
        for one, other in zip(numbers(self.library, self.params), numbers(self.library, self.others), strict=True):
            assert (one.view("u4") == other.view("u4")).all()
        assert self.quick.steps == self.slow.steps
        assert [s["step"] for s in self.quick.state.values()] == [s["step"] for s in self.slow.state.values()]


@pytest.fixture
def took(monkeypatch):
    """A list of whether each step of an optimizer that could be quick was."""
    done, as_last = [], RepeatedStep.as_last

    def noted(self, *step):
        done.append(as_last(self, *step))
        return done[-1]

    monkeypatch.setattr(RepeatedStep, "as_last", noted)
    return done


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}]
)
def test_repeated_steps_have_the_bits_of_the_long_way(backend, took, options):
    twins = Twins(backend, **options)
    twins.step(times=6)
    assert took and all(took)
    twins.assert_same()


def test_other_rates_and_other_numbers_in_the_gradients_are_followed(backend, took):
    twins = Twins(backend)
    twins.step(times=4)
    for opt in (twins.quick, twins.slow):
        opt.groups[0]["lr"] = 0.5
    twins.step()
    assert all(took)
    twins.assert_same()


def test_gradients_in_new_arrays_are_taken(backend):
    twins = Twins(backend)
    for seed in range(6):
        twins.step(arrays(twins.library, seed))
    twins.assert_same()


def other_decay(twins):
    for opt in (twins.quick, twins.slow):
        opt.groups[0]["weight_decay"] = 0.1


def other_state(twins):
    for opt in (twins.quick, twins.slow):
        list(opt.state.values())[1]["m"] = twins.library.array(np.ones(SHAPES[1], "float32"))


def other_count(twins):
    for opt in (twins.quick, twins.slow):
        list(opt.state.values())[2]["step"] = 40


CHANGES = {"decay": other_decay, "state": other_state, "count": other_count}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_noticed(backend, took, what):
    twins = Twins(backend)
    twins.step(times=4)
    CHANGES[what](twins)
    twins.step()
    assert not took[-1]
    twins.step(times=3)
    twins.assert_same()


def test_a_parameter_without_a_gradient_stays(backend, took):
    twins = Twins(backend)
    twins.step(times=4)
    before = numbers(twins.library, twins.params)[1]
    twins.step([twins.grads[0], None, twins.grads[2]])
    assert not took[-1]
    assert (numbers(twins.library, twins.params)[1] == before).all()
    twins.assert_same()


def test_a_gradient_of_another_shape_is_refused_and_nothing_changes(backend):
    twins = Twins(backend)
    twins.step(times=4)
    before = numbers(twins.library, twins.params)
    wrong = [twins.grads[0], twins.library.array(np.zeros((4, 3), "float32")), twins.grads[2]]
    with pytest.raises(ValueError, match="shape"):
        twins.quick.step(wrong)
    for one, other in zip(numbers(twins.library, twins.params), before, strict=True):
        assert (one == other).all()
    assert twins.quick.steps == 4


def test_a_cupy_array_that_takes_another_shape_in_place_is_noticed(cp):
    twins = Twins("cupy")
    twins.step(times=4)
    twins.grads[1].shape = (4, 3)
    with pytest.raises(ValueError, match="shape"):
        twins.quick.step(twins.grads)


def test_no_gradient_is_kept_alive(cp):
    twins = Twins("cupy")
    twins.step(times=4)
    held = weakref.ref(twins.grads[0])
    twins.grads = None
    gc.collect()
    assert held() is None


def test_a_copy_takes_steps_of_its_own(cp):
    twins = Twins("cupy")
    twins.step(times=4)
    other = copy.deepcopy(twins.quick)
    before = numbers(twins.library, twins.params)
    other.step(twins.grads)
    for one, same in zip(numbers(twins.library, twins.params), before, strict=True):
        assert (one == same).all()


def test_a_step_goes_to_the_stream_that_is_current_then(cp, driver):
    twins = Twins("cupy")
    twins.step(times=4)
    stream = cp.cuda.Stream(non_blocking=True)
    driver.listen()
    with stream:
        twins.quick.step(twins.grads)
    assert [handle for _, handle in driver.launches] == [stream.ptr]
    cp.cuda.Device().synchronize()


def test_a_step_that_a_graph_would_freeze_is_refused(cp):
    twins = Twins("cupy")
    twins.step(times=4)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="capturable"):
                twins.quick.step(twins.grads)
        finally:
            stream.end_capture()
    assert twins.quick.steps == 4


def test_adam_step_views_the_same_arrays_once(backend, monkeypatch):
    library = testing.array_backend(backend)
    (param, *_), (grad, *_), (other, *_) = (arrays(library, seed) for seed in (1, 2, 1))
    m, v, other_m, other_v = (library.zeros(SHAPES[0]) for _ in range(4))
    viewed, in_views = [], update._in_views
    monkeypatch.setattr(update, "_in_views", lambda groups, backend: viewed.append(1) or in_views(groups, backend))
    for step in range(1, 5):
        gpuadam.adam_step(param, grad, m, v, step, lr=0.1 / step)
    assert len(viewed) == 1
    monkeypatch.setattr(repeated_on_gpu, "READ", {})
    for step in range(1, 5):
        gpuadam.adam_step(other, grad, other_m, other_v, step, lr=0.1 / step)
    assert len(viewed) == 5
    for one, same in ((param, other), (m, other_m), (v, other_v)):
        assert (library.numpy(one) == library.numpy(same)).all()


def test_adam_step_notices_other_arrays_and_settings(backend):
    library = testing.array_backend(backend)
    (param, *_), (grad, *_) = arrays(library, 1), arrays(library, 2)
    m, v = library.zeros(SHAPES[0]), library.zeros(SHAPES[0])
    gpuadam.adam_step(param, grad, m, v, 1)
    with pytest.raises(ValueError, match="shape"):
        gpuadam.adam_step(param, arrays(library, 2)[1], m, v, 2)
    with pytest.raises(ValueError, match="memory"):
        gpuadam.adam_step(param, grad, m, m, 2)
    gpuadam.adam_step(param, grad, m, v, 2, zero_grad=True)
    assert not library.numpy(grad).any()
