"""How a library begins: versions, errors in words, and functions by name."""

import ctypes

from .driver import ERRORS, I32, U64, Driver, Failure, entry
from .library import write


@entry("cuInit", "u", counted=False)
def init(d, flags):
    pass


@entry("cuDriverGetVersion", "p", counted=False)
def driver_version(d, out):
    write(out, I32, d.version)


@entry("cuGetErrorString", "ip", counted=False)
def error_string(d, code, out):
    return _error_text(d, code, out, "{}, says gpuadam's stand-in for the driver")


@entry("cuGetErrorName", "ip", counted=False)
def error_name(d, code, out):
    return _error_text(d, code, out, "CUDA_ERROR_{}")


def _error_text(d, code, out, form):
    name = next((name for name, number in ERRORS.items() if number == code), None)
    if name is None:
        raise Failure("INVALID_VALUE")
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
