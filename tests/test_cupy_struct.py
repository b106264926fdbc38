"""What compiled code reads of CuPy's arrays: what tells one from another, and every change that leaves one the same object."""

import pytest

from gpuadam.kernels import gpu_step

pytestmark = pytest.mark.gpu


@pytest.fixture
def struct(cp):
    from gpuadam.kernels import cupy_struct

    return cupy_struct


def key_of(struct, *arrays):
    """Return what compiled code tells of arrays, as bytes."""
    calls = gpu_step.Calls(len(arrays), struct)
    calls.expect(())
    return calls.key(arrays, ())


def test_of_arrays_of_any_layout_compiled_code_tells_what_python_tells(cp, struct):
    some = [cp.zeros(3), cp.zeros((4, 5), "float32", order="F"), cp.zeros(()), cp.zeros((2, 0)), cp.zeros((6, 8))[::2, ::-1]]
    known = struct.told(some)
    assert known is not None  # this CuPy's objects are as they are expected to be
    assert key_of(struct, *some) == known.tobytes()
    for array in some:
        array += 1
    assert key_of(struct, *some) == known.tobytes()


@pytest.mark.parametrize("shape", [(4, 3), (12,), (2, 2, 3), (1, 12)])
def test_another_shape_of_the_same_object_is_seen(cp, struct, shape):
    some = [cp.zeros(5), cp.zeros((3, 4))]
    known = key_of(struct, *some)
    some[1].shape = shape
    assert key_of(struct, *some) != known
    some[1].shape = (3, 4)
    assert key_of(struct, *some) == known


OTHERS = {
    "memory": lambda x: x.copy(),
    "start": lambda x: x[1:],
    "size": lambda x: x[:2],
    "strides": lambda x: x[:, ::2],
    "order": lambda x: x.T,
    "dtype": lambda x: x.view("int32"),
    "dimensions": lambda x: x[None],
}


@pytest.mark.parametrize("other", OTHERS)
def test_arrays_that_differ_are_told_apart(cp, struct, other):
    array = cp.zeros((4, 4), "float32")
    assert key_of(struct, array) == key_of(struct, array[:]) != key_of(struct, OTHERS[other](array))


def test_the_same_address_on_another_device_is_told_apart(cp, struct):
    one, other = (
        cp.ndarray(4, "f4", cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(4096, 16, None, device), 0)) for device in range(2)
    )
    assert key_of(struct, one) != key_of(struct, other)


def test_other_objects_than_arrays_of_cupy_are_not_read(cp, struct):
    class Other(cp.ndarray):
        """As CuPy's, but a type of its own."""

    assert key_of(struct, cp.zeros(3)) is not None
    assert key_of(struct, cp.zeros(3).view(Other)) is None and struct.told([cp.zeros(3).view(Other)]) is None


def test_arrays_of_more_dimensions_than_there_is_room_for_are_not_told(cp, struct):
    arrays = [cp.zeros((1,) * 30) for _ in range(4)]
    assert key_of(struct, arrays[0]) is not None
    assert key_of(struct, *arrays) is None
