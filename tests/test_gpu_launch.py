"""The launch code of both GPU backends, up to the driver: what it hands to a kernel, and that it hands over the right thing."""

import numpy as np
import pytest
from cases import DTYPES, KEY_FORMS, assert_same_bits, at_offset, form_and_scalars, wide_state

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpu_code import cuda_view  # noqa: E402
from gpu_drivers import DRIVERS, NumbaDriver  # noqa: E402

from gpuadam.arrays import View, on_cpu  # noqa: E402
from gpuadam.kernels import adam, cupy_elementwise, limit, numba_cpu  # noqa: E402


@pytest.fixture(params=DRIVERS)
def driver(request, monkeypatch):
    return request.param(monkeypatch)


def assert_launch_gives_the_cpus_bits(driver, form, scalars, arrays):
    expected = [None if a is None else a.copy(order="K") for a in arrays]
    numba_cpu.launch(form, [None if a is None else on_cpu("", a) for a in expected], scalars)
    driver.launch(form, [None if a is None else cuda_view("", a) for a in arrays], scalars)
    assert_same_bits(arrays, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KEY_FORMS)
def test_any_size_and_start(driver, name, dtype):
    form, scalars = form_and_scalars(name, dtype)
    for n in (0, 1, 5, 1003):
        for offsets in ((0,) * 5, (1,) * 5, (0, 1, 0, 1, 0)):
            placed = [at_offset(a, o)[0] for a, o in zip(wide_state(n, dtype, form.amsgrad), offsets, strict=True)]
            assert_launch_gives_the_cpus_bits(driver, form, scalars, placed)


@pytest.mark.parametrize("order", "CF")
def test_arrays_of_one_order_of_memory_are_one_dimension_to_the_kernel(driver, order):
    form, scalars = form_and_scalars("amsgrad", "float32")
    arrays = [np.array(a.reshape(9, 17), order=order) for a in wide_state(153, "float32", True)]
    assert_launch_gives_the_cpus_bits(driver, form, scalars, arrays)
    assert driver.launches[0][0] == "contiguous"


LAYOUTS = {
    "every other": lambda a: np.repeat(a, 2)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "F order beside C": lambda a: np.asfortranarray(a.reshape(9, 17)),
    "a block": lambda a: np.pad(a.reshape(9, 17), 2)[2:-2, 2:-2],
    "3-D": lambda a: np.repeat(a.reshape(3, 3, 17), 2, axis=1)[:, ::2].transpose(2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arrays(driver, layout):
    form, scalars = form_and_scalars("all with adamw", "float32")
    given = wide_state(153, "float32", True)
    arrays = [LAYOUTS[layout](a) for a in given]
    arrays[1] = np.ascontiguousarray(arrays[1])
    assert_launch_gives_the_cpus_bits(driver, form, scalars, arrays)
    assert driver.launches[0][0].startswith("strided")


def test_streams_are_ordered_before_and_after(driver):
    form, scalars = form_and_scalars("adam", "float32")
    arrays = wide_state(64)[:4]
    views = [cuda_view("", a, stream) for a, stream in zip(arrays, (1, 77, None, 77), strict=True)]
    driver.launch(form, [*views, None], scalars)
    assert driver.waits == [(77, 1), (1, 77)]  # the update after what was on 77, and what comes next on 77 after the update


def test_one_stream_needs_no_ordering(driver):
    form, scalars = form_and_scalars("adam", "float32")
    views = [cuda_view("", a, 1) for a in wide_state(64)[:4]]
    driver.launch(form, [*views, None], scalars)
    assert driver.waits == []


def test_nothing_is_launched_for_no_elements(driver):
    form, scalars = form_and_scalars("adam", "float32")
    views = [View("", np.zeros(0, "f4"), 0, (0,), (4,), np.dtype("f4"), True, True, None) for _ in range(4)]
    driver.launch(form, [*views, None], scalars)
    assert driver.launches == []


def test_numba_launches_on_the_stream_that_the_arrays_name(monkeypatch):
    driver = NumbaDriver(monkeypatch)
    form, scalars = form_and_scalars("adam", "float32")
    driver.launch(form, [*(cuda_view("", a, 77) for a in wide_state(64)[:4]), None], scalars)
    assert driver.launches == [("contiguous", 1, 77)]


def test_the_kernels_are_named_for_what_is_in_them():
    form, _ = form_and_scalars("adam", "float32")
    assert cupy_elementwise.build(adam, form, "contiguous").name == "gpuadam_adam_float32_contiguous"
    assert cupy_elementwise.build(limit, form, "strided").name == "gpuadam_limit_float32_strided"
