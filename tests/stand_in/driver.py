"""What all functions of the driver share: `Driver` has the state, and `entry` makes a function one of libcuda's.

Signatures are those of cuda.h of CUDA 12 and 13. A function that is in no file here gives CUDA_ERROR_NOT_SUPPORTED and is written
down as a problem, so that a test which came to depend on it fails with its name.
"""

import ctypes
import functools
import gc
import itertools
import random
import sys
import threading
import traceback

import ptx

from . import graphs, kernels, memory, work
from .library import write

U32, U64, I32, F32 = ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_float

ERRORS = {
    "SUCCESS": 0, "INVALID_VALUE": 1, "OUT_OF_MEMORY": 2, "NOT_INITIALIZED": 3, "DEINITIALIZED": 4, "NO_DEVICE": 100,
    "INVALID_DEVICE": 101, "INVALID_IMAGE": 200, "INVALID_CONTEXT": 201, "INVALID_PTX": 218, "UNSUPPORTED_PTX_VERSION": 222,
    "INVALID_HANDLE": 400,
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


class Lock:
    """A lock for one thread. Within it Python collects no garbage: an array that is freed would call in the midst of a call."""

    def __init__(self):
        self._lock, self._depth, self._collects = threading.RLock(), 0, False

    def __enter__(self):
        self._lock.acquire()
        if not self._depth:
            self._collects = gc.isenabled()
            gc.disable()
        self._depth += 1

    def __exit__(self, *error):
        self._depth -= 1
        if self._collects and not self._depth:
            gc.enable()
        self._lock.release()


class Driver:
    """All state. `problems` are what a GPU would have done wrong or not at all: a test that leaves one has failed.

    fail(n): make the n-th counted call from now on fail. While a test is `listening`, `calls` are the names of the counted
    calls, `launches` are (kernel, handle of its stream) of those that no graph captures, and `copies` are (from, to, bytes), with
    "device" or "host" for each place.

    version: of CUDA. While `refuses_new_ptx` the linker takes no PTX of a newer one; else of any.
    """

    version, refuses_new_ptx = VERSION, False

    def __init__(self, n_devices=2, total=2 << 30, seed=0):
        self.lock = Lock()
        self.n_devices = n_devices
        self.memory = memory.Memory(n_devices, total)
        self.work = work.Work(seed)
        self.modules = kernels.Modules()
        self.problems, self.closed = [], False
        self.listening, self.calls, self.launches, self.copies = False, [], [], []
        self._failing = None  # [calls until it, error, names it may be, whether it stays, whether it has come]
        self.events, self.graphs, self.executables, self.links, self.kept = {}, {}, {}, {}, []
        self.captures = []
        self.loads_while_capturing = True  # drivers of CUDA 12.2 and before load no module amid a capture, whatever its mode
        self.peers = set()  # (device, device whose memory it may touch)
        self.thread = threading.local()
        self._handles = itertools.count(0x10000, 16)
        self.ended_streams = []  # handles, of which the last is given out first
        self._random = random.Random(0)
        self._missing = {}
        self.empty_table = ctypes.c_uint64(8)

    # What tests ask for

    def fail(self, after, error="UNKNOWN", names=None, always=False):
        """Make one call fail, after so many counted ones, or so many of some names, have gone well. always: all after it too."""
        self._failing = [after, ERRORS[error], names, always, False]

    def fail_no_more(self):
        """Return whether the failure that was asked for has not come."""
        waiting, self._failing = self._failing is not None and not self._failing[-1], None
        return waiting

    def problem(self, text):
        self.problems.append(text)
        print(f"stand-in: {text}", file=sys.stderr)

    def begin(self):
        """Begin a test: with the seed's order from its start on, whatever ran before."""
        self.work.reseed(self.work.seed)
        self.problems.clear()
        self.fail_no_more()
        self.loads_while_capturing = True
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
        return {name: (kinds, function and self._guarded(name, function)) for name, (kinds, function) in ENTRIES.items()}

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
            except BaseException:  # noqa: BLE001 - C cannot take it
                traceback.print_exc()
                self.problem(f"{name}{arguments}: {traceback.format_exc(limit=-3)}")
                return ERRORS["UNKNOWN"]

        return call

    def _count(self, name):
        after, code, names, always, _ = self._failing
        if names is not None and name not in names:
            return
        if after:
            self._failing[0] -= 1
            return
        self._failing = [0, code, names, True, True] if always else None
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

    def load(self, image):
        """Load a module, if no capture forbids it."""
        if self.captures and not self.loads_while_capturing:
            for capture in self.captures:
                capture.invalid = True
            raise Failure("STREAM_CAPTURE_UNSUPPORTED")
        return self.modules.load(image)

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

        operation = self.enqueue(stream, run, f"the kernel {kernel.name}")
        if stream.capture is not None:
            operation.kernel = graphs.KernelLaunch(function, grid, block, shared, copies)
