"""Ranks agree: values are compared by what they mean, and what one of them does wrong, all of them raise."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import ranks
import thread_ranks
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


w = np.ones((2, 3), "f4")


@pytest.fixture
def _soon(monkeypatch):
    monkeypatch.setattr(thread_ranks, "SECONDS", 10)  # without the error, the others would wait
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 1)


@pytest.mark.usefixtures("_soon")
def test_a_learning_rate_that_is_too_large_for_those_skipped_before_stops_all_ranks():
    """Their bias correction is that of an earlier step, and they are not on every rank."""

    def of_rank(transport):
        params = [np.ones(5000, "f4"), np.ones(5000, "f4")]
        opt = gpuadam.ShardedAdam(params, transport, bucket_bytes=0)
        for _ in range(20):
            opt.step([params[0].copy(), None])
        before = [param.copy() for param in params]
        opt.groups[0]["lr"] = 1e38
        said = ranks.message(opt.step, [param.copy() for param in params])
        assert all(different_bits(*pair) == 0 for pair in zip(params, before, strict=True)) and opt.steps == 20
        opt.step([params[0].copy(), None])  # whose step it fits
        return said

    for said in all_well(on_ranks(4, of_rank)):
        assert "ValueError" in said and "overflows float32" in said


class Unreadable(float):
    def __repr__(self):
        raise KeyError("no text")


class Mute(Exception):
    def __str__(self):
        raise KeyError("no text")


def raising(step):
    raise Mute


def unpicklable():
    """Return 0.5, of a class that pickle cannot find."""

    class Half(float):
        def __repr__(self):
            return "a half"

    return Half(0.5)


@pytest.mark.parametrize(
    "name, own, other, said",
    [
        (
            "weight_decay",
            unpicklable(),
            0.25,
            "the ranks differ in weight_decay of group 0: 0.25 on rank 0, a half on rank 1",
        ),
        ("weight_decay", Fraction(1, 10**5000), 0.5, "Exceeds the limit"),
        ("weight_decay", Unreadable(0.5), 0.5, "no text"),
        (
            "weight_decay",
            np.float64(0.5),
            0.25,
            "the ranks differ in weight_decay of group 0: 0.25 on rank 0, np.float64(0.5) on rank 1",
        ),
        ("lr", raising, 0.1, "rank 1 raised Mute, so all ranks stop: its message cannot be read"),
    ],
    ids=["what cannot be pickled", "too many digits", "an unreadable number", "another type", "an error without words"],
)
@pytest.mark.usefixtures("_soon")
def test_what_cannot_be_told_to_other_ranks_stops_all_of_them(name, own, other, said, monkeypatch):
    exchange = thread_ranks.Threads.exchange  # between processes, what is exchanged is pickled
    monkeypatch.setattr(thread_ranks.Threads, "exchange", lambda t, item: exchange(t, pickle.loads(pickle.dumps(item))))

    def of_rank(transport):
        return gpuadam.ShardedAdam([w.copy()], transport, **{name: own if transport.rank == 1 else other})

    first, second = on_ranks(2, of_rank)
    assert said in str(first)
    assert type(second) is Mute or said in str(second)


@pytest.mark.usefixtures("_soon")
def test_a_backend_in_use_in_a_step_is_not_that_of_the_ranks_that_own_something_alone():
    def of_rank(transport):
        opt = gpuadam.ShardedAdam([w.copy()], transport)
        with gpuadam.use_backend("cupy"):
            opt.step(opt.grads)
        return opt.steps

    assert on_ranks(2, of_rank) == [1, 1]


@pytest.mark.usefixtures("_soon")
def test_what_only_looks_the_same_on_all_ranks_is_told_apart():
    def of_rank(transport):
        opt = gpuadam.ShardedAdam(w.copy(), transport)
        return ranks.message(opt.gathered, "None" if transport.rank else None)

    for said in all_well(on_ranks(2, of_rank)):
        assert "ValueError: the ranks differ in the key to gather: None on rank 0, 'None' on rank 1" in said


@pytest.mark.usefixtures("_soon")
def test_ranks_that_gather_different_state_or_do_something_else_are_told():
    def of_rank(transport):
        opt = gpuadam.ShardedAdam(w.copy(), transport)
        said = [ranks.message(opt.gathered, "v" if transport.rank else "m")]
        return [*said, ranks.message(*((opt.gathered, "m") if transport.rank else (opt.step, w)))]

    for gathered, other in all_well(on_ranks(2, of_rank)):
        assert gathered.startswith("ValueError: the ranks differ in the key to gather: 'm' on rank 0, 'v' on rank 1")
        assert other.startswith("ValueError: the ranks differ in the number of steps taken")
