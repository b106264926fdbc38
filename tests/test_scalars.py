"""The formula of a step's scalars in Python, on the host. test_device_step.py compares the device's with it."""

import numpy as np
import pytest

from gpuadam import hyperparameters
from gpuadam.kernels import scalars
from gpuadam.kernels.operands import Arrays
from gpuadam.kernels.scalars import on_host, powers_on_host


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 10, 1000, 2**31 + 1])
def test_power_is_close_to_the_exact_power(base, exponent):
    # each of the some 2 log2(exponent) products rounds once, and a relative error of base grows by exponent
    assert powers_on_host(base, base, exponent)[0] == pytest.approx(base**exponent, rel=1e-15 * max(exponent, 1), abs=1e-300)


def test_the_cached_power_is_the_loop_of_the_formula():
    rng = np.random.default_rng(0)
    for exponent in (0, 1, 2, 1023, 1024, 1025, 2**20 + 3, 2**62 + 1, *rng.integers(0, 2**40, 200).tolist()):
        beta1, beta2 = rng.random(2).tolist()
        assert powers_on_host(beta1, beta2, exponent) == on_host().powers(exponent, beta1, beta2)


@pytest.mark.parametrize("decoupled", [False, True])
def test_plain_adam_has_the_scalars_of_the_formula(decoupled):
    """Its lines stand once more in `form_and_scalars`, which is called in every step."""
    rng, arrays = np.random.default_rng(0), Arrays("float64", "float64", "float64")
    for step in (1, 2, 3, 1000, 2**33 + 1, *rng.integers(1, 10**6, 100).tolist()):
        lr, decay, beta1, beta2 = (10.0 ** rng.uniform(-6, -1, 4)).tolist()
        betas = 1 - beta1, 1 - beta2
        h = hyperparameters.checked(lr, betas, 1e-8, decay, decoupled, maximize=False)
        _, found = hyperparameters.form_and_scalars(h, step, arrays)
        formula = scalars.on_host("adam", decoupled)
        expected = formula.of_step(step, *formula.powers(step, *betas), lr, betas[1], decay, 1e-8)
        assert (found.decay, found.inv_sqrt_bias2, found.eps, found.neg_lr) == expected
