"""What is not a regular file, in the place of one that is read or written: it is refused at once, and is as it was afterwards."""

import contextlib
import errno
import faulthandler
import gc
import os
import shutil
import socket
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import gpuadam
from gpuadam import transports
from gpuadam.checkpoint import atomic_file, regular_file
from gpuadam.sharded import saving as sharded_saving

ROOT = Path(__file__).parent.parent
LOCAL = transports.Local()
ERRORS = (gpuadam.CheckpointError, ValueError, OSError)
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


@pytest.fixture(autouse=True)
def _no_wait():
    """End the process if a test waits for a pipe: no other thread can do so much as raise an error then."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def params():
    return {"w": np.arange(6, dtype="f4"), "b": np.ones(5, "f4")}


def adam(path):
    gpuadam.Adam(params()).save(path, with_params=True)


def sharded(path):
    opt = gpuadam.ShardedAdam(params(), transports.Local())
    opt.step(params())
    opt.save(path, with_params=True)


def offload(path):
    with gpuadam.OffloadAdam(params(), state=path) as opt:
        opt.step(params())


def load(path):
    return gpuadam.load(path, params(), with_params=True)


def load_sharded(path):
    return gpuadam.load_sharded(path, params(), LOCAL, with_params=True)


OTHERS = {
    "a pipe": lambda path, target: os.mkfifo(path),
    "a socket": lambda path, target: _socket(path),
    "a folder": lambda path, target: path.mkdir(),
    "a link to a device": lambda path, target: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path, target: (os.mkfifo(target), path.symlink_to(target)),
    "a link to nothing": lambda path, target: path.symlink_to(target),
    "a link to itself": lambda path, target: path.symlink_to(path),
    "a link to a file": lambda path, target: (target.write_bytes(b"another's"), path.symlink_to(target)),
}


def _socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has 107 characters at most
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def facts(path):
    """Return what a test finds unchanged: kinds and targets of all that is in a folder, and what its regular files hold."""
    found = {}
    for entry in sorted(path.rglob("*")):
        mode = entry.lstat().st_mode
        content = entry.read_bytes() if stat.S_ISREG(mode) else str(entry.readlink()) if stat.S_ISLNK(mode) else None
        found[str(entry.relative_to(path))] = stat.S_IFMT(mode), content
    return found


# what makes the files, and the files of which another is put in the place, by the beginnings of their names
MADE = {
    "sharded": (sharded, ("index", "part", ".gpuadam-lock")),
    "offload": (offload, ("state.json", "steps.json", "lock", "m")),
}
PLACES = [(maker, name) for maker, (_, names) in MADE.items() for name in names]
CALLS = {"sharded": (load, load_sharded, sharded), "offload": (offload,)}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("maker, name", PLACES)
def test_what_is_in_the_place_of_our_own_file_is_not_followed(maker, name, what, tmp_path):
    folder = tmp_path / "folder"
    MADE[maker][0](folder)
    (path,) = (file for file in folder.iterdir() if file.name.startswith(name))
    path.unlink()
    OTHERS[what](path, tmp_path / "target")
    before = facts(tmp_path)
    for call in CALLS[maker]:
        reads_only = call in (load, load_sharded)
        if (reads_only and name == ".gpuadam-lock") or (call is sharded and name == "part"):
            continue  # what is not read, and what is another part's place
        with pytest.raises(ERRORS):
            call(folder)
        assert facts(tmp_path) == before


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["steps.json", "lock", "m", "v"])
def test_what_is_in_the_place_of_state_that_is_not_made_yet_is_left_alone(name, what, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "lock").touch()  # as a process leaves it that was killed while it made the files
    (folder / name).unlink(missing_ok=True)
    OTHERS[what](folder / name, tmp_path / "target")
    before = facts(tmp_path)
    with pytest.raises(ERRORS, match="a folder of its own for the state"):
        offload(folder)
    assert facts(tmp_path) == before


@pytest.mark.parametrize(
    "what", [what for what in OTHERS if what not in ("a folder", "a link to nothing", "a link to a file")]
)
def test_a_path_of_the_callers_is_refused_unless_it_is_a_file_or_a_link_to_one(what, tmp_path):
    OTHERS[what](tmp_path / "a", tmp_path / "target")
    before = facts(tmp_path)
    for call in (adam, load, load_sharded, sharded, offload):
        with pytest.raises(ERRORS):
            call(tmp_path / "a")
        assert facts(tmp_path) == before


def test_a_link_to_a_file_or_a_folder_is_loaded_and_saved_through(tmp_path):
    """So is a folder whose files are links, as the caches of downloads have them; but nothing is saved through such a file."""
    for make, name in ((adam, "file"), (sharded, "folder"), (offload, "state")):
        make(tmp_path / name)
        (tmp_path / f"to {name}").symlink_to(name)
        make(tmp_path / f"to {name}")
    assert load(tmp_path / "to file").steps == 0
    assert load(tmp_path / "to folder").steps == load_sharded(tmp_path / "to folder").steps == 1
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "folder").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert load(tmp_path / "links").steps == load_sharded(tmp_path / "links").steps == 1
    before = facts(tmp_path)
    with pytest.raises(gpuadam.CheckpointError, match="must be a regular file"):
        sharded(tmp_path / "links")
    assert facts(tmp_path) == before


def test_the_mark_of_a_step_replaces_nothing_but_itself(tmp_path):
    """A file beside steps.json, as older versions wrote it, was followed."""
    folder, target = tmp_path / "folder", tmp_path / "target"
    target.write_text("another's")
    with gpuadam.OffloadAdam(params(), state=folder) as opt:
        (folder / "steps.new").symlink_to(target)
        opt.step(params())
        (folder / "steps.json").unlink()
        (folder / "steps.json").symlink_to(target)
        with pytest.raises(FileExistsError, match="must be a regular file"):
            opt.step(params())
        (folder / "steps.json").unlink()
    assert target.read_text() == "another's"


# Modes


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666, 0o755])
def test_a_file_that_is_there_keeps_its_mode(mode, tmp_path):
    adam(tmp_path / "a")
    (tmp_path / "a").chmod(mode)
    sharded(tmp_path / "folder")
    (tmp_path / "folder" / "index.safetensors").chmod(mode)
    seen, chosen = [], atomic_file.opened

    def looks(path, flags, its_mode):
        file = chosen(path, flags, its_mode)
        seen.append(stat.S_IMODE(path.stat().st_mode))
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_file, "opened", looks)
        adam(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert not seen[0] & ~mode  # nor was it open to others while it was written
    sharded(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "folder" / "index.safetensors").stat().st_mode) == mode


# Locks


def test_a_lock_is_of_one_at_a_time_and_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    file = regular_file.locked(tmp_path / "a")
    with pytest.raises(BlockingIOError):
        regular_file.locked(tmp_path / "a")
    regular_file.unlock(file)
    regular_file.unlock(regular_file.locked(tmp_path / "a"))

    def has_none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", has_none)
    with pytest.warns(RuntimeWarning, match="No locks available.*a folder of its own"):
        sharded(tmp_path / "folder")
    assert load(tmp_path / "folder").steps == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the file, which is not closed
def test_a_lock_that_an_interrupted_call_has_left_is_no_lock(tmp_path):
    """The call's frames hold the file, and one another."""
    gc.disable()
    try:
        frame = types.SimpleNamespace(file=regular_file.locked(tmp_path / "a"))
        frame.itself = frame
        del frame
        regular_file.unlock(regular_file.locked(tmp_path / "a"))
    finally:
        gc.enable()


