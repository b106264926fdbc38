"""Checkpoints of `torch.optim` and of `gpuadam.torch`, which go both ways; what is wrong with one is said."""

import copy

import libraries
import pytest

torch = libraries.imported("torch", reason="torch is not installed")

from torch_steps import gradients, replay, stepped  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_a_checkpoint_goes_on_in_the_other_library(pair, direction, amsgrad):
    first, second = reversed(pair) if direction == "from torch" else pair
    params, opt = stepped(first, lr=0.01, amsgrad=amsgrad, weight_decay=0.1)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = second(others, lr=0.5, amsgrad=amsgrad)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    later = [gradients(seed) for seed in range(3, 6)]
    replay(opt, params, later)
    replay(other, others, later)
    assert other.param_groups[0]["lr"] == 0.01 and other.state[others[0]]["step"] == 6
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # three steps of lr 0.01


def test_state_has_torchs_names_and_group_keys(pair):
    (ours, opt), (theirs, reference) = stepped(pair[0], amsgrad=True), stepped(pair[1], amsgrad=True)
    for p, q in zip(ours, theirs, strict=True):
        assert opt.state[p].keys() == reference.state[q].keys()
        for key, value in opt.state[p].items():
            assert (value.dtype, value.shape) == (reference.state[q][key].dtype, reference.state[q][key].shape)
    assert opt.state_dict()["param_groups"][0].keys() >= reference.state_dict()["param_groups"][0].keys()


def test_float32_state_of_bfloat16_parameters_is_not_rounded_by_loading():
    params, opt = stepped(gpuadam.torch.Adam, dtype=torch.bfloat16)
    _, other = stepped(gpuadam.torch.Adam, seeds=(), dtype=torch.bfloat16)
    other.load_state_dict(opt.state_dict())
    for p, state in zip(params, other.state.values(), strict=True):
        assert state["exp_avg"].dtype is torch.float32
        assert torch.equal(state["exp_avg"], opt.state[p]["exp_avg"])


def test_bfloat16_state_of_torch_is_widened_and_a_remainder_begins_at_zero():
    params, reference = stepped(torch.optim.AdamW, dtype=torch.bfloat16)
    others, opt = stepped(gpuadam.torch.AdamW, seeds=(), dtype=torch.bfloat16, master="remainder")
    opt.load_state_dict(reference.state_dict())
    for p, q in zip(params, others, strict=True):
        assert torch.equal(opt.state[q]["exp_avg_sq"], reference.state[p]["exp_avg_sq"].float())
        assert not opt.state[q]["remainder"].any()


def test_loading_copies():
    params, opt = stepped(gpuadam.torch.Adam)
    _, other = stepped(gpuadam.torch.Adam, seeds=())
    other.load_state_dict(opt.state_dict())
    kept = [state["exp_avg"].clone() for state in other.state.values()]
    replay(opt, params, [gradients(9)])
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(kept, other.state.values(), strict=True))


def test_a_checkpoint_of_adam_is_decoupled_in_adamw_as_in_torch():
    _, saved = stepped(torch.optim.Adam, weight_decay=0.1)
    _, opt = stepped(gpuadam.torch.AdamW, seeds=())
    opt.load_state_dict(saved.state_dict())
    assert opt.param_groups[0]["decoupled_weight_decay"] is True and opt.param_groups[0]["weight_decay"] == 0.1


def test_a_checkpoint_of_an_old_torch_has_fewer_settings_and_counts_in_numbers():
    _, reference = stepped(torch.optim.Adam)
    saved = reference.state_dict()
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "amsgrad", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(key, None)
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    others, opt = stepped(gpuadam.torch.Adam, seeds=())
    opt.load_state_dict(saved)
    replay(opt, others, [gradients(5)])
    assert opt.state[others[0]]["step"] == 4


def changed(saved, **changes):
    saved = copy.deepcopy(saved)
    saved["state"][1].update(changes)
    return saved


