"""Many ranks: the bits of one, whatever their number; one error for all; a clean end."""

import copy
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import thread_ranks
from cases import different_bits, examples, few
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam import transports
from gpuadam.kernels import cpu_threads
from gpuadam.sharded.layout import CELL, Layout
from gpuadam.sharded.norm import ShardedNorm
from gpuadam.sharded.transports import nccl as nccl_transport

ROOT = Path(__file__).parent.parent
ENDED_WITHIN = 10  # seconds


# The layout


SIZES = [0, 1, 7, 4095, 4096, 4097, 15_000, 0, 20_011, 33, 64, 4000, 100]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("bucket_cells", [0, 1, 5, 1000])
def test_the_ranks_own_every_element_once(n, bucket_cells):
    layout = Layout(SIZES, n, bucket_cells)
    owners = [np.zeros(size, int) for size in SIZES]
    in_buffer = np.zeros(layout.size, int)
    for rank, bucket in itertools.product(range(n), layout.buckets):
        for shard in layout.shards(bucket, rank):
            owners[shard.parameter][shard.start : shard.stop] += 1
            in_buffer[shard.place] += 1
            first, last = bucket.part_of(rank)
            assert first <= shard.place.start < shard.place.stop <= last
            assert shard.place.start == layout.starts[shard.parameter] + shard.start
            assert shard.place.stop == layout.starts[shard.parameter] + shard.stop
    assert all((owner == 1).all() for owner in owners) and in_buffer.max() == 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 64])
def test_a_parameter_is_cut_at_multiples_of_a_cell_and_lies_at_the_same_place_for_any_number_of_ranks(n):
    layout = Layout(SIZES, n, 3)
    assert layout.starts == Layout(SIZES, 1, 1000).starts and all(start % 32 == 0 for start in layout.starts)
    for rank, bucket in itertools.product(range(n), layout.buckets):
        for shard in layout.shards(bucket, rank):
            assert shard.start % CELL == 0 and (shard.stop % CELL == 0 or shard.stop == SIZES[shard.parameter])


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_each_rank_has_as_many_elements_and_less_than_a_cell_for_each_is_added_at_the_end(n):
    layout = Layout(SIZES, n, 4)
    end = layout.starts[-1] + SIZES[-1]
    assert all(bucket.part * n == bucket.stop - bucket.start for bucket in layout.buckets)
    assert end <= layout.size < end + (n + 1) * CELL
    assert sum(bucket.part for bucket in layout.buckets) * n == layout.size


def test_a_bucket_has_about_as_many_bytes_as_asked():
    layout = Layout([10 * CELL], ranks=2, bucket_cells=4)
    assert [bucket.part // CELL for bucket in layout.buckets] == [2, 2, 1]


def test_parameters_without_elements_have_no_buckets():
    assert (Layout([0, 0], 4, 8).size, Layout([0, 0], 4, 8).buckets) == (0, [])


# The norm of what many ranks have


@pytest.mark.parametrize(
    "n, sizes",
    [*((n, SIZES) for n in (1, 2, 3, 8)), (3, [3]), (2, [4096]), (2, [0]), (3, [4097 * CELL])],  # the last: three levels
    ids=str,
)
def test_the_sums_of_all_ranks_make_the_norm_of_one(monkeypatch, n, sizes):
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 1)  # whose loop is on disk already
    some = np.random.default_rng(n).standard_normal(40_009).astype("f4")
    arrays = [np.resize(some, size) for size in sizes]
    layout = Layout(sizes, n, 3)

    def of_rank(transport):
        owned = [shard for bucket in layout.buckets for shard in layout.shards(bucket, transport.rank)]
        parts = [(s, arrays[s.parameter][s.start : s.stop]) for s in owned]
        shards = [SimpleNamespace(number=s.parameter, start=s.start, stop=s.stop, sums=part) for s, part in parts]
        return ShardedNorm(gpuadam.backends.load("numba-cpu"), shards, transport).norm(sizes)

    assert all_well(on_ranks(n, of_rank)) == [gpuadam.global_norm(arrays)] * n


# Ranks of MPI


