"""A step that is cut short is told: at every moment of it, whatever stops it."""

import contextlib
import copy
import pickle
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from cases import few
from interrupts import Interrupt

import gpuadam
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.testing import unchanged
from gpuadam.under_way import UnderWay, in_turn


def arrays(seed):
    """Return arrays of which each step makes several launches: of two formats, and one of them not dense."""
    rng = np.random.default_rng(seed)
    return {
        "a": rng.random(3, "f4"),
        "b": rng.random((2, 3), "f4"),
        "strided": rng.random(8, "f4")[::2],
        "wide": rng.random(2),
    }


def adam(params, **options):
    return gpuadam.Adam([{"params": params}, {"params": {"late": np.ones(2, "f4")}}], **options)


def offload(params, **options):
    return gpuadam.OffloadAdam({name: np.ascontiguousarray(p) for name, p in params.items()}, budget=100_000, **options)


def dense(params, **options):
    return gpuadam.Adam({"a": params["a"], "b": params["b"]}, **options)


OPTIMIZERS = {
    "Adam": lambda params: adam(params, amsgrad=True),
    "8-bit state": lambda params: dense(params, state_dtype="8bit"),
    "OffloadAdam": offload,
    "repeated": dense,
    "repeated groups": lambda params: gpuadam.Adam([{"params": {name: params[name]}} for name in ("a", "b")]),
}
STEPS_BEFORE = {"repeated": 3, "repeated groups": 3}  # of the step that is cut short; else one


def grads_of(opt, seed=1):
    of_names = arrays(seed) | {"late": np.ones(2, "f4")}
    groups = [
        {name: of_names[name].astype(p.dtype) for name, p in zip(g["names"], g["params"], strict=False)} for g in opt.groups
    ]
    return groups if len(groups) > 1 else groups[0]


def everything(opt):
    """Return copies of all that a step changes."""
    params = [p.copy() for group in opt.groups for p in group["params"]]
    state = [np.array(x) for state in opt.state.values() for x in state.values()]
    return [*params, *state, np.array(opt.steps)]


def same(some, others):
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def step_follows(opt, grads):
    """Take a step, if need be after the state was loaded, and return whether that was not needed."""
    try:
        opt.step(grads)
    except ValueError:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step(grads)
        return False
    return True


@pytest.mark.parametrize("name", few(OPTIMIZERS, "8-bit state", "OffloadAdam", "repeated groups"))
def test_an_interrupt_at_any_moment_of_a_step_leaves_all_or_nothing_changed_or_is_told(name, tmp_path, examples):
    def begun():
        opt = OPTIMIZERS[name](arrays(0))
        for _ in range(STEPS_BEFORE.get(name, 1)):
            opt.step(grads)
        return opt

    grads = grads_of(OPTIMIZERS[name](arrays(0)))
    after = begun()
    after.step(grads)
    after = everything(after)
    assert name not in STEPS_BEFORE or begun()._repeated.ready
    every = 7 if name in STEPS_BEFORE else 61  # it has fewer opcodes
    opt = begun()
    with Interrupt() as whole:
        opt.step(grads)
    told, moments = 0, range(1, whole.count + 1, examples(every, 1))
    for n in moments:
        opt = begun()
        before = everything(opt)
        saved = copy.deepcopy(opt.state_dict())
        with pytest.raises(KeyboardInterrupt), Interrupt(n) as interrupt:
            opt.step(grads)
        if opt.under_way.changing:
            told += 1
            for refused in (
                lambda opt=opt, grads=grads: opt.step(grads),
                opt.state_dict,
                lambda opt=opt: opt.save(tmp_path / "a"),
            ):
                with pytest.raises((ValueError, TypeError), match=r"cut short.*load_state_dict|OffloadAdam is not one of"):
                    refused()
            opt.load_state_dict(saved)
            for param, value in zip([p for g in opt.groups for p in g["params"]], before, strict=False):
                param[...] = value
            opt.step(grads)
            assert same(everything(opt), after), n
            continue
        now = everything(opt)
        assert same(now, before) or same(now, after), f"torn and not told at opcode {n}"
        # before the one opcode that gives the turn back Python looks for no signal
        assert step_follows(opt, grads) or interrupt.function == "step", f"opcode {n} leaves the turn taken"
    assert 0 < told < len(moments)
    print(f"\n{name}: {len(moments):,} interrupts, {told:,} told, 0 torn and untold")


