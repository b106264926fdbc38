"""`gpuadam.torch` beside `torch.optim`: the same training, checkpoints that go both ways, and the protocols of an optimizer."""

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from interrupts import Interrupt  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402
from gpuadam import backends, torch_tensors, update  # noqa: E402
from gpuadam.kernels import cpu_backend, synchronous  # noqa: E402

PAIRS = {"Adam": (gpuadam.torch.Adam, torch.optim.Adam), "AdamW": (gpuadam.torch.AdamW, torch.optim.AdamW)}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Have torch use one thread: its threads wait by spinning, and take the cores of tests that run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PAIRS)
def pair(request):
    """Our class and torch's."""
    return PAIRS[request.param]


# The same training


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits: (images, labels) to train with, (images, labels) to test with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))


def batches(images, labels, n):
    for k in range(n):
        at = torch.arange(100 * k, 100 * k + 100) % len(labels)
        yield images[at], labels[at]


def backward(model, images, labels):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


@pytest.fixture(scope="module")
def recorded(digits):
    """The gradients of 1,000 steps of a training with torch.optim.Adam."""
    model = network()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    grads = []
    for images, labels in batches(*digits[0], 1000):
        opt.zero_grad()
        backward(model, images, labels)
        grads.append([p.grad.clone() for p in model.parameters()])
        opt.step()
    return grads


def replay(opt, params, grads):
    for given in grads:
        for p, g in zip(params, given, strict=True):
            p.grad = g.clone()  # maximize of torch 2.4 to 2.6 changes it
        opt.step()


SETTINGS = [
    ("Adam", {"lr": 1e-3}),
    ("Adam", {"lr": torch.tensor(1e-3), "weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.99), "eps": 1e-6}),
    ("Adam", {"lr": 1e-2, "maximize": True}),
    ("AdamW", {"lr": 1e-3}),
]


@pytest.mark.parametrize("name, settings", SETTINGS, ids=[f"{name}: {', '.join(options)}" for name, options in SETTINGS])
def test_a_thousand_steps_over_recorded_gradients_agree_with_torch(name, settings, recorded):
    mine, reference = PAIRS[name]
    ours, theirs = list(network().parameters()), list(network().parameters())
    replay(mine(ours, **settings), ours, recorded)
    replay(reference(theirs, **settings, foreach=False), theirs, recorded)
    lr = float(settings["lr"])
    atol = 2e-6 if lr <= 1e-3 + 1e-9 else 2e-3 * lr  # both round at each step
    # AdamW of torch multiplies by 1 - lr * weight_decay, which float32 rounds the same way at each step
    rtol = 1000 * 2**-25 if name == "AdamW" else 0
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def test_a_thousand_steps_with_decoupled_decay_agree_with_torch_in_float64(recorded):
    ours, theirs = list(network().parameters()), list(network().double().parameters())
    replay(gpuadam.torch.AdamW(ours), ours, recorded)
    replay(torch.optim.AdamW(theirs, foreach=False), theirs, [[g.double() for g in given] for given in recorded])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=5e-6)  # float32's rounding of v and of param


def test_each_trained_by_itself_is_as_accurate_as_with_torch(pair, digits):
    images, labels = digits[1]
    right = []
    for make in pair:
        model = network()
        opt = make(model.parameters(), lr=5e-3)
        for batch in batches(*digits[0], 300):
            opt.zero_grad()
            backward(model, *batch)
            opt.step()
        right.append(int((model(images).argmax(1) == labels).sum()))
    assert right[0] > 0.93 * len(labels)
    assert abs(right[0] - right[1]) <= 2  # images of 397: those that lie on the edge


OPTIONS = {
    "plain": ({}, torch.float32),
    "8bit": ({"state_dtype": "8bit"}, torch.float32),
    "remainder": ({"master": "remainder"}, torch.bfloat16),
    "stochastic rounding": ({"stochastic_rounding": True, "seed": 3}, torch.bfloat16),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resume_in_the_middle_changes_no_bit(name, recorded):
    options, dtype = OPTIONS[name]
    grads = [[g.to(dtype) for g in given] for given in recorded[:20]]

    def made(lr):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in network().parameters()]
        return params, gpuadam.torch.AdamW(params, lr=lr, **options)

    params, opt = made(1e-2)
    replay(opt, params, grads[:10])
    file = io.BytesIO()
    torch.save([opt.state_dict(), params], file)
    replay(opt, params, grads[10:])
    file.seek(0)
    saved, saved_params = torch.load(file, weights_only=True)
    others, resumed = made(0.5)
    with torch.no_grad():
        for p, q in zip(others, saved_params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved)
    replay(resumed, others, grads[10:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(opt.state[p][key], resumed.state[q][key]) for key in opt.state[p])


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_the_bits_are_those_of_gpuadams_own_optimizers(options):
    for one, other in ((gpuadam.torch.Adam, gpuadam.Adam), (gpuadam.torch.AdamW, gpuadam.AdamW)):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 300)]
        arrays = [p.detach().numpy().copy() for p in params]
        opt, reference = one(params, lr=0.1, **options), other(arrays, lr=0.1, **options)
        for step in range(1, 5):
            replay(opt, params, [[torch.cos(step * p.detach()) for p in params]])
            reference.step([p.grad.numpy() for p in params])
        assert all((p.detach().numpy() == a).all() for p, a in zip(params, arrays, strict=True))


