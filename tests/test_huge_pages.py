"""Memory on huge pages: where it lies, that it is the zeros it has to be, and that it goes back to the system."""

import contextlib
import copy
import gc
import mmap
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from cases import few

import gpuadam
from gpuadam.cli.measuring import pages
from gpuadam.kernels import huge_pages
from gpuadam.kernels.cpu_backend import backend as numba_cpu

HAS_USUAL = hasattr(mmap, "MADV_HUGEPAGE") and huge_pages.page_bytes() == huge_pages.USUAL_BYTES
ON_LINUX = pytest.mark.skipif(not HAS_USUAL, reason="only Linux is asked for huge pages, and here these have 2 MB")
MB = 1 << 20
# 9 MB of state in float32 for each moment: on huge pages together, and no array of the second name by itself
SHAPES = {"w": (1024, 1024), "b": (7,), "u": (1024, 1024), "f": (300, 1000)}


def params():
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    return made | {"f": np.asfortranarray(made["f"])}


def grads(k):
    rng = np.random.default_rng(k)
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}


def state_of(opt):
    return {(name, key): a for name, state in opt.state.items() for key, a in state.items() if key != "step"}


def address(array):
    return array.ctypes.data


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def whole_of(array):
    """Return the memory of the allocation that an array is a part of."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.memory


@contextlib.contextmanager
def small_pages(monkeypatch):
    """Return a context in which the system has no huge pages to ask for."""
    with monkeypatch.context() as patched:
        patched.delattr(mmap, "MADV_HUGEPAGE", raising=False)
        yield


def bits_after_steps(**options):
    of_opt = params()
    opt = gpuadam.Adam(of_opt, lr=0.1, **options)
    for k in range(3):
        opt.step(grads(k))
    return [a.tobytes() for a in (*of_opt.values(), *state_of(opt).values())]


# Where it lies


@ON_LINUX
def test_large_zeros_begin_near_the_beginning_of_a_huge_page():
    memory = huge_pages.zeros(9 * MB, 64)
    assert memory.size == 9 * MB and not memory.any() and address(memory) % 64 == 0
    assert address(memory) % huge_pages.page_bytes() < huge_pages.SMALL_PAGE


@ON_LINUX
def test_no_huge_page_more_is_taken_so_that_an_array_begins_elsewhere():
    """A page more would be a third of such an array."""
    for _ in range(4):
        assert address(huge_pages.zeros(3 * huge_pages.page_bytes(), 64)) % huge_pages.page_bytes() == 0


def of_flat(n, **options):
    flat = gpuadam.flatten(np.zeros(n, "f4"))
    (moments,) = gpuadam.Adam(flat.params, **options).state.values()
    return [flat.param, flat.grad, *(array for key, array in moments.items() if key != "step")]


@ON_LINUX
@pytest.mark.parametrize("n, options", [(1 << 20, {}), (3_000_000, {}), (1 << 23, {"amsgrad": True, "ema_decay": 0.9})])
def test_arrays_begin_at_different_places_in_a_small_page(n, options):
    """Those of a program too: large ones begin 16 or 64 bytes behind a small page's first byte."""
    places = sorted(address(a) % huge_pages.SMALL_PAGE for a in of_flat(n, **options))
    assert np.diff(places).min() >= huge_pages.NEAR
    assert np.diff([64, *places, huge_pages.SMALL_PAGE + 16]).min() >= huge_pages.NEAR // 2 - 64


@ON_LINUX
def test_moments_of_many_parameters_begin_at_different_places_in_a_small_page():
    params = [np.zeros(n, "f4") for n in (1 << 20, 3000, 1 << 22, 1)]
    state = gpuadam.Adam(params, amsgrad=True).state
    for moments in state.values():
        m, v, max_v = (address(moments[key]) for key in ("m", "v", "max_v"))
        assert (v - m) % huge_pages.SMALL_PAGE == (max_v - v) % huge_pages.SMALL_PAGE == huge_pages.NEAR