BAD_CHECKPOINTS = {
    "a wrong shape": (lambda d: changed(d, exp_avg=torch.zeros(8)), ValueError, r"exp_avg of params\[1\] has shape \(8,\)"),
    "integers": (lambda d: changed(d, exp_avg=torch.zeros(7, dtype=torch.int32)), TypeError, "int32, and cannot become"),
    "no tensor": (lambda d: changed(d, exp_avg=[0.0] * 7), TypeError, "is a list, not a tensor"),
    "a negative step": (lambda d: changed(d, step=torch.tensor(-3.0)), ValueError, r"step of params\[1\] is -3.0"),
    "half a step": (lambda d: changed(d, step=1.5), ValueError, r"step of params\[1\] is 1.5"),
    "a step that is no number": (lambda d: changed(d, step=torch.tensor(torch.nan)), ValueError, "is nan"),
    "endless steps": (lambda d: changed(d, step=torch.tensor(torch.inf)), ValueError, "is inf"),
    "two steps in one": (lambda d: changed(d, step=torch.ones(2)), ValueError, r"is tensor\(\[1., 1.\]\)"),
    "8-bit state": (lambda d: stepped(gpuadam.torch.Adam, state_dtype="8bit")[1].state_dict(), ValueError, "exp_avg_codes"),
    "another group": (
        lambda d: d | {"param_groups": d["param_groups"] * 2},
        ValueError,
        "different number of parameter group",
    ),
    "a bad lr": (lambda d: d | {"param_groups": [d["param_groups"][0] | {"lr": -1.0}]}, ValueError, "lr=-1.0"),
    "state of no parameter": (
        lambda d: d | {"state": d["state"] | {3: d["state"][0]}},
        ValueError,
        r"keys \[3\], which are of no parameter .* the groups have \[0, 1, 2\]",
    ),
    "state by names, of groups with numbers": (
        lambda d: d | {"state": dict(zip(("w", "b", "s"), d["state"].values(), strict=True))},
        ValueError,
        r"keys \['w', 'b', 's'\]",
    ),
    "state of a parameter under two keys": (
        lambda d: d | {"state": d["state"] | {"0": d["state"][1]}},
        ValueError,
        r"\['0'\]",
    ),
    "a key that two parameters have": (
        lambda d: d | {"param_groups": [d["param_groups"][0] | {"params": [0, 1, 1]}]},
        ValueError,
        r"same key; the keys are \[0, 1, 1\]",
    ),
    "state that is no dict": (lambda d: d | {"state": d["state"] | {1: torch.tensor(0.0)}}, TypeError, "must be a dict"),
    "a list of states": (lambda d: d | {"state": [*d["state"].values()]}, TypeError, "must be a dict"),
    "state that only NAdam has": (lambda d: changed(d, mu_product=torch.tensor(0.9)), ValueError, "mu_product.*no other"),
    "a remainder without a place": (
        lambda d: changed(d, remainder=torch.zeros(7, dtype=torch.int16)),
        ValueError,
        "remainder.* and master of the one that was saved",
    ),
    **{
        f"{key}=False": (
            lambda d, key=key: d | {"param_groups": [d["param_groups"][0] | {key: False}]},
            ValueError,
            f"{key}=False in a saved group",
        )
        for key in ("bias_correction", "correct_bias")
    },
    "amsgrad without its state": (
        lambda d: d | {"param_groups": [d["param_groups"][0] | {"amsgrad": True}]},
        ValueError,
        "max_exp_avg_sq",
    ),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_changes_nothing(what):
    spoil, error, match = BAD_CHECKPOINTS[what]
    _, opt = stepped(gpuadam.torch.Adam)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=match):
        opt.load_state_dict(spoil(copy.deepcopy(before)))
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for state, old in zip(after["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)


def test_keys_that_json_made_strings_of_are_those_of_the_parameters():
    params, opt = stepped(gpuadam.torch.Adam)
    saved = opt.state_dict()
    saved = saved | {"state": {str(key): state for key, state in reversed(saved["state"].items())}}
    others, other = stepped(gpuadam.torch.Adam, seeds=())
    other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(value, other.state[q][key]) for key, value in opt.state[p].items())
    assert set(other.state) == set(others)


def named(names="wbs", grouped=False, make=gpuadam.torch.Adam, **options):
    """Return name -> parameter, all of one shape, and their optimizer after a step; grouped: the first in a group of its own."""
    params = {name: torch.nn.Parameter(torch.full((3,), float(ord(name)))) for name in names}
    items = list(params.items())
    groups = [{"params": items[:1], "lr": 0.5}, {"params": items[1:]}] if grouped else items
    try:
        opt = make(groups[::-1] if grouped == "reversed" else groups, **options)
    except (TypeError, AttributeError):
        pytest.skip("this torch's optimizers take no names")
    for name, p in params.items():
        p.grad = torch.full((3,), float(ord(name)) / 100)
    opt.step()
    return params, opt


@pytest.mark.parametrize("of", [torch.optim.Adam, gpuadam.torch.Adam], ids=["torch", "gpuadam"])
@pytest.mark.parametrize("names, grouped", [("sbw", False), ("wsb", True), ("wsb", "reversed")])
def test_names_in_another_order_decide_which_state_is_whose(names, grouped, of):
    params, saved = named(grouped=bool(grouped), make=of)
    others, opt = named(names, grouped)
    own = [(group["param_names"], group["params"]) for group in opt.param_groups]
    opt.load_state_dict(saved.state_dict())
    for name, p in others.items():
        assert torch.equal(opt.state[p]["exp_avg"], saved.state[params[name]]["exp_avg"].float())
    assert [(group["param_names"], group["params"]) for group in opt.param_groups] == own
    if grouped:
        assert {group["param_names"][0]: group["lr"] for group in opt.param_groups}["w"] == 0.5


def test_other_names_leave_it_to_the_place_as_in_torch():
    _, saved = named("xyz")
    others, opt = named("sbw")
    opt.load_state_dict(saved.state_dict())
    for p, q in zip(others.values(), saved.state, strict=True):
        assert torch.equal(opt.state[p]["exp_avg"], saved.state[q]["exp_avg"])


@pytest.mark.parametrize(
    "grouped, options, match",
    [
        (False, {"state_dtype": "bfloat16"}, "another order, by which numbers are rounded randomly"),
        (True, {}, "in other groups"),
    ],
)
def test_names_in_an_order_or_in_groups_that_matter_are_refused(grouped, options, match):
    _, saved = named(grouped=grouped, **options)
    _, opt = named("sbw", grouped, **options)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved.state_dict())
    assert str(opt.state_dict()) == str(before)


