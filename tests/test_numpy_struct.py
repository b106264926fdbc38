"""The reading of NumPy's structs: what is plain is described as it is, what is not is left alone, and both at every call."""

import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

import gpuadam
from gpuadam import functional, hyperparameters, numpy_batches, update
from gpuadam.kernels import layout, numpy_struct, view
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.numpy_struct import BYTES, IS_SCALE, KEY, PARAM, SIZE, START, WRITTEN
from gpuadam.repeated_on_cpu import RepeatedCall

F4, F8 = np.dtype("float32"), np.dtype("float64")
NAMES = ("param", "grad", "m", "v", "max_v")
GRAD, M, V, MAX_V = range(PARAM + 1, PARAM + 5)
ADAM = hyperparameters.checked(1e-3, (0.9, 0.999), 1e-8, 0.0)


def plain(shape=(6,), dtype="f4", width=4):
    return [np.ones(shape, dtype) for _ in range(width)]


def table(*updates):
    """The table of updates, each a list of param, grad, m, v and perhaps max_v; None if there is none."""
    columns = [list(column) for column in zip(*updates, strict=True)]
    batches = numpy_batches.batches([update.Updates(ADAM, 1, columns, operands=NAMES[: len(columns)])])
    return batches and batches[0].table


def frozen(a):
    a.flags.writeable = False
    return a


def test_numpys_arrays_are_laid_out_as_this_package_knows_them():
    """If not, all is still right, and a small step takes some times as long."""
    assert numpy_struct.known()


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="this interpreter has other structs")
def test_a_layout_that_is_not_the_known_one_is_noticed(monkeypatch):
    for field in ("DATA", "NDIM", "SHAPE", "DTYPE", "FLAGS"):
        with monkeypatch.context() as patched:
            patched.setattr(numpy_struct, field, getattr(numpy_struct, field) + 8)
            if field != "SHAPE":  # what lies there is no address that could be followed
                assert not numpy_struct.known.__wrapped__(), field
    monkeypatch.setattr(sys.implementation, "name", "another")
    assert not numpy_struct.known.__wrapped__()


# What is plain


@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (3, 0, 2), (2, 3, 4), (1, 2, 3, 4), (2, 1, 2, 1, 2)])
def test_a_row_is_what_python_says_of_plain_arrays(shape, width, dtype):
    arrays = plain(shape, dtype, width)
    of_elements = [arrays[0].size, 0, 0]  # nothing is rounded randomly here: no key, no start
    assert table(arrays).tolist() == [[*of_elements, *(a.ctypes.data for a in arrays)]]
    assert (SIZE, KEY, START, PARAM) == (0, 1, 2, 3)


def test_rows_come_in_the_order_of_the_updates():
    updates = [plain((n,)) for n in (3, 0, 5, 1)]
    rows = table(*updates)
    assert rows[:, SIZE].tolist() == [3, 0, 5, 1]
    assert rows[:, PARAM].tolist() == [arrays[0].ctypes.data for arrays in updates]


def test_updates_of_several_dtypes_have_no_table_together():
    assert table(plain((2,), "f8"), plain((2,), "f4")) is None


def test_scales_are_one_for_each_group():
    codes = [np.ones((5, 20), dtype) for dtype in ("f4", "f4", "u1", "u1")]

    def of_scales(n):
        columns = [[a] for a in (*codes, np.ones(n, "f4"), np.ones(n, "f4"))]
        group = update.Updates(ADAM, 1, columns, operands=(*NAMES[:4], "m_scale", "v_scale"), keys=[7], starts=[32])
        return numpy_batches.batches([group])

    (batch,) = of_scales(4)
    assert batch.table[0, [SIZE, KEY, START]].tolist() == [100, 7, 32] and batch.is_random
    assert of_scales(3) is None and of_scales(5) is None


