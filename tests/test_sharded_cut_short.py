"""Many ranks: a call that is cut short at any moment is told on its rank, and calls of several threads do not mix."""

import collections
import gc
import random
import threading

import numpy as np
import pytest
import thread_ranks
from cases import different_bits
from ranks import message
from test_under_way import Interrupt
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam import transports
from gpuadam.kernels import cpu_threads

SIZES = {"a": 3, "b": 9000, "c": 5000}
CUT_SHORT = "was cut short, or is under way in this thread, before "


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(thread_ranks, "SECONDS", 10)
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 1)


def arrays(value):
    return {name: np.full(size, value, "f4") for name, size in SIZES.items()}


def optimizer(transport, **options):
    """Return parameters of the value 1, and an optimizer of several buckets that has taken a step."""
    params = arrays(1.0)
    opt = gpuadam.ShardedAdam(params, transport, lr=0.1, bucket_bytes=0, **options)
    opt.step(arrays(0.5))
    return params, opt


def everything(params, opt):
    """Return the bytes of all that a step changes on this rank."""
    state = [shard.state[key] for shard in opt.shards for key in ("m", "v")]
    counts = [opt.steps, *(shard.state["step"] for shard in opt.shards), *(member.taken for member in opt.members)]
    return b"".join(array.tobytes() for array in [*params.values(), *state]) + repr(counts).encode()


# Interrupts

STEPS = {
    "one rank": (1, {}),
    "one rank, clipped": (1, {"max_norm": 0.1}),
    "three ranks": (3, {}),
    "three ranks, clipped": (3, {"max_norm": 0.1, "check_finite": True}),
}


@pytest.mark.parametrize("what", STEPS)
def test_an_interrupt_at_any_moment_of_a_step_leaves_each_rank_as_before_or_after_or_is_told(what, tmp_path, examples):
    n, options = STEPS[what]
    rng, found = random.Random(what), collections.Counter()

    def stepped(transport, all_here, victim=None, moment=None):
        """Return what the rank has before the step and after it, what it says then, and the moments that there are."""
        params, opt = optimizer(transport)
        opt.step(arrays(-0.25), **options)  # whatever is done once is done
        before, interrupt = everything(params, opt), Interrupt(moment if transport.rank == victim else None)
        all_here.wait()
        try:
            with interrupt:
                opt.step(arrays(0.75), **options)
        except (KeyboardInterrupt, RuntimeError):  # a barrier that is broken is one
            transport.broken()
        calls = {
            "step": lambda: opt.step(arrays(1)),
            "save": lambda: opt.save(tmp_path / "a"),
            "m": lambda: opt.gathered("m"),
        }
        said = [message(call) for call in calls.values()] if transport.calls.under_way else []
        return before, everything(params, opt), said, interrupt.count

    whole = all_well(on_ranks(n, stepped, threading.Barrier(n)))
    for _ in range(examples(25, 500)):
        victim = rng.randrange(n)
        moment = rng.randrange(1, whole[victim][3] + 1)
        for rank, (before, now, said, _) in enumerate(all_well(on_ranks(n, stepped, threading.Barrier(n), victim, moment))):
            assert before == whole[rank][0]
            if said:
                assert all(f"a step {CUT_SHORT}" in of_call for of_call in said), said
                found["told", rank == victim] += 1
            else:
                assert now in (before, whole[rank][1]), f"torn and not told: rank {rank}, opcode {moment} of rank {victim}"
                found["whole", rank == victim] += 1
    assert found["told", True] and list(tmp_path.iterdir()) == []
    print(f"\n{what}: {dict(found)} of those that were interrupted, and of the others")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that was opened, and not closed
@pytest.mark.exhaustive
def test_an_interrupt_of_a_save_leaves_a_whole_checkpoint_and_one_of_a_load_leaves_it_alone(tmp_path, examples):
    rng, found = random.Random(0), collections.Counter()
    wanted = {}
    for steps in (1, 2):
        _, alone = optimizer(transports.Local())
        for _ in range(steps - 1):
            alone.step(arrays(0.75))
        wanted[steps] = alone.gathered("m")

    def loaded():
        opt = gpuadam.load_sharded(tmp_path, arrays(0), transports.Local(), with_params=True)
        assert all(different_bits(opt.gathered("m")[name], m) == 0 for name, m in wanted[opt.steps].items())
        return opt.steps

    def saved(moment=None):
        _, opt = optimizer(transports.Local())
        opt.save(tmp_path, with_params=True)
        opt.step(arrays(0.75))
        with Interrupt(moment) as interrupt:
            opt.save(tmp_path, with_params=True)
        return interrupt.count

    def reloaded(moment=None):
        with Interrupt(moment) as interrupt:
            loaded()
        return interrupt.count

    for function in (saved, reloaded):
        count = function()
        for _ in range(examples(25, 250)):
            with pytest.raises(KeyboardInterrupt):
                function(rng.randrange(1, count + 1))
            found[function.__name__, loaded()] += 1
    assert len({steps for name, steps in found if name == "reloaded"}) == 1
    gc.collect()  # now, so that nothing else is told of the file
    print(f"\nthe steps of what was there afterwards: {dict(found)}")


