"""GPUADAM_SYNC=1: each launch is waited for, and an error names the launch that made it."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import conftest
import numpy as np
import pytest
from gpu_work import LAUNCHES, SYNCHRONIZATIONS, busy_stream

import gpuadam
from gpuadam.kernels import synchronous

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sync(monkeypatch):
    monkeypatch.setattr(synchronous, "ON", True)


def arrays_of_a_step(cp):
    return [cp.full((2, 3), value, "f4") for value in (1, 2, 0, 0)]


def one_step(cp, backend):
    gpuadam.adam_step(*arrays_of_a_step(cp), 1, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("on", [True, False])
def test_a_step_is_waited_for_on_its_stream_only_if_that_is_asked_for(cp, backend, monkeypatch, on):
    arrays = arrays_of_a_step(cp)
    gpuadam.adam_step(*arrays, 1, backend=backend)  # compiles
    monkeypatch.setattr(synchronous, "ON", on)
    stream = busy_stream(cp)
    with stream:
        gpuadam.adam_step(*arrays, 2, backend=backend)
    assert stream.done == on
    stream.synchronize()  # before the arrays go


@pytest.mark.gpu
def test_an_error_names_the_operation_its_arrays_and_their_sizes(cp, backend, driver, sync):
    one_step(cp, backend)  # compiles
    driver.fail(1, "ILLEGAL_ADDRESS", names=SYNCHRONIZATIONS)  # the wait after the launch
    with pytest.raises(RuntimeError, match=r"(?i)illegal_?address") as caught:
        one_step(cp, backend)
    said = str(caught.value)
    assert said.startswith("the update of param of shape (2, 3), float32 at 0x")
    assert f"1 parameter, 6 elements, kernel 'contiguous', device 0) failed on {backend}, stream 1" in said
    assert "compute-sanitizer" in said and caught.value.__cause__ is not None


@pytest.mark.gpu
def test_an_error_of_many_arrays_names_the_first_and_counts_the_others(cp, backend, driver, sync):
    params = {name: cp.ones(n, "f4") for name, n in (("a", 1000), ("b", 20), ("c", 3), ("d", 4))}
    grads = {name: cp.ones(p.shape, "f4") for name, p in params.items()}
    opt = gpuadam.Adam(params, backend=backend)
    opt.step(grads)
    driver.fail(1, "ILLEGAL_ADDRESS", names=SYNCHRONIZATIONS)
    with pytest.raises(RuntimeError, match=r"params\['a'\] of shape \(1000,\).* and 1 more \(4 parameters, 1,027 elements"):
        opt.step(grads)


@pytest.mark.gpu
def test_an_error_from_before_is_not_ours_and_nothing_is_launched(cp, backend, driver, sync):
    one_step(cp, backend)  # compiles
    driver.fail(0, "ILLEGAL_ADDRESS", names=SYNCHRONIZATIONS)
    arrays = arrays_of_a_step(cp)
    driver.listen()
    with pytest.raises(RuntimeError, match=r"had failed before .* launched the update of param.*CUDA_LAUNCH_BLOCKING=1"):
        gpuadam.adam_step(*arrays, 1, backend=backend)
    assert driver.launches == []


@pytest.mark.gpu
def test_a_launch_that_the_driver_refuses_is_named(cp, backend, driver, sync):
    one_step(cp, backend)  # compiles
    arrays = arrays_of_a_step(cp)
    driver.fail(0, "LAUNCH_OUT_OF_RESOURCES", names=LAUNCHES)
    with pytest.raises(RuntimeError, match=r"the update of param.* failed on .*OUT_OF_RESOURCES"):
        gpuadam.adam_step(*arrays, 1, backend=backend)


@pytest.mark.gpu
def test_the_scalars_of_a_step_on_the_device_are_a_launch_too(cp, backend, driver, sync):
    grad = cp.ones(6, "f4")
    opt = gpuadam.Adam(cp.ones(6, "f4"), capturable=True, backend=backend)
    opt.step(grad)
    driver.fail(1, "ILLEGAL_ADDRESS", names=SYNCHRONIZATIONS)
    with pytest.raises(
        RuntimeError, match=r"the computation of a step's scalars from \['grad_scale', 'lr', 'step'\] \(float32"
    ):
        opt.step(grad)


@pytest.mark.gpu
def test_a_capture_is_not_waited_for(cp, backend, sync):
    """A wait for a stream that is captured would end the capture."""
    param, grad, lr = cp.ones(6, "f4"), cp.ones(6, "f4"), cp.full(1, 0.1)
    on_host = np.ones(6, "f4")
    opt = gpuadam.Adam(param, lr=lr, capturable=True, backend=backend)
    reference = gpuadam.Adam(on_host, lr=0.1)
    stream = busy_stream(cp)
    with stream:
        opt.step(grad)
        stream.begin_capture()
        opt.step(grad)
        graph = stream.end_capture()
        graph.launch(stream)
        found = param.get()
    for _ in range(2):
        reference.step(np.ones(6, "f4"))
    assert found.tobytes() == on_host.tobytes()


def test_the_variable_is_read_when_gpuadam_is_imported():
    code = "from gpuadam.kernels import synchronous; print(synchronous.ON)"
    for value, on in (("1", "True"), ("Yes", "True"), ("0", "False"), ("off", "False"), ("", "False"), ("2", None)):
        env = os.environ | {"PYTHONPATH": str(ROOT), "GPUADAM_SYNC": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == (on or "") and (on or "GPUADAM_SYNC='2' must be one of 1, true" in done.stderr)


@pytest.mark.gpu
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
    begun = "" if conftest.DRIVER is None else "import stand_in; stand_in.start()\n"
    done = subprocess.run(
        [sys.executable, "-c", begun + textwrap.dedent(code), backend],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "GPUADAM_SYNC": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    error = "(?i)illegal|invalid|launch_?fail" if conftest.DRIVER is None else "(?i)launch_?fail"
    assert "the update of param of shape (2,)" in done.stdout and re.search(error, done.stdout), done.stderr
