"""Files that are known to be regular: no pipe that would be waited for, no device, and no link to what is another's."""

import contextlib
import errno
import gc
import os
import stat
import warnings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NOT_REGULAR = "it is a folder, a link, a device, a pipe or a socket, and must be a regular file"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of some network file systems


def opened(path, flags=os.O_RDONLY, mode=0o666, *, follow=False):
    """Open a regular file, without waiting for anything, and return it as a binary file.

    flags, mode: as of os.open. follow: a symbolic link to a regular file is taken too.
    Raises FileExistsError where something else is in the file's place, and OSError as os.open does.

    >>> opened(os.devnull)
    Traceback (most recent call last):
    FileExistsError: [Errno 17] it is a folder, a link, a device, a pipe or a socket, and must be a regular file: '/dev/null'
    """
    for name in ("O_NONBLOCK", "O_BINARY", *(() if follow else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)  # O_BINARY is of Windows, which lacks the others
    try:
        number = os.open(path, flags, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):  # a link, a pipe or a socket, a folder
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _not_regular(path)
    return os.fdopen(number, "r+b" if flags & os.O_RDWR else "rb")


def check_regular(path):
    """Return the status of the regular file at a path, None if nothing is there. Raises FileExistsError for anything else."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(path)
    return status


def _not_regular(path):
    return FileExistsError(errno.EEXIST, NOT_REGULAR, str(path))


def locked(path, hold=None):
    """Return a file that is locked until `unlock`, or until the process ends. It is created if it is not there.

    hold: called with the file before it is locked, so that an interrupt afterwards leaves none that nobody unlocks.
    Raises BlockingIOError if it is locked already, by any process or host. A file system that has no locks is warned of.
    """
    file = opened(path, os.O_RDWR | os.O_CREAT)
    if hold:
        hold(file)
    try:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                gc.collect()  # a call of this process that was interrupted may have left its file open, and garbage
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, file):  # the process that had the lock has deleted the file: others would lock a new one
                file.close()
                return locked(path, hold)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        why = f"{path} cannot be locked ({error.strerror}), so nothing notices another job with the same folder"
        warnings.warn(f"{why}: give each job a folder of its own", RuntimeWarning, stacklevel=3)
    return file


def _is_at(path, file):
    """Whether an open file is the one at a path."""
    status = check_regular(path)
    return status is not None and os.path.samestat(status, os.fstat(file.fileno()))


def unlock(file):
    """Unlock and close a file of `locked`, if it is open."""
    if fcntl and not file.closed:
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)  # closing it would leave the lock to processes that were forked meanwhile
    file.close()
