"""Writing a checkpoint: one file of an `Adam`, which is replaced whole or not at all."""

import errno
import os

from .. import checks
from ..kernels.messages import shown
from .atomic_file import NotFlushedError, replacing
from .format import CLASSES, check_class, encoded
from .safetensors import CheckpointError, require, write
from .tensors import PARAM, chosen, sections

CHANGED = "a step was under way, or was taken, while it was saved: save between steps, or in the thread that takes them"
# the number of an error -> what to do about it
ADVICE: dict[int | None, str] = {
    errno.ENOENT: "Make its folder first",
    errno.EEXIST: "Give the path of a file",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Save into a folder that can be read and written"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room for more than {:,} bytes, or save elsewhere"),
}


def save(opt, state_dict, path, is_unchanged, *, with_params=False):
    """Save an `Adam`: see `Adam.save`. state_dict: the optimizer's own, which has been checked. The rest: `write_file`."""
    path, with_params = checks.path("path", path), checks.flag("with_params", with_params)
    check_class(opt, (*CLASSES, "OffloadAdam"))
    arrays, states = sections(opt), state_dict["state"]
    params = {section.param: (section.view, states[section.param]["step"]) for section in arrays if section.key == PARAM}
    masters = {section.param for section in arrays if section.is_master}  # of which the parameters are copies
    copies = [name for name, parameter in opt.parameters.items() if parameter.copy is not None or name in masters]
    metadata = encoded(opt, state_dict["groups"], params, copies)
    tensors = [section.tensor(section.array_name) for section in chosen(arrays, with_params)]
    write_file(path, tensors, metadata, is_unchanged, follow=True)


def write_file(path, tensors, metadata, is_unchanged=lambda: True, *, follow=False):
    """Write a file, or leave the one that is there. Return (how many bytes it has, the checksum of its header).

    is_unchanged: whether, after the tensors were read, all are of one step. follow: as of `replacing`.
    Raises CheckpointError.
    """
    try:
        with replacing(path, follow=follow) as file:
            crc = write(file, tensors, metadata)
            require(is_unchanged(), CHANGED)
            return file.seek(0, os.SEEK_END), crc
    except OSError as error:
        n_bytes = sum(tensor.n_bytes for tensor in tensors)
        advice = ADVICE.get(error.errno, "See to the disk, or save elsewhere").format(n_bytes)
        unchanged = "" if isinstance(error, NotFlushedError) else " Nothing there has changed."
        reason = f"{error.strerror or error}.{unchanged} {advice}"
        raise CheckpointError(f"{shown(path, 1000)} was not saved: {reason}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path, 1000)} was not saved: {error}") from error.__cause__
