"""Checkpoints of many ranks: any number of them loads what another number saved, and nothing damaged or half written is taken.

Ranks are threads here. With MPI: `test_sharded_mpi.py`; killed amid a save: `test_sharded_ends.py`.
"""

import errno
import json
import os
import random
import tracemalloc
import zlib
from pathlib import Path

import libraries
import numpy as np
import pytest
from cases import few
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam import CheckpointError, transports
from gpuadam.checkpoint import atomic_file, tensors
from gpuadam.checkpoint import safetensors as safetensors_file
from gpuadam.checkpoint import stored as stored_arrays
from gpuadam.kernels import cpu_threads
from gpuadam.sharded import loading as sharded_loading
from gpuadam.sharded import saving as sharded_saving

SHAPES = {"large": (3, 9000), "empty": (0, 2), "scalar": (), "small": (37,), "cells": (8192,)}
LOCAL = transports.Local()

pytestmark = pytest.mark.filterwarnings("ignore:.* has parameters, which are not loaded")  # most ask for state alone


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 1)  # ranks are threads already


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), "f4") for name, shape in SHAPES.items()}


def optimizer(transport, given=None, seed=0, make=gpuadam.ShardedAdamW, **options):
    """Return an optimizer after one step in which one parameter was left out."""
    given = params() if given is None else given
    opt = make(given, transport, lr=0.25, bucket_bytes=40_000, reduction="sum", **options)
    opt.step({name: None if name == "small" else np.full(p.shape, seed + 1, "f4") for name, p in given.items()})
    return opt


def saved_by(n, folder, *, with_params=True, **options):
    """Save a checkpoint from n ranks. Return the parameters then."""

    def of_rank(transport):
        given = params()
        optimizer(transport, given, **options).save(folder, with_params=with_params)
        return given

    return all_well(on_ranks(n, of_rank))[0]


def content(opt):
    """Every bit and count of an Adam; of a ShardedAdam what all ranks have of it."""
    if not isinstance(opt, gpuadam.ShardedAdam):
        whole = {(name, key): state[key] for name, state in opt.state.items() for key in state if key != "step"}
        steps = {name: state["step"] for name, state in opt.state.items()}
    else:
        keys = ("m", "v", "m_scale", "v_scale", "ema", "max_v")
        whole = {(name, key): array for key in keys for name, array in opt.gathered(key).items()}
        steps = {member.name: member.taken for member in opt.members}
        assert all(shard.state["step"] == steps[shard.name] for shard in opt.shards)
    arrays = {of: array.tobytes() for of, array in whole.items() if array.size}
    settings = [{key: value for key, value in group.items() if key != "params"} for group in opt.groups]
    return opt.steps, steps, arrays, settings, opt.options


@pytest.fixture(scope="module")
def by_four(tmp_path_factory):
    """A checkpoint of four ranks: its folder, and what is in its files."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu_threads, "n_threads", lambda: 1)
    folder = tmp_path_factory.mktemp("saved") / "a"
    saved_by(4, folder)
    patch.undo()
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(by_four, tmp_path):
    """A copy of that checkpoint."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    for name, found in by_four[1].items():
        (path / name).write_bytes(found)
    return path


def test_ranks_take_names_in_another_order(folder):
    def of_rank(transport):
        return content(gpuadam.load_sharded(folder, dict(reversed(params().items())), transport))

    _, steps, arrays, settings, _ = all_well(on_ranks(2, of_rank))[0]
    alone = content(gpuadam.load(folder, params()))
    assert (steps, arrays) == alone[1:3] and settings[0]["names"] == alone[3][0]["names"][::-1]


def parts_of(folder):
    return sorted(path for path in folder.iterdir() if path.name not in (stored_arrays.INDEX, sharded_saving.LOCK))


def refused(folder, match=""):
    """Whether one optimizer and two ranks refuse a checkpoint with a CheckpointError, and the parameters are as they were."""
    given = params(seed=5)
    errors = []
    try:
        gpuadam.load(folder, given, with_params=True)
    except CheckpointError as error:
        errors.append(error)
    assert all((given[name] == p).all() for name, p in params(seed=5).items())
    errors += on_ranks(2, lambda t: gpuadam.load_sharded(folder, params(seed=5), t, with_params=True))
    assert all(type(error) is CheckpointError and match in str(error) for error in errors), errors
    return len(errors) == 3


