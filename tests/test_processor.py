"""Loops that prefetch or have wide vectors, because that suits a processor: the same bits, by the instructions meant."""

import ctypes
import mmap
import sys

import libraries
import numba
import numpy as np
import pytest
from cases import few, in_memory, table_of
from llvmlite import binding

from gpuadam.cli.measuring import forms
from gpuadam.kernels import adam, change_cpu, change_sums, cpu_kernels, limit, norm_cpu, processor, view
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.layout import Update
from gpuadam.kernels.operands import operands_of_form
from gpuadam.kernels.processor import Loop

PLAIN, OTHERWISE, BY_LINE = (limit.Looped(adam, loop) for loop in (Loop(), Loop(512, True), Loop(512, by_line=True)))
LARGE = 140_003  # elements, at which the loop of every form prefetches: CACHED over the bytes of an element is less


def updated(rule, name, arrays):
    """Update arrays in the serial loop of a form."""
    form, scalars = forms.form_and_scalars(forms.FORMS[name])
    cpu_kernels.build(rule, form, "serial")(table_of(arrays), 0, arrays[0].shape[0], 5, in_memory(scalars))
    return [a.tobytes() for a in arrays]


@pytest.mark.parametrize("name", few(forms.FORMS, "float32", "8-bit state"))
def test_the_bits_are_those_of_a_plain_loop(name):
    for n in (1, 64, 700, LARGE):
        arrays = list(forms.new_arrays(numba_cpu, forms.FORMS[name], n).values())
        otherwise = [updated(rule, name, [a.copy() for a in arrays]) for rule in (OTHERWISE, BY_LINE)]
        assert otherwise == [updated(PLAIN, name, arrays)] * 2, n


