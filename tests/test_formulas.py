"""Adam as other libraries write it: 1,000 steps beside theirs."""

import libraries
import numpy as np
import pytest

import gpuadam

N, STEPS = 1003, 1000
TOLERANCE = 1.5e-5


def gradients(step):
    """Each element's have their own size, from 1e-9 to 1, so that eps counts for some and not for others."""
    return np.float32(np.random.default_rng(step).standard_normal(N) * np.logspace(-9, 0, N))


def start():
    return np.random.default_rng(0).standard_normal(N).astype("f4")


def ours(lr, decoupled=False, make=None, **options):
    param = start()
    opt = (make or (gpuadam.AdamW if decoupled else gpuadam.Adam))(param, lr=lr, **options)
    for step in range(1, STEPS + 1):
        opt.step(gradients(step))
    return param


def assert_close(param, theirs, lr):
    """Each step rounds param, of up to 4, here and there: 1,000 roundings, at random, of 2**-24 of it; and the updates'."""
    assert np.abs(param - theirs).max() <= TOLERANCE + 2e-3 * lr


OF_OPTAX = {
    "adam": ({}, {}),
    "adam with eps_root": ({"eps": 1e-7, "eps_root": 1e-12}, {"eps": 1e-7, "eps_root": 1e-12}),
    "adamw": ({"weight_decay": 0.1, "eps_root": 1e-14}, {"weight_decay": 0.1, "eps_root": 1e-14, "decoupled": True}),
    "amsgrad": ({"b2": 0.9}, {"amsgrad": True, "betas": (0.9, 0.9)}),
    "nadam": ({}, {"make": gpuadam.NAdam}),
    "nadam with other betas": ({"b1": 0.8, "b2": 0.95}, {"make": gpuadam.NAdam, "betas": (0.8, 0.95)}),
}


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("name", OF_OPTAX)
def test_a_thousand_steps_are_optaxs(name, lr):
    optax = libraries.imported("optax", reason="optax is not installed; the float64 reference stands for it")
    import jax

    theirs, options = OF_OPTAX[name]
    make = getattr(optax, name.split()[0])
    transformation = make(lr, **theirs)

    @jax.jit
    def update(param, state, grad):
        updates, state = transformation.update(grad, state, param)
        return optax.apply_updates(param, updates), state

    param = jax.numpy.asarray(start())
    state = transformation.init(param)
    for step in range(1, STEPS + 1):
        param, state = update(param, state, gradients(step))
    assert_close(ours(lr, formula="optax", **options), np.asarray(param), lr)


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_a_thousand_steps_are_thincs(lr):
    thinc = libraries.imported("thinc.api", reason="thinc is not installed; the float64 reference stands for it")
    opt, param = thinc.Adam(lr, L2=0.0, grad_clip=0.0, eps=1e-8), start()
    for step in range(1, STEPS + 1):
        param, _ = opt((0, "w"), param, gradients(step))
    assert_close(ours(lr, formula="eps-hat"), param, lr)


@pytest.mark.parametrize("weight_decay, adam_w_mode", [(0.0, True), (0.1, True), (0.1, False)])
def test_a_thousand_steps_are_apexs(weight_decay, adam_w_mode):
    """Its kernel's formula, which has the decay inside the bracket, in float64: it needs a GPU to be built."""
    lr, beta1, beta2, eps = 1e-2, 0.9, 0.999, 1e-8
    p, m, v = start().astype("f8"), np.zeros(N), np.zeros(N)
    for step in range(1, STEPS + 1):
        g = gradients(step) + (0.0 if adam_w_mode else weight_decay * p)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        denom = np.sqrt(v / (1 - beta2**step)) + eps
        p -= lr * (m / (1 - beta1**step) / denom + (weight_decay * p if adam_w_mode else 0.0))
    assert_close(ours(lr, adam_w_mode, formula="apex", weight_decay=weight_decay), p, lr)


def test_the_formulas_are_told_apart():
    """By more than the tolerance of these tests, where gradients are as small as eps."""
    lr = 1e-3
    found = {name: ours(lr, formula=name) for name in ("torch", "apex", "eps-hat", "optax")}
    assert (found["torch"] == found["apex"]).all()
    assert np.abs(found["torch"] - found["eps-hat"]).max() > 10 * TOLERANCE
    assert_close(found["torch"], found["optax"], lr)
    assert np.abs(ours(lr, formula="optax", eps_root=1e-12) - found["optax"]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("cls", [gpuadam.RAdam, gpuadam.AdaMax])
def test_another_algorithm_has_no_formula(cls):
    with pytest.raises(ValueError, match="leave it out"):
        cls(np.ones(3, "f4"), formula="eps-hat")


@pytest.mark.parametrize(
    "options, needed",
    [({"formula": "eps-hat"}, "NAdam has 'torch' and 'optax'"), ({"formula": "optax", "eps_root": 1e-9}, "NAdam has none")],
)
def test_nadam_has_optaxs_formula_and_no_other_of_adams(options, needed):
    with pytest.raises(ValueError, match=needed):
        gpuadam.NAdam(np.ones(3, "f4"), **options)
