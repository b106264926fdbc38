"""Streams and events."""

import ctypes

from . import work
from .driver import F32, I32, U32, U64, Failure, entry
from .library import write


@entry("cuStreamCreate", "pu")
def stream_create(d, out, flags):
    return stream_create_with_priority(d, out, flags, 0)


@entry("cuStreamCreateWithPriority", "pui")
def stream_create_with_priority(d, out, flags, priority):
    handle = d.ended_streams.pop() if d.ended_streams else d.handle()
    d.work.streams[handle] = work.Stream(handle, d.device, blocking=not flags & 1, priority=priority)
    write(out, U64, handle)


@entry("cuStreamDestroy_v2", "p")
def stream_destroy(d, handle):
    stream = d.stream(handle)
    if stream.capture is not None:
        stream.capture.invalid = True
        if stream.capture.origin is stream:  # nothing can end it any more
            d.captures.remove(stream.capture)
            stream.capture.end()
    # what is on it goes on; and the next stream has its handle, as with the real driver
    if d.work.streams.pop(handle, None):
        d.ended_streams.append(handle)


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
    raise Failure("NOT_READY")


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
    write(out, U64, d.stream(handle).number)


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
    raise Failure("NOT_READY")


@entry("cuEventSynchronize", "p", unsafe=True)
def event_synchronize(d, handle):
    event = d.event(handle)
    if event.captured is not None:
        event.captured[0].invalid = True
        raise Failure("CAPTURED_EVENT")
    d.work.finish([event.after])


@entry("cuEventElapsedTime", "ppp")
@entry("cuEventElapsedTime_v2", "ppp")
def event_elapsed(d, out, start, end):
    events = d.event(start), d.event(end)
    if any(event.flags & 2 or event.after is None for event in events):
        raise Failure("INVALID_HANDLE")
    if not all(event.after.done for event in events):
        raise Failure("NOT_READY")
    write(out, F32, max(1, events[1].time - events[0].time) * 1e-3)  # a microsecond for each operation between them
