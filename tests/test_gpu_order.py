"""Work on streams that wait for no other: what is enqueued on one is there for whoever uses it next, on whichever stream.

A stream is busy before the work of each test. So a wait that is missing shows on a GPU, too, and not only on the stand-in for the
driver, which does everything as late as it may.
"""

import gc

import numpy as np
import pytest
from cases import assert_same_bits
from gpu_work import OnStream

import gpuadam
from gpuadam import backends, remembered
from gpuadam.backends import load
from gpuadam.kernels import gpu_table
from gpuadam.kernels.gpu_batch import Place
from gpuadam.kernels.streams import LEGACY_DEFAULT

pytestmark = pytest.mark.gpu

N = 1000
LAYOUTS = {
    "every second": lambda whole: whole[::2],
    "backwards": lambda whole: whole[::-3],
    "a part of a matrix": lambda whole: whole.reshape(20, 50)[3:9, 5:45],
    "a transposed part": lambda whole: whole.reshape(20, 50)[3:9, 5:45].T,
    "F order": lambda whole: whole.reshape(20, 50).T,
    "three dimensions with gaps": lambda whole: whole.reshape(10, 10, 10)[1::2, ::-2, 2:8:3],
    "one element": lambda whole: whole[7:8:3],
    "no dimensions": lambda whole: whole[7:8].reshape(()),
    "no elements": lambda whole: whole[5:5:2],
}


@pytest.fixture
def busy(cp):
    """A function that returns a new stream with something to do, which waits for no other stream."""
    kernel = cp.RawKernel(
        r'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }', "spin"
    )

    def busy():
        stream = cp.cuda.Stream(non_blocking=True)
        kernel((1,), (1,), (np.int64(20_000_000),), stream=stream)
        return stream

    cp.cuda.Device().synchronize()
    return busy


def filled(cp, stream, value, shape=N, dtype="f4"):
    """Return an array that a stream fills when it is done with what is on it."""
    array = cp.zeros(shape, dtype)
    cp.cuda.Device().synchronize()
    with stream:
        array.fill(value)
    return array


# Gradients of a step that is left out