def mpiexec():
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    found = Path(sys.executable).parent / "mpiexec"
    if not found.exists():
        pytest.skip(f"mpiexec is not installed beside {Path(sys.executable).name}: pip install mpich")
    return found


def started(n, function, *, run=("-m", "mpi4py"), **environment):
    """Return the process of a job in `ranks.py` on n ranks."""
    one_thread = dict.fromkeys(("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [mpiexec(), "-n", str(n), sys.executable, *run, "-c", f"import ranks; ranks.{function}()"],
        env=os.environ | one_thread | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Return (its exit status, the seconds that it took to end, what it wrote)."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, time.monotonic() - began, out + err


def job(n, function, **environment):
    """Return what a job found, and how it ended when one of its ranks was killed amid a step."""
    process = started(n, function, **environment)
    line = process.stdout.readline()
    assert line, f"exit status and output: {ended(process)}"
    found = json.loads(line)
    chance = random.Random()
    time.sleep(chance.uniform(0, 0.2))
    os.kill(chance.choice(found["pids"]), signal.SIGKILL)
    return found["found"], ended(process)


@functools.cache
def expected():
    """The bits of every case by one optimizer, twice. It compiles what the ranks then find on disk."""
    return {case: ranks.unsharded(case) for case in ranks.CASES}


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


@pytest.mark.parametrize("case", ranks.CASES)
def test_1_2_3_4_and_8_ranks_have_the_bits_of_one_optimizer(of_eight, case):
    """Parameters on every rank, and all state."""
    found, _ = of_eight
    assert {n: found[case][n] for n in NUMBERS} == {n: [expected()[case][0]] for n in NUMBERS}


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
    """Return where the ranks find the digits, if they are here."""
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
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
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
            assert said.startswith("ValueError: the gradient of params['w'] has shape (2, 4), params['w'] has (3, 4)")
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


# How it ends


def assert_ended_as_a_failure(end):
    status, seconds, output = end
    assert status != 0 and seconds < ENDED_WITHIN, output


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("of_job", ["of_eight", "of_four"])
def test_a_job_ends_when_one_of_its_ranks_is_killed(of_job, request):
    _, end = request.getfixturevalue(of_job)
    assert_ended_as_a_failure(end)


@pytest.mark.parametrize("attempt", few(range(3), 0))
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


def test_a_job_ends_when_a_rank_raises_even_without_mpi4py_as_its_runner():
    expected()
    end = ended(started(2, "one_raises", run=()))
    assert_ended_as_a_failure(end)
    assert "RuntimeError: a rank has had enough" in end[2]


WAYS_TO_END = ["the end of the program", "SystemExit(0)", "SystemExit(3)", "MPI.Finalize", "close"]


@pytest.mark.parametrize("how", few(WAYS_TO_END, "the end of the program", "close"))
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
        ({}, "RankMissing: rank 0 has waited for its timeout, 1.0 s, and not all ranks have made their transport"),
        ({"OTHER": "60"}, "ValueError: the ranks differ in timeout, [50.0, 60.0, 60.0]: give all ranks the same"),
    ],
)
def test_ranks_that_do_not_make_the_same_transport_are_told(other, said):
    end = ended(started(3, "not_made", run=(), **other))
    assert said in end[2] and (end[0] == 0) == bool(other), end


