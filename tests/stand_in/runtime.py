"""The CUDA runtime of CuPy, over the stand-in's driver.

CuPy's wheel has the runtime inside `cupy_backends.cuda.api.runtime`, which starts only on NVIDIA's own driver. So the functions
of its documented interface that CuPy calls are led here, in the memory of this process, by a jump at the start of each. All that
CuPy itself does is the wheel's own code.
"""

import ctypes
import functools
import importlib
import mmap
import struct
from pathlib import Path

from . import allocations, capturing, copies, devices, driver, loading, ordering, starting  # noqa: F401 - for ENTRIES
from .driver import I32, U64, entry
from .library import write

PREFIX = "runtime_"  # of the names here, so that no other library takes them for its own


def runtime(name, kinds, **options):
    return entry(PREFIX + name, kinds, **options)


def device(d):
    """Return the number of this thread's device, which is 0 until it chooses."""
    if not d.contexts or not d.contexts[-1]:
        d.contexts.append(d.context_of(0))
    return d.device


def ready(function):
    """Make a device current before a function that needs one."""

    @functools.wraps(function)
    def call(d, *arguments):
        device(d)
        return function(d, *arguments)

    return call


def same(name, of, kinds, **options):
    """A function of the runtime that is one of the driver."""
    options.setdefault("unsafe", of in driver.UNSAFE)
    runtime(name, kinds, **options)(ready(driver.ENTRIES[of][1]))


@runtime("cudaGetDeviceCount", "p", counted=False)
def get_device_count(d, out):
    write(out, I32, d.n_devices)


@runtime("cudaGetDevice", "p", counted=False)
def get_device(d, out):
    write(out, I32, device(d))


@runtime("cudaSetDevice", "i", counted=False)
def set_device(d, number):
    devices.context_set(d, d.context_of(number))


@runtime("cudaRuntimeGetVersion", "p", counted=False)
def runtime_version(d, out):
    write(out, I32, driver.VERSION)


@runtime("cudaGetLastError", "", counted=False)
def last_error(d):
    return 0


@functools.cache
def _errors():
    from cuda.bindings import runtime

    return {int(error): error.name for error in runtime.cudaError_t}


def _text(function):
    @functools.cache
    def pointer(code):
        return ctypes.create_string_buffer(function(_errors().get(code, "cudaErrorUnknown")).encode())

    return lambda d, code: ctypes.addressof(pointer(code))


runtime("cudaGetErrorName", "i>p", counted=False)(_text(str))
runtime("cudaGetErrorString", "i>p", counted=False)(_text(lambda name: f"{name}, says gpuadam's stand-in for the driver"))


NAME_BYTES, PROPERTIES_BYTES, MEMORY_AT = 256, 720, 288  # of cudaDeviceProp, whose rest is zeros


@runtime("cudaGetDeviceProperties", "pi")
def device_properties(d, out, number):
    ctypes.memset(out, 0, PROPERTIES_BYTES)
    ctypes.memmove(out, driver.NAME, len(driver.NAME))
    write(out + MEMORY_AT, U64, d.memory.total)


