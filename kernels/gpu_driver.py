"""The CUDA driver by ctypes: streams, events, copies and captures, whichever library's kernels are launched between them.

A function of the driver needs a current context, which `GpuBackend.on` makes sure of. Streams are driver handles.
"""

import contextlib
import ctypes
import functools
import os

DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, and _MINOR
DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


@functools.cache
def _function(name, n_arguments):
    function = getattr(ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"), name)
    # each takes a register of 64 bits, as integers and addresses do in C
    function.argtypes = [ctypes.c_void_p] * n_arguments
    return function


def status(name, *arguments):
    """Call a function of the driver, and return 0 or the number of an error. arguments: integers, addresses, byref()."""
    return _function(name, len(arguments))(*arguments)


def call(name, *arguments):
    """Call a function of the driver, or raise RuntimeError with the name of its error."""
    code = status(name, *arguments)
    if code:
        error = ctypes.c_char_p()
        status("cuGetErrorName", code, ctypes.byref(error))
        raise RuntimeError(
            f"the CUDA driver reports {(error.value or b'an error').decode()} ({name}). It may be of work enqueued earlier: with "
            "the environment variable GPUADAM_SYNC=1 gpuadam waits for each of its launches and names the one that failed"
        )


def asked(name, *arguments, kind=ctypes.c_void_p):
    """Return what a function of the driver writes to the place that its first argument points to."""
    result = kind()
    call(name, ctypes.byref(result), *arguments)
    return result.value


def current_device():
    """Return the number of the device of this thread's context, or None if the thread has none."""
    device = ctypes.c_int()
    return None if _function("cuCtxGetDevice", 1)(ctypes.byref(device)) else device.value


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
    capturing = ctypes.c_int()
    call("cuStreamIsCapturing", stream, ctypes.byref(capturing))
    return capturing.value != 0


@contextlib.contextmanager
def allowed_while_capturing():
    """Let this thread allocate and query events during a capture of CUDA's mode "global", torch's, which they would end.

    They are no part of the graph.
    """
    mode = ctypes.c_int(RELAXED)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # stores the former mode in its place
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
