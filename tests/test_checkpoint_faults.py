"""Checkpoints when things go wrong: damaged and hostile files, full disks, and saves that are killed."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from cases import examples, few
from checkpoint_files import sealed, taken_apart
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuadam
from gpuadam.checkpoint import atomic_file
from gpuadam.checkpoint import safetensors as safetensors_file

ROOT = Path(__file__).parent.parent
KILLS = examples(8, 50)


def params():
    return {"w": np.arange(6, dtype="f4").reshape(2, 3), "b": np.ones(5, "f4"), "e": np.zeros(0, "f4")}


def optimizer(**options):
    opt = gpuadam.AdamW(params(), **options)
    for k, state in enumerate(opt.state.values()):
        state["m"][...], state["v"][...] = k + 1, 0.5
    return opt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a checkpoint."""
    path = tmp_path_factory.mktemp("saved") / "a"
    optimizer().save(path, with_params=True)
    return path.read_bytes()


def refused(path, content):
    """Whether a file is refused, and with a CheckpointError; parameters must be as they were then."""
    path.touch()
    with path.open("r+b") as file:  # some file systems flush a file that is made anew in its old place
        file.write(content)
        file.truncate()
    given = params()
    try:
        gpuadam.load(path, given, with_params=True)
    except gpuadam.CheckpointError:
        assert all(given[name].tobytes() == a.tobytes() for name, a in params().items())
        return True
    return False


def test_the_whole_file_is_taken(saved, tmp_path):
    assert not refused(tmp_path / "a", saved)


@pytest.mark.usefixtures("examples")
def test_a_file_cut_off_anywhere_is_refused(saved, tmp_path):
    assert all(refused(tmp_path / "a", saved[:length]) for length in range(0, len(saved), examples(17, 1)))


def test_bytes_too_many_are_refused(saved, tmp_path):
    assert refused(tmp_path / "a", saved + b"\0") and refused(tmp_path / "a", saved + saved)


@pytest.mark.usefixtures("examples")
def test_every_changed_byte_is_noticed(saved, tmp_path):
    rng, start = random.Random(0), time.monotonic()
    every = itertools.chain(range(len(saved)), (rng.randrange(len(saved)) for _ in range(10_000 - len(saved))))
    for at in examples(sorted(rng.sample(range(len(saved)), 500)), every):
        other = bytearray(saved)
        other[at] ^= rng.randrange(1, 256)
        assert refused(tmp_path / "a", bytes(other)), f"byte {at}"
    assert time.monotonic() - start < 120


def test_changed_parameters_are_noticed_before_one_is_overwritten(saved, tmp_path):
    with (tmp_path / "a").open("w+b") as file:
        file.write(saved)
        entry = safetensors_file.Reader(file).tensors["b.param"]
    assert refused(tmp_path / "a", saved[: entry.start] + b"\xff" + saved[entry.start + 1 :])


def with_metadata(header, **changes):
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return header | {"__metadata__": header["__metadata__"] | metadata}


def test_a_header_that_is_sealed_again_is_taken(saved, tmp_path):
    assert not refused(tmp_path / "a", sealed(*taken_apart(saved)))