same("cudaDriverGetVersion", "cuDriverGetVersion", "p", counted=False)
same("cudaDeviceGetAttribute", "cuDeviceGetAttribute", "pii", counted=False)
same("cudaDeviceGetPCIBusId", "cuDeviceGetPCIBusId", "pii")
same("cudaDeviceCanAccessPeer", "cuDeviceCanAccessPeer", "pii")
same("cudaDeviceSynchronize", "cuCtxSynchronize", "")
same("cudaDeviceGetDefaultMemPool", "cuDeviceGetDefaultMemPool", "pi")
same("cudaDeviceGetMemPool", "cuDeviceGetMemPool", "pi")
same("cudaMemPoolGetAttribute", "cuMemPoolGetAttribute", "pip")
same("cudaMemPoolSetAttribute", "cuMemPoolSetAttribute", "pip")
same("cudaMemPoolTrimTo", "cuMemPoolTrimTo", "pn")
same("cudaProfilerStart", "cuProfilerStart", "")
same("cudaProfilerStop", "cuProfilerStop", "")
same("cudaMemGetInfo", "cuMemGetInfo_v2", "pp")
same("cudaMalloc", "cuMemAlloc_v2", "pn")
same("cudaFree", "cuMemFree_v2", "p")
same("cudaHostAlloc", "cuMemHostAlloc", "pnu")
same("cudaFreeHost", "cuMemFreeHost", "p")
same("cudaHostRegister", "cuMemHostRegister_v2", "pnu")
same("cudaHostUnregister", "cuMemHostUnregister", "p")
same("cudaStreamCreateWithFlags", "cuStreamCreate", "pu")
same("cudaStreamCreateWithPriority", "cuStreamCreateWithPriority", "pui")
same("cudaStreamDestroy", "cuStreamDestroy_v2", "p")
same("cudaStreamGetFlags", "cuStreamGetFlags", "pp")
same("cudaStreamGetPriority", "cuStreamGetPriority", "pp")
same("cudaStreamQuery", "cuStreamQuery", "p")
same("cudaStreamSynchronize", "cuStreamSynchronize", "p")
same("cudaStreamWaitEvent", "cuStreamWaitEvent", "ppu")
same("cudaStreamBeginCapture", "cuStreamBeginCapture_v2", "pi")
same("cudaStreamEndCapture", "cuStreamEndCapture", "pp")
same("cudaStreamIsCapturing", "cuStreamIsCapturing", "pp")
same("cudaLaunchHostFunc", "cuLaunchHostFunc", "ppp")
same("cudaEventCreateWithFlags", "cuEventCreate", "pu")
same("cudaEventDestroy", "cuEventDestroy_v2", "p")
same("cudaEventElapsedTime", "cuEventElapsedTime_v2", "ppp")
same("cudaEventQuery", "cuEventQuery", "p")
same("cudaEventRecord", "cuEventRecord", "pp")
same("cudaEventSynchronize", "cuEventSynchronize", "p")
same("cudaGraphInstantiate", "cuGraphInstantiateWithFlags", "ppn")
same("cudaGraphLaunch", "cuGraphLaunch", "pp")
same("cudaGraphUpload", "cuGraphUpload", "pp")
same("cudaGraphDestroy", "cuGraphDestroy", "p")
same("cudaGraphExecDestroy", "cuGraphExecDestroy", "p")


@runtime("cudaEventCreate", "p")
@ready
def event_create(d, out):
    return ordering.event_create(d, out, 0)


@runtime("cudaStreamCreate", "p")
@ready
def stream_create(d, out):
    return ordering.stream_create(d, out, 0)


@runtime("cudaDeviceEnablePeerAccess", "iu")
@ready
def enable_peer(d, peer, flags):
    return devices.enable_peer(d, d.context_of(peer), flags)


@runtime("cudaMemcpy", "ppni", unsafe=True)
@ready
def memcpy(d, to, source, n_bytes, kind):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@runtime("cudaMemcpyAsync", "ppnip")
@ready
def memcpy_async(d, to, source, n_bytes, kind, stream):
    d.copy_async(to, source, n_bytes, stream)