# What is loaded


OPTIONS = {
    "float32": {},
    "8 bits": {"state_dtype": "8bit", "seed": 9},
    "a running mean, amsgrad": {"ema_decay": 0.5, "amsgrad": True},
    "nadam": {"make": gpuadam.ShardedAdam, "algorithm": "nadam", "decoupled": False},
}


@pytest.mark.in_short()
@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("n, to", [(1, 3), (3, 1), (2, 5), (5, 2)])
def test_everything_comes_back(what, n, to, tmp_path):
    def saves(transport):
        opt = optimizer(transport, **OPTIONS[what])
        opt.save(tmp_path / "a", with_params=True)
        return content(opt), opt.params

    def loads(transport):
        given = params(seed=1)
        opt = gpuadam.load_sharded(tmp_path / "a", given, transport, with_params=True, bucket_bytes=20_000)
        return content(opt), given

    (wanted, of_params), *_ = all_well(on_ranks(n, saves))
    for found, given in all_well(on_ranks(to, loads)):
        assert found == wanted
        assert all((given[name] == p).all() for name, p in of_params.items())
    alone = gpuadam.load(tmp_path / "a", given := params(seed=1), with_params=True)
    assert content(alone)[:4] == wanted[:4] and alone.options == wanted[4]
    assert all((given[name] == p).all() for name, p in of_params.items())


@pytest.mark.parametrize("chance", few(range(12), 0, 1, 2))
def test_any_shapes_and_buckets_come_back(chance, tmp_path):
    """Shapes, buckets, ranks and blocks of checksums at random."""
    rng = random.Random(chance)
    shapes = [rng.choice([0, 1, 31, 4095, 4096, rng.randrange(50_000)]) for _ in range(rng.randrange(1, 9))]
    n, to = rng.randrange(1, 7), rng.randrange(1, 7)
    buckets = [rng.randrange(200_000) for _ in range(2)]
    state_dtype = rng.choice([None, "8bit", "bfloat16"])

    def of(seed):
        return [np.random.default_rng([seed, k]).standard_normal(shape).astype("f4") for k, shape in enumerate(shapes)]

    def saves(transport):
        opt = gpuadam.ShardedAdam(of(0), transport, bucket_bytes=buckets[0], state_dtype=state_dtype)
        opt.step(of(1))
        opt.save(tmp_path / "a")
        return content(opt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "BLOCK", rng.choice([512, 5000, 1 << 20]))
        wanted = all_well(on_ranks(n, saves))[0]
        loaded = on_ranks(to, lambda t: content(gpuadam.load_sharded(tmp_path / "a", of(2), t, bucket_bytes=buckets[1])))
        assert all_well(loaded) == [wanted] * to
        assert content(gpuadam.load(tmp_path / "a", of(2)))[:4] == wanted[:4]


def test_what_adam_saved_is_loaded_by_many_ranks(tmp_path):
    given = params()
    opt = gpuadam.AdamW(given, lr=0.25, weight_decay=0.5, capturable=True, param_copies=params())
    opt.step({name: np.ones(p.shape, "f4") for name, p in given.items()})
    opt.save(tmp_path / "a", with_params=True)
    found = all_well(
        on_ranks(3, lambda t: gpuadam.load_sharded(tmp_path / "a", params(seed=1), t, with_params=True, lr=0.5))
    )
    for of_rank in found:
        assert type(of_rank) is gpuadam.ShardedAdamW and of_rank.steps == 1 and of_rank.groups[0]["lr"] == 0.5
        assert all((of_rank.params[name] == p).all() for name, p in given.items())
    wanted = {name: state["m"] for name, state in opt.state.items()}
    sharded = [{(s.name, s.start, s.stop): s.state["m"] for s in of_rank.shards} for of_rank in found]
    for (name, start, stop), m in [item for of_rank in sharded for item in of_rank.items()]:
        assert (m == wanted[name].reshape(-1)[start:stop]).all()