def test_an_error_between_two_launches_is_told(monkeypatch):
    opt = adam(arrays(0))
    grads = grads_of(opt)
    opt.step(grads)
    saved = copy.deepcopy(opt.state_dict())
    strided = numba_cpu.build

    def failing(rule, form, loop):
        def kernel(table, first, last, *rest):
            if last:
                raise MemoryError("no room")

        return kernel if loop == "strided serial" else strided(rule, form, loop)

    with monkeypatch.context() as patch:
        patch.setattr(numba_cpu, "build", failing)
        with pytest.raises(RuntimeError, match=r"cut short \(MemoryError: no room\)"):
            opt.step(grads)
    with pytest.raises(ValueError, match="cut short"):
        opt.step(grads)
    opt.load_state_dict(saved)
    opt.step(grads)


def test_what_fails_before_the_first_launch_changes_nothing(monkeypatch):
    opt = adam(arrays(0))
    grads = grads_of(opt)
    opt.step(grads)
    build = numba_cpu.build

    def failing(rule, form, loop):
        def kernel(*arguments):
            raise RuntimeError("it does not compile")

        return kernel if loop == "strided serial" else build(rule, form, loop)

    before = everything(opt)
    with monkeypatch.context() as patch:
        patch.setattr(numba_cpu, "build", failing)
        with pytest.raises(RuntimeError, match="it does not compile"):
            opt.step(grads)
    assert same(everything(opt), before)
    opt.step(grads)


def test_a_step_of_another_thread_or_of_a_signals_handler_is_refused():
    opt = adam(arrays(0))
    opt.under_way.begin()
    for refused in (lambda: opt.step(grads_of(opt)), opt.state_dict):
        with pytest.raises(ValueError, match="is under way in another thread"):
            refused()
    opt.under_way.end()
    opt.step(grads_of(opt))


def test_a_step_within_a_step_is_told_so():
    said: list[str] = []

    def rate(step):
        if not said:
            with pytest.raises(ValueError) as refused:
                opt.step(grads)
            said.append(str(refused.value))
        return 0.1

    grads = np.ones(3, "f4")
    opt = gpuadam.Adam(np.zeros(3, "f4"))
    opt.groups[0]["lr"] = rate
    opt.step(grads)
    assert (
        "or around this call, which a function that it calls has made, such as a callable lr" in said[0] and opt.steps == 1
    )


# Two steps at once


def another_thread_steps(opt, grads):
    """Return the error that another thread's step raises."""
    said: list[str] = []

    def step():
        try:
            opt.step(grads)
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    return said


@pytest.mark.parametrize("steps_before", [0, 3], ids=["the long way", "repeated"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"where": "nonzero"}], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_is_refused_while_another_thread_prepares_one(steps_before, options, grouped):
    """Both would take the same step."""
    params = {"a": np.zeros(3, "f4")}, {"b": np.zeros(3, "f4")}
    grads = {"a": np.ones(3, "f4"), "b": np.ones(3, "f4")}
    said, asked = [], []

    def rate(step):  # is asked for amid the preparation
        if not asked:
            asked.append(step)
            said.extend(another_thread_steps(opt, grads))
        return 0.1

    groups = [{"params": p} for p in params] if grouped else [{"params": {**params[0], **params[1]}}]
    groups[-1]["lr"] = 0.1
    opt = gpuadam.Adam(groups, lr=0.1)
    for _ in range(steps_before):
        opt.step(grads, **options)
    opt.groups[-1]["lr"] = rate
    opt.step(grads, **options)
    assert len(said) == 1 and "is under way in another thread" in said[0] and opt.steps == steps_before + 1
    opt.step(grads, **options)
    assert {state["step"] for state in opt.state.values()} == {steps_before + 2}


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"norms": True}, {"where": "nonzero"}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_steps_of_several_threads_are_those_of_one_or_are_refused(options, groups, examples):
    def made():
        params = [{"params": {f"p{k}": np.zeros(1000, "f4")}} for k in range(groups)]
        return gpuadam.Adam(params, lr=0.01)

    def step():
        begin.wait()
        for _ in range(n):
            with contextlib.suppress(ValueError):
                opt.step(grads, **options)
                done.append(1)

    n, begin, done = examples(100, 1000), threading.Barrier(3), []
    grads = {f"p{k}": np.ones(1000, "f4") for k in range(groups)}
    opt, alone = made(), made()
    for _ in range(4):
        opt.step(grads, **options)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=step) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for _ in range(4 + len(done)):
        alone.step(grads, **options)
    assert len(done) > 0 and same(everything(opt), everything(alone))


def test_parameters_do_not_come_or_go_amid_a_step():
    params, said = {"a": np.zeros(3, "f4"), "b": np.zeros(3, "f4")}, []

    def rate(step):
        for change in (lambda: opt.remove("a"), lambda: opt.add("c", np.zeros(3, "f4"))):
            with pytest.raises(ValueError, match="is under way") as refused:
                change()
            said.append(refused)
        return 0.1

    opt = gpuadam.Adam(params)
    opt.groups[0]["lr"] = rate
    opt.step({"a": np.ones(3, "f4"), "b": np.ones(3, "f4")})
    assert len(said) == 2 and list(opt.state) == ["a", "b"]


