"""What only a GPU can show. `benchmarks/gpu.sh` runs these, and every other test over the GPU backends, where there is one."""

import contextlib

import numpy as np
import pytest
from cases import FORMS, assert_same_bits, different_bits, wide_state
from gpu_work import Lent, OnStream, there

import gpuadam
from gpuadam import backends
from gpuadam.cli import contract, doctor
from gpuadam.cli.measuring import constants
from gpuadam.kernels import gpu_launch

pytestmark = pytest.mark.gpu


def on_gpu(cp, arrays):
    return [None if a is None else cp.asarray(a) for a in arrays]


@pytest.mark.parametrize("name", contract.CONTRACTS)
def test_doctor_finds_the_contracts_bits(backend, name):
    known = contract.CONTRACTS[name]
    assert contract.digest_on(backend, known) == known.bits


def test_doctor_says_that_the_driver_repeats_launches_or_that_it_does_not(backend, monkeypatch):
    assert doctor._launches(backend) == doctor.BY_DRIVER
    monkeypatch.setattr(gpu_launch, "recorded", lambda *arguments: None)
    assert doctor._launches(backend) == doctor.BY_LIBRARY


def test_a_backend_says_how_much_memory_its_gpu_has(cp, backend):
    free, total = constants.memory(backend)
    assert 0 < free <= total and (type(free), type(total)) == (int, int)
    assert backends.load(backend).memory_info()[1] == total == cp.cuda.Device().mem_info[1]


@pytest.mark.parametrize("name", FORMS)
def test_both_backends_hold_cupy_arrays_and_agree(cp, name):
    options = dict(FORMS[name])
    given = wide_state(1_000_003, "float32", options.pop("amsgrad", False))
    first = options.pop("step", 1)
    results = {}
    for backend in ("cupy", "numba-cuda"):
        arrays = on_gpu(cp, given)
        for step in (first, first + 1, first + 2):
            gpuadam.adam_step(*arrays[:4], step, max_v=arrays[4], backend=backend, **options)
        cp.cuda.Device().synchronize()
        results[backend] = [None if a is None else a.get() for a in arrays]
    assert_same_bits(results["numba-cuda"], results["cupy"])


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_views(cp, backend, offset):
    given = wide_state(1003)
    expected = [a.copy() for a in given[:4]]
    gpuadam.adam_step(*expected, 1)
    for offsets in ((offset,) * 4, (offset, 0, 1, 2)):
        wholes = [cp.full(1003 + 8, 7, "f4") for _ in range(4)]
        arrays = [whole[o : o + 1003] for whole, o in zip(wholes, offsets, strict=True)]
        for a, values in zip(arrays, given, strict=False):
            a[:] = cp.asarray(values)
        gpuadam.adam_step(*arrays, 1, backend=backend)
        cp.cuda.Device().synchronize()
        assert_same_bits([a.get() for a in arrays], expected, f"offsets {offsets}")
        for whole, o in zip(wholes, offsets, strict=True):
            assert (whole[:o] == 7).all() and (whole[o + 1003 :] == 7).all()