def test_parameters_stay_as_they_are_unless_asked_for(folder):
    given = params(seed=1)
    gpuadam.load_sharded(folder, given, LOCAL)
    gpuadam.load(folder, given)
    assert all((given[name] == p).all() for name, p in params(seed=1).items())


def test_the_index_may_be_given_for_its_folder(folder):
    assert content(gpuadam.load(folder / "index.safetensors", params())) == content(gpuadam.load(folder, params()))


def test_parameters_that_the_caller_changed_are_saved_as_they_are_now(tmp_path):
    def saves(transport):
        given = params()
        opt = optimizer(transport, given)
        given["large"][...] = 7
        opt.save(tmp_path / "a", with_params=True)

    all_well(on_ranks(2, saves))
    gpuadam.load(tmp_path / "a", given := params(), with_params=True)
    assert (given["large"] == 7).all()


def test_groups_and_schedules(tmp_path):
    def groups():
        p = params()
        rest = {name: p[name] for name in p if name != "large"}
        return [{"params": {"large": p["large"]}, "weight_decay": 0.5}, {"params": rest, "lr": 0.125}]

    def saves(transport):
        gpuadam.ShardedAdam(groups(), transport, lr=lambda step: 1 / step).save(tmp_path / "a")

    all_well(on_ranks(2, saves))
    with pytest.raises(CheckpointError, match="the learning rate of group 0 was a callable"):
        gpuadam.load_sharded(tmp_path / "a", groups(), LOCAL)
    opt = gpuadam.load_sharded(tmp_path / "a", groups(), LOCAL, lr=[0.75, None])
    assert [g["lr"] for g in opt.groups] == [0.75, 0.125] and [g["weight_decay"] for g in opt.groups] == [0.5, 0.0]


def test_reduction_is_kept_unless_another_is_given(folder):
    assert gpuadam.load_sharded(folder, params(), LOCAL).reduction == "sum"
    assert gpuadam.load_sharded(folder, params(), LOCAL, reduction="mean").reduction == "mean"


def test_views_are_what_the_parameters_become(folder):
    given = params(seed=1)
    opt = gpuadam.load_sharded(folder, given, LOCAL, with_params=True, views=True)
    gpuadam.load(folder, wanted := params(), with_params=True)
    assert all((opt.params[name] == p).all() for name, p in wanted.items())
    assert all((given[name] == p).all() for name, p in params(seed=1).items())


def test_an_algorithm_that_no_single_optimizer_has_is_for_ranks_alone(tmp_path):
    saved_by(2, tmp_path / "a", make=gpuadam.ShardedAdam, algorithm="radam", decoupled=True)
    with pytest.raises(CheckpointError, match=r"RAdamW is one of gpuadam\.ShardedAdam alone: .* gpuadam\.load_sharded"):
        gpuadam.load(tmp_path / "a", params())
    opt = gpuadam.load_sharded(tmp_path / "a", params(), LOCAL)
    assert (opt.options.algorithm, opt.options.decoupled, type(opt)) == ("radam", True, gpuadam.ShardedAdam)


# The folder


def test_the_folder_is_what_its_page_says(by_four):
    folder, _ = by_four
    lock, *names = sorted(path.name for path in folder.iterdir())
    assert lock == ".gpuadam-lock"
    assert names[0] == "index.safetensors" and [name[:12] for name in names[1:]] == [f"part-{k}-of-4-" for k in range(4)]
    with (folder / names[0]).open("rb") as file:
        metadata = safetensors_file.Reader(file).metadata
    parts = json.loads(metadata["parts"])
    assert [part["file"] for part in parts] == names[1:]
    assert [part["n_bytes"] for part in parts] == [(folder / name).stat().st_size for name in names[1:]]
    pieces = {}
    for name in names[1:]:
        with (folder / name).open("rb") as file:
            pieces |= safetensors_file.Reader(file).tensors
    assert {"large[0:4096].m", "large[4096:8192].v", "small[0:37].param", "scalar[0:1].m"} <= pieces.keys()
    assert sum(entry.end - entry.start for entry in pieces.values()) == 3 * 4 * sum(p.size for p in params().values())


