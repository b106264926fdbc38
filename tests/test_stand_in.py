"""The stand-in for the CUDA driver does what CUDA says, and notices what CUDA would not."""

import ctypes
import os
import threading

import numpy as np
import pytest

from gpuadam.kernels import gpu_driver

pytestmark = pytest.mark.gpu

FILL = r"""
extern "C" __global__ void fill(float* a, long long n, float value) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) a[i] = value;
}
"""


@pytest.fixture
def fill(cp, driver):
    kernel = cp.RawKernel(FILL, "fill")

    def launch(array, value, n=None, stream=None):
        n = array.size if n is None else n
        with stream or cp.cuda.get_current_stream():
            kernel((-(-n // 64),), (64,), (array, np.int64(n), np.float32(value)))

    return launch


@pytest.fixture
def streams(cp, driver):
    return [cp.cuda.Stream(non_blocking=True) for _ in range(2)]


def problems(driver):
    """Return what was noticed so far, for tests that mean it to be."""
    return driver.end()


def error_of(cp, call, *arguments):
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError) as raised:
        call(*arguments)
    return str(raised.value).partition(":")[0]


# Order


def test_the_host_sees_a_result_only_after_it_has_waited(cp, fill, streams):
    array = cp.zeros(100, "f4")
    cp.cuda.Device().synchronize()
    pinned = cp.cuda.alloc_pinned_memory(400)
    seen = np.frombuffer(pinned, "f4", 100)
    seen[:] = 7
    fill(array, 5, stream=streams[0])
    array.data.copy_to_host_async(ctypes.c_void_p(seen.ctypes.data), 400, streams[0])
    assert (seen == 7).all()
    streams[0].synchronize()
    assert (seen == 5).all()


def test_streams_that_nothing_orders_are_not_in_order(cp, fill, streams):
    array = cp.zeros(100, "f4")
    cp.cuda.Device().synchronize()
    fill(array, 1, stream=streams[0])
    fill(array, 2, stream=streams[1])
    streams[1].synchronize()
    streams[0].synchronize()
    assert (array == 1).all()  # as late as can be


def test_an_event_orders_streams(cp, fill, streams):
    array = cp.zeros(100, "f4")
    cp.cuda.Device().synchronize()
    fill(array, 1, stream=streams[0])
    streams[1].wait_event(streams[0].record())
    fill(array, 2, stream=streams[1])
    streams[1].synchronize()
    assert (array == 2).all()


def test_the_legacy_default_stream_and_blocking_streams_wait_for_each_other(cp, fill):
    array, blocking = cp.zeros(100, "f4"), cp.cuda.Stream()
    fill(array, 1, stream=blocking)
    fill(array, 2)
    fill(array, 3, stream=blocking)
    blocking.synchronize()
    assert (array == 3).all()


def test_a_threads_default_stream_and_the_legacy_one_wait_for_each_other(cp, driver, fill):
    array, own = cp.zeros(100, "f4"), cp.cuda.Stream.ptds
    fill(array, 1, stream=own)
    fill(array, 2)
    fill(array, 3, stream=own)
    own.synchronize()
    assert (array == 3).all()
    names = []
    thread = threading.Thread(target=lambda: names.append(driver.work.stream(2, 0)))
    thread.start()
    thread.join()
    assert names[0] is not driver.work.stream(2, 0)


def test_a_stream_gets_the_handle_of_the_one_that_ended_last_and_has_an_id_of_its_own(cp, driver, fill, streams):
    array, ids = cp.zeros(100, "f4"), [gpu_driver.stream_id(stream.ptr) for stream in streams]
    cp.cuda.Device().synchronize()
    fill(array, 1, stream=streams[0])
    handles = [stream.ptr for stream in streams]
    while streams:
        streams.pop(0)
    again = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    assert [stream.ptr for stream in again] == handles[::-1]
    assert len({*ids, *(gpu_driver.stream_id(stream.ptr) for stream in again)}) == 4
    again[1].synchronize()
    with again[1]:
        assert not array.get().any()  # the fill is on the stream that ended
    cp.cuda.Device().synchronize()
    assert (array == 1).all()


def test_a_seed_chooses_the_order_and_the_same_seed_the_same(cp, driver, fill, streams, monkeypatch):
    array = cp.zeros(1, "f4")
    monkeypatch.setattr(driver.work, "seed", driver.work.seed)

    def last(seed):
        driver.work.reseed(seed)
        fill(array, 1, stream=streams[0])
        fill(array, 2, stream=streams[1])
        cp.cuda.runtime.deviceSynchronize()
        return float(array[0])

    cp.cuda.Device().synchronize()
    found = [last(seed) for seed in range(1, 12)]
    assert set(found) == {1, 2} and found == [last(seed) for seed in range(1, 12)]


def test_who_asks_an_event_again_and_again_is_answered(cp, fill, streams):
    array = cp.zeros(100, "f4")
    cp.cuda.Device().synchronize()
    fill(array, 1, stream=streams[0])
    event = streams[0].record()
    assert not event.done
    while not event.done:
        pass


# Memory


def test_an_access_past_the_end_of_an_array_is_named(cp, driver, fill):
    array = cp.zeros(100, "f4")
    fill(array, 1, n=101)
    assert error_of(cp, cp.cuda.runtime.deviceSynchronize) == "cudaErrorLaunchFailure"
    (problem,) = problems(driver)
    assert "the kernel fill: 1 accesses outside" in problem and "0 bytes after the end of allocation" in problem
    assert "400 bytes" in problem


def test_an_access_of_freed_memory_is_named(cp, driver, fill, streams):
    array = cp.zeros(100, "f4")
    cp.cuda.Device().synchronize()
    fill(array, 1, stream=streams[0])
    del array
    cp.cuda.Stream.null.synchronize()
    assert error_of(cp, streams[0].synchronize) == "cudaErrorLaunchFailure"
    (problem,) = problems(driver)
    assert "freed" in problem


def test_a_copy_past_the_end_is_named(cp, driver):
    runtime, array = cp.cuda.runtime, cp.zeros(100, "f4")
    host = np.zeros(101, "f4")
    assert error_of(cp, runtime.memcpy, host.ctypes.data, array.data.ptr, 404, runtime.memcpyDeviceToHost)
    (problem,) = problems(driver)
    assert "a copy reads: 404 bytes" in problem


def test_new_memory_is_poisoned(cp, driver):
    assert np.isnan(cp.empty(100, "f4").get()).all()


def test_freeing_twice_is_named(cp, driver):
    runtime = cp.cuda.runtime
    address = runtime.malloc(100)
    runtime.free(address)
    assert error_of(cp, runtime.free, address) == "cudaErrorInvalidValue"
    (problem,) = problems(driver)
    assert "a free of" in problem and "freed" in problem


def test_devices_have_memories_of_their_own(cp, driver, fill):
    with cp.cuda.Device(1):
        there = cp.zeros(100, "f4")
    assert cp.cuda.runtime.pointerGetAttributes(there.data.ptr).device == 1
    cp.cuda.Device(1).synchronize()
    driver.peers.clear()
    address = there.data.ptr
    here = cp.ndarray((100,), "f4", cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(address, 400, there, 0), 0))
    fill(here, 1)
    assert error_of(cp, cp.cuda.runtime.deviceSynchronize) == "cudaErrorLaunchFailure"
    (problem,) = problems(driver)
    assert "on device 1" in problem


def test_memory_ends(cp, driver):
    assert error_of(cp, cp.cuda.runtime.malloc, 3 << 30) == "cudaErrorMemoryAllocation"


def test_pinned_memory_is_the_devices_too(cp, driver, fill):
    pinned = cp.cuda.alloc_pinned_memory(400)
    view = cp.ndarray((100,), "f4", cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(pinned.ptr, 400, pinned, 0), 0))
    fill(view, 3)
    cp.cuda.Device().synchronize()
    assert (np.frombuffer(pinned, "f4", 100) == 3).all()


