"""Many arrays in one launch on a GPU: the table kernels, executed on the host, and the launches themselves."""

import copy
import gc

import numpy as np
import pytest
from cases import DTYPES, KEY_FORMS, assert_same_bits, form_and_scalars, state, wide_state
from gpu_work import there

import gpuadam
from gpuadam.kernels import gpu_table, streams
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.view import on_cpu

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

CHUNK = gpu_table.CHUNK


def sizes(dtype):
    lanes = 16 // np.dtype(dtype).itemsize
    return [
        1,
        3,
        4,
        127,
        1000,
        CHUNK - 1,
        CHUNK * lanes,
        CHUNK * lanes + 1,
        CHUNK * (lanes + 1) + 5,
        3 * CHUNK * lanes - 1,
        2,
    ]


def laid_out(form, ns, offsets):
    """Return the arrays of updates, each at its offset from a 64-byte boundary, in one buffer of sentinel bytes."""
    itemsize = form.dtype.itemsize
    arena = np.full(sum(ns) * 5 * itemsize + len(ns) * 5 * 256 + 64, 0xA5, "u1")
    at, updates, spans = -arena.ctypes.data % 64, [], []
    for k, n in enumerate(ns):
        arrays = []
        for j, values in enumerate(wide_state(n, form.dtype.name, form.amsgrad, seed=k)):
            if values is None:
                arrays.append(None)
                continue
            start = at + offsets(k, j) * itemsize
            placed = arena[start : start + values.nbytes].view(form.dtype)
            placed[:] = values
            arrays.append(placed)
            spans.append((start, start + values.nbytes))
            at = -(-(start + values.nbytes) // 64) * 64 + 64
        updates.append(arrays)
    return arena, updates, spans


def one_by_one(form, updates, scalars):
    expected = [[None if a is None else a.copy() for a in arrays] for arrays in updates]
    for arrays in expected:
        numba_cpu.launch(form, [on_cpu("", a) for a in arrays if a is not None], scalars)
    return expected


OFFSETS = {
    "aligned": lambda k, j: 0,
    "one offset for each update": lambda k, j: k % 4,
    "all different": lambda k, j: (k + j) % 4,
}


def assert_the_bits_of_each_alone(compiler, arch, form, scalars, on_device):
    for where, offsets in OFFSETS.items():
        arena, updates, spans = laid_out(form, sizes(form.dtype), offsets)
        expected = one_by_one(form, updates, scalars)
        gpu_code.run_table(compiler, form, arch, updates, scalars, gpu_code.memory_of([arena]), on_device)
        for k, (arrays, wanted) in enumerate(zip(updates, expected, strict=True)):
            assert_same_bits(arrays, wanted, f"{where}, array {k}")
        outside = np.ones(arena.size, bool)
        for start, end in spans:
            outside[start:end] = False
        assert (arena[outside] == 0xA5).all(), "bytes between the arrays were written"


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "scalars in memory"])
def test_every_array_gets_the_bits_that_it_gets_alone(compiler, arch, on_device):
    assert_the_bits_of_each_alone(compiler, arch, *form_and_scalars("all with l2", "float32"), on_device)


@pytest.mark.in_short()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KEY_FORMS)
def test_so_it_does_in_every_form(compiler, name, dtype):
    assert_the_bits_of_each_alone(compiler, "sm_90", *form_and_scalars(name, dtype), False)


def test_each_byte_is_loaded_and_stored_once(compiler):
    form, scalars = form_and_scalars("adam", "float32")
    ns = sizes("float32")
    arena, updates, _ = laid_out(form, ns, OFFSETS["aligned"])
    kernel = gpu_code.run_table(compiler, form, "sm_90", updates, scalars, gpu_code.memory_of([arena]))
    assert kernel.stored_bytes == 3 * 4 * sum(ns)


def test_a_wrong_table_is_noticed(compiler, monkeypatch):
    """The comparison can fail: chunks that are off by one, or a row whose first chunk is another's."""
    form, scalars = form_and_scalars("adam", "float32")
    correct = gpu_table.rows_and_owners

    def shifted(*given):
        rows, owners = correct(*given)
        rows[3:, gpu_table.FIRST_CHUNK] -= 1
        return rows, owners

    def short(*given):
        rows, owners = correct(*given)
        return rows, owners[:-1]

    for wrong in (shifted, short):
        arena, updates, _ = laid_out(form, sizes("float32"), OFFSETS["aligned"])
        expected = one_by_one(form, updates, scalars)
        monkeypatch.setattr(gpu_table, "rows_and_owners", wrong)
        with pytest.raises((AssertionError, MemoryError)):
            gpu_code.run_table(compiler, form, "sm_90", updates, scalars, gpu_code.memory_of([arena]))
            for arrays, wanted in zip(updates, expected, strict=True):
                assert_same_bits(arrays, wanted)


