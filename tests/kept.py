"""What is compiled for the tests, kept between runs and shared by the processes of one: in the user's cache folder.

    text = kept.text("ptx", (source, options, version), compile)

A file is found by the hash of everything that it is made of, and by nothing else. It says its own hash, so that one that is cut
short or changed is made again; so is one that cannot be read, and where nothing can be written all is made in every process.
What another user could have written is not taken, because the tests execute it.
GPUADAM_TEST_CACHE is another folder, or "" for none.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from pathlib import Path

from gpuadam.kernels import ownership

UNUSED_FOR = 14 * 86400  # seconds after which a file is deleted


@functools.cache
def folder():
    """Return the folder, or None."""
    given = os.environ.get("GPUADAM_TEST_CACHE")
    if given == "":
        return None
    path = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuadam-tests")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return None if ownership.folder_of_others(os.path.realpath(path)) else path


def get(kind, key):
    """Return the bytes that were put there for a key, a tuple of texts, or None."""
    if folder() is None:
        return None
    path, digest = _path(kind, key)
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if content[:32] == _seal(digest, content[32:]) and not ownership.of_others(path):
            with contextlib.suppress(OSError):  # of another user
                os.utime(path)
            return content[32:]
    return None


def put(kind, key, content):
    """Keep bytes for a key."""
    if folder() is not None:
        path, digest = _path(kind, key)
        with contextlib.suppress(OSError):  # a full disk: the next process makes it again
            _write(path, _seal(digest, content) + content)


def data(kind, key, make):
    """Return the bytes that `make` returns for a key, or those that it returned in an earlier run."""
    found = get(kind, key)
    if found is None:
        found = make()
        put(kind, key, found)
    return found


def text(kind, key, make):
    """Likewise of a text."""
    return data(kind, key, lambda: make().encode()).decode()


def _path(kind, key):
    digest = hashlib.sha256(repr((kind, key)).encode()).hexdigest()
    return folder() / f"{kind}-{digest}", digest


def _seal(digest, content):
    return hashlib.sha256(digest.encode() + content).digest()


def _write(path, content):
    """Put a file in its place in one step, so that no process reads half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="new-", delete=False) as file:
        try:
            file.write(content)
            file.close()
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def tidy():
    """Delete what no run has used for two weeks."""
    if folder() is None:
        return
    for path in folder().iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_FOR:
                path.unlink()
