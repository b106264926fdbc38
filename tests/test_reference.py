"""The rule is Adam: against a float64 reference written from the paper."""

import libraries
import narrow_model
import numpy as np
import pytest
from cases import FORMS, few, state
from reference import torch_for_loop_step

import gpuadam
from gpuadam import reference

N = 40_000


def run(steps, betas, gradients, dtype="float32", lr=1e-3, eps=1e-8):
    """Return (ours, torch's form, float64) as {"param", "m", "v"} after training on the same float32 gradients."""
    param = np.random.default_rng(1).standard_normal(N).astype("f4")
    runs = [[param.astype(t), np.zeros(N, t), np.zeros(N, t)] for t in (dtype, "f4", "f8")]
    ours, torchs, exact = runs
    for step in range(1, steps + 1):
        grad = gradients(step)
        gpuadam.adam_step(ours[0], grad.astype(dtype), ours[1], ours[2], step, lr=lr, betas=betas, eps=eps)
        torch_for_loop_step(torchs[0], grad, *torchs[1:], step, lr=lr, betas=betas, eps=eps)
        exact[:] = reference.adam_step(exact[0], grad, *exact[1:], step, lr=lr, betas=betas, eps=eps)[:3]
    return [dict(zip(("param", "m", "v"), r, strict=True)) for r in runs]


def noise(scale):
    rng = np.random.default_rng(2)
    return lambda step: (rng.standard_normal(N, dtype="f4") * np.float32(scale)).astype("f4")


def every_magnitude():
    """Each element's gradients have their own size, from 1e-15 to 1e15."""
    scales = np.logspace(-15, 15, N).astype("f4")
    rng = np.random.default_rng(3)
    return lambda step: rng.standard_normal(N, dtype="f4") * scales


@pytest.mark.parametrize(
    "betas",
    few([(0.0, 0.0), (0.5, 0.5), (0.9, 0.95), (0.9, 0.999), (0.99, 0.9999), (0.9999, 0.9999)], (0.9, 0.999)),
)
def test_a_thousand_steps_are_as_close_to_float64_as_torchs_for_loop(betas):
    # 1.2: both forms round about as often, and the errors of 40,000 elements differ by chance; bias would grow with the steps
    ours, torchs, exact = run(1000, betas, every_magnitude())
    error, torch_error = (r["param"].astype("f8") - exact["param"] for r in (ours, torchs))
    assert np.sqrt(np.mean(error**2)) <= 1.2 * np.sqrt(np.mean(torch_error**2))
    assert np.abs(error).max() <= 1.2 * np.abs(torch_error).max()
    # 4e-6: some 30 roundings of 2**-24; (1 - beta2) formed in float32 would alone make 1.3e-5 at 0.999
    large = exact["v"] > 1e-35
    assert (np.abs(ours["v"] - exact["v"])[large] <= 4e-6 * exact["v"][large]).all()


@pytest.mark.in_short()
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "dtype, rtol, atol", [("float64", 1e-12, 1e-14), ("float32", 1e-5, 2e-6)]
)  # atol: rounding of param ~ 1
def test_ten_steps_of_every_form_agree_with_the_papers(library, name, dtype, rtol, atol):
    options = dict(FORMS[name])
    amsgrad, first = options.pop("amsgrad", False), options.pop("step", 1)
    param, _, m, v, max_v = state(1003, dtype, amsgrad)
    ours = [None if a is None else library.array(a) for a in (param, m, v, max_v)]
    exact = [None if a is None else a.astype("f8") for a in (param, m, v, max_v)]
    rng = np.random.default_rng(4)
    for step in range(first, first + 10):
        grad = rng.standard_normal(1003).astype(dtype)
        gpuadam.adam_step(
            ours[0], library.array(grad), *ours[1:3], step, max_v=ours[3], lr=1e-2, backend=library.name, **options
        )
        exact = list(reference.adam_step(exact[0], grad, *exact[1:3], step, max_v=exact[3], lr=1e-2, **options))
    for label, a, b in zip(("param", "m", "v", "max_v"), ours, exact, strict=True):
        if b is not None:
            np.testing.assert_allclose(library.numpy(a), b, rtol=rtol, atol=atol, err_msg=label)


