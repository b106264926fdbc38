"""Step counts in `gpuadam.torch`: also beyond 2**24, where a float32 plus 1 is itself again."""

import copy
import pickle

import libraries
import numpy as np
import pytest

torch = libraries.imported("torch", reason="torch is not installed")

from torch_steps import gradients, replay, stepped  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("count", [-5.0, 0.5, float("nan"), float("inf")])
def test_a_step_count_that_somebody_spoiled_is_refused_and_not_waited_for(count):
    params, opt = stepped(gpuadam.torch.Adam)
    opt.state[params[1]]["step"].fill_(count)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=f"step of params\\['1'\\] is {count}"):
        opt.step()
    assert all(map(torch.equal, params, before))


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