@runtime("cudaMemcpyPeer", "pipin", unsafe=True)
@ready
def memcpy_peer(d, to, to_device, source, source_device, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@runtime("cudaMemcpyPeerAsync", "pipinp")
@ready
def memcpy_peer_async(d, to, to_device, source, source_device, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@runtime("cudaMemset", "pin", unsafe=True)
@ready
def memset(d, to, value, n_bytes):
    d.fill(to, bytes([value & 0xFF]), n_bytes, 0)


@runtime("cudaMemsetAsync", "pinp")
@ready
def memset_async(d, to, value, n_bytes, stream):
    d.fill(to, bytes([value & 0xFF]), n_bytes, stream)


# A pool for CuPy's arrays. CuPy's own rounds sizes up and gives out again what was freed, in the order of the stream that it was
# allocated on: here each array ends where it ends, and is no more once what was on that stream before its end is done. So an
# access beyond an array, or after its end, is seen. `cupy.cuda.malloc_async` leads CuPy's arrays here.


@runtime("cudaMallocAsync", "pnp", unsafe=True)  # a pool that has to grow calls cudaMalloc
@ready
def pool_allocate(d, out, n_bytes, handle):
    stream = d.stream(handle)
    again = d.work.seed != 0 and stream.capture is None
    block = d.allocate(stream.device, n_bytes, "CuPy's pool", again)
    block.stream, arena = stream, d.memory.arena(block.address)
    if block.again:
        d.work.enqueue(stream, lambda: arena.open(block), f"the start of {block}", always=True)
    else:
        arena.open(block)
    write(out, U64, block.address)


@runtime("cudaFreeAsync", "pp")
@ready
def pool_free(d, address, handle):
    block = d.block_to_free(address, False)
    # not through `enqueue`: what is freed while a graph is captured is no part of the graph
    d.work.enqueue(block.stream, lambda: d.memory.arena(address).close(block), f"the end of {block}", always=True)
    block.freed = True


class PointerAttributes(ctypes.Structure):
    """cudaPointerAttributes."""

    _fields_ = (("type", I32), ("device", I32), ("device_pointer", U64), ("host_pointer", U64))


@runtime("cudaPointerGetAttributes", "pp")
@ready
def pointer_attributes(d, out, address):
    block = d.memory.block(address)
    on_device = block is not None and block.device >= 0
    known = on_device or d.memory.is_pinned(address, 1)
    at = PointerAttributes.from_address(out)
    at.type = allocations.MEMORY_TYPE_DEVICE if on_device else allocations.MEMORY_TYPE_HOST if known else 0
    at.device = block.device if on_device else d.device if known else -2
    at.device_pointer, at.host_pointer = address if known else 0, 0 if on_device else address


# What leads CuPy here

MODULE = "cupy_backends.cuda.api.runtime"
JUMP = b"\xff\x25\0\0\0\0"  # jmp to the address that follows


def lead_here(library):
    """Make the functions of the runtime in CuPy's module jump to those of a Library."""
    module = importlib.import_module(MODULE)
    symbols = _symbols(module.__file__)
    base = _loaded_at(module.__file__)
    calls = {name for name in symbols if name.startswith("cuda") and name[4:5].isupper()}
    if "cudaMalloc" not in calls:
        raise RuntimeError(f"{module.__file__} has no symbol cudaMalloc: this wheel of CuPy names its functions no more")
    for name in calls:
        target = library.addresses.get(PREFIX + name)
        _write(base + symbols[name], JUMP + struct.pack("<Q", target or library.missing(name)))


def _symbols(path):
    """Return name -> address of the functions of an ELF file, local ones too."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        start, size, count = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", elf, start + k * size) for k in range(count)]
        found = {}
        for _, kind, _, _, offset, n_bytes, names, *_ in sections:
            if kind == 2:  # SHT_SYMTAB
                names_at, names_size = sections[names][4:6]
                texts = elf[names_at : names_at + names_size]
                for name, info, _, section, value, _ in struct.iter_unpack("<IBBHQQ", elf[offset : offset + n_bytes]):
                    if info & 15 == 2 and section:  # STT_FUNC that is defined
                        found[texts[name : texts.index(b"\0", name)].decode()] = value
        return found


def _loaded_at(path):
    """Return where the dynamic linker has put a library."""
    with Path("/proc/self/maps").open() as maps:
        return min(int(line.partition("-")[0], 16) for line in maps if line.rstrip().endswith(path))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _write(address, code):
    """Write over machine code."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    size = address + len(code) - first
    if _libc.mprotect(first, size, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "the code of CuPy's runtime cannot be led to the stand-in")
    ctypes.memmove(address, code, len(code))
    _libc.mprotect(first, size, mmap.PROT_READ | mmap.PROT_EXEC)