def test_the_maximum_of_a_group_whose_amsgrad_was_turned_off_is_left_out():
    _, opt = stepped(gpuadam.torch.Adam, amsgrad=True)
    opt.param_groups[0]["amsgrad"] = False
    others, other = stepped(gpuadam.torch.Adam, seeds=())
    other.load_state_dict(opt.state_dict())
    assert all("max_exp_avg_sq" not in other.state[q] and other.state[q]["step"] == 3 for q in others)


def test_8_bit_state_is_no_state_of_torchs():
    """torch must not take codes for numbers: it finds no exp_avg, and says so."""
    _, opt = stepped(gpuadam.torch.Adam, state_dtype="8bit")
    params, reference = stepped(torch.optim.Adam, seeds=())
    reference.load_state_dict(opt.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        replay(reference, params, [gradients(0)])


def test_hooks_of_checkpoints_see_and_change_what_is_loaded():
    _, opt = stepped(gpuadam.torch.Adam)
    others, other = stepped(gpuadam.torch.Adam, seeds=())
    seen = []
    other.register_load_state_dict_pre_hook(lambda o, d: changed(d, exp_avg=torch.full((7,), 5.0)))
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[others[1]]["exp_avg"][0].item()))
    other.load_state_dict(opt.state_dict())
    assert seen == [5.0]
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1


def test_the_loaded_state_of_a_named_parameter_is_named():
    p = torch.nn.Parameter(torch.ones(3))
    opt = gpuadam.torch.Adam([("layer.weight", p)])
    p.grad = torch.ones(3)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"the loaded exp_avg of params\['layer.weight'\] has shape"):
        opt.load_state_dict(saved)
