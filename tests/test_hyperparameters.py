import math
from fractions import Fraction

import numpy as np
import pytest

from gpuadam import hyperparameters
from gpuadam.kernels import adam
from gpuadam.kernels.adam import Form
from gpuadam.kernels.operands import Arrays


def checked(**changes):
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False, "maximize": False}
    return hyperparameters.checked(**options | changes)


def scalars(dtype="float32", step=1, **changes):
    return hyperparameters.form_and_scalars(checked(**changes), step, Arrays(dtype, dtype, dtype))


def test_the_scalars_are_of_the_compute_type():
    for dtype in ("float32", "float64"):
        _, s = scalars(dtype, weight_decay=0.1)
        assert all(type(x) is float and float(np.dtype(dtype).type(x)) == x for x in s)


def test_one_minus_beta_is_formed_before_rounding():
    _, s = scalars()
    assert s.w2 == np.float32(1 - 0.999)
    assert s.w2 != np.float32(1) - np.float32(0.999)


@pytest.mark.parametrize("beta, near", [(0.0, False), (0.25, False), (0.5, False), (0.50001, True), (0.9, True)])
def test_lerp_starts_from_the_nearer_end(beta, near):
    form, s = scalars(betas=(beta, beta))
    assert (form.near1, form.near2) == (near, near)
    expected = Fraction(float(np.float32(1 - beta))) - (0 if near else 1)
    assert Fraction(float(s.w1)) == expected  # w - 1 is exact


def test_the_scalars_of_a_step():
    form, s = scalars(
        "float64", step=10, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, decoupled=True, maximize=True
    )
    assert form == Form(Arrays(*["float64"] * 3), scaled=True, decoupled=True)
    assert form.dtype == np.dtype("float64") and not form.amsgrad
    assert s.grad_scale == -1.0
    assert s.decay == -0.01 * 0.1
    assert s.neg_lr == pytest.approx(-0.01 / (1 - 0.9**10), rel=1e-15)
    assert s.inv_sqrt_bias2 == pytest.approx(1 / math.sqrt(1 - 0.99**10), rel=1e-15)
    assert s.eps == 1e-6


@pytest.mark.parametrize("algorithm", hyperparameters.ALGORITHMS)
@pytest.mark.parametrize("ema", ["", "float32"])
def test_the_scalars_are_those_that_a_form_names(algorithm, ema):
    h = checked(algorithm=algorithm, ema_decay=0.9)
    form, s = hyperparameters.form_and_scalars(h, 7, Arrays(ema=ema))
    assert s._fields == adam.scalar_names(form)
    assert "w_ema" not in s._fields if not ema else s.w_ema == np.float32(0.1)
    if algorithm == "nadam":
        mu = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * k)) for k in range(1, 9)]
        assert s.of_m == pytest.approx(mu[7] / (1 - math.prod(mu)), rel=1e-7)
        assert s.of_g == pytest.approx((1 - mu[6]) / (1 - math.prod(mu[:7])), rel=1e-7)


def test_nadams_formulas_differ_in_their_scalars_alone():
    forms, shares = {}, {}
    for formula in ("torch", "optax"):
        h = checked(algorithm="nadam", formula=formula, lr=0.5)
        forms[formula], s = hyperparameters.form_and_scalars(h, 7, Arrays())
        shares[formula] = s.of_m, s.of_g
        assert s.neg_lr == -0.5 and s.inv_sqrt_bias2 == pytest.approx((1 - 0.999**7) ** -0.5, rel=1e-7)
    assert forms["torch"] == forms["optax"]  # so one kernel, whose bits are compared on every backend, has both
    assert shares["optax"] == pytest.approx((0.9 / (1 - 0.9**8), (1 - 0.9) / (1 - 0.9**7)), rel=1e-7)
    assert shares["torch"] != pytest.approx(shares["optax"], rel=1e-2)


def test_the_formulas_differ_in_their_scalars_alone_or_have_one_more():
    kernels = {}
    for formula in hyperparameters.FORMULAS:
        h = checked(formula=formula, eps=1e-6, betas=(0.9, 0.99), **({"eps_root": 1e-9} if formula == "optax" else {}))
        kernels[formula], s = hyperparameters.form_and_scalars(h, 10, Arrays())
        assert s._fields == adam.scalar_names(kernels[formula])
        bias2 = 1 - 0.99**10
        expected = {"eps-hat": 1.0, "optax": 1 / bias2}.get(formula, bias2**-0.5)
        assert s.inv_sqrt_bias2 == pytest.approx(expected, rel=1e-7)
        assert s.eps == np.float32(1e-6)
        assert getattr(s, "eps_root", None) == (np.float32(1e-9) if formula == "optax" else None)
    assert kernels["torch"] == kernels["apex"] == kernels["eps-hat"] != kernels["optax"]


def test_the_mean_of_an_optimizer_starts_at_the_first_new_parameter():
    for ema_decay, near in ((0.9, True), (0.25, False)):
        h = checked(ema_decay=ema_decay, ema_starts=True)
        form, first = hyperparameters.form_and_scalars(h, 1, Arrays(ema="float32"))
        _, second = hyperparameters.form_and_scalars(h, 2, Arrays(ema="float32"))
        # from ema the whole way, or from param none of it
        assert form.near_ema == near and first.w_ema == (1.0 if near else 0.0)
        assert second.w_ema == np.float32(1 - ema_decay) - (not near)


def test_what_is_not_used_is_left_out_of_the_form():
    form, _ = scalars(weight_decay=0.0, grad_scale=1.0)
    assert not (form.scaled or form.l2 or form.decoupled or form.amsgrad)
    assert scalars(weight_decay=0.1)[0].l2
    assert scalars(lr=0.0, weight_decay=0.1, decoupled=True)[0].decoupled
    assert not scalars(maximize=True, grad_scale=-1.0)[0].scaled


def test_numbers_of_every_kind_are_taken():
    assert checked(lr=np.float32(0.5), eps=np.float64(0), weight_decay=1).lr == 0.5
    assert checked(lr=Fraction(1, 2)).lr == 0.5
    assert checked(betas=[0, 0.5]).fixed.beta2 == 0.5