ALGORITHMS = ("adam", "nadam", "radam", "adamax")
RULES = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "apex": {"formula": "apex"},
    "eps-hat": {"formula": "eps-hat", "eps": 1e-4},
    "optax": {"formula": "optax", "eps": 1e-4, "eps_root": 1e-5},
    "nadam of optax": {"algorithm": "nadam", "formula": "optax"},
}


@pytest.mark.in_short("rule")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype, rtol, atol", [("float64", 1e-12, 1e-14), ("float32", 1e-5, 4e-6)])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}], ids=str)
def test_each_rule_agrees_with_its_paper_from_zero_on(rule, dtype, rtol, atol, decay):
    """Over the steps at which RAdam begins to rectify, and with the running mean of the parameter."""
    options = {"lr": 1e-2, "ema_decay": 0.9, **RULES[rule], **decay}
    param = state(1003, dtype)[0]
    ours = [param, np.zeros_like(param), np.zeros_like(param), param.copy()]
    exact = [a.astype("f8") for a in ours]
    rng = np.random.default_rng(7)
    for step in range(1, 31):
        grad = rng.standard_normal(1003).astype(dtype)
        gpuadam.adam_step(ours[0], grad, *ours[1:3], step, ema=ours[3], **options)
        theta, m, v, _, ema = reference.adam_step(exact[0], grad, *exact[1:3], step, ema=exact[3], **options)
        exact = [theta, m, v, ema]
    for label, a, b in zip(("param", "m", "v", "ema"), ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=label)


@pytest.mark.parametrize("step", [1, 2, 5, 6, 7, 1000, 100_000])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_agrees_with_its_paper_at_any_step(rule, step):
    for dtype, rtol, atol in (("float64", 1e-11, 1e-14), ("float32", 1e-5, 2e-6)):
        param, grad, m, v, _ = state(1003, dtype)
        exact = reference.adam_step(param, grad, m, v, step, lr=1e-2, **RULES[rule])
        gpuadam.adam_step(param, grad, m, v, step, lr=1e-2, **RULES[rule])
        for label, a, b in zip(("param", "m", "v"), (param, m, v), exact, strict=False):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=f"{label} in {dtype}")


TORCHS = {"adam": "Adam", "nadam": "NAdam", "radam": "RAdam", "adamax": "Adamax"}


@pytest.fixture
def torch():
    """torch, which keeps NAdam's product of mu in its default dtype."""
    torch = libraries.imported("torch", reason="torch is not installed; the oracle is then taken on trust")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(before)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_is_torchs(torch, algorithm, weight_decay, maximize):
    """The oracle and the kernels in float64, over more steps than RAdam takes to rectify."""
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": weight_decay, "maximize": maximize}
    param = state(1003, "float64")[0]
    theirs = torch.nn.Parameter(torch.from_numpy(param.copy()))
    opt = getattr(torch.optim, TORCHS[algorithm])([theirs], foreach=False, **options)
    exact = [param, np.zeros_like(param), np.zeros_like(param)]
    ours = [a.copy() for a in exact]
    rng = np.random.default_rng(8)
    for step in range(1, 26):
        grad = rng.standard_normal(1003)
        theirs.grad = torch.from_numpy(grad)
        opt.step()
        gpuadam.adam_step(ours[0], grad, *ours[1:], step, algorithm=algorithm, **options)
        exact = reference.adam_step(exact[0], grad, *exact[1:3], step, algorithm=algorithm, **options)
        for what, a in (("the oracle", exact), ("gpuadam", ours)):
            np.testing.assert_allclose(a[0], theirs.detach().numpy(), rtol=1e-12, atol=1e-13, err_msg=f"{what}, {step}")