# Checkpoints of torch


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 5), (7,), ())]


def gradients(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5), (7,), ())]


def stepped(make, seeds=range(3), dtype=torch.float32, **options):
    params = small(dtype)
    opt = make(params, **options)
    replay(opt, params, [gradients(seed, dtype) for seed in seeds])
    return params, opt


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


@pytest.mark.parametrize("count", [-5.0, 0.5, float("nan"), float("inf")])
def test_a_step_count_that_somebody_spoiled_is_refused_and_not_waited_for(count):
    params, opt = stepped(gpuadam.torch.Adam)
    opt.state[params[1]]["step"].fill_(count)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=f"step of params\\['1'\\] is {count}"):
        opt.step()
    assert all(map(torch.equal, params, before))


# Counts beyond 2**24, where a float32 plus 1 is itself again


def counted_from(count, dtype=torch.bfloat16, **options):
    """Return parameters and their optimizer after that many steps; and gpuadam's own, of the same parameters and state."""
    options = {"lr": 0.5, "betas": (0.9, 1 - 2**-26), "stochastic_rounding": True, "seed": 3} | options
    params, opt = stepped(gpuadam.torch.Adam, seeds=(0,), dtype=dtype, **options)
    arrays = [p.detach().clone() for p in params]
    reference = gpuadam.Adam(arrays, **options)
    saved = reference.state_dict()
    for state, p in zip(saved["state"].values(), params, strict=True):
        opt.state[p]["step"].fill_(count)
        state |= {"step": count, "m": opt.state[p]["exp_avg"].numpy(), "v": opt.state[p]["exp_avg_sq"].numpy()}
    reference.load_state_dict(saved)
    return params, opt, arrays, reference


def test_counts_and_random_bits_go_on_where_a_float32_stands_still():
    params, opt, arrays, reference = counted_from(2**24 - 2)
    for k in range(6):
        given = gradients(k, torch.bfloat16)
        replay(opt, params, [given])
        reference.step(given)
        assert all(map(torch.equal, params, arrays)), f"step {k}"
        assert {state["step"].item() for state in opt.state.values()} == {float(np.float32(2**24 - 1 + k))}
    assert all(state["step"].dtype is torch.float32 for state in opt.state_dict()["state"].values())


def test_parameters_that_were_skipped_beyond_2_to_the_24_keep_counts_of_their_own():
    params, opt, arrays, reference = counted_from(2**24)
    for k in range(4):
        given = gradients(k, torch.bfloat16)
        present = [None if n == k else g for n, g in enumerate(given)]
        for p, g in zip(params, present, strict=True):
            p.grad = g
        opt.step()
        reference.step(present)
    assert all(map(torch.equal, params, arrays))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt)), "checkpoint"])
