"""How many vectors of each array a thread of a GPU loads before it uses the first: as many as its memory needs.

A memory is busy while enough bytes are on their way. On a multiprocessor these are the threads that fit on it, times the bytes
that each loads before it waits. NVIDIA's CUB tunes its transforms by the bytes that each architecture needs
(`cc_to_min_bytes_in_flight` in cub/device/dispatch/tuning/tuning_transform.cuh, CCCL 3.5). How many threads fit follows from the
registers of a thread, so the machine code tells what a kernel has: `benchmarks/in_flight.py` and the tests read it.
"""

from gpuadam.kernels.operands import lanes_of, operands_of_form

KIB = 1024


def needed(capability):
    """Return the bytes in flight that CUB tunes for, on each multiprocessor. capability: of compute, (major, minor).

    An H100 needs 32 KiB, and an H200, of the same capability, 48.

    >>> needed((8, 0)) // 1024, needed((9, 0)) // 1024, needed((10, 0)) // 1024
    (16, 48, 64)
    """
    if is_rubin(capability):
        return 128 * KIB
    return next(n for least, n in ((10, 64 * KIB), (9, 48 * KIB), (8, 16 * KIB), (0, 12 * KIB)) if capability[0] >= least)


def is_rubin(capability):
    """Whether a GPU is of the Rubin architecture, whose multiprocessors hold 1,024 threads."""
    return (10, 7) <= tuple(capability) < (11, 0)


def loaded_bytes(form):
    """Return the bytes that a thread loads for one vector of each array, without the scales of groups.

    >>> from gpuadam import hyperparameters
    >>> from gpuadam.kernels.operands import Arrays
    >>> h = hyperparameters.checked(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    >>> loaded_bytes(hyperparameters.form_and_scalars(h, 1, Arrays())[0])  # param, grad, m and v
    64
    """
    return sum(o.itemsize * lanes_of(form) for o in operands_of_form(form) if o.loads and not o.of_groups)


def vectors_of(form, loop, capability, interleaves):
    """Return how many vectors of each array a thread takes at once.

    loop: of a `gpu_batch.GpuBatch`. interleaves: whether the compiler computes the lanes of a vector side by side, so that a
    thread of 8-bit state takes so many registers that too few threads fit.
    """
    if loop.startswith("strided"):
        return 1
    loaded, grouped, random = loaded_bytes(form), form.arrays.grouped, form.arrays.random
    if grouped:
        return 2 if interleaves and capability >= (9, 0) else 1
    if is_rubin(capability):  # a block of a table has 8 vectors a thread, which these numbers divide
        return 4 if loaded <= 112 else 2
    # without decay a change does not depend on the parameter, and compilers leave its load out
    thin = loaded <= 64 and (random or form.arrays.change != "")
    return 2 if capability >= (10, 0) and thin else 1
