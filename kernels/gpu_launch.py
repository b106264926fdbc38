"""Launches that the driver makes again, with the scalars of another step.

A library looks at each argument whenever it launches a kernel, which takes CuPy 5 us and Numba 40. The launches of a batch differ
in their scalars and in their stream alone. So one launch of the library's is captured into a graph, whose node says what it was:
the function, the grid, and where the value of each parameter is. Later launches go to the driver with these, and with scalars in
memory of ours. As long as Python has other threads nothing is captured, and the library makes the launches.
"""

import ctypes
import struct
import threading
from typing import NamedTuple

from gpuadam.kernels import gpu_driver


class Changing(NamedTuple):
    """Which parameters of a kernel are others in each step, by their numbers."""

    scalars: int  # the first of them
    key: int | None  # of a step, for random rounding
    n: int  # how many parameters there are
    row_key: int = 0  # the kernel's key is this one, exclusive-or the key of the step


class Recorded:
    """A launch of a kernel. The function and the memory of other parameters have to be there whenever it is made again."""

    def __init__(self, graph, node, values, places, pack, row_key):
        self._graph, self._row_key, self._pack = graph, row_key, pack.pack_into  # the graph has the other values
        self._numbers, self._values = ctypes.create_string_buffer(pack.size), type(values).from_buffer_copy(values)
        for parameter, place in places.items():
            self._values[parameter] = ctypes.addressof(self._numbers) + place
        self._config = gpu_driver.LaunchConfig(shape=node.shape)
        self._arguments = ctypes.addressof(self._config), node.function or node.kernel, ctypes.addressof(self._values), None

    def launch(self, stream, scalars, key):
        """Enqueue it on a stream of the current device. It holds no lock while the driver waits for room in its queue."""
        self._pack(self._numbers, 0, self._row_key ^ key, *scalars)
        self._config.stream = stream
        gpu_driver.call("cuLaunchKernelEx", *self._arguments)


def alone():
    """Whether this is Python's only thread: a capture makes fail what waits for the device meanwhile, as other threads may."""
    return threading.active_count() == 1


def recorded(graph, changing, dtype, scalars, key):
    """Return the launch in a graph as a Recorded one, or None if it is not as `changing` says.

    scalars, key: those of this launch, which have to be in the places where others will be.
    """
    node = graph.kernel()
    if node is None or not node.values:
        return None
    values = (ctypes.c_void_p * changing.n).from_address(node.values)
    pack = struct.Struct(f"=q{len(scalars)}{dtype.char}")  # as NumPy's bytes of them
    sizes = {} if changing.key is None else {changing.key: (0, 8)}
    sizes |= {changing.scalars + k: (8 + k * dtype.itemsize, dtype.itemsize) for k in range(len(scalars))}
    now = pack.pack(changing.row_key ^ key, *scalars)
    if any(ctypes.string_at(values[parameter], n) != now[at : at + n] for parameter, (at, n) in sizes.items()):
        return None
    return Recorded(graph, node, values, {parameter: at for parameter, (at, _) in sizes.items()}, pack, changing.row_key)
