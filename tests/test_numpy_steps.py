"""Steps over NumPy arrays, read anew each time: what was right at one step and has changed at the next is noticed."""

import gc
import weakref

import numpy as np
import pytest

import gpuadam
from gpuadam import numpy_batches, update

OPTIONS = {
    "8 bits": {"state_dtype": "8bit"},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "copies": {"param_copies": True},
    "a mean and zeroed gradients": {"ema_decay": 0.9, "zero_grad": True},
}


@pytest.fixture
def checked(monkeypatch):
    """Counts how often the arrays of a step are checked one by one."""
    counts, view = [], update._in_views
    monkeypatch.setattr(update, "_in_views", lambda *a: counts.append(1) or view(*a))
    return counts


def made(name, n=40, grouped=False):
    rng = np.random.default_rng(0)
    params = [rng.standard_normal((3, n + k)).astype("f4") for k in range(4)]
    options = dict(OPTIONS[name])
    copies = [np.zeros(p.shape, "f2") for p in params]
    if options.pop("param_copies", False):
        options["param_copies"] = [copies[:1], copies[1:]] if grouped else copies
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:]}]
    return params, gpuadam.Adam(groups if grouped else params, lr=0.01, **options)


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(p.shape).astype("f4") for p in params]


def in_groups(grads, grouped):
    return [grads[:1], grads[1:]] if grouped else grads


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_fresh_gradients_need_no_new_checks_and_give_the_bits_of_checked_steps(monkeypatch, checked, name, grouped):
    params, opt = made(name, grouped=grouped)
    others, checking = made(name, grouped=grouped)
    checking.repeats = False
    for step in range(5):
        grads = gradients(params, step)
        opt.step(in_groups([g.copy() for g in grads], grouped))
        with monkeypatch.context() as patched:
            patched.setattr(numpy_batches, "batches", lambda groups: None)
            checking.step(in_groups(grads, grouped))
    assert len(checked) == 5
    for a, b in zip(params, others, strict=True):
        assert (a == b).all()


def test_zeroed_gradients_are_those_of_the_step():
    params, opt = made("a mean and zeroed gradients")
    for step in range(3):
        grads = gradients(params, step)
        opt.step(grads)
        assert not any(g.any() for g in grads)


def part_of(array, shape):
    return array.reshape(-1)[: shape[0] * shape[1]].reshape(shape)


CHANGES = {
    "a gradient of another shape": lambda p, g: g.__setitem__(2, g[2].T),
    "a gradient that cannot be read as a float": lambda p, g: g.__setitem__(2, g[2].astype("i4")),
    "a gradient in the other byte order": lambda p, g: g.__setitem__(2, g[2].astype(">f4")),
    "a gradient that overlaps a parameter": lambda p, g: g.__setitem__(2, p[2]),
    "a gradient that overlaps another's parameter": lambda p, g: g.__setitem__(2, part_of(p[3], g[2].shape)),
    "a parameter made read-only": lambda p, g: p[1].setflags(write=False),
    "a gradient that is no array": lambda p, g: g.__setitem__(2, [1.0]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_wrong_at_a_later_step_is_refused_before_anything_is_written(what):
    params, opt = made("8 bits")
    for step in range(2):
        opt.step(gradients(params, step))
    grads = gradients(params, 2)
    CHANGES[what](params, grads)
    before = [p.copy() for p in params]
    with pytest.raises((TypeError, ValueError)):
        opt.step(grads)
    assert all((p == b).all() for p, b in zip(params, before, strict=True))


def test_a_gradient_of_another_dtype_or_order_is_checked_anew_and_right(checked):
    params, opt = made("bfloat16 state")
    others, expected = made("bfloat16 state")
    for step in range(4):
        grads = gradients(params, step)
        expected.step([g.copy() for g in grads])
        if step == 1:
            grads = [g.astype("f8") for g in grads]  # exactly the same numbers
        if step == 2:
            grads = [np.asfortranarray(g) for g in grads]
        opt.step(grads)
        if step == 1:  # computed in float64: no longer the same bits
            for a, b in zip([*params, *moments(opt)], [*others, *moments(expected)], strict=True):
                a[...] = b
    assert len(checked) == 1  # in Fortran's order beside parameters in C order
    for a, b in zip(params, others, strict=True):
        assert (a == b).all()


def moments(opt):
    return [state[name] for state in opt.state.values() for name in ("m", "v")]


def test_a_parameter_whose_memory_is_another_is_updated_where_it_is():
    params, opt = made("copies")
    opt.step(gradients(params, 0))
    opt.step(gradients(params, 1))
    old, moved = params[1], params[1].copy()
    opt.groups[0]["params"][1] = moved
    before = old.copy()
    opt.step(gradients(params, 2))
    assert (old == before).all() and (moved != before).any()


def test_no_gradient_is_kept_alive():
    params, opt = made("8 bits")
    for step in range(3):
        grads = gradients(params, step)
        held = [weakref.ref(g) for g in grads]
        opt.step(grads)
        del grads
        gc.collect()
        assert all(ref() is None for ref in held)
