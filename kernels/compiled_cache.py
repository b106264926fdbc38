"""Numba's cache on disk for kernels, so that one is compiled once per machine and not once per process.

Numba's own key of a function that closes over others is made of their pickles, which differ in every process. Here the key is
made of the kernel's rule and form, and the text of every file in this folder. Numba decides where the cache is (NUMBA_CACHE_DIR,
the `__pycache__` beside this file, or the user's cache folder), and replaces a file in it in one step.

To read a kernel is to run code. So a folder or file that another user could have written is not read, with a warning.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import stat
import warnings
from pathlib import Path

import llvmlite
import numba
from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.runtime import rtsys

from gpuadam.kernels import ownership

# Options of Numba for a kernel, and for a function that only kernels call. They have no wrappers for calls from C, or for inner
# functions from Python: these would take a quarter of the time of compiling. Numba's default error model tests every divisor for
# zero: a loop would not vectorise, and would raise half-way through the arrays.
KERNEL = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
INNER = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}


def stored(dispatcher, *key):
    """Return a Numba dispatcher with the cache on disk. key: tells it from others that the same lines make."""
    if numba.config.DISABLE_JIT:  # what njit returned is no dispatcher: the backend says so in its status
        return dispatcher
    with contextlib.suppress(RuntimeError):  # Numba's "no locator available", or ours: nothing is kept
        dispatcher._cache = KernelCache(dispatcher.py_func, (*map(repr, key), _sources()))
    return dispatcher


def kept(function, *key, **options):
    """Compile a function with the cache on disk. key: tells it from others of its name, if there are any. options: Numba's."""
    return stored(njit(**options)(named(function, *key) if key else function), function.__name__, *key)


def of_rule(dispatcher, rule, form):
    """Likewise for the kernel of a rule. One from outside this folder is not kept, because its text is not in the key."""
    in_this_folder = getattr(rule, "__name__", "").startswith(__package__ + ".")
    return stored(dispatcher, rule.__name__, form) if in_this_folder else dispatcher


def named(function, *key):
    """Give a function a name of its own for each key, and return it.

    Numba makes symbols of names and of numbers that start again in every process. Kernels of the same name that come from two
    processes would take each other's place when both are loaded.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    function.__name__ = f"{function.__name__}_{digest}"
    function.__qualname__ = f"{function.__qualname__}_{digest}"
    return function


inner = njit(**INNER)  # compiles a function that only kernels call, if it is the only one of its name in its file


def compiler(*key):
    """Return a function that compiles functions under the names of a key, by default those that only kernels call."""
    return lambda function, options=INNER: njit(**options)(named(function, *key))


def folder():
    """Return the folder where compiled kernels are kept, or None if none can be written by this user and by no other."""
    try:
        path = os.path.realpath(FunctionCache(stored).cache_path)
    except RuntimeError:  # no folder can be written
        return None
    return None if ownership.folder_of_others(path) else path


class KernelCache(FunctionCache):
    """As Numba's, but keyed by `key`; a cache that cannot be read or written costs time, and a warning at most."""

    def __init__(self, function, key):
        super().__init__(function)
        self._cache_path: str = os.path.realpath(self.cache_path)
        if why := ownership.folder_of_others(self._cache_path):
            _warn(self._cache_path, why)
            raise RuntimeError(why)
        name, stamp = self._impl.filename_base, self._impl.locator.get_source_stamp()
        self.key = (name, numba.__version__, llvmlite.__version__, stamp, key)
        self._cache_file = KernelFiles(self.cache_path, name, stamp)

    def _index_key(self, sig, codegen):
        return repr((sig, codegen.magic_tuple(), self.key)).encode()

    def load_overload(self, sig, target_context):
        # Numba makes ready to compile before it looks for what is compiled, for half of a first step's time: it learns all that
        # it can translate, and imports SciPy if that is installed. Machine code needs the manager of Numba's memory alone.
        rtsys.initialize(target_context)
        try:
            return self._load_overload(sig, target_context)
        except Exception:  # noqa: BLE001 - a damaged file fails in any way; the kernel is compiled again, and written again
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warnings.warn(
                f"compiled kernels cannot be kept in {self.cache_path} ({type(error).__name__}: {error}), so every process "
                "compiles them again. Set NUMBA_CACHE_DIR to a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )


class KernelFiles(IndexDataCacheFile):
    """A file for each key, named and checked by a hash.

    In Numba's, an index gives keys numbered files. Two processes that store at once may both take number 1, and a key is then
    answered with the other's kernel. And LLVM ends the process over code in which a crash of the machine has left zeros.
    """

    def load(self, key):
        path = Path(self._path(key))
        try:
            is_file = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            return None
        if why := ownership.of_others(path):  # put there while the folder was open to others
            _warn(self._cache_path, why)
            return None
        if not is_file:  # a pipe, which would be waited for
            raise ValueError("no file")
        content = path.read_bytes()
        checksum, data = content[:32], content[32:]
        if checksum != hashlib.sha256(key + data).digest():
            raise ValueError("damaged")
        return pickle.loads(data)

    def save(self, key, data):
        data = self._dump(data)
        with self._open_for_write(self._path(key)) as file:
            file.write(hashlib.sha256(key + data).digest() + data)

    def flush(self):
        """Nothing is kept beside the files."""

    def _path(self, key):
        return self._data_path(f"{Path(self._index_name).stem}.{hashlib.sha256(key).hexdigest()[:32]}.nbc")


@functools.cache
def _warn(folder, why):
    """Warn once of each folder."""
    warnings.warn(
        f"compiled kernels in {folder} are not read, because they would run as you, and {why}. They are compiled again. Set "
        "NUMBA_CACHE_DIR to a folder of your own to which no other user can write, or mend this one with chown and chmod go-w",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def _sources():
    files = sorted(Path(__file__).parent.glob("*.py"))
    if not files:
        raise RuntimeError("no text to tell this version's kernels from another's")  # in a zip archive, for example
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


with contextlib.suppress(RuntimeError):
    _sources()  # now, while the files are those that Python has just read