def test_bits_are_read_as_what_they_stand_for():
    arrays = [np.ones(6, dtype) for dtype in ("u2", "f4", "u2", "u2")]
    assert table(*[arrays]) is None
    for k in (0, 2, 3):
        arrays[k] = gpuadam.Bits(arrays[k], "bfloat16")
    assert table(arrays)[0, PARAM] == arrays[0].array.ctypes.data
    arrays[2] = gpuadam.Bits(arrays[2].array, "float16")
    assert table(arrays) is None


def test_a_read_only_gradient_is_plain():
    arrays = plain()
    frozen(arrays[GRAD - PARAM])
    assert table(arrays) is not None


def test_one_gradient_may_serve_several_updates():
    grad = np.ones(6, "f4")
    updates = [plain() for _ in range(3)]
    for arrays in updates:
        arrays[GRAD - PARAM] = grad
    assert table(*updates) is not None


# What is not: what takes an array's place. `a` is a plain array of float32 and shape (4, 6).


def unaligned(a):
    placed = np.frombuffer(bytearray(a.nbytes + 1), "u1")[1:].view(a.dtype).reshape(a.shape)
    assert not placed.flags.aligned
    return placed


class Subclass(np.ndarray):
    pass


NOT_PLAIN = {
    "in Fortran's order": lambda a: np.asfortranarray(a),
    "transposed": lambda a: np.ones((6, 4), "f4").T,
    "strided": lambda a: np.ones((4, 12), "f4")[:, ::2],
    "strided outside": lambda a: np.ones((8, 6), "f4")[::2],
    "reversed": lambda a: a[::-1],
    "reversed inside": lambda a: a[:, ::-1],
    "broadcast": lambda a: np.lib.stride_tricks.as_strided(a, (4, 6), (0, 4)),
    "unaligned": unaligned,
    "a subclass": lambda a: a.view(Subclass),
    "masked": lambda a: np.ma.masked_array(a),
    "a recarray": lambda a: a.view(np.recarray),
    "a matrix": lambda a: a.view(np.matrix),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder()),
    "an equal dtype that is another object": lambda a: a.astype(np.dtype("f4", metadata={"a": 1})),
    "int32": lambda a: a.astype("i4"),
    "int64": lambda a: a.astype("i8"),
    "bool": lambda a: a.astype(bool),
    "float16": lambda a: a.astype("f2"),
    "long double": lambda a: a.astype(np.longdouble) if np.dtype(np.longdouble) != F8 else a.astype("f2"),
    "complex64": lambda a: a.astype("c8"),
    "objects": lambda a: a.astype(object),
    "strings": lambda a: a.astype("U8"),
    "records": lambda a: np.zeros(a.shape, [("x", "f4")]),
    "dates": lambda a: np.zeros(a.shape, "M8[s]"),
    "None": lambda a: None,
    "Ellipsis": lambda a: ...,
    "a small int": lambda a: 1,
    "a float": lambda a: 1.0,
    "True": lambda a: True,
    "a NumPy scalar": lambda a: a[0, 0],
    "a list": lambda a: a.tolist(),
    "an empty tuple": lambda a: (),
    "a string": lambda a: "grad",
    "a memoryview": lambda a: memoryview(a),
    "a type": lambda a: np.ndarray,
    "a dtype": lambda a: a.dtype,
    "an object": lambda a: object(),
    # of another update, perhaps
    "float64": lambda a: a.astype("f8"),
    "one element less": lambda a: np.ones((4, 5), "f4"),
    "as many elements in another shape": lambda a: np.ones((6, 4), "f4"),
    "as many elements in one dimension": lambda a: np.ones(24, "f4"),
    "one dimension more": lambda a: np.ones((1, 4, 6), "f4"),
    "0-d": lambda a: np.ones((), "f4"),
    "empty": lambda a: np.ones((4, 0), "f4"),
}
PLAIN_IF_ALL_ARE = [*list(NOT_PLAIN)[list(NOT_PLAIN).index("float64") :], "in Fortran's order", "transposed"]
OF_ANY_FLOAT = [(what, k) for what in ("float16", "float64") for k in (0, 1)]  # param and grad are of formats of their own