LEFT_OUT = {"found_inf": {"found_inf": 1}, "check_finite": {"norm": np.inf, "check_finite": True}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_left_out_step_zeroes_gradients_of_any_layout_and_not_their_neighbours(cp, backend, layout):
    whole, expected = cp.ones(N, "f4"), np.ones(N, "f4")
    LAYOUTS[layout](expected)[...] = 0
    grad = LAYOUTS[layout](whole)
    gpuadam.Adam([cp.zeros(grad.shape, "f4")], zero_grad=True, backend=backend).step([grad], found_inf=1)
    assert_same_bits([whole.get()], [expected])


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_zeros_of_any_size_go_between_gaps(cp, backend, itemsize):
    whole, expected = cp.ones(N, f"u{itemsize}"), np.ones(N, f"u{itemsize}")
    kernels, (view,) = backends.choose([("x", whole[::2])], backend)
    kernels.fill_zero(view)
    expected[::2] = 0
    assert_same_bits([whole.get()], [expected])


@pytest.mark.parametrize("condition", LEFT_OUT)
@pytest.mark.parametrize("step", [slice(None), slice(None, None, 2)], ids=["dense", "strided"])
def test_a_left_out_step_zeroes_gradients_on_the_given_stream(cp, backend, busy, condition, step):
    stream = busy()
    whole = filled(cp, stream, 7)
    grad = whole[step]
    opt = gpuadam.Adam([cp.zeros(grad.shape, "f4")], zero_grad=True, backend=backend)
    opt.step([grad], stream=stream, **LEFT_OUT[condition])
    with stream:
        copy = grad.copy()
    stream.synchronize()
    assert not copy.get(stream=stream).any()


def test_a_left_out_step_zeroes_gradients_on_the_stream_that_they_name(cp, backend, busy):
    stream = busy()
    grad = filled(cp, stream, 7)
    opt = gpuadam.Adam([OnStream(cp.zeros(N, "f4"), stream)], zero_grad=True, backend=backend)
    opt.step([OnStream(grad, stream)], found_inf=1)
    with stream:
        copy = grad.copy()
    assert not copy.get(stream=stream).any()


def test_a_left_out_step_on_a_given_stream_is_ordered_with_the_current_one(cp, backend, busy):
    opt = gpuadam.Adam([cp.zeros(N, "f4")], zero_grad=True, backend=backend)
    current, given = busy(), busy()
    with current:
        grad = filled(cp, current, 7)
        opt.step([grad], found_inf=1, stream=given)
        assert not grad.get().any()


def test_an_offloaded_step_that_is_left_out_has_zeroed_the_gradients_when_it_returns(cp, backend, busy):
    stream, elsewhere = busy(), busy()
    opt = gpuadam.OffloadAdam([cp.zeros(N, "f4")], zero_grad=True, backend=backend, update="device")
    grad = filled(cp, stream, np.inf)
    opt.step([grad], check_finite=True, stream=stream)
    assert opt.steps == 0
    assert not grad.get(stream=elsewhere).any()


def test_the_cpu_has_no_streams_for_a_step_that_is_left_out():
    opt = gpuadam.Adam([np.zeros(3, "f4")], zero_grad=True)
    with pytest.raises(TypeError, match="no streams"):
        opt.step([np.ones(3, "f4")], found_inf=1, stream=1)


@pytest.mark.parametrize("layout", ["every second", "F order"])
def test_a_left_out_step_zeroes_gradients_of_another_device_than_the_current_one(cp, backend, busy, layout):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    with cp.cuda.Device(1):
        stream = busy()
        whole = filled(cp, stream, 7)
        grad = LAYOUTS[layout](whole)
        opt = gpuadam.Adam([cp.zeros(grad.shape, "f4")], zero_grad=True, backend=backend)
    opt.step([grad], found_inf=1, stream=stream)
    with cp.cuda.Device(1):
        expected = np.full(N, 7, "f4")
        LAYOUTS[layout](expected)[...] = 0
        assert_same_bits([whole.get(stream=stream)], [expected])


# The norm


def test_the_norm_of_another_librarys_gradients_is_there_for_the_current_stream(cp, backend, busy):
    stream, current = busy(), busy()
    grad = filled(cp, stream, 3)
    for now in (cp.cuda.Stream.null, current):
        with now:
            norm = cp.asarray(gpuadam.global_norm([OnStream(grad, stream)], backend=backend))
            assert float(norm) == np.sqrt(9 * N)


def test_a_norm_on_a_given_stream_is_there_for_it_and_for_the_current_one(cp, backend, busy):
    stream, current = busy(), busy()
    grad = filled(cp, stream, 3)
    with current:
        norm = cp.asarray(gpuadam.global_norm([grad], stream=stream, backend=backend))
        assert float(norm) == np.sqrt(9 * N)
    grad = filled(cp, stream, 4)
    with current:
        norm = cp.asarray(gpuadam.global_norm([grad], stream=stream, backend=backend))
    with stream:
        assert float(norm) == np.sqrt(16 * N)


def test_the_norm_of_numba_arrays_on_a_stream_of_theirs_is_there_for_numba(cp, busy):
    from numba import cuda

    stream = busy()
    grad = filled(cp, stream, 3)
    numbas = cuda.external_stream(stream.ptr)
    named = cuda.as_cuda_array(grad, sync=False).bind(numbas)
    norm = gpuadam.global_norm([named])
    assert norm.copy_to_host() == np.sqrt(9 * N)


def test_steps_clip_by_a_norm_when_the_stream_of_the_first_is_gone(cp, backend, busy):
    params, on_host = cp.zeros(N, "f4"), np.zeros(N, "f4")
    opt, reference = gpuadam.Adam([params], backend=backend), gpuadam.Adam([on_host])
    for k in range(3):
        stream = busy()
        grad = filled(cp, stream, k + 1)
        opt.step([grad], max_norm=1.0, stream=stream)
        reference.step([np.full(N, k + 1, "f4")], max_norm=1.0)
        stream.synchronize()
        del stream
    assert_same_bits([params.get()], [on_host])


@pytest.mark.parametrize("given", [False, True], ids=["named", "given"])
@pytest.mark.parametrize("update", ["device", "host"])
def test_offloaded_steps_clip_by_the_norm_of_gradients_on_another_stream(cp, backend, busy, update, given):
    params, on_host = cp.zeros(N, "f4"), np.zeros(N, "f4")
    stream = busy()
    opt = gpuadam.OffloadAdam([params if given else OnStream(params, stream)], backend=backend, update=update)
    reference = gpuadam.Adam([on_host])
    for k in range(3):
        grad = filled(cp, stream, k + 1)
        opt.step([grad if given else OnStream(grad, stream)], max_norm=1.0, **({"stream": stream} if given else {}))
        reference.step([np.full(N, k + 1, "f4")], max_norm=1.0)
        assert_same_bits([params.get(stream=busy())], [on_host])


def test_an_offloaded_step_reads_its_conditions_on_the_given_stream(cp, backend, busy):
    params = cp.zeros(N, "f4")
    opt = gpuadam.OffloadAdam([params], backend=backend, update="device")
    stream = busy()
    flag = filled(cp, stream, 1, ())
    opt.step([cp.ones(N, "f4")], found_inf=flag, stream=stream)
    assert opt.steps == 0
    assert not params.get().any()


# Streams that end while there is work on them. The driver gives their handles out again


@pytest.fixture
def follower(cp, driver):
    """A function that ends the only stream of a list and returns a new one with its handle, which waits for nothing."""

    def follow(streams):
        handle = streams[0].ptr
        del streams[:]
        stream = cp.cuda.Stream(non_blocking=True)
        assert stream.ptr == handle
        return stream

    return follow


def test_a_norm_is_not_that_of_a_stream_that_ended_with_its_handle(cp, backend, busy, follower, monkeypatch):
    """It would read a table that is on its way on the first stream, and add up in memory that both write."""
    monkeypatch.setattr(gpu_table, "buffers", [])
    grads = [cp.full(n, 3, "f4") for n in (N, 17, 70_000)]
    expected, out = np.sqrt(9.0 * (N + 17 + 70_000)), cp.zeros(())
    cp.cuda.Device().synchronize()
    ended = [busy()]
    with ended[0]:
        gpuadam.global_norm(grads, out=out, backend=backend)
    stream = follower(ended)
    with stream:
        gpuadam.global_norm(grads, out=out, backend=backend)
        assert float(out.get()) == expected
    for k in range(2 * remembered.MOST_NORMS):  # what is kept of both is let go, and would be given to these
        gpuadam.global_norm([cp.full(N + k, 5, "f4") for _ in range(3)], out=cp.zeros(()), backend=backend)
    cp.cuda.Device().synchronize()
    assert float(out) == expected


def test_a_table_is_sent_before_another_stream_with_the_same_handle_reads_it_and_kept_until_all_have(
    cp, backend, busy, follower, monkeypatch
):
    monkeypatch.setattr(gpu_table, "buffers", [])
    kernels = load(backend)
    pinned, n_bytes = [kernels.pinned(64) for _ in range(2)], 64
    table = gpu_table.Table(kernels, 0, n_bytes, lambda address: np.full(n_bytes, 7, "u1"))

    def read(to, stream):
        with kernels.on(0, stream.ptr):
            place = Place(stream.ptr, [], False)
            kernels.receive(to, table.on_stream(place), n_bytes, stream.ptr)
            table.used(place)

    ended = [busy()]
    for _ in range(2):
        read(pinned[0], ended[0])
    stream = follower(ended)
    read(pinned[1], stream)
    stream.synchronize()
    assert (pinned[1] == 7).all()
    table.release()
    others = [gpu_table.Table(kernels, 0, n_bytes, lambda address: np.full(n_bytes, 9, "u1")) for _ in range(8)]
    with kernels.on(0, LEGACY_DEFAULT):
        for other in others:
            other.on_stream(Place(LEGACY_DEFAULT, [], False))
    cp.cuda.Stream.null.synchronize()
    cp.cuda.Device().synchronize()
    assert (pinned[0] == 7).all()


@pytest.mark.parametrize("of_step", [{}, {"max_norm": 1.0}], ids=["plain", "clipped"])
def test_steps_on_a_stream_of_their_own_each_keep_no_more_and_more(cp, backend, driver, of_step):
    params, on_host = [cp.zeros(n, "f4") for n in (N, 17)], [np.zeros(n, "f4") for n in (N, 17)]
    opt, reference = gpuadam.Adam(params, backend=backend), gpuadam.Adam(on_host)
    grads, held = [cp.full(n, 3, "f4") for n in (N, 17)], []
    cp.cuda.Device().synchronize()
    living = []  # so that no handle is used twice
    for _ in range(4 * gpu_table.MOST_STREAMS):
        living.append(cp.cuda.Stream(non_blocking=True))
        with living[-1]:
            opt.step(grads, **of_step)
        living[-1].synchronize()
        reference.step([np.full(n, 3, "f4") for n in (N, 17)], **of_step)
        gc.collect()
        held.append((len(driver.events), len(gpu_table.buffers)))
    assert held[-1][0] - held[gpu_table.MOST_STREAMS][0] <= gpu_table.MOST_STREAMS
    assert held[-1][1] == held[gpu_table.MOST_STREAMS][1]
    assert_same_bits([param.get() for param in params], on_host)


# New memory, and copies


@pytest.mark.parametrize("of", ["zeros", "zeros_like", "zeros_like in F order", "from_host"])
def test_new_memory_is_there_for_any_stream(cp, backend, busy, of):
    kernels = load(backend)
    elsewhere = busy()
    view = kernels.view("x", cp.empty((20, 50), "f4", order="F" if "F order" in of else "C"))
    with busy():
        made = {
            "zeros": lambda: kernels.zeros(N, np.dtype("f4"), 0),
            "zeros_like": lambda: kernels.zeros_like_all([view], view.dtype)[0],
            "from_host": lambda: kernels.from_host(np.zeros(N, "f4")),
        }[of.partition(" ")[0]]()
    address = made.__cuda_array_interface__["data"][0]
    there = cp.ndarray(N, "f4", cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(address, 4 * N, made), 0))
    assert not there.get(stream=elsewhere).any()


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"amsgrad": True, "ema_decay": 0.9}], ids=str)
def test_the_first_step_is_on_another_stream_than_the_optimizer_was_made_on(cp, backend, busy, options):
    params, on_host = cp.ones(N, "f4"), np.ones(N, "f4")
    cp.cuda.Device().synchronize()
    with busy():
        opt = gpuadam.Adam([params], backend=backend, **options)
    with busy() as stream:
        opt.step([cp.full(N, 3, "f4")])
        there = params.get(stream=stream)
    reference = gpuadam.Adam([on_host], **options)
    reference.step([np.full(N, 3, "f4")])
    assert_same_bits([there], [on_host])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_to_the_host_is_the_array_whichever_stream_writes_it(cp, backend, busy, layout):
    stream = busy()
    whole = filled(cp, stream, 3)
    values = cp.arange(N, dtype="f4")
    cp.cuda.Device().synchronize()
    with stream:
        whole += values
    expected = LAYOUTS[layout](3 + np.arange(N, dtype="f4"))
    for array in (LAYOUTS[layout](whole), OnStream(LAYOUTS[layout](whole), stream)):
        assert_same_bits([load(backend).to_host(array)], [np.ascontiguousarray(expected).reshape(expected.shape)])
    cp.cuda.Device().synchronize()


