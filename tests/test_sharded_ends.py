"""A job of MPI ends when one of its ranks does, whichever way it ends."""

import numpy as np
import pytest
import ranks
from cases import different_bits, few
from mpi_jobs import ENDED_WITHIN, assert_ended_as_a_failure, ended, expected, job, started

import gpuadam


@pytest.mark.parametrize("attempt", few(range(3), 0))
@pytest.mark.exhaustive
def test_a_job_that_saves_at_each_step_ends_when_one_of_its_ranks_is_killed_and_its_checkpoint_is_whole(attempt, tmp_path):
    expected()
    _, end = job(4, "saving", CHECKPOINTS=str(tmp_path))
    assert_ended_as_a_failure(end)
    found, wanted = (np.zeros(ranks.GOING_ON, "f4") for _ in range(2))
    opt, reference = gpuadam.load(tmp_path, found, with_params=True), gpuadam.Adam(wanted)
    assert opt.steps >= 1
    for step in range(opt.steps):
        reference.step(ranks.going_on(step))
    assert different_bits(found, wanted) == 0
    assert all(different_bits(opt.state["0"][key], reference.state["0"][key]) == 0 for key in ("m", "v"))


@pytest.mark.exhaustive
def test_a_job_ends_when_a_rank_raises_even_without_mpi4py_as_its_runner():
    expected()
    end = ended(started(2, "one_raises", run=()))
    assert_ended_as_a_failure(end)
    assert "RuntimeError: a rank has had enough" in end[2]


WAYS_TO_END = ["the end of the program", "SystemExit(0)", "SystemExit(3)", "MPI.Finalize", "close"]


@pytest.mark.parametrize("how", few(WAYS_TO_END, "close"))
def test_a_rank_that_ends_while_others_go_on_is_told_to_them(how):
    expected()
    status, seconds, output = ended(started(3, "ends", run=(), HOW=how))
    assert (status == 0) == (how != "SystemExit(3)") and seconds < ENDED_WITHIN, output
    for rank in (0, 2):
        assert f"rank {rank}: 2 steps, RankEnded: rank 1 has ended, or closed its transport, and rank {rank} makes" in output
    assert ("rank 1: RankEnded: rank 1 has ended, or closed its transport, and rank 1 makes" in output) == (how == "close")


AMID_A_STEP = "a step that was cut short, and other work"


@pytest.mark.parametrize("how", few(["SIGSTOP", AMID_A_STEP, "other work"], "SIGSTOP"))
@pytest.mark.exhaustive
def test_a_rank_that_does_not_come_is_named_after_the_timeout_and_the_job_ends(how):
    expected()
    end = ended(started(3, "ends", run=(), HOW=how, TIMEOUT="4"))
    assert end[0] != 0
    for rank in (0, 2):
        said = f"RankMissing: rank {rank} has waited for its timeout, 4.0 s, and rank 1 has not come: it may be stopped, dead, or"
        assert f"rank {rank}: 2 steps, {said}" in end[2]
    assert "ends amid a step, or after it was cut short: all ranks end" in end[2]


@pytest.mark.parametrize("how", few(["os._exit", "SIGKILL", "SIGTERM", "a step that was cut short"], "SIGKILL"))
def test_a_rank_that_ends_without_a_word_or_amid_a_step_ends_the_job(how):
    expected()
    end = ended(started(3, "ends", run=(), HOW=how))
    if how == "os._exit":  # mpiexec may say nothing
        assert end[1] < ENDED_WITHIN and "nothing was raised" not in end[2]
    else:
        assert_ended_as_a_failure(end)
    assert (how != "a step that was cut short") or "rank 1 ends amid a step, or after it was cut short" in end[2]


@pytest.mark.parametrize(
    "other, said",
    [
        pytest.param(
            {},
            "RankMissing: rank 0 has waited for its timeout, 1.0 s, and not all ranks have made their transport",
            marks=pytest.mark.exhaustive,
        ),
        ({"OTHER": "60"}, "ValueError: the ranks differ in timeout, [50.0, 60.0, 60.0]: give all ranks the same"),
    ],
)
def test_ranks_that_do_not_make_the_same_transport_are_told(other, said):
    end = ended(started(3, "not_made", run=(), **other))
    assert said in end[2] and (end[0] == 0) == bool(other), end