@pytest.mark.parametrize("k", range(5), ids=NAMES)
@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_not_plain_has_no_table(what, k):
    arrays = plain((4, 6), width=5)
    arrays[k] = NOT_PLAIN[what](arrays[k])
    assert (table(arrays) is not None) == ((what, k) in OF_ANY_FLOAT)
    assert table(plain((4, 6), width=5), arrays) is None


@pytest.mark.parametrize("what", [w for w in NOT_PLAIN if w not in PLAIN_IF_ALL_ARE])
def test_what_is_not_plain_has_no_table_if_all_arrays_are_like_it(what):
    assert table([NOT_PLAIN[what](a) for a in plain((4, 6))]) is None


def ordered(array, order, step):
    """Return a copy whose dimensions lie in memory in some order, of which the first has gaps if step is above 1."""
    there = np.zeros([array.shape[d] * (step if d == order[0] else 1) for d in order], array.dtype)[::step]
    there = there.transpose(np.argsort(order))
    there[...] = array
    return there


@settings(max_examples=examples(100, 1000))
@given(st.data())
def test_arrays_in_one_order_of_memory_have_a_table_whatever_it_is(data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    orders = st.permutations(range(len(shape)))
    first, steps = data.draw(orders), st.sampled_from([1, 1, 1, 2])
    arrays = []
    for k in range(5):
        order = data.draw(orders) if data.draw(st.integers(0, 7)) == 0 else first
        dtype = data.draw(st.sampled_from(["f4", "f8"])) if k < 2 else "f4"
        arrays.append(ordered(np.arange(np.prod(shape)).reshape(shape).astype(dtype), order, data.draw(steps)))
    is_dense = layout.dense([view.on_cpu("", a) for a in arrays])
    rows = table(arrays)
    assert (rows is not None) == is_dense
    if is_dense:  # each address is the first of a run, whose elements are those of the others in the same order
        runs = [np.ndarray(a.size, a.dtype, np.lib.stride_tricks.as_strided(a, (a.size,), (a.itemsize,))) for a in arrays]
        assert rows[0, PARAM:].tolist() == [a.ctypes.data for a in arrays]
        assert all(np.array_equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("k", range(5), ids=NAMES)
def test_a_dtype_at_the_address_of_one_that_is_gone_is_read_as_what_it_is(k):
    """Dtypes with metadata come and go, unlike NumPy's own: what is known by their address must keep them alive."""

    def step(dtype):
        arrays = plain(width=5)
        arrays[k] = np.ones(6, dtype)
        gpuadam.adam_step(*arrays[:4], 1, max_v=arrays[4])

    addresses, again = set(), 0
    for n in range(100):
        floats = np.dtype("f4", metadata={"n": n})
        addresses.add(id(floats))
        step(floats)
        del floats
        integers = np.dtype("i4", metadata={"n": n})
        again += id(integers) in addresses
        with pytest.raises(TypeError, match="int32"):
            step(integers)
    assert again


def test_a_memmap_has_no_table(tmp_path):
    arrays = plain()
    arrays[M - PARAM] = np.memmap(tmp_path / "m", "f4", "w+", shape=(6,))
    assert table(arrays) is None


@pytest.mark.parametrize("k", [PARAM, M, V, MAX_V])
def test_a_read_only_array_that_is_written_has_no_table(k):
    arrays = plain(width=5)
    frozen(arrays[k - PARAM])
    assert table(arrays) is None


SHORT = """
import ctypes, mmap
import numpy as np
from gpuadam.kernels import numpy_struct

mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
end = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
assert mprotect(end, mmap.PAGESIZE, 0) == 0  # from here on, reading ends the process
head = end - object.__basicsize__
ctypes.c_int64.from_address(head + numpy_struct.TYPE).value = id(object)
print(numpy_struct.read(np.array([head] * 4), id(np.ndarray), np.zeros((5, 4), np.int64), True, np.zeros((1, 7), np.int64)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected otherwise on Windows")
def test_nothing_is_read_beyond_the_head_of_what_is_no_array():
    """A number is shorter than an array, and may lie at the end of the memory that there is."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", SHORT], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "-1\n"), done.stderr