def test_any_reader_of_safetensors_opens_a_part(by_four):
    safetensors = libraries.imported("safetensors.numpy", reason="safetensors is not installed")
    folder, _ = by_four
    found = {}
    for path in parts_of(folder):
        found |= safetensors.load_file(path)
    m = np.concatenate([found[f"large[{a}:{min(a + 4096, 27_000)}].m"] for a in range(0, 27_000, 4096)])
    assert (m == gpuadam.load(folder, params()).state["large"]["m"].reshape(-1)).all()


def test_a_later_checkpoint_takes_the_place_of_the_one_before(folder):
    before = parts_of(folder)
    (folder / "notes.txt").write_text("what else is there stays")
    saved_by(2, folder, seed=3)
    assert len(parts_of(folder)) == 3 and not set(parts_of(folder)) & set(before)  # two parts, and the notes
    assert gpuadam.load(folder, params()).state["large"]["m"][0, 0] == np.float32(0.8)  # of two gradients of 4


def test_what_a_killed_save_left_is_deleted_by_the_next(folder):
    left = [folder / f"part-0-of-9-{'ab' * 8}.safetensors", folder / f".gpuadam-{'cd' * 8}.tmp"]
    for path in left:
        path.write_bytes(b"half of it")
    assert gpuadam.load(folder, params()).steps == 1
    saved_by(1, folder)
    assert not any(path.exists() for path in left) and len(parts_of(folder)) == 1


def test_a_folder_with_nothing_but_the_rest_of_a_killed_save_is_taken(tmp_path):
    (tmp_path / f"part-0-of-9-{'ab' * 8}.safetensors").write_bytes(b"")
    saved_by(1, tmp_path)
    assert len(parts_of(tmp_path)) == 1


def test_nothing_is_deleted_beside_an_index_that_cannot_be_read(folder, monkeypatch):
    index = folder / "index.safetensors"
    index.write_bytes(index.read_bytes()[:-1])
    before = parts_of(folder)
    monkeypatch.setattr(sharded_saving, "write_file", None)
    (error,) = on_ranks(1, saves_to(folder))
    assert isinstance(error, TypeError) and parts_of(folder) == before


# What is refused


def test_every_changed_byte_is_noticed(folder, examples):
    rng = random.Random(1)
    paths = [folder / "index.safetensors", *parts_of(folder)]
    for _ in range(examples(30, 150)):
        path = rng.choice(paths)
        right = path.read_bytes()
        at = rng.randrange(len(right)) if rng.random() < 0.7 else rng.randrange(1000)
        path.write_bytes(right[:at] + bytes([right[at] ^ 1 << rng.randrange(8)]) + right[at + 1 :])
        assert refused(folder), (path, at)
        path.write_bytes(right)
    assert not isinstance(on_ranks(1, lambda t: gpuadam.load_sharded(folder, params(), t))[0], Exception)


@pytest.mark.parametrize("length", [0, 7, 500, -1])
def test_a_part_cut_off_is_refused(folder, length):
    for path in parts_of(folder):
        right = path.read_bytes()
        path.write_bytes(right[:length])
        assert refused(folder)
        path.write_bytes(right)


def test_a_part_that_was_lost_is_named(folder):
    lost = parts_of(folder)[2]
    lost.unlink()
    assert refused(folder, f"its part {lost.name!r} is not there: it was lost, or the checkpoint was replaced")


def test_a_part_of_another_checkpoint_is_refused(folder, tmp_path):
    saved_by(4, tmp_path / "other", seed=3)
    ours, theirs = parts_of(folder)[0], parts_of(tmp_path / "other")[0]
    ours.write_bytes(theirs.read_bytes())
    assert refused(folder, "is not the one that was written with its index")