def at_the_end_of_memory(array):
    """Return a copy behind which no byte can be read."""
    pages = -(-array.nbytes // mmap.PAGESIZE)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
    end = memory.ctypes.data + pages * mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    there = memory[pages * mmap.PAGESIZE - array.nbytes : pages * mmap.PAGESIZE].view(array.dtype).reshape(array.shape)
    there[...] = array
    return there


def sums_of_squares(arrays, how):
    """Return the sums of the chunks of some arrays' squares."""
    plan = order.plan([view.on_cpu("", a) for a in arrays])
    sums = np.zeros(plan.workspace // 8)
    for one in (one for one in plan.passes if one.form.squares):
        norm_cpu.build(one.form, "serial", how)(plan.table, 0, one.chunks, one.first_row, one.n_rows, sums.ctypes.data, 0)
    return sums.tobytes()


def sums_of_changes(name, arrays, how):
    """Return the sums of the chunks of the squares of an update's change."""
    form, scalars = forms.form_and_scalars(forms.FORMS[name])
    of_operands = zip(operands_of_form(form), arrays, strict=True)
    update = Update([view.on_cpu("", a).in_vectors(operand.numbers) for operand, a in of_operands])
    table, n_rows, chunks = change_sums.table_of([update], [0])
    sums, numbers = np.zeros(chunks), np.array(scalars, np.float64)
    change_cpu.build(form, "serial", how)(table, 0, chunks, 0, n_rows, sums.ctypes.data, numbers.ctypes.data)
    return sums.tobytes()


@pytest.mark.parametrize("dtype", few(["float32", "float64", "bfloat16"], "float32"))
def test_sums_are_those_of_a_plain_loop(dtype):
    dtype = libraries.imported("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    for n in (1, 700, 5000, LARGE):
        array = at_the_end_of_memory(np.random.default_rng(n).standard_normal(n).astype(dtype))
        plain = sums_of_squares([array], Loop())
        assert any(plain) and sums_of_squares([array], Loop(512, True)) == plain, n


@pytest.mark.parametrize("name", few(forms.FORMS, "8-bit state"))
def test_sums_of_changes_are_those_of_a_plain_loop(name):
    for n in (1, 700, LARGE):
        arrays = [at_the_end_of_memory(a) for a in forms.new_arrays(numba_cpu, forms.FORMS[name], n).values()]
        plain = sums_of_changes(name, arrays, Loop())
        assert any(plain) and sums_of_changes(name, arrays, Loop(512, True)) == plain, n


@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected otherwise on Windows")
def test_a_prefetch_reads_nothing_that_is_not_there():
    arrays = list(forms.new_arrays(numba_cpu, forms.FORMS["float32"], LARGE).values())
    otherwise = [updated(rule, "float32", [at_the_end_of_memory(a) for a in arrays]) for rule in (OTHERWISE, BY_LINE)]
    assert otherwise == [updated(PLAIN, "float32", arrays)] * 2


def test_a_loop_prefetches_and_asks_for_wide_vectors_if_it_was_told_to():
    form, scalars = forms.form_and_scalars(forms.FORMS["bfloat16 state"])
    for rule in PLAIN, OTHERWISE:
        function = cpu_kernels.build(rule, form, "serial").py_func
        afresh = numba.njit(error_model="numpy")(function)  # what comes out of the cache on disk has no text
        afresh(np.zeros((0, 7), np.int64), 0, 0, 0, in_memory(scalars))
        (code,) = afresh.inspect_llvm().values()
        assert ("@llvm.prefetch" in code) == ('"prefer-vector-width"="512"' in code) == (rule is OTHERWISE)
        if rule is OTHERWISE and binding.get_host_cpu_features().get("avx512f"):
            assert "zmm" in next(iter(afresh.inspect_asm().values()))


@pytest.mark.parametrize("name, loop, lines", [("float32", Loop(512), 16), ("float32", Loop(512, by_line=True), 4)])
def test_line_by_line_one_line_of_each_array_is_asked_for(name, loop, lines):
    form, scalars = forms.form_and_scalars(forms.FORMS[name])
    afresh = numba.njit(error_model="numpy")(cpu_kernels.build(limit.Looped(adam, loop), form, "serial").py_func)
    afresh(np.zeros((0, 7), np.int64), 0, 0, 0, in_memory(scalars))
    assert next(iter(afresh.inspect_llvm().values())).count("call void @llvm.prefetch") == lines


@pytest.mark.parametrize(
    "name, features, float32, narrow",
    [
        ("emeraldrapids", "+avx2", Loop(512, by_line=True), Loop(512, True)),
        (
            "rocketlake",
            "+avx2,+avx512fp16,+serialize",
            Loop(512, by_line=True),
            Loop(512, True),
        ),  # a Xeon that a virtual machine hides
        ("rocketlake", "+avx2,+avx512f,-avx512fp16", Loop(), Loop()),
        ("znver4", "+avx2,+avx512f", Loop(), Loop()),
        ("a later AMD", "+avx2,+avx512fp16,-serialize", Loop(), Loop()),
        ("neoverse-v2", "", Loop(), Loop()),
    ],
)
def test_a_loop_goes_as_it_was_the_fastest_on_a_processor(monkeypatch, name, features, float32, narrow):
    monkeypatch.setattr(processor, "_target", lambda: (name, set(features.split(","))))
    of_forms = [forms.form_and_scalars(forms.FORMS[form])[0] for form in ("float32", "bfloat16 state", "8-bit state")]
    found = [processor.loop_of(form) for form in of_forms]
    assert found == [float32, narrow, narrow]
    assert {float32, narrow} <= set(processor.loops())


@pytest.mark.parametrize(
    "name, n", [("float32", 16), ("float64", 8), ("all bfloat16", 32), ("bfloat16 state", 16), ("components=3", 5)]
)
def test_line_by_line_a_line_of_the_widest_array_is_asked_for_at_once(name, n):
    form, _ = forms.form_and_scalars(forms.FORMS[name])
    assert Loop(512, by_line=True).fetched(operands_of_form(form)) == n
    assert Loop(512).fetched(operands_of_form(form)) == processor.FETCHED


@pytest.mark.parametrize(
    "name, ahead, wide",
    [("where", 512, False), ("float32 + bfloat16 copy and grad", 512, True), ("components=3", 256, False)],
)
def test_arrays_of_several_sizes_of_elements_are_not_asked_for_line_by_line(monkeypatch, name, ahead, wide):
    monkeypatch.setattr(processor, "_target", lambda: ("graniterapids", set()))
    form, _ = forms.form_and_scalars(forms.FORMS[name])
    assert processor.loop_of(form) == Loop(ahead, wide)


def test_ways_to_move_the_bytes_have_names_of_their_own(monkeypatch):
    monkeypatch.setattr(processor, "_target", lambda: ("sapphirerapids", set()))
    movers = limit.movers("CPU")
    assert list(movers) == [
        "a loop", "a loop, 128 elements ahead", "a loop, 512 elements ahead", "a loop, 2048 elements ahead",
        "a loop, 512 elements ahead, line by line", "a loop of 512 bits", "a loop of 512 bits, 512 elements ahead",
    ]  # fmt: skip
    assert len({rule.__name__ for rule in movers.values()}) == len(movers)