def test_a_copy_or_a_checkpoint_beyond_2_to_the_24_goes_on_from_the_float32(copied):
    params, opt, *_ = counted_from(2**24)
    replay(opt, params, [gradients(k, torch.bfloat16) for k in range(3)])  # 2**24 + 3, of which the float32 is 2**24 + 4
    if copied == "checkpoint":
        _, other = stepped(gpuadam.torch.Adam, seeds=(), dtype=torch.bfloat16)
        other.load_state_dict(opt.state_dict())
    else:
        other = copied(opt)
    others = other.param_groups[0]["params"]
    replay(other, others, [gradients(k, torch.bfloat16) for k in range(4)])
    assert other.state[others[0]]["step"] == 2**24 + 8


def test_a_count_that_somebody_sets_is_the_count():
    params, opt, *_ = counted_from(2**24)
    replay(opt, params, [gradients(k, torch.bfloat16) for k in range(3)])
    opt.state[params[0]]["step"].fill_(6)
    replay(opt, params, [gradients(3, torch.bfloat16)])
    assert [int(opt.state[p]["step"]) for p in params] == [7, 2**24 + 4, 2**24 + 4]


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


# Groups, gradients, schedules


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


# Mixed precision


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


# What is refused


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


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"capturable": True}]
)
def test_a_choice_of_implementation_changes_no_bit(options):
    expected, _ = stepped(gpuadam.torch.Adam)
    params, _ = stepped(gpuadam.torch.Adam, **options)
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


BAD_STEPS = {
    "a sparse gradient": (
        lambda params, opt: setattr(params[1], "grad", torch.ones(7).to_sparse()),
        TypeError,
        "sparse_coo",
    ),
    "a setting out of range": (lambda params, opt: opt.param_groups[0].update(lr=-1.0), ValueError, "lr=-1"),
    "amsgrad that comes later": (lambda params, opt: opt.param_groups[0].update(amsgrad=True), ValueError, "max_exp_avg_sq"),
    "state of another shape": (
        lambda params, opt: opt.state[params[1]].update(exp_avg=torch.zeros(8)),
        ValueError,
        r"m of params\['1'\] has shape \(8,\)",
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


def test_one_of_betas_may_be_a_tensor():
    numbers = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    for p, betas in zip(numbers, [(0.5, 0.75), (0.5, torch.tensor(0.75))], strict=True):
        p.grad = torch.ones(3)
        gpuadam.torch.Adam([p], betas=betas).step()
    assert torch.equal(*numbers)


def test_the_loaded_state_of_a_named_parameter_is_named():
    p = torch.nn.Parameter(torch.ones(3))
    opt = gpuadam.torch.Adam([("layer.weight", p)])
    p.grad = torch.ones(3)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"the loaded exp_avg of params\['layer.weight'\] has shape"):
        opt.load_state_dict(saved)


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


# On a GPU


@pytest.fixture(scope="module")
def on_the_cpu():
    """Parameters after three steps on the CPU."""
    params, _ = stepped(gpuadam.torch.AdamW, lr=0.1)
    return params


@pytest.fixture
def tensors_of_a_gpu(driver, cp, on_the_cpu, monkeypatch):
    """Have torch's tensors in CPU memory taken for a GPU's, which can write there because that memory is registered with it.

    What torch does with a tensor comes in the order of its stream; here it is done at once, so each launch is waited for.
    """
    alive = {}

    def memory(tensor):
        if tensor.dtype is torch.bfloat16:
            return gpuadam.Bits(memory(tensor.view(torch.int16)), "bfloat16")
        array = tensor.detach().numpy()
        if not array.size:
            return cp.empty(array.shape, array.dtype)
        address = array.ctypes.data
        if address not in alive:
            alive[address] = array
            cp.cuda.runtime.hostRegister(address, array.nbytes, 0)
        pointer = cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(address, array.nbytes, array, 0), 0)
        return cp.ndarray(array.shape, array.dtype, pointer, array.strides)

    monkeypatch.setattr(torch_tensors, "_memory", memory)
    monkeypatch.setattr(backends, "takes_numpy", lambda backend: False)
    monkeypatch.setattr(gpuadam.torch.optimizer, "_on_device", lambda group: group["capturable"])
    monkeypatch.setattr(synchronous, "ON", True)
    yield
    for address in alive:
        cp.cuda.runtime.hostUnregister(address)


