"""The functions of the CUDA driver, over the host: `Driver` is what `libcuda.so.1` calls.

Signatures are those of cuda.h of CUDA 12 and 13. A function that is not here gives CUDA_ERROR_NOT_SUPPORTED and is written down
as a problem, so that a test which came to depend on it fails with its name.
"""

import ctypes
import functools
import itertools
import os
import random
import sys
import threading
import traceback

import ptx

from . import graphs, kernels, library, memory, work
from .library import write

U32, U64, I32, F32 = ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_float

ERRORS = {
    "SUCCESS": 0, "INVALID_VALUE": 1, "OUT_OF_MEMORY": 2, "NOT_INITIALIZED": 3, "DEINITIALIZED": 4, "NO_DEVICE": 100,
    "INVALID_DEVICE": 101, "INVALID_IMAGE": 200, "INVALID_CONTEXT": 201, "INVALID_PTX": 218, "INVALID_HANDLE": 400,
    "PEER_ACCESS_ALREADY_ENABLED": 704, "PEER_ACCESS_NOT_ENABLED": 705, "HOST_MEMORY_ALREADY_REGISTERED": 712,
    "HOST_MEMORY_NOT_REGISTERED": 713,
    "NOT_FOUND": 500, "NOT_READY": 600, "ILLEGAL_ADDRESS": 700, "LAUNCH_FAILED": 719, "MISALIGNED_ADDRESS": 716,
    "LAUNCH_OUT_OF_RESOURCES": 701,
    "NOT_SUPPORTED": 801, "STREAM_CAPTURE_UNSUPPORTED": 900, "STREAM_CAPTURE_INVALIDATED": 901, "STREAM_CAPTURE_MERGE": 902,
    "STREAM_CAPTURE_UNMATCHED": 903, "STREAM_CAPTURE_UNJOINED": 904, "STREAM_CAPTURE_ISOLATION": 905,
    "STREAM_CAPTURE_IMPLICIT": 906, "CAPTURED_EVENT": 907, "STREAM_CAPTURE_WRONG_THREAD": 908, "UNKNOWN": 999,
}  # fmt: skip

# The attributes of a device that anything asks for, by the ends of their names in cuda.h; any other is 0
ATTRIBUTES = {
    "MAX_THREADS_PER_BLOCK": 1024, "MAX_BLOCK_DIM_X": 1024, "MAX_BLOCK_DIM_Y": 1024, "MAX_BLOCK_DIM_Z": 64,
    "MAX_GRID_DIM_X": 2**31 - 1, "MAX_GRID_DIM_Y": 65535, "MAX_GRID_DIM_Z": 65535, "MAX_SHARED_MEMORY_PER_BLOCK": 49152,
    "TOTAL_CONSTANT_MEMORY": 65536, "WARP_SIZE": 32, "MAX_REGISTERS_PER_BLOCK": 65536, "CLOCK_RATE": 1_980_000,
    "MULTIPROCESSOR_COUNT": 132, "CAN_MAP_HOST_MEMORY": 1, "CONCURRENT_KERNELS": 1, "MEMORY_CLOCK_RATE": 2_619_000,
    "GLOBAL_MEMORY_BUS_WIDTH": 5120, "L2_CACHE_SIZE": 50 << 20, "MAX_THREADS_PER_MULTIPROCESSOR": 2048,
    "ASYNC_ENGINE_COUNT": 3, "UNIFIED_ADDRESSING": 1, "COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0,
    "STREAM_PRIORITIES_SUPPORTED": 1, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233472,
    "MAX_REGISTERS_PER_MULTIPROCESSOR": 65536, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
    "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM": 1, "HOST_REGISTER_SUPPORTED": 1, "MAX_BLOCKS_PER_MULTIPROCESSOR": 32,
    "MEMORY_POOLS_SUPPORTED": 1,
}  # fmt: skip
COMPUTE_CAPABILITY = 9, 0
VERSION = 13000
CONTEXT_AT = 0xC0000000  # the handle of device 0's context
NAME = b"gpuadam's stand-in for a GPU"
PAGEABLE_STAGED = 65536  # bytes: a smaller copy from pageable memory returns before it has arrived

ENTRIES = {}  # name -> (kinds of its arguments, function of the Driver and these)
UNSAFE = set()  # what a capture forbids, because it may wait for all streams
UNCOUNTED = set()  # what does not fail: it reads or sets what this thread knows, or puts an error into words


def entry(name, kinds, *, unsafe=False, counted=True):
    def add(function):
        ENTRIES[name] = kinds, function
        if unsafe:
            UNSAFE.add(name)
        if not counted:
            UNCOUNTED.add(name)
        return function

    return add


class Failure(Exception):
    """What a function returns instead of success: a name of ERRORS."""

    def __init__(self, name):
        super().__init__(name)
        self.code = ERRORS[name]