def sealed_index(folder, change):
    """Change the parts that the index names, with right checksums."""
    with (folder / "index.safetensors").open("rb") as file:
        metadata = safetensors_file.Reader(file).metadata
    parts = json.loads(metadata["parts"])
    kept = {key: value for key, value in metadata.items() if key not in ("crc32", "header_crc32")}
    with (folder / "index.safetensors").open("wb") as file:
        safetensors_file.write(file, [], kept | {"parts": json.dumps(change(parts))})


WRONG_PARTS = {
    "a part less": (lambda parts: parts[1:], "8,192 are missing or come twice"),
    "a part twice": (lambda parts: [*parts, parts[0]], "a file comes twice among the parts"),
    "a way out": (lambda parts: [parts[0] | {"file": "../../etc/passwd"}, *parts[1:]], "or is no part"),
    "no list": (lambda parts: {"a": 1}, "parts in its metadata is not as gpuadam writes it"),
    "a size that is none": (lambda parts: [parts[0] | {"n_bytes": "3"}, *parts[1:]], "parts in its metadata is not as"),
    "a huge size": (lambda parts: [parts[0] | {"n_bytes": 1 << 70}, *parts[1:]], "is not the one that was written"),
    "no parts": (lambda parts: [], "it does not have ['large.param', 'large.m'"),
}


@pytest.mark.parametrize("what", WRONG_PARTS)
def test_a_wrong_index_is_named(what, folder):
    change, match = WRONG_PARTS[what]
    sealed_index(folder, change)
    assert refused(folder, match)


WRONG_PIECES = {
    "large[0:27001].m": "is no piece of 'large'",
    "large[4096:0].m": "is no piece of 'large'",
    "large[5:27000].m": "is no piece of 'large'",
    "large[0:26999].m": "elements 26,999 to 27,000 of 27,000 are missing",
    "stranger[0:3].m": "['stranger[0:3].m'], for which this optimizer has no place",
    "large.m": "['large.m'], for which this optimizer has no place",
    "large[0:27000].x": "does not have ['large.m'",
}


@pytest.mark.parametrize("name", WRONG_PIECES)
def test_a_wrong_piece_is_named(name, tmp_path, monkeypatch):
    real = tensors.Section.tensor

    def wrong(section, own):
        right = real(section, own)
        if own != "large[0:27000].m":
            return right
        kept = section.view.size - (name == "large[0:26999].m")
        return safetensors_file.Tensor(name, "F32", (kept,), lambda: [bytes(4 * kept)])

    monkeypatch.setattr(tensors.Section, "tensor", wrong)
    opt = gpuadam.ShardedAdam(params(), LOCAL)
    opt.save(tmp_path / "a")
    with pytest.raises(CheckpointError) as raised:
        gpuadam.load(tmp_path / "a", params())
    assert WRONG_PIECES[name] in str(raised.value)


def test_pieces_of_several_dtypes_are_refused(tmp_path, monkeypatch):
    real = tensors.Section.tensor

    def wrong(section, own):
        right, n_bytes = real(section, own), 8 * section.view.size
        return right._replace(dtype="F64", chunks=lambda: [bytes(n_bytes)]) if own == "large[0:4096].m" else right

    monkeypatch.setattr(tensors.Section, "tensor", wrong)
    gpuadam.ShardedAdam(params(), LOCAL, bucket_bytes=0).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"the pieces of 'large\.m' have several dtypes"):
        gpuadam.load(tmp_path / "a", params())


