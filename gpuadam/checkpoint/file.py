"""A file of a checkpoint, written whole or not at all, and what to do where it cannot be."""

import errno
import os

from .atomic_file import replacing
from .safetensors import CheckpointError, size_of, write


def written(path, tensors, metadata):
    """Write a file, or leave the one that is there. Return (the bytes that it has, the checksum of its header).

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
    before = "A file that was there is as it was"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{before}. The new one has {n_bytes():,} bytes: make room for them, or save elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{before}. Save into a folder that can be read and written"
    if error.errno == errno.ENOENT:
        return "Make its folder first"
    if error.errno in (errno.EISDIR, errno.EEXIST):
        return "Give the path of a file"
    return f"{before}. See to the disk, or save elsewhere"
