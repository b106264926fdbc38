"""A file that is replaced whole or not at all, and is on the disk when that is done."""

import contextlib
import errno
import os
import stat
from pathlib import Path

from .regular_file import check_regular, opened


class NotFlushedError(OSError):
    """A file is in its place, and the folder that says so is not known to be on the disk."""


@contextlib.contextmanager
def replacing(path, *, follow=False, durable=True):
    """Open a new binary file that takes the place of `path` when the block ends without an error.

    The new file is written beside the old one, as ".gpuadam-", random digits and ".tmp", flushed to the disk and renamed; then
    the folder is flushed. On an error the new file is removed and the old one is as it was; after a kill the new file is left,
    and nothing reads it. The new file has the mode of the old one, or that of the umask if there is none.

    follow: a symbolic link stays one, and its target is replaced; otherwise it is refused. durable: whether anything is flushed.
    Raises OSError, and then nothing has changed: FileExistsError if there is something else than a regular file. Raises
    NotFlushedError after the new file is in its place, if the folder cannot be flushed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a")
    >>> with replacing(path) as file:
    ...     _ = file.write(b"new")
    >>> path.read_bytes()
    b'new'
    """
    target = Path(os.path.realpath(path) if follow else path)
    old = check_regular(target)
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o777
    with _flushed_afterwards(target.parent) if durable else contextlib.nullcontext():
        temporary = target.parent / f".gpuadam-{os.urandom(8).hex()}.tmp"
        file = opened(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        try:
            if old is not None and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:  # the umask was another then
                temporary.chmod(mode)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):  # closing writes the rest, which may fail again; the first error is reported
                file.close()
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _flushed_afterwards(path):
    """Flush a folder to the disk when the block ends without an error. Windows flushes folders by itself."""
    if os.name == "nt":
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        yield
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing for folders
                why = f"{error.strerror}. The new file is in place, and may be lost if the machine stops now"
                raise NotFlushedError(error.errno, why, str(path)) from error
    finally:
        os.close(folder)
