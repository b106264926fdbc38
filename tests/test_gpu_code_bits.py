"""The compiled code of both GPU backends, executed on the host: the CPU backend's bits, and its own bytes alone."""

import mmap

import numpy as np
import pytest
from cases import (
    DTYPES,
    FORMS,
    KEY_FORMS,
    assert_same_bits,
    assert_sentinels,
    at_offset,
    different_bits,
    few,
    form_and_scalars,
    wide_state,
)  # fmt: skip
from ptx import Refused

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpuadam.cli import contract  # noqa: E402
from gpuadam.kernels.cpu_backend import backend as numba_cpu  # noqa: E402
from gpuadam.kernels.layout import split  # noqa: E402
from gpuadam.kernels.view import on_cpu  # noqa: E402

SIZES = (0, 1, 3, 4, 127)
SHARED = [(k,) * 5 for k in range(4)]
UNSHARED = [(0, 1, 0, 0, 0), (3, 2, 1, 0, 1)]


def on_cpu_backend(form, arrays, scalars):
    copies = [None if a is None else a.copy() for a in arrays]
    numba_cpu.launch(form, [on_cpu("", a) for a in copies if a is not None], scalars)
    return copies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", few(FORMS, *dict.fromkeys((*KEY_FORMS, *list(FORMS)[::5]))))
def test_every_form_gives_the_cpu_backends_bits(compiler, arch, name, dtype):
    for eps in (0.0, 1e-30, 1e-20, 1e-8):
        form, scalars = form_and_scalars(name, dtype, eps=eps)
        arrays = wide_state(1003, dtype, form.amsgrad, seed=1)
        expected = on_cpu_backend(form, arrays, scalars)
        kernel = gpu_code.run(compiler, form, arch, arrays, scalars)
        assert_same_bits(arrays, expected, f"eps={eps}")
        n_arrays = 5 if form.amsgrad else 4
        assert kernel.loaded_bytes == n_arrays * arrays[0].nbytes
        assert kernel.stored_bytes == (n_arrays - 1) * arrays[0].nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adam", "all with adamw"])
def test_every_start_and_size_touches_its_own_bytes_alone(compiler, arch, name, dtype):
    form, scalars = form_and_scalars(name, dtype)
    for n in SIZES:
        for offsets in SHARED + UNSHARED:
            given = wide_state(n, dtype, form.amsgrad, seed=n)
            expected = on_cpu_backend(form, given, scalars)
            placed = [at_offset(a, offset) for a, offset in zip(given, offsets, strict=True)]
            arrays = [a for a, _ in placed]
            gpu_code.run(compiler, form, arch, arrays, scalars)
            assert_same_bits(arrays, expected, f"n={n}, offsets={offsets}")
            for (_, sentinels), label in zip(placed, ("param", "grad", "m", "v", "max_v"), strict=True):
                if sentinels:
                    assert_sentinels(*sentinels, label)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adam", "all with l2"])
@pytest.mark.exhaustive
def test_a_million_and_three_elements_over_four_steps(compiler, arch, name, dtype, examples):
    """In the short run a hundred thousand."""
    n, arrays = examples(100_003, 1_000_003), None
    for step in range(1, 5):
        form, scalars = form_and_scalars(name, dtype, step=step)
        arrays = wide_state(n, dtype, form.amsgrad) if arrays is None else arrays
        expected = on_cpu_backend(form, arrays, scalars)
        gpu_code.run(compiler, form, arch, arrays, scalars)
        assert_same_bits(arrays, expected, f"step {step}")
        arrays[1][:] = np.roll(arrays[1], 1)
        for a in arrays:  # the elements that overflowed say no more
            if a is not None:
                a[~np.isfinite(a)] = 0.5


