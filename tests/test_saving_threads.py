"""Saving while another thread takes steps: each save is of one step, or is refused and leaves the file that was there."""

import contextlib
import random
import sys
import threading
import time

import numpy as np
import pytest
from cases import few

import gpuadam
from gpuadam import CheckpointError, transports
from gpuadam.checkpoint import saving
from gpuadam.offload import runner

SHAPES = {f"p{k}": (40_000 + k,) for k in range(6)}


def arrays(value):
    return {name: np.full(shape, value, "f4") for name, shape in SHAPES.items()}


def ones():
    return np.ones(1000, "f4")


@contextlib.contextmanager
def stepping(step):
    """Call step() in another thread, with short pauses after most calls, until the block ends."""
    stopped, errors, rng = threading.Event(), [], random.Random(0)

    def run():
        try:
            while not stopped.is_set():
                step()
                time.sleep(rng.choice((0, 0.001, 0.02)))
        except Exception as error:  # noqa: BLE001 - of any kind: it is raised below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors, errors


def adam(transport=None, **options):
    params = arrays(0.5)
    return params, gpuadam.Adam(params, lr=0.25, **options)


def sharded():
    params = arrays(0.5)
    return params, gpuadam.ShardedAdam(params, transports.Local(), lr=0.25, bucket_bytes=100_000)


MAKERS = {
    "Adam": adam,
    "capturable": lambda: adam(capturable=True),
    "8 bits": lambda: adam(state_dtype="8bit"),
    "ShardedAdam": sharded,
}


def moments(opt):
    return {(name, key): state[key].tobytes() for name, state in opt.state.items() for key in state if key != "step"}


@pytest.mark.parametrize("what", few(MAKERS, *list(MAKERS)[::2]))
def test_a_save_while_another_thread_steps_is_whole_or_refused(what, tmp_path, examples):
    saves = examples(15, 60)
    grads, path, saved, refused = arrays(1.0), tmp_path / "a", 0, 0
    _, opt = MAKERS[what]()
    opt.step(grads)
    opt.save(path)
    loaded, last = [], 1
    with stepping(lambda: opt.step(grads)):
        for k in range(saves):
            try:
                opt.save(path)
                saved += 1
            except CheckpointError as error:
                assert "save between steps" in str(error), error
                refused += 1
            except ValueError as error:  # a step is under way
                assert "step" in str(error), error
                refused += 1
            loaded.append(gpuadam.load(path, arrays(0.5)))  # never a file that cannot be loaded
            time.sleep(0.01 * (k % 3))
    assert saved + refused == saves
    assert refused == 0 or what != "ShardedAdam"  # whose saves and steps wait for one another
    at, (_, alone) = {}, MAKERS["Adam" if what == "ShardedAdam" else what]()
    for opt in loaded:
        assert opt.steps >= last
        last = opt.steps
        while alone.steps < opt.steps:
            alone.step(grads)
            at = moments(alone)
        assert {state["step"] if what != "capturable" else state["step"][0] for state in opt.state.values()} == {opt.steps}
        assert not at or moments(opt) == at
    print(f"{what}: {saved} saved, {refused} refused, {last} steps")


def interrupted_by(monkeypatch, act):
    """Let something happen once, in the middle of the next save."""
    real = saving.write

    def write(*arguments):
        monkeypatch.setattr(saving, "write", real)
        act()
        return real(*arguments)

    monkeypatch.setattr(saving, "write", write)


@pytest.mark.parametrize("capturable", [False, True])
def test_whatever_changes_the_state_amid_a_save_is_noticed_and_the_old_file_stays(capturable, tmp_path, monkeypatch):
    grads, path = ones(), tmp_path / "a"
    opt = gpuadam.Adam(ones(), capturable=capturable)
    opt.save(path)
    before, start = path.read_bytes(), gpuadam.Adam(ones(), capturable=capturable).state_dict()

    def replayed():  # a graph takes a step without a call
        opt.state["0"]["step"] += 1

    for act in (lambda: opt.step(grads), lambda: opt.load_state_dict(start), replayed):
        interrupted_by(monkeypatch, act)
        with pytest.raises(
            CheckpointError, match=r"a' was not saved: a step was under way, or was taken.*save between steps"
        ):
            opt.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == before
        opt.state["0"]["step"] *= 1
    opt.save(path)
    assert path.read_bytes() != before


def test_a_step_that_fails_or_that_is_left_out_is_no_step_under_way(tmp_path):
    opt = gpuadam.Adam(ones())
    with pytest.raises(ValueError, match="shape"):
        opt.step(np.ones(3, "f4"))
    opt.step(ones(), found_inf=True)
    opt.save(tmp_path / "a")


@pytest.mark.exhaustive
def test_parameters_that_change_while_they_are_saved_leave_a_file_that_loads(tmp_path):
    param = np.zeros(3_000_000, "f4")
    opt, grad = gpuadam.Adam(param), np.ones_like(param)

    def change():
        param[...] = np.random.default_rng(0).random(param.size, "f4")

    opt.step(grad)
    with stepping(change):
        for _ in range(10):
            opt.save(tmp_path / "a", with_params=True)
            gpuadam.load(tmp_path / "a", grad, with_params=True)


def test_a_flush_amid_a_step_is_refused_and_the_folder_says_that_it_is_under_way(tmp_path, monkeypatch):
    params = ones()
    opt, began, go_on = gpuadam.OffloadAdam(params, state=tmp_path), threading.Event(), threading.Event()
    opt.step(ones())
    update = runner.Runner.update

    def waits(*arguments):
        began.set()
        assert go_on.wait(60)
        update(*arguments)

    monkeypatch.setattr(runner.Runner, "update", waits)
    with stepping(lambda: None if began.is_set() else opt.step(ones())):
        assert began.wait(60)
        before = (tmp_path / "steps.json").read_text()
        with pytest.raises(ValueError, match="is under way, or was cut short: flush between steps"):
            opt.flush()
        assert (tmp_path / "steps.json").read_text() == before and '"under_way": true' in before
        go_on.set()
    opt.flush()
    opt.close()
    with gpuadam.OffloadAdam(params, state=tmp_path) as again:
        assert again.steps == 2


def test_flushes_beside_steps_leave_a_folder_that_goes_on(tmp_path, examples):
    saves = examples(15, 60)
    params, refused = arrays(0.5), 0
    opt = gpuadam.OffloadAdam(params, state=tmp_path)
    with stepping(lambda: opt.step(arrays(1.0))):
        for k in range(saves):
            try:
                opt.flush()
            except ValueError as error:
                assert "flush between steps" in str(error)
                refused += 1
            time.sleep(0.003 * (k % 3))
    wanted = opt.steps, {name: state["m"].tobytes() for name, state in opt.state.items()}
    opt.close()
    with gpuadam.OffloadAdam(params, state=tmp_path) as again:
        assert (again.steps, {name: state["m"].tobytes() for name, state in again.state.items()}) == wanted


def test_a_folder_that_is_closed_amid_a_step_is_not_marked_as_whole(tmp_path, monkeypatch):
    opt = gpuadam.OffloadAdam(ones(), state=tmp_path)
    update = runner.Runner.update

    def closes(*arguments):
        opt.close()
        update(*arguments)

    monkeypatch.setattr(runner.Runner, "update", closes)
    with pytest.raises(ValueError, match="is closed"):
        opt.step(ones())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cut short"):
        gpuadam.OffloadAdam(ones(), state=tmp_path)
