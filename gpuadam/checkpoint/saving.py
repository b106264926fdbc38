"""Writing a checkpoint: one file of an `Adam`, which is replaced whole or not at all."""

import errno
import os

from .. import checks
from .atomic_file import replacing
from .format import CLASSES, check_class, encoded
from .safetensors import CheckpointError, size_of, write
from .tensors import PARAM, chosen, sections


def save(opt, state_dict, path, *, with_params=False):
    """Save an `Adam`: see `Adam.save`. state_dict: the optimizer's own, which has been checked."""
    path, with_params = os.fsdecode(path), checks.flag("with_params", with_params)
    check_class(opt, CLASSES)
    arrays = sections(opt)
    metadata = encoded(
        type(opt).__name__,
        options=opt.options,
        groups=state_dict["groups"],
        steps=state_dict["steps"],
        params={of.param: (of.view, state_dict["state"][of.param]["step"]) for of in arrays if of.key == PARAM},
        copies=opt._copies,
    )
    tensors = [section.tensor(section.array) for section in chosen(arrays, with_params)]
    write_file(path, tensors, metadata)


def write_file(path, tensors, metadata):
    """Write a file, or leave the one that is there. Return (how many bytes it has, the checksum of its header).

    Raises CheckpointError.
    """
    try:
        with replacing(path) as file:
            crc = write(file, tensors, metadata)
            return file.seek(0, os.SEEK_END), crc
    except OSError as error:
        advice = _advice(error, lambda: size_of(tensors, metadata))
        raise CheckpointError(f"{path!r} was not saved: {error.strerror or error}. {advice}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path!r} was not saved: {error}") from error.__cause__


def _advice(error, n_bytes):
    """Return what to do about an OSError of writing."""
    if error.errno == errno.ENOENT:
        return "Make its folder first"
    if error.errno in (errno.EISDIR, errno.EEXIST):
        return "Give the path of a file"
    unchanged = "A file that was there is as it was"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{unchanged}. The new one has {n_bytes():,} bytes: make room for them, or save elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{unchanged}. Save into a folder that can be read and written"
    return f"{unchanged}. See to the disk, or save elsewhere"
