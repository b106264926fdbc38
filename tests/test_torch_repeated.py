"""Steps of `gpuadam.torch` that are as the last one: the bits of the long way, and no change is missed."""

import copy
import math

import libraries
import pytest
from test_repeated import long_way

torch = libraries.imported("torch", reason="torch is not installed")

import gpuadam.torch  # noqa: E402
from gpuadam import torch_tensors  # noqa: E402
from gpuadam.kernels import cpu_step, cpu_threads, dlpack_struct  # noqa: E402
from gpuadam.kernels.cpu_backend import backend as numba_cpu  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def tensors(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 5), (7,), (2, 3, 2), (6,))]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def made(groups=False, cls=gpuadam.torch.AdamW, dtype=torch.float32, **options):
    params = tensors(dtype=dtype)
    given = [{"params": params[:1], "lr": 0.2}, {"params": params[1:], "weight_decay": 0.0}] if groups else params
    return params, cls(given, lr=0.1, **options)


def bits(params, opt):
    states = [(key, value) for param in params for key, value in sorted(opt.state.get(param, {}).items())]
    return list(map(bits_of, params)), [(key, bits_of(value) if torch.is_tensor(value) else value) for key, value in states]


def bits_of(tensor):
    bare = tensor.detach().resolve_neg()
    return (bare.view(torch.int16) if bare.dtype is torch.bfloat16 else bare).numpy().tobytes()


@pytest.fixture(params=["compiled code", "Python"])
def reader(request, monkeypatch):
    """Who reads the tensors of a step: an older torch has no functions for C."""
    assert dlpack_struct.function_of(torch.Tensor) or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    if request.param == "Python":
        monkeypatch.setattr(dlpack_struct, "function_of", lambda kind: 0)


NARROW = {"dtype": torch.bfloat16}
OPTIONS = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"state_dtype": "float64"},
    {"state_dtype": "bfloat16", "amsgrad": True, "seed": 5},
    {"state_dtype": "8bit"},
    NARROW,
    NARROW | {"master": "remainder"},
    NARROW | {"stochastic_rounding": True},
]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repeated_steps_have_the_bits_of_the_long_way(groups, options):
    (params, opt), (others, by_the_long_way) = made(groups, **options), made(groups, **options)
    long_way(by_the_long_way)
    for k in range(7):
        for own, each in ((params, opt), (others, by_the_long_way)):
            torch.manual_seed(k)
            each.param_groups[0]["lr"] = 0.1 / (k + 1)
            for param in own:
                if k == 4:
                    param.grad = torch.randn_like(param)  # new memory
                else:
                    param.grad.copy_(torch.randn_like(param))
            each.step()
        assert bits(params, opt) == bits(others, by_the_long_way)
    assert opt._repeated.ready and [int(state["step"]) for state in opt.state.values()] == [7] * 4


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("groups", [False, True])
def test_so_they_have_in_several_threads(monkeypatch, groups, options):
    run, parts = cpu_threads.run, []

    def counted(build, table, n, n_parts, arguments):
        parts.append(n_parts)
        run(build, table, n, n_parts, arguments)

    monkeypatch.setattr(numba_cpu, "PARALLEL_FROM", 8)
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 2)
    monkeypatch.setattr(cpu_threads, "run", counted)
    test_repeated_steps_have_the_bits_of_the_long_way(groups, options)
    assert set(parts) == {2}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"master": "remainder"}], ids=str)
def test_parameters_of_several_dtypes_in_a_group_have_the_bits_of_a_group_for_each(options):
    results = []
    for groups, change in ((False, lambda opt: opt), (False, long_way), (True, long_way)):
        params = [param for dtype in (torch.bfloat16, torch.float32, torch.float64) for param in tensors(dtype=dtype)]
        given = [{"params": params[k : k + 4]} for k in (0, 4, 8)] if groups else params[::2] + params[1::2]
        given = given if groups or "state_dtype" not in options else params  # whose order decides about random bits
        opt = change(gpuadam.torch.Adam(given, lr=0.1, **options))
        for _ in range(6):
            opt.step()
        results.append(bits(params, opt))
        assert opt._repeated.ready
    assert results[0] == results[1] == results[2]


def test_tensors_of_bfloat16_become_numpy_arrays_at_once(monkeypatch):
    """One by one, by `plain`, they would take longer."""
    monkeypatch.setattr(torch_tensors, "plain", None)
    params = tensors(dtype=torch.bfloat16)
    in_numpy = torch_tensors.all_in_numpy(params)
    assert [(x.format, x.array.tobytes()) for x in in_numpy] == [("bfloat16", bits_of(param)) for param in params]


