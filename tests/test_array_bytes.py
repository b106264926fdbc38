"""The bytes of an array, in pieces. On a GPU: `test_checkpoint_gpu.py` and `test_gpu_state.py`."""

import numpy as np

from gpuadam import backends
from gpuadam.kernels import array_bytes


def test_a_range_of_elements_is_a_range_of_bytes():
    x = np.arange(40, dtype="f4").reshape(5, 8)
    for array in (x.copy(), np.asfortranarray(x)):
        kernels, (view,) = backends.choose([("x", array)])
        assert b"".join(map(bytes, array_bytes.chunks(kernels, view, 7, 21))) == x.ravel()[7:21].tobytes()
        for buffer in array_bytes.buffers(kernels, view, 7, 21):
            buffer[:] = bytes(len(buffer))
        assert (array.ravel() == np.where((np.arange(40) >= 7) & (np.arange(40) < 21), 0, np.arange(40))).all()
