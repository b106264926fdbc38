"""Which files on disk no other user can have written, so that they may be executed or unpickled.

Trusted are this user, root, and the owner of this file, whose code runs here anyway. Windows is trusted: its folders belong to
their users unless one has opened them.
"""

import contextlib
import functools
import os
import stat
import sys
from pathlib import Path

if sys.platform != "win32":
    import grp
    import pwd


@functools.cache
def folder_of_others(path):
    """Return how another user could change what is in a folder, in words, or "" if nobody can.

    A folder above it may be writable for all if its sticky bit is set, as /tmp is: there nobody can rename the folders of
    others. Folders above this file and above the home folder are not examined: who can write there can change this code, too.

    path: without symbolic links, whose targets may change: `os.path.realpath`.
    """
    if os.name == "nt":
        return ""
    above = set(_source().parents)
    with contextlib.suppress(RuntimeError):  # there is no home folder
        above |= set(Path(os.path.realpath(Path.home())).parents)
    examined = [folder for folder in (path, *Path(path).parents) if folder == path or folder not in above]
    return next(filter(None, (of_others(folder, sticky=folder != path) for folder in examined)), "")


def of_others(path, sticky=False):
    """Return how another user could change a file or folder, in words, or "". sticky: whether the sticky bit is enough.

    A symbolic link is not followed.
    """
    if os.name == "nt":
        return ""
    try:
        status = os.lstat(path)
    except OSError as error:
        return f"{path} cannot be examined ({error.strerror})"
    if status.st_uid not in (0, os.geteuid(), _source().stat().st_uid):
        return f"{path} belongs to another user ({status.st_uid})"
    shared = status.st_mode & stat.S_IWOTH or (
        status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid, status.st_uid)
    )
    if shared and not stat.S_ISLNK(status.st_mode) and not (sticky and status.st_mode & stat.S_ISVTX):
        return f"other users may write to {path} (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


@functools.cache
def _source():
    return Path(os.path.realpath(__file__))


@functools.cache
def _is_private(group, user):
    """Return whether a group is that of one user alone, as where the umask is 002."""
    try:
        name, entry = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and not set(entry.gr_mem) - {name}
