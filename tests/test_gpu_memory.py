"""What of the GPU backends needs no GPU: what is said of arrays of other libraries, pinned memory, the mode of captures."""

import ctypes
import importlib

import libraries
import numpy as np
import pytest

from gpuadam.kernels import gpu_driver
from gpuadam.kernels.view import on_cuda

cupy = libraries.imported("cupy")
libraries.imported("numba_cuda")
cupy_backend = importlib.import_module("gpuadam.kernels.cupy_backend")


class Foreign:
    """An array of another library."""

    def __init__(self, array, stream=None):
        self.array = array
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3, "stream": stream}


def test_an_empty_array_is_contiguous_whatever_its_strides():
    """Numba takes over the strides of a NumPy array, which are zeros of some."""
    empty = Foreign(np.zeros((0, 3), "f4"))
    empty.__cuda_ndarray__, empty.strides = True, (0, 0)
    assert on_cuda("param", empty, None).contiguous


def test_pinned_memory_is_not_rounded_up_to_a_power_of_two(monkeypatch):
    asked = []

    class Pinned:
        def __init__(self, size, flags):
            asked.append(size)
            self.memory = ctypes.create_string_buffer(size)
            self.ptr, self.size = ctypes.addressof(self.memory), size

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", Pinned)
    memory = cupy_backend.backend.pinned(1_200_000)
    memory[:] = 7
    assert asked == [memory.nbytes] == [1_200_000]


def test_the_mode_of_captures_is_set_and_set_back(monkeypatch):
    current, seen = [0], []

    def exchange(name, mode):
        current[0], mode._obj.value = mode._obj.value, current[0]

    monkeypatch.setattr(gpu_driver, "call", exchange)
    with pytest.raises(ValueError), gpu_driver.allowed_while_capturing():
        seen.append(current[0])
        raise ValueError
    assert seen == [gpu_driver.RELAXED] and current == [0]