# What is made of the metadata, which is known as a dict of decoded JSON -> what the error says
WRONG_METADATA = {
    "another format": (lambda m: {"format": "pt"}, "its format is 'pt', .* no optimizer of gpuadam"),
    "a later version": (lambda m: {"version": "2"}, "version is '2'.* use a newer gpuadam"),
    "an unknown class": (lambda m: {"class": "Lion"}, "class is 'Lion'"),
    "an unknown option": (
        lambda m: {"options": m["options"] | {"x": 1}},
        r"options \['x'\], which this gpuadam does not know",
    ),
    "a bad option": (lambda m: {"options": m["options"] | {"seed": "x"}}, "seed must be an integer"),
    "state of another dtype": (
        lambda m: {"options": m["options"] | {"state_dtype": "float64"}},
        "'w.m' is F32, and must be F64",
    ),
    "more state": (lambda m: {"options": m["options"] | {"ema_decay": 0.5}}, r"does not have \['w.ema'"),
    "an unknown hyperparameter": (lambda m: {"groups": [m["groups"][0] | {"x": 1}]}, r"hyperparameters \['x'\]"),
    "betas that are none": (lambda m: {"groups": [m["groups"][0] | {"betas": 5}]}, "betas must be two numbers"),
    "a bad hyperparameter": (lambda m: {"groups": [m["groups"][0] | {"eps": -1}]}, "eps=-1"),
    "a rate that is text": (lambda m: {"groups": [m["groups"][0] | {"lr": "fast"}]}, "lr must be a real number"),
    "an endless rate": (lambda m: {"groups": [m["groups"][0] | {"lr": 10**400}]}, "lr is too large"),
    "groups that are none": (lambda m: {"groups": {}}, "groups in its metadata is not as gpuadam writes it"),
    "a group without names": (lambda m: {"groups": [{"lr": 1}]}, "groups in its metadata is not as gpuadam writes it"),
    "a negative step": (lambda m: {"params": m["params"] | {"w": m["params"]["w"] | {"step": -1}}}, "step of 'w'"),
    "a step of 2^63": (
        lambda m: {
            "params": {name: p | {"step": 1 << 63} for name, p in m["params"].items()},
            "options": m["options"] | {"capturable": True},
        },
        "int64",
    ),
    "a broken step": (lambda m: {"params": m["params"] | {"w": m["params"]["w"] | {"step": 1.5}}}, "must be an integer"),
    "steps that are true": (lambda m: {"steps": True}, "steps must be an integer"),
    "NaN": (lambda m: {"steps": "NaN"}, "NaN is no number of JSON"),
    "no JSON": (lambda m: {"options": "{"}, "options in its metadata cannot be read as JSON"),
    "nested lists": (lambda m: {"copies": "[" * 100_000}, "copies in its metadata"),
    "a checksum less": (lambda m: {"crc32": {}}, "a checksum for each tensor"),
    "a checksum in capitals": (lambda m: {"crc32": m["crc32"] | {"w.m": "AAAAAAAA"}}, "'AAAAAAAA', which is none"),
    "other names in groups": (lambda m: {"groups": [m["groups"][0] | {"names": ["w"]}]}, "must have the same names"),
}


@pytest.mark.parametrize("what", WRONG_METADATA)
def test_wrong_metadata_is_named(what, saved, tmp_path):
    change, match = WRONG_METADATA[what]
    header, payload = taken_apart(saved)
    known = {key: json.loads(header["__metadata__"][key]) for key in ("options", "groups", "params", "crc32")}
    content = sealed(with_metadata(header, **change(known)), payload)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(gpuadam.CheckpointError, match=match):
        gpuadam.load(tmp_path / "a", params())
    assert refused(tmp_path / "a", content)


def with_tensor(header, name, **changes):
    return header | {name: header[name] | changes}


WRONG_HEADERS = {
    "a huge shape": (lambda h: with_tensor(h, "w.m", shape=[1 << 62, 1 << 62]), "'w.m' must have a dtype"),
    "huge offsets": (
        lambda h: with_tensor(h, "w.m", shape=[1 << 40], data_offsets=[0, 1 << 42]),
        "none of 4194304 blocks",
    ),
    "negative sizes": (lambda h: with_tensor(h, "w.m", shape=[-2, -3]), r"has .*\[-2, -3\]"),
    "fractions": (lambda h: with_tensor(h, "w.m", shape=[2.0, 3.0]), r"has .*\[2\.0, 3\.0\]"),
    "overlapping tensors": (
        lambda h: with_tensor(h, "w.m", data_offsets=h["w.v"]["data_offsets"]),
        "the one before ends at",
    ),
    "an unknown dtype": (lambda h: with_tensor(h, "w.m", dtype="F4"), "must have a dtype of F64, .*'F4'"),
    "a list as dtype": (lambda h: with_tensor(h, "w.m", dtype=[]), r"'dtype': \[\]"),
    "an entry that is none": (lambda h: h | {"w.m": 3}, "must have a dtype.*; it has 3"),
    "a thousand dimensions": (lambda h: with_tensor(h, "w.m", shape=[1] * 1000 + [6]), "data_offsets of so many elements"),
    "another shape": (lambda h: with_tensor(h, "w.m", shape=[3, 2]), r"has shape \(3, 2\), and must have \(2, 3\)"),
    "another dtype": (lambda h: with_tensor(h, "w.m", dtype="BF16", shape=[2, 6]), r"has shape \(2, 6\)"),
}


