"""The CUDA driver by ctypes: streams, events, copies and captures, whichever library's kernels are launched between them.

A function of the driver needs a current context, which `GpuBackend.on` makes sure of. Streams are driver handles.
"""

import contextlib
import ctypes
import functools
import os
import threading

BLOCKING_SYNC, DISABLE_TIMING = 1, 2  # CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, and _MINOR
DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL
OF_CAPTURES = range(900, 909)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED and those after it, which are of captures too


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2. values: the address of an array with the address of each parameter's value."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("shape", ctypes.c_uint * 7),  # of the grid and of a block in three dimensions, and bytes of shared memory
        ("values", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),  # in the place of a function, where the library launches by one
        ("context", ctypes.c_void_p),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("shape", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    )


@functools.cache
def _function(name, n_arguments):
    function = getattr(ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"), name)
    # each takes a register of 64 bits, as integers and addresses do in C
    function.argtypes = [ctypes.c_void_p] * n_arguments
    return function


def status(name, *arguments):
    """Call a function of the driver, and return 0 or the number of an error. arguments: integers, addresses, byref()."""
    return _function(name, len(arguments))(*arguments)


class DriverError(RuntimeError):
    """An error of the driver. code: its number."""

    code = 0


def call(name, *arguments):
    """Call a function of the driver, or raise DriverError with the name of its error."""
    if code := _function(name, len(arguments))(*arguments):
        reported = ctypes.c_char_p()
        status("cuGetErrorName", code, ctypes.byref(reported))
        error = DriverError(
            f"the CUDA driver reports {(reported.value or b'an error').decode()} ({name}). It may be of work enqueued earlier: "
            "with the environment variable GPUADAM_SYNC=1 gpuadam waits for each of its launches and names the one that failed"
        )
        error.code = code
        raise error


def asked(name, *arguments, kind=ctypes.c_void_p):
    """Return what a function of the driver writes to the place that its first argument points to."""
    result = kind()
    call(name, ctypes.byref(result), *arguments)
    return result.value


class _Answer(threading.local):
    """Places that the driver writes an answer to, one of each thread: each step asks, and to make a new one takes longer."""

    def __init__(self):
        self.int, self.pointer, self.long = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
        self.of_int, self.of_pointer = (self.int, ctypes.addressof(self.int)), (self.pointer, ctypes.addressof(self.pointer))
        self.of_long = self.long, ctypes.addressof(self.long)


_answer = _Answer()


def current_device():
    """Return the number of the device of this thread's context, or None if the thread has none."""
    device, address = _answer.of_int
    return None if _function("cuCtxGetDevice", 1)(address) else device.value


def current_context():
    """Return the handle of this thread's context, or None."""
    context, address = _answer.of_pointer
    call("cuCtxGetCurrent", address)
    return context.value


@functools.cache
def compute_capability(device):
    """Return the compute capability of a device: (9, 0) for an H100."""
    return tuple(asked("cuDeviceGetAttribute", attribute, device, kind=ctypes.c_int) for attribute in CAPABILITY)


def device_of(address):
    """Return the number of the device that memory is on."""
    device = ctypes.c_int()
    if status("cuPointerGetAttribute", ctypes.byref(device), DEVICE_ORDINAL, address) or device.value < 0:
        raise ValueError(f"address {address:#x} is not CUDA memory")
    return device.value


class Owned:
    """A new "Stream" or "Event" of the driver, which ends with this object."""

    def __init__(self, kind, flags):
        self.handle, self._destroy = None, _function(f"cu{kind}Destroy_v2", 1)
        self.handle = asked(f"cu{kind}Create", flags)

    def __del__(self):
        if self.handle is not None:
            self._destroy(self.handle)


def is_capturing(stream):
    """Whether a graph is being captured on a stream."""
    capturing, address = _answer.of_int
    call("cuStreamIsCapturing", stream, address)
    return capturing.value != 0


def stream_id(stream):
    """Return the number of a stream, which no other one has or had."""
    number, address = _answer.of_long
    call("cuStreamGetId", stream, address)
    return number.value


class Graph:
    """What `enqueue` puts on a stream, captured in a graph, which ends with this object. Nothing of it runs."""

    def __init__(self, stream, enqueue):
        self.handle, self._destroy, graph = None, _function("cuGraphDestroy", 1), ctypes.c_void_p()
        call("cuStreamBeginCapture_v2", stream, RELAXED)
        try:
            enqueue()
        except BaseException:  # says more than the error of a capture which it ended
            status("cuStreamEndCapture", stream, ctypes.byref(graph))
            self.handle = graph.value
            raise
        call("cuStreamEndCapture", stream, ctypes.byref(graph))
        self.handle = graph.value

    def __del__(self):
        if self.handle is not None:
            self._destroy(self.handle)

    def kernel(self):
        """Return the node of the only operation if it is the launch of a kernel and the driver tells which, else None."""
        n, node, kind = ctypes.c_size_t(), ctypes.c_void_p(), ctypes.c_int()
        call("cuGraphGetNodes", self.handle, None, ctypes.byref(n))
        if n.value != 1:
            return None
        call("cuGraphGetNodes", self.handle, ctypes.byref(node), ctypes.byref(n))
        call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value != KERNEL_NODE:
            return None
        launch = KernelNode()
        return launch if status("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(launch)) == 0 else None


def is_of_capture(error):
    """Whether an error says that the driver refused or ended a capture. It is of this package, CuPy, numba-cuda or cuda.core.

    Drivers of CUDA 12.2 and before load no module amid a capture, and any thread that waits for the device ends one.
    """
    codes = [getattr(error, name, None) for name in ("code", "status")]  # Numba's and ours have the first, CuPy's the second
    # cuda.core's, for Numba, have nothing but a text that begins with the name
    return any(code in OF_CAPTURES for code in codes) or str(error).startswith("CUDA_ERROR_STREAM_CAPTURE_")


@contextlib.contextmanager
def allowed_while_capturing():
    """Let this thread allocate, copy elsewhere and wait for events during a capture of CUDA's mode "global", which is torch's.

    They are no part of the graph, which they would end without this.
    """
    mode = ctypes.c_int(RELAXED)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # stores the former mode in its place
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
