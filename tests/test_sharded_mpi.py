"""Ranks of MPI: the bits of one optimizer, whatever their number; one error for all."""

import libraries
import numpy as np
import pytest
import ranks
from cases import examples, few
from mpi_jobs import assert_ended_as_a_failure, expected, job

from gpuadam.sharded.layout import CELL

NUMBERS = ("4", "3", "2", "1", *examples((), ("8",)))


@pytest.fixture(scope="module")
def of_eight(tmp_path_factory, examples):
    """The bits of every case with several numbers of ranks, before and after it was saved; and how the job ended.

    In the short run the job has four ranks.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    for case in ranks.CASES:
        ranks.unsharded(case, folder)
    return job(examples(4, 8), "bits", CHECKPOINTS=str(folder))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ranks.CASES)
def test_1_2_3_4_and_8_ranks_have_the_bits_of_one_optimizer(of_eight, case):
    """Parameters on every rank, and all state."""
    found, _ = of_eight
    assert {n: found[case][n] for n in NUMBERS} == {n: [expected()[case][0]] for n in NUMBERS}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ranks.CASES)
@pytest.mark.parametrize("saved", ["4", "alone"])
def test_what_was_saved_goes_on_bit_for_bit_with_any_number_of_ranks(of_eight, case, saved):
    """Saved by four ranks, or by one optimizer alone; the next ten steps as if it had not been."""
    found, _ = of_eight
    keys = [f"{saved} to {n}" for n in (*NUMBERS, *(["alone"] if saved == "4" else []))]
    assert {key: found[case][key] for key in keys} == {key: [expected()[case][1]] for key in keys}


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    """What each of four ranks found, by its name; and how the job ended."""
    expected()
    return job(4, "training_and_refusals", **digits(tmp_path_factory))


def digits(tmp_path_factory):
    """Return where the ranks find the digits, if they are here and a test asks for them."""
    if not examples(False, True):
        return {}
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return {}
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    x, y = load_digits(return_X_y=True)
    np.savez(path, x=x[:1796].astype("f4") / 16, y=y[:1796])
    return {"DIGITS": str(path)}


@pytest.mark.exhaustive
def test_four_ranks_learn_to_read_digits_as_well_as_one(of_four):
    libraries.imported("sklearn.datasets", reason="scikit-learn is not installed")
    alone, together = of_four[0]["accuracy alone"][0], of_four[0]["accuracy"]
    assert len(set(together)) == 1
    assert together[0] == pytest.approx(alone, abs=0.003)  # 5 of 1796 digits: sums are rounded in another order
    assert alone > 0.98


SAID = {
    "a shape": "ValueError: the ranks differ in params['w']: 'number 0, float32 of shape (3, 4)' on rank 0, "
    "'number 0, float32 of shape (4, 3)' on rank 2",
    "a dtype": "float32 of shape (3, 4)' on rank 0, 'number 0, float64 of shape (3, 4)' on rank 1",
    "a name": "ValueError: the ranks differ in params['w']: 'number 0, float32 of shape (3, 4)' on rank 0, "
    "not there on rank 3",
    "lr": "ValueError: the ranks differ in lr of group 0: 0.1 on rank 0, 0.2 on rank 2",
    "betas": "ValueError: the ranks differ in betas of group 0: (0.9, 0.99) on rank 0, (0.9, 0.999) on rank 2",
    "the seed": "ValueError: the ranks differ in seed: 0 on rank 0, 1 on rank 3",
    "the state's dtype": "ValueError: the ranks differ in state_dtype: None on rank 0, 'bfloat16' on rank 1",
    "bucket_bytes": "ValueError: the ranks differ in bucket_bytes: 1048576 on rank 0, 2097152 on rank 1",
    "a bad array": "TypeError: rank 1 raised TypeError, so all ranks stop: params['w'] has dtype int32",
    "state that does not fit": "TypeError: params['0'] has dtype float64, and 8-bit state",
}


@pytest.mark.parametrize("what", SAID)
def test_what_differs_between_ranks_is_named_on_all_of_them_before_anything_is_written(of_four, what):
    for rank, found in enumerate(of_four[0]["refused"]):
        said, untouched = found[what]
        if (what, rank) == ("a bad array", 1):
            assert said.startswith("TypeError: params['w'] has dtype int32")
        else:
            assert SAID[what] in said
        assert untouched


SAID_BY_STEPS = {
    "a gradient's shape": "ValueError: rank 2 raised ValueError, so all ranks stop: the gradient of params['w'] has shape (2, 4)",
    "a gradient of one rank": "the ranks differ in the parameters without a gradient: [] on rank 0, ['w'] on rank 2",
    "max_norm": "ValueError: the ranks differ in max_norm: None on rank 0, 1.0 on rank 1",
    "grad_scale": "ValueError: the ranks differ in grad_scale: 1.0 on rank 0, 2.0 on rank 3",
    "an lr that was changed": "ValueError: the ranks differ in lr of group 0: 0.1 on rank 0, 0.5 on rank 1",
    "a clip that rounds to 0": "rounds to 0 in float32",
}


@pytest.mark.parametrize("what", SAID_BY_STEPS)
def test_a_step_that_is_wrong_on_one_rank_is_left_out_on_all_of_them(of_four, what):
    for rank, found in enumerate(of_four[0]["refused steps"]):
        said, unchanged, goes_on = found[what]
        if (what, rank) == ("a gradient's shape", 2):
            assert said.startswith("ValueError: the gradient of params['w'] has shape (2, 4), params['w'] has shape (3, 4)")
        else:
            assert SAID_BY_STEPS[what] in said
        assert unchanged and goes_on


@pytest.mark.parametrize("what, taken", [("found_inf", 0), ("infinite", 0), ("finite", 1), ("not looked at", 1)])
def test_a_step_is_left_out_on_all_ranks_if_it_is_on_one(of_four, what, taken):
    for found in of_four[0]["conditions"]:
        steps, moved, largest_gradient = found[what]
        assert (steps, moved) == (taken, bool(taken))
        assert largest_gradient == 0  # zero_grad, as in a step


def test_the_mean_is_the_sum_with_its_factor_in_grad_scale(of_four):
    (found,) = {tuple(of_rank) for of_rank in of_four[0]["mean"]}
    ours, expected = found
    assert ours == expected


def test_a_rank_knows_what_it_owns_and_has_no_other_state(of_four):
    owned = {"w": np.zeros(30_000, int), "b": np.zeros(300, int)}
    for shards, n_bytes, params_are_right in of_four[0]["shards"]:
        for name, start, stop, shape in shards:
            owned[name][start:stop] += 1
            assert shape == [stop - start]
        assert params_are_right
        assert n_bytes <= 2 * 4 * 2 * CELL  # two moments of float32 in two of eight cells
    assert all((of_name == 1).all() for of_name in owned.values())


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("of_job", few(["of_eight", "of_four"], "of_four"))
def test_a_job_ends_when_one_of_its_ranks_is_killed(of_job, request):
    _, end = request.getfixturevalue(of_job)
    assert_ended_as_a_failure(end)
