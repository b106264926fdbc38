"""Many ranks: values are compared by what they mean, and not by their types."""

import numpy as np
import pytest
from cases import different_bits
from ranks import message
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam import transports
from gpuadam.kernels import cpu_threads
from gpuadam.sharded.agreement import agreed

EQUAL = {
    "numbers": (1, 1.0, np.float64(1), np.float32(1), np.int8(1), np.array(1.0)),
    "zeros": (0, 0.0, -0.0, np.float32(-0.0)),
    "fractions": (0.1, np.float64(0.1)),
    "large": (2**70, float(2**70)),
    "NaN": (float("nan"), np.float32("nan"), -np.float64("nan")),
    "infinity": (float("inf"), np.float32("inf")),
    "flags": (True, np.True_),
    "text": ("m", np.str_("m")),
    "two betas": ((0.5, 1), [0.5, 1.0], np.array([0.5, 1]), (np.float32(0.5), 1)),
    "nested": ([{"lr": 1, "betas": (0.5, 1)}], ({"betas": [0.5, 1], "lr": 1.0},)),
    "nothing": (None, None),
}
ONES = [values[0] for values in EQUAL.values()] + [
    "1",
    "True",
    2**70 + 1,
    0.1 + 2e-17,
    np.float32(0.1),
    False,
    (),
    {},
    10**400,
]


def compared(values):
    """Return what `agreed` says on each rank, whose values are given."""

    def of_rank(transport):
        transports.check(transport)
        return message(agreed, transport, lambda: (None, {"lr": values[transport.rank]}, False))

    return set(all_well(on_ranks(len(values), of_rank)))


@pytest.mark.parametrize("what", EQUAL)
def test_equal_values_of_different_types_are_equal(what):
    assert compared(EQUAL[what]) == {"nothing was raised"}


def test_values_that_are_not_equal_differ_whatever_their_types():
    for k, one in enumerate(ONES):
        for other in ONES[k + 1 :]:
            (said,) = compared([one, other])
            assert said.startswith("ValueError: the ranks differ in lr: "), (one, other)


def test_hyperparameters_of_other_types_make_one_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 1)
    kinds = [
        {"lr": 1, "betas": (0.5, 0.75), "eps": 0.5, "weight_decay": 0, "state_dtype": "bfloat16"},
        {"lr": 1.0, "betas": [np.float32(0.5), 0.75], "eps": np.float64(0.5), "weight_decay": -0.0},
        {
            "lr": np.float32(1),
            "betas": np.array([0.5, 0.75]),
            "eps": np.float32(0.5),
            "amsgrad": np.False_,
            "seed": np.int8(0),
        },
    ]

    def of_rank(transport):
        params = {"a": np.ones(3, "f4"), "b": np.ones(9000, "f4")}
        opt = gpuadam.ShardedAdam(params, transport, **{"state_dtype": np.str_("bfloat16")} | kinds[transport.rank])
        scale, norm, flag = ((1, 2, True), (1.0, np.float32(2), np.True_), (np.int64(1), 2.0, True))[transport.rank]
        opt.step({name: np.ones_like(p) for name, p in params.items()}, grad_scale=scale, max_norm=norm, check_finite=flag)
        opt.save(tmp_path, with_params=flag)
        loaded = {"a": np.zeros(3, "f4"), "b": np.zeros(9000, "f4")}
        gpuadam.load_sharded(tmp_path, loaded, transport, with_params=True)
        return [different_bits(params[name], loaded[name]) for name in params]

    assert all_well(on_ranks(3, of_rank)) == [[0, 0]] * 3
