"""Checkpoints of many ranks: a folder in which each rank writes what it owns, and which any number of ranks loads.

Every rank writes and flushes a part of its own, under a name that no part before had. Then rank 0 puts a new index in the place
of the old one, in one step; only the index says which parts the checkpoint has. So a crash at any moment leaves the old
checkpoint or the new one. Parts that no index names were left by a save that did not end, and the next one deletes them.
"""

import contextlib
import os
import re
import secrets
from pathlib import Path

from .. import checks
from ..checkpoint.file import written
from ..checkpoint.format import ALGORITHMS, IS_PART, PART, VERSION, as_json, of_optimizer, of_param, parsed
from ..checkpoint.loading import about, arguments, not_fitting, opened
from ..checkpoint.safetensors import FIRST, CheckpointError, Reader
from ..checkpoint.stored import INDEX, PART_FORMAT, piece_name
from ..checkpoint.tensors import PARAM, Range, arrays_of, tensor
from ..groups import saved_settings
from . import transports
from .agreement import agreed, on_all
from .optimizer import ShardedAdam, ShardedAdamW

CLASS_OF = {algorithm: name for name, algorithm in ALGORITHMS.items()}
IS_TEMPORARY = re.compile(r"\.gpuadam-[0-9a-f]{16}\.tmp")
SHARED = "The folder must be on a file system that all ranks share"


def save(opt, path, *, with_params=False):
    """Save a ShardedAdam: see `ShardedAdam.save`."""
    opt.check_whole()
    transport = opt.transport
    folder, metadata = agreed(transport, lambda: _prepared(opt, path, with_params))[0]
    token = on_all(transport, lambda: _cleared(folder) if transport.rank == 0 else None)
    token = transport.exchange(token)[0]
    file = Path(folder, PART.format(transport.rank, transport.size, token))
    try:
        part = on_all(transport, lambda: _write_part(opt, file, with_params))
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only file system raises here, too; the error before is the one to report
            file.unlink()  # there is no use for it without the others
        raise
    parts = transport.exchange(part)
    on_all(transport, lambda: _commit(folder, metadata, parts) if transport.rank == 0 else None)


def _prepared(opt, path, with_params):
    """Check what is to be saved. Return (folder, metadata), what all ranks must have in common, and no flag."""
    if type(opt) not in (ShardedAdam, ShardedAdamW):
        raise TypeError(f"{type(opt).__name__} is not ShardedAdam or ShardedAdamW, which alone can be loaded")
    folder, with_params = os.fsdecode(path), checks.flag("with_params", with_params)
    opt.checked_groups()  # what could not be loaded is not saved either
    params = {member.name: of_param(member.view, member.taken) for member in opt.members}
    groups, name = [saved_settings(group) for group in opt.groups], CLASS_OF[opt.options.algorithm, opt.options.decoupled]
    metadata = of_optimizer(name, opt.options.saved(), groups, opt.steps, params) | {"reduction": opt.reduction}
    return (folder, metadata), {"path": folder, "with_params": with_params, **metadata}, False


def _cleared(folder):
    """Make the folder, or delete what a save left there that did not end. Return what tells the names of the new parts."""
    path = Path(folder)
    try:
        if not path.is_dir():
            path.mkdir()
        names = {found.name for found in path.iterdir()}
        is_old = INDEX in names and _is_index(path / INDEX)
        if not is_old and (strangers := sorted(name for name in names if not _is_ours(name))):
            raise CheckpointError(
                f"{folder!r} has files that are of no checkpoint, {strangers[:8]}, and was not saved: give a folder of its own"
            )
        with contextlib.suppress(CheckpointError):  # where the old index is damaged, nothing says what is without use
            _delete_all_but(path, _parts_of(path / INDEX) if is_old else ())
    except FileExistsError as error:
        raise CheckpointError(f"{folder!r} is a file, and many ranks save into a folder: give another path") from error
    except OSError as error:
        raise CheckpointError(
            f"{str(error.filename or folder)!r} was not saved: {error.strerror}. Give a folder that can be made and read"
        ) from error
    return secrets.token_hex(8)


def _is_index(path):
    """Whether a file begins as an index does, be the rest damaged: it may be somebody else's, which is not to be replaced."""
    with path.open("rb") as file:
        return file.read(8 + len(FIRST))[8:] == FIRST


def _parts_of(path):
    """Return the names of the parts of an index."""
    with path.open("rb") as file:
        return [part["file"] for part in parsed(Reader(file).metadata)["parts"] or ()]


def _write_part(opt, file, with_params):
    """Write what this rank owns. Return what the index says of it."""
    if not file.parent.is_dir():
        raise CheckpointError(f"the folder {str(file.parent)!r}, which rank 0 has made, is not here. {SHARED}")
    if with_params:
        opt.read_params()
    kept = [(of, found) for of, found in arrays_of_rank(opt).items() if with_params or of[1] != PARAM]
    tensors = [tensor(piece_name(own, key), *found) for (own, key), found in kept]
    n_bytes, crc = written(str(file), tensors, {"format": PART_FORMAT, "version": VERSION})
    return {"file": file.name, "n_bytes": n_bytes, "crc32": crc}


