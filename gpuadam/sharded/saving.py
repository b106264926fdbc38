"""Writing a checkpoint of many ranks: a folder, in which each rank writes the part that it owns.

Every rank writes and flushes a part of its own, under a name that no part before had. Then rank 0 puts a new index in the place
of the old one, in one step; only the index says which parts the checkpoint has. So a crash at any moment leaves the old
checkpoint or the new one. Parts that no index names were left by a save that did not end, and the next one deletes them.
Between that and the new index, rank 0 holds a lock, so that another job does not delete the new parts as leftovers.
"""

import contextlib
import functools
import os
import re
from pathlib import Path

from .. import checks
from ..checkpoint.format import (
    INDEX,
    IS_PART,
    PART,
    PART_FORMAT,
    VERSION,
    as_json,
    check_class,
    decoded,
    encoded,
)
from ..checkpoint.regular_file import locked, opened, unlock
from ..checkpoint.safetensors import FIRST, CheckpointError, Reader, require
from ..checkpoint.saving import write_file
from ..checkpoint.tensors import chosen, sections
from ..groups import saved_settings, some
from ..kernels.messages import shown
from .agreement import agreed, on_all

LOCK = ".gpuadam-lock"
OURS = re.compile(rf"{IS_PART.pattern}|\.gpuadam-[0-9a-f]{{16}}\.tmp")  # parts, and files that were not finished
SHARED = "The folder must be on a file system that all ranks share"


def save(opt, path, with_params):
    """Save a ShardedAdam, whose transport makes no other calls: see `ShardedAdam.save`."""
    transport = opt.transport
    folder, metadata = agreed(transport, _prepared, opt, path, with_params)[0]
    with contextlib.ExitStack() as lock:
        cleared = on_all(transport, lambda: _cleared(folder, lock) if transport.rank == 0 else None)
        token = transport.exchange(cleared)[0]
        file = folder / PART.format(transport.rank, transport.size, token)
        try:
            part = on_all(transport, _write_part, opt, file, with_params)
        except BaseException:
            with contextlib.suppress(OSError):  # of a read-only file system, too; the error before is the one to report
                file.unlink()  # a part without the others has no use
            raise
        parts = transport.exchange(part)
        on_all(transport, lambda: _commit(folder, metadata, parts, lock) if transport.rank == 0 else None)


def _prepared(opt, path, with_params):
    """Check the optimizer. Return (folder, metadata), a dict of values that all ranks must have in common, and no flag."""
    check_class(opt, ("ShardedAdam", "ShardedAdamW"))
    folder, with_params = Path(checks.path("path", path)), checks.flag("with_params", with_params)
    opt.checked_groups()  # what could not be loaded is not saved either
    params = {member.name: (member.view, member.taken) for member in opt.members}
    groups = [saved_settings(group) for group in opt.groups]
    metadata = encoded(opt, groups, params) | {"reduction": opt.reduction}
    described = metadata | {"groups": groups}  # as numbers: 1 and 1.0, which are equal, differ in JSON
    return (folder, metadata), {"path": str(folder), "with_params": with_params, **described}, False


def _cleared(folder, lock):
    """Make the folder, or delete the rest of a save that did not end. Return random digits for the names of the new parts.

    lock: the ExitStack that unlocks the folder.
    """
    try:
        folder.mkdir(exist_ok=True)
        _known(folder)
        locked(folder / LOCK, functools.partial(lock.callback, unlock))
        _delete_all_but(folder, _known(folder))  # again, now that no other job changes it
    except BlockingIOError as error:
        what = f"{shown(str(folder), 1000)} was not saved: another job is saving into it"
        advice = "Nothing there has changed. End that job, or give each a folder of its own"
        raise CheckpointError(f"{what}. {advice}") from error
    except OSError as error:
        where, advice = str(error.filename or folder), "Give a folder that can be made and read"
        raise CheckpointError(f"{shown(where, 1000)} was not saved: {error.strerror}. {advice}") from error
    return os.urandom(8).hex()


def _known(folder):
    """Return the names of the parts of a folder's checkpoint. Refuse a folder of other files."""
    names = sorted(file.name for file in folder.iterdir())
    known = _files_of(folder / INDEX) if INDEX in names else None
    strangers = [name for name in names if name != LOCK and not OURS.fullmatch(name)] if known is None else []
    advice = "and was not saved: give a folder of its own"
    require(not strangers, f"{shown(str(folder), 1000)} has files that are of no checkpoint, {some(strangers)}, {advice}")
    return known or ()


def _files_of(index):
    """Return the names of the parts of an index, or None if the file is another program's, which is not to be replaced."""
    with opened(index) as file:
        if file.read(8 + len(FIRST))[8:] != FIRST:
            return None
        try:
            return [part["file"] for part in decoded(Reader(file).metadata).parts or ()]
        except CheckpointError:  # it is damaged, and does not say which parts are without use
            return [other.name for other in index.parent.iterdir()]


def _write_part(opt, file, with_params):
    """Write the arrays of this rank. Return the index's entry of the part."""
    here = shown(str(file.parent), 1000)
    require(file.parent.is_dir(), f"the folder {here}, which rank 0 has made, is not here. {SHARED}")
    if with_params:
        for bucket in opt.buckets:
            bucket.read_params()
    tensors = [section.tensor(section.piece_name) for section in chosen(sections_of_rank(opt), with_params)]
    n_bytes, crc = write_file(str(file), tensors, {"format": PART_FORMAT, "version": VERSION})
    return {"file": file.name, "n_bytes": n_bytes, "crc32": crc}


def _commit(folder, metadata, parts, lock):
    """Write the index, which makes the new parts the checkpoint, delete the parts of the old one, and unlock the folder."""
    try:
        for rank, part in enumerate(parts):
            path = folder / part["file"]
            is_here = path.exists() and path.stat().st_size == part["n_bytes"]
            require(is_here, f"the file {shown(str(path), 1000)}, which rank {rank} wrote, is not here. {SHARED}")
        write_file(str(folder / INDEX), [], metadata | {"parts": as_json(parts)})
    except BaseException:
        _take_back(folder, parts)
        raise
    _delete_all_but(folder, [part["file"] for part in parts])
    lock.close()  # now: it may take long until all ranks are here


def _take_back(folder, parts):
    """Delete new parts, unless the index names them already."""
    with contextlib.suppress(OSError):  # the error before is the one to report
        index = folder / INDEX
        named = (index.exists() and _files_of(index)) or ()
        for part in parts:
            if part["file"] not in named:
                (folder / part["file"]).unlink(missing_ok=True)


def _delete_all_but(folder, names):
    """Delete the parts in a folder that have other names, and files that were not finished."""
    for file in folder.iterdir():
        if file.name not in names and OURS.fullmatch(file.name):
            with contextlib.suppress(OSError):  # a file that stays does no harm, and the next save tries again
                file.unlink()


def sections_of_rank(opt):
    """Return the Sections of the arrays that this rank owns."""
    listed = []
    for bucket in opt.buckets:
        if bucket.optimizer:
            ranges = {shard.label: (shard.name, shard.start, shard.stop) for shard in bucket.shards}
            of_bucket = sections(bucket.optimizer, ranges)
            listed += [section._replace(view=section.view.flat) for section in of_bucket]  # which may be of vectors
    return listed