# Graphs


def captured(cp, stream, work, mode=None):
    stream.begin_capture(*([] if mode is None else [mode]))
    work()
    return stream.end_capture()


def test_a_graph_runs_when_it_is_launched_and_each_time(cp, fill, streams):
    array = cp.zeros(100, "f4")
    cp.cuda.Device().synchronize()
    fill(array, 0, stream=streams[0])  # compiles
    graph = captured(cp, streams[0], lambda: fill(array, 4, stream=streams[0]))
    streams[0].synchronize()
    assert (array == 0).all()
    for _ in range(2):
        graph.launch(streams[0])
        streams[0].synchronize()
        assert (array == 4).all()
        array.fill(0)
        cp.cuda.Device().synchronize()


def ended(cp, stream):
    """End a capture that has failed. Return the error."""
    return error_of(cp, stream.end_capture)


def test_waiting_for_a_stream_that_is_captured_is_refused_and_ends_the_capture(cp, streams):
    streams[0].begin_capture()
    assert error_of(cp, streams[0].synchronize) == "cudaErrorStreamCaptureUnsupported"
    assert ended(cp, streams[0]) == "cudaErrorStreamCaptureInvalidated"


def test_allocating_in_a_capture_is_refused_unless_it_is_relaxed(cp, driver, streams):
    runtime = cp.cuda.runtime
    for mode, refused in ((0, True), (1, True), (2, False)):
        runtime.streamBeginCapture(streams[0].ptr, mode)
        if refused:
            assert error_of(cp, runtime.malloc, 64) == "cudaErrorStreamCaptureUnsupported"
            assert error_of(cp, runtime.streamEndCapture, streams[0].ptr) == "cudaErrorStreamCaptureInvalidated"
        else:
            runtime.free(runtime.malloc(64))
            runtime.graphDestroy(runtime.streamEndCapture(streams[0].ptr))


