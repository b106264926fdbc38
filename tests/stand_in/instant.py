"""Answers of the driver in no time: what a step asks each time is answered by compiled C, and no kernel runs.

    with instant.answers(driver):
        ...   # the host's time of a call is now that of CuPy's, Numba's and gpuadam's code

The stand-in's own functions are Python and take some microseconds each; these take nanoseconds. Nothing that is enqueued is done,
so arrays keep their numbers. `benchmarks/host_time.py` measures so without a GPU.
"""

import contextlib
import ctypes
import functools
import pathlib
import subprocess
import tempfile

from .driver import CONTEXT_AT
from .library import NoCompilerError, compiler
from .runtime import PREFIX

# The body of each function in C; a and b are its first two arguments
NOTHING, DEVICE = "return 0;", "*(int*)a = 0; return 0;"
CONTEXT, EVENT = f"*(unsigned long long*)a = {CONTEXT_AT}ull; return 0;", "*(unsigned long long*)a = 0x7e57; return 0;"
BODIES = {
    "cuLaunchKernel": NOTHING,
    "cuLaunchKernelEx": NOTHING,
    "cuEventCreate": EVENT,
    "cuEventRecord": NOTHING,
    "cuEventQuery": NOTHING,
    "cuEventDestroy_v2": NOTHING,
    "cuStreamWaitEvent": NOTHING,
    "cuStreamIsCapturing": "*(int*)b = 0; return 0;",
    "cuStreamGetId": "*(unsigned long long*)b = (unsigned long long)a; return 0;",
    "cuCtxGetCurrent": CONTEXT,
    "cuCtxGetDevice": DEVICE,
    "cuCtxGetDevice_v2": DEVICE,
    PREFIX + "cudaGetDevice": DEVICE,
    PREFIX + "cudaSetDevice": NOTHING,
    PREFIX + "cudaStreamIsCapturing": "*(int*)b = 0; return 0;",
    PREFIX + "cudaEventRecord": NOTHING,
}


@functools.cache
def _functions():
    """Return name -> address of the functions in C."""
    cc = compiler()
    if cc is None:
        raise NoCompilerError("no C compiler (cc, gcc or clang): it makes the answers of the driver")
    source = "".join(f"int instant_{name}(void* a, void* b) {{ {body} }}\n" for name, body in BODIES.items())
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "instant.so"
        subprocess.run([cc, "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", path], input=source, text=True, check=True)
        library = ctypes.CDLL(str(path))  # which stays loaded when the file is gone
    return {name: ctypes.cast(getattr(library, f"instant_{name}"), ctypes.c_void_p).value for name in BODIES}


@contextlib.contextmanager
def answers(driver):
    """Let C answer in the place of a Driver, whose enqueued work is done first."""
    functions = _functions()
    problems = driver.end()
    if problems:
        raise RuntimeError(f"before: {problems}")
    with driver.library.led_to(functions):
        yield