@ON_LINUX
def test_operands_of_which_not_all_parameters_have_an_array_begin_at_different_places_too():
    sizes = [3 * MB, 100, 3 * MB, 100, 3 * MB]
    parts = huge_pages.zeros_in_one([*sizes, *sizes, 3 * MB], 64, [*"mmmmmvvvvve"])
    apart = {(address(v) - address(m)) % huge_pages.SMALL_PAGE for m, v in zip(parts[:5], parts[5:10], strict=True)}
    assert apart == {huge_pages.NEAR} and (address(parts[10]) - address(parts[5])) % huge_pages.SMALL_PAGE == huge_pages.NEAR


@ON_LINUX
def test_the_state_of_a_group_is_parts_of_one_allocation():
    arrays = state_of(gpuadam.Adam(params()))
    starts = {key: address(a) for key, a in arrays.items()}
    assert min(starts.values()) % huge_pages.page_bytes() < huge_pages.SMALL_PAGE + 64
    span = max(starts[key] + a.nbytes for key, a in arrays.items()) - min(starts.values())
    n_bytes = sum(a.nbytes for a in arrays.values())
    assert (
        span
        < n_bytes + 128 * len(arrays) + 2 * huge_pages.SMALL_PAGE + n_bytes // huge_pages.USUAL_BYTES * huge_pages.STAGGER
    )