@pytest.mark.parametrize("mode, refused", [(0, True), (1, False), (2, False)], ids=["global", "thread local", "relaxed"])
def test_a_capture_of_mode_global_forbids_to_allocate_in_other_threads(cp, driver, streams, mode, refused):
    runtime, errors = cp.cuda.runtime, []

    def allocate():
        try:
            runtime.free(runtime.malloc(64))
        except runtime.CUDARuntimeError as error:
            errors.append(error)

    runtime.streamBeginCapture(streams[0].ptr, mode)
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert bool(errors) == refused
    if refused:
        assert error_of(cp, runtime.streamEndCapture, streams[0].ptr) == "cudaErrorStreamCaptureInvalidated"
    else:
        runtime.graphDestroy(runtime.streamEndCapture(streams[0].ptr))


def test_the_legacy_stream_ends_the_capture_of_a_blocking_one(cp, fill):
    array, blocking = cp.zeros(100, "f4"), cp.cuda.Stream()
    fill(array, 0)
    cp.cuda.Device().synchronize()
    blocking.begin_capture()
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="STREAM_CAPTURE_IMPLICIT"):
        fill(array, 1)
    assert ended(cp, blocking) == "cudaErrorStreamCaptureInvalidated"


def test_a_capture_cannot_wait_for_what_is_outside(cp, streams):
    event = streams[1].record()
    streams[0].begin_capture()
    assert error_of(cp, streams[0].wait_event, event) == "cudaErrorStreamCaptureIsolation"
    assert ended(cp, streams[0]) == "cudaErrorStreamCaptureInvalidated"


def test_a_stream_that_joined_a_capture_has_to_be_waited_for(cp, fill, streams):
    array = cp.zeros(100, "f4")
    fill(array, 0)
    cp.cuda.Device().synchronize()
    for joined in (False, True):
        streams[0].begin_capture()
        streams[1].wait_event(streams[0].record())
        fill(array, 1, stream=streams[1])
        if joined:
            streams[0].wait_event(streams[1].record())
            graph = streams[0].end_capture()
            graph.launch(streams[0])
            streams[0].synchronize()
            assert (array == 1).all()
        else:
            assert ended(cp, streams[0]) == "cudaErrorStreamCaptureUnjoined"


# Faults


def test_the_call_that_is_named_fails_and_the_next_works(cp, driver):
    driver.fail(1, "OUT_OF_MEMORY", names=["runtime_cudaMalloc"])
    runtime = cp.cuda.runtime
    runtime.free(runtime.malloc(64))
    assert error_of(cp, runtime.malloc, 64) == "cudaErrorMemoryAllocation"
    runtime.free(runtime.malloc(64))
    assert not driver.fail_no_more()


def test_a_call_fails_again_and_again_until_it_need_not(cp, driver):
    driver.fail(0, "OUT_OF_MEMORY", names=["runtime_cudaMalloc"], always=True)
    for _ in range(2):
        assert error_of(cp, cp.cuda.runtime.malloc, 64) == "cudaErrorMemoryAllocation"
    assert not driver.fail_no_more()
    cp.cuda.runtime.free(cp.cuda.runtime.malloc(64))


def test_an_old_driver_loads_no_module_amid_a_capture_of_any_mode(cp, driver, streams):
    driver.loads_while_capturing = False
    for mode in range(3):
        kernel = cp.RawKernel(f'extern "C" __global__ void nothing_{mode}() {{ }}', f"nothing_{mode}")
        streams[0].begin_capture(mode)
        with pytest.raises(cp.cuda.driver.CUDADriverError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            kernel.compile()
        assert ended(cp, streams[0]) == "cudaErrorStreamCaptureInvalidated"
        kernel.compile()


def test_what_the_stand_in_lacks_is_named(driver):
    address = driver.missing("cuTexRefCreate")
    assert ctypes.CFUNCTYPE(ctypes.c_int)(address)() == 801
    (problem,) = problems(driver)
    assert "cuTexRefCreate was called" in problem


def test_a_library_that_another_user_could_have_made_is_not_loaded(tmp_path, monkeypatch):
    from stand_in import library

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"gpuadam-stand-in-{os.getuid()}").mkdir()
    (tmp_path / f"gpuadam-stand-in-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="TMPDIR"):
        library.build.__wrapped__(("cuInit",))
