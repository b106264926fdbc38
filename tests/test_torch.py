"""`gpuadam.torch` as an optimizer of torch: groups, gradients, schedules, closures, hooks, copies, scalers, interrupts."""

import copy
import pickle
import warnings

import libraries
import numpy as np
import pytest

torch = libraries.imported("torch", reason="torch is not installed")

from interrupts import Interrupt  # noqa: E402
from torch_steps import PAIRS, gradients, replay, small, stepped  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402
from gpuadam import update  # noqa: E402
from gpuadam.cli.measuring import pages  # noqa: E402
from gpuadam.kernels import cpu_backend, huge_pages  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_groups_have_their_own_settings_and_may_be_added(pair):
    results = []
    for make in pair:
        params = small()
        opt = make([{"params": params[:1], "lr": 0.1}, {"params": params[1:2], "betas": (0.5, 0.9)}], lr=0.01)
        replay(opt, params[:2], [gradients(0)[:2]])
        opt.add_param_group({"params": params[2], "lr": 0.5, "eps": 1e-3})
        replay(opt, params, [gradients(seed) for seed in (1, 2)])
        assert [int(opt.state[p]["step"]) for p in params] == [3, 3, 2]
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_parameters_of_one_group_are_one_launch(monkeypatch):
    params = small()
    opt = gpuadam.torch.Adam(params)
    replay(opt, params, [gradients(0)])
    tables, launch = [], cpu_backend.CpuBatch.launch
    monkeypatch.setattr(cpu_backend.CpuBatch, "launch", lambda batch: tables.append(len(batch.table)) or launch(batch))
    replay(opt, params, [gradients(1)])
    assert tables == [3]


def test_names_of_parameters_are_in_errors():
    model = torch.nn.Linear(2, 2)
    opt = gpuadam.torch.Adam([("weight", model.weight)])
    model.weight.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of params\['weight'\] is a tensor of layout torch.sparse_coo"):
        opt.step()


@pytest.mark.skipif(not pages.can_collapse(), reason="the system makes no small pages huge")
@pytest.mark.parametrize("shape, options", [((3 << 20,), {}), ((2048, 1536), {"state_dtype": "bfloat16"})])
def test_large_moments_of_a_parameter_on_the_cpu_lie_on_huge_pages_and_are_zeros_first(shape, options):
    param = torch.nn.Parameter(torch.ones(shape).transpose(0, -1))
    param.grad = torch.zeros_like(param)
    opt = gpuadam.torch.AdamW([param], lr=0.0, **options)
    opt.step()
    moments = [opt.state[param][key] for key in ("exp_avg", "exp_avg_sq")]
    assert all(tensor.stride() == param.stride() and not tensor.any() for tensor in moments)
    extents = [(tensor.data_ptr(), tensor.nbytes) for tensor in moments]
    assert huge_pages._has_several_nodes() or pages.percent_huge(extents) > 30  # how many there are is the system's


def test_a_parameter_without_a_gradient_is_skipped_with_its_state(pair):
    results = []
    for make in pair:
        params = small()
        opt = make(params, lr=0.1)
        for seed in range(4):
            for k, (p, g) in enumerate(zip(params, gradients(seed), strict=True)):
                p.grad = None if (seed + k) % 2 else g
            opt.step()
        assert [int(opt.state[p]["step"]) for p in params] == [2, 2, 2]
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_step_without_any_gradient_does_nothing(pair):
    opt = pair[0](small())
    opt.step()
    assert not opt.state


def test_parameters_of_all_dtypes_and_sizes_share_a_group():
    params = [
        torch.nn.Parameter(torch.ones(n, dtype=d)) for n in (0, 3) for d in (torch.float32, torch.float64, torch.bfloat16)
    ]
    opt = gpuadam.torch.Adam(params, lr=0.5)
    replay(opt, params, [[torch.ones_like(p) for p in params]])
    for p in params:
        torch.testing.assert_close(p, torch.full_like(p, 0.5), rtol=0, atol=1e-7)  # eps is 1e-8