@pytest.mark.parametrize("algorithm", ["nadam", "radam"])
def test_decoupled_decay_of_each_algorithm_is_torchs(torch, algorithm):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    param = state(1003, "float64")[0]
    theirs = torch.nn.Parameter(torch.from_numpy(param.copy()))
    opt = getattr(torch.optim, TORCHS[algorithm])([theirs], decoupled_weight_decay=True, foreach=False, **options)
    ours = [param.copy(), np.zeros_like(param), np.zeros_like(param)]
    rng = np.random.default_rng(9)
    for step in range(1, 16):
        grad = rng.standard_normal(1003)
        theirs.grad = torch.from_numpy(grad)
        opt.step()
        gpuadam.adam_step(ours[0], grad, *ours[1:], step, algorithm=algorithm, decoupled=True, **options)
    np.testing.assert_allclose(ours[0], theirs.detach().numpy(), rtol=1e-12, atol=1e-13)


def test_torchs_form_is_torchs():
    torch = libraries.imported("torch", reason="torch is not installed; the yardstick is then taken on trust")
    param, grad, *_ = state(1003)
    theirs = torch.nn.Parameter(torch.from_numpy(param.copy()))
    opt = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.999), foreach=False)
    m, v = np.zeros_like(param), np.zeros_like(param)
    rng = np.random.default_rng(5)
    for step in range(1, 11):
        grad = rng.standard_normal(1003, dtype="f4")
        theirs.grad = torch.from_numpy(grad)
        opt.step()
        torch_for_loop_step(param, grad, m, v, step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    # torch's CPU kernels may fuse a multiply and an add
    np.testing.assert_allclose(theirs.detach().numpy(), param, rtol=0, atol=5e-7)


# What the contract says of the edges


def one_step(dtype, grad, eps=1e-8, m=0.0, v=0.0, step=1, param=1.0, **options):
    arrays = [np.array([x], dtype) for x in (param, grad, m, v)]
    gpuadam.adam_step(*arrays, step, lr=1e-3, eps=eps, **options)
    return tuple(float(a[0]) for a in (arrays[0], *arrays[2:]))


def test_a_gradient_whose_square_overflows_makes_the_parameter_nan_in_the_next_step_in_float32():
    param, m, v = one_step("float32", 2e19)
    assert (param, v) == (1.0, np.inf) and m == pytest.approx(2e18)
    param, m, v = one_step("float32", 1.0, m=m, v=v, step=2)
    assert np.isnan(param) and np.isnan(v)  # inf - inf, as in torch's CUDA kernel


def test_float64_recovers_from_such_a_gradient():
    param, m, v = one_step("float64", 2e19)
    assert param == pytest.approx(0.999) and v == pytest.approx(4e35)
    assert np.isfinite(one_step("float64", 1.0, m=m, v=v, step=2)).all()


def test_an_infinite_gradient_is_not_hidden():
    param, m, v = one_step("float32", np.inf)
    assert np.isnan(param) and m == np.inf and v == np.inf
    assert np.isnan(one_step("float32", np.inf, betas=(0.0, 0.999))[1])  # 0 * inf


def test_eps_zero_and_gradient_zero_is_nan_by_ieee_and_raises_nothing():
    param, m, v = one_step("float32", 0.0, eps=0.0)
    assert np.isnan(param) and (m, v) == (0.0, 0.0)


def test_eps_that_rounds_to_zero_is_refused_in_float32_and_fine_in_float64():
    with pytest.raises(ValueError, match=r"eps=1e-46 rounds to 0 in float32"):
        one_step("float32", 1.0, eps=1e-46)
    assert np.isfinite(one_step("float64", 1.0, eps=1e-46)).all()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("formula", ["torch", "optax"])
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-20])
def test_the_v_that_divides_is_never_flushed_without_m(eps, formula, amsgrad):
    """After g = 1e-19, 0, 0 v is subnormal while m is not: m / (0 + eps) would throw param away."""
    param, m, v = np.ones(1, "f4"), np.zeros(1, "f4"), np.zeros(1, "f4")
    max_v = np.zeros(1, "f4") if amsgrad else None
    for step, g in enumerate([1e-19, 0.0, 0.0], start=1):
        gpuadam.adam_step(param, np.array([g], "f4"), m, v, step, lr=1e-3, eps=eps, formula=formula, max_v=max_v)
        assert not ((max_v if amsgrad else v)[0] == 0 and m[0] != 0)
        assert np.isnan(param[0]) or abs(param[0] - 1) < 4e-3  # 0 / (0 + 0) is NaN