def needs_bytes(cp, n):
    free, _ = cp.cuda.Device().mem_info
    if free < n:
        pytest.skip(f"needs {n / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


@pytest.mark.real_gpu("arrays of 2 to 32 GiB, executed on the host, would take hours")
@pytest.mark.parametrize(
    "n, format", [*((n, "float32") for n in (2**29 - 1, 2**29 + 1, 2**31 - 1, 2**31 + 5)), (2**31 + 5, "bfloat16")]
)
def test_beyond_2_31_bytes_and_elements(cp, backend, n, format):
    """Every element is updated, and the last ones have the CPU's bits; CuPy changes its index type at 2**31 bytes.

    format: of parameters and gradients.
    """
    needs_bytes(cp, 4 * 4 * n + 2**30)
    pattern = list(wide_state(4099, "float32", seed=3)[:4])
    for a in pattern:
        a[~np.isfinite(a)] = 1.0
    if format == "bfloat16":
        pattern[:2] = [(a.view("u4") >> 16).astype("u2") for a in pattern[:2]]

    def given(arrays):
        narrow = [gpuadam.Bits(a, format) for a in arrays[:2]] if format == "bfloat16" else arrays[:2]
        return [*narrow, *arrays[2:]]

    arrays = []
    for a in pattern:
        there = cp.empty(n, a.dtype)
        block = cp.asarray(a)
        whole = n // 4099 * 4099
        there[:whole].reshape(-1, 4099)[...] = block
        there[whole:] = block[: n - whole]
        arrays.append(there)
    gpuadam.adam_step(*given(arrays), 1, backend=backend)
    cp.cuda.Device().synchronize()
    expected = [a.copy() for a in pattern]
    gpuadam.adam_step(*given(expected), 1)
    try:
        for there, e in zip(arrays, expected, strict=True):
            bits = f"u{e.itemsize}"
            rows = there[: n // 4099 * 4099].reshape(-1, 4099).view(bits)
            known = ~np.isnan(e) if e.dtype.kind == "f" else e & 0x7FFF <= 0x7F80
            assert known.mean() > 0.99
            wanted, known = cp.asarray(e).view(bits), cp.asarray(known)
            for start in range(0, len(rows), 1 << 16):
                assert bool(((rows[start : start + (1 << 16)] == wanted) | ~known).all())
            tail = there[n // 4099 * 4099 :].get()
            assert different_bits(tail, e[: len(tail)]) == 0
    finally:
        arrays.clear()
        there = rows = None
        cp.get_default_memory_pool().free_all_blocks()


def test_work_is_ordered_on_the_current_stream(cp, backend):
    """The gradient is made on a non-blocking stream behind a long kernel; the step must wait for it."""
    n = 1 << 24
    spin = cp.RawKernel(
        r'extern "C" __global__ void spin(long long cycles) { long long t = clock64(); while (clock64() - t < cycles); }',
        "spin",
    )
    param, m, v = (cp.zeros(n, "f4") for _ in range(3))
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        grad = cp.zeros(n, "f4")
        spin((1,), (1,), (np.int64(200_000_000),))
        grad += 1
        gpuadam.adam_step(param, grad, m, v, 1, lr=0.5, backend=backend)
        param *= 2
        stream.synchronize()
    assert bool(cp.allclose(param, -1.0))


def test_a_numba_device_array_and_a_cupy_array_that_shares_it(cp):
    from numba import cuda

    given = wide_state(1003)[:4]
    expected = [a.copy() for a in given]
    gpuadam.adam_step(*expected, 1)
    arrays = [cuda.to_device(a) for a in given]
    gpuadam.adam_step(*arrays, 1)
    cuda.synchronize()
    assert_same_bits([cp.asarray(a).get() for a in arrays], expected)
    with pytest.raises(TypeError, match="one library"):
        gpuadam.adam_step(cp.asarray(arrays[0]), *arrays[1:], 2)


def test_torch_cuda_tensors(cuda_torch, backend):
    torch = cuda_torch
    given = wide_state(1003)[:4]
    expected = [a.copy() for a in given]
    gpuadam.adam_step(*expected, 1)
    arrays = [torch.from_numpy(a).cuda() for a in given]
    gpuadam.adam_step(*arrays, 1, backend=backend)
    torch.cuda.synchronize()
    assert_same_bits([a.cpu().numpy() for a in arrays], expected)
    gpuadam.adam_step(*expected, 2)
    gpuadam.adam_step(torch.nn.Parameter(arrays[0]), *arrays[1:], 2, backend=backend)
    torch.cuda.synchronize()
    assert_same_bits([a.cpu().numpy() for a in arrays], expected)


def test_torchs_current_stream_is_heeded(cp, cuda_torch, backend):
    """The gradient is still being made on torch's stream when the step is asked for, and the result is used there at once."""
    torch = cuda_torch
    n = 1 << 24
    param, m, v = (torch.zeros(n, device="cuda") for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(200_000_000)
        grad = torch.ones(n, device="cuda")
        gpuadam.adam_step(param, grad, m, v, 1, lr=0.5, backend=backend)
        del grad
        result = param * 2
        torch.cuda.current_stream().synchronize()
    assert bool((result == -1.0).all())


def test_a_broadcast_numba_array_is_read_as_such_and_not_written():
    """Its interface calls it contiguous, and it has the memory of one element."""
    from numba import cuda

    broadcast = cuda.to_device(np.broadcast_to(np.float32(2), (1000,)))
    arrays = [cuda.to_device(np.full(1000, x, "f4")) for x in (1, 0, 0)]
    gpuadam.adam_step(arrays[0], broadcast, *arrays[1:], 1, lr=0.5, eps=0.0)
    assert (arrays[0].copy_to_host() == 0.5).all()
    if broadcast.strides == (0,):
        with pytest.raises(ValueError, match=r"m has shape .* share memory"):
            gpuadam.adam_step(arrays[0], arrays[1], broadcast, arrays[2], 1)


@pytest.mark.parametrize("kind", ["managed_array", "mapped_array"])
def test_numbas_arrays_of_host_and_gpu_are_refused_until_it_is_said_where_they_are_updated(kind):
    from numba import cuda

    given = wide_state(1003)[:4]
    expected = [a.copy() for a in given]
    gpuadam.adam_step(*expected, 1)
    arrays = [getattr(cuda, kind)(1003, "f4") for _ in given]
    for a, values in zip(arrays, given, strict=True):
        np.asarray(a)[:] = values
    device_arrays = [cuda.as_cuda_array(a) for a in arrays]
    for k in range(4):
        for one in (arrays[k], arrays[k][:], arrays[k] * 1):  # of the last two Numba does not know where they are
            for others in (given, device_arrays):
                with pytest.raises(
                    TypeError, match=r"NDArray, whose memory .* numba.cuda.as_cuda_array\(x\) .* np.asarray\(x\)"
                ):
                    gpuadam.adam_step(*others[:k], one, *others[k + 1 :], 1)
    assert_same_bits([np.asarray(a) for a in arrays], given)
    gpuadam.adam_step(*device_arrays, 1)
    cuda.synchronize()
    assert_same_bits([np.asarray(a) for a in arrays], expected)
    gpuadam.adam_step(*map(np.asarray, arrays), 2)
    gpuadam.adam_step(*expected, 2)
    assert_same_bits([np.asarray(a) for a in arrays], expected)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_arrays_of_every_library(cp, backend, shape):
    from numba import cuda

    for make in (cp.zeros, lambda s, t: cuda.to_device(np.zeros(s, t))):
        opt = gpuadam.Adam([make(shape, "f4")], backend=backend)
        opt.step([make(shape, "f4")])
        opt.load_state_dict(opt.state_dict())


def test_state_is_loaded_on_the_device(cp, backend):
    params = [cp.ones((3, 5), "f4"), cp.ones((6, 4), "f4").T, cp.ones(20, "f4")[1::2]]
    grads = [cp.full(p.shape, 0.5, "f4") for p in params]
    opt = gpuadam.Adam(params, amsgrad=True, backend=backend)
    opt.step(grads)
    other_params = [p.copy(order="K") for p in params]
    other_params[2] = cp.ones(20, "f4")[1::2]
    other_params[2][...] = params[2]
    other = gpuadam.Adam(other_params, amsgrad=True, backend=backend)
    other.load_state_dict(opt.state_dict())
    opt.step(grads)
    other.step(grads)
    cp.cuda.Device().synchronize()
    for a, b in zip(params, other_params, strict=True):
        assert different_bits(a.get(), b.get()) == 0


def test_nothing_is_copied_between_the_devices(cp):
    a = [np.ones(4, "f4") for _ in range(4)]
    with pytest.raises(TypeError, match="one library"):
        gpuadam.adam_step(cp.asarray(a[0]), *a[1:], 1)
    with pytest.raises(TypeError, match="CPU memory"):
        gpuadam.adam_step(*on_gpu(cp, a), 1, backend="numba-cpu")


def test_a_step_takes_no_device_memory_beyond_its_arrays(cp, backend):
    arrays = on_gpu(cp, wide_state(1 << 20)[:4])
    gpuadam.adam_step(*arrays, 1, backend=backend)
    cp.cuda.Device().synchronize()
    free, _ = cp.cuda.Device().mem_info
    gpuadam.adam_step(*arrays, 2, backend=backend)
    cp.cuda.Device().synchronize()
    now, _ = cp.cuda.Device().mem_info
    assert free - now <= 2 << 20 < arrays[0].nbytes  # the driver may take a page of its own for a stream


def test_two_devices_are_refused_and_another_device_than_the_current_one_works(cp, backend):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    a = wide_state(1003)[:4]
    with cp.cuda.Device(1):
        there = on_gpu(cp, a)
    here = on_gpu(cp, a)
    with pytest.raises(ValueError, match="device"):
        gpuadam.adam_step(here[0], *there[1:], 1, backend=backend)
    gpuadam.adam_step(*there, 1, backend=backend)
    gpuadam.adam_step(*here, 1, backend=backend)
    assert_same_bits([x.get() for x in there], [x.get() for x in here])


# Many arrays, streams and captured graphs

SHAPES = {"w": (129, 1003), "empty": (0,), "b": (5,), "scalar": (), "large": (1 << 20,), "odd": (4097,)}


def host_params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}


def assert_params(on_gpu, on_host, context=""):
    for name, a in on_gpu.items():
        assert_same_bits([a.get()], [on_host[name]], f"{name} {context}")


def spin(cp, cycles):
    kernel = cp.RawKernel(
        r'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }', "spin"
    )
    kernel((1,), (1,), (np.int64(cycles),))


def test_many_arrays_in_one_launch_have_the_cpus_bits(cp, backend):
    on_gpu, on_host = there(cp, host_params()), host_params()
    opt = gpuadam.AdamW(on_gpu, lr=0.01, amsgrad=True, backend=backend)
    reference = gpuadam.AdamW(on_host, lr=0.01, amsgrad=True)
    for k in range(5):
        opt.step(there(cp, host_params(k + 1)))
        reference.step(host_params(k + 1))
    assert_params(on_gpu, on_host)


def test_many_unaligned_arrays(cp, backend):
    wholes = [cp.full(5003 + 8, 7, "f4") for _ in range(4)]
    views = [whole[k : k + 5000 + k] for k, whole in enumerate(wholes)]
    given = [np.random.default_rng(k).standard_normal(view.size).astype("f4") for k, view in enumerate(views)]
    for view, a in zip(views, given, strict=True):
        view[:] = cp.asarray(a)
    grads = [np.random.default_rng(9 + k).standard_normal(view.size).astype("f4") for k, view in enumerate(views)]
    opt, reference = gpuadam.Adam(views, backend=backend), gpuadam.Adam(given)
    opt.step([cp.asarray(g) for g in grads])
    reference.step(grads)
    assert_same_bits([view.get() for view in views], given)
    for k, whole in enumerate(wholes):
        assert (whole[:k] == 7).all() and (whole[5000 + 2 * k :] == 7).all()


def test_tables_of_moving_gradients_do_not_overtake_one_another(cp, backend):
    """The device is busy, so that many steps are enqueued before the first runs, each with gradients somewhere else."""
    on_gpu, on_host = there(cp, host_params()), host_params()
    opt, reference = gpuadam.Adam(on_gpu, backend=backend), gpuadam.Adam(on_host)
    grads = [there(cp, host_params(k + 1)) for k in range(8)]
    opt.step(grads[0])
    cp.cuda.Device().synchronize()
    spin(cp, 300_000_000)
    event = cp.cuda.Event()
    for k in range(1, 8):
        opt.step(grads[k])
    event.record()
    assert not event.done  # nothing waited for the device
    for k in range(8):
        reference.step(host_params(k + 1))
    assert_params(on_gpu, on_host)


def test_a_given_stream_is_used_and_ordered(cp, backend):
    on_gpu, on_host = there(cp, host_params()), host_params()
    opt, reference = gpuadam.Adam(on_gpu, backend=backend), gpuadam.Adam(on_host)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    for k in range(3):
        with stream:
            spin(cp, 20_000_000)
            grads = there(cp, host_params(k + 1))
        opt.step(grads, stream=stream)
        reference.step(host_params(k + 1))
    stream.synchronize()
    assert_params(on_gpu, on_host)


@pytest.mark.parametrize("many", [False, True], ids=["one array", "many arrays"])
def test_a_captured_graph_replays_with_the_current_values(cp, backend, many):
    names = SHAPES if many else ["w"]
    on_gpu = {name: a for name, a in there(cp, host_params()).items() if name in names}
    on_host = {name: a for name, a in host_params().items() if name in names}
    grads = {name: cp.zeros_like(a) for name, a in on_gpu.items()}
    lr, scale = cp.full(1, 0.1), cp.full(1, 2.0, "f4")
    opt = gpuadam.AdamW(on_gpu, lr=lr, amsgrad=True, capturable=True, backend=backend)
    reference = gpuadam.AdamW(on_host, amsgrad=True)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()

    def set_values(k):
        for name, grad in grads.items():
            grad[...] = cp.asarray(host_params(k + 1)[name])
        lr.fill(0.1 / (k + 1))

    def host_step(k):
        reference.groups[0]["lr"] = 0.1 / (k + 1)
        reference.step({name: a for name, a in host_params(k + 1).items() if name in names}, grad_scale=2.0)

    with stream:
        set_values(0)
        opt.step(grads, grad_scale=scale)  # compiles
        host_step(0)
        stream.begin_capture()
        opt.step(grads, grad_scale=scale)
        graph = stream.end_capture()
        for k in range(1, 6):
            set_values(k)
            graph.launch(stream)
            host_step(k)
        stream.synchronize()
    assert opt.state_dict()["state"]["w"]["step"] == 6
    assert_params(on_gpu, on_host)


def test_capturing_what_would_be_frozen_is_refused(cp, backend):
    arrays = there(cp, host_params())
    opt = gpuadam.Adam(arrays, lr=0.1, backend=backend)
    grads = there(cp, host_params(1))
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        opt.step(grads)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="capturable=True"):
                opt.step(grads)
        finally:
            stream.end_capture()
    assert opt.state["w"]["step"] == 1
    stream.synchronize()


@pytest.mark.parametrize("asked", [False, True], ids=["the current one", "a given one"])
@pytest.mark.parametrize("call", ["Adam", "capturable", "adam_step", "global_norm"])
def test_work_of_another_stream_is_not_captured_with_what_the_arrays_name(cp, backend, call, asked):
    """It would wait for the stream that is captured, and so become a part of its graph, which nobody has asked for."""
    captured, other = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    arrays = [OnStream(cp.full(1000, value, "f4"), captured) for value in (1.0, 0.5, 0.0, 0.0)]
    param, grad, m, v = arrays
    out = cp.zeros(())
    opt = gpuadam.Adam(param, lr=0.1, capturable=call == "capturable", backend=backend)
    stream = {"stream": other} if asked else {}
    act = {
        "adam_step": lambda step: gpuadam.adam_step(param, grad, m, v, step, lr=0.1, backend=backend, **stream),
        "global_norm": lambda step: gpuadam.global_norm([grad], out=out, backend=backend, **stream),
    }.get(call, lambda step: opt.step(grad, **stream))
    cp.cuda.Device().synchronize()
    with captured if asked else other:
        act(1)
        cp.cuda.Device().synchronize()
        before = param.array.get()
        captured.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="a graph is being captured on a stream that arrays were last used on"):
                act(2)
        finally:
            captured.end_capture()
        assert opt.steps == (0 if call in ("adam_step", "global_norm") else 1)
        assert (param.array.get() == before).all()
        act(2)
        cp.cuda.Device().synchronize()
    assert call == "global_norm" or (param.array.get() != before).all()


def test_the_stream_that_a_program_has_chosen_stays_the_current_one_and_takes_the_work(cp, backend):
    """By `use`, which CuPy forgets at the end of any `with` of a stream."""
    kernels = backends.load(backend)
    for known in (kernels._rehearsed, kernels._launched):  # so that kernels are launched on a stream of ours first
        known.clear()
    host, reference = host_params(), host_params()
    chosen, others = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    params = there(cp, host)
    opt, on_host = gpuadam.Adam(params, backend=backend), gpuadam.Adam(reference)
    cp.cuda.Device().synchronize()
    try:
        for within in (contextlib.nullcontext(), others):
            with within:
                chosen.use()
                for k in range(3):
                    spin(cp, 20_000_000)  # what comes after it on another stream would be done before it
                    grads = there(cp, host_params(k + 1))
                    norm = gpuadam.global_norm(grads, backend=backend)
                    opt.step(grads)
                    on_host.step(host_params(k + 1))
                    assert cp.cuda.get_current_stream() == chosen
                    assert cp.asarray(norm).get() == gpuadam.global_norm(host_params(k + 1))
        chosen.synchronize()
    finally:
        cp.cuda.Stream.null.use()
    assert_params(params, reference)


def test_a_hundred_steps_take_no_more_memory(cp, backend):
    arrays, grads = there(cp, host_params()), there(cp, host_params(1))
    opt = gpuadam.Adam(arrays, backend=backend)
    for _ in range(5):
        opt.step(grads)
    cp.cuda.Device().synchronize()
    before = cp.cuda.Device().mem_info[0]
    for _ in range(100):
        opt.step(grads)
    cp.cuda.Device().synchronize()
    assert before - cp.cuda.Device().mem_info[0] <= 1 << 20


def test_numba_arrays_in_a_list(cp):
    from numba import cuda

    on_gpu = {name: cuda.to_device(a) for name, a in host_params().items() if a.ndim}
    on_host = {name: a for name, a in host_params().items() if a.ndim}
    opt, reference = gpuadam.Adam(on_gpu), gpuadam.Adam(on_host)
    for k in range(3):
        grads = {name: a for name, a in host_params(k + 1).items() if a.ndim}
        opt.step({name: cuda.to_device(a) for name, a in grads.items()})
        reference.step(grads)
    cuda.synchronize()
    for name, a in on_gpu.items():
        assert_same_bits([a.copy_to_host()], [on_host[name]], name)


def test_a_flat_buffer_and_its_views(cp):
    given = there(cp, host_params())
    flat = gpuadam.flatten(given)
    reference = host_params()
    opt, host = gpuadam.Adam(flat.param), gpuadam.Adam(reference)
    for name, grad in there(cp, host_params(1)).items():
        flat.grads[name][...] = grad
    opt.step(flat.grad)
    host.step(host_params(1))
    assert_params(flat.params, reference)


def test_arrays_that_only_have_dlpack(cp):
    given = wide_state(1003)[:4]
    expected = [a.copy() for a in given]
    gpuadam.adam_step(*expected, 1)
    arrays = on_gpu(cp, given)
    gpuadam.adam_step(*map(Lent, arrays), 1)
    assert_same_bits([a.get() for a in arrays], expected)