class Driver:
    """All state. `problems` are what a GPU would have done wrong or not at all: a test that leaves one has failed.

    fail(n): make the n-th counted call from now on fail. While a test is `listening`, `calls` are the names of the counted calls,
    `launches` are (kernel, handle of its stream) of those that no graph captures, and `copies` are (from, to, bytes), with "device"
    or "host" for each place.
    """

    def __init__(self, n_devices=2, total=2 << 30, seed=0):
        self.lock = threading.RLock()
        self.n_devices = n_devices
        self.memory = memory.Memory(n_devices, total)
        self.work = work.Work(seed)
        self.modules = kernels.Modules()
        self.problems, self.closed = [], False
        self.listening, self.calls, self.launches, self.copies = False, [], [], []
        self._failing = None  # (calls until it, error, names it may be)
        self.events, self.graphs, self.executables, self.links, self.kept = {}, {}, {}, {}, []
        self.captures = []
        self.peers = set()  # (device, device whose memory it may touch)
        self.thread = threading.local()
        self._handles = itertools.count(0x10000, 16)
        self._random = random.Random(0)
        self._missing = {}
        self.empty_table = ctypes.c_uint64(8)

    # What tests ask for

    def fail(self, after, error="UNKNOWN", names=None):
        """Make one call fail: after so many counted ones, or so many of some names, have gone well."""
        self._failing = [after, ERRORS[error], names]

    def fail_no_more(self):
        """Return whether the failure that was asked for has not come."""
        waiting, self._failing = self._failing is not None, None
        return waiting

    def problem(self, text):
        self.problems.append(text)
        print(f"stand-in: {text}", file=sys.stderr)

    def begin(self):
        """Begin a test: with the seed's order from its start on, whatever ran before."""
        self.work.reseed(self.work.seed)
        self.problems.clear()
        self.fail_no_more()
        self.listen(False)

    def listen(self, listening=True):
        """Begin to write down what is called, or end it, with nothing written down so far."""
        self.listening, self.calls, self.launches, self.copies = listening, [], [], []

    def end(self):
        """Do everything that is enqueued. Return the problems since `begin`, and forget them and what was left open."""
        with self.lock:
            for capture in list(self.captures):
                self.problem(f"a capture on {capture.origin} was not ended")
                self.captures.remove(capture)
                capture.end()
            while self.work.pending:
                try:
                    self.work.finish(list(self.work.pending.values()))
                except (memory.OutsideError, kernels.KernelError) as error:
                    self.problem(str(error))
            problems, self.problems = self.problems, []
            return problems

    def close(self):
        """Answer no more: Python ends."""
        self.closed = True
        self.library.close()

    # How a call goes

    def functions(self):
        return {name: (kinds, self._guarded(name, function)) for name, (kinds, function) in ENTRIES.items()}

    def _guarded(self, name, function):
        counted, unsafe = name not in UNCOUNTED, name in UNSAFE

        @functools.wraps(function)
        def call(*arguments):
            try:
                with self.lock:
                    if counted:
                        if self.listening:
                            self.calls.append(name)
                        if self._failing is not None:
                            self._count(name)
                    if unsafe and self.captures:
                        self._forbid_in_capture()
                    return function(self, *[a or 0 for a in arguments]) or 0
            except Failure as error:
                return error.code
            except memory.OutsideError as error:
                self.problem(str(error))
                return ERRORS["ILLEGAL_ADDRESS"]
            except kernels.KernelError as error:
                self.problem(str(error))
                return ERRORS["LAUNCH_FAILED"]
            except BaseException:
                traceback.print_exc()
                self.problem(f"{name}{arguments}: {traceback.format_exc(limit=-3)}")
                return ERRORS["UNKNOWN"]

        return call

    def _count(self, name):
        after, code, names = self._failing
        if names is not None and name not in names:
            return
        if after:
            self._failing[0] -= 1
            return
        self._failing = None
        error = Failure("UNKNOWN")
        error.code = code
        raise error

    def handle(self):
        return next(self._handles)

    # Devices and contexts

    @property
    def contexts(self):
        if not hasattr(self.thread, "contexts"):
            self.thread.contexts = []
        return self.thread.contexts

    @property
    def device(self):
        """The device of the current context."""
        if not self.contexts or self.contexts[-1] == 0:
            raise Failure("INVALID_CONTEXT")
        return self.contexts[-1] - CONTEXT_AT

    def context_of(self, device):
        if not 0 <= device < self.n_devices:
            raise Failure("INVALID_DEVICE")
        return CONTEXT_AT + device

    def stream(self, handle):
        device = self.contexts[-1] - CONTEXT_AT if self.contexts and self.contexts[-1] else 0
        found = self.work.stream(handle, device)
        if found is None:
            raise Failure("INVALID_HANDLE")
        return found

    def event(self, handle):
        if handle not in self.events:
            raise Failure("INVALID_HANDLE")
        return self.events[handle]

    # Work

    def enqueue(self, stream, run, what, needs=()):
        """Put work on a stream, or into the graph that is captured there."""
        if stream.capture is not None:
            self.check_capture(stream)
            return stream.capture.add(stream, run, what)
        if stream.handle == work.LEGACY:
            for capture in self.captures:
                if any(other.blocking and other.device == stream.device for other in capture.streams):
                    capture.invalid = True
                    raise Failure("STREAM_CAPTURE_IMPLICIT")
        return self.work.enqueue(stream, run, what, needs)

    def check_capture(self, stream):
        if stream.capture.invalid:
            raise Failure("STREAM_CAPTURE_INVALIDATED")

    def no_capture(self, *streams):
        """Refuse to wait for what is captured, which is not done now."""
        for stream in streams:
            if stream.capture is not None:
                stream.capture.invalid = True
                raise Failure("STREAM_CAPTURE_UNSUPPORTED")

    @property
    def thread_mode(self):
        return getattr(self.thread, "mode", graphs.GLOBAL)

    def _forbid_in_capture(self):
        """Refuse what could wait for other streams, as the modes of the captures and of this thread say."""
        me, mode = threading.get_ident(), self.thread_mode
        if mode == graphs.RELAXED:
            return
        hit = [
            capture
            for capture in self.captures
            if (capture.thread == me and capture.mode != graphs.RELAXED)
            or (capture.thread != me and capture.mode == graphs.GLOBAL and mode == graphs.GLOBAL)
        ]
        for capture in hit:
            capture.invalid = True
        if hit:
            raise Failure("STREAM_CAPTURE_UNSUPPORTED")

    def finish_device(self, device):
        self.work.finish([stream.last for stream in self.work.all_streams(device)])
        # streams that were destroyed, and what was freed on them, too
        self.work.finish(list(self.work.pending.values()))

    def copy(self, to, source, n_bytes):
        """Return the function that copies, and checks when it does."""

        def run():
            self.memory.check(source, n_bytes, "a copy reads")
            self.memory.check(to, n_bytes, "a copy writes")
            ctypes.memmove(to, source, n_bytes)

        return run

    def is_device(self, address):
        arena = self.memory.arena(address)
        return arena is not None and arena.device != memory.HOST

    def copy_async(self, to, source, n_bytes, handle, waits=False):
        """Enqueue a copy between any two places. waits: whether it is the kind that returns when it is done."""
        if not n_bytes:
            return
        stream = self.stream(handle)
        for address in (to, source):
            if self.memory.arena(address) is not None and self.memory.block(address) is None:
                self.problem(f"a copy of {n_bytes:,} bytes of memory that is freed: {self.memory.where(address)}")
                raise Failure("INVALID_VALUE")
        if self.listening:
            places = ("device" if self.is_device(address) else "host" for address in (source, to))
            self.copies.append((*places, n_bytes))
        from_pageable = not self.is_device(source) and not self.memory.is_pinned(source, n_bytes)
        to_pageable = not self.is_device(to) and not self.memory.is_pinned(to, n_bytes)
        what = f"a copy of {n_bytes:,} bytes from {source:#x} to {to:#x}"
        if from_pageable and self.is_device(to) and stream.capture is None:
            # staged: the caller may overwrite its memory at once, and what is on the device comes later
            staged = ctypes.create_string_buffer(ctypes.string_at(source, n_bytes), n_bytes)
            run = self.copy(to, ctypes.addressof(staged), n_bytes)
            operation = self.enqueue(stream, lambda staged=staged: run(), what)
            waits = waits and n_bytes > PAGEABLE_STAGED
        else:
            operation = self.enqueue(stream, self.copy(to, source, n_bytes), what)
            waits = (waits and not (self.is_device(to) and self.is_device(source))) or to_pageable
        if waits and stream.capture is None:
            self.work.finish([operation])

    def fill(self, to, value, n_bytes, handle):
        if not n_bytes:
            return
        stream = self.stream(handle)

        def run():
            self.memory.check(to, n_bytes, "a memset writes")
            pattern = value * (n_bytes // len(value))
            ctypes.memmove(to, pattern, n_bytes)

        operation = self.enqueue(stream, run, f"a memset of {n_bytes:,} bytes at {to:#x}")
        if not self.is_device(to) and stream.capture is None:
            self.work.finish([operation])

    def allocate(self, device, n_bytes, made_by, again=False):
        block = self.memory.allocate(device, n_bytes, made_by, again and self._random.random() < 0.5)
        if block is None:
            raise Failure("OUT_OF_MEMORY")
        return block

    def allocate_now(self, out, device, n_bytes, made_by):
        if not n_bytes:
            raise Failure("INVALID_VALUE")
        block = self.allocate(device, n_bytes, made_by)
        self.memory.arena(block.address).open(block)
        write(out, U64, block.address)

    def free(self, address, of_host):
        """Free at once, after waiting for everything, as the driver does."""
        if not address:
            return
        block = self.block_to_free(address, of_host)
        block.freed = True
        try:
            self.work.finish(list(self.work.pending.values()))
        finally:
            self.memory.arena(address).close(block)

    def block_to_free(self, address, of_host):
        block = self.memory.block(address)
        if block is None or block.address != address or (block.device == memory.HOST) != of_host:
            self.problem(f"a free of {address:#x}, {self.memory.where(address)}")
            raise Failure("INVALID_VALUE")
        return block

    def guarded_ranges(self, device):
        """Return the ranges that a kernel may touch, with the maps of their allocations."""
        arenas = [self.memory.devices[device], self.memory.pinned]
        arenas += [arena for arena in self.memory.devices if (device, arena.device) in self.peers]
        ranges = [ptx.Guarded(arena.start, arena.end, arena.map.ctypes.data) for arena in arenas]
        # the host's registered memory is mapped under its own addresses
        return ranges + [ptx.Guarded(start, start + size, 0) for start, size in self.memory.registered.items()]

    def launch(self, function, grid, block, shared, handle, parameters):
        stream = self.stream(handle)
        kernel = self.modules.function(function)
        if min(*grid, *block) < 1 or block[0] * block[1] * block[2] > 1024:
            raise Failure("INVALID_VALUE")
        sizes = kernel.parameter_sizes
        values = (ctypes.c_void_p * len(sizes)).from_address(parameters) if sizes else []
        copies = [ctypes.string_at(address, size) for address, size in zip(values, sizes, strict=True)]
        device = stream.device
        if self.listening and stream.capture is None:
            self.launches.append((kernel, stream.handle))

        def run():
            kernel.run(grid, block, shared, copies, self.guarded_ranges(device), self.memory.where)

        self.enqueue(stream, run, f"the kernel {kernel.name}")


# Starting up


@entry("cuInit", "u", counted=False)
def init(d, flags):
    pass


@entry("cuDriverGetVersion", "p", counted=False)
def driver_version(d, out):
    write(out, I32, VERSION)


@entry("cuGetErrorString", "ip", counted=False)
def error_string(d, code, out):
    return _error_text(d, code, out, "{}, says gpuadam's stand-in for the driver")


@entry("cuGetErrorName", "ip", counted=False)
def error_name(d, code, out):
    return _error_text(d, code, out, "CUDA_ERROR_{}")


def _error_text(d, code, out, form):
    name = next((name for name, number in ERRORS.items() if number == code), None)
    if name is None:
        return ERRORS["INVALID_VALUE"]
    text = ctypes.create_string_buffer(("CUDA_SUCCESS" if not code else form.format(name)).encode())
    d.kept.append(text)
    write(out, U64, ctypes.addressof(text))


# What a name stands for since some version of the driver, where that takes other arguments
SINCE = {
    "cuGraphInstantiate": [(12000, "cuGraphInstantiateWithFlags")],
    "cuCtxGetDevice": [(13000, "cuCtxGetDevice_v2"), (0, "cuCtxGetDevice")],
    "cuStreamGetCaptureInfo": [(12030, "cuStreamGetCaptureInfo_v3"), (0, "cuStreamGetCaptureInfo_v2")],
}


@entry("cuGetProcAddress_v2", "ppinp", counted=False)
def get_proc_address(d, name, out, version, flags, status):
    name = ctypes.string_at(name).decode()
    if name in SINCE:
        candidates = [known for since, known in SINCE[name] if version >= since][:1]
    else:
        candidates = [f"{name}_v3", f"{name}_v2", name]
    found = next((d.library.addresses[known] for known in candidates if known in d.library.addresses), None)
    write(out, U64, found or d.missing(name))
    write(status, I32, 0)


@entry("cuGetProcAddress", "ppin", counted=False)
def get_proc_address_of_old(d, name, out, version, flags):
    return get_proc_address(d, name, out, version, flags, 0)


def _missing(d, name):
    """Return the address of a function that says that it is missing."""
    if name not in d._missing:

        def call():
            d.problem(f"{name} was called, which the stand-in does not have")
            return ERRORS["NOT_SUPPORTED"]

        d._missing[name] = ctypes.CFUNCTYPE(ctypes.c_int)(call)
    return ctypes.cast(d._missing[name], ctypes.c_void_p).value


Driver.missing = _missing


@entry("cuGetExportTable", "pp", counted=False)
def get_export_table(d, out, identity):
    """Give a table that holds its own size and nothing else: NVRTC asks here whether a profiler listens."""
    write(out, U64, ctypes.addressof(d.empty_table))


# Devices and contexts


@entry("cuDeviceGetCount", "p", counted=False)
def device_count(d, out):
    write(out, I32, d.n_devices)


@entry("cuDeviceGet", "pi", counted=False)
def device_get(d, out, number):
    d.context_of(number)
    write(out, I32, number)


@entry("cuDeviceGetName", "pii", counted=False)
def device_name(d, out, size, device):
    ctypes.memmove(out, NAME + b"\0", min(size, len(NAME) + 1))


@entry("cuDeviceGetUuid_v2", "pi")
def device_uuid(d, out, device):
    ctypes.memmove(out, b"gpuadam stand-in"[:15] + bytes([device]), 16)


@entry("cuDeviceTotalMem_v2", "pi")
def device_total(d, out, device):
    write(out, U64, d.memory.total)


@entry("cuDeviceGetAttribute", "pii", counted=False)
def device_attribute(d, out, attribute, device):
    d.context_of(device)
    write(out, I32, _attributes().get(attribute, 0))


@functools.cache
def _attributes():
    from cuda.bindings import driver

    known = {one.name.removeprefix("CU_DEVICE_ATTRIBUTE_"): int(one) for one in driver.CUdevice_attribute}
    return {known[name]: value for name, value in ATTRIBUTES.items()}


@entry("cuDeviceGetPCIBusId", "pii")
def device_bus(d, out, size, device):
    ctypes.memmove(out, f"0000:0{device}:00.0".encode() + b"\0", 13)


@entry("cuDeviceCanAccessPeer", "pii")
def can_access_peer(d, out, device, peer):
    write(out, I32, int(device != peer))


@entry("cuCtxEnablePeerAccess", "pu")
def enable_peer(d, context, flags):
    pair = d.device, context - CONTEXT_AT
    if pair in d.peers:
        return ERRORS["PEER_ACCESS_ALREADY_ENABLED"]
    d.peers.add(pair)


@entry("cuDevicePrimaryCtxRetain", "pi")
def primary_retain(d, out, device):
    write(out, U64, d.context_of(device))


@entry("cuDevicePrimaryCtxRelease_v2", "i")
def primary_release(d, device):
    pass


@entry("cuDevicePrimaryCtxGetState", "ipp")
def primary_state(d, device, flags, active):
    write(flags, U32, 0)
    write(active, I32, 1)


@entry("cuDevicePrimaryCtxSetFlags_v2", "iu")
def primary_flags(d, device, flags):
    pass


@entry("cuCtxGetCurrent", "p", counted=False)
def context_current(d, out):
    write(out, U64, d.contexts[-1] if d.contexts else 0)


@entry("cuCtxSetCurrent", "p", counted=False)
def context_set(d, context):
    if d.contexts:
        d.contexts.pop()
    if context:
        d.contexts.append(context)


@entry("cuCtxPushCurrent_v2", "p", counted=False)
def context_push(d, context):
    d.contexts.append(context)


@entry("cuCtxPopCurrent_v2", "p", counted=False)
def context_pop(d, out):
    if not d.contexts:
        return ERRORS["INVALID_CONTEXT"]
    write(out, U64, d.contexts.pop())


@entry("cuCtxGetDevice_v2", "pp", counted=False)
def context_device_of(d, out, context):
    write(out, I32, context - CONTEXT_AT if context else d.device)


@entry("cuCtxGetDevice", "p", counted=False)
def context_device(d, out):
    write(out, I32, d.device)


@entry("cuCtxGetFlags", "p")
def context_flags(d, out):
    write(out, U32, 0)


@entry("cuCtxGetId", "pp")
def context_id(d, context, out):
    write(out, U64, context or d.contexts[-1])


@entry("cuCtxGetApiVersion", "pp")
def context_version(d, context, out):
    write(out, U32, VERSION)


@entry("cuCtxGetStreamPriorityRange", "pp")
def priority_range(d, least, greatest):
    write(least, I32, 0)
    write(greatest, I32, -5)


@entry("cuCtxGetLimit", "pi")
def context_limit(d, out, limit):
    write(out, U64, 0)


@entry("cuCtxSynchronize", "", unsafe=True)
def context_synchronize(d):
    d.no_capture(*d.work.all_streams(d.device))
    d.finish_device(d.device)


@entry("cuModuleGetLoadingMode", "p", counted=False)
def loading_mode(d, out):
    write(out, I32, 1)  # eager


@entry("cuProfilerStart", "")
def profiler_start(d):
    pass


@entry("cuProfilerStop", "")
def profiler_stop(d):
    pass


# Memory


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


@entry("cuMemFreeHost", "p", unsafe=True)
def mem_free_host(d, address):
    d.free(address, True)


@entry("cuMemHostRegister_v2", "pnu", unsafe=True)
def host_register(d, address, n_bytes, flags):
    if d.memory.is_pinned(address, n_bytes):
        return ERRORS["HOST_MEMORY_ALREADY_REGISTERED"]
    d.memory.registered[address] = n_bytes


@entry("cuMemHostUnregister", "p", unsafe=True)
def host_unregister(d, address):
    if address not in d.memory.registered:
        return ERRORS["HOST_MEMORY_NOT_REGISTERED"]
    d.work.finish(list(d.work.pending.values()))
    del d.memory.registered[address]


@entry("cuMemHostGetDevicePointer_v2", "ppu")
def host_device_pointer(d, out, address, flags):
    if not d.memory.is_pinned(address, 1):
        return ERRORS["INVALID_VALUE"]
    write(out, U64, address)


@entry("cuMemHostGetFlags", "pp")
def host_flags(d, out, address):
    if not d.memory.is_pinned(address, 1):
        return ERRORS["INVALID_VALUE"]
    write(out, U32, 2)


@entry("cuMemGetInfo_v2", "pp")
def mem_info(d, free, total):
    write(free, U64, d.memory.total - d.memory.devices[d.device].used)
    write(total, U64, d.memory.total)


@entry("cuMemGetAddressRange_v2", "ppp")
def address_range(d, base, size, address):
    block = d.memory.block(address)
    if block is None:
        return ERRORS["NOT_FOUND"]
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
        return ERRORS["INVALID_VALUE"]
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
        return ERRORS["INVALID_VALUE"]
    write(out, *values[attribute])


# Copies


@entry("cuMemcpy", "ppn", unsafe=True)
def memcpy(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyHtoD_v2", "ppn", unsafe=True)
def memcpy_to_device(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyDtoH_v2", "ppn", unsafe=True)
def memcpy_to_host(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyDtoD_v2", "ppn", unsafe=True)
def memcpy_on_device(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyAsync", "ppnp")
def memcpy_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyHtoDAsync_v2", "ppnp")
def memcpy_to_device_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyDtoHAsync_v2", "ppnp")
def memcpy_to_host_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyDtoDAsync_v2", "ppnp")
def memcpy_on_device_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyPeer", "ppppn", unsafe=True)
def memcpy_peer(d, to, to_context, source, source_context, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyPeerAsync", "ppppnp")
def memcpy_peer_async(d, to, to_context, source, source_context, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemsetD8_v2", "pbn", unsafe=True)
def memset(d, to, value, n_bytes):
    d.fill(to, bytes([value]), n_bytes, 0)


@entry("cuMemsetD8Async", "pbnp")
def memset_async(d, to, value, n_bytes, stream):
    d.fill(to, bytes([value]), n_bytes, stream)


@entry("cuMemsetD32Async", "punp")
def memset_32_async(d, to, value, n, stream):
    d.fill(to, value.to_bytes(4, "little"), 4 * n, stream)


# Streams and events


@entry("cuStreamCreate", "pu")
def stream_create(d, out, flags):
    return stream_create_with_priority(d, out, flags, 0)


@entry("cuStreamCreateWithPriority", "pui")
def stream_create_with_priority(d, out, flags, priority):
    handle = d.handle()
    d.work.streams[handle] = work.Stream(handle, d.device, blocking=not flags & 1, priority=priority)
    write(out, U64, handle)


@entry("cuStreamDestroy_v2", "p")
def stream_destroy(d, handle):
    stream = d.stream(handle)
    if stream.capture is not None:
        stream.capture.invalid = True
    d.work.streams.pop(handle, None)  # what is on it goes on


@entry("cuStreamSynchronize", "p", unsafe=True)
def stream_synchronize(d, handle):
    stream = d.stream(handle)
    d.no_capture(stream)
    d.work.finish(d.work.before(stream) if stream.handle == work.LEGACY else [stream.last])


@entry("cuStreamQuery", "p", unsafe=True)
def stream_query(d, handle):
    stream = d.stream(handle)
    d.no_capture(stream)
    if stream.last is None or stream.last.done:
        return 0
    d.work.progress(stream.last)  # one that asks again and again is answered at last
    return ERRORS["NOT_READY"]


@entry("cuStreamWaitEvent", "ppu")
def stream_wait_event(d, handle, event, flags):
    stream, event = d.stream(handle), d.event(event)
    if event.captured is not None:
        capture, nodes = event.captured
        if stream.capture not in (None, capture) or capture not in d.captures:
            raise Failure("CAPTURED_EVENT" if capture not in d.captures else "STREAM_CAPTURE_MERGE")
        if stream.handle == work.LEGACY:
            capture.invalid = True
            raise Failure("STREAM_CAPTURE_IMPLICIT")
        capture.join(stream, nodes)
    elif stream.capture is not None:
        if event.after is None:
            return
        stream.capture.invalid = True
        raise Failure("STREAM_CAPTURE_ISOLATION")
    elif event.after is not None:
        d.work.enqueue(stream, None, "a wait for an event", [event.after])


@entry("cuStreamGetCtx", "pp")
def stream_context(d, handle, out):
    write(out, U64, d.context_of(d.stream(handle).device))


@entry("cuStreamGetDevice", "pp")
def stream_device(d, handle, out):
    write(out, I32, d.stream(handle).device)


@entry("cuStreamGetFlags", "pp")
def stream_flags(d, handle, out):
    write(out, U32, int(not d.stream(handle).blocking))


@entry("cuStreamGetPriority", "pp")
def stream_priority(d, handle, out):
    write(out, I32, d.stream(handle).priority)


@entry("cuStreamGetId", "pp")
def stream_id(d, handle, out):
    write(out, U64, d.stream(handle).handle)


@entry("cuLaunchHostFunc", "ppp")
def launch_host_function(d, handle, function, data):
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    d.enqueue(d.stream(handle), lambda: call(data), "a function of the host")


@entry("cuEventCreate", "pu")
def event_create(d, out, flags):
    handle = d.handle()
    d.events[handle] = work.Event(handle, d.device, flags)
    write(out, U64, handle)


@entry("cuEventDestroy_v2", "p")
def event_destroy(d, handle):
    d.event(handle)
    del d.events[handle]


@entry("cuEventRecord", "pp")
def event_record(d, handle, stream):
    return event_record_with_flags(d, handle, stream, 0)


@entry("cuEventRecordWithFlags", "ppu")
def event_record_with_flags(d, handle, stream, flags):
    event, stream = d.event(handle), d.stream(stream)
    if event.device != stream.device:
        raise Failure("INVALID_HANDLE")
    if stream.capture is not None:
        d.check_capture(stream)
        event.captured, event.after = (stream.capture, list(stream.captured)), None
        return

    def run():
        event.time = d.work.clock

    event.captured, event.after = None, d.enqueue(stream, run, "an event")


@entry("cuEventQuery", "p", unsafe=True)
def event_query(d, handle):
    event = d.event(handle)
    if event.captured is not None:
        event.captured[0].invalid = True
        raise Failure("CAPTURED_EVENT")
    if event.after is None or event.after.done:
        return 0
    d.work.progress(event.after)
    return ERRORS["NOT_READY"]


@entry("cuEventSynchronize", "p", unsafe=True)
def event_synchronize(d, handle):
    event = d.event(handle)
    if event.captured is not None:
        event.captured[0].invalid = True
        raise Failure("CAPTURED_EVENT")
    d.work.finish([event.after])


@entry("cuEventElapsedTime_v2", "ppp")
def event_elapsed(d, out, start, end):
    events = d.event(start), d.event(end)
    if any(event.flags & 2 or event.after is None for event in events):
        raise Failure("INVALID_HANDLE")
    if not all(event.after.done for event in events):
        return ERRORS["NOT_READY"]
    write(out, F32, max(1, events[1].time - events[0].time) * 1e-3)  # a microsecond for each operation between them


# Graphs


@entry("cuThreadExchangeStreamCaptureMode", "p", counted=False)
def exchange_mode(d, mode):
    mode = I32.from_address(mode)
    d.thread.mode, mode.value = mode.value, d.thread_mode


@entry("cuStreamBeginCapture_v2", "pi")
def begin_capture(d, handle, mode):
    stream = d.stream(handle)
    if stream.handle == work.LEGACY:
        raise Failure("STREAM_CAPTURE_UNSUPPORTED")
    if stream.capture is not None:
        raise Failure("INVALID_VALUE")
    graph = graphs.Graph(d.handle())
    d.graphs[graph.handle] = graph
    stream.capture, stream.captured = graphs.Capture(stream, mode, graph), []
    d.captures.append(stream.capture)


@entry("cuStreamEndCapture", "pp")
def end_capture(d, handle, out):
    stream = d.stream(handle)
    capture = stream.capture
    write(out, U64, 0)
    if capture is None:
        raise Failure("INVALID_VALUE")
    if capture.origin is not stream:
        capture.invalid = True
        raise Failure("STREAM_CAPTURE_UNMATCHED")
    if capture.mode != graphs.RELAXED and capture.thread != threading.get_ident():
        raise Failure("STREAM_CAPTURE_WRONG_THREAD")
    unjoined = capture.unjoined()
    d.captures.remove(capture)
    capture.end()
    if capture.invalid or unjoined:
        raise Failure("STREAM_CAPTURE_INVALIDATED" if capture.invalid else "STREAM_CAPTURE_UNJOINED")
    write(out, U64, capture.graph.handle)


@entry("cuStreamIsCapturing", "pp")
def is_capturing(d, handle, out):
    stream = d.stream(handle)
    if stream.handle == work.LEGACY and any(s.blocking for capture in d.captures for s in capture.streams):
        raise Failure("STREAM_CAPTURE_IMPLICIT")
    write(out, I32, 0 if stream.capture is None else 2 if stream.capture.invalid else 1)


@entry("cuStreamGetCaptureInfo_v2", "pppppp")
def capture_info(d, handle, status, identity, graph, dependencies, n):
    is_capturing(d, handle, status)
    capture = d.stream(handle).capture
    if capture is not None:
        write(identity, U64, id(capture))
        write(graph, U64, capture.graph.handle)
        write(n, U64, 0)


@entry("cuStreamGetCaptureInfo_v3", "ppppppp")
def capture_info_with_edges(d, handle, status, identity, graph, dependencies, edges, n):
    return capture_info(d, handle, status, identity, graph, dependencies, n)


@entry("cuGraphInstantiateWithFlags", "ppn")
def instantiate(d, out, graph, flags):
    if graph not in d.graphs:
        raise Failure("INVALID_VALUE")
    executable = graphs.Executable(d.handle(), d.graphs[graph])
    d.executables[executable.handle] = executable
    write(out, U64, executable.handle)


@entry("cuGraphLaunch", "pp")
def graph_launch(d, executable, handle):
    stream = d.stream(handle)
    if stream.capture is not None:
        raise Failure("NOT_SUPPORTED")
    if executable not in d.executables:
        raise Failure("INVALID_VALUE")
    d.executables[executable].launch(d.work, stream)


@entry("cuGraphUpload", "pp")
def graph_upload(d, executable, handle):
    pass


@entry("cuGraphGetNodes", "ppp")
def graph_nodes(d, graph, out, n):
    write(n, U64, len(d.graphs[graph].nodes))


@entry("cuGraphDestroy", "p")
def graph_destroy(d, graph):
    d.graphs.pop(graph, None)


@entry("cuGraphExecDestroy", "p")
def executable_destroy(d, executable):
    d.executables.pop(executable, None)


# Modules and launches


@entry("cuModuleLoadData", "pp", unsafe=True)
def module_load(d, out, image):
    write(out, U64, d.modules.load(image))


@entry("cuModuleLoadDataEx", "ppupp", unsafe=True)
def module_load_with_options(d, out, image, n, options, values):
    write(out, U64, d.modules.load(image))


@entry("cuLibraryLoadData", "pppupppu"[:8], unsafe=True)
def library_load(d, out, image, *options):
    write(out, U64, d.modules.load(image))


@entry("cuModuleUnload", "p")
def module_unload(d, module):
    d.modules.unload(module)


@entry("cuLibraryUnload", "p")
def library_unload(d, module):
    d.modules.unload(module)


@entry("cuLibraryGetModule", "pp")
def library_module(d, out, module):
    write(out, U64, module)


@entry("cuModuleGetFunction", "ppp")
def module_function(d, out, module, name):
    return _function(d, out, module, name)


@entry("cuLibraryGetKernel", "ppp")
def library_kernel(d, out, module, name):
    return _function(d, out, module, name)


def _function(d, out, module, name):
    function = d.modules.find(module, ctypes.string_at(name).decode())
    if function is None:
        return ERRORS["NOT_FOUND"]
    write(out, U64, function)


@entry("cuKernelGetFunction", "pp")
def kernel_function(d, out, kernel):
    write(out, U64, kernel)


@entry("cuKernelGetName", "pp")
def kernel_name(d, out, kernel):
    text = ctypes.create_string_buffer(d.modules.function(kernel).name.encode())
    d.kept.append(text)
    write(out, U64, ctypes.addressof(text))


@entry("cuModuleGetGlobal_v2", "pppp")
def module_global(d, out, size, module, name):
    return ERRORS["NOT_FOUND"]


# max threads per block, shared, const, local bytes, registers, PTX and binary version
FUNCTION_ATTRIBUTES = {0: 1024, 1: 0, 2: 0, 3: 0, 4: 32, 5: 90, 6: 90, 7: 0, 8: 49152, 9: 0}


@entry("cuFuncGetAttribute", "pip")
def function_attribute(d, out, attribute, function):
    d.modules.function(function)
    write(out, I32, FUNCTION_ATTRIBUTES.get(attribute, 0))


@entry("cuKernelGetAttribute", "pipi")
def kernel_attribute(d, out, attribute, kernel, device):
    return function_attribute(d, out, attribute, kernel)


@entry("cuFuncSetAttribute", "pii")
def set_function_attribute(d, function, attribute, value):
    pass


@entry("cuFuncSetCacheConfig", "pi")
def set_cache_config(d, function, config):
    pass


@entry("cuOccupancyMaxActiveBlocksPerMultiprocessor", "ppin")
def occupancy(d, out, function, block, shared):
    write(out, I32, max(1, 2048 // max(block, 1)))


@entry("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "ppinu")
def occupancy_with_flags(d, out, function, block, shared, flags):
    write(out, I32, max(1, 2048 // max(block, 1)))


@entry("cuOccupancyMaxPotentialBlockSize", "ppppni")
def potential_block(d, grid, block, function, shared_of, shared, limit):
    write(grid, I32, 264)
    write(block, I32, 256)


@entry("cuLaunchKernel", "puuuuuuuppp")
def launch_kernel(d, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
    d.launch(function, (gx, gy, gz), (bx, by, bz), shared, stream, parameters)


@entry("cuLaunchKernelEx", "pppp")
def launch_kernel_with_config(d, config, function, parameters, extra):
    gx, gy, gz, bx, by, bz, shared = (ctypes.c_uint * 7).from_address(config)
    d.launch(function, (gx, gy, gz), (bx, by, bz), shared, U64.from_address(config + 32).value, parameters)


@entry("cuLinkCreate_v2", "uppp")
def link_create(d, n, options, values, out):
    handle = d.handle()
    d.links[handle] = []
    write(out, U64, handle)


PTX_INPUT = 1


@entry("cuLinkAddData_v2", "pipnpupp")
def link_add(d, state, kind, data, size, name, n, options, values):
    if kind != PTX_INPUT:
        d.problem(f"the linker was given input of kind {kind}: the stand-in executes PTX alone")
        raise Failure("NOT_SUPPORTED")
    d.links[state].append(ctypes.string_at(data, size).rstrip(b"\0"))


@entry("cuLinkComplete", "ppp")
def link_complete(d, state, out, size):
    """Give the PTX back as what was linked: this driver executes that."""
    text = ctypes.create_string_buffer(b"\n".join(d.links[state]))
    d.kept.append(text)
    write(out, U64, ctypes.addressof(text))
    write(size, U64, len(text))


@entry("cuLinkDestroy", "p")
def link_destroy(d, state):
    d.links.pop(state, None)