LAYOUTS = {
    "every other": lambda n: np.zeros(2 * n, "f8")[::2],
    "reversed": lambda n: np.zeros(n, "f8")[::-1],
    "a column": lambda n: np.zeros((n, 3), "f8")[:, 1],
    "F order beside C": lambda n: np.zeros((n // 7, 7), "f8", order="F"),
    "3-D, permuted": lambda n: np.zeros((5, n // 35, 7), "f8").transpose(2, 0, 1)[:, ::2],
}


@pytest.mark.in_short("compiler", "layout")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arrays_are_updated_where_they_lie(compiler, arch, layout, dtype):
    form, scalars = form_and_scalars("amsgrad", dtype)
    blank = LAYOUTS[layout](315)
    arrays = []
    for k, values in enumerate(wide_state(blank.size, dtype, True)):
        # every second array is C-contiguous, so that the layouts differ
        scale = np.dtype(dtype).itemsize
        if k % 2:
            a = np.empty(blank.shape, dtype)
        else:
            whole = np.full(blank.size * 6 * scale, 0xA5, "u1")
            shift = whole.nbytes // 2 // scale * scale
            strides = tuple(s // 8 * scale for s in blank.strides)
            a = np.ndarray(blank.shape, dtype, whole, shift if min(strides) < 0 else 0, strides)
        a[...] = values.reshape(blank.shape)
        arrays.append(a)
    expected = [a.copy() for a in arrays]
    numba_cpu.launch(form, [on_cpu("", a) for a in expected], scalars)
    wholes = [(a.base.copy() if a.base is not None else None) for a in arrays]
    gpu_code.run_strided(compiler, form, arch, arrays, scalars)
    assert_same_bits(arrays, expected)
    for a, before in zip(arrays, wholes, strict=True):
        if before is not None:  # nothing between the strides was written
            after = a.base.copy()
            inside = np.ndarray(a.shape, a.dtype, after, a.ctypes.data - a.base.ctypes.data, a.strides)
            inside[...] = np.ndarray(a.shape, a.dtype, before, a.ctypes.data - a.base.ctypes.data, a.strides)
            assert (after == before).all()


def test_the_first_and_last_blocks_beyond_2_31_elements(compiler, arch):
    n = 2**31 + 5
    form, scalars = form_and_scalars("adam", "float32")
    # memory that is mapped, and taken only where it is touched
    maps = [mmap.mmap(-1, 4 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) for _ in range(4)]
    arrays = [np.frombuffer(m, "f4") for m in maps]
    ends = [slice(0, 1024), slice(n - 1024, n)]
    for a, values in zip(arrays, wide_state(2048, "float32"), strict=False):
        a[ends[0]], a[ends[1]] = values[:1024], values[1024:]
    before = [np.concatenate([a[s] for s in ends]) for a in arrays]
    expected = on_cpu_backend(form, [*before, None], scalars)

    cut = split([a.ctypes.data for a in arrays], [4] * 4, n)
    kernel = gpu_code.loaded(gpu_code.ptx(compiler, form, arch))
    parameters = gpu_code.contiguous_parameters(compiler, form, [*arrays, None], cut, scalars, kernel)
    memory, grid = gpu_code.memory_of(arrays), -(-cut.threads // gpu_code.BLOCK)
    assert cut.vectors > 2**29 - 2
    kernel.run(grid, gpu_code.BLOCK, parameters, memory, first_block=0, last_block=2)
    kernel.run(grid, gpu_code.BLOCK, parameters, memory, first_block=grid - 2, last_block=grid)
    for a, e in zip(arrays, expected, strict=False):
        assert different_bits(a[:1024], e[:1024]) == 0
        changed = 4 * (cut.vectors - (grid - 2) * gpu_code.BLOCK) + n % 4
        assert changed > 5
        assert different_bits(a[-changed:], e[-changed:]) == 0
    del arrays, a


def test_the_steps_that_doctor_runs_have_the_digest_that_it_knows(compiler, arch):
    known = contract.CONTRACTS["float32"]
    arrays = contract.arrays_of(known)
    for form, scalars, _ in contract.steps_of(known):
        gpu_code.run(compiler, form, arch, arrays, scalars)
    assert contract.digest_of(known, arrays) == known.bits


@pytest.mark.parametrize("name", ["all bfloat16", "bounds"])
def test_so_have_those_of_other_contracts(compiler, name):
    known = contract.CONTRACTS[name]
    arrays = contract.arrays_of(known)
    for form, scalars, key in contract.steps_of(known):
        gpu_code.run(compiler, form, "sm_90", arrays, scalars, key=key)
    assert contract.digest_of(known, arrays) == known.bits


def test_so_have_those_of_8_bit_state(compiler):
    known = contract.CONTRACTS["8-bit state"]
    arrays = contract.arrays_of(known)
    for form, scalars, key in contract.steps_of(known):
        gpu_code.run_table(compiler, form, "sm_90", [arrays], scalars, gpu_code.memory_of(arrays), key=key)
    assert contract.digest_of(known, arrays) == known.bits


def test_the_runner_refuses_what_it_should(compiler):
    form, scalars = form_and_scalars("adam", "float32")
    text = gpu_code.ptx(compiler, form, "sm_90")
    arrays = wide_state(64)
    with pytest.raises(Refused, match=r"add\.f32"):
        gpu_code.loaded(text.replace("add.rn.f32", "add.f32").replace("sub.rn.f32", "add.f32"))
    with pytest.raises(Refused, match=r"div\.approx"):
        gpu_code.loaded(text.replace("div.rn.f32", "div.approx.f32"))
    with pytest.raises(Refused, match="not a plain access"):
        gpu_code.loaded(text.replace("st.global", "st"))
    kernel = gpu_code.loaded(text)
    cut = split([a.ctypes.data for a in arrays[:4]], [4] * 4, 64)
    parameters = gpu_code.contiguous_parameters(compiler, form, arrays, cut, scalars, kernel)
    with pytest.raises(MemoryError, match="outside"):
        kernel.run(1, 128, parameters, gpu_code.memory_of([a[:-1] for a in arrays[:4]]))
    shifted = [np.zeros(65, "f4")[1:] for _ in range(4)]
    parameters = gpu_code.contiguous_parameters(compiler, form, [*shifted, None], (0, 16, 16), scalars, kernel)
    with pytest.raises(MemoryError, match="misaligned"):
        kernel.run(1, 128, parameters, gpu_code.memory_of(shifted))
