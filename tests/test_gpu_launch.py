"""A launch on a GPU: what is updated and what is left alone, on which stream the launch goes, and which streams wait."""

from concurrent.futures import ThreadPoolExecutor

import libraries
import numpy as np
import pytest
from cases import DTYPES, FORMS, KEY_FORMS, assert_same_bits, form_and_scalars, state, wide_state
from gpu_work import STREAM_WAITS, busy_stream

import gpuadam


def assert_a_step_gives_the_cpus_bits(cp, backend, wholes, views, step=3, **options):
    """wholes: NumPy arrays or None. views: functions of a whole that return the array to update, whose neighbours must stay."""
    on_gpu = [None if whole is None else cp.asarray(whole) for whole in wholes]
    on_cpu = [None if whole is None else whole.copy() for whole in wholes]
    for arrays, name in ((on_gpu, backend), (on_cpu, "numba-cpu")):
        *used, max_v = [None if whole is None else view(whole) for view, whole in zip(views, arrays, strict=True)]
        gpuadam.adam_step(*used, step, max_v=max_v, backend=name, **options)
    assert_same_bits([None if whole is None else whole.get() for whole in on_gpu], on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KEY_FORMS)
def test_arrays_of_any_size_and_start_are_updated_and_nothing_beside_them(cp, backend, name, dtype):
    options = dict(FORMS[name])
    amsgrad = options.pop("amsgrad", False)
    for n in (0, 1, 5, 1003):
        for offsets in ((0,) * 5, (1,) * 5, (0, 1, 0, 1, 0)):
            arrays = zip(wide_state(n, dtype, amsgrad), offsets, strict=True)
            wholes = [None if a is None else np.pad(a, (offset, 8), constant_values=7) for a, offset in arrays]
            views = [lambda whole, offset=offset, n=n: whole[offset : offset + n] for offset in offsets]
            assert_a_step_gives_the_cpus_bits(cp, backend, wholes, views, **options)


@pytest.mark.gpu
def test_arrays_that_are_each_laid_out_differently_are_updated_and_nothing_beside_them(cp, backend):
    views = [
        lambda whole: whole[:153].reshape(17, 9).T,
        lambda whole: whole[:153].reshape(9, 17),
        lambda whole: whole[:306:2].reshape(9, 17),
        lambda whole: whole[:400].reshape(20, 20)[3:12, 1:18],
        lambda whole: whole[152::-1].reshape(9, 17)[::-1],
    ]
    assert_a_step_gives_the_cpus_bits(cp, backend, wide_state(400, amsgrad=True), views, **FORMS["adamw"])


@pytest.mark.gpu
@pytest.mark.parametrize("order", "CF")
def test_arrays_of_one_order_of_memory_are_read_by_16_bytes(cp, backend, driver, order):
    arrays = [cp.asarray(np.array(a.reshape(9, 17), order=order)) for a in state(153)[:4]]
    driver.listen()
    gpuadam.adam_step(*arrays, 1, backend=backend)
    ((kernel, _),) = driver.launches
    assert "ld.global.v4.f32" in kernel.text.replace(".nc.", ".").replace(".b32", ".f32").replace(".u32", ".f32")


@pytest.mark.gpu
def test_a_thread_without_a_context_updates_too(cp, backend):
    arrays = [cp.ones(1000, "f4") for _ in range(4)]
    cp.cuda.Device().synchronize()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(gpuadam.adam_step, *arrays, 1, backend=backend).result()
    assert not np.any(arrays[0].get() == 1)


@pytest.mark.gpu
def test_an_update_of_no_elements_launches_nothing(cp, backend, driver):
    arrays = [cp.zeros(0, "f4") for _ in range(4)]
    driver.listen()
    gpuadam.adam_step(*arrays, 1, backend=backend)
    assert driver.launches == []


class OnStream:
    """A CuPy array of another library that says on which stream it was last used. stream: a handle, or None."""

    def __init__(self, array, stream):
        self.array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"stream": stream}


LEGACY_DEFAULT = 1


@pytest.mark.gpu
@pytest.mark.parametrize("read_on", ["current", "named"])
def test_an_update_waits_for_the_streams_that_arrays_name_and_they_wait_for_the_update(cp, backend, read_on):
    given = wide_state(1003)[:4]
    expected = [a.copy() for a in given]
    gpuadam.adam_step(*expected, 1)
    made, arrays = [cp.asarray(a) for a in given], [cp.zeros(1003, "f4") for _ in given]
    stream = busy_stream(cp)
    with stream:
        for array, values in zip(arrays[1::2], made[1::2], strict=True):
            array[...] = values
    for array, values in zip(arrays[::2], made[::2], strict=True):
        array[...] = values
    named = [OnStream(a, s) for a, s in zip(arrays, (LEGACY_DEFAULT, stream.ptr, None, stream.ptr), strict=True)]
    gpuadam.adam_step(*named, 1, backend=backend)
    with stream if read_on == "named" else cp.cuda.Stream.null:
        assert_same_bits([a.get() for a in arrays], expected)


@pytest.mark.gpu
def test_an_update_goes_to_the_one_stream_that_its_arrays_name_and_nothing_waits(cp, backend, driver):
    ones = [cp.ones(64, "f4") for _ in range(4)]
    stream = busy_stream(cp)  # when they are there
    arrays = [OnStream(one, stream.ptr) for one in ones]
    driver.listen()
    gpuadam.adam_step(*arrays, 1, backend=backend)
    assert [handle for _, handle in driver.launches] == [stream.ptr]
    assert not set(driver.calls) & set(STREAM_WAITS)
    stream.synchronize()  # before the arrays go


@pytest.mark.gpu
def test_arrays_of_the_current_stream_are_waited_for_by_none(cp, backend, driver):
    arrays = [cp.ones(64, "f4") for _ in range(4)]
    driver.listen()
    gpuadam.adam_step(*arrays, 1, backend=backend)
    assert [handle for _, handle in driver.launches] == [LEGACY_DEFAULT]
    assert not set(driver.calls) & set(STREAM_WAITS)


def test_the_kernels_are_named_for_what_is_in_them():
    libraries.imported("cupy")
    from gpuadam.kernels import adam, cupy_kernels, limit

    form, _ = form_and_scalars("adam", "float32")
    assert cupy_kernels.build(adam, form, "contiguous").name == "gpuadam_adam_float32_contiguous"
    assert cupy_kernels.build(limit, form, "strided").name == "gpuadam_limit_float32_strided"