@pytest.mark.in_short()
@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
@pytest.mark.parametrize("name, on_device", [("adam", False), ("all with l2", True)])
def test_loads_and_stores_stay_16_bytes_of_global_memory(compiler, arch, name, on_device):
    form, _ = form_and_scalars(name, "float32")
    accesses = gpu_code.memory_accesses(gpu_code.machine_code(compiler, form, arch, loop="table", on_device=on_device))
    n_arrays = 5 if form.amsgrad else 4
    assert sum(n for op, n in accesses.items() if op.startswith("LDG.E.128")) == n_arrays, accesses
    assert sum(n for op, n in accesses.items() if op.startswith("STG.E.128")) == n_arrays - 1, accesses
    assert all(op.startswith(("LDG.E", "STG.E")) for op in accesses), accesses
    resources = gpu_code.resources(compiler, form, arch, loop="table", on_device=on_device)
    assert resources.local_bytes == 0
    # 7 blocks of 128 threads on a multiprocessor, each with 64 bytes on their way: twice what an H100's memory takes
    assert resources.registers <= 72


# The launches


SHAPES = {"a": (3, 1001), "b": (0,), "c": (5,), "d": (7000,), "e": ()}


def host_params(seed=0):
    return {name: state(int(np.prod(shape)), seed=seed)[0].reshape(shape) for name, shape in SHAPES.items()}


def assert_params(on_gpu, on_host):
    assert_same_bits([a.get() for a in on_gpu.values()], list(on_host.values()))


@pytest.mark.gpu
def test_a_list_is_one_launch(cp, backend, driver):
    opt = gpuadam.AdamW(there(cp, host_params()), lr=0.01, backend=backend)
    for k in range(3):
        grads = there(cp, host_params(k + 1))
        driver.listen()
        opt.step(grads)
        assert len(driver.launches) == 1


@pytest.mark.gpu
def test_the_table_is_sent_again_only_when_arrays_have_moved_and_into_memory_that_is_there(cp, backend, driver):
    gc.collect()  # what tests before have left, whose memory could be freed amid this one
    opt = gpuadam.Adam(there(cp, host_params()), backend=backend)
    grads, others = there(cp, host_params(1)), there(cp, host_params(2))
    memory = []
    for given, sends in ((grads, 1), (grads, 0), (others, 1), (others, 0), (grads, 1), (others, 1)):
        driver.listen()
        opt.step(given)
        assert [(source, to) for source, to, _ in driver.copies] == sends * [("host", "device")]
        cp.cuda.Device().synchronize()  # so that the device has passed the table before
        memory.append((driver.memory.pinned.used, driver.memory.devices[0].used))
    assert memory[2] == memory[-1]


@pytest.mark.gpu
def test_what_changed_between_two_steps_is_seen(cp, backend):
    on_gpu = there(cp, host_params())
    opt = gpuadam.Adam(on_gpu, backend=backend)
    grads = there(cp, host_params(1))
    opt.step(grads)
    grads["a"].shape = (1001, 3)  # the same object at the same address
    with pytest.raises(ValueError, match=r"gradient of params\['a'\] has shape"):
        opt.step(grads)
    grads["a"].shape = (3, 1001)
    grads["d"] = cp.zeros(7000, "i4")
    with pytest.raises(TypeError, match="int32"):
        opt.step(grads)


@pytest.mark.gpu
def test_a_gradient_that_becomes_one_of_another_format_is_read_as_that(cp, backend):
    on_gpu, on_host = there(cp, host_params()), host_params()
    opt, reference = gpuadam.Adam(on_gpu, backend=backend), gpuadam.Adam(on_host)
    for formats in ({}, {"d": "f8"}, {"d": "f8", "a": "f2"}, {}):
        given = {name: a.astype(formats.get(name, "f4")) for name, a in host_params(1).items()}
        opt.step(there(cp, given))
        reference.step(given)
        assert_params(on_gpu, on_host)