def test_a_copy_is_ordered_with_the_streams_of_both_arrays(cp, backend, busy):
    kernels = load(backend)
    of_source, of_copy, current = busy(), busy(), busy()
    source, to = filled(cp, of_source, 3), filled(cp, of_copy, 7)
    for value, now in ((3, cp.cuda.Stream.null), (4, current)):
        with now:
            kernels.copy(kernels.view("to", OnStream(to, of_copy)), kernels.view("source", OnStream(source, of_source)))
        with of_source:
            source += 1
        assert (to.get(stream=of_copy) == value).all()
    cp.cuda.Device().synchronize()


# The step count, and state that is loaded


def capturable(cp, backend, busy):
    params = cp.zeros(N, "f4")
    opt, grad, stream = gpuadam.Adam([params], cp.full(1, 0.5), capturable=True, backend=backend), cp.ones(N, "f4"), busy()
    for _ in range(2):  # the first compiles
        cp.cuda.Device().synchronize()
        with stream:
            opt.step([grad])
    return opt, stream, grad  # which the step still reads


def test_the_step_count_is_read_when_the_steps_of_every_stream_are_done(cp, backend, busy):
    opt, _stream, _grad = capturable(cp, backend, busy)
    assert opt.state_dict()["state"]["0"]["step"] == 2


