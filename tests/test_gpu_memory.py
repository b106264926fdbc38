"""How both GPU backends come by memory of the host and by numbers of other libraries, over stand-ins for the driver."""

import contextlib
import ctypes
import importlib
from unittest import mock

import numpy as np
import pytest

from gpuadam.arrays import on_cuda
from gpuadam.kernels import gpu_launch

cupy = pytest.importorskip("cupy")
pytest.importorskip("numba_cuda")
cupy_elementwise = importlib.import_module("gpuadam.kernels.cupy_elementwise")
numba_cuda = importlib.import_module("gpuadam.kernels.numba_cuda")


class Foreign:
    """An array of another library, in what the stand-ins take for a GPU's memory."""

    def __init__(self, array, stream=None):
        self.array = array
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3, "stream": stream}


def test_an_empty_array_is_contiguous_whatever_its_strides():
    """Numba takes over the strides of a NumPy array, which are zeros of some."""
    empty = Foreign(np.zeros((0, 3), "f4"))
    empty.__cuda_ndarray__, empty.strides = True, (0, 0)
    assert on_cuda("param", empty, None).contiguous


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 2)])
def test_numba_reads_arrays_of_other_libraries_after_their_streams_work(monkeypatch, shape):
    log = []

    def receive(host, address, n_bytes, stream):
        log.append(("receive", stream))
        ctypes.memmove(host.ctypes.data, address, n_bytes)

    monkeypatch.setattr(numba_cuda, "_device_of", lambda pointer: 0)
    monkeypatch.setattr(numba_cuda, "on", lambda device, stream: contextlib.nullcontext())
    monkeypatch.setattr(numba_cuda, "current_stream", lambda: None)
    monkeypatch.setattr(numba_cuda, "receive", receive)
    monkeypatch.setattr(numba_cuda, "synchronize_stream", lambda stream: log.append(("wait", stream)))
    given = np.random.default_rng(0).standard_normal(shape)
    found = numba_cuda.to_host(Foreign(given, stream=77))
    assert found.shape == shape and (found == given).all()
    assert log == ([("receive", 77), ("wait", 77)] if given.size else [])


def test_cupy_reads_arrays_of_other_libraries_on_their_streams(monkeypatch):
    log = []
    monkeypatch.setattr(cupy_elementwise, "_device_of", lambda pointer: 0)
    monkeypatch.setattr(
        cupy_elementwise, "on", lambda device, stream: log.append((device, stream)) or contextlib.nullcontext()
    )
    monkeypatch.setattr(cupy, "asnumpy", lambda array: log.append(array.data.ptr))
    given = np.ones(3)
    cupy_elementwise.to_host(Foreign(given, stream=77))
    assert log == [(0, 77), given.ctypes.data]


def test_pinned_memory_is_not_rounded_up_to_a_power_of_two(monkeypatch):
    asked = []

    class Pinned:
        def __init__(self, size, flags):
            asked.append(size)
            self.memory = ctypes.create_string_buffer(size)
            self.ptr, self.size = ctypes.addressof(self.memory), size

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", Pinned)
    memory = cupy_elementwise.pinned(1_200_000)
    memory[:] = 7
    assert asked == [memory.nbytes] == [1_200_000]


def test_the_mode_of_captures_is_set_and_set_back(monkeypatch):
    current, seen = [0], []

    class Driver:
        def cuThreadExchangeStreamCaptureMode(self, mode):
            current[0], mode._obj.value = mode._obj.value, current[0]

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    with pytest.raises(ValueError), gpu_launch.allowed_while_capturing():
        seen.append(current[0])
        raise ValueError
    assert seen == [gpu_launch.RELAXED] and current == [0]


def test_without_a_driver_nothing_has_to_be_allowed(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=OSError))
    with gpu_launch.allowed_while_capturing():
        pass
