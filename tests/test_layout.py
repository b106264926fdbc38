"""Arrays that lie in one another are told apart, exactly and without comparing each with each."""

import itertools

import numpy as np
import pytest
from cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuadam
from gpuadam import checks
from gpuadam.kernels.cpu_backend import backend as numba_cpu


def views(arrays):
    return [numba_cpu.view(f"array {k}", array) for k, array in enumerate(arrays)]


def is_refused(written, read=()):
    try:
        checks.overlap(views(written), views(read))
    except ValueError as error:
        assert "share memory" in str(error)
        return True
    return False


@pytest.fixture
def pairs(monkeypatch):
    """The pairs of arrays that are compared one by one."""
    compared, share_memory = [], np.shares_memory
    monkeypatch.setattr(
        np, "shares_memory", lambda *pair, **options: compared.append(pair) or share_memory(*pair, **options)
    )
    return compared


MATRIX = np.zeros((12, 40), "f4")
TENSOR = np.zeros((5, 6, 7), "f4")
INTERLEAVED = {
    "columns": list(MATRIX.T),
    "columns, some from the bottom": [MATRIX[:: 1 - 2 * (k % 2), k] for k in range(40)],
    "blocks of columns": np.split(MATRIX, 8, axis=1),
    "blocks of other widths": np.split(MATRIX, [1, 2, 5, 17], axis=1),
    "tiles": [tile for rows in np.split(MATRIX, 3) for tile in np.split(rows, 4, axis=1)],
    "even and odd rows of columns": [MATRIX[first::2, k] for k in range(40) for first in (0, 1)],
    "all rows of a column and half of another's": [MATRIX[:, 0], MATRIX[::2, 1]],
    "columns in Fortran's order": list(np.asfortranarray(MATRIX)),
    "columns that begin in a row and end in the next": list(MATRIX.reshape(-1)[30:-10].reshape(11, 40).T),
    "heads": [TENSOR[:, k] for k in range(6)],
    "the last dimension of a part": [TENSOR[1:4, 2:5, k] for k in range(7)],
    "fields of records": [np.zeros(9, [("a", "f4"), ("b", "f8"), ("c", "f2")])[name] for name in "abc"],
    "parts of complex numbers": [(z := np.zeros(9, "c8")).real, z.imag],
    "a matrix's rows, and columns of the rest": [*MATRIX[:3], *MATRIX[3:].T],
}


@pytest.mark.parametrize("case", INTERLEAVED)
def test_arrays_that_lie_in_one_another_are_not_compared_one_by_one(pairs, case):
    assert not is_refused(INTERLEAVED[case])
    assert pairs == []


@pytest.mark.parametrize("case", INTERLEAVED)
def test_one_more_that_shares_memory_is_refused(case):
    arrays = INTERLEAVED[case]
    assert is_refused([*arrays, arrays[1][:1]]) and is_refused(arrays, [arrays[1]])


def test_a_gradient_that_many_parameters_share_may_be_interleaved(pairs):
    assert not is_refused(MATRIX.T[:20], [MATRIX[:, 30]] * 20)
    assert pairs == []


def test_a_step_of_the_columns_of_one_matrix_compares_no_pair(pairs):
    opt = gpuadam.Adam(list(np.ones((3, 800), "f4").T))
    opt.step(list(np.ones((3, 800), "f4").T))
    assert pairs == []


def part(data, base):
    """Draw a view of a part of an array, in any order."""
    slices = []
    for n in base.shape:
        first, last = sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))))
        step = data.draw(st.sampled_from((1, 1, 2, 3)))
        slices.append(slice(first, last + 1, step))
    view = base[tuple(slices)]
    if data.draw(st.booleans()):
        view = np.flip(view, data.draw(st.integers(0, view.ndim - 1)))
    return view.transpose(data.draw(st.permutations(range(view.ndim))))


@pytest.mark.usefixtures("examples")
@settings(max_examples=examples(100, 300), deadline=None)
@given(data=st.data())
def test_what_is_refused_is_what_marking_all_elements_says(data):
    n = data.draw(st.integers(2, 6))
    buffer = np.zeros(240, "i8")
    shapes = [(240,), (6, 40), (24, 10), (4, 6, 10)]
    arrays = [part(data, buffer.reshape(data.draw(st.sampled_from(shapes)))) for _ in range(n)]
    n_written = data.draw(st.integers(1, n))
    marks = []
    for array in arrays:
        buffer[:] = 0
        array[...] = 1
        marks.append(buffer.astype(bool))
    meet = any((marks[i] & marks[k]).any() for i, k in itertools.combinations(range(n), 2) if i < n_written)
    assert is_refused(arrays[:n_written], arrays[n_written:]) == meet