DIFFERENT = {
    "a shape": (
        lambda rank: params() | {"small": np.ones(38, "f4")},
        "'small' was float32 of shape [37], and is float32 of shape [38]",
    ),
    "a name": (lambda rank: params() | {"other": np.ones(2, "f4")}, "it lacks ['other']"),
    "a shape on rank 1": (
        lambda rank: params() | ({"small": np.ones(38, "f4")} if rank == 1 else {}),
        "'small' was float32 of shape [37], and is float32 of shape [38]",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_does_not_fit_is_named_on_all_ranks(what, folder):
    of_rank, match = DIFFERENT[what]
    for error in on_ranks(3, lambda t: gpuadam.load_sharded(folder, of_rank(t.rank), t)):
        assert type(error) is CheckpointError and match in str(error) and str(folder) in str(error)


def test_ranks_that_load_different_checkpoints_are_told(folder, tmp_path):
    saved_by(1, tmp_path / "b")
    of_rank = [folder, tmp_path / "b"]
    for error in on_ranks(2, lambda t: gpuadam.load_sharded(of_rank[t.rank], params(), t)):
        assert type(error) is ValueError and "the ranks differ in path" in str(error)


def test_a_folder_that_differs_between_machines_is_told(folder, tmp_path, monkeypatch):
    """The same path leads to another checkpoint on rank 1."""
    saved_by(1, tmp_path / "b")
    real = sharded_loading.opened

    def elsewhere(path, given, *arguments, **named):
        return real(tmp_path / "b" if given["small"][0] == 0 else path, given, *arguments, **named)

    monkeypatch.setattr(sharded_loading, "opened", elsewhere)
    of_rank = [params(), params() | {"small": np.zeros(37, "f4")}]
    for error in on_ranks(2, lambda t: gpuadam.load_sharded(folder, of_rank[t.rank], t)):
        assert type(error) is ValueError and "the ranks differ in the checkpoint there" in str(error)


def test_parameters_that_were_not_saved_are_missed(tmp_path):
    saved_by(2, tmp_path / "a", with_params=False)
    for load in (
        lambda p, **o: gpuadam.load(tmp_path / "a", p, **o),
        lambda p, **o: gpuadam.load_sharded(tmp_path / "a", p, LOCAL, **o),
    ):
        with pytest.raises(CheckpointError, match=r"the parameters are saved by save\(path, with_params=True\)"):
            load(params(), with_params=True)


def test_no_folder_is_the_usual_error(tmp_path):
    for error in on_ranks(2, lambda t: gpuadam.load_sharded(tmp_path / "a", params(), t)):
        assert isinstance(error, FileNotFoundError)


# Saving


def saves_to(folder):
    """Return what a rank does to save there."""
    return lambda transport: optimizer(transport, seed=3).save(folder)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_cannot_write_stops_all_and_the_old_checkpoint_stays(folder, rank, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = sharded_saving.write_file

    def full(path, *arguments):
        if f"part-{rank}-of-3" in path:
            raise CheckpointError(f"{path!r} was not saved: {os.strerror(errno.ENOSPC)}. Make room")
        return real(path, *arguments)

    monkeypatch.setattr(sharded_saving, "write_file", full)
    for own, error in enumerate(on_ranks(3, saves_to(folder))):
        assert type(error) is CheckpointError and "No space left" in str(error)
        assert (f"rank {rank} raised CheckpointError, so all ranks stop" in str(error)) == (own != rank)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("owner, call, calls", [(os, "fsync", 6), (Path, "replace", 3)])
def test_an_index_that_cannot_be_written_leaves_no_new_part(folder, tmp_path, owner, call, calls, is_first, monkeypatch):
    """As on a disk that is full when three parts are written."""
    place = tmp_path / "first" if is_first else folder
    before = {} if is_first else {p.name: p.read_bytes() for p in place.iterdir() if p.name != ".gpuadam-lock"}
    count, real = [0], getattr(owner, call)

    def fails(*arguments):
        count[0] += 1
        if count[0] > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(owner, call, fails)
    for error in on_ranks(3, saves_to(place)):
        assert "No space left" in str(error) and "Nothing there has changed" in str(error)
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.name != ".gpuadam-lock"} == before


def test_an_index_that_is_in_place_keeps_its_parts_when_the_folder_cannot_be_flushed(folder, monkeypatch):
    wanted, count, fsync = content(gpuadam.load(folder, params())), [0], os.fsync

    def fails(number):
        count[0] += 1
        if count[0] == 8:  # after a file and the folder of each of three parts, and the index
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fsync(number)

    monkeypatch.setattr(atomic_file.os, "fsync", fails)
    for error in on_ranks(3, saves_to(folder)):
        assert "The new file is in place" in str(error) and "Nothing there has changed" not in str(error)
    assert content(gpuadam.load(folder, params())) != wanted


@pytest.mark.parametrize("calls", few(range(1, 6), 1, 4, 5))
def test_a_crash_at_any_renaming_leaves_the_old_checkpoint(folder, calls, monkeypatch):
    """Of four parts and an index, each comes into its place by being renamed. Afterwards a save does as ever."""
    wanted, count, replace = content(gpuadam.load(folder, params())), [0], Path.replace

    def fails(path, to):
        count[0] += 1
        if count[0] >= calls:
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", fails)
    assert all(type(error) is CheckpointError for error in on_ranks(4, saves_to(folder)))
    monkeypatch.setattr(Path, "replace", replace)
    assert content(gpuadam.load(folder, params())) == wanted
    saved_by(2, folder, seed=3)
    assert content(gpuadam.load(folder, params())) != wanted and len(parts_of(folder)) == 2


def test_parts_are_on_the_disk_before_the_index_names_them(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(
        atomic_file.os, "fsync", lambda n: calls.append(Path(f"/proc/self/fd/{n}").resolve().name) or fsync(n)
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append(to.name) or replace(path, to))
    gpuadam.ShardedAdam(params(), LOCAL).save(tmp_path / "a")
    (part,) = parts_of(tmp_path / "a")
    assert [calls[k] for k in (1, 2, 4, 5)] == [part.name, "a", "index.safetensors", "a"]
    assert calls[0].endswith(".tmp") and calls[3].endswith(".tmp") and len(calls) == 6


def test_a_file_that_rank_0_does_not_see_is_named(folder, monkeypatch):
    real = sharded_saving._write_part

    def on_a_disk_of_its_own(opt, file, *arguments):
        part = real(opt, file, *arguments)
        if opt.transport.rank == 1:
            file.unlink()
        return part

    monkeypatch.setattr(sharded_saving, "_write_part", on_a_disk_of_its_own)
    for error in on_ranks(2, saves_to(folder)):
        assert type(
            error
        ) is CheckpointError and "which rank 1 wrote, is not here. The folder must be on a file system" in str(error)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda path: path.write_text("mine"), "File exists. Give a folder that can be made and read"),
        (lambda path: [path.mkdir(), (path / "mine").write_text("")], r"files that are of no checkpoint, \['mine'\]"),
        (
            lambda path: [path.mkdir(), (path / "index.safetensors").write_bytes(b"a model of somebody else's" * 9)],
            r"files that are of no checkpoint, \['index\.safetensors'\]",
        ),
    ],
)
def test_what_is_not_the_checkpoints_is_left_alone(make, match, tmp_path):
    make(tmp_path / "a")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError, match=match):
        gpuadam.ShardedAdam(params(), LOCAL).save(tmp_path / "a")
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_folder_in_no_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="was not saved: No such file or directory"):
        gpuadam.ShardedAdam(params(), LOCAL).save(tmp_path / "a" / "b")