def _commit(folder, metadata, parts):
    """Write the index, from when on this is the checkpoint, and delete the parts of the one before."""
    for rank, part in enumerate(parts):
        path = Path(folder, part["file"])
        if not path.exists() or path.stat().st_size != part["n_bytes"]:
            raise CheckpointError(f"the file {str(path)!r}, which rank {rank} wrote, is not here. {SHARED}")
    written(os.path.join(folder, INDEX), [], metadata | {"parts": as_json(parts)})  # noqa: PTH118 - a str, for messages
    _delete_all_but(Path(folder), [part["file"] for part in parts])


def _is_ours(name):
    return IS_PART.fullmatch(name) or IS_TEMPORARY.fullmatch(name)


def _delete_all_but(path, names):
    """Delete the parts in a folder that have other names, and what is left of files that were not finished."""
    for found in path.iterdir():
        if found.name not in names and _is_ours(found.name):
            with contextlib.suppress(OSError):  # it does no harm, and the next save tries again
                found.unlink()


def arrays_of_rank(opt):
    """Return (Range, key) -> (backend, View) of what this rank owns, as `arrays_of`."""
    found: dict = {}
    for bucket in opt.buckets:
        if bucket.optimizer is not None:
            ranges = {shard.label: Range(shard.name, shard.start, shard.stop) for shard in bucket.shards}
            found |= arrays_of(bucket.optimizer, ranges)
    return found


def load_sharded(
    path,
    params,
    transport,
    backend=None,
    *,
    lr=None,
    with_params=False,
    reduction=None,
    bucket_bytes=1 << 25,
    views=False,
):
    """Make a `ShardedAdam` of what `ShardedAdam.save` or `Adam.save` saved, with its options, hyperparameters and step counts.

    path: of the folder, or of the file that `Adam.save` made. It does not matter how many ranks saved it.
    params, backend, lr, with_params: as in `gpuadam.load`. transport, bucket_bytes, views: as in `ShardedAdam`.
    reduction: by default that which was saved; "mean" for one that `Adam` saved.

    Every rank calls this, and reads what it owns, so that together they read the checkpoint about once. A ShardedAdam has no
    copies and is never capturable, whatever was saved. ShardedAdamW is made of what AdamW saved.
    Raises, on all ranks, what `gpuadam.load` raises; by then the parameters of all ranks may have become those of rank 0.

    >>> import numpy as np, gpuadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "step-1")
    >>> w, transport = np.ones(3, "float32"), gpuadam.transports.Local()
    >>> opt = gpuadam.ShardedAdamW({"w": w}, transport, lr=0.1)
    >>> opt.step({"w": w.copy()})
    >>> opt.save(path)
    >>> again = gpuadam.load_sharded(path, {"w": w}, transport)
    >>> alone = gpuadam.load(path, {"w": w})
    >>> type(again).__name__, again.steps, type(alone).__name__, alone.steps
    ('ShardedAdamW', 1, 'AdamW', 1)
    """
    transports.check(transport)
    location = on_all(transport, lambda: os.fsdecode(path))
    with about(location), contextlib.ExitStack() as until_loaded:

        def compared():
            given = until_loaded.enter_context(opened(location, params, backend, lr))
            whole = checks.flag("with_params", with_params)
            return given, {"path": location, "the checkpoint there": given.stored.crc, "with_params": whole}, False

        given, _ = agreed(transport, compared)
        stored = given.stored
        stored.find(transport)
        saved = stored.saved
        algorithm, decoupled = ALGORITHMS[saved["class"]]
        make = ShardedAdamW if (algorithm, decoupled) == ("adam", True) else ShardedAdam
        positional, settings = arguments(given)
        options = {name: value for name, value in saved["options"].items() if name != "capturable"}
        options |= {"algorithm": algorithm, "decoupled": decoupled, "backend": backend}
        options |= {"reduction": saved["reduction"] if reduction is None else reduction}
        with not_fitting():
            opt = make(positional, transport, **settings, **options, bucket_bytes=bucket_bytes, views=views)
        on_all(transport, lambda: _fill(opt, stored, with_params))
    if with_params:
        opt.collect_params()
    return opt


def _fill(opt, stored, with_params):
    """Read what is this rank's: counts, state, and parameters into the buffer that the ranks collect them from."""
    saved = stored.saved
    with not_fitting():
        taken = {name: checks.count(f"step of {name!r}", param["step"]) for name, param in saved["params"].items()}
        steps = checks.count("steps", saved["steps"])
    arrays = arrays_of_rank(opt)
    stored.check(arrays, with_params)
    for of, found in arrays.items():
        if with_params or of[1] != PARAM:
            stored.read(*of, *found)
    opt.go_on_from(steps, taken)
