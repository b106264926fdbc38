"""GPUADAM_SYNC=1: each launch is waited for, and an error names the launch that made it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import gpuadam
from gpuadam.kernels import synchronous

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpu_drivers import DRIVERS  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=DRIVERS)
def driver(request, monkeypatch):
    return request.param(monkeypatch)


@pytest.fixture
def sync(monkeypatch):
    monkeypatch.setattr(synchronous, "ON", True)


class DeviceError(RuntimeError):
    """As CuPy's and the driver's."""


ILLEGAL = DeviceError("CUDA_ERROR_ILLEGAL_ADDRESS")


def one_step(driver, **options):
    arrays = [driver.array(np.ones((2, 3), "f4")) for _ in range(4)]
    gpuadam.adam_step(*arrays, 1, backend=driver.backend, **options)
    return arrays


def test_a_launch_is_waited_for_on_its_stream_before_and_after(driver, sync):
    driver.current = 77
    one_step(driver)
    assert driver.waited_for == [77, 77]


def test_nothing_is_waited_for_by_default(driver):
    one_step(driver)
    assert len(driver.launches) == 1 and driver.waited_for == []


def test_an_error_names_the_operation_its_arrays_and_their_sizes(driver, sync):
    driver.errors = [None, ILLEGAL]
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        one_step(driver)
    said = str(caught.value)
    assert said.startswith("the update of param of shape (2, 3), float32 at 0x")
    assert f"1 parameter, 6 elements, kernel 'contiguous', device 0) failed on {driver.backend}, stream 1" in said
    assert "compute-sanitizer" in said and caught.value.__cause__ is ILLEGAL


def test_an_error_of_many_arrays_names_the_first_and_counts_the_others(driver, sync):
    params = {name: driver.array(np.ones(n, "f4")) for name, n in (("a", 1000), ("b", 20), ("c", 3), ("d", 4))}
    opt = gpuadam.Adam(params, backend=driver.backend)
    driver.errors = [None, ILLEGAL]
    with pytest.raises(RuntimeError, match=r"params\['a'\] of shape \(1000,\).* and 1 more \(4 parameters, 1,027 elements"):
        opt.step(params | {name: driver.array(np.ones(p.shape, "f4")) for name, p in params.items()})


def test_an_error_from_before_is_not_ours(driver, sync):
    driver.errors = [ILLEGAL]
    with pytest.raises(RuntimeError, match=r"had failed before .* launched the update of param.*CUDA_LAUNCH_BLOCKING=1"):
        one_step(driver)
    assert driver.launches == []


def test_a_launch_that_the_driver_refuses_is_named(driver, sync, monkeypatch):
    def refuse(*arguments):
        raise DeviceError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(driver.kernels, "run", refuse)
    with pytest.raises(RuntimeError, match=r"the update of param.* failed on .*OUT_OF_RESOURCES"):
        one_step(driver)


def test_the_scalars_of_a_step_on_the_device_are_a_launch_too(driver, sync):
    w = driver.array(np.ones(6, "f4"))
    opt = gpuadam.Adam(w, capturable=True, backend=driver.backend)
    driver.errors = [None, ILLEGAL]
    with pytest.raises(
        RuntimeError, match=r"the computation of a step's scalars from \['grad_scale', 'lr', 'step'\] \(float32"
    ):
        opt.step(driver.array(np.ones(6, "f4")))


def test_a_capture_is_not_waited_for(driver, sync):
    """To wait for a stream that is captured would end the capture."""
    w, grad, lr = driver.array(np.ones(6, "f4")), driver.array(np.ones(6, "f4")), driver.array(np.ones(1, "f8"))
    opt = gpuadam.Adam(w, lr=lr, capturable=True, backend=driver.backend)
    driver.current = 77
    driver.capturing = {77}
    opt.step(grad)
    assert len(driver.launches) == 2 and driver.waited_for == []


def test_the_variable_is_read_when_gpuadam_is_imported():
    code = "from gpuadam.kernels import synchronous; print(synchronous.ON)"
    for value, on in (("1", "True"), ("0", "False"), ("", "False")):
        env = os.environ | {"PYTHONPATH": str(ROOT), "GPUADAM_SYNC": value}
        assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == on


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_an_address_beyond_the_memory_is_reported_by_the_step_that_touched_it(backend):
    """In a process of its own: CUDA is of no more use in it."""
    code = """
    import sys, numpy as np, gpuadam
    from numba import cuda

    class Astray:
        def __init__(self):
            self.array = cuda.to_device(np.ones(4, "f4"))
            astray = {"shape": (2,), "strides": (1 << 40,)}  # no GPU has that much
            self.__cuda_array_interface__ = self.array.__cuda_array_interface__ | astray

    try:
        gpuadam.adam_step(*(Astray() for _ in range(4)), 1, backend=sys.argv[1])
    except RuntimeError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), backend],
        env=os.environ | {"PYTHONPATH": str(ROOT), "GPUADAM_SYNC": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "the update of param of shape (2,)" in done.stdout and "ILLEGAL" in done.stdout.upper(), done.stderr