@pytest.mark.parametrize("order", ["transposed", "channels last", "every other"])
def test_a_parameter_of_any_strides(pair, order):
    results = []
    for make in pair:
        whole = torch.linspace(-1, 1, 2 * 3 * 4 * 10).reshape(2, 3, 4, 10)
        data = {"transposed": whole.transpose(0, 3), "every other": whole[..., ::2]}.get(
            order, whole.contiguous(memory_format=torch.channels_last)
        )
        p = torch.nn.Parameter(data)
        replay(make([p], lr=0.1), [p], [[torch.sin(9 * data)], [torch.cos(9 * data)]])
        results.append(p)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    assert results[0].stride() == results[1].stride()


@pytest.mark.parametrize("like", ["one number", "one row"])
def test_a_gradient_may_be_expanded(pair, like):
    results = []
    for make in pair:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        rows = [torch.tensor([3.0]), torch.tensor([-1.0])] if like == "one number" else [torch.arange(4.0), torch.ones(4)]
        opt = make([p], lr=0.1)
        for row in rows:
            p.grad = row.expand(3, 4)
            opt.step()
        results.append(p)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


SCHEDULERS = {
    "steps": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),  # betas too
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8),
}


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["a number", "a tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_lr_and_betas(name, lr):
    results = []
    for make in PAIRS["Adam"]:
        params = small()
        opt = make(params, lr=copy.deepcopy(lr))
        scheduler = SCHEDULERS[name](opt)
        for seed in range(8):
            replay(opt, params, [gradients(seed)])
            if seed < 7:
                scheduler.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    w = torch.nn.Parameter(torch.ones(3))
    opt = gpuadam.torch.Adam([w], lr=0.5)

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3.0
    torch.testing.assert_close(w, torch.full((3,), 0.5))


def test_hooks_of_steps_are_called(pair):
    calls, params = [], small()
    opt = pair[0](params)
    opt.register_step_pre_hook(lambda *given: calls.append("before"))
    opt.register_step_post_hook(lambda *given: calls.append("after"))
    replay(opt, params, [gradients(0)])
    assert calls == ["before", "after"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(pair, set_to_none):
    params, opt = stepped(pair[0])
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_copies_and_pickles_go_on_as_the_first(pair):
    params, opt = stepped(pair[0], dtype=torch.bfloat16, stochastic_rounding=True, seed=5)
    others = copy.deepcopy((params, opt)), pickle.loads(pickle.dumps((params, opt)))
    replay(opt, params, [gradients(7, torch.bfloat16)])
    for own, other in others:
        assert other.options == opt.options and other.param_groups[0]["params"][0] is own[0]
        replay(other, own, [gradients(7, torch.bfloat16)])
        assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))