@pytest.mark.parametrize("what", WRONG_HEADERS)
def test_a_wrong_tensor_is_named(what, saved, tmp_path):
    change, match = WRONG_HEADERS[what]
    header, payload = taken_apart(saved)
    (tmp_path / "a").write_bytes(sealed(change(header), payload))
    with pytest.raises(gpuadam.CheckpointError, match=match):
        gpuadam.load(tmp_path / "a", params())


def test_a_name_that_comes_twice_is_refused(saved, tmp_path):
    header, payload = taken_apart(saved)
    text = json.dumps(header, separators=(",", ":"))[len('{"__metadata__":{') : -1]
    twice = text + ',"w.m":' + json.dumps(header["w.m"]) + "}"
    (tmp_path / "a").write_bytes(sealed(twice.encode(), payload))
    with pytest.raises(gpuadam.CheckpointError, match="a key comes twice"):
        gpuadam.load(tmp_path / "a", params())


def test_a_state_too_many_is_refused(saved, tmp_path):
    header, payload = taken_apart(saved)
    crcs = json.loads(header["__metadata__"]["crc32"]) | {"w.max_v": f"{zlib.crc32(bytes(24)):08x}"}
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [len(payload), len(payload) + 24]}
    content = sealed(with_metadata(header, crc32=crcs) | {"w.max_v": entry}, payload + bytes(24))
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(gpuadam.CheckpointError, match=r"\['w.max_v'\], for which this optimizer has no place"):
        gpuadam.load(tmp_path / "a", params())


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.usefixtures("examples")
@settings(max_examples=examples(20, 200), deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_header_gives_another_error(data, saved, tmp_path_factory):
    """Any one value of the header, and of what is JSON in the metadata, is replaced by another, and the header sealed again."""
    header, payload = taken_apart(saved)
    inner = ("options", "groups", "params", "crc32", "steps", "copies")
    tree = {key: json.loads(value) if key in inner else value for key, value in header["__metadata__"].items()}
    tree = {"__metadata__": tree} | {key: value for key, value in header.items() if key != "__metadata__"}
    node, key = None, None
    child = tree
    while isinstance(child, (dict, list)) and child and (node is None or data.draw(st.integers(0, 4))):
        node = child
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        child = node[key]
    if data.draw(st.booleans()) and isinstance(node, dict):
        del node[key]
    else:
        node[key] = data.draw(values)
    metadata = tree.get("__metadata__")
    if isinstance(metadata, dict):
        tree["__metadata__"] = {
            key: json.dumps(value) if key in inner and data.draw(st.integers(0, 9)) else value
            for key, value in metadata.items()
        }
    path = tmp_path_factory.mktemp("header") / "a"
    refused(path, sealed(tree, payload))  # or it is taken, and is a checkpoint of something else


@pytest.mark.usefixtures("examples")
@settings(max_examples=examples(30, 100), deadline=None, derandomize=True, database=None)
@given(content=st.binary(max_size=300), cut=st.integers(0, 60))
def test_no_bytes_give_another_error(content, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "a"
    assert refused(path, content)
    assert refused(path, sealed(content))
    assert refused(path, len(content).to_bytes(8, "little") + content)
    assert refused(path, sealed(content)[:-cut] if cut else b"")


HOSTILE = {
    "empty lists": lambda header, payload: sealed(b'"a":"b"},"x":[' + b"[]," * 600_000 + b"[]]}"),
    "empty groups": lambda header, payload: sealed(with_metadata(header, groups="[" + "{}," * 600_000 + "{}]"), payload),
    "a long list": lambda header, payload: sealed(with_metadata(header, copies=[""] * 400_000), payload),
    "a header of 90 MB": lambda header, payload: (90_000_000).to_bytes(8, "little"),
    "a header of 4 EB": lambda header, payload: (1 << 62).to_bytes(8, "little"),
}


@pytest.mark.parametrize("what", few(HOSTILE, next(iter(HOSTILE))))
def test_a_hostile_header_takes_little_memory(what, saved, tmp_path):
    content = HOSTILE[what](*taken_apart(saved))
    with (tmp_path / "a").open("wb") as file:
        file.write(content)
        if what == "a header of 90 MB":
            file.truncate(100_000_000)
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(gpuadam.CheckpointError):
            gpuadam.load(tmp_path / "a", params())
        assert tracemalloc.get_traced_memory()[1] < len(content) + 64e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 60


def test_nothing_is_unpickled(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    assert refused(tmp_path / "a", pickle.dumps(Harm())) and not (tmp_path / "harm").exists()


def test_no_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        gpuadam.load(tmp_path / "a", params())
    with pytest.raises(gpuadam.CheckpointError, match=r"without index\.safetensors: no checkpoint was ever finished there"):
        gpuadam.load(tmp_path, params())


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gpuadam.CheckpointError, match="a device, a pipe or a socket"):
        gpuadam.load(tmp_path / "pipe", params())


# Saving


class FullDisk:
    """A file on a disk with room for some bytes."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def fdopen_on(room, error, opened):
    def fdopen(*arguments):
        return FullDisk(opened(*arguments), room, error)

    return fdopen


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_full_disk_leaves_the_old_file(room, saved, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(saved)
    monkeypatch.setattr(atomic_file.os, "fdopen", fdopen_on(room, errno.ENOSPC, os.fdopen))
    with pytest.raises(gpuadam.CheckpointError) as raised:
        optimizer(ema_decay=0.5).save(tmp_path / "a")
    monkeypatch.undo()
    optimizer(ema_decay=0.5).save(tmp_path / "other")
    with (tmp_path / "other").open("rb") as file:
        needed = sum(entry.end - entry.start for entry in safetensors_file.Reader(file).tensors.values())
    for part in (
        str(tmp_path / "a"),
        "No space left",
        f"Make room for more than {needed:,} bytes",
        "Nothing there has changed",
    ):
        assert part in str(raised.value)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "other"] and (tmp_path / "a").read_bytes() == saved


def test_a_limit_of_the_system_leaves_the_old_file(saved, tmp_path):
    (tmp_path / "a").write_bytes(saved)
    code = f"""
    import gpuadam, numpy as np, resource
    opt = gpuadam.Adam(np.ones(1 << 20, "f4"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        opt.save({str(tmp_path / "a")!r})
    except gpuadam.CheckpointError as error:
        print(error)
    """
    assert "was not saved: File too large. Nothing there has changed. Make room for more than 8,388,608 bytes" in printed(
        code
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == saved


def printed(code):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(number, tmp_path, monkeypatch):
    opened = os.open

    def refuses(path, flags, *mode):  # root may write anywhere, so permissions cannot show it
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(atomic_file.os, "open", refuses)
    with pytest.raises(
        gpuadam.CheckpointError, match=r"/a' was not saved: .*Save into a folder that can be read and written"
    ):
        optimizer().save(tmp_path / "a")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(gpuadam.CheckpointError, match=r"No such file or directory\. .* Make its folder first"):
        optimizer().save(tmp_path / "folder" / "a")


def test_only_files_are_replaced(tmp_path):
    with pytest.raises(gpuadam.CheckpointError, match=r"it is a folder, .* Give the path of a file"):
        optimizer().save(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gpuadam.CheckpointError, match="a device, a pipe or a socket"):
        optimizer().save(tmp_path / "pipe")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_error_at_the_end_leaves_the_old_file(call, error, saved, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(saved)

    def fails(*arguments):
        raise error

    monkeypatch.setattr(*((atomic_file.os, "fsync") if call == "fsync" else (Path, "replace")), fails)
    with pytest.raises((gpuadam.CheckpointError, KeyboardInterrupt)):
        optimizer(ema_decay=0.5).save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == saved


def test_file_and_folder_are_flushed_around_the_renaming(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(atomic_file.os, "fsync", lambda n: calls.append(Path(f"/proc/self/fd/{n}").resolve()) or fsync(n))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append("renamed") or replace(path, to))
    optimizer().save(tmp_path / "a")
    assert calls[0].name.endswith(".tmp") and calls[1:] == ["renamed", tmp_path.resolve()]


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def flush(n):
        if Path(f"/proc/self/fd/{n}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(n)

    monkeypatch.setattr(atomic_file.os, "fsync", flush)
    optimizer().save(tmp_path / "a")
    gpuadam.load(tmp_path / "a", params())


@pytest.mark.exhaustive
def test_the_checksums_of_a_large_file_are_no_header_too_long(tmp_path, monkeypatch):
    """They are more than 2 MB in a file of 250 GB; here their blocks are smaller."""
    monkeypatch.setattr(safetensors_file, "BLOCK", 256)
    opt = gpuadam.Adam(np.zeros(9_000_000, "f4"))
    opt.state["0"]["v"][-1] = 3
    opt.save(tmp_path / "a")
    assert gpuadam.load(tmp_path / "a", np.zeros(9_000_000, "f4")).state["0"]["v"][-1] == 3


def test_a_failed_load_takes_no_file_descriptor(saved, tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for length in range(0, len(saved), 100):
        assert refused(tmp_path / "a", saved[:length])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_big_endian_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file.sys, "byteorder", "big")
    with pytest.raises(gpuadam.CheckpointError, match="little-endian"):
        optimizer().save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


SAVES = """
import itertools, os, sys, gpuadam, numpy as np
opt = gpuadam.Adam({name: np.zeros(1 << 17, "f4") for name in ("a", "b", "c")})
for _ in sys.stdin:  # each line asks for a process that saves until it is killed
    pid = os.fork()
    if pid == 0:
        for k in itertools.count(1):
            for state in opt.state.values():
                state["step"] = k
                state["m"][:] = state["v"][:] = k
            opt.steps = k
            opt.save(sys.argv[1])
            os.write(1, b"%d\\n" % k)
    print("pid", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@pytest.mark.usefixtures("examples")
def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path):
    """3 MB are saved over and over in another process, which is killed at random, KILLS times."""
    rng, path, within = random.Random(0), tmp_path / "a", 0
    command, env = [sys.executable, "-c", SAVES, str(path)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        for _ in range(KILLS):
            process.stdin.write("save\n")
            lines = {process.stdout.readline().strip() for _ in range(2)}  # the pid and the first save, in any order
            (pid,) = (int(line[4:]) for line in lines if line.startswith("pid"))
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            counts = [1, *map(int, itertools.takewhile(lambda line: line != "dead\n", process.stdout))]
            opt = gpuadam.load(path, {name: np.zeros(1 << 17, "f4") for name in ("a", "b", "c")})
            assert opt.steps in (counts[-1], counts[-1] + 1)
            for state in opt.state.values():
                assert state["step"] == opt.steps and (state["m"] == opt.steps).all() and (state["v"] == opt.steps).all()
            left_over = list(tmp_path.glob(".gpuadam-*.tmp"))
            within += len(left_over)
            for temporary in left_over:
                temporary.unlink()
        process.stdin.close()
    assert within > KILLS // 4  # most of the time is spent within a save, before the renaming
