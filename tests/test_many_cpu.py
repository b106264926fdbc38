"""A step over many arrays on the CPU: each gets what a step of its own would give it, or none is touched."""

import gc
import tracemalloc

import numpy as np
import pytest
from cases import assert_same_bits, few, state

import gpuadam
from gpuadam.kernels.cpu_backend import backend as numba_cpu


def at_odd_offset(a):
    """A copy that begins one element after a multiple of 64 bytes."""
    buffer = np.zeros(a.size + 64, a.dtype)
    start = -(buffer.ctypes.data // a.itemsize) % (64 // a.itemsize) + 1
    placed = buffer[start : start + a.size].reshape(a.shape)
    placed[...] = a
    assert not a.size or placed.ctypes.data % 64 == a.itemsize
    return placed


def off_its_elements(a):
    """A copy that begins one byte after a multiple of the elements' size."""
    placed = np.frombuffer(bytearray(a.nbytes + 1), "u1")[1:].view(a.dtype).reshape(a.shape)
    placed[...] = a
    assert not a.size or not placed.flags.aligned
    return placed


def strided(a):
    placed = np.zeros((*a.shape, 3), a.dtype)[..., 1]
    placed[...] = a
    return placed


def reversed_(a):
    return np.ascontiguousarray(a[::-1])[::-1]


LAYOUTS = {
    "plain": np.array,
    "at an odd offset": at_odd_offset,
    "off its elements' size": off_its_elements,
    "in Fortran's order": np.asfortranarray,
    "strided": strided,
    "reversed": reversed_,
}
SHAPES = [(0,), (1,), (3,), (64,), (17, 5), (2, 3, 4), (1003,), (40_001,), (130, 257)]


def members(seed, layouts=LAYOUTS, dtypes=("float32", "float64")):
    """An array of every shape, in turn of every layout and dtype."""
    layouts = list(layouts)
    made = []
    for k, shape in enumerate(SHAPES * 2):
        dtype = dtypes[k // 2 % len(dtypes)]
        a = np.random.default_rng(100 * seed + k).standard_normal(shape).astype(dtype)
        made.append(LAYOUTS[layouts[k % len(layouts)]](a))
    return made


def moments(opt, name):
    return [state[name] for state in opt.state.values() if name in state]


def one_by_one(params, grads_of_steps, amsgrad=False, **options):
    """Return what `adam_step` makes of copies, an array at a time: params, m, v and max_v."""
    names = ("m", "v", "max_v") if amsgrad else ("m", "v")
    results = []
    for n, param in enumerate(params):
        param, state, count = np.array(param, order="C"), {name: np.zeros(param.shape, param.dtype) for name in names}, 0
        for grads in grads_of_steps:
            if grads[n] is not None:
                count += 1
                max_v = {"max_v": state["max_v"]} if amsgrad else {}
                grad = np.ascontiguousarray(grads[n]).reshape(param.shape)
                gpuadam.adam_step(param, grad, state["m"], state["v"], count, **max_v, **options)
        results.append((param, *state.values()))
    return [list(each) for each in zip(*results, strict=True)]


def assert_like_one_by_one(opt, params, start, grads_of_steps, amsgrad=False, **options):
    expected = one_by_one(start, grads_of_steps, amsgrad, **options)
    found = [params, *(moments(opt, name) for name in ("m", "v", "max_v")[: len(expected) - 1])]
    for what, arrays, wanted in zip(("param", "m", "v", "max_v"), found, expected, strict=False):
        for k, (a, b) in enumerate(zip(arrays, wanted, strict=True)):
            assert_same_bits([np.ascontiguousarray(a)], [b], f"{what} of array {k}, of shape {b.shape}")


@pytest.mark.in_short()
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("layouts", [*([layout] for layout in LAYOUTS), list(LAYOUTS)], ids=" and ".join)
def test_a_step_over_many_gives_each_the_bits_of_its_own(layouts, amsgrad):
    start = members(0, layouts)
    params = members(0, layouts)
    steps = [members(k, layouts) for k in (1, 2, 3)]
    opt = gpuadam.Adam(params, lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    for grads in steps:
        opt.step(grads)
    assert_like_one_by_one(opt, params, start, steps, amsgrad, lr=0.01, weight_decay=0.1)


def test_a_parameter_and_its_gradient_may_be_laid_out_differently():
    layouts = list(LAYOUTS)
    params, start = members(0), members(0)
    steps = [members(k, layouts[k:] + layouts[:k]) for k in (1, 2)]
    opt = gpuadam.Adam(params)
    for grads in steps:
        opt.step(grads)
    assert_like_one_by_one(opt, params, start, steps)


@pytest.mark.parametrize("layouts", few([["plain"], list(LAYOUTS)], list(LAYOUTS)), ids=["plain", "all layouts"])
def test_a_gradient_of_another_format_is_taken_as_it_is(layouts):
    """Each parameter gets what a step of its own with that gradient gives it; one of float64 makes it a step in float64."""
    params, start, steps = members(0, layouts), members(0, layouts), [members(k, layouts) for k in (1, 2)]
    formats = ("f2", "f4", "f8")
    steps = [[g.astype(formats[(n + k) % 3]) for n, g in enumerate(grads)] for k, grads in enumerate(steps)]
    opt = gpuadam.Adam(params)
    for grads in steps:
        opt.step(grads)
    assert_like_one_by_one(opt, params, start, steps)


def test_arrays_that_were_skipped_keep_step_counts_of_their_own():
    params, start = members(0), members(0)
    steps = [[None if (n + k) % 3 == 0 else g for n, g in enumerate(members(k))] for k in (1, 2, 3, 4)]
    opt = gpuadam.Adam(params)
    for grads in steps:
        opt.step(grads)
    assert {s["step"] for s in opt.state.values()} == {2, 3}
    assert_like_one_by_one(opt, params, start, steps)


def test_a_step_without_any_gradient_changes_nothing():
    params = members(0)
    opt = gpuadam.Adam(params)
    opt.step([None] * len(params))
    assert all((a == b).all() for a, b in zip(params, members(0), strict=True))
    assert {s["step"] for s in opt.state.values()} == {0}


@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_a_thousand_arrays_get_the_bits_of_their_own_steps(layout):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 300, 1000)

    def made(seed):
        arrays = [np.random.default_rng([seed, n]).standard_normal(size).astype("f4") for n, size in enumerate(sizes)]
        return [LAYOUTS[layout](a) for a in arrays]

    params, start, steps = made(0), made(0), [made(1), made(2)]
    opt = gpuadam.Adam(params)
    for grads in steps:
        opt.step(grads)
    assert sizes.sum() > numba_cpu.PARALLEL_FROM
    assert_like_one_by_one(opt, params, start, steps)


def test_groups_share_nothing_but_the_call():
    params, start, steps = members(0), members(0), [members(1), members(2)]
    half = len(params) // 2
    opt = gpuadam.Adam([{"params": params[:half], "lr": 0.1}, {"params": params[half:], "weight_decay": 0.5}])
    for grads in steps:
        opt.step([grads[:half], grads[half:]])
    first = one_by_one(start[:half], [grads[:half] for grads in steps], lr=0.1)[0]
    second = one_by_one(start[half:], [grads[half:] for grads in steps], weight_decay=0.5)[0]
    for a, b in zip(params, first + second, strict=True):
        assert_same_bits([np.ascontiguousarray(a)], [b])


def test_the_same_gradient_serves_many_parameters():
    grad = state(1000)[1]
    params, start = [state(1000, seed=k)[0] for k in range(5)], [state(1000, seed=k)[0] for k in range(5)]
    opt = gpuadam.Adam(params)
    opt.step([grad] * 5)
    assert_like_one_by_one(opt, params, start, [[grad] * 5])


# One that is bad


def everything(opt, params):
    return (
        [a.tobytes() for a in (*params, *moments(opt, "m"), *moments(opt, "v"))],
        [s["step"] for s in opt.state.values()],
        opt.steps,
    )


def frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


BAD_GRADIENTS = {
    "another shape": lambda g: np.zeros(g.size + 1, g.dtype),
    "complex": lambda g: g.astype("c8" if g.dtype == "f4" else "c16"),
    "16-bit integers": lambda g: g.astype("u2"),
    "in the other byte order": lambda g: g.astype(g.dtype.newbyteorder()),
    "integers": lambda g: g.astype("i4"),
    "a list": lambda g: g.tolist(),
    "masked": lambda g: np.ma.masked_array(g),
}


@pytest.mark.parametrize("where", [0, 9, 16])
@pytest.mark.parametrize("layouts", [["plain"], list(LAYOUTS)], ids=["plain", "all layouts"])
@pytest.mark.parametrize("what", BAD_GRADIENTS)
def test_one_bad_gradient_stops_all_before_a_byte_is_written(what, layouts, where):
    params, grads = members(0, layouts), members(1, layouts)
    opt = gpuadam.Adam(params)
    opt.step(grads)
    before = everything(opt, params)
    grads[where] = BAD_GRADIENTS[what](grads[where])
    with pytest.raises((ValueError, TypeError), match=f"'{where}'"):
        opt.step(grads)
    assert everything(opt, params) == before


@pytest.mark.parametrize("layouts", [["plain"], list(LAYOUTS)], ids=["plain", "all layouts"])
@pytest.mark.parametrize("what", ["param", "m", "v"])
def test_one_array_that_became_read_only_stops_all(what, layouts):
    params, grads = members(0, layouts), members(1, layouts)
    opt = gpuadam.Adam(params)
    opt.step(grads)
    before = everything(opt, params)
    (params[7] if what == "param" else opt.state["7"][what]).flags.writeable = False
    with pytest.raises(ValueError, match=r"params\['7'\] is read-only"):
        opt.step(grads)
    assert everything(opt, params) == before


def test_a_bad_hyperparameter_of_the_last_group_stops_all():
    params, grads = members(0, ["plain"]), members(1, ["plain"])
    opt = gpuadam.Adam([{"params": params[:3]}, {"params": params[3:]}])
    before = everything(opt, params)
    opt.groups[1]["lr"] = 1e39  # which only float32 cannot hold
    with pytest.raises(ValueError, match=r"lr.*overflows"):
        opt.step([grads[:3], grads[3:]])
    assert everything(opt, params) == before


# Arrays that overlap across updates


def test_two_parameters_that_overlap_are_refused_by_both_names():
    buffer = np.zeros(100, "f4")
    params = {"w": buffer[:60], "other": np.zeros(5, "f4"), "b": buffer[59:]}
    with pytest.raises(ValueError, match=r"params\['w'\] and params\['b'\] share memory"):
        gpuadam.Adam(params)


@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_a_gradient_that_is_part_of_another_parameter_is_refused_by_both_names(layout):
    params = {name: LAYOUTS[layout](np.ones(50, "f4")) for name in ("w", "other", "b")}
    opt = gpuadam.Adam(params)
    grads = {name: np.ones(50, "f4") for name in params} | {"b": params["w"]}
    before = everything(opt, params.values())
    with pytest.raises(ValueError, match="share memory") as error:
        opt.step(grads)
    assert "params['w']" in str(error.value) and "the gradient of params['b']" in str(error.value)
    assert everything(opt, params.values()) == before


def test_arrays_that_overlap_across_groups_and_steps_are_refused():
    """Each launch by itself would be fine."""
    params = [np.ones(50, "f4") for _ in range(3)]
    grads = [np.ones(50, "f4") for _ in range(3)]
    opt = gpuadam.Adam([{"params": params[:1]}, {"params": params[1:]}])
    opt.step([grads[:1], [grads[1], None]])  # the last is then at a step of its own
    before = everything(opt, params)
    for bad in ([[params[2]], grads[1:]], [grads[:1], [params[2], grads[2]]], [grads[:1], [params[0], None]]):
        with pytest.raises(ValueError, match="share memory"):
            opt.step(bad)
        assert everything(opt, params) == before


def test_a_moment_that_is_another_parameter_is_refused_by_both_names():
    params = {"w": np.ones(50, "f4"), "b": np.ones(50, "f4")}
    opt = gpuadam.Adam(params)
    opt.state["b"]["v"] = params["w"]
    with pytest.raises(ValueError, match=r"params\['w'\] and v of params\['b'\] share memory"):
        opt.step({name: np.ones(50, "f4") for name in params})


# Memory


@pytest.mark.in_short()
@pytest.mark.parametrize("kind", few(["one", "many", "strided", "unaligned", "both dtypes"], "many", "strided"))
@pytest.mark.parametrize("n", few([1_000_000, 10_000_000], 1_000_000))
def test_a_step_allocates_less_than_a_megabyte_whatever_the_size(kind, n):
    if kind != "one" and n > 1_000_000:
        n = 3_000_000
    parts = {"one": [n], "many": [n // 1000] * 1000}.get(kind, [n // 2, n - n // 2])
    layout = {"strided": strided, "unaligned": off_its_elements}.get(kind, np.array)
    dtypes = ("f4", "f8") if kind == "both dtypes" else ("f4",)
    params = [layout(np.ones(size, dtypes[k % len(dtypes)])) for k, size in enumerate(parts)]
    grads = [layout(np.ones(size, dtypes[k % len(dtypes)])) for k, size in enumerate(parts)]
    opt = gpuadam.Adam(params)
    opt.step(grads)
    gc.collect()
    tracemalloc.start()
    try:
        opt.step(grads)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_numpys_memory_is_counted_by_the_test_above():
    tracemalloc.start()
    try:
        np.ones(1_000_000, "f4")
        assert tracemalloc.get_traced_memory()[1] >= 4_000_000
    finally:
        tracemalloc.stop()