# What changes between two calls


def test_a_flag_that_changes_is_seen():
    arrays = plain()
    assert table(arrays) is not None
    arrays[V - PARAM].flags.writeable = False
    assert table(arrays) is None
    arrays[V - PARAM].flags.writeable = True
    assert table(arrays) is not None


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_a_shape_that_changes_is_seen():
    arrays = plain((6,))
    assert table(arrays) is not None
    arrays[0].shape = (2, 3)
    assert table(arrays) is None
    for a in arrays[1:]:
        a.shape = (2, 3)
    assert table(arrays)[0, SIZE] == 6


def test_a_size_and_an_address_that_change_are_seen():
    arrays = plain((6,))
    assert table(arrays)[0, SIZE] == 6
    arrays[0].resize(100_000, refcheck=False)
    assert table(arrays) is None
    for a in arrays[1:]:
        a.resize(100_000, refcheck=False)
    assert table(arrays)[0].tolist() == [100_000, 0, 0, *(a.ctypes.data for a in arrays)]


def test_an_object_at_the_address_of_one_that_is_gone_is_read_anew():
    arrays = plain((6,))
    for k in range(1000):
        address = id(arrays[2])
        arrays[2] = None
        arrays[2] = np.ones(6, "f4" if k % 2 else "f8")
        if id(arrays[2]) == address and arrays[2].dtype == F8:
            break
    else:
        pytest.skip("no address was used again")
    assert table(arrays) is None


# Overlap

# These are for compiled code alone
disjoint, disjoint_in_one = njit(numpy_struct.disjoint.py_func), njit(numpy_struct.disjoint_in_one.py_func)


def expected_of(itemsizes, scales=()):
    """What `columns_like` says of five columns of elements of some bytes."""
    expected = np.zeros((5, 5), np.int64)
    expected[BYTES] = itemsizes
    expected[WRITTEN] = [name != "grad" for name in NAMES]
    expected[IS_SCALE] = [name in scales for name in NAMES]
    return expected


def disjoint_byte_by_byte(rows, expected):
    taken = []  # (addresses, whether they are written)
    for row in rows:
        for k in range(5):
            n = -(-row[SIZE] // 32) if expected[IS_SCALE, k] else row[SIZE]
            taken.append((set(range(row[PARAM + k], row[PARAM + k] + n * expected[BYTES, k])), expected[WRITTEN, k]))
    return not any(a & b and (a_written or b_written) for (a, a_written), (b, b_written) in itertools.combinations(taken, 2))


@pytest.mark.usefixtures("examples")
@settings(max_examples=examples(100, 500), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            *[st.integers(0, 400)] * 2,  # a key and a start, which are no addresses
            *[st.integers(1, 400)] * 5,
        ),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=5, max_size=5),
    st.sets(st.sampled_from(NAMES)),
)
def test_disjoint_is_what_comparing_all_bytes_says(rows, itemsizes, scales):
    rows, expected = np.array(rows, np.int64), expected_of(itemsizes, scales)
    assert disjoint(rows, expected) == disjoint_byte_by_byte(rows, expected)
    for row in rows:
        assert disjoint_in_one(row[None], expected) == disjoint_byte_by_byte([row], expected)
    like = numpy_struct.Columns((), expected)
    assert numpy_struct.all_disjoint([(rows[:1], like), (rows[1:], like)]) == disjoint_byte_by_byte(rows, expected)