@pytest.mark.parametrize(
    "timeout, error", [(0, ValueError), (-1.0, ValueError), (np.inf, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_timeout_is_a_positive_number_of_seconds(timeout, error):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    with pytest.raises(error, match="timeout"):
        transports.MPI(timeout=timeout)


def test_what_follows_a_collective_that_was_not_waited_for_is_refused():
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    transport = transports.MPI()
    work = transport.all_gather(np.zeros(8, "u1"))
    with pytest.raises(ValueError, match="a collective that was cut short, or whose Work was not waited for"):
        transport.exchange("a")
    work.wait()
    assert transport.exchange("b") == ["b"]


# One rank


def sharded(params, **options):
    return gpuadam.ShardedAdam(params, transports.Local(), **options)


w = np.ones((2, 3), "f4")


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"params": []}, ValueError, "no parameters"),
        ({"params": [w, w]}, ValueError, "are one array"),
        ({"params": [w, None]}, TypeError, "None"),
        ({"params": [w.astype("i4")]}, TypeError, "int32"),
        ({"params": [{"params": {"a": w}}, {"params": {"a": w.copy()}}]}, ValueError, "two parameters are named 'a'"),
        ({"transport": None}, TypeError, "transport is a NoneType, which has no rank"),
        ({"transport": transports.Local}, TypeError, "the class Local"),
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"reduction": "max"}, ValueError, "reduction='max' must be one of 'mean', 'sum'"),
        ({"bucket_bytes": -1}, ValueError, "bucket_bytes must not be negative"),
        ({"bucket_bytes": 1e6}, TypeError, "bucket_bytes must be an integer"),
        ({"capturable": True}, TypeError, "no option .'capturable'"),
        ({"algorithm": "sgd"}, ValueError, "algorithm='sgd'"),
        ({"state_dtype": "int4"}, ValueError, "state_dtype='int4'"),
        ({"algorithm": "adamax", "state_dtype": "8bit"}, ValueError, "AdaMax's v is none"),
        ({"eps": 1e-60}, ValueError, "rounds to 0"),
        ({"params": [w[:0]], "state_dtype": "int4"}, ValueError, "state_dtype='int4'"),  # of which no rank has state
        ({"params": [w[:0]], "master": "float32"}, ValueError, "master='float32'"),
        ({"params": [w[:0]], "stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False"),
        ({"params": [w[:0]], "state_dtype": "8bit", "amsgrad": True}, ValueError, "8-bit state has no max_v"),
    ],
)
def test_what_is_wrong_at_construction_is_said(arguments, error, match):
    arguments = {"params": [w.copy()], "transport": transports.Local()} | arguments
    with pytest.raises(error, match=match):
        gpuadam.ShardedAdam(**arguments)


class Fixed:
    """A transport that takes no attributes."""

    __slots__ = ()
    rank, size, memory = 0, 1, "any"
    reduce_scatter = all_gather = broadcast = exchange = None


def test_a_transport_that_cannot_be_given_its_calls_is_refused():
    with pytest.raises(TypeError, match=r"Fixed without calls: give it an attribute, calls = transports\.Calls\(\)"):
        gpuadam.ShardedAdam(w.copy(), Fixed())


class OnGPUs(transports.Local):
    memory = "CUDA"


def test_arrays_of_another_memory_than_the_transports_are_refused():
    with pytest.raises(TypeError, match=r"CPU memory, and transports\.OnGPUs takes arrays in CUDA memory"):
        gpuadam.ShardedAdam(w.copy(), OnGPUs())


@pytest.mark.parametrize(
    "grad, options, error, match",
    [
        (np.ones(6, "f4"), {}, ValueError, r"has shape \(6,\)"),
        (np.ones((2, 3)), {}, TypeError, "float64; it must be float32 or bfloat16 or float16"),
        ([w], {}, TypeError, "the parameter was given as one array"),
        (w, {"max_norm": -1.0}, ValueError, "max_norm"),
        (w, {"grad_scale": np.nan}, ValueError, "grad_scale"),
        (w, {"check_finite": 1}, TypeError, "check_finite"),
    ],
)
def test_a_bad_step_changes_nothing(grad, options, error, match):
    param = w.copy()
    opt = sharded(param)
    with pytest.raises(error, match=match):
        opt.step(grad, **options)
    assert (param == 1).all() and opt.steps == 0 and opt.shards[0].state["step"] == 0


@pytest.mark.parametrize("dtype", ["f4", "f8"])  # in the same buffer, and in one of its own
def test_a_gradient_in_the_place_of_another_is_refused(dtype):
    params = [w.astype("f8"), w.astype(dtype)]
    opt = sharded(params)
    with pytest.raises(ValueError, match="the buffer of gradients and the gradient of params"):
        opt.step(opt.grads[::-1])
    assert all((param == 1).all() for param in params) and opt.steps == 0