# rtol: of state in bfloat16 each step rounds m by up to 2**-8, at random
@pytest.mark.in_short()
@pytest.mark.parametrize(
    "dtype, of_state, rtol", [("float64", "float64", 1e-9), ("float32", "float32", 1e-4), ("float32", "bfloat16", 0.05)]
)
@pytest.mark.parametrize("formula", ["torch", "optax"])
@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.99, 0.01)])  # v underflows after one gradient of zero, and after many
def test_amsgrad_keeps_m_where_v_underflows_and_the_maximum_does_not(library, betas, formula, dtype, of_state, rtol):
    options = {"lr": 1.0, "betas": betas, "formula": formula, "ema_decay": 0.5}
    exact = [np.zeros(3) for _ in range(5)]
    ours = [library.array(np.zeros(3, d)) for d in (dtype, *[narrow_model.DTYPES[of_state]] * 3, dtype)]
    for step in range(1, 401):
        grad = np.array([1.0, -2.0, 0.5], dtype) if step in (1, 200) else np.zeros(3, dtype)
        param, m, v, max_v, ema = ours
        gpuadam.adam_step(param, library.array(grad), m, v, step, max_v=max_v, ema=ema, backend=library.name, **options)
        param, m, v, max_v, ema = exact
        exact = reference.adam_step(param, grad, m, v, step, max_v=max_v, ema=ema, **options)
    for name, array, expected in zip(("param", "ema"), (ours[0], ours[4]), (exact[0], exact[4]), strict=True):
        np.testing.assert_allclose(library.numpy(array), expected, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.99, 0.01)])
def test_amsgrad_over_gradients_that_are_mostly_zero_is_torchs(torch, betas, dtype):
    theirs = torch.nn.Parameter(torch.zeros(3, dtype=getattr(torch, dtype)))
    opt = torch.optim.Adam([theirs], lr=1.0, betas=betas, amsgrad=True, foreach=False)
    param, m, v, max_v = np.zeros((4, 3), dtype)
    for step in range(1, 401):
        grad = np.array([1.0, -2.0, 0.5], dtype) if step in (1, 200) else np.zeros(3, dtype)
        theirs.grad = torch.from_numpy(grad)
        opt.step()
        gpuadam.adam_step(param, grad, m, v, step, lr=1.0, betas=betas, max_v=max_v)
    np.testing.assert_allclose(param, theirs.detach().numpy(), rtol=1e-4 if dtype == "float32" else 1e-9)


def test_moments_of_a_parameter_whose_gradient_stays_zero_never_stay_subnormal():
    rng = np.random.default_rng(6)
    param, m = rng.standard_normal(1000).astype("f4"), np.full(1000, 1e-36, "f4")
    v = np.exp(rng.uniform(np.log(1e-37), np.log(1e-30), 1000)).astype("f4")
    max_v = v.copy()
    tiny = np.finfo("f4").smallest_normal
    for step in range(1, 1000):
        gpuadam.adam_step(param, np.zeros(1000, "f4"), m, v, step, max_v=max_v)
        for a in (m, v, max_v):
            assert ((a == 0) | (np.abs(a) >= tiny)).all()
    assert (m == 0).all() and not np.signbit(m).any()


def test_amsgrad_takes_a_nan_and_treats_minus_zero_as_zero():
    arrays = [np.ones(3, "f4"), np.array([1.0, 0.0, 1.0], "f4"), np.zeros(3, "f4"), np.array([1, 0, np.nan], "f4")]
    max_v = np.array([np.nan, -0.0, 2.0], "f4")
    gpuadam.adam_step(*arrays, 1, max_v=max_v)
    assert np.isnan(max_v[[0, 2]]).all() and max_v[1] == 0 and not np.signbit(max_v[1])