def test_the_lock_of_a_file_that_was_deleted_meanwhile_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, path = fcntl.flock, tmp_path / "a"

    def deleted_before(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # as the process does that had the lock
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", deleted_before)
    file = regular_file.locked(path)
    with pytest.raises(BlockingIOError):
        regular_file.locked(path)
    regular_file.unlock(file)


def test_a_folder_into_which_another_job_saves_is_refused_and_left_alone(tmp_path):
    sharded(tmp_path)
    before = facts(tmp_path)
    file = regular_file.locked(tmp_path / sharded_saving.LOCK)
    with pytest.raises(gpuadam.CheckpointError, match=r"another job is saving into it\. Nothing there has changed"):
        sharded(tmp_path)
    assert facts(tmp_path) == before
    regular_file.unlock(file)
    sharded(tmp_path)


@pytest.mark.parametrize("moment", ["part", "index"])
def test_a_save_amid_that_of_another_job_is_refused_and_the_other_is_whole(moment, tmp_path, monkeypatch):
    write_file, refused = sharded_saving.write_file, []

    def another_saves(path, *arguments, **options):
        done = write_file(path, *arguments, **options) if moment == "part" else None
        if moment in path and not refused:
            refused.append(True)
            with pytest.raises(gpuadam.CheckpointError, match="another job is saving into it"):
                sharded(tmp_path / "folder")
        return done or write_file(path, *arguments, **options)

    monkeypatch.setattr(sharded_saving, "write_file", another_saves)
    sharded(tmp_path / "folder")
    assert refused and load(tmp_path / "folder").steps == 1


@pytest.mark.parametrize("error", [gpuadam.CheckpointError("full"), KeyboardInterrupt(), None])
def test_a_folder_is_free_when_a_save_has_ended_or_failed(error, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    if error:
        monkeypatch.setattr(sharded_saving, "write_file", fails)
    with pytest.raises(type(error)) if error else pytest.MonkeyPatch.context():
        sharded(tmp_path)
    regular_file.unlock(regular_file.locked(tmp_path / sharded_saving.LOCK))


JOB = """
import sys, gpuadam, numpy as np
opt = gpuadam.ShardedAdam({name: np.ones(200_000, "f4") for name in "ab"}, gpuadam.transports.Local())
print("ready", flush=True)
for line in sys.stdin:  # each line is the path of a folder to save into
    refused = 0
    for _ in range(3):
        try:
            opt.save(line.strip(), with_params=True)
        except gpuadam.CheckpointError as error:
            if "another job is saving into it" not in str(error):
                raise
            refused += 1
    print(refused, flush=True)
"""


@pytest.mark.exhaustive
def test_two_jobs_that_save_into_one_folder_leave_a_checkpoint(tmp_path, examples):
    """Each saves three times, at the same time as the other, whose parts are not to be taken for the rest of a killed save."""
    refused, env = 0, os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with contextlib.ExitStack() as until_ended:
        jobs = [until_ended.enter_context(subprocess.Popen([sys.executable, "-c", JOB], env=env, **pipes)) for _ in range(2)]
        assert [job.stdout.readline() for job in jobs] == ["ready\n"] * 2
        for number in range(examples(10, 100)):
            folder = tmp_path / str(number)
            for job in jobs:
                job.stdin.write(f"{folder}\n")
            refused += sum(int(job.stdout.readline()) for job in jobs)  # of saves that began amid the other's
            assert gpuadam.load(folder, {name: np.zeros(200_000, "f4") for name in "ab"}, with_params=True).steps == 0
            assert len(list(folder.iterdir())) == 3  # the lock, the index and its part
            shutil.rmtree(folder)
        for job in jobs:
            job.stdin.close()
    assert refused