def test_the_place_of_a_gradient_is_known_whatever_the_strides_of_dimensions_of_one():
    params = np.ones((1, 3), "f4"), np.ones((1, 3), "f4")
    opt, expected = map(sharded, params)
    opt.grads[...] = expected.grads[...] = 2.0
    opt.step(np.lib.stride_tricks.as_strided(opt.grads, (1, 3), (4, 4)))
    expected.step(expected.grads)
    assert different_bits(*params) == 0


@pytest.mark.parametrize("views", [False, True])
def test_a_gradient_that_is_a_parameter_is_refused_if_it_is_to_be_zeroed(views):
    opt = sharded({"w": w.copy(), "b": w.copy()}, views=views, zero_grad=True)
    with pytest.raises(ValueError, match=r"the gradient of params\['b'\] share memory"):
        opt.step({"w": w.copy(), "b": opt.params["w"]})
    with pytest.raises(ValueError, match=r"m of params\['w'\] and the gradient of params\['w'\] share memory"):
        opt.step({"w": opt.shards[0].state["m"].reshape(w.shape), "b": None})
    assert (opt.params["w"] == 1).all() and opt.steps == 0


def test_a_gradient_that_is_a_parameter_is_fine_if_it_is_only_read():
    params = w.copy(), w.copy()
    sharded(params[0]).step(params[0])
    sharded(params[1]).step(w)
    assert different_bits(*params) == 0 and (params[0] < 1).all()


def test_gradients_in_their_places_are_not_copied(monkeypatch):
    param = {"w": w.copy()}
    opt = sharded(param, views=True)
    opt.grads["w"][...] = 5.0
    monkeypatch.setattr(opt._kernels, "copy", None)
    opt.step(opt.grads)
    assert (opt.params["w"] < 1).all() and (param["w"] == 1).all()


def test_parameters_that_are_taken_over_are_not_kept():
    given = [np.ones(5, "f4"), np.ones(3, "f8")]
    alive = [weakref.ref(array) for array in given]
    opt = sharded([{"params": given[:1]}, {"params": given[1:]}], views=True)
    del given
    gc.collect()
    assert [array() for array in alive] == [None, None]
    opt.step(opt.grads)
    assert [group["params"][0] is own for group, (own,) in zip(opt.groups, opt.params, strict=True)] == [True, True]


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_a_narrow_gradient_is_summed_in_float32(format):
    given = np.arange(9, dtype="f4").reshape(3, 3) - 4  # which both formats hold
    narrow = given.astype("f2") if format == "float16" else gpuadam.Bits((given.view("u4") >> 16).astype("u2"), "bfloat16")
    params = [np.ones((3, 3), "f4") for _ in range(2)]
    sharded(params[0]).step(narrow)
    sharded(params[1]).step(given)
    assert different_bits(*params) == 0 and (params[0] != 1).any()


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_elements_of_a_gradient_may_share_memory_unless_it_is_zeroed(dtype):
    grad, params = np.broadcast_to(np.array([3.0, 0.1, -2.0], dtype), (2, 3)), [np.ones((2, 3), "f4") for _ in range(3)]
    opts = [sharded(param, zero_grad=param is params[2]) for param in params]
    opts[0].step(grad, max_norm=1.0)
    opts[1].step(grad.copy(), max_norm=1.0)
    assert different_bits(*params[:2]) == 0 and (params[0] != 1).all()
    with pytest.raises(ValueError, match="elements share memory"):
        opts[2].step(grad)
    assert (params[2] == 1).all()


def test_a_schedule_is_called_with_the_number_of_the_step():
    params = [w.copy(), w.copy()]
    opt, expected = sharded(params[0], lr=lambda step: 0.1 / step), gpuadam.Adam(params[1], lr=lambda step: 0.1 / step)
    for _ in range(3):
        opt.step(w)
        expected.step(w)
    assert different_bits(*params) == 0


def test_only_empty_parameters_are_fine():
    opt = sharded([np.zeros((0, 3), "f4")])
    opt.step([np.zeros((0, 3), "f4")], max_norm=1.0)
    assert opt.steps == 1 and opt.shards == [] and opt.gathered("m") == {}