def test_a_backward_pass_after_the_step_that_needs_old_parameters_raises(pair):
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    pair[0]([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_scaler_leaves_out_a_step_that_overflowed(pair, fused):
    results = []
    for make in pair:
        params = small()
        opt, scaler = make(params, lr=0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        counts = []
        for seed in range(6):
            opt.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, gradients(seed), strict=True))
            scaler.scale(loss).backward()
            if seed == 3:
                params[1].grad[2] = float("inf")
            if seed == 4:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(opt)
            scaler.update()
            counts.append([int(opt.state[p]["step"]) for p in params])
        assert counts == [[n] * 3 for n in (1, 2, 3, 3, 4, 5)]
        assert not hasattr(opt, "found_inf") and not hasattr(opt, "grad_scale")
        results.append((params, scaler.get_scale()))
    (ours, scale), (theirs, their_scale) = results
    assert scale == their_scale
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("fused", [None, False, True])
def test_the_step_unscales_gradients_if_the_optimizer_is_fused_and_else_the_scaler(fused, copied):
    """Lightning, among others, refuses to clip gradients where this attribute says that the step unscales them."""
    params = small()
    opt, scaler = gpuadam.torch.Adam(params, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    assert getattr(copied(opt), "_step_supports_amp_scaling", False) is bool(fused)
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(opt)
    assert all((p.grad == (4.0 if fused else 1.0)).all() for p in params)


COMPILED = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "remainder": (torch.bfloat16, {"master": "remainder"}),
    "8bit": (torch.float32, {"state_dtype": "8bit"}),
    "lr in a tensor": (torch.float32, {"lr": torch.tensor(0.1)}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_leaves_the_step_as_it_is(name):
    dtype, options = COMPILED[name]
    (params, opt), (others, reference) = (stepped(gpuadam.torch.AdamW, seeds=(), dtype=dtype, **options) for _ in range(2))

    @torch.compile(backend="eager")
    def compiled_step():
        opt.step()
        return params[0] * 2  # so that there is something to compile

    for seed in range(3):
        replay(reference, others, [gradients(seed, dtype)])
        for p, g in zip(params, gradients(seed, dtype), strict=True):
            p.grad = g
        assert torch.equal(compiled_step(), others[0] * 2)
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"capturable": True}]
)
def test_a_choice_of_implementation_changes_no_bit(options):
    expected, _ = stepped(gpuadam.torch.Adam)
    params, _ = stepped(gpuadam.torch.Adam, **options)
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


def test_one_of_betas_may_be_a_tensor():
    numbers = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    for p, betas in zip(numbers, [(0.5, 0.75), (0.5, torch.tensor(0.75))], strict=True):
        p.grad = torch.ones(3)
        gpuadam.torch.Adam([p], betas=betas).step()
    assert torch.equal(*numbers)


def test_a_step_on_the_cpu_checks_tensors_once_and_then_knows_them(monkeypatch):
    params, opt = stepped(gpuadam.torch.Adam, dtype=torch.bfloat16)
    monkeypatch.setattr(update, "_in_views", None)
    replay(opt, params, [gradients(9, torch.bfloat16)])


def test_no_warning_is_given_by_a_schedule_and_a_scaler():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = small()
        opt = gpuadam.torch.AdamW(params)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch)
        replay(opt, params, [gradients(0)])
        scheduler.step()
    assert np.isclose(opt.param_groups[0]["lr"], 0.9e-3)


def everything(opt):
    """Return copies of parameters, state and counts."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *opt.state[p].values())]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"state_dtype": "8bit"}], ids=str)
def test_an_interrupt_at_any_moment_of_a_step_leaves_all_or_nothing_changed_or_is_told(options, examples):
    def stepped(n):
        params = [
            torch.ones(3),
            torch.ones(2, 3).T,
            torch.ones(8)[::2],
            torch.ones(2, 5),
            torch.ones(2, dtype=torch.float64),
        ]
        params = [torch.nn.Parameter(p) for p in (params[::3] if "state_dtype" in options else params)]
        opt = gpuadam.torch.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], **options)
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        for _ in range(n):
            opt.step()
        return opt

    at = [everything(stepped(n)) for n in (1, 2)]
    opt = stepped(1)
    with Interrupt() as whole:
        opt.step()
    told, moments = 0, range(1, whole.count + 1, examples(41, 1))
    for n in moments:
        opt = stepped(1)
        saved, beginnings = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in opt.state]
        with torch.enable_grad(), pytest.raises(KeyboardInterrupt), Interrupt(n):  # the mode stays if a step is cut short
            opt.step()
        if opt.under_way.changing:
            told += 1
            for refused in (opt.step, opt.state_dict):
                with pytest.raises(ValueError, match="cut short"):
                    refused()
            opt.load_state_dict(saved)
            with torch.no_grad():
                for p, value in zip(opt.state, beginnings, strict=True):
                    p.copy_(value)
            opt.step()
            assert same(everything(opt), at[1])
        else:
            assert any(same(everything(opt), wanted) for wanted in at), f"torn and not told at opcode {n}"
    assert 0 < told < len(moments)
    print(f"\n{options}: {len(moments)} interrupts, {told} told, 0 torn and untold")