@pytest.mark.usefixtures("reader")
def test_so_have_an_empty_parameter_and_one_without_dimensions():
    results = []
    for change in (lambda opt: opt, long_way):
        params = [torch.nn.Parameter(x) for x in (torch.zeros(0, 3), torch.tensor(1.5), torch.ones(3, 2).t())]
        opt = change(gpuadam.torch.Adam(params, lr=0.1))
        for k in range(6):
            for param in params:
                param.grad = torch.full_like(param, k + 1.0)
            opt.step()
        results.append(bits(params, opt))
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_in_a_tensor_is_read_at_each_step(shape):
    """torch's schedulers write into it."""
    results = []
    for change in (lambda opt: opt, long_way):
        params, lr = tensors(), torch.full(shape, 0.1)
        opt = change(gpuadam.torch.Adam(params, lr=lr))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for _ in range(5):
            opt.step()
            scheduler.step()
        assert opt.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(0.1 / 32)
        results.append((opt._repeated.ready, bits(params, opt)))
    (ready, one), (_, other) = results
    assert ready and one == other


def test_what_is_no_setting_of_adam_does_not_matter():
    _, opt = made()
    for k in range(5):
        opt.param_groups[0]["kept by a user"] = [float(k)]
        opt.step()
    assert opt._repeated.ready


def test_a_learning_rate_that_becomes_wrong_in_its_tensor_is_refused():
    params, lr = tensors(), torch.tensor(0.1)
    opt = gpuadam.torch.Adam(params, lr=lr)
    for _ in range(4):
        opt.step()
    before, ready = bits(params, opt), opt._repeated.ready
    for wrong in (-0.1, math.nan, math.inf):
        lr.fill_(wrong)
        with pytest.raises(ValueError, match=r"^lr=.* must be finite and not negative"):
            opt.step()
    assert ready and bits(params, opt) == before


def test_a_parameter_without_a_gradient_stays_without_one():
    (params, opt), (others, by_the_long_way) = made(), made()
    long_way(by_the_long_way)
    for own, each in ((params, opt), (others, by_the_long_way)):
        gradient, own[1].grad = own[1].grad, None
        for _ in range(4):
            each.step()
        own[1].grad = gradient
        for _ in range(4):
            each.step()
    assert bits(params, opt) == bits(others, by_the_long_way)
    assert opt._repeated.ready  # though one parameter has taken fewer steps than the others


def test_a_gradient_that_another_parameter_has_instead_is_noticed():
    results = []
    for change in (lambda opt: opt, long_way):
        params, opt = made()
        change(opt)
        params[1].grad = None
        for _ in range(4):
            opt.step()
        params[1].grad, params[2].grad = torch.ones(7), None
        for _ in range(3):
            opt.step()
        results.append(bits(params, opt))
    assert results[0] == results[1]


def test_autograd_is_told_of_a_repeated_step():
    params, opt = made()
    for _ in range(4):
        opt.step()
    assert opt._repeated.ready
    loss = (params[1] * params[1].exp()).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def set_data(param, tensor):
    param.data = tensor


def set_grad(param, grad):
    param.grad = grad


