"""The CPU backend gives one set of bits: serial or parallel, body or tail, in pieces, and strided."""

import numba
import numpy as np
import pytest
from cases import (
    DTYPES,
    FORMS,
    KEY_FORMS,
    OTHER_ALGORITHMS,
    assert_same_bits,
    at_offset,
    few,
    form_and_scalars,
    in_memory,
    strided_table_of,
    table_of,
    wide_state,
)

from gpuadam.kernels import adam, cpu_strided
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.view import on_cpu

N = 100_003


def copies(arrays):
    return [None if a is None else a.copy() for a in arrays]


def launched(form, arrays, scalars):
    numba_cpu.launch(form, [on_cpu("", a) for a in arrays if a is not None], scalars)
    return arrays


def through(loop, form, arrays, scalars):
    n, kernel = arrays[0].size, numba_cpu.build(adam, form, loop)
    key = 0  # of the step
    if loop == "strided serial":
        kernel(strided_table_of(form, arrays), 0, n, key, in_memory(scalars))
    else:
        kernel(table_of(arrays), *((0, n) if loop == "serial" else (n, 3)), key, in_memory(scalars))
    return arrays


@pytest.mark.in_short()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", few(FORMS, *KEY_FORMS, *OTHER_ALGORITHMS))
def test_every_loop_gives_the_same_bits(name, dtype):
    form, scalars = form_and_scalars(name, dtype)
    given = wide_state(N, dtype, form.amsgrad)
    expected = through("serial", form, copies(given), scalars)
    assert_same_bits(through("parallel", form, copies(given), scalars), expected, "parallel")
    assert_same_bits(through("strided serial", form, copies(given), scalars), expected, "strided")
    pieces = copies(given)
    for start, stop in [(0, 1), (1, 4), (4, 7), (7, 1031), (1031, N)]:
        through("serial", form, [None if a is None else a[start:stop] for a in pieces], scalars)
    assert_same_bits(pieces, expected, "in pieces")


@pytest.mark.parametrize("how", ["ROWS", "ELEMENTS", "BLOCKS"])
def test_threads_may_cut_arrays_of_any_strides_anywhere(how):
    columns, found = (slice(65), "ROWS") if how == "ROWS" else (slice(None, 130, 2), "ELEMENTS")
    form, scalars = form_and_scalars("adam", "float32")
    given = [a for a in wide_state(7 * 65, "float32") if a is not None]
    expected = through("serial", form, copies(given), scalars)
    kernel = numba_cpu.build(adam, form, "strided serial")
    for cut in (1, 64, 65, 66, 255, 256, 257, 300):
        parts = [np.zeros((7, 140), "f4")[:, columns] for _ in given]
        for part, a in zip(parts, given, strict=True):
            part[...] = a.reshape(7, 65)
        table = strided_table_of(form, parts)
        assert table[0, cpu_strided.HOW] == getattr(cpu_strided, found)
        table[0, cpu_strided.HOW] = getattr(cpu_strided, how)
        kernel(table, 0, cut, 0, in_memory(scalars))
        kernel(table, cut, 7 * 65, 0, in_memory(scalars))
        assert_same_bits([np.array(part).ravel() for part in parts], expected, f"cut at {cut}")


def test_a_single_element_gives_the_bits_of_the_vector_body():
    form, scalars = form_and_scalars("all with l2", "float32")
    given = wide_state(500, "float32", True)
    expected = launched(form, copies(given), scalars)
    one_by_one = copies(given)
    for k in range(500):
        launched(form, [a[k : k + 1] for a in one_by_one], scalars)
    assert_same_bits(one_by_one, expected)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_alignment_changes_nothing(offset):
    form, scalars = form_and_scalars("amsgrad", "float32")
    given = wide_state(1003, "float32", True)
    expected = launched(form, copies(given), scalars)
    assert_same_bits(launched(form, [at_offset(a, offset)[0] for a in given], scalars), expected)


def test_an_array_off_its_elements_alignment_is_updated_too():
    form, scalars = form_and_scalars("adam", "float32")
    given = wide_state(1003)[:4]
    expected = launched(form, [*copies(given), None], scalars)
    shifted = []
    for a in given:
        shifted.append(np.frombuffer(bytearray(b"?" + a.tobytes()), "f4", offset=1))
    assert not shifted[0].flags.aligned
    assert_same_bits(launched(form, [*shifted, None], scalars), expected)


@pytest.mark.parametrize("name", ["adam", "all with l2"])
def test_the_loop_is_vectorised(name):
    form, scalars = form_and_scalars(name, "float32")
    # compiled afresh: what comes out of the cache on disk has no text
    kernel = numba.njit(error_model="numpy")(numba_cpu.build(adam, form, "serial").py_func)
    kernel(np.zeros((0, 9), np.int64), 0, 0, 0, in_memory(scalars))
    (code,) = kernel.inspect_llvm().values()
    assert "x float> @llvm.fma" in code and "x float> @llvm.sqrt" in code
