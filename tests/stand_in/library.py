"""The shared library that takes libcuda's place: exported names that jump to functions of Python.

CuPy, the CUDA runtime, cuda-bindings and numba-cuda open `libcuda.so.1` and ask it for functions by name. A library of that name
that is loaded before is what they get.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

from gpuadam.kernels import ownership

KINDS = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_size_t,
    "u": ctypes.c_uint,
    "i": ctypes.c_int,
    "b": ctypes.c_ubyte,
    "h": ctypes.c_ushort,
}
# `name` jumps to the address in its slot. When Python has gone, that is `gone`: there is nothing left that could be freed.
SOURCE = """
int gone(void) {{ return 0; }}
void *slots[{n}] = {{ {gone} }};
__asm__(".text\\n"
{jumps}
);
"""


class NoCompilerError(Exception):
    """There is nothing that makes a shared library."""


def compiler():
    """Return the path of the C compiler, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


@functools.cache
def build(names):
    """Return the loaded library, with a slot for each name."""
    jumps = "\n".join(
        f'".globl {name}\\n.type {name},@function\\n{name}: jmp *slots+{8 * k}(%rip)\\n"' for k, name in enumerate(names)
    )
    source = SOURCE.format(n=len(names), gone=", ".join(["gone"] * len(names)), jumps=jumps)
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = pathlib.Path(tempfile.gettempdir()) / f"gpuadam-stand-in-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if why := ownership.folder_of_others(os.path.realpath(folder)):
        raise PermissionError(f"a library in {folder} would run as you, and {why}: set TMPDIR to a folder of your own")
    path = folder / f"libcuda-{key}.so.1"
    if not path.exists():
        cc = compiler()
        if cc is None:
            raise NoCompilerError(
                "no C compiler (cc, gcc or clang): it makes the library that stands in for the CUDA driver"
            )
        with tempfile.TemporaryDirectory(dir=folder) as made:
            part = pathlib.Path(made) / "libcuda.so.1"
            command = [cc, "-shared", "-fPIC", "-x", "c", "-", "-o", part, "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic"]
            subprocess.run(command, input=source, text=True, check=True)
            part.replace(path)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)


class Library:
    """Functions by their names in cuda.h, as C calls them."""

    def __init__(self, functions):
        """functions: name -> (kinds of its arguments, a function of Python that returns a CUresult; None where C returns 0)."""
        self._names = tuple(sorted(functions))
        self._library = build(self._names)
        self._slots = (ctypes.c_void_p * len(self._names)).in_dll(self._library, "slots")
        self._gone = ctypes.cast(self._library.gone, ctypes.c_void_p).value
        self._kept = [function and self.pointer(kinds, function) for kinds, function in map(functions.get, self._names)]
        self.addresses = {}
        for k, (name, function) in enumerate(zip(self._names, self._kept, strict=True)):
            self._slots[k] = ctypes.cast(function, ctypes.c_void_p).value if function else self._gone
            self.addresses[name] = ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value

    @staticmethod
    def pointer(kinds, function):
        """Return a C function. kinds: letters of KINDS, one for each argument; after a ">" the result's, which else is an int."""
        arguments, _, result = kinds.partition(">")
        return ctypes.CFUNCTYPE(KINDS[result or "i"], *(KINDS[kind] for kind in arguments))(function)

    @contextlib.contextmanager
    def led_to(self, functions):
        """Let other functions answer for a while. functions: name -> address, of those names that there are."""
        before = list(self._slots)
        for k, name in enumerate(self._names):
            self._slots[k] = functions.get(name, before[k])
        yield
        self._slots[:] = before

    def close(self):
        """Answer no more: Python ends."""
        self._slots[:] = [self._gone] * len(self._names)


def write(address, kind, value):
    """Write a C number at an address; a null pointer asks for nothing."""
    if address:
        kind.from_address(address).value = value