def test_a_schedule_is_called_once_in_a_step():
    """Also where the step is clipped, and its scale checked again."""
    called = []
    opt = sharded(w.copy(), lr=lambda step: called.append(step) or 0.1)
    called.clear()
    for _ in range(2):
        opt.step(w, max_norm=0.1)
    assert called == [1, 2]


def test_a_parameter_in_another_order_is_read_once_in_a_step(monkeypatch):
    opt = sharded(np.ones((100, 300), "f4", order="F"), bucket_bytes=0)
    copied = []
    monkeypatch.setattr(opt._kernels, "copy", lambda to, source: copied.append(to.size))
    opt.step(opt.grads)
    assert copied == [30_000, 30_000]  # there, and back


def test_bucket_bytes_may_be_any_integer():
    opt = sharded(w.copy(), bucket_bytes=np.uint8(200))
    opt.step(w)
    assert opt.steps == 1


def test_an_optimizer_over_ranks_is_not_copied():
    opt = sharded(w.copy())
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"a ShardedAdam is not copied or pickled.*save\(folder\)"):
            function(opt)


def test_parameters_may_come_from_an_iterator():
    given = [w.copy(), w.copy()]
    opt = sharded(iter(given))
    assert all(own is param for own, param in zip(opt.params, given, strict=True))


def test_parameters_of_a_group_cannot_be_changed():
    opt = sharded([w.copy()])
    opt.groups[0]["params"][0] = w.copy()
    for call in (lambda: opt.step([w]), lambda: opt.save("not made")):
        with pytest.raises(ValueError, match="cannot be changed after the optimizer is made"):
            call()


# torch's tensors


@pytest.mark.parametrize("change", [lambda p: p.data.clone(), lambda p: p.data.T, lambda p: p.data.double()])
def test_a_tensor_that_has_got_other_memory_is_refused(change):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    param = torch.ones((3, 3), requires_grad=True)
    opt = sharded([param])
    param.data = change(param)
    for call in (lambda: opt.step([torch.ones(3, 3)]), lambda: opt.save("not made")):
        with pytest.raises(ValueError, match=r"nor the memory, shape or dtype of a tensor.*tensor\.data\.copy_\(x\)"):
            call()
    assert (param == 1).all()


def test_autograd_is_told_that_parameters_become_those_of_rank_0():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    sharded([param])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Ranks that are threads: what one of them does wrong, all of them raise


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
        ("bucket_bytes", 10**5000, 1, "Exceeds the limit"),
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