@pytest.mark.gpu
@pytest.mark.parametrize("capturable, launches", [(False, 1), (True, 2)], ids=["host", "capturable"])
def test_a_group_is_one_launch_and_found_inf_leaves_a_step_out(
    on_the_cpu, driver, tensors_of_a_gpu, monkeypatch, backend, capturable, launches
):
    """In device mode another launch makes the scalars, which looks at the flag and counts the step."""
    params = small()
    opt = gpuadam.torch.AdamW(params, lr=0.1, capturable=capturable, backend=backend)
    replay(opt, params, [gradients(0)])
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    replay(opt, params, [gradients(7)])
    opt.found_inf = torch.tensor(0.0)
    replay(opt, params, [[4 * g for g in gradients(1)]])
    monkeypatch.setattr(driver, "calls", [])
    monkeypatch.setattr(driver, "listening", True)
    replay(opt, params, [[4 * g for g in gradients(2)]])
    assert sum(name.startswith("cuLaunchKernel") for name in driver.calls) == launches
    assert all(torch.equal(p, q) and opt.state[p]["step"] == 3 for p, q in zip(params, on_the_cpu, strict=True))


def on_gpu(opt, params, grads):
    for given in grads:
        for p, g in zip(params, given, strict=True):
            p.grad = g.to(p.device)
        opt.step()


def in_two_groups(**options):
    params = small()
    return params, gpuadam.torch.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, **options)


def swap_groups(opt):
    opt.param_groups.reverse()


def remove_a_group(opt):
    del opt.param_groups[0]


def replace_a_group(opt):
    opt.param_groups[0] = opt.param_groups[0] | {"params": [torch.nn.Parameter(torch.ones(4))]}


def move_a_parameter(opt):
    opt.add_param_group({"params": [opt.param_groups[0]["params"].pop()]})


def reverse_a_group(opt):
    opt.param_groups[0]["params"].reverse()


def begin_anew(opt):
    opt.state.clear()


def set_counts(opt):
    for state in opt.state.values():
        state["step"].fill_(70)


def count_on_the_host(opt):
    capturable = [group["capturable"] for group in opt.param_groups]
    for now in ([False] * len(capturable), capturable):
        for group, value in zip(opt.param_groups, now, strict=True):
            group["capturable"] = value
        step_all(opt)


