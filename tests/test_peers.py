"""Array programs' Adam beside gpuadam's: two hundred steps of other people's code, or of the rule that they publish.

Each optimizer gets the gradient where it stands itself, so that an error would be carried on. All is float64: a step rounds
numbers of about 1 at other places than theirs, by 2**-53, and steps towards a minimum do not add such errors up. The tolerance
leaves room for a thousand of them.
"""

import numpy as np
import pytest

import gpuadam

STEPS, SHAPE = 200, (24, 3)
CLOSE = {"rtol": 1e-12, "atol": 1e-13}
LR, BETAS = 0.05, (0.9, 0.99)
TARGET = np.random.default_rng(0).standard_normal(SHAPE)


def start():
    return np.random.default_rng(1).standard_normal(SHAPE)


def rows_of(step):
    """Return the rows that a step sees: a third of them."""
    return np.random.default_rng(step).random(SHAPE[0]) < 1 / 3


def gradient(x, step):
    """Return the gradient of half the squared distance to the target, which a step sees with noise."""
    return x - TARGET + 0.3 * np.random.default_rng(step + 1000).standard_normal(x.shape)


def partial(x, step):
    """Return a gradient that is 0 where a step does not see x."""
    seen = np.random.default_rng(step).random(x.shape) < 1 / 3
    return np.where(seen, gradient(x, step), 0.0)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert np.abs(ours - start()).max() > 10 * LR  # it has gone somewhere


# Bounds


@pytest.mark.parametrize("bounds", [(-0.5, 0.5), (0.0, None), (None, 0.25)])
def test_bounds_are_projected_adam(bounds):
    """Step, then clip to scipy.optimize's `bounds`, as programs around `scipy.optimize.minimize` write it."""
    beta1, beta2 = BETAS
    ours, theirs, m, v = start(), start(), np.zeros(SHAPE), np.zeros(SHAPE)
    opt = gpuadam.Adam(ours, lr=LR, betas=BETAS, bounds=bounds)
    for t in range(1, STEPS + 1):
        g = gradient(theirs, t)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        theirs = theirs - LR * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        theirs = np.clip(theirs, *bounds)
        opt.step(gradient(ours, t))
    assert_same(ours, theirs)
    assert (ours == bounds[0]).any() or (ours == bounds[1]).any()


def test_bounds_lead_to_the_solution_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    a, b, x = rng.standard_normal((30, 8)), rng.standard_normal(30), np.zeros(8)
    opt = gpuadam.Adam(x, lr=lambda step: 0.1 * 0.96**step, bounds=(0.0, 0.2))
    for _ in range(STEPS):
        opt.step(a.T @ (a @ x - b))
    solution = optimize.lsq_linear(a, b, (0.0, 0.2)).x
    assert np.ptp(solution) > 0.19
    np.testing.assert_allclose(x, solution, atol=1e-4)  # what is left of the rate after 200 steps


# A part of an array


class OfDrjit:
    """An optimizer of Dr.Jit that is given its gradients."""

    def __init__(self, name, x, **options):
        dr = pytest.importorskip("drjit", reason="drjit is not installed; test_bring_your_adam.py has its rule")
        if not dr.has_backend(dr.JitBackend.LLVM):
            pytest.skip("drjit finds no libLLVM")
        from drjit import opt
        from drjit.llvm.ad import Float64

        self.dr, self.type = dr, Float64
        self.opt = getattr(opt, name)(**options)
        self.opt["x"] = Float64(x.ravel())

    def x(self):
        return self.opt["x"].numpy().reshape(SHAPE)

    def step(self, grad):
        self.dr.backward(self.dr.sum(self.opt["x"] * self.type(grad.ravel())))
        self.opt.step()


