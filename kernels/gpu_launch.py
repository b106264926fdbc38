"""Launches that the driver makes again, with the scalars of another step.

A library looks at each argument whenever it launches a kernel, which takes CuPy 5 us and Numba 40. The launches of a batch differ
in their scalars and in their stream alone. So one launch of the library's is captured into a graph, whose node says what it was:
the function, the grid, and where the value of each parameter is. Later launches go to the driver with these, and with scalars in
memory of ours.
"""

import ctypes
import struct
from typing import NamedTuple

from gpuadam.kernels import gpu_driver


class Changing(NamedTuple):
    """Which parameters of a kernel are others in each step, by their numbers."""

    scalars: int  # the first of them
    key: int | None  # of a step, for random rounding
    n: int  # how many parameters there are
    row_key: int = 0  # the parameter is this one, exclusive-or the key of the step


class Recorded:
    """A launch of a kernel. The function and the memory of other parameters have to be there whenever it is made again."""

    def __init__(self, graph, node, changing, dtype, n_scalars):
        self._graph = graph  # which has the other values
        self._row_key = changing.row_key
        self._pack = struct.Struct(f"=q{n_scalars}{dtype.char}").pack_into  # as NumPy's bytes of them
        self._numbers = ctypes.create_string_buffer(8 + n_scalars * dtype.itemsize)
        self._values = (ctypes.c_void_p * changing.n).from_buffer_copy(
            (ctypes.c_void_p * changing.n).from_address(node.values)
        )
        at = ctypes.addressof(self._numbers)
        places = {changing.scalars + k: at + 8 + k * dtype.itemsize for k in range(n_scalars)}
        places |= {} if changing.key is None else {changing.key: at}
        self._config = gpu_driver.LaunchConfig(shape=node.shape)
        for parameter, place in places.items():
            self._values[parameter] = place
        self._arguments = ctypes.addressof(self._config), node.function or node.kernel, ctypes.addressof(self._values), None

    def launch(self, stream, scalars, key):
        """Enqueue it on a stream of the current device. It holds no lock while the driver waits for room in its queue."""
        self._pack(self._numbers, 0, self._row_key ^ key, *scalars)
        self._config.stream = stream
        gpu_driver.call("cuLaunchKernelEx", *self._arguments)


def recorded(graph, changing, dtype, scalars, key):
    """Return the launch in a graph as a Recorded one, or None if it is not as `changing` says.

    scalars, key: those of this launch, which have to be in the places where others will be.
    """
    node = graph.kernel()
    if node is None or not node.values:
        return None
    places = (ctypes.c_void_p * changing.n).from_address(node.values)
    wanted = {changing.scalars + k: dtype.type(value).tobytes() for k, value in enumerate(scalars)}
    wanted |= {} if changing.key is None else {changing.key: struct.pack("=q", changing.row_key ^ key)}
    if any(ctypes.string_at(places[k], len(value)) != value for k, value in wanted.items()):
        return None
    return Recorded(graph, node, changing, dtype, len(scalars))
