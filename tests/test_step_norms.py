"""`step(norms=True)`: the norms of the change and of the parameters, with the same bits on every backend."""

import gc
import itertools
import operator
import weakref

import ml_dtypes
import numpy as np
import pytest
from cases import few, form_and_scalars
from gpu_work import busy_stream

import gpuadam
from gpuadam import global_norm, testing
from gpuadam.kernels import change_cpu, change_sums, cpu_threads
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.layout import Update
from gpuadam.kernels.operands import Arrays, operands_of_form
from gpuadam.kernels.view import on_cpu

SHAPES = {"w": (70, 130), "empty": (0, 3), "b": (5,), "f": (33, 9), "s": (8, 9, 10), "scalar": ()}
CLASSES = few(("Adam", "AdamW", "NAdam", "RAdam", "AdaMax"), "AdamW")


def random(seed, shape, dtype="float32"):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def params_of(dtype="float32", in_c_order=False):
    """Return arrays of many shapes: without gaps in C order and in F order, and with gaps."""
    params = {name: random(k, shape, dtype) for k, (name, shape) in enumerate(SHAPES.items())}
    if not in_c_order:
        params["f"] = np.asfortranarray(params["f"])
        params["s"] = np.repeat(params["s"], 2, axis=1)[:, ::2, ::-1]
    return params


def grads_of(k, dtype="float32"):
    return {name: random(100 * k + n, shape, dtype) for n, (name, shape) in enumerate(SHAPES.items())}


def differences(before, after):
    """Return what was added to NumPy arrays, in float64, as a norm takes them."""
    return [np.asarray(np.asarray(after[name], "f8") - np.asarray(before[name], "f8")) for name in before]


def copies_of(params):
    return {name: np.array(param) for name, param in params.items()}


def bits(norm):
    return np.asarray(norm, "f8").tobytes()


# What they are


