"""A pool for CuPy's arrays that shows what CuPy's own hides.

CuPy's pool rounds sizes up, and gives out again what was freed, in the order of the stream that it was allocated on. Here each
array is an allocation of its own, which ends where the array does, and is no more once what was on that stream before it was freed
is done. So an access beyond an array, or after its end, is seen.
"""

import functools



@functools.cache
def take_over(driver):
    """Make CuPy allocate here."""
    import cupy

    def current():
        return cupy.cuda.get_current_stream().ptr

    allocator = cupy.cuda.PythonFunctionAllocator(
        lambda n_bytes, device: _allocate(driver, cupy, n_bytes, current()), lambda address, device: _free(driver, address)
    )
    cupy.cuda.set_allocator(allocator.malloc)
    return allocator


def _allocate(driver, cupy, n_bytes, handle):
    """Allocate by cudaMalloc, as a pool that has to grow, or at the place of something freed, once that is free on the stream."""
    if not n_bytes:
        return 0
    with driver.lock:
        stream = driver.stream(handle)
        again = driver.work.seed and not driver.captures and driver.chance()
        runtime = cupy.cuda.runtime
        address = runtime.mallocAsync(n_bytes, handle) if again else runtime.malloc(n_bytes)
        driver.memory.block(address).stream = stream
        return address


def _free(driver, address):
    if driver.closed:  # Python ends, and what it still held is freed
        return
    with driver.lock:
        block = driver.memory.block(address)
        arena = driver.memory.arena(address)
        before = driver.work.before(block.stream)
        block.freed = True
        driver.work.operation(lambda: arena.close(block), f"the end of {block}", before)