@ON_LINUX
@pytest.mark.parametrize("n_arrays", few([1, 8], 8))
def test_moments_whose_size_is_a_power_of_two_do_not_begin_at_the_same_place_in_it(n_arrays):
    """A step would go through both in different rows of the same banks of memory."""
    size = 32 * huge_pages.page_bytes() // n_arrays
    state = gpuadam.Adam([np.zeros(size // 4, "f4") for _ in range(n_arrays)]).state
    for moments in state.values():
        apart = address(moments["v"]) - address(moments["m"])
        assert (
            n_arrays * size
            < apart
            < n_arrays * (size + size // huge_pages.USUAL_BYTES * huge_pages.STAGGER + 128) + 2 * huge_pages.SMALL_PAGE
        )
        assert huge_pages.STAGGER <= apart % huge_pages.page_bytes() <= huge_pages.page_bytes() - huge_pages.STAGGER


@ON_LINUX
def test_allocations_do_not_begin_at_the_same_place_in_a_huge_page():
    page = huge_pages.page_bytes()
    n_bytes = huge_pages.STAGGERED_FROM * page
    large = [huge_pages.zeros(n_bytes, 64) for _ in range(4)]
    offsets = [address(a) % page for a in large]
    assert (
        len({offset // huge_pages.STAGGER for offset in offsets})
        == len({offset % huge_pages.SMALL_PAGE for offset in offsets})
        == 4
    )
    assert not any(a.any() for a in large) and [a.nbytes for a in large] == [n_bytes] * 4


def test_first_comes_m_of_all_parameters_then_v():
    arrays = state_of(gpuadam.Adam(params()))
    places = sorted(arrays, key=lambda key: address(arrays[key]))
    if huge_pages.is_large(sum(a.nbytes for a in arrays.values())):
        assert places == [(name, key) for key in ("m", "v") for name in SHAPES]


def test_arrays_of_state_have_names_shapes_and_orders_of_memory_as_before(monkeypatch):
    def described():
        return [
            (name, list(state), {key: (a.shape, a.strides, a.dtype) for key, a in state.items() if key != "step"})
            for name, state in gpuadam.Adam(params(), state_dtype="bfloat16", ema_decay=0.5).state.items()
        ]

    in_one = described()
    with small_pages(monkeypatch):
        assert in_one == described()


@pytest.mark.parametrize("offset", [0, 1, 5, 16])
def test_state_is_at_its_boundaries_where_its_parameter_is(offset):
    memory = np.zeros(2 * MB + 64, "f4")
    offset += -address(memory) % 64 // 4
    made = {"a": memory[offset : offset + MB], "b": memory[MB + offset + 1 :]}
    for (name, _), a in state_of(gpuadam.Adam(made)).items():
        assert address(a) % 64 == address(made[name]) % 64


def test_arrays_of_state_share_no_memory():
    arrays = list(state_of(gpuadam.Adam(params(), amsgrad=True)).values())
    for number, a in enumerate(arrays):
        a.fill(number)
    assert all((a == number).all() for number, a in enumerate(arrays))


def test_small_states_have_allocations_of_their_own():
    bases = {id(a.base) for a in state_of(gpuadam.Adam([np.zeros(5, "f4"), np.zeros(5, "f4")])).values()}
    assert len(bases) == 4


@ON_LINUX
def test_each_dtype_of_a_group_and_each_group_has_an_allocation():
    groups = [{"params": {"a": np.ones((1024, 1024), "f4"), "b": np.ones((1024, 1024), "f8")}}]
    groups.append({"params": {"c": np.ones((1024, 1024), "f4")}})
    opt = gpuadam.Adam(groups)
    of = {name: (opt.state[name]["m"], opt.state[name]["v"]) for name in "abc"}
    wholes = {name: {id(whole_of(a)) for a in pair} for name, pair in of.items()}  # of the one and the other moment
    assert all(len(whole) == 1 for whole in wholes.values()) and len(set.union(*wholes.values())) == 3


@ON_LINUX
def test_flat_buffers_and_state_in_host_memory_begin_near_the_beginning_of_a_huge_page():
    flat = gpuadam.flatten([np.ones((1024, 1024), "f4"), np.ones((1024, 1024), "f4")])
    offloaded = gpuadam.OffloadAdam([np.ones((1024, 1024), "f4")], update="host").state["0"]
    for a in (flat.param, offloaded["m"], offloaded["v"]):
        assert address(a) % huge_pages.page_bytes() < huge_pages.SMALL_PAGE


@ON_LINUX
@pytest.mark.skipif(not pages.can_collapse(), reason="Linux before 6.1 makes no small pages huge")
def test_memory_is_on_huge_pages_when_it_is_handed_out():
    if huge_pages.NODES.exists() and len(list(huge_pages.NODES.glob("node[0-9]*"))) > 1:
        pytest.skip("with several nodes of memory the update touches it first")
    memory = huge_pages.zeros(64 * MB, 64)
    assert pages.percent_huge(pages.extents([memory])) > 50  # how many there are is the system's


def of_small_pages(n_bytes):
    """Return an array at a huge page's first byte whose memory has small pages."""
    page = huge_pages.page_bytes()
    memory = np.frombuffer(mmap.mmap(-1, n_bytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array = memory[-address(memory) % page :][:n_bytes]
    huge_pages.advise(address(array), n_bytes, mmap.MADV_NOHUGEPAGE)
    array[:] = 3
    return array


@ON_LINUX
@pytest.mark.skipif(not pages.can_collapse(), reason="Linux before 6.1 makes no small pages huge")
def test_memory_of_another_library_is_moved_to_the_huge_pages_that_lie_in_it_whole():
    page = huge_pages.page_bytes()
    array = of_small_pages(4 * page)
    assert pages.percent_huge([(address(array), array.nbytes)]) == 0
    huge_pages.make_huge(address(array) + 64, 3 * page)
    of_each = [pages.percent_huge([(address(array) + k * page, page)]) for k in range(4)]
    assert of_each[0] == of_each[3] == 0 and set(of_each) == {0, 100} and (array == 3).all()


@ON_LINUX
@pytest.mark.parametrize("new, nodes, asked", [(False, 1, 2), (False, 2, 2), (True, 1, 2), (True, 2, 1)])
def test_new_memory_of_another_library_lies_where_it_is_written_first(monkeypatch, tmp_path, new, nodes, asked):
    for k in range(nodes):
        (tmp_path / f"node{k}").mkdir()
    monkeypatch.setattr(huge_pages, "NODES", tmp_path)
    monkeypatch.setattr(huge_pages, "_has_several_nodes", huge_pages._has_several_nodes.__wrapped__)
    advice = []
    monkeypatch.setattr(huge_pages, "advise", lambda start, n_bytes, what: advice.append(what))
    huge_pages.make_huge(huge_pages.page_bytes(), huge_pages.page_bytes(), new)
    huge_pages.make_huge(huge_pages.page_bytes() + 64, huge_pages.page_bytes(), new)  # no whole one
    assert advice == [mmap.MADV_HUGEPAGE, huge_pages.COLLAPSE][:asked]


# What it does not change


def test_the_bits_are_those_of_small_pages(monkeypatch):
    on_huge = bits_after_steps()
    with small_pages(monkeypatch):
        assert bits_after_steps() == on_huge


@pytest.mark.parametrize("way", ["advice refused", "several nodes", "another size"])
def test_a_system_that_gives_none_has_the_same_numbers(monkeypatch, way):
    expected = bits_after_steps()
    if way == "advice refused":
        refused = []
        monkeypatch.setattr(huge_pages, "advise", lambda *args: refused.append(args) or _refuse())
    elif way == "several nodes":
        monkeypatch.setattr(huge_pages, "_has_several_nodes", lambda: True)
    else:
        monkeypatch.setattr(huge_pages, "page_bytes", lambda: 512 * MB)
    assert bits_after_steps() == expected
    assert way != "advice refused" or not hasattr(mmap, "MADV_HUGEPAGE") or refused


def _refuse():
    raise OSError(22, "Invalid argument")


def test_huge_pages_have_2_mb_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    assert huge_pages.page_bytes.__wrapped__() == 2 * MB
    (tmp_path / "hpage_pmd_size").write_text("33554432\n")
    assert huge_pages.page_bytes.__wrapped__() == 32 * MB


@ON_LINUX
def test_memory_that_the_system_has_not_is_a_memory_error():
    with pytest.raises(MemoryError, match="unable to allocate 4,611,686,018,427,387,904 bytes"):
        huge_pages.zeros(1 << 62, 64)
    with pytest.raises(MemoryError, match="unable to allocate"):
        huge_pages.zeros_in_one([1 << 61, 1 << 61], 64)


def test_copies_and_pickles_of_one_array_are_of_it_alone():
    opt = gpuadam.Adam(params())
    opt.step(grads(0))
    m = opt.state["b"]["m"]
    assert len(pickle.dumps(m)) < 1000
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.copy()):
        assert other.tobytes() == m.tobytes() and not np.shares_memory(other, m)


def test_an_array_of_state_is_shared_by_dlpack():
    opt = gpuadam.Adam(params())
    opt.step(grads(0))
    m = opt.state["u"]["m"]
    shared = np.from_dlpack(m)
    of_numpys = np.from_dlpack(np.zeros(3, "f4"))  # read-only until NumPy 2.2
    assert np.shares_memory(shared, m) and shared.flags.writeable == of_numpys.flags.writeable
    expected = m.copy()
    del opt, m
    gc.collect()
    assert (shared == expected).all()


def test_a_copy_of_a_large_array_in_the_hosts_memory_keeps_order_and_numbers():
    for array in (
        params()["f"],
        np.arange(3 * MB).reshape(1024, -1)[:, ::2],
        np.arange(2 * MB, dtype="f8").reshape(2, 4, -1).T,
    ):
        there = numba_cpu.from_host(array)
        assert there.strides == np.array(array).strides and there.dtype == array.dtype and (there == array).all()
        assert not np.shares_memory(there, array)


def test_parameters_are_replaced_added_and_removed_in_a_group_that_shares_an_allocation():
    made = params()
    opt = gpuadam.Adam(made, lr=0.1)
    opt.step(grads(0))
    before = {key: a.copy() for key, a in state_of(opt).items()}
    rows = np.r_[5, -1, np.arange(1000)]
    made["w"] = np.zeros((len(rows), 1024), "f4")
    opt.replace("w", made["w"], rows)
    made.pop("u")
    opt.remove("u")
    made["new"] = np.ones((2048, 1024), "f4")
    opt.add("new", made["new"])
    after = state_of(opt)
    for key in ("m", "v"):
        assert (after["w", key][2:] == before["w", key][:1000]).all() and not after["w", key][1].any()
        assert not after["new", key].any()
        assert all(after[name, key].tobytes() == before[name, key].tobytes() for name in ("b", "f"))
    opt.step({name: np.ones_like(p) for name, p in made.items()})


# How it goes


@ON_LINUX
def test_memory_goes_back_when_the_last_array_goes():
    flat = huge_pages.zeros_in_one([5 * MB, 5 * MB], 64)
    whole = weakref.ref(whole_of(flat[0]))
    view = flat[1][3:]
    del flat
    gc.collect()
    assert whole() is not None
    view[:] = 1
    del view
    gc.collect()
    assert whole() is None


@ON_LINUX
def test_an_array_that_is_freed_gives_the_pages_back_that_it_has_to_itself():
    a, b = huge_pages.zeros_in_one([64 * MB, 64 * MB], 64)
    a[:], b[:] = 1, 2
    before = resident()
    del a
    gc.collect()
    assert resident() < before - 48 * MB and (b == 2).all()
    before = resident()
    del b
    gc.collect()
    assert resident() < before - 48 * MB


@ON_LINUX
def test_the_neighbours_of_an_array_that_is_freed_keep_their_numbers():
    parts = huge_pages.zeros_in_one([3 * MB + 100, 5 * MB + 1, 3 * MB], 64)
    for number, part in enumerate(parts):
        part[:] = number + 1
    del parts[1], part
    gc.collect()
    assert (parts[0] == 1).all() and (parts[1] == 3).all()


@ON_LINUX
def test_a_forked_child_has_memory_of_its_own():
    a, b = huge_pages.zeros_in_one([4 * MB, 4 * MB], 64)
    child = os.fork()
    if child == 0:  # no test may go on here
        a[:] = 1
        del a
        gc.collect()
        os._exit(int(b.any()))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and not a.any()


@ON_LINUX
def test_a_process_ends_while_it_has_such_arrays():
    code = "from gpuadam.kernels import huge_pages; arrays = huge_pages.zeros_in_one([5 << 20, 5 << 20], 64); one = arrays[0][1:]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# What is said of it

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                4096 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac hg
7f0000400000-7f0000401000 rw-p 00000000 00:00 0                          [heap]
Rss:                   4 kB
AnonHugePages:         0 kB
"""


def test_the_systems_text_is_read():
    assert pages.parsed(SMAPS) == [
        (0x7F0000000000, 0x7F0000400000, 4 * MB, 2 * MB),
        (0x7F0000400000, 0x7F0000401000, 4096, 0),
    ]


@pytest.mark.parametrize(
    "extents, percent",
    [
        ([(0x7F0000000000, 4 * MB)], 50),
        ([(0x7F0000400000, 4096)], 0),
        ([(0x7F0000000000, 2048), (0x7F0000400000, 2048)], 25),
        ([(0x100, 100)], 0),
        ([], None),
    ],
)
def test_the_share_on_huge_pages_is_that_of_the_mappings(extents, percent):
    assert pages.percent_huge(extents, pages.parsed(SMAPS)) == percent


@pytest.mark.parametrize(
    "enabled, says",
    [
        ("always", "large arrays of every library get them"),
        ("madvise", "NumPy's large ones get them"),
        ("never", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        (None, "this system has none for arrays"),
    ],
)
def test_doctors_line_says_the_setting_and_what_it_means(monkeypatch, tmp_path, enabled, says):
    if enabled:
        for name in ("enabled", "defrag"):
            (tmp_path / name).write_text("always madvise never\n".replace(enabled, f"[{enabled}]"))
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    line = pages.described(pages.system())
    assert line.startswith("Huge pages") and says in line
    assert enabled is None or f". Setting: {enabled}; defrag: {enabled}; MADV_COLLAPSE: " in line