@pytest.mark.parametrize("collective", ["reduce_scatter", "all_gather"])
def test_nothing_follows_a_step_that_was_cut_short(collective, tmp_path, monkeypatch):
    opt = sharded(np.ones(9000, "f4"), bucket_bytes=0)
    original, calls = getattr(opt.transport, collective), iter(range(10))

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(opt.transport, collective, interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(np.ones(9000, "f4"))
    for call in (lambda: opt.step(opt.grads), lambda: opt.save(tmp_path / "a"), lambda: opt.gathered("m")):
        with pytest.raises(ValueError, match="a step was cut short"):
            call()
    assert list(tmp_path.iterdir()) == []


# torch's process groups


def of_gloo(rank, file, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    transport = transports.Torch()
    found = [ranks.sharded(case, transport) for case in ("groups, clipped", "8 bits")]
    Path(folder, str(rank)).write_text(json.dumps([found, transport.exchange(rank)]))
    dist.destroy_process_group()


def test_two_ranks_of_gloo_have_the_bits_of_one_optimizer(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    wanted = [expected()["groups, clipped"][0], expected()["8 bits"][0]]
    torch.multiprocessing.spawn(of_gloo, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in ("0", "1"):
        assert json.loads((tmp_path / rank).read_text()) == [wanted, [0, 1]]


def test_a_transport_without_a_process_group_says_so():
    pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        transports.Torch()


# NCCL, up to its calls


class Stream:
    """A CUDA stream that writes down what it is asked."""

    def __init__(self, name, log):
        self.ptr, self.log = name, log

    def record(self, event):
        return f"an event of {self.ptr}"

    def wait_event(self, event):
        self.log.append(f"{self.ptr} waits for {event}")


class Communicator:
    """CuPy's, of one rank, over the host's memory: methods, and the order of arguments, as CuPy documents them."""

    def __init__(self, log, ndev, commId, rank):
        self.log = log
        assert (ndev, commId, rank) == (1, "a unique id", 0)

    def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
        self.log.append(f"reduceScatter on {stream}")
        assert op == "sum"
        ctypes.memmove(recvbuf, sendbuf, recvcount * {"f4": 4, "f8": 8}[datatype])

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self.log.append(f"allGather on {stream}")
        assert sendbuf == recvbuf and datatype == "u1"
        ctypes.memset(recvbuf, 7, count)  # so that what is gathered shows

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        self.log.append(f"broadcast on {stream}")
        assert sendbuff == recvbuff and (datatype, root) == ("u1", 0)
        ctypes.memset(recvbuff, 8, count)


class Memory:
    """What NCCL's transport asks of a CuPy array."""

    def __init__(self, array):
        self.array, self.size, self.nbytes, self.dtype = array, array.size, array.nbytes, array.dtype
        self.data = SimpleNamespace(ptr=array.ctypes.data)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_nccl_moves_whole_buffers_on_a_stream_of_its_own_and_each_stream_waits_for_the_other(monkeypatch, dtype):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    log = []
    current, own = Stream("the current one", log), Stream("its own", log)
    cuda = SimpleNamespace(
        Stream=lambda non_blocking: own, get_current_stream=lambda: current, Event=lambda disable_timing: None
    )
    nccl = SimpleNamespace(
        available=True,
        get_unique_id=lambda: "a unique id",
        NcclCommunicator=functools.partial(Communicator, log),
        **{"NCCL_FLOAT32": "f4", "NCCL_FLOAT64": "f8", "NCCL_UINT8": "u1", "NCCL_SUM": "sum"},
    )
    fakes = {"cupy": SimpleNamespace(cuda=cuda), "cupy.cuda.nccl": nccl}
    monkeypatch.setattr(nccl_transport, "imported", lambda name, fix: fakes[name])
    transport = transports.NCCL(timeout=60)
    given, part = np.arange(100, dtype=dtype), np.zeros(100, dtype)
    transport.reduce_scatter(Memory(given), Memory(part)).wait()
    assert (part == given).all()
    transport.all_gather(Memory(given)).wait()
    assert (given.view("u1") == 7).all()
    transport.broadcast(Memory(given))
    assert (given.view("u1") == 8).all()
    before, after = "its own waits for an event of the current one", "the current one waits for an event of its own"
    calls = ("reduceScatter", "allGather", "broadcast")
    assert log == [line for call in calls for line in (before, f"{call} on its own", after)]
    assert transport.exchange("by MPI") == ["by MPI"]
    transport.close()
    with pytest.raises(transports.RankEnded):
        transport.exchange("by MPI")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"check_finite": True}])
@pytest.mark.parametrize("make", [transports.Local, transports.NCCL])
def test_one_rank_on_a_gpu_has_the_bits_of_the_cpu(make, options):
    cp = pytest.importorskip("cupy")
    if make is transports.NCCL:
        pytest.importorskip("mpi4py")
        with warnings.catch_warnings():  # CuPy's own module looks for the library first, and warns where there is none
            warnings.simplefilter("ignore")
            found = importlib.import_module("cupy.cuda.nccl").available
        if not found:
            pytest.skip("CuPy finds no NCCL")
    results = []
    for there, transport in ((np.asarray, transports.Local()), (cp.asarray, make())):
        params = {name: there(p) for name, p in ranks.params_of("views, clipped").items()}
        opt = gpuadam.ShardedAdam(params, transport, lr=0.1, bucket_bytes=40_000)
        for step in (1, 2, 3):
            grads = ranks.grads_of("views, clipped", step, 0, 1)
            opt.step({name: there(grad) for name, grad in grads.items()}, **options)
        results.append(ranks.digest(*map(opt._kernels.to_host, params.values()), *opt.gathered("m").values()))
    assert results[0] == results[1]