def load_itself(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


CHANGES = [
    swap_groups, remove_a_group, replace_a_group, move_a_parameter, reverse_a_group, begin_anew, set_counts, count_on_the_host,
    load_itself,
]  # fmt: skip


def step_all(opt, groups=None):
    for group in opt.param_groups if groups is None else groups:
        for p in group["params"]:
            p.grad = torch.cos(p.detach())
    opt.step()
    opt.zero_grad()


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_the_count_on_the_device_is_that_of_the_parameters_whatever_becomes_of_groups(
    driver, tensors_of_a_gpu, backend, change
):
    """The second group has taken two steps more than the first one, and both go on."""
    trained = []
    for options in ({}, {"capturable": True, "backend": backend}):
        params, opt = in_two_groups(**options)
        step_all(opt)
        step_all(opt, opt.param_groups[1:])
        step_all(opt, opt.param_groups[1:])
        change(opt)
        step_all(opt)
        step_all(opt)
        trained.append([*params, *(opt.state[p]["step"] for p in params)])
    assert all(map(torch.equal, *trained))


@pytest.mark.gpu
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_an_optimizer_counts_on_the_device_by_itself(driver, tensors_of_a_gpu, backend, copied):
    _, opt = in_two_groups(capturable=True, backend=backend)
    step_all(opt, opt.param_groups[1:])
    other = copied(opt)
    step_all(other)
    step_all(opt)
    step_all(other)
    assert [[int(s["step"]) for s in one.state.values()] for one in (opt, other)] == [[2, 1, 1], [3, 2, 2]]


@pytest.mark.gpu
def test_counts_and_random_bits_on_the_device_go_on_where_a_float32_stands_still(driver, tensors_of_a_gpu, backend):
    options = {"state_dtype": "bfloat16", "betas": (0.9, 1 - 2**-26), "lr": 0.5}
    trained = []
    for more in ({}, {"capturable": True, "backend": backend}):
        params, opt = stepped(gpuadam.torch.Adam, seeds=(0,), **options, **more)
        for p in params:
            opt.state[p]["step"].fill_(2**24 - 1)
        for k in range(5):
            opt.found_inf = torch.tensor(float(k == 2))
            replay(opt, params, [gradients(k)])
        assert [int(opt.state[p]["step"]) for p in params] == [int(np.float32(2**24 + 3))] * 3
        trained.append([*params, *(state["exp_avg"] for state in opt.state.values())])
    assert all(map(torch.equal, *trained))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}, {"state_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_cuda_parameters_have_the_bits_of_cpu_parameters(cuda_torch, backend, options):
    expected, _ = stepped(gpuadam.torch.AdamW, **options)
    params = [torch.nn.Parameter(p.detach().cuda()) for p in small()]
    opt = gpuadam.torch.AdamW(params, backend=backend, **options)
    on_gpu(opt, params, [gradients(seed) for seed in range(3)])
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p.cpu(), q)
        assert opt.state[p]["step"] == 3 and all(key == "step" or t.is_cuda for key, t in opt.state[p].items())


@pytest.mark.gpu
def test_parameters_on_two_devices_share_an_optimizer(cuda_torch):
    expected, _ = stepped(gpuadam.torch.AdamW)
    params = small()
    params[1] = torch.nn.Parameter(params[1].detach().cuda())
    opt = gpuadam.torch.AdamW(params)
    on_gpu(opt, params, [gradients(seed) for seed in range(3)])
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_gradient_scaler_on_a_gpu_leaves_out_what_overflowed(cuda_torch, capturable, fused):
    params = [torch.nn.Parameter(p.detach().cuda()) for p in small()]
    opt = gpuadam.torch.Adam(params, lr=0.1, capturable=capturable, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    others = small()
    reference = gpuadam.torch.Adam(others, lr=0.1)
    for seed in range(4):
        opt.zero_grad()
        scaler.scale(sum((p * g.cuda()).sum() for p, g in zip(params, gradients(seed), strict=True))).backward()
        if seed == 2:
            params[1].grad[2] = float("inf")
        else:
            replay(reference, others, [gradients(seed)])
        scaler.step(opt)
        scaler.update()
    assert all(torch.equal(p.cpu(), q) and opt.state[p]["step"] == 3 for p, q in zip(params, others, strict=True))


@pytest.mark.gpu
def test_a_captured_step_replays_with_the_learning_rate_of_then(cuda_torch):
    lr = torch.tensor(0.1, device="cuda")
    params, expected = [torch.nn.Parameter(p.detach().cuda()) for p in small()], small()
    opt, reference = gpuadam.torch.AdamW(params, lr=lr, capturable=True), gpuadam.torch.AdamW(expected, lr=0.1)
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g.cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    with torch.cuda.graph(graph, stream=stream):
        opt.step()
    replay(reference, expected, [gradients(0)])
    for k in range(1, 4):
        lr.fill_(0.1 / (k + 1))
        for p, g in zip(params, gradients(k), strict=True):
            p.grad.copy_(g)
        graph.replay()
        reference.param_groups[0]["lr"] = torch.tensor(0.1 / (k + 1))
        replay(reference, expected, [gradients(k)])
    torch.cuda.synchronize()
    assert all(torch.equal(p.cpu(), q) and opt.state[p]["step"] == 4 for p, q in zip(params, expected, strict=True))


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
        with pytest.raises(KeyboardInterrupt), Interrupt(n):
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
