"""`global_norm`: the order of the sum, its bits on every backend, errors, and what only a GPU can show."""

import functools
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import libraries
import llvmlite.binding
import numpy as np
import pytest
from cases import few
from gpu_work import SYNCHRONIZATIONS, busy_stream

import gpuadam
import gpuadam.clipping
from gpuadam.clipping import global_norm
from gpuadam.kernels import compiled_cache, cpu_threads, gpu_table, norm_cpu, synchronous
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.cpu_backend import backend as numba_cpu

ml_dtypes = libraries.imported("ml_dtypes", reason="ml_dtypes, which has NumPy's bfloat16, is not installed")

FORMATS = ("float32", "float64", "bfloat16", "float16")
SIZES = (0, 1, 31, 255, 4095, 4096, 4097, 100_003)
ROOT = Path(__file__).parent.parent


def values(n, format="float32", seed=0):
    """Return numbers of many magnitudes, both signs, with zeros and subnormals of the narrow formats among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * 2.0 ** rng.integers(-12, 8, n)
    x[rng.random(n) < 0.05] = -0.0
    x[rng.random(n) < 0.05] *= 2.0**-14
    return x.astype(ml_dtypes.bfloat16 if format == "bfloat16" else format)


# The order, in NumPy and fractions


def model(arrays):
    """Return the norm of some arrays in the order that `kernels/norm_order.py` documents."""
    sums = np.array([sum_of_chunk(c, squares=True) for a in arrays for c in chunks(np.ravel(a, order="C").astype("f8"))])
    while len(sums) != 1:
        sums = np.array([sum_of_chunk(c, squares=False) for c in chunks(sums)] or [0.0])
    return np.sqrt(sums[0])


def chunks(x):
    return [x[k : k + 4096] for k in range(0, len(x), 4096)]


def sum_of_chunk(x, squares):
    lanes = np.zeros(256)
    for k in range(0, len(x), 64):
        here, first = x[k : k + 64], k // 1024 * 64
        own = lanes[first : first + len(here)]
        own[:] = fma_of_squares(here, own) if squares else own + here
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def fma_of_squares(x, s):
    if (x == x.astype("f4")).all():
        return x * x + s  # the product is exact
    return np.array([float(Fraction(a) * Fraction(a) + Fraction(b)) for a, b in zip(x.tolist(), s.tolist(), strict=True)])


def assert_bits(actual, expected):
    a, b = (np.asarray(x, "f8").reshape(()) for x in (actual, expected))
    assert a.tobytes() == b.tobytes() or (np.isnan(a) and np.isnan(b)), f"{a!r} and {b!r} differ in their bits"


# On the CPU


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", SIZES)
def test_the_norm_is_near_the_exact_one(format, n):
    x = values(n, format)
    exact = math.sqrt(math.fsum(v * v for v in x.astype("f8").tolist()))
    assert global_norm(x) == pytest.approx(exact, rel=1e-15, abs=0)  # some 5 units in the last place; 16 + 8 additions deep


@pytest.mark.parametrize("format, n", [(f, n) for f in FORMATS for n in SIZES if f != "float64" or n < 10_000])
def test_the_bits_are_those_of_the_documented_order(format, n):
    assert_bits(global_norm(values(n, format)), model([values(n, format)]))


MANY = [(7, 700), (0,), (4096,), (), (3, 1, 5), (4097,), (20_000,)]


def many(format="float32"):
    return [values(math.prod(shape), format, seed).reshape(shape) for seed, shape in enumerate(MANY)]


def test_many_arrays_are_summed_in_the_order_of_the_list():
    assert_bits(global_norm(many()), model(many()))
    assert_bits(global_norm(many()[::-1]), model(many()[::-1]))


def test_more_chunks_than_a_chunk_has_elements_make_a_third_level():
    arrays = [*values(4097).reshape(-1, 1), values(3)]
    assert len(order.plan([numba_cpu.view("", a) for a in arrays]).passes) == 3
    assert_bits(global_norm(arrays), model(arrays))


def test_arrays_of_several_formats_keep_their_places():
    arrays = [a for format in FORMATS[:1] + FORMATS[2:] for a in many(format)]
    arrays = arrays[::2] + arrays[1::2]
    assert_bits(global_norm(arrays), model(arrays))


def test_the_format_does_not_matter_where_the_values_are_the_same():
    x = values(10_000, "bfloat16")
    assert_bits(global_norm(x.astype("f4")), global_norm(x))
    assert_bits(global_norm(x.astype("f8")), global_norm(x))


def test_dicts_lists_and_none_are_taken_apart():
    a, b, c = many()[:1] + many()[4:6]
    expected = global_norm([a, b, c])
    for grads in (
        {"a": a, "none": None, "b": b, "c": c},
        (a, [b, None, {"c": c}]),
        iter([a, b, c]),
        {"x": a, "y": (b, c)}.values(),
    ):
        assert_bits(global_norm(grads), expected)


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_bits_are_numbers_of_their_format(format):
    x = values(5000, format)
    expected = global_norm(x)
    assert_bits(global_norm(gpuadam.Bits(x.view("u2"), format)), expected)
    assert_bits(global_norm({"w": [gpuadam.Bits(x.view("i2"), format)]}), expected)


def layouts(x):
    """Give (what it is, an array that equals x in C order) for x of shape (6, 10, 50)."""
    buffer = np.zeros(x.nbytes + 64, "u1")
    for offset in range(0, 32, 1):
        at = buffer[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)
        at[...] = x
        yield f"{offset} bytes from the start", at
    yield "F order", np.asfortranarray(x)
    yield "axes in another order", np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1)
    wide = np.zeros((6, 20, 151), x.dtype)
    wide[:, ::2, 1::3] = x
    yield "every other element", wide[:, ::2, 1::3]
    yield "reversed", np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1]
    yield "dimensions of one element", x.reshape(6, 1, 10, 1, 50)
    frozen = x.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen


@pytest.mark.parametrize("format", FORMATS)
def test_every_layout_has_the_bits_of_the_contiguous_one(format):
    x = values(3000, format).reshape(6, 10, 50)
    expected = global_norm(x.copy())
    for what, array in layouts(x):
        assert (array.ravel() == x.ravel()).all()
        norm = global_norm(array)
        assert norm.tobytes() == expected.tobytes(), what


def test_a_broadcast_array_counts_every_element():
    x = values(1003)
    assert_bits(global_norm(np.broadcast_to(x, (9, 1003))), global_norm(np.tile(x, (9, 1))))


@pytest.mark.parametrize("n_threads", few([2, 3, 7], 3))
@pytest.mark.parametrize("safe", [True, False], ids=["numba's threads", "our own"])
def test_every_number_of_threads_gives_the_bits_of_one(monkeypatch, n_threads, safe):
    x = [values(300_000), values(5), values(123_457)]
    expected = model(x)
    safe = safe and cpu_threads.numba_threads_are_safe()
    monkeypatch.setattr(cpu_threads, "numba_threads_are_safe", lambda: safe)
    for n in (1, n_threads):
        monkeypatch.setattr(cpu_threads, "n_threads", lambda n=n: n)
        assert_bits(global_norm(x), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_shows_in_the_norm(format):
    for at in (0, 255, 4096, 5000):
        for bad in (np.inf, -np.inf, np.nan):
            x = values(5001, format)
            x[at] = bad
            norm = global_norm([values(10), x])
            assert np.isnan(norm) if np.isnan(bad) else norm == np.inf


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_and_the_smallest_numbers(format):
    info = ml_dtypes.finfo(values(1, format).dtype)
    for x in (info.max, info.smallest_subnormal, info.smallest_normal):
        with np.errstate(over="ignore", under="ignore"):
            expected = np.sqrt(np.float64(x) * np.float64(x) * 4)
        norm = global_norm(np.full(4, x))
        assert_bits(norm, expected)
        assert format == "float64" or (np.isfinite(norm) and norm > 0)


def test_every_float16_and_bfloat16_becomes_its_float64():
    for dtype, exponent in ((np.float16, 0x7C00), (ml_dtypes.bfloat16, 0x7F80)):
        bits = np.arange(1 << 16, dtype="u2")
        every = bits[bits & exponent != exponent].view(dtype)
        assert_bits(global_norm(every), model([every]))
        for k in range(0, len(every), 997):
            assert float(global_norm(every[k : k + 1])) == abs(float(every[k]))


@pytest.mark.parametrize("arrays", [np.zeros(0), [np.zeros((0, 3), "f4")], [np.full(3, -0.0)]])
def test_nothing_has_the_norm_plus_zero(arrays):
    assert_bits(global_norm(arrays), 0.0)


def test_a_new_result_is_an_array_of_shape_nothing():
    norm = global_norm(values(10))
    assert (type(norm), norm.shape, norm.dtype) == (np.ndarray, (), np.float64)


def test_out_is_written_and_returned():
    out = np.full((), np.nan)
    assert global_norm(values(10), out=out) is out
    assert_bits(out, global_norm(values(10)))
    rows = np.full(3, np.nan)
    global_norm(values(10), out=rows[1:2].reshape(()))
    assert np.isfinite(rows).tolist() == [False, True, False]


READ_ONLY = np.zeros(())
READ_ONLY.flags.writeable = False
SHARED = np.zeros(4)


@pytest.mark.parametrize(
    "grads, options, error, message",
    [
        ([], {}, ValueError, "no array"),
        ({"a": None}, {}, ValueError, "no array"),
        ({"w": np.zeros(3, "i4")}, {}, TypeError, r"grads\['w'\] has dtype int32"),
        ([np.zeros(3), np.zeros(3, ">c8")], {}, TypeError, r"grads\[1\] has dtype .* in the other byte order"),
        ([np.zeros(3, ">f4")], {}, TypeError, r"grads\[0\] has dtype float32 in the other byte order \(>f4\)"),
        (np.zeros(3, "bool"), {}, TypeError, "grads has dtype bool"),
        ([1.0], {}, TypeError, r"grads\[0\] is a float, not an array"),
        (["w"], {}, TypeError, r"grads\[0\] is a str"),
        ([np.ma.zeros(3)], {}, TypeError, r"grads\[0\] is a masked array"),
        (np.zeros(3), {"out": np.zeros(1)}, ValueError, r"out has shape \(1,\)"),
        (np.zeros(3), {"out": np.zeros((), "f4")}, TypeError, "out has dtype float32"),
        (np.zeros(3), {"out": READ_ONLY}, ValueError, "out is read-only"),
        (np.zeros(3), {"out": 0.0}, TypeError, "out is a float, not an array"),
        (SHARED, {"out": SHARED[1:2].reshape(())}, ValueError, "share memory"),
        (np.zeros(3), {"stream": 7}, TypeError, "stream is for arrays on a GPU"),
        (np.zeros(3), {"backend": "cupy"}, TypeError, "grads is a numpy.ndarray in CPU memory"),
        (np.zeros(3), {"backend": "gpu"}, ValueError, "there is no backend 'gpu'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(grads, options, error, message):
    out = options.get("out")
    before = out.copy() if isinstance(out, np.ndarray) else None
    with pytest.raises(error, match=message):
        global_norm(grads, **options)
    assert before is None or out.tobytes() == before.tobytes()


def test_the_loop_is_vectorised(monkeypatch):
    if not {"avx2", "fma"} <= {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}:
        pytest.skip("this CPU has no AVX2 and FMA")
    monkeypatch.setattr(compiled_cache, "stored", lambda dispatcher, *key: dispatcher)  # what is loaded cannot be inspected
    form = order.Form("float32")
    kernel = norm_cpu.build.__wrapped__(form, "serial")
    kernel(np.zeros(order.COLUMNS, np.int64), 0, 0, 0, 1, 0, 0)
    code = "".join(kernel.inspect_asm().values())
    assert re.search(r"vfmadd\d+pd\s.*%[yz]mm", code) and re.search(r"vcvtps2pd\s.*%[yz]mm", code)


def test_another_process_need_not_compile():
    global_norm(values(9000))
    asked = (
        "import numpy, gpuadam.clipping, gpuadam.kernels.norm_cpu as n;"
        "from gpuadam.kernels.norm_order import Form;"
        "gpuadam.clipping.global_norm(numpy.ones(9000, 'f4'));"
        "stats = [n.build(f, 'serial').stats for f in (Form(), Form('float64', False))];"
        "print([(sum(s.cache_hits.values()), sum(s.cache_misses.values())) for s in stats])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == "[(1, 0), (1, 0)]", ran.stderr


# The GPU's code, executed on the host

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)


from gpuadam.kernels import norm_cuda_c, norm_numba_cuda  # noqa: E402

SUM = order.Form("float64", squares=False)
ptx = functools.partial(gpu_code.norm_ptx, norm_numba_cuda, norm_cuda_c)


def run(compiler, arch, arrays):
    """Return the norm that the compiled code of a GPU backend finds, and the Kernel of the first pass."""
    plan = order.plan([gpu_code.cuda_view("", a) for a in arrays], 16)
    memory, result = np.full(plan.workspace // 8 + 2, np.nan), np.full(1, np.nan)
    workspace = -(-memory.ctypes.data // 16) * 16
    table = plan.placed(workspace)
    ranges = gpu_code.memory_of([*arrays, memory, result, table])
    kernels: list = []
    for one in plan.passes:
        last = one is plan.passes[-1]
        kernels.append(gpu_code.loaded(ptx(compiler, one.form, arch)))
        out = result.ctypes.data if last else workspace + one.out
        arguments = (table.ctypes.data, one.first_row, one.n_rows, out, one.chunks, int(last))
        kernels[-1].run(-(-one.chunks // 4), order.BLOCK, gpu_code.packed(kernels[-1], *arguments), ranges)
    return result[0], kernels[0]


def at_offset(x, n_bytes):
    buffer = np.zeros(x.nbytes + 64, "u1")
    start = -buffer.ctypes.data % 64 + n_bytes
    placed = buffer[start : start + x.nbytes].view(x.dtype)
    placed[...] = x
    return placed


@pytest.mark.in_short()
@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_the_code_of_a_gpu_gives_the_bits_of_the_cpu(compiler, arch):
    for n in (*SIZES[:-1], 20_003):
        for offset in (0, 4):
            x = at_offset(values(n), offset)
            assert_bits(run(compiler, arch, [x])[0], global_norm(x))


@pytest.mark.in_short()
@pytest.mark.parametrize("format", few(FORMATS[1:], "bfloat16", "float64"))
@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_so_it_does_in_every_format(compiler, format, examples):
    for n in examples((255, 4097), (1, 255, 4097, 9_003)):
        for offset in (0, 8):
            x = at_offset(values(n, format), offset)
            assert_bits(run(compiler, "sm_80", [x])[0], global_norm(x))


@pytest.mark.parametrize("compiler", few(["cupy", "numba-cuda"], "cupy"))
def test_so_it_does_for_many_arrays_and_what_is_not_finite(compiler):
    arrays = many() + many("float64")
    assert_bits(run(compiler, "sm_80", arrays)[0], global_norm(arrays))
    arrays[5][100] = np.inf
    assert run(compiler, "sm_80", arrays)[0] == np.inf
    arrays[9][0] = np.nan
    assert np.isnan(run(compiler, "sm_80", arrays)[0])
    assert_bits(run(compiler, "sm_80", [np.zeros(0, "f4")])[0], 0.0)


@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_so_it_does_for_every_layout(compiler):
    x = values(3000).reshape(6, 10, 50)
    expected = global_norm(x)
    for what, array in layouts(x):
        if array.ctypes.data % 4 == 0:
            assert run(compiler, "sm_80", [array])[0].tobytes() == expected.tobytes(), what


@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_aligned_elements_are_loaded_once_and_16_bytes_at_a_time(compiler):
    n = 10 * 4096
    _, kernel = run(compiler, "sm_80", [at_offset(values(n), 0)])
    assert any(re.fullmatch(r"ld\.global\.(nc\.)?v4\.[fbu]32", opcode) for opcode in kernel.opcodes)
    assert 4 * n <= kernel.loaded_bytes < 4.6 * n  # and each thread reads some numbers of its row
    assert kernel.stored_bytes == 8 * 10


@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_every_operation_is_one_of_the_contract(compiler):
    for form in (order.Form("float32"), SUM):
        kernel = gpu_code.loaded(ptx(compiler, form, "sm_80"))
        assert not [opcode for opcode in kernel.opcodes if {"ftz", "approx"} & set(opcode.split("."))]
        assert not [
            opcode for opcode in kernel.opcodes if re.match(r"(fma|add|sub|mul|sqrt)\.(?!rn\.f64).*f(32|64)", opcode)
        ]


@pytest.mark.parametrize("compiler", ["cupy", "numba-cuda"])
def test_the_last_chunks_beyond_2_31_elements_are_where_they_should_be(compiler):
    """The array is address space that only the last pages of are touched."""
    n, tail = 2**31 + 4096 + 3, values(2 * 4096 + 3)
    try:
        x = np.zeros(n, "f4")
    except MemoryError:
        pytest.skip("this machine does not lend 8 GiB of address space")
    x[-len(tail) :] = tail
    plan = order.plan([gpu_code.cuda_view("", x)], 16)
    form, first_row, n_rows, chunks, *_ = plan.passes[0]
    sums, table = np.full(chunks, np.nan), plan.placed(0)
    kernel = gpu_code.loaded(ptx(compiler, form, "sm_80"))
    blocks, memory = -(-chunks // 4), gpu_code.memory_of([x, sums, table])
    parameters = gpu_code.packed(kernel, table.ctypes.data, first_row, n_rows, sums.ctypes.data, chunks, 0)
    kernel.run(blocks, order.BLOCK, parameters, memory, first_block=blocks - 1)
    assert chunks % 4 == 2 and np.isnan(sums[:-2]).all()
    assert_bits(np.sqrt(sums[-2]), global_norm(x[-4096 - 3 : -3]))
    assert_bits(np.sqrt(sums[-1]), global_norm(x[-3:]))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [0, 1, 4097, 1_000_003])
def test_a_gpu_gives_the_bits_of_the_cpu(cp, backend, format, n):
    x = values(n, format)
    grads = gpuadam.Bits(cp.asarray(x.view("u2")), format) if format == "bfloat16" else cp.asarray(x)
    assert_bits(cp.asarray(global_norm(grads, backend=backend)).get(), global_norm(x))


@pytest.mark.gpu
def test_so_it_does_where_the_sums_of_chunks_of_one_array_make_a_third_level(cp, backend):
    x = values(4096 * 4096 + 1)
    assert_bits(cp.asarray(global_norm(cp.asarray(x), backend=backend)).get(), global_norm(x))


@pytest.mark.gpu
def test_so_it_does_for_every_layout_and_many_arrays_there(cp, backend):
    whole = cp.asarray(values(100_000))
    arrays = [whole[1:5000], whole[::3], whole[::-1], whole.reshape(100, 1000).T, whole[4:], whole[:0], whole[7]]
    expected = global_norm([a.get() for a in arrays])
    assert_bits(cp.asarray(global_norm(arrays, backend=backend)).get(), expected)


@pytest.mark.gpu
def test_numba_arrays_there(cp):
    from numba import cuda

    out = cuda.device_array((), np.float64)
    arrays = [cuda.to_device(values(k)) for k in (10, 5000)]
    expected = global_norm([values(10), values(5000)])
    assert_bits(global_norm(arrays).copy_to_host(), expected)
    global_norm(arrays, out=out)
    assert_bits(out.copy_to_host(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["Relaxed", "Global"])  # CuPy's and torch's
def test_a_captured_graph_replays_with_what_is_there(cp, backend, mode):
    grads, out = [cp.zeros(9000, "f4"), cp.zeros((5, 3), "f8")], cp.zeros(())
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        global_norm(grads, out=out, backend=backend)  # compiles
        stream.synchronize()
        stream.begin_capture(getattr(cp.cuda.runtime, f"streamCaptureMode{mode}"))
        global_norm(grads, out=out, backend=backend)
        graph = stream.end_capture()
        for seed in range(3):
            host = [values(9000, seed=seed), values(15, "float64", seed).reshape(5, 3)]
            for grad, a in zip(grads, host, strict=True):
                grad[...] = cp.asarray(a)
            graph.launch(stream)
            stream.synchronize()
            assert_bits(out.get(), global_norm(host))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(cp, backend):
    grads = cp.asarray(values(1_000_003))
    out = cp.zeros(())
    global_norm(grads, out=out, backend=backend)
    cp.cuda.Device().synchronize()
    spin = cp.RawKernel(
        r'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }', "spin"
    )
    spin((1,), (1,), (np.int64(300_000_000),))
    for _ in range(5):
        global_norm(grads, out=out, backend=backend)
    event = cp.cuda.Event()
    event.record()
    assert not event.done
    assert_bits(out.get(), global_norm(values(1_000_003)))


@pytest.mark.gpu
@pytest.mark.parametrize("arrays, launches", [(many(), 2), ([values(4096)], 1)], ids=["many arrays", "one chunk"])
def test_a_norm_takes_one_launch_for_each_level_of_sums(cp, backend, driver, arrays, launches):
    grads = [cp.asarray(a) for a in arrays]
    driver.listen()
    global_norm(grads, backend=backend)
    assert len(driver.launches) == launches


@pytest.mark.gpu
def test_out_on_the_device_is_written_and_returned(cp, backend):
    grads, out = cp.asarray(values(9000)), cp.full((), np.nan)
    assert global_norm(grads, out=out, backend=backend) is out
    assert_bits(out.get(), global_norm(values(9000)))


@pytest.mark.gpu
def test_norms_that_the_device_has_not_computed_yet_do_not_share_their_tables(cp, backend):
    host = [many()[k:] for k in range(5)]
    given = [[cp.asarray(a) for a in arrays] for arrays in host]
    outs = [cp.full((), np.nan) for _ in given]
    global_norm(given[0], backend=backend)  # compiles, which may take longer than the stream is busy
    stream = busy_stream(cp)
    with stream:
        for grads, out in zip(given, outs, strict=True):
            global_norm(grads, out=out, backend=backend)
        assert not stream.done
        for arrays, out in zip(host, outs, strict=True):
            assert_bits(out.get(), global_norm(arrays))


@pytest.mark.gpu
def test_a_table_and_its_sums_are_used_again_when_the_device_has_passed_them(cp, backend, driver):
    grads, out = [cp.asarray(a) for a in many()], cp.full((), np.nan)
    memory = []
    for _ in range(3):
        global_norm(grads, out=out, backend=backend)
        cp.cuda.Device().synchronize()
        memory.append((driver.memory.pinned.used, driver.memory.devices[0].used))
    assert memory[0] == memory[1] == memory[2]


@pytest.mark.gpu
def test_a_norm_that_was_taken_before_is_that_of_what_the_arrays_hold_now(cp, backend):
    host = many()
    given, out = [cp.asarray(a) for a in host], cp.full((), np.nan)
    for k in range(4):
        for a, on_gpu in zip(host, given, strict=True):
            a *= 1.5
            on_gpu.set(a)
        assert_bits(global_norm(given, out=out, backend=backend).get(), global_norm(host))
        assert_bits(cp.asarray(global_norm(given, backend=backend)).get(), global_norm(host))
        if k == 1:  # others in their places: of another size, of another order, one fewer
            given[0], host[0] = cp.asarray(host[0][1:]), host[0][1:].copy()
        if k == 2:
            given, host = given[::-1][1:], host[::-1][1:]
    with pytest.raises(ValueError, match="out"):
        global_norm([*given, out], out=out, backend=backend)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        assert_bits(global_norm(given, out=out, backend=backend).get(), global_norm(host))


@pytest.mark.gpu
def test_what_is_kept_of_norms_is_let_go(cp, driver):
    out, used = cp.full((), np.nan), []
    for k in range(40):
        global_norm([cp.asarray(values(1000 + k))], out=out)
        cp.cuda.Device().synchronize()
        used.append(driver.memory.pinned.used)
    assert used[-1] - used[20] < 10 * 4096  # of 20 norms, each of which has 4,096 bytes or more


@pytest.mark.gpu
def test_a_graph_keeps_its_table_whatever_norms_come_after_the_capture(cp, backend):
    grads, others, out = ([cp.asarray(a) for a in many()], [cp.asarray(values(20_000, seed=9))], cp.full((), np.nan))
    stream = busy_stream(cp)
    with stream:
        global_norm(grads, out=out, backend=backend)  # compiles
        stream.begin_capture()
        global_norm(grads, out=out, backend=backend)
        graph = stream.end_capture()
        for _ in range(2):
            assert_bits(cp.asarray(global_norm(others, backend=backend)).get(), global_norm(values(20_000, seed=9)))
            out.fill(np.nan)
            graph.launch(stream)
            assert_bits(out.get(), global_norm(many()))


@pytest.mark.gpu
def test_no_memory_of_cudas_pool_becomes_a_part_of_a_graph(cp, backend, driver, monkeypatch):
    """It would be allocated at each launch, of which CUDA then refuses the second."""
    grads, out = [cp.asarray(a) for a in many()], cp.full((), np.nan)
    stream = busy_stream(cp)
    with stream:
        global_norm(grads, out=out, backend=backend)  # compiles
        stream.synchronize()
        monkeypatch.setattr(gpu_table, "buffers", [])  # so that the next norm allocates one
        stream.begin_capture()
        driver.listen()
        global_norm(grads, out=out, backend=backend)
        allocations = {name for name in driver.calls if "Alloc" in name or "Malloc" in name}
        stream.end_capture()
    on_device = {"runtime_cudaMalloc", "runtime_cudaMallocAsync", "cuMemAlloc_v2", "cuMemAllocAsync"}
    assert allocations & on_device == {{"cupy": "runtime_cudaMalloc", "numba-cuda": "cuMemAlloc_v2"}[backend]}


@pytest.mark.gpu
def test_a_capture_needs_out(cp, backend):
    grads = [cp.asarray(a) for a in many()]
    global_norm(grads, backend=backend)
    stream = busy_stream(cp)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="give out="):
                global_norm(grads, backend=backend)
        finally:
            stream.end_capture()


@pytest.mark.gpu
def test_with_gpuadam_sync_an_error_names_the_pass_and_the_arrays(cp, backend, driver, monkeypatch):
    monkeypatch.setattr(synchronous, "ON", True)
    grads = [cp.asarray(a) for a in many()]
    global_norm(grads, backend=backend)  # compiles
    driver.fail(3, "ILLEGAL_ADDRESS", names=SYNCHRONIZATIONS)  # each pass is waited for before and after
    said = rf"pass 2 of 2 of the global norm of grads\[0\], .* \({len(grads)} arrays, .* failed on {backend}, stream 1: .*"
    with pytest.raises(RuntimeError, match=said + "(?i:illegal_?address)"):
        global_norm(grads, backend=backend)


@pytest.mark.gpu
def test_the_sums_of_chunks_come_to_the_host_as_the_cpu_has_them(cp):
    """A sharded optimizer adds them up on the host. It runs on CuPy's arrays."""
    from gpuadam.kernels.cupy_backend import backend as kernels

    arrays = many()
    expected = norm_cpu.chunk_sums([gpuadam.kernels.view.on_cpu("", a) for a in arrays])
    views = [kernels.view("", cp.asarray(a)) for a in arrays]
    assert expected.size > 4
    assert kernels.chunk_sums(views).tobytes() == expected.tobytes()
    assert norm_cpu.norm_of_chunks(expected) == global_norm(arrays)


@pytest.mark.gpu
def test_arrays_on_two_devices_are_refused(cp, backend):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    here = cp.asarray(values(3))
    with cp.cuda.Device(1):
        there = cp.asarray(values(3))
    with pytest.raises(ValueError, match=r"grads\[1\] is on device 1, grads\[0\] on 0"):
        global_norm([here, there], backend=backend)


@pytest.mark.gpu
def test_arrays_of_two_memories_are_refused(cp):
    with pytest.raises(TypeError, match="one library"):
        global_norm([cp.asarray(values(3)), values(3)])
    with pytest.raises(TypeError, match="one library"):
        global_norm([cp.asarray(values(3))], out=np.zeros(()))


@pytest.mark.gpu
def test_an_unaligned_array_on_a_gpu_is_refused(cp, backend):
    with pytest.raises(ValueError, match="grads is not aligned to its 4-byte elements"):
        global_norm(cp.zeros(64, "u1")[1:41].view("f4"), backend=backend)
