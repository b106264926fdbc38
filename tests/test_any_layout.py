"""Layouts that nobody thought of: random views against contiguous arrays, on the CPU."""

from unittest import mock

import libraries
import ml_dtypes
import numpy as np
import pytest
from cases import assert_same_bits, examples, state

import gpuadam
from gpuadam.kernels.cpu_backend import backend as numba_cpu

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


WIDE = {"param": "f4", "grad": "f4", "m": "f4", "v": "f4"}
KINDS = {  # dtypes of the arrays, and options of `adam_step`
    "float32": (WIDE, {}),
    "float64": (dict.fromkeys(WIDE, "f8"), {"weight_decay": 0.1}),
    "bfloat16 state": (WIDE | dict.fromkeys("mv", "bfloat16"), {"seed": 3}),
    "complex64": (dict.fromkeys(WIDE, "c8") | {"v": "f4"}, {"complex": "joint"}),
    "a gradient of float64": (WIDE | {"grad": "f8"}, {"maximize": True}),
    "flags and rates": (WIDE | {"where": "?", "lr_scale": "f4"}, {}),
    "flags and rates of rows": (WIDE | {"where": "?", "lr_scale": "f4"}, {"rows": True}),
}


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_flags_and_rates_of_rows_without_elements_change_nothing(shape):
    arrays = [np.ones(shape, "f4") for _ in range(4)]
    gpuadam.adam_step(*arrays, 1, where=np.ones(shape[0], bool), lr_scale=np.ones(shape[0], "f4"))
    assert all(a.shape == shape for a in arrays)


DRAWN = examples(["float32", "bfloat16 state", "flags and rates of rows"], sorted(KINDS))


@given(data=st.data())
@settings(max_examples=examples(60, 600), deadline=None)
@pytest.mark.usefixtures("examples")
def test_so_do_rows_and_blocks_of_any_length_in_any_threads(data):
    """Rows that are updated where they are, and blocks that go by the stack, each cut where the next thread begins."""
    lengths = st.lists(st.sampled_from([1, 2, 3, 5, 31, 32, 33, 70, 257]), min_size=1, max_size=3)
    shape = tuple(data.draw(lengths.filter(lambda shape: np.prod(shape) < 30_000), label="shape"))
    dtypes, options = KINDS[data.draw(st.sampled_from(DRAWN), label="kind")]
    options, rng, arrays, wholes = dict(options), np.random.default_rng(data.draw(st.integers(0, 9))), {}, {}
    of_rows = shape[:-1] if options.pop("rows", False) else shape
    orders, as_a_part = data.draw(st.booleans(), label="in orders"), data.draw(st.booleans(), label="parts of matrices")
    for name, dtype in dtypes.items():
        own = of_rows if name in ("where", "lr_scale") else shape
        values = rng.standard_normal(own) + 1j * rng.standard_normal(own)
        values = np.abs(values) > 1 if dtype == "?" else np.abs(values) if name in ("v", "lr_scale") else values
        order = data.draw(st.permutations(range(len(own))), label=f"order of {name}") if orders else [*range(len(own))]
        lengths = [own[d] for d in order]
        step, gap = data.draw(st.sampled_from([1, 1, 2, -1]), label=f"step of {name}"), 0
        if as_a_part and own:
            step, gap = 1, data.draw(st.integers(1, 5))
            lengths[-1] += gap
        wholes[name] = np.zeros([*lengths, abs(step)], ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        arrays[name] = wholes[name][..., 0][..., gap:] if gap else wholes[name][..., 0]
        arrays[name] = arrays[name].transpose(np.argsort(order).astype(int))
        if own and step < 0:
            arrays[name] = arrays[name][::-1]
        arrays[name][...] = values if np.dtype(arrays[name].dtype).kind in "cb" else values.real
    expected = {name: np.array(a, order="C") for name, a in arrays.items()}
    threads_from = data.draw(st.sampled_from([1 << 16, 100]), label="threads from")
    for some in (expected, arrays):
        with mock.patch.object(numba_cpu, "PARALLEL_FROM", threads_from if some is arrays else 1 << 16):
            given = {name: a for name, a in some.items() if name not in WIDE}
            gpuadam.adam_step(*(some[name] for name in WIDE), 3, **given, **options)
    for name, a in arrays.items():
        assert_same_bits([np.array(a, order="C")], [expected[name]], name)
        a[...] = 0
        assert not wholes[name].any(), name  # the gaps
