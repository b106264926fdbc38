"""`adam_step` over every backend: sizes, layouts, special values, and the CPU backend's bits."""

import libraries
import numpy as np
import pytest
from cases import DTYPES, FORMS, assert_same_bits, different_bits, state, wide_state

import gpuadam
from gpuadam import reference

SIZES = (0, 1, 2, 3, 4, 5, 127, 128, 129, 2**20 + 3)


def step(arrays, library=None, **options):
    """Take a step on copies in a library's memory, or the CPU's; return NumPy arrays."""
    options = dict(options)
    options.pop("amsgrad", None)
    options.setdefault("backend", library.name if library else "numba-cpu")
    there = [a if a is None else library.array(a) if library else a.copy(order="K") for a in arrays]
    gpuadam.adam_step(*there[:4], options.pop("step", 3), max_v=there[4], **options)
    return [a if a is None else library.numpy(a) if library else a for a in there]


@pytest.mark.in_short("name")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_every_backend_gives_the_cpus_bits(library, name, dtype):
    for eps in (0.0, 1e-30, 1e-8):
        arrays = wide_state(10_007, dtype, FORMS[name].get("amsgrad"))
        assert_same_bits(step(arrays, library, eps=eps, **FORMS[name]), step(arrays, eps=eps, **FORMS[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_every_size(library, n, dtype):
    arrays = state(n, dtype)
    after = step(arrays, library)
    expected, m, v, _ = reference.adam_step(*arrays[:4], 3)
    for a, b in zip((after[0], *after[2:4]), (expected, m, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # one step of rounding in float32
    assert different_bits(after[1], arrays[1]) == 0  # the gradient is only read


def test_a_0d_array_is_one_element(library):
    arrays = [a.reshape(()) for a in state(1)[:4]]
    flat = step([*[a.reshape(1) for a in arrays], None])
    assert_same_bits([a.reshape(1) for a in step([*arrays, None], library)[:4]], flat[:4])


def test_the_first_step_does_not_depend_on_the_gradients_size(library):
    param, grad = np.zeros(4, "f4"), np.array([-33.0, 1e-3, 1e10, -1e-5], "f4")
    after = step([param, grad, np.zeros(4, "f4"), np.zeros(4, "f4"), None], library, step=1, lr=0.1, eps=1e-12)
    np.testing.assert_allclose(after[0], -0.1 * np.sign(grad), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_gradient_touches_its_own_element_alone(library, value):
    arrays = state(1001)
    spoilt = [None if a is None else a.copy() for a in arrays]
    spoilt[1][500] = value
    a, b = step(spoilt, library), step(arrays)
    others = np.arange(1001) != 500
    assert_same_bits([x[others] for x in a[:4]], [x[others] for x in b[:4]])
    assert np.isnan(a[0][500])


LAYOUTS = {
    "F order": lambda: np.zeros((37, 29), "f4", order="F"),
    "transposed 3-D": lambda: np.zeros((5, 7, 9), "f4").transpose(2, 0, 1),
    "every other": lambda: np.zeros(514, "f4")[::2],
    "reversed": lambda: np.zeros(257, "f4")[::-1],
    "a block of a matrix": lambda: np.zeros((40, 40), "f4")[3:20, 5:19],
    "a column": lambda: np.zeros((64, 3), "f4")[:, 1],
    "a field of records": lambda: np.zeros(100, [("a", "f4"), ("b", "f4")])["b"],
    "one row, broadcastable": lambda: np.zeros((1, 50), "f4"),
}


@pytest.mark.parametrize("beside", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_updated_correctly_and_nothing_beside_it(library, layout, beside):
    shape = LAYOUTS[layout]().shape
    other = LAYOUTS[beside]
    arrays = []
    for k, values in enumerate(state(int(np.prod(shape)), amsgrad=True)):
        a = LAYOUTS[layout]() if k in (0, 2) or other().shape != shape else other()
        a[...] = values.reshape(shape)
        arrays.append(a)
    expected = step([np.ascontiguousarray(a) for a in arrays])
    assert_same_bits(step(arrays, library), expected)


OVERLAPPING = {
    "one number": lambda x: np.broadcast_to(x[0], (37, 29)),
    "one row": lambda x: np.broadcast_to(x[:29], (37, 29)),
    "one column": lambda x: np.broadcast_to(x[:37, None], (37, 29)),
    "rows that overlap": lambda x: np.lib.stride_tricks.sliding_window_view(x[:65], 29),
    "reversed": lambda x: np.lib.stride_tricks.sliding_window_view(x[:65][::-1], 29)[::-1],
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_elements_of_a_gradient_may_share_memory_where_it_is_only_read(library, layout, order):
    """Bits and the norm are those of a copy; with zero_grad it is refused."""
    param, grad, m, v, _ = state(37 * 29)
    grad = OVERLAPPING[layout](grad)
    arrays = [grad if a is grad else np.array(a.reshape(37, 29), order=order) for a in (param, grad, m, v)]
    own = [*arrays[:1], grad.copy(), *arrays[2:]]
    assert_same_bits(step([*arrays, None], library)[:4], step([*own, None])[:4])
    there = [library.array(a) for a in arrays]
    norms = [gpuadam.global_norm(library.array(a), backend=library.name) for a in (grad, own[1])]
    assert len({library.numpy(norm).tobytes() for norm in norms}) == 1
    with pytest.raises(ValueError, match=r"grad has shape .* elements share memory"):
        gpuadam.adam_step(*there, 3, zero_grad=True, backend=library.name)
    assert_same_bits([library.numpy(a) for a in there], own)


@pytest.mark.parametrize(
    "backend", ["numba-cpu", pytest.param("cupy", marks=pytest.mark.gpu), pytest.param("numba-cuda", marks=pytest.mark.gpu)]
)
def test_the_gaps_of_a_strided_parameter_keep_their_sentinels(backend):
    buffer = np.full(2002, 7.0, "f4")
    buffer[::2] = state(1001)[0]
    others = state(1001)[1:4]
    expected = step([buffer[::2].copy(), *others, None])[0]
    if backend != "numba-cpu":
        import cupy

        buffer, others = cupy.asarray(buffer), [cupy.asarray(a) for a in others]
    gpuadam.adam_step(buffer[::2], *others, 3, backend=backend)
    after = buffer if backend == "numba-cpu" else buffer.get()
    assert (after[1::2] == 7.0).all()
    assert different_bits(after[::2], expected) == 0


def test_an_array_of_another_library_is_updated_in_place_through_dlpack():
    torch = libraries.imported("torch")
    arrays = [torch.from_numpy(a) for a in state(100)[:4]]
    expected = step(state(100))
    gpuadam.adam_step(*arrays, 3)
    assert different_bits(arrays[0].numpy(), expected[0]) == 0
