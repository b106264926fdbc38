"""Array programs' Adam beside gpuadam's: two hundred steps of other people's code, or of the rule that they publish.

Each optimizer gets the gradient where it stands itself, so that an error would be carried on. All is float64: a step rounds
numbers of about 1 at other places than theirs, by 2**-53, and steps towards a minimum do not add such errors up. The tolerance
leaves room for a thousand of them.
"""

import libraries
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
    optimize = libraries.imported("scipy.optimize")
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
        self.dr = libraries.imported("drjit", reason="drjit is not installed; test_bring_your_adam.py has its rule")
        if not self.dr.has_backend(self.dr.JitBackend.LLVM):
            pytest.skip("drjit finds no libLLVM")
        from drjit import opt

        self.dtype, self.opt = x.dtype, getattr(opt, name)(**options)
        self.opt["x"] = self.array(x)

    def array(self, x):
        from drjit.llvm import ad

        real = [ad.Float64(part.ravel()) for part in ((x.real, x.imag) if x.dtype.kind == "c" else (x,))]
        return ad.Complex2f64(*real) if len(real) == 2 else real[0]

    def x(self):
        x = self.opt["x"].numpy()
        return x.reshape(SHAPE).astype(self.dtype)

    def step(self, grad):
        x, grad = self.opt["x"], self.array(grad)
        self.dr.set_grad(x, grad)
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
        theirs.opt.lr = theirs.array(LR * rate)  # anew: a step of drjit 1.5 multiplies the array that it is given
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
    torch = libraries.imported("torch", reason="torch is not installed")
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


# Complex parameters


def complex_start(dtype="complex128"):
    return (start() + 1j * start()[::-1]).astype(dtype)


def complex_gradient(x, step):
    """Return dL/dRe + i dL/dIm of half the squared distance to a target, as `gradient` of both parts."""
    return (gradient(x.real, step) + 1j * gradient(x.imag, step + STEPS)).astype(x.dtype)


def complex_partial(x, step):
    return partial(x.real, step) + 1j * partial(x.imag, step + STEPS)


def assert_same_complex(ours, theirs):
    """complex64 rounds numbers of up to 4 by 2**-24 of them; forty such errors, of 200 steps, are 1e-5."""
    np.testing.assert_allclose(ours, theirs, **(CLOSE if ours.dtype == "complex128" else {"rtol": 1e-5, "atol": 1e-5}))
    assert np.abs(ours - complex_start()).max() > 10 * LR


OF_TORCH = {
    "Adam": ("Adam", {}),
    "Adam with L2 decay": ("Adam", {"weight_decay": 0.1}),
    "AdamW": ("AdamW", {"weight_decay": 0.1}),
    "AMSGrad": ("Adam", {"amsgrad": True, "maximize": True}),
}


@pytest.mark.parametrize("dtype", ["complex128", "complex64"])
@pytest.mark.parametrize("what", OF_TORCH)
def test_parts_are_complex_parameters_of_torch(what, dtype):
    torch = libraries.imported("torch", reason="torch is not installed")
    name, options = OF_TORCH[what]
    x, theirs = complex_start(dtype), torch.tensor(complex_start(dtype), requires_grad=True)
    of_torch = getattr(torch.optim, name)([theirs], lr=LR, betas=BETAS, **options)
    opt = getattr(gpuadam, name)(x, lr=LR, betas=BETAS, complex="parts", **options)
    for t in range(1, STEPS + 1):
        theirs.grad = torch.from_numpy(complex_gradient(theirs.detach().numpy(), t))
        of_torch.step()
        opt.step(complex_gradient(x, t))
    assert_same_complex(x, theirs.detach().numpy())


@pytest.mark.parametrize("what", OF_TORCH)
def test_the_drop_in_for_torch_takes_complex_parameters_in_parts_too(what):
    torch = libraries.imported("torch", reason="torch is not installed")
    import gpuadam.torch

    name, options = OF_TORCH[what]
    params = [torch.tensor(complex_start(), requires_grad=True) for _ in range(2)]
    opts = [
        getattr(module, name)([p], lr=LR, betas=BETAS, **options)
        for module, p in zip((gpuadam.torch, torch.optim), params, strict=True)
    ]
    for t in range(1, STEPS + 1):
        for p, opt in zip(params, opts, strict=True):
            p.grad = torch.from_numpy(complex_gradient(p.detach().numpy(), t))
            opt.step()
    ours, theirs = (p.detach().numpy() for p in params)
    assert_same_complex(ours, theirs)
    for key, value in opts[1].state[params[1]].items():
        np.testing.assert_allclose(opts[0].state[params[0]][key].numpy(), value.numpy(), **CLOSE)


def test_a_gradient_is_as_torch_has_it():
    torch = libraries.imported("torch", reason="torch is not installed")
    x = torch.tensor(complex_start(), requires_grad=True)
    ((x - torch.from_numpy(complex_start().conj())).abs() ** 2).sum().mul(0.5).backward()
    np.testing.assert_allclose(x.grad.numpy(), complex_start() - complex_start().conj(), rtol=1e-13)


OF_OPTAX = {
    "adam": ({"eps_root": 1e-6}, {"eps_root": 1e-6}),
    "adamw": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "amsgrad": ({}, {"amsgrad": True}),
}


@pytest.mark.parametrize("name", OF_OPTAX)
def test_joint_is_optax_with_the_conjugate_of_jax_gradients(name):
    """optax is given the conjugates, without which it goes away from the minimum; v is the mean of |gradient|**2."""
    optax = libraries.imported("optax", reason="optax is not installed")
    import jax

    theirs, same = OF_OPTAX[name]
    x = complex_start()
    cls = gpuadam.AdamW if name == "adamw" else gpuadam.Adam
    opt = cls(x, lr=LR, betas=BETAS, complex="joint", formula="optax", **same)
    with jax.enable_x64(True):
        target = jax.numpy.asarray(complex_start().conj())
        gradient_of_jax = jax.grad(lambda x: 0.5 * (jax.numpy.abs(x - target) ** 2).sum())
        transformation = getattr(optax, name)(LR, *BETAS, **theirs)

        @jax.jit
        def step(param, state, noise):
            grad = gradient_of_jax(param).conj() + noise
            updates, state = transformation.update(grad, state, param)
            return optax.apply_updates(param, updates), state

        param = jax.numpy.asarray(complex_start())
        state = transformation.init(param)
        for t in range(1, STEPS + 1):
            noise = complex_gradient(np.zeros_like(x), t)
            param, state = step(param, state, noise)
            opt.step(np.asarray(gradient_of_jax(jax.numpy.asarray(x)).conj() + noise))
        assert param.dtype == x.dtype
    assert_same_complex(x, np.asarray(param))


def test_parts_are_complex_numbers_of_drjit():
    """A real or an imaginary part whose gradient is 0 stays alone, as with its mask_updates."""
    x = complex_start()
    theirs = OfDrjit("Adam", x, lr=LR, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=1e-3, mask_updates=True)
    opt = gpuadam.Adam(x, lr=LR, betas=BETAS, eps=1e-3, formula="eps-hat", complex="parts")
    for t in range(1, STEPS + 1):
        theirs.step(complex_partial(theirs.x(), t))
        opt.step(complex_partial(x, t), where="nonzero")
    assert_same_complex(x, theirs.x())