@pytest.mark.parametrize(
    "name, options, same",
    [
        ("Adam", {"epsilon": 1e-3}, {}),
        ("AdamW", {"epsilon": 1e-3, "weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
)
def test_nonzero_is_mask_updates_of_drjit(name, options, same):
    """It corrects the moments in the learning rate, as eps-hat, by the number of steps, and not by those of an element."""
    x = start()
    theirs = OfDrjit(name, x, lr=LR, beta_1=BETAS[0], beta_2=BETAS[1], mask_updates=True, **options)
    opt = getattr(gpuadam, name)(x, lr=LR, betas=BETAS, eps=1e-3, formula="eps-hat", **same)
    for t in range(1, STEPS + 1):
        theirs.step(partial(theirs.x(), t))
        opt.step(partial(x, t), where="nonzero")
    assert_same(x, theirs.x())


def test_drjit_has_a_small_epsilon_inside_of_the_root():
    """Up to 1e-6 it divides by sqrt(v + epsilon**2): eps_root of the corrected v is larger in the first steps."""
    x, m, v, eps = start(), np.zeros(SHAPE), np.zeros(SHAPE), 1e-6
    theirs = OfDrjit("Adam", x, lr=LR, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=eps, mask_updates=True)
    for t in range(1, STEPS + 1):
        theirs.step(1e-6 * partial(theirs.x(), t))
        of_root = {"formula": "optax", "eps": 0, "eps_root": eps**2 / (1 - BETAS[1] ** t)}
        gpuadam.adam_step(x, 1e-6 * partial(x, t), m, v, t, lr=LR, betas=BETAS, where="nonzero", **of_root)
    assert_same(x, theirs.x())


def test_lr_scale_is_an_array_of_rates_of_drjit():
    x, rate = start(), np.random.default_rng(2).uniform(0.5, 1.5, SHAPE)
    theirs = OfDrjit("Adam", x, lr=LR, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=1e-3)
    opt = gpuadam.Adam(x, lr=LR, betas=BETAS, eps=1e-3, formula="eps-hat")
    for t in range(1, STEPS + 1):
        theirs.opt.lr = theirs.type(LR * rate.ravel())  # anew: a step of drjit 1.5 multiplies the array that it is given
        theirs.step(gradient(theirs.x(), t))
        opt.step(gradient(x, t), lr_scale=rate)
    assert_same(x, theirs.x())


def test_rows_are_selective_adam_of_gsplat():
    """Its rule, of gsplat/cuda/csrc/AdamCUDA.cu: nothing is corrected, so there is no count, and rows not seen stay."""
    x, m, v = start(), np.zeros(SHAPE), np.zeros(SHAPE)
    theirs, their_m, their_v = start(), np.zeros(SHAPE), np.zeros(SHAPE)
    beta1, beta2 = BETAS
    for t in range(1, STEPS + 1):
        seen = rows_of(t)
        g = gradient(theirs, t)[seen]
        their_m[seen] = beta1 * their_m[seen] + (1 - beta1) * g
        their_v[seen] = beta2 * their_v[seen] + (1 - beta2) * g**2
        theirs[seen] -= LR * their_m[seen] / (np.sqrt(their_v[seen]) + 1e-15)
        gpuadam.adam_step(x, gradient(x, t), m, v, 1 << 40, lr=LR, betas=BETAS, eps=1e-15, where=seen)
    assert_same(x, theirs)
    np.testing.assert_allclose(v, their_v, **CLOSE)


def test_rows_are_sparse_adam_of_torch():
    """Its rows are those of sparse gradients; the moments are corrected by the number of steps, as eps-hat."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, theirs = start(), torch.tensor(start(), requires_grad=True)
    sparse = torch.optim.SparseAdam([theirs], lr=LR, betas=BETAS, eps=1e-3)
    opt = gpuadam.Adam(x, lr=LR, betas=BETAS, eps=1e-3, formula="eps-hat")
    for t in range(1, STEPS + 1):
        seen = rows_of(t)
        g = torch.from_numpy(gradient(theirs.detach().numpy(), t)[seen])
        theirs.grad = torch.sparse_coo_tensor(np.flatnonzero(seen)[None], g, SHAPE, check_invariants=True)
        sparse.step()
        opt.step(gradient(x, t), where=seen)
    assert_same(x, theirs.detach().numpy())
