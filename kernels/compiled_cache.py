"""Numba's cache on disk for kernels, so that one is compiled once per machine and not once per process.

Numba's own key of a function that closes over others is made of their pickles, which differ in every process. Here the key is
what a kernel is made of: its rule and form, and the text of every file in this folder. Where the cache is (NUMBA_CACHE_DIR, the
`__pycache__` beside this file, or the user's cache folder), and that a file in it is replaced in one step, are Numba's.
"""

import contextlib
import functools
import hashlib
import warnings
from pathlib import Path

from numba.core.caching import FunctionCache


def stored(dispatcher, *key):
    """Return a Numba dispatcher with the cache on disk. key: what tells it from others made by the same lines."""
    with contextlib.suppress(RuntimeError):  # Numba's "no locator available": no folder can be written, so nothing is kept
        dispatcher._cache = KernelCache(dispatcher.py_func, (*map(repr, key), _sources()))
    return dispatcher


def of_rule(dispatcher, rule, form):
    """Likewise for the kernel of a rule, if the rule is one of this folder: another one's text is not in the key."""
    own = getattr(rule, "__name__", "").startswith(__package__ + ".")
    return stored(dispatcher, rule.__name__, form) if own else dispatcher


class KernelCache(FunctionCache):
    """As Numba's, but keyed by `key`; a cache that cannot be read or written costs time, and a warning at most."""

    def __init__(self, function, key):
        super().__init__(function)
        self.key = key

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), self.key

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001 - a damaged file fails in any way; it is compiled again, and written again
            self._warn("read", error)
            self._forget()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self._warn("written", error)

    def _forget(self):
        try:
            self.flush()
        except OSError as error:
            self._warn("written", error)

    def _warn(self, what, error):
        warnings.warn(
            f"the cache of compiled kernels in {self.cache_path} cannot be {what} ({type(error).__name__}: {error}); kernels are "
            "compiled again in every process. Set NUMBA_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def _sources():
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