@pytest.mark.parametrize("make", [Path.mkdir, lambda index: index.symlink_to("nowhere")])
def test_an_index_that_cannot_be_opened_is_named_on_all_ranks(make, tmp_path):
    make(tmp_path / "index.safetensors")
    for error in on_ranks(2, saves_to(tmp_path)):
        assert type(error) is CheckpointError and f"{str(tmp_path / 'index.safetensors')!r} was not saved" in str(error)


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    """There, other than elsewhere, what was never made cannot be deleted either."""
    opened = os.open

    def refuses(path, flags=os.O_CREAT, *mode, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(atomic_file.os, "open", refuses)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: refuses(path))
    for error in on_ranks(2, saves_to(tmp_path)):
        assert type(error) is CheckpointError and "Read-only file system. " in str(error)


class Own(gpuadam.ShardedAdam):
    pass


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path):
    with pytest.raises(TypeError, match="Own is not one of ShardedAdam, ShardedAdamW"):
        Own(params(), LOCAL).save(tmp_path / "a")
    opt = gpuadam.ShardedAdam(params(), LOCAL)
    opt.groups[0]["eps"] = -1
    with pytest.raises(ValueError, match="eps=-1"):
        opt.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_learning_rate_that_fits_later_steps_alone_comes_back(tmp_path):
    """lr / (1 - beta1**step) is too large for a float32 in the first steps."""
    opt = gpuadam.ShardedAdam(params(), LOCAL)
    for _ in range(20):
        opt.step(params())
    opt.groups[0]["lr"] = 1e38
    opt.save(tmp_path / "a")
    for found in (gpuadam.load_sharded(tmp_path / "a", params(), LOCAL), gpuadam.load(tmp_path / "a", params())):
        assert found.groups[0]["lr"] == 1e38 and found.steps == 20


