"""A file that is replaced whole or not at all, and is on the disk when that is done."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Open a new binary file that takes the place of `path` when the block ends without an error.

    It is written beside the file, as ".gpuadam-", random digits and ".tmp", flushed to the disk and renamed; then the folder is
    flushed. On an error it is removed and the old file is as it was; after a kill it is left, and nothing reads it. A symbolic
    link stays one: what it leads to is replaced. The file has the mode of the umask.

    Raises OSError, and nothing has changed then. Only if the last flush, of the folder, fails is the new file in place.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a")
    >>> with replacing(path) as file:
    ...     _ = file.write(b"new")
    >>> path.read_bytes()
    b'new'
    """
    target = Path(os.path.realpath(path))
    _check_target(target)
    with _folder(target.parent) as flush_folder:
        temporary = target.parent / f".gpuadam-{secrets.token_hex(8)}.tmp"
        file = os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "w+b")
        try:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):  # of what could not be written before; that error is the one to report
                    file.close()
                raise
            file.close()
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder()


def _check_target(target):
    """Refuse to replace what is no file, before anything is written."""
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if not stat.S_ISREG(mode):
            raise FileExistsError(errno.EEXIST, "it is a device, a pipe or a socket", str(target))


@contextlib.contextmanager
def _folder(path):
    """Open a folder, and yield the function that flushes it. Windows flushes folders by itself."""
    if os.name == "nt":
        yield lambda: None
        return
    folder = os.open(path, os.O_RDONLY)

    def flush():
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing for folders
                raise

    try:
        yield flush
    finally:
        os.close(folder)
