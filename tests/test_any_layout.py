"""Layouts that nobody thought of: random views against contiguous arrays, on the CPU."""

import libraries
import numpy as np
import pytest
from cases import assert_same_bits, examples, state

import gpuadam

libraries.imported("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@given(data=st.data())
@settings(max_examples=examples(30, 150), deadline=None)
@pytest.mark.usefixtures("examples")
def test_any_layouts_whatever_agree_with_contiguous_arrays(data):
    """Random slices with random steps of random buffers, one for each array, on the CPU."""
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3), label="shape"))
    arrays, wholes = [], []
    for k, values in enumerate(state(int(np.prod(shape)), seed=1)[:4]):
        steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2]), label=f"step {k}") for _ in shape]
        order = data.draw(st.permutations(range(len(shape))), label=f"order {k}")
        whole = np.full([shape[d] * abs(steps[d]) for d in order], 9.0, "f4")
        view = whole[(..., *(slice(None, None, steps[d]) for d in order))].transpose(np.argsort(order).astype(int))
        view[...] = values.reshape(shape)
        arrays.append(view)
        wholes.append(whole)
    before = [w.copy() for w in wholes]
    expected = [np.array(a, order="C").reshape(shape) for a in arrays]
    gpuadam.adam_step(*expected, 3)
    gpuadam.adam_step(*arrays, 3)
    assert_same_bits(arrays, expected)
    for a, whole, old in zip(arrays, wholes, before, strict=True):
        a[...] = 0
        inside = whole != old
        assert inside.sum() <= a.size
        assert (whole[inside] == 0).all()