def test_a_learning_rate_is_saved_when_the_streams_that_write_it_are_done(cp, backend, busy):
    opt, stream, _grad = capturable(cp, backend, busy)
    with stream:
        opt.groups[0]["lr"].fill(0.25)
    assert opt.state_dict()["groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("rate", ["of the host", "on the device"])
def test_steps_on_one_stream_after_the_other_count_one_after_the_other(cp, backend, busy, rate):
    params, on_host = cp.zeros(N, "f4"), np.zeros(N, "f4")
    opt = gpuadam.Adam([params], 0.5 if rate == "of the host" else cp.full(1, 0.5), capturable=True, backend=backend)
    reference, grad = gpuadam.Adam([on_host], 0.5), cp.ones(N, "f4")
    cp.cuda.Device().synchronize()
    for k in range(5):
        opt.step([grad], stream=busy(), grad_scale=k + 1)
        reference.step([np.ones(N, "f4")], grad_scale=k + 1)
    assert_same_bits([params.get()], [on_host])


@pytest.mark.parametrize("kind", ["plain", "capturable"])
def test_loaded_state_is_not_that_of_a_step_before_and_is_there_for_the_next_on_any_stream(cp, backend, busy, kind):
    options = {"capturable": True} if kind == "capturable" else {}
    rate = 0.5 if kind == "plain" else cp.full(1, 0.5)
    params, on_host = cp.zeros(N, "f4"), np.zeros(N, "f4")
    opt, reference = gpuadam.Adam([params], rate, backend=backend, **options), gpuadam.Adam([on_host], 0.5)
    kept = gpuadam.Adam([cp.zeros(N, "f4")], 0.25, backend=backend)
    with busy() as stream:
        kept.step([cp.full(N, 5, "f4")])
        stream.synchronize()
    with busy():
        opt.step([cp.full(N, 2, "f4")])
    opt.load_state_dict(kept.state_dict())
    with busy() as stream:
        params.fill(0)
        opt.step([cp.full(N, 2, "f4")])
        there = params.get(stream=stream)
    other = gpuadam.Adam([np.zeros(N, "f4")], 0.25)
    other.step([np.full(N, 5, "f4")])
    reference.load_state_dict(other.state_dict())
    reference.step([np.full(N, 2, "f4")])
    assert_same_bits([there], [on_host])


@pytest.mark.parametrize("master", ["float32", None])
def test_offloaded_parameters_are_read_when_the_stream_that_they_name_is_done(cp, backend, busy, master):
    stream, current = busy(), busy()
    params = filled(cp, stream, 3, dtype="f2")
    on_host = np.full(N, 3, "f2")
    with current:
        opt = gpuadam.OffloadAdam([OnStream(params, stream)], 1e-3, master=master, backend=backend, update="device")
        opt.step([OnStream(cp.ones(N, "f2"), current)])
    reference = gpuadam.OffloadAdam([on_host], 1e-3, master=master, update="host", backend="numba-cpu")
    reference.step([np.ones(N, "f2")])
    assert_same_bits([params.get()], [on_host])
    if master:
        assert_same_bits([opt.state["0"]["master"]], [reference.state["0"]["master"]])
