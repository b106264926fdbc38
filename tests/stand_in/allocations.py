"""What is allocated and freed, and what is known of an address."""

import ctypes

from . import memory
from .driver import I32, U32, U64, Failure, entry
from .library import write


@entry("cuMemAlloc_v2", "pn", unsafe=True)
def mem_alloc(d, out, n_bytes):
    d.allocate_now(out, d.device, n_bytes, "cuMemAlloc")


@entry("cuMemFree_v2", "p", unsafe=True)
def mem_free(d, address):
    d.free(address, False)


@entry("cuMemAllocHost_v2", "pn", unsafe=True)
def mem_alloc_host(d, out, n_bytes):
    d.allocate_now(out, memory.HOST, n_bytes, "cuMemAllocHost")


@entry("cuMemHostAlloc", "pnu", unsafe=True)
def mem_host_alloc(d, out, n_bytes, flags):
    d.allocate_now(out, memory.HOST, n_bytes, "cuMemHostAlloc")


@entry("cuMemAllocManaged", "pnu", unsafe=True)
def mem_alloc_managed(d, out, n_bytes, flags):
    d.allocate_now(out, d.device, n_bytes, "cuMemAllocManaged")  # a device's memory is the host's in any case


@entry("cuMemFreeHost", "p", unsafe=True)
def mem_free_host(d, address):
    d.free(address, True)


@entry("cuMemHostRegister_v2", "pnu", unsafe=True)
def host_register(d, address, n_bytes, flags):
    if d.memory.is_pinned(address, n_bytes):
        raise Failure("HOST_MEMORY_ALREADY_REGISTERED")
    d.memory.registered[address] = n_bytes


@entry("cuMemHostUnregister", "p", unsafe=True)
def host_unregister(d, address):
    if address not in d.memory.registered:
        raise Failure("HOST_MEMORY_NOT_REGISTERED")
    d.work.finish(list(d.work.pending.values()))
    del d.memory.registered[address]


@entry("cuMemHostGetDevicePointer_v2", "ppu")
def host_device_pointer(d, out, address, flags):
    if not d.memory.is_pinned(address, 1):
        raise Failure("INVALID_VALUE")
    write(out, U64, address)


@entry("cuMemHostGetFlags", "pp")
def host_flags(d, out, address):
    if not d.memory.is_pinned(address, 1):
        raise Failure("INVALID_VALUE")
    write(out, U32, 2)


@entry("cuMemGetInfo_v2", "pp")
def mem_info(d, free, total):
    write(free, U64, d.memory.total - d.memory.devices[d.device].used)
    write(total, U64, d.memory.total)


@entry("cuMemGetAddressRange_v2", "ppp")
def address_range(d, base, size, address):
    block = d.memory.block(address)
    if block is None:
        raise Failure("NOT_FOUND")
    write(base, U64, block.address)
    write(size, U64, block.n_bytes)


@entry("cuMemAllocAsync", "pnp")
def mem_alloc_async(d, out, n_bytes, stream):
    _allocate_in_order(d, out, n_bytes, stream)


@entry("cuMemAllocFromPoolAsync", "pnpp")
def mem_alloc_from_pool(d, out, n_bytes, pool, stream):
    _allocate_in_order(d, out, n_bytes, stream)


def _allocate_in_order(d, out, n_bytes, handle):
    stream = d.stream(handle)
    if stream.capture is not None:  # CUDA makes it a node of the graph; nothing here does so
        stream.capture.invalid = True
        raise Failure("STREAM_CAPTURE_UNSUPPORTED")
    if not n_bytes:
        raise Failure("INVALID_VALUE")
    block = d.allocate(stream.device, n_bytes, "cuMemAllocAsync", again=d.work.seed != 0)
    arena = d.memory.arena(block.address)
    d.work.enqueue(stream, lambda: arena.open(block), f"the start of {block}", always=True)
    write(out, U64, block.address)


@entry("cuMemFreeAsync", "pp")
def mem_free_async(d, address, handle):
    stream = d.stream(handle)
    block = d.block_to_free(address, False)
    arena = d.memory.arena(address)
    d.work.enqueue(stream, lambda: arena.close(block), f"the end of {block}", always=True)
    block.freed = True


POOL_AT = 0xB0000000  # the handle of device 0's pool


@entry("cuDeviceGetDefaultMemPool", "pi")
def default_pool(d, out, device):
    write(out, U64, POOL_AT + device)


@entry("cuDeviceGetMemPool", "pi")
def current_pool(d, out, device):
    write(out, U64, POOL_AT + device)


@entry("cuMemPoolGetAttribute", "pip")
def pool_attribute(d, pool, attribute, out):
    write(out, U64, d.memory.devices[pool - POOL_AT].used)


@entry("cuMemPoolSetAttribute", "pip")
def set_pool_attribute(d, pool, attribute, value):
    pass


@entry("cuMemPoolTrimTo", "pn")
def pool_trim(d, pool, n_bytes):
    pass


MEMORY_TYPE_HOST, MEMORY_TYPE_DEVICE = 1, 2


@entry("cuPointerGetAttribute", "pip")
def pointer_attribute(d, out, attribute, address):
    block = d.memory.block(address)
    if block is None and not d.memory.is_pinned(address, 1):
        raise Failure("INVALID_VALUE")
    return _pointer_attribute(d, out, attribute, address, block)


@entry("cuPointerGetAttributes", "uppp")
def pointer_attributes(d, n, attributes, outs, address):
    """Of memory that it does not know, this call says zeros."""
    block = d.memory.block(address)
    for k in range(n):
        attribute = I32.from_address(attributes + 4 * k).value
        _pointer_attribute(d, U64.from_address(outs + 8 * k).value, attribute, address, block)


def _pointer_attribute(d, out, attribute, address, block):
    on_device = block is not None and block.device != memory.HOST
    known = on_device or d.memory.is_pinned(address, 1)
    start = block.address if block else address
    values = {
        1: (U64, d.context_of(block.device) if on_device else d.contexts[-1] if known and d.contexts else 0),  # CONTEXT
        2: (U32, MEMORY_TYPE_DEVICE if on_device else MEMORY_TYPE_HOST if known else 0),
        3: (U64, address if known else 0),  # DEVICE_POINTER
        4: (U64, address if known and not on_device else 0),  # HOST_POINTER
        7: (U64, block.number if block else 0),  # BUFFER_ID
        8: (ctypes.c_ubyte, 0),  # IS_MANAGED
        9: (I32, block.device if on_device else 0 if known else -2),  # DEVICE_ORDINAL
        11: (U64, start),
        12: (U64, block.n_bytes if block else 0),
        13: (ctypes.c_ubyte, int(known)),  # MAPPED
        17: (U64, 0),  # MEMPOOL_HANDLE
    }
    if attribute not in values:
        d.problem(f"the pointer attribute {attribute} was asked for, which the stand-in does not have")
        raise Failure("INVALID_VALUE")
    write(out, *values[attribute])
