"""A stand-in for the CUDA driver: the real CuPy, numba-cuda and cuda-bindings run to the end on a machine with no GPU.

    driver = stand_in.start()      # before CuPy and numba-cuda are used

`GPUADAM_GPU=host pytest -m gpu` does so for the tests. Kernels are the PTX that these libraries compile and load, executed on the
host by `ptx.py`. Here

- `driver.py` has the state, and how a call goes;
- `starting`, `devices`, `allocations`, `copies`, `ordering`, `capturing` and `loading` have the functions of libcuda, and
  `runtime.py` those of CuPy's runtime;
- `memory.py` says what may be touched, `work.py` in which order things are done, `graphs.py` what a capture forbids;
- `kernels.py` executes, and `library.py` is the library that the others open.

What it shows: that our launch path calls these libraries as they are to be called, waits for what it has to wait for, and touches
what is its own. It knows no time, no chip, and none of torch's CUDA. It loads modules at once, where CUDA since 12.2 waits for
the first launch, and CuPy's arrays come from `malloc_async`, not from CuPy's MemoryPool.
"""

import atexit
import functools
import importlib
import os

from .library import NoCompilerError


@functools.cache
def start():
    """Put a Driver in libcuda's place, for the rest of the process, and return it."""
    os.environ["CUPY_COMPILE_WITH_PTX"] = "1"  # machine code is not executed here
    os.environ["CUPY_ACCELERATORS"] = ""  # nor is CUB's, which CuPy has compiled in
    from . import library, runtime
    from .driver import Driver

    driver = Driver()
    driver.library = library.Library(driver.functions())
    driver.library.missing = driver.missing
    atexit.register(driver.close)
    runtime.lead_here(driver.library)
    cuda = importlib.import_module("cupy").cuda
    cuda.set_allocator(cuda.malloc_async)
    driver.work.reseed(int(os.environ.get("GPUADAM_SEED", "0")))
    return driver


def start_or_say_why_not():
    """Return the Driver and "", or None and why there is none: no C compiler, which under CI is an error."""
    try:
        return start(), ""
    except NoCompilerError as error:
        if os.environ.get("CI") == "true":
            raise
        return None, str(error)
