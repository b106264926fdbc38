"""What compiled code sees of CuPy's arrays: every change that leaves an array the same object."""

import pytest

from gpuadam import backends

pytestmark = pytest.mark.gpu


@pytest.fixture
def facts(cp):
    return backends.load("cupy").facts


def test_arrays_of_any_layout_are_what_they_were(cp, facts):
    some = [cp.zeros(3), cp.zeros((4, 5), "float32", order="F"), cp.zeros(()), cp.zeros((2, 0)), cp.zeros((6, 8))[::2, ::-1]]
    known = facts(some)
    assert known is not None  # this CuPy's objects are as they are expected to be
    assert known.unchanged()
    for array in some:
        array += 1
    assert known.unchanged()


@pytest.mark.parametrize("shape", [(4, 3), (12,), (2, 2, 3), (1, 12)])
def test_another_shape_of_the_same_object_is_seen(cp, facts, shape):
    some = [cp.zeros(5), cp.zeros((3, 4))]
    known = facts(some)
    some[1].shape = shape
    assert not known.unchanged()
    some[1].shape = (3, 4)
    assert facts(some).unchanged()


def test_no_arrays_are_unchanged(facts):
    assert facts([]).unchanged()