def test_a_loop_stops_where_one_in_numpy_does():
    """The loop of a program with an AdamW of its own, in float64."""
    x = random(0, (40, 30)).astype("f8")
    start, m, v, t = x.astype("f4"), 0 * x, 0 * x, 0
    while True:
        t, g, old = t + 1, x - 1, x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 0.05 * (0.01 * x + (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
        if np.linalg.norm(x - old) < 1e-2 * np.linalg.norm(x):
            break
    opt = gpuadam.AdamW(start, lr=0.05)
    while True:
        change, param = opt.step(start - 1, norms=True)
        if change < 1e-2 * param:
            break
    assert (opt.steps, t > 10) == (t, True)
    np.testing.assert_allclose([change, param], [np.linalg.norm(x - old), np.linalg.norm(x)], rtol=1e-5)


@pytest.mark.parametrize("dtype", few(["float32", "float64"], "float32"))
@pytest.mark.parametrize("cls", CLASSES)
def test_they_are_the_global_norms_of_what_was_added_and_of_the_parameters(cls, dtype):
    params = params_of(dtype)
    opt = getattr(gpuadam, cls)(params, lr=0.1, weight_decay=0.01)
    for k in range(3):
        before = copies_of(params)
        norms = opt.step(grads_of(k, dtype), norms=True)
        assert [(type(x), x.shape, x.dtype) for x in norms] == [(np.ndarray, (), np.float64)] * 2
        assert bits(norms.change) == bits(global_norm(differences(before, params)))
        assert bits(norms.param) == bits(global_norm(params))


OPTIONS = {
    "8-bit state": ({"state_dtype": "8bit"}, {}),
    "a part, and rates": ({"state_dtype": "bfloat16"}, {"where": True, "lr_scale": True}),
    "max_norm": ({}, {"max_norm": 0.3, "grad_scale": 0.5}),
    "nonzero": ({"ema_decay": 0.9, "zero_grad": True, "param_copies": "f2"}, {"where": "nonzero"}),
    "clipped and bounded": ({"clip_value": 0.5, "bounds": (-0.5, 1.0)}, {}),
    "AMSGrad of another formula": ({"amsgrad": True, "formula": "optax", "eps_root": 1e-6, "maximize": True}, {}),
}


@pytest.mark.parametrize("name", few(OPTIONS, "max_norm"))
def test_every_option_of_a_step_is_in_them(name):
    options, of_step = OPTIONS[name]
    params = params_of(in_c_order=options.get("state_dtype") == "8bit")
    if "param_copies" in options:
        options = options | {"param_copies": {key: param.astype("f2") for key, param in params.items()}}
    opt = gpuadam.AdamW(params, lr=0.1, **options)
    for k in range(2):
        given = dict(of_step)
        if given.get("where") is True:
            given["where"] = {key: np.asarray(random(k, param.shape) > 0) for key, param in params.items()}
        if "lr_scale" in given:
            given["lr_scale"] = {key: np.asarray(np.abs(random(k, param.shape[:1]))) for key, param in params.items()}
        before, grads = copies_of(params), grads_of(k)
        grads["w"][::2] = 0
        norms = opt.step(grads, norms=True, **given)
        assert bits(norms.change) == bits(global_norm(differences(before, params)))
        assert bits(norms.param) == bits(global_norm(params))


def test_groups_and_parameters_that_are_skipped_keep_their_places():
    params = params_of()
    groups = [{"params": {key: params[key]}, "lr": 0.1 / (k + 1)} for k, key in enumerate(params)]
    opt = gpuadam.AdamW(groups, weight_decay=0.1)
    for skipped in ((), ("w",), ("b", "s"), tuple(params)):
        before = copies_of(params)
        norms = opt.step({key: None if key in skipped else grad for key, grad in grads_of(1).items()}, norms=True)
        assert bits(norms.change) == bits(global_norm(differences(before, params)))
        assert bits(norms.param) == bits(global_norm(params))


def test_norms_change_nothing_of_the_step():
    ours, other = params_of(), params_of()
    opts = [gpuadam.AdamW(params, lr=0.1) for params in (ours, other)]
    for k in range(2):
        assert opts[0].step(grads_of(k), norms=True)
        assert opts[1].step(grads_of(k)) is None
    for name in SHAPES:
        arrays = [[opt.groups[0]["params"][[*SHAPES].index(name)], *opt.state[name].values()] for opt in opts]
        assert [np.array(x).tobytes() for x in arrays[0]] == [np.array(x).tobytes() for x in arrays[1]]


def test_the_gradients_of_a_step_go_when_it_ends(monkeypatch):
    gc.collect()
    monkeypatch.setattr(gpuadam.Adam, "repeats", False)
    opt, held = gpuadam.Adam(random(1, 5)), []
    gc.disable()
    try:
        for k in range(3):
            grad = random(k, 5)
            held.append(weakref.ref(grad))
            opt.step(grad, norms=True)
        del grad
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


# The change is that of the numbers which are computed with


@pytest.mark.exhaustive
@pytest.mark.parametrize("option", ["", "master", "stochastic_rounding"])
def test_the_change_of_a_narrow_parameter_is_not_rounded(option):
    options = {"": {}, "master": {"master": "remainder"}}.get(option, {option: True})
    exact = random(1, 5000).astype(ml_dtypes.bfloat16)
    narrow, wide = exact.copy(), exact.astype("f4")
    norms = gpuadam.AdamW(narrow, lr=1e-3, **options).step(random(2, 5000), norms=True)
    expected = gpuadam.AdamW(wide, lr=1e-3).step(random(2, 5000), norms=True)
    assert bits(norms.change) == bits(expected.change)
    assert bits(norms.param) == bits(global_norm(narrow))  # of the array as it is stored


@pytest.mark.exhaustive
def test_with_change_it_is_the_norm_of_the_change():
    params = params_of()
    before, changes = copies_of(params), {key: np.zeros(param.shape, "f4") for key, param in params.items()}
    norms = gpuadam.AdamW(params, lr=0.1).step(grads_of(1), change=changes, norms=True)
    assert bits(norms.change) == bits(global_norm(changes))
    assert bits(norms.param) == bits(global_norm(before))


def test_what_is_not_finite_shows():
    param = random(1, 5000)
    opt, grad = gpuadam.AdamW(param), random(2, 5000)
    grad[4500] = np.nan
    norms = opt.step(grad, norms=True)
    assert np.isnan(norms.change) and np.isnan(norms.param)


@pytest.mark.parametrize("condition", [{"found_inf": 1.0}, {"check_finite": True}])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_that_is_left_out_changes_nothing(library, condition, capturable):
    params = {name: library.array(param) for name, param in params_of().items()}
    opt = gpuadam.AdamW(params, lr=0.1, capturable=library.on_gpu, backend=library.name)
    grads = {name: library.array(grad) for name, grad in grads_of(1).items()}
    opt.step(grads, norms=True)
    grads["w"] = library.array(np.full(SHAPES["w"], np.nan, "f4"))
    if "found_inf" in condition and library.on_gpu and capturable:
        condition = {"found_inf": library.flag(1.0)}
    norms = opt.step(grads, norms=True, **condition)
    expected = global_norm([library.numpy(param) for param in params.values()])
    assert library.numpy(norms.change) == 0
    assert bits(library.numpy(norms.param)) == bits(expected)


# The same bits everywhere


@pytest.mark.parametrize("safe", [True, False], ids=["numba's threads", "our own"])
def test_every_number_of_threads_gives_the_bits_of_one(monkeypatch, safe):
    safe = safe and cpu_threads.numba_threads_are_safe()
    monkeypatch.setattr(cpu_threads, "numba_threads_are_safe", lambda: safe)
    found = set()
    for n_threads in (1, 2, 3):
        monkeypatch.setattr(cpu_threads, "n_threads", lambda n=n_threads: n)
        params = {"a": random(1, 70_000), "b": random(2, 5), "c": random(3, 30_001)}
        norms = gpuadam.AdamW(params, lr=0.1).step({key: random(9, x.shape) for key, x in params.items()}, norms=True)
        found.add((bits(norms.change), bits(norms.param)))
    assert len(found) == 1


def test_unaligned_arrays_have_the_bits_of_aligned_ones():
    expected = None
    for offset in (0, 4, 5):
        arrays = []
        for k in range(2):
            memory = np.zeros(20_064, "u1")
            array = memory[-memory.ctypes.data % 64 + offset :][: 4 * 4999].view("f4")
            array[...] = random(k, 4999)
            arrays.append(array)
        norms = gpuadam.AdamW(arrays[0], lr=0.1).step(arrays[1], norms=True)
        expected = expected or norms
        assert list(map(bits, norms)) == list(map(bits, expected))


# Which arrays they are in


def test_norms_are_new_arrays_but_with_capturable_always_the_same():
    for capturable in (False, True):
        param = random(1, 100)
        opt = gpuadam.AdamW(param, capturable=capturable)
        first, second = (opt.step(random(k, 100), norms=True) for k in range(2))
        assert (first.change is second.change, first.param is second.param) == (capturable, capturable)


def test_arrays_that_grow_have_their_norms():
    opt = gpuadam.AdamW({"w": random(1, (10, 3))}, lr=0.1, capturable=True)
    opt.step({"w": random(2, (10, 3))}, norms=True)
    param = random(3, (5000, 3))
    before = param.copy()
    opt.replace("w", param, np.arange(5000) % 10)
    norms = opt.step({"w": random(4, (5000, 3))}, norms=True)
    assert bits(norms.change) == bits(global_norm(param.astype("f8") - before))


# What does not go


def test_what_is_wrong_is_said_before_anything_is_written():
    param, before = random(1, 10), random(1, 10)
    opt = gpuadam.AdamW(param)
    with pytest.raises(TypeError, match="norms"):
        opt.step(random(2, 10), norms=1)
    with pytest.raises(ValueError, match="shape"):
        opt.step(random(2, 11), norms=True)
    assert param.tobytes() == before.tobytes()


def test_optimizers_that_go_piece_by_piece_refuse_norms():
    opt, param = gpuadam.OffloadAdam(random(1, 10), update="host"), random(1, 10)
    with pytest.raises(ValueError, match="OffloadAdam takes no norms"):
        opt.step(param, norms=True)
    with pytest.raises(TypeError, match="norms"):
        gpuadam.ShardedAdam({"a": param}, gpuadam.transports.Local()).step({"a": param}, norms=True)


@pytest.mark.gpu
def test_parameters_of_two_memories_are_refused(cp):
    params = [random(1, 10), cp.asarray(random(1, 10))]
    opt = gpuadam.Adam(params)
    with pytest.raises(TypeError, match="one library"):
        opt.step([random(2, 10), cp.asarray(random(2, 10))], norms=True)
    assert params[0].tobytes() == random(1, 10).tobytes()


# The GPU's code, executed on the host

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)


from gpuadam.kernels import change_cuda_c, change_numba_cuda  # noqa: E402
from gpuadam.kernels.scalars import MEMORY_BYTES, REALS_AT, SKIP_AT  # noqa: E402


def sums_on_cpu(form, updates, scalars):
    """Return the sums of the chunks of the changes of some updates, each a list of NumPy arrays."""
    views = [Update(in_vectors(form, [on_cpu("", a) for a in arrays])) for arrays in updates]
    table, n_rows, chunks = change_sums.table_of(views, first_sums(views))
    sums, numbers = np.full(chunks, np.nan), np.array(scalars, "f8")
    change_cpu.build(form, "serial")(table, 0, chunks, 0, n_rows, sums.ctypes.data, numbers.ctypes.data)
    return sums


def in_vectors(form, views):
    return [view.in_vectors(operand.numbers) for view, operand in zip(views, operands_of_form(form), strict=True)]


def first_sums(updates):
    return list(itertools.accumulate((order.chunks_of(update.views[0].flat.size) for update in updates[:-1]), initial=0))


def sums_on_gpu(compiler, form, arch, updates, scalars, skip=0):
    """Likewise by the compiled code of a GPU backend. Return them and the Kernel."""
    views = [Update(in_vectors(form, [gpu_code.cuda_view("", a) for a in arrays])) for arrays in updates]
    table, n_rows, chunks = change_sums.table_of(views, first_sums(views))
    sums, words = np.full(chunks, np.nan), np.zeros(MEMORY_BYTES, "u1")
    words[SKIP_AT : SKIP_AT + 8].view("i8")[0] = skip
    reals = np.array(scalars, form.dtype).view("u1")
    words[REALS_AT : REALS_AT + reals.size] = reals
    kernel = gpu_code.loaded(gpu_code.norm_ptx(change_numba_cuda, change_cuda_c, compiler, form, arch))
    arguments = table.ctypes.data, 0, n_rows, sums.ctypes.data, chunks, words.ctypes.data
    memory = gpu_code.memory_of([*(a for arrays in updates for a in arrays), table, sums, words])
    kernel.run(-(-chunks // 4), order.BLOCK, gpu_code.packed(kernel, *arguments), memory)
    return sums, kernel


def arrays_of(form, shape, seed=0):
    """Return the arrays of an update in some layouts, each operand in another."""
    arrays = []
    for k, operand in enumerate(operands_of_form(form)):
        if operand.of_groups:
            n = -(-int(np.prod(shape)) // 32)
            arrays.append(np.abs(random(seed + k, n)))
            continue
        if operand.format in ("uint8", "int16"):
            x = np.random.default_rng(seed + k).integers(0, 3 if operand.name == "where" else 100, shape)
            x = x.astype("u1" if operand.format == "uint8" else "i2")
        else:
            x = random(seed + k, (*shape, operand.numbers) if operand.numbers > 1 else shape).astype(
                ml_dtypes.bfloat16 if operand.format == "bfloat16" else operand.format
            )
            x = np.abs(x) if operand.name in ("v", "max_v", "lr_scale") else x
            x = x.view("u2") if operand.format == "bfloat16" else x
        if not form.arrays.grouped and len(shape) == x.ndim == 2:
            x = (np.asfortranarray(x), np.ascontiguousarray(x[:, ::-1])[:, ::-1], x)[k % 3]
        elif operand.numbers > 1 and len(shape) == 2 and k % 2:
            x = x.transpose(1, 0, 2).copy().transpose(1, 0, 2)  # the numbers of an element stay neighbours
        arrays.append(x)
    return arrays


NARROW = Arrays("bfloat16", "float16", "bfloat16", remainder=True, lr_scale="float32", where="array")
CODE = {
    "float32": ("adam", "float32"),
    "float64": ("all with adamw", "float64"),
    "8 bits": ("adam", Arrays("bfloat16", "float32", "8bit")),
    "narrow": ("bounds", NARROW),
    "complex": ("adam", Arrays(numbers=2)),
    "vectors": ("bounds", Arrays("float32", "bfloat16", "bfloat16", where="array", high="float32", numbers=3)),
    "change": ("all with l2", Arrays("float32", "float32", "float32", True, change="float16", lr_scale="float64")),
}


@pytest.mark.in_short()
@pytest.mark.parametrize("name", few(CODE, "float32"))
@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_the_code_of_a_gpu_gives_the_bits_of_the_cpu(compiler, arch, name):
    form, scalars = form_and_scalars(*CODE[name])
    updates = [arrays_of(form, shape, seed) for seed, shape in enumerate([(4097,), (1,), (30, 41), (4096,), (9_001,)])]
    expected = sums_on_cpu(form, updates, scalars)
    assert np.isfinite(expected).all() and (expected > 0).all()
    sums, kernel = sums_on_gpu(compiler, form, arch, updates, scalars)
    assert sums.tobytes() == expected.tobytes()
    assert kernel.stored_bytes == 8 * len(sums)


@pytest.mark.exhaustive
@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_a_flag_on_the_device_makes_all_changes_zero(compiler):
    form, scalars = form_and_scalars("adam", "float32")
    form, updates = form._replace(skips=True), [arrays_of(form, (5000,))]
    assert sums_on_gpu(compiler, form, "sm_80", updates, scalars, skip=1)[0].tobytes() == np.zeros(2).tobytes()
    expected = sums_on_cpu(form, updates, scalars)
    assert sums_on_gpu(compiler, form, "sm_80", updates, scalars)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_every_operation_is_one_of_the_contract(compiler):
    form, scalars = form_and_scalars("adam", "float32")
    _, kernel = sums_on_gpu(compiler, form, "sm_80", [arrays_of(form, (4096,))], scalars)
    assert not [opcode for opcode in kernel.opcodes if {"ftz", "approx"} & set(opcode.split("."))]
    rounding = [
        opcode for opcode in kernel.opcodes if opcode.split(".")[0] in gpu_code.ROUNDED and opcode.endswith(("32", "64"))
    ]
    floats = [opcode for opcode in rounding if opcode.split(".")[-1] in ("f32", "f64")]
    assert floats and all(".rn." in opcode for opcode in floats)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [None, "8bit", "bfloat16"])
@pytest.mark.parametrize("how", ["plain", "capturable", "max_norm"])
def test_a_gpu_gives_the_bits_of_the_cpu(backend, state_dtype, how):
    library, host = testing.array_backend(backend), params_of(in_c_order=state_dtype == "8bit")
    params = {name: library.array(param) for name, param in host.items()}
    options, of_step = {"lr": 0.1, "state_dtype": state_dtype}, {"max_norm": 0.5} if how == "max_norm" else {}
    backends = None, backend  # a strided array of Numba's is of no library
    opts = [
        gpuadam.AdamW(x, capturable=how == "capturable", backend=own, **options)
        for x, own in zip((host, params), backends, strict=True)
    ]
    for k in range(2):
        grads = grads_of(k)
        if k and how != "capturable":
            grads["b"] = None
        theirs = {name: None if grad is None else library.array(grad) for name, grad in grads.items()}
        expected = opts[0].step(grads, norms=True, **of_step)
        norms = opts[1].step(theirs, norms=True, **of_step)
        for ours, other in zip(norms, expected, strict=True):
            assert bits(library.numpy(ours)) == bits(other)
    for name, param in params.items():
        testing.assert_same_bits(param, host[name])


@pytest.mark.gpu
def test_a_captured_graph_writes_them_at_each_replay(cp, backend):
    host = {name: random(k, SHAPES[name]) for k, name in enumerate(("w", "b"))}
    params, grads = ({name: cp.asarray(x) for name, x in host.items()} for _ in range(2))
    opt = gpuadam.AdamW(params, lr=cp.full(1, 0.1), capturable=True, backend=backend)
    ours = gpuadam.AdamW(host, lr=0.1)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        norms = opt.step(grads, norms=True)
        expected = ours.step({name: x.get() for name, x in grads.items()}, norms=True)
        stream.begin_capture()
        assert all(map(operator.is_, opt.step(grads, norms=True), norms))
        graph = stream.end_capture()
        for k in range(2):
            for _name, grad in grads.items():
                grad[...] = cp.asarray(random(k + 7, grad.shape))
            graph.launch(stream)
            stream.synchronize()
            expected = ours.step({name: x.get() for name, x in grads.items()}, norms=True)
            assert [bits(cp.asarray(x).get()) for x in norms] == list(map(bits, expected))


@pytest.mark.gpu
def test_a_capture_without_such_a_step_before_it_is_refused(cp, backend):
    params, grads = cp.asarray(random(1, 100)), cp.asarray(random(2, 100))
    opt = gpuadam.Adam(params, lr=cp.full(1, 0.1), capturable=True, backend=backend)
    stream = busy_stream(cp)
    with stream:
        opt.step(grads)
        stream.synchronize()
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="take a step with norms=True before the capture"):
                opt.step(grads, norms=True)
        finally:
            stream.end_capture()


@pytest.mark.gpu
def test_nothing_waits_for_the_device(cp, backend):
    host = random(1, 100_003)
    param, grad = cp.asarray(host), cp.asarray(random(2, 100_003))
    opt, ours = gpuadam.Adam(param, lr=0.1, backend=backend), gpuadam.Adam(host, lr=0.1)
    opt.step(grad, norms=True)
    ours.step(grad.get(), norms=True)
    stream = busy_stream(cp)
    with stream:
        norms = [opt.step(grad, norms=True) for _ in range(3)]
        assert not stream.done
        expected = [ours.step(random(2, 100_003), norms=True) for _ in range(3)]
        for on_gpu, on_host in zip(norms, expected, strict=True):
            assert [bits(cp.asarray(x).get()) for x in on_gpu] == list(map(bits, on_host))


@pytest.mark.gpu
def test_one_launch_sums_the_changes_of_each_kind_of_arrays(cp, backend, driver):
    params = {name: cp.asarray(random(1, shape)) for name, shape in SHAPES.items()}
    opt = gpuadam.Adam(params, backend=backend)
    grads = {name: cp.asarray(random(2, shape)) for name, shape in SHAPES.items()}
    opt.step(grads, norms=True)
    driver.listen()
    opt.step(grads, norms=True)
    assert len(driver.launches) == 1 + 1 + 1 + 2  # the changes; the update; the level above; the parameters and theirs


@pytest.mark.gpu
def test_numba_arrays_of_several_streams_are_ordered(backend):
    from numba import cuda

    streams = [cuda.stream() for _ in range(2)]
    host = {f"p{k}": random(k, 5000) for k in range(2)}
    params = {name: cuda.to_device(x, stream=stream) for (name, x), stream in zip(host.items(), streams, strict=True)}
    grads = {name: cuda.to_device(x, stream=stream) for (name, x), stream in zip(host.items(), streams, strict=True)}
    norms = gpuadam.Adam(params, lr=0.1, backend=backend).step(grads, norms=True)
    expected = gpuadam.Adam(host, lr=0.1).step({name: x.copy() for name, x in host.items()}, norms=True)
    cuda.synchronize()
    on_host = [x.copy_to_host() if hasattr(x, "copy_to_host") else x.get() for x in norms]
    assert list(map(bits, on_host)) == list(map(bits, expected))