def test_disjoint_is_what_comparing_all_bytes_says_of_arrays_side_by_side():
    """Every order of five arrays and one more, each beginning where another ends, or a byte before."""
    found, expected = set(), expected_of(4)
    for order in itertools.permutations(range(5)):
        for shift in (0, 1):
            row = [2] + [0] * 7
            for place, k in enumerate(order):
                row[PARAM + k] = 100 + 8 * place - shift * (place == 3)
            for function in (disjoint, disjoint_in_one):
                found.add(function(np.array([row]), expected))
                assert function(np.array([row]), expected) == disjoint_byte_by_byte([row], expected) == (not shift)
    assert found == {True, False}


def test_disjoint_is_right_for_many_arrays():
    """So many that sorting takes several gaps."""
    rng, n, expected = np.random.default_rng(0), 700, expected_of(4)
    addresses = rng.permutation(5 * n).reshape(n, 5) * 16 + 64
    rows = np.column_stack([np.full((n, 1), 4), np.zeros((n, 2), int), addresses])
    assert disjoint(rows, expected)
    for row, column in [(0, PARAM), (n // 2, V), (n - 1, MAX_V)]:
        moved = rows.copy()
        moved[row, column] += 1
        assert disjoint(moved, expected) == (moved[row, column] + 15 == addresses.max() + 16)


@pytest.mark.parametrize("n_updates", [1, 2])
def test_a_read_finds_what_another_would_find_whatever_was_read_before(n_updates):
    """Of arrays that lie where they lay the overlap is not looked for again."""
    rng, memory, found = np.random.default_rng(1), np.zeros(60, "f4"), set()
    columns = [[memory[:1]] * n_updates] * 4
    like = numpy_struct.columns_like(NAMES[:4], [column[0] for column in columns], False)
    read = numpy_struct.read_one if n_updates == 1 else numpy_struct.read
    rows, before = np.zeros((n_updates, PARAM + 4), np.int64), None
    for _ in range(400):
        if before is None or rng.random() < 0.5:  # a column moves, or all have another length
            size, starts = int(rng.integers(1, 6)), 6 * rng.permutation(9)[: 4 * n_updates].reshape(4, n_updates)
            starts[rng.integers(4)] += rng.integers(-3, 4)
            starts = np.maximum(starts, 0)
            if before is not None and rng.random() < 0.5:
                starts = before
        arrays = [[memory[start : start + size] for start in column] for column in starts]
        objects = np.array([id(array) for column in arrays for array in column])
        changed = read(objects, numpy_struct.NDARRAY, like.expected, True, rows)
        anew = numpy_struct.table(arrays, like)
        assert (changed >= 0) == (anew is not None)
        if anew is not None:
            np.testing.assert_array_equal(rows, anew)
        found.add((changed >= 0, changed > 0))
        before = starts
    assert found == {(False, False), (True, False), (True, True)}


def test_gradients_may_overlap_whatever_lies_between_them():
    """One that is long and read only, and behind its beginning others that begin and end."""
    base, expected = np.zeros((3, 8), np.int64), expected_of(4)
    base[:, SIZE] = [100, 1, 1]
    base[:, [PARAM, M, V, MAX_V]] = np.arange(12).reshape(3, 4) * 1000 + 10_000
    base[:, GRAD] = [100, 120, 300]
    assert disjoint(base, expected)
    base[2, M] = 496  # within the first gradient, behind the others
    assert not disjoint(base, expected)


# With this way or without it, the outcome is the same


def shared(a):
    """Four arrays of which the second begins within the first."""
    buffer = np.linspace(0.1, 1, 40).astype("f4")
    return [buffer[:24].reshape(4, 6), buffer[12:36].reshape(4, 6), *plain((4, 6))[:2]]


CASES: dict = {f"{name} is {what}": (k, what) for what in NOT_PLAIN for k, name in enumerate(NAMES[:4])}
OPTIONS = {
    "a bad step": {"step": 0},
    "a step of another type": {"step": 1.0},
    "a bad lr": {"lr": -1.0},
    "an lr that float32 cannot hold": {"lr": 1e39},
    "an eps that rounds to 0": {"eps": 1e-60},
    "bad betas": {"betas": (0.9, 1.0)},
    "a backend that is not there": {"backend": "cuppy"},
    "a backend of other memory": {"backend": "cupy"},
    "a stream": {"stream": 1},
    "AMSGrad": {"max_v": lambda: np.ones((4, 6), "f4")},
    "AMSGrad of another shape": {"max_v": lambda: np.ones((4, 5), "f4")},
    "AMSGrad of a read-only array": {"max_v": lambda: frozen(np.ones((4, 6), "f4"))},
    "everything": {"weight_decay": 0.1, "decoupled": True, "maximize": True, "grad_scale": 3.0, "betas": (0.2, 0.3)},
}


def outcome_of(arrays, options):
    """What a step raises, or the bytes that it leaves."""
    options = {name: value() if callable(value) else value for name, value in options.items()}
    step = options.pop("step", 3)
    try:
        gpuadam.adam_step(*arrays, step, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        outcome = type(error), str(error)
    else:
        outcome = None
    given = [*arrays, options.get("max_v")]
    return outcome, [a.tobytes() if isinstance(a, np.ndarray) and a.dtype != object else str(type(a)) for a in given]


def arrays_of(case):
    arrays = [np.linspace(0.1, 1 + k, 24).astype("f4").reshape(4, 6) for k in range(4)]
    if case in CASES:
        k, what = CASES[case]
        arrays[k] = NOT_PLAIN[what](arrays[k])
    elif case in NAMES:
        frozen(arrays[NAMES.index(case)])
    elif case == "overlap":
        arrays = shared(arrays)
    elif case.startswith("all "):
        arrays = [NOT_PLAIN[case.removeprefix("all ")](a) for a in arrays]
    return arrays


@pytest.mark.parametrize(
    "case", [*CASES, *NAMES[:4], "overlap", "plain", *OPTIONS, *(f"all {what}" for what in NOT_PLAIN if what != "a type")]
)
def test_the_outcome_is_the_same_without_this_way(monkeypatch, case):
    options = OPTIONS.get(case, {})
    with_it = outcome_of(arrays_of(case), options)
    monkeypatch.setattr(numpy_batches, "batches", lambda groups: None)
    assert outcome_of(arrays_of(case), options) == with_it


def test_this_way_is_the_one_that_is_taken(monkeypatch):
    """Else the tests above would compare one way with itself."""
    taken = []
    monkeypatch.setattr(numba_cpu, "batches", lambda updates, arrays: taken.append("the other way") or [])
    gpuadam.adam_step(*plain(), 1)
    gpuadam.Adam(np.ones(6, "f4")).step(np.ones(6, "f4"))
    assert taken == []
    monkeypatch.setattr(numpy_batches, "_latest", {})
    monkeypatch.setattr(numpy_struct, "known", lambda: False)
    monkeypatch.setattr(functional, "_REPEATED", RepeatedCall())
    gpuadam.adam_step(*plain(), 1)
    assert taken == ["the other way"]


# References and memory


def test_no_reference_is_kept_or_lost():
    arrays, others = plain(), plain()
    others[M - PARAM] = np.ones(6, "i8")
    objects = [*arrays, *others, F4, F8, np.ndarray]
    opt = gpuadam.Adam(arrays[0])

    def calls():
        for _ in range(1000):
            gpuadam.adam_step(*arrays, 1)
            opt.step(arrays[1])
            table(others)

    calls()
    gc.collect()
    before = [sys.getrefcount(o) for o in objects[:8]]
    calls()
    gc.collect()
    assert [sys.getrefcount(o) for o in objects[:8]] == before


def test_nothing_is_written_when_one_update_of_many_is_refused():
    updates = [plain((n,)) for n in (5, 7, 9)]
    frozen(updates[2][M - PARAM])
    assert table(*updates) is None
    assert all((a == 1).all() for arrays in updates for a in arrays)