def test_an_interrupt_of_the_checks_of_one_rank_stops_all_and_the_next_step_is_taken():
    def of_rank(transport):
        params, opt = optimizer(transport)

        def interrupted(step):
            raise KeyboardInterrupt

        before = everything(params, opt)
        if transport.rank == 1:
            opt.groups[0]["lr"] = interrupted
        try:
            said = message(opt.step, arrays(1))
        except KeyboardInterrupt:
            said = "KeyboardInterrupt"
        assert everything(params, opt) == before
        opt.groups[0]["lr"] = 0.1
        opt.step(arrays(1))
        return said

    other, own = all_well(on_ranks(2, of_rank))
    assert other == "RuntimeError: rank 1 raised KeyboardInterrupt, so all ranks stop: " and own == "KeyboardInterrupt"


def cut_short(transport, monkeypatch):
    """Let an optimizer be interrupted between two collectives."""
    _, opt = optimizer(transport)
    with monkeypatch.context() as patch:
        patch.setattr(transport, "all_gather", None)  # a TypeError
        with pytest.raises(TypeError):
            opt.step(arrays(1))


def test_nothing_else_goes_over_the_transport_of_a_step_that_was_cut_short(monkeypatch, tmp_path):
    transport = transports.Local()
    _, other = optimizer(transport)
    other.save(tmp_path)
    cut_short(transport, monkeypatch)
    for call in (
        lambda: other.step(arrays(1)),
        lambda: other.save(tmp_path),
        lambda: optimizer(transport),
        lambda: gpuadam.load_sharded(tmp_path, arrays(1), transport),
    ):
        with pytest.raises(ValueError, match=f"a step {CUT_SHORT}.*from a checkpoint"):
            call()
    assert gpuadam.load_sharded(tmp_path, arrays(1), transports.Local()).steps == 1  # as the error says


# Threads


def test_steps_of_two_threads_are_taken_one_after_another():
    params, opt = optimizer(transports.Local())
    expected, alone = optimizer(transports.Local())
    threads = [threading.Thread(target=lambda: [opt.step(arrays(0.5)) for _ in range(100)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(200):
        alone.step(arrays(0.5))
    assert everything(params, opt) == everything(expected, alone)


def test_a_call_of_a_signals_handler_amid_a_step_is_refused_and_the_step_is_taken(tmp_path, monkeypatch):
    params, opt = optimizer(transports.Local())
    expected, alone = optimizer(transports.Local())
    gather, said = opt.transport.all_gather, []

    def handled(buffer):
        said.append(message(opt.save, tmp_path / "a"))
        return gather(buffer)

    monkeypatch.setattr(opt.transport, "all_gather", handled)
    opt.step(arrays(1))
    alone.step(arrays(1))
    assert said and all(f"a step {CUT_SHORT}a save" in one for one in said)
    assert everything(params, opt) == everything(expected, alone) and list(tmp_path.iterdir()) == []


def test_a_thread_that_waited_for_a_call_which_is_cut_short_is_refused(monkeypatch):
    transport, amid, said = transports.Local(), threading.Event(), []
    _, opt = optimizer(transport)

    def interrupted(buffer):
        amid.set()
        waiting.join(0.2)
        assert waiting.is_alive()
        raise KeyboardInterrupt

    def waits():
        assert amid.wait(10)
        said.append(message(opt.step, arrays(1)))

    monkeypatch.setattr(transport, "all_gather", interrupted)
    waiting = threading.Thread(target=waits)
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        opt.step(arrays(1))
    waiting.join()
    assert f"a step {CUT_SHORT}a step" in said[0]


def test_threads_whose_calls_are_in_another_order_on_another_rank_are_told(tmp_path):
    def of_rank(transport):
        _, opt = optimizer(transport)
        calls = [lambda: opt.step(arrays(1)), lambda: opt.save(tmp_path / "a")]
        said = [message(call) for call in (calls[::-1] if transport.rank else calls)]
        assert opt.steps == 1
        opt.step(arrays(1))
        return said

    for said in all_well(on_ranks(2, of_rank)):
        assert all(one.startswith("ValueError: the ranks differ in") for one in said)
    assert list(tmp_path.iterdir()) == []
