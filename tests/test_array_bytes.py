"""The bytes of an array, in pieces. On a GPU: `test_checkpoint_gpu.py` and `test_gpu_state.py`."""

import random

import numpy as np
import pytest

from gpuadam import backends
from gpuadam.kernels import array_bytes


@pytest.mark.parametrize("dtype", ["f4", "c16"])
def test_the_bytes_are_those_of_the_elements_in_c_order(dtype):
    x = np.arange(40, dtype=dtype).reshape(5, 8)
    for array in (x.copy(), np.asfortranarray(x)):
        kernels = backends.load("numba-cpu")
        view = kernels.view("x", array)
        assert b"".join(map(bytes, array_bytes.chunks(kernels, view))) == x.tobytes()
        pieces = array_bytes.Pieces(array_bytes.buffers(kernels, view))
        pieces.write((x + 1).tobytes())
        pieces.close()
        assert (array == x + 1).all()


def test_a_number_of_more_bytes_than_any_integer_is_read():
    assert backends.number("x", np.array(1.5, np.longdouble)) == 1.5


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_size_are_read_and_filled_though_the_next_buffer_is_the_same_memory(seed):
    random.seed(seed)
    content = random.randbytes(random.choice([0, 1, 100, 5000]))
    stored, memory = [], bytearray(99)

    def sizes(most):
        """Yield sizes that make up the content, 0 among them."""
        left = len(content)
        while left:
            yield (size := random.randint(0, min(left, most)))
            left -= size

    def chunks():
        start = 0
        for size in sizes(99):
            memory[:size] = content[start : start + size]
            yield memoryview(memory)[:size]
            start += size

    def buffers():
        own = bytearray(77)
        for size in sizes(77):
            yield memoryview(own)[:size]
            stored.append(bytes(own[:size]))

    reader, writer = array_bytes.Pieces(chunks()), array_bytes.Pieces(buffers())
    for size in sizes(300):
        writer.write(reader.read(size))
    writer.close()
    assert b"".join(stored) == content
