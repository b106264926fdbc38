"""What `gpuadam.torch` refuses, before anything is written, and what it says."""

import re

import libraries
import pytest

torch = libraries.imported("torch", reason="torch is not installed")

from torch_steps import small, stepped  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"tensor of shape \(2,\)"),
        ({"betas": (1.0, 0.9)}, ValueError, "beta1=1.0"),
        ({"betas": 0.9}, ValueError, "betas must be two numbers"),
        ({"betas": None}, ValueError, "betas must be two numbers"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"differentiable": True}, ValueError, "Use torch.optim.Adam"),
        ({"foreach": True, "fused": True}, ValueError, "cannot both be True"),
        ({"amsgrad": 1}, TypeError, "amsgrad"),
        ({"capturable": None}, TypeError, "capturable"),
        ({"state_dtype": "float16"}, ValueError, "state_dtype='float16'"),
        ({"state_dtype": "8bit", "amsgrad": True}, ValueError, "8-bit state has no max_v"),
        ({"master": "float32"}, ValueError, "master='float32'"),
        ({"master": "remainder", "stochastic_rounding": True}, ValueError, "leave stochastic_rounding out"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"backend": "cuppy"}, ValueError, "no backend 'cuppy'"),
    ],
)
def test_bad_options_are_refused_in_the_constructor_and_in_groups(options, error, match):
    with pytest.raises(error, match=match):
        gpuadam.torch.Adam(small(), **options)
    if not options.keys() & {"state_dtype", "master", "stochastic_rounding", "seed", "backend"}:
        opt = gpuadam.torch.Adam(small())
        with pytest.raises(error, match=match):
            opt.add_param_group({"params": torch.ones(2), **options})
        assert len(opt.param_groups) == 1


BAD_STEPS = {
    "a sparse gradient": (
        lambda params, opt: setattr(params[1], "grad", torch.ones(7).to_sparse()),
        TypeError,
        "layout torch.sparse_coo.*with sparse=False, or leave its parameter to torch.optim.SparseAdam",
    ),
    "a setting out of range": (lambda params, opt: opt.param_groups[0].update(lr=-1.0), ValueError, "lr=-1"),
    "amsgrad that comes later": (lambda params, opt: opt.param_groups[0].update(amsgrad=True), ValueError, "max_exp_avg_sq"),
    "a step that is no tensor": (
        lambda params, opt: opt.state[params[1]].update(step=3),
        TypeError,
        r"the step of params\['1'\] is 3 \(int\): it is counted in a tensor",
    ),
    "state of another shape": (
        lambda params, opt: opt.state[params[1]].update(exp_avg=torch.zeros(8)),
        ValueError,
        r"^exp_avg of params\['1'\] has shape \(8,\)",
    ),
    "state of integers": (
        lambda params, opt: opt.state[params[1]].update(exp_avg_sq=torch.zeros(7, dtype=torch.int64)),
        TypeError,
        r"^exp_avg_sq of params\['1'\] has dtype int64; it must be float32 or float64 or bfloat16, in native",
    ),
    "parameters that share memory": (
        lambda params, opt: setattr(params[1], "data", params[0].data.view(-1)[:7]),
        ValueError,
        "share",
    ),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_one_bad_parameter_stops_the_whole_step(what):
    spoil, error, match = BAD_STEPS[what]
    params, opt = stepped(gpuadam.torch.Adam)
    spoil(params, opt)
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=match):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [int(opt.state[p]["step"]) for p in params] == [3, 3, 3]


def test_parameters_that_cannot_be_updated_are_refused_before_there_is_state():
    p = torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))
    p.grad = torch.ones_like(p)
    opt = gpuadam.torch.Adam([p])
    with pytest.raises(TypeError, match=r"params\['0'\], a torch.Parameter, does not share its memory"):
        opt.step()
    assert not opt.state[p]


@pytest.mark.parametrize("name, value", [("state_dtype", "8bit"), ("master", "remainder"), ("seed", 1), ("backend", "cupy")])
def test_an_option_of_all_groups_is_refused_in_one(name, value):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    said = f"a group has {name}={value!r}, which does nothing there: give it to the optimizer, for all of its groups"
    with pytest.raises(ValueError, match=re.escape(said)):
        gpuadam.torch.AdamW([{"params": [p], name: value}])
    opt = gpuadam.torch.AdamW([p])
    with pytest.raises(ValueError, match=re.escape(said)):
        opt.add_param_group({"params": [q], name: value})
    assert len(opt.param_groups) == 1


def test_an_option_of_gpuadams_adam_is_refused_in_a_group():
    with pytest.raises(ValueError, match=r"a group has bounds=\(0, 1\), which does nothing there: gpuadam.Adam has it"):
        gpuadam.torch.Adam([{"params": [torch.nn.Parameter(torch.ones(3))], "bounds": (0, 1)}])


def test_other_keys_of_a_group_are_the_users_as_in_torch():
    opt = gpuadam.torch.Adam([{"params": [torch.nn.Parameter(torch.ones(3))], "name": "head", "initial_lr": 0.1}])
    assert opt.param_groups[0]["name"] == "head"


@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_that_is_twice_in_a_group_is_refused(named):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    params = [("a", p), ("b", q), ("c", p)] if named else [p, q, p]
    names = "'a' and 'c'" if named else "'0' and '2'"
    with pytest.raises(ValueError, match=f"the parameters {names} of a group are one tensor: give it once"):
        gpuadam.torch.Adam(iter(params))


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"lr": torch.ones(2)}, r"^lr is a tensor of shape \(2,\): it must be one number"),
        ({"betas": (0.9, torch.ones(2))}, r"^betas\[1\] is a tensor of shape \(2,\)"),
    ],
)
def test_a_hyperparameter_of_several_numbers_is_named(setting, said):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=said):
        gpuadam.torch.Adam([p], **setting)
    opt = gpuadam.torch.Adam([p])
    opt.param_groups[0].update(setting)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=said):
        opt.step()


@pytest.mark.parametrize("options", [{"master": "remainder"}, {"stochastic_rounding": True}])
def test_an_option_that_does_nothing_for_these_parameters_warns(options):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="does nothing here: no parameter is bfloat16") as said:
        gpuadam.torch.Adam([p], **options)
    assert said[0].filename == __file__


def test_parameters_of_a_model_are_asked_for_by_name():
    with pytest.raises(TypeError, match=r"give the parameters of a model, as dict\(model.named_parameters\(\)\)"):
        gpuadam.Adam(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"pairs of a name and an array, the first of 'weight'"):
        gpuadam.Adam(torch.nn.Linear(2, 2).named_parameters())


def test_a_tensor_whose_storage_was_freed_is_refused():
    """NumPy would take memory of its own in its place, and the update would be of what happens to lie there."""
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    opt = gpuadam.torch.Adam([param])
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="storage was freed"):
        opt.step()
    assert param.tolist() == [1.0] * 5


def test_a_scale_of_zero_is_named():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    opt = gpuadam.torch.Adam([param])
    opt.grad_scale = torch.tensor(0.0)
    with pytest.raises(ValueError, match="scale is 0"):
        opt.step()