@pytest.mark.gpu
def test_one_bad_array_stops_all(cp, backend):
    on_gpu = there(cp, host_params())
    opt = gpuadam.Adam(on_gpu, backend=backend)
    with pytest.raises(ValueError, match="nothing is broadcast"):
        opt.step(there(cp, host_params(1)) | {"c": cp.zeros(4, "f4")})
    assert opt.state["a"]["step"] == 0
    assert_params(on_gpu, host_params())


@pytest.mark.gpu
def test_strided_arrays_go_beside_the_others(cp, backend):
    wholes = [np.arange(60, dtype="f4").reshape(6, 10), np.arange(9, dtype="f4")]
    on_gpu, on_host = [cp.asarray(whole) for whole in wholes], wholes
    for arrays, name in ((on_gpu, backend), (on_host, "numba-cpu")):
        ones = [arrays[1] * 0 + 1, arrays[0][:, :5] * 0 + 1]
        gpuadam.Adam([arrays[1], arrays[0][:, ::2]], backend=name).step(ones)
    assert_same_bits([whole.get() for whole in on_gpu], on_host)
    assert (on_host[0][:, 1::2] == np.arange(60).reshape(6, 10)[:, 1::2]).all()


@pytest.mark.gpu
def test_a_step_goes_to_the_stream_that_is_given_or_else_current(cp, backend, driver):
    given, current = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    opt = gpuadam.Adam(there(cp, host_params()), backend=backend)
    grads = there(cp, host_params(1))
    cp.cuda.Device().synchronize()
    driver.listen()
    opt.step(grads, stream=given)
    with current:
        opt.step(grads)
        opt.step(grads, stream=given)
    assert [handle for _, handle in driver.launches] == [given.ptr, current.ptr, given.ptr]
    assert len(driver.copies) == 1
    cp.cuda.Device().synchronize()  # only then may the arrays end


@pytest.mark.gpu
def test_a_copy_of_an_optimizer_goes_on_by_itself(cp):
    """Of the backend cupy: the state of the other is in Numba's arrays, which copy.deepcopy refuses."""
    on_gpu, on_host = there(cp, host_params()), host_params()
    optimizers = [gpuadam.Adam(on_gpu, backend="cupy")], [gpuadam.Adam(on_host)]
    for here, (opt,) in enumerate(optimizers):
        opt.step(host_params(1) if here else there(cp, host_params(1)))
        optimizers[here].append(copy.deepcopy(opt))
    for which, seed in ((1, 2), (0, 3), (1, 4)):
        optimizers[0][which].step(there(cp, host_params(seed)))
        optimizers[1][which].step(host_params(seed))
    for opt, reference in zip(*optimizers, strict=True):
        assert_same_bits([a.get() for a in opt.groups[0]["params"]], reference.groups[0]["params"])


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{"capturable": True}, {}], ids=["capturable", "clipped"])
def test_a_copy_of_an_optimizer_computes_its_scalars_in_memory_of_its_own(cp, how):
    """Of the backend cupy, as above. Both steps are enqueued before either has run."""
    clips = {} if how else {"max_norm": 1e3}
    opt = gpuadam.Adam(cp.ones(3, "f4"), lr=0.1, **how)
    opt.step(cp.ones(3, "f4"), **clips)
    other = copy.deepcopy(opt)
    other.groups[0]["lr"] = 0.001
    streams_of = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    cp.cuda.Device().synchronize()
    for stream, one in zip(streams_of, (opt, other), strict=True):
        with stream:
            one.step(cp.ones(3, "f4"), **clips)
    cp.cuda.Device().synchronize()
    for one, lr in ((opt, 0.1), (other, 0.001)):
        expected = np.full(3, 1.0 - 0.1 - lr, "f4")
        np.testing.assert_allclose(one.groups[0]["params"][0].get(), expected, rtol=1e-6)


class TorchStream:
    cuda_stream = 77


class CupyStream:
    def __cuda_stream__(self):
        return (0, 88)


def test_streams_of_every_library_are_taken():
    assert [streams.handle(s) for s in (None, 0, 1, 99, TorchStream(), CupyStream())] == [None, 1, 1, 99, 77, 88]
    for wrong in ("7", 1.0, True, object()):
        with pytest.raises(TypeError, match="must be a CuPy, Numba or torch stream"):
            streams.handle(wrong)