def test_a_child_that_is_forked_amid_a_step_refuses_the_next_until_its_state_is_set():
    grads = {"a": np.ones(3, "f4")}
    opt = gpuadam.Adam({"a": np.zeros(3, "f4")}, lr=0.1)
    opt.step(grads)
    saved = copy.deepcopy(opt.state_dict())
    opt.under_way.take_turn([])  # as by a thread that the child does not have
    with pytest.raises(ValueError, match="cut short"):
        opt.step(grads)
    opt.load_state_dict(saved)
    opt.step(grads)
    assert opt.steps == 2


def test_a_copy_that_is_made_amid_a_step_can_step():
    grads, copies = {"a": np.ones(3, "f4")}, []
    opt = gpuadam.Adam({"a": np.zeros(3, "f4")})
    opt.groups[0]["lr"] = lambda step: copies.extend([copy.deepcopy(opt), pickle.loads(pickle.dumps(opt.under_way))]) or 0.1
    opt.step(grads)
    copied, under_way = copies[:2]
    copied.groups[0]["lr"] = 0.1
    copied.step(grads)
    assert copied.steps == 1 and not under_way.changing
    under_way.take_turn([])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_a_signal_at_any_moment_leaves_the_turn_where_it_was(examples):
    """Python 3.10 looks for signals where 3.11 does not, as between a call and the name for its result."""
    under_way, ends = UnderWay(), []

    @in_turn
    def act(opt):
        ends.append(1)

    def interrupt(*_):
        raise KeyboardInterrupt

    before, opt = signal.signal(signal.SIGALRM, interrupt), SimpleNamespace(under_way=under_way)
    try:
        for k in range(examples(2_000, 40_000)):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-8 * (k % 3_000))
                while True:
                    act(opt)
            assert under_way.turn == {None}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ends


# State dicts


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_of_the_live_arrays_is_refused_once_they_have_gone_on(name):
    opt = OPTIMIZERS[name](arrays(0))
    opt.step(grads_of(opt))
    taken, copied = opt.state_dict(), copy.deepcopy(opt.state_dict())
    opt.load_state_dict(taken)  # nothing has changed since
    opt.step(grads_of(opt))
    before = everything(opt)
    with pytest.raises(ValueError, match=r"own array.*copy.deepcopy"):
        opt.load_state_dict(taken)
    assert same(everything(opt), before)
    opt.load_state_dict(copied)
    assert {state["step"] for state in opt.state_dict()["state"].values()} == {1}


def test_a_learning_rate_that_cannot_be_written_is_found_before_anything_is():
    lr = np.array([0.1])
    opt = gpuadam.Adam({"w": np.ones(3, "f4")}, lr=lr, capturable=True)
    saved = copy.deepcopy(opt.state_dict())
    opt.step({"w": np.ones(3, "f4")})
    lr.flags.writeable = False
    with unchanged(opt=opt), pytest.raises(ValueError, match="lr is read-only"):
        opt.load_state_dict(saved)
    assert opt.state_dict()["state"]["w"]["step"] == 1


@pytest.mark.parametrize("wrong", [np.zeros(4, "f4"), np.zeros(3), np.zeros((3, 1), "f4")], ids=["size", "dtype", "shape"])
def test_state_that_would_not_load_is_not_saved(wrong, tmp_path):
    opt = gpuadam.Adam({"w": np.ones(3, "f4")})
    opt.save(tmp_path / "a")
    was = (tmp_path / "a").read_bytes()
    opt.state["w"]["m"] = wrong
    with pytest.raises(ValueError, match=r"m of params\['w'\] is .*must be float32 of shape \(3,\)"):
        opt.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == was


def test_an_empty_group_may_have_its_learning_rate_in_an_array():
    groups = [{"params": {"w": np.ones(3, "f4")}}, {"params": {}, "lr": np.array([0.1])}]
    opt = gpuadam.Adam(groups, capturable=True)
    opt.step([{"w": np.ones(3, "f4")}, {}])
    assert opt.state_dict()["groups"][1]["lr"] == 0.1
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_a_count_in_an_array_cannot_be_set_to_where_it_would_overflow():
    opt = gpuadam.Adam({"w": np.ones(3, "f4")}, capturable=True)
    state_dict = copy.deepcopy(opt.state_dict())
    for n in (2**62, 2**63 - 1, 2**64):
        state_dict["state"]["w"]["step"] = n
        with pytest.raises(ValueError, match="int64"):
            opt.load_state_dict(state_dict)
    state_dict["state"]["w"]["step"] = 2**62 - 1
    opt.load_state_dict(state_dict)
    opt.step({"w": np.ones(3, "f4")})
    assert opt.state_dict()["state"]["w"]["step"] == 2**62