def test_ranks_that_differ_are_told_before_anything_is_written(tmp_path):
    def of_rank(transport):
        opt = optimizer(transport)
        opt.save(tmp_path / str(transport.rank))

    for error in on_ranks(2, of_rank):
        assert type(error) is ValueError and "the ranks differ in path" in str(error)
    assert list(tmp_path.iterdir()) == []


# Memory and time


def test_long_names_in_many_pieces_come_back(tmp_path):
    """Four tensors in each cell of 4096 elements, whose names are longer than their bytes."""
    given = {"a" * 2000: np.zeros(2_000_000, "f4")}
    opt = gpuadam.ShardedAdam(given, LOCAL, bucket_bytes=0, state_dtype="8bit")
    opt.save(tmp_path / "a")
    assert content(gpuadam.load_sharded(tmp_path / "a", given, LOCAL)) == content(opt)


def test_a_hostile_part_takes_little_memory(folder):
    """Its header is large and right, and the index says of it what it likes."""
    part = parts_of(folder)[0]
    header = safetensors_file.FIRST + b'00000000"},"x":[' + b"[]," * 4_000_000 + b"[]]}"
    crc = f"{zlib.crc32(header):08x}"
    part.write_bytes(len(header).to_bytes(8, "little") + header.replace(b"00000000", crc.encode(), 1))
    sealed_index(folder, lambda parts: [parts[0] | {"n_bytes": 1 << 62, "crc32": crc}, *parts[1:]])
    tracemalloc.start()
    assert refused(folder, "its header has 12,")
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()


def test_saving_and_loading_take_a_few_megabytes(tmp_path):
    n = 4_000_000
    opt = gpuadam.ShardedAdam(np.zeros(n, "f4"), LOCAL, bucket_bytes=1 << 20)
    tracemalloc.start()
    opt.save(tmp_path / "a", with_params=True)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    param = np.zeros(n, "f4")
    tracemalloc.start()
    gpuadam.load(tmp_path / "a", param, with_params=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * param.nbytes + 4e6  # the moments


@pytest.mark.exhaustive
def test_a_rank_reads_what_is_its_own(tmp_path, monkeypatch):
    """And little more: whole blocks of checksums, at the edges of what it owns."""
    n = 8_000_000
    gpuadam.Adam(np.zeros(n, "f4")).save(tmp_path / "a")
    n_bytes, real = [], stored_arrays.chunks
    monkeypatch.setattr(stored_arrays, "chunks", lambda *a: (n_bytes.append(len(chunk)) or chunk for chunk in real(*a)))
    all_well(on_ranks(4, lambda t: gpuadam.load_sharded(tmp_path / "a", np.zeros(n, "f4"), t)))
    assert sum(n_bytes) == 2 * 4 * n


@pytest.mark.gpu
def test_what_a_gpu_saved_goes_on_on_the_cpu_and_back(tmp_path):
    cp = libraries.imported("cupy")

    def there(seed):
        return {name: cp.asarray(p) for name, p in params(seed).items()}

    given = there(0)
    opt = gpuadam.ShardedAdamW(given, LOCAL, bucket_bytes=40_000)
    opt.step(there(1))
    opt.save(tmp_path / "a", with_params=True)
    for arrays in (params(2), there(2)):
        again = gpuadam.load_sharded(tmp_path / "a", arrays, LOCAL, with_params=True)
        assert content(again) == content(opt)
        assert all((cp.asnumpy(given[name]) == cp.asnumpy(array)).all() for name, array in arrays.items())
