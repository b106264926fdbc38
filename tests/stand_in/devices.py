"""Devices and contexts. Each device has one context, its primary one."""

import ctypes
import functools

from .driver import ATTRIBUTES, CONTEXT_AT, I32, NAME, U32, U64, VERSION, Failure, entry
from .library import write


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
        raise Failure("PEER_ACCESS_ALREADY_ENABLED")
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
        raise Failure("INVALID_CONTEXT")
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