CHANGES = {
    "lr nan": lambda p, opt: opt.param_groups[0].update(lr=math.nan),
    "lr below 0": lambda p, opt: opt.param_groups[0].update(lr=-0.1),
    "lr -0.0": lambda p, opt: opt.param_groups[0].update(lr=-0.0),
    "lr too large": lambda p, opt: opt.param_groups[0].update(lr=1e39),
    "lr a tensor": lambda p, opt: opt.param_groups[0].update(lr=torch.tensor(0.05)),
    "lr a tensor of an integer": lambda p, opt: opt.param_groups[0].update(lr=torch.tensor(1)),
    "lr a tensor of a nan": lambda p, opt: opt.param_groups[0].update(lr=torch.tensor(math.nan)),
    "lr a tensor of several numbers": lambda p, opt: opt.param_groups[0].update(lr=torch.ones(2)),
    "lr a tensor without memory": lambda p, opt: opt.param_groups[0].update(lr=torch.ones((), device="meta")),
    "betas": lambda p, opt: opt.param_groups[0].update(betas=(0.5, 0.75)),
    "weight_decay": lambda p, opt: opt.param_groups[0].update(weight_decay=0.5),
    "amsgrad": lambda p, opt: opt.param_groups[0].update(amsgrad=True),
    "differentiable": lambda p, opt: opt.param_groups[0].update(differentiable=True),
    "a group more": lambda p, opt: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]}),
    "a sparse gradient": lambda p, opt: set_grad(p[1], torch.ones(7).to_sparse()),
    "a strided gradient": lambda p, opt: set_grad(p[1], torch.arange(14.0)[::2]),
    "no gradient": lambda p, opt: set_grad(p[1], None),
    "no gradient at all": lambda p, opt: opt.zero_grad(),
    "other memory": lambda p, opt: set_data(p[1], torch.ones(7)),
    "transposed": lambda p, opt: set_data(p[0], torch.ones(5, 4).t()),
    "another shape in the same memory": lambda p, opt: set_data(p[0], p[0].data.view(5, 4)),
    "other strides in the same memory": lambda p, opt: set_data(p[2], p[2].data.transpose(0, 2)),
    "a negated view": lambda p, opt: set_data(p[1], torch.ones(7)._neg_view()),
    "another dtype": lambda p, opt: set_data(p[1], torch.ones(7, dtype=torch.float64)),
    "other moments": lambda p, opt: opt.state[p[1]].update(exp_avg=torch.ones(7)),
    "moments of another shape": lambda p, opt: opt.state[p[1]].update(exp_avg=torch.ones(6)),
    "moments of another dtype in the same memory": lambda p, opt: set_data(
        opt.state[p[1]]["exp_avg"], opt.state[p[1]]["exp_avg"].view(torch.int32)
    ),
    "moments that are no tensor": lambda p, opt: opt.state[p[1]].update(exp_avg=[0.0] * 7),
    "moments taken away": lambda p, opt: opt.state[p[1]].pop("exp_avg_sq"),
    "state taken away": lambda p, opt: opt.state.pop(p[1]),
    "a count set": lambda p, opt: opt.state[p[1]]["step"].fill_(30),
    "all counts set": lambda p, opt: [opt.state[x]["step"].fill_(30) for x in p],
    "a count that is none": lambda p, opt: [opt.state[x]["step"].fill_(2.5) for x in p],
    "another count": lambda p, opt: opt.state[p[1]].update(step=torch.tensor(12.0)),
    "counts near the end of float32": lambda p, opt: [opt.state[x]["step"].fill_(float((1 << 24) - 1)) for x in p],
    "loaded": lambda p, opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
    "a scale": lambda p, opt: setattr(opt, "grad_scale", torch.tensor(8.0)),
    "infinities": lambda p, opt: setattr(opt, "found_inf", torch.tensor(1.0)),
    "a parameter that is computed": lambda p, opt: opt.param_groups[0]["params"].__setitem__(1, p[1] * 1),
    "under way": lambda p, opt: opt.under_way.begin(),
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_noticed(change):
    outcomes = []
    for to_the_long_way in (lambda opt: opt, long_way):
        params, opt = made()
        to_the_long_way(opt)
        for _ in range(4):
            opt.step()
        ready, outcome = opt._repeated.ready, []
        CHANGES[change](params, opt)
        for _ in range(3):
            try:
                opt.step()
            except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
                outcome.append((type(error), str(error)))
        outcomes.append((ready, [outcome, bits(params, opt)]))
    (ready, one), (_, other) = outcomes
    assert ready and one == other


@pytest.mark.parametrize("what", ["advance", "rehearse"])
def test_a_step_whose_repetition_cannot_compile_is_made_or_not(monkeypatch, what):
    """The second step is made, and compiles what the third needs, or the third compiles and is not made."""
    params, opt = made()
    holder = cpu_step if what == "advance" else cpu_step.Plan
    compiling = getattr(holder, what)

    def failing(*arguments):
        monkeypatch.setattr(holder, what, compiling)
        raise KeyboardInterrupt

    monkeypatch.setattr(holder, what, failing)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(4):
            opt.step()
    assert [int(state["step"]) for state in opt.state.values()] == [2] * 4
    others, by_the_long_way = made()
    long_way(by_the_long_way)
    for _ in range(2):
        by_the_long_way.step()
    assert bits(params, opt) == bits(others, by_the_long_way)
    opt.step()
    by_the_long_way.step()
    assert bits(params, opt) == bits(others, by_the_long_way)


@pytest.mark.parametrize("without_grads", [False, True])
def test_parameters_without_gradients_that_change_places_change_random_bits(without_grads):
    """Those of a parameter depend on its number among all."""
    results = []
    for to_the_long_way in (lambda opt: opt, long_way):
        params = tensors()
        params[0].grad = None
        own = [{"params": params[:1]}, {"params": params[1:]}] if without_grads else [{"params": params}]
        opt = to_the_long_way(gpuadam.torch.Adam(own, state_dtype="bfloat16", lr=0.1))
        for _ in range(4):
            opt.step()
        opt.param_groups[0]["params"].insert(0, torch.nn.Parameter(torch.ones(3)))
        for _ in range(3):
            opt.step()
        results.append(bits(params, opt))
    assert results[0] == results[1]
