"""Updates of any formats as the CPU backend makes them, their bits, and arrays at any place in memory."""

import itertools

import narrow_model as model
import numpy as np
from cases import in_memory

from gpuadam.kernels import adam
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.layout import Update
from gpuadam.kernels.operands import operands_of_form
from gpuadam.kernels.view import on_cpu

KEY, STEP_KEY = -0x0123456789ABCDEF, 0x5DEECE66D0000001


def launched(form, arrays, scalars, start=0, key=KEY, step_key=STEP_KEY):
    """Update arrays on the CPU backend, and return them. They are in the order of the operands."""
    views = [on_cpu("", a).in_vectors(o.numbers) for a, o in zip(arrays, operands_of_form(form), strict=True)]
    for batch in numba_cpu.batches([Update(views, key, start)], form.arrays):
        batch.prepare(adam, form, scalars, None, step_key)
        batch.launch()
    return arrays


def copies(arrays):
    return [a.copy() for a in arrays]


def names_of(form):
    return [operand.name for operand in operands_of_form(form)]


def assert_same(form, actual, expected, context=""):
    for name, a, b in zip(names_of(form), actual, expected, strict=True):
        count = model.different(a, b)
        assert count == 0, f"{name} {context}: {count} of {a.size} differ, first at {np.flatnonzero(a != b)[:5]}"


def assert_same_in_any_split(form, arrays, scalars, expected):
    """Fail if threads, or pieces of any elements, give other bits than expected of all of it."""
    n, rng = arrays[0].size, np.random.default_rng(0)
    assert n >= numba_cpu.PARALLEL_FROM
    assert_same(form, launched(form, copies(arrays), scalars), expected, "launched")
    serial, parallel = (numba_cpu.build(adam, form, loop) for loop in ("serial", "parallel"))

    def table(arrays):
        return np.array([[n, KEY, 0, *(a.ctypes.data for a in arrays)]])

    for threads in (1, 2, 3, 7):
        own = copies(arrays)
        parallel(table(own), n, threads, STEP_KEY, in_memory(scalars))
        assert_same(form, own, expected, f"{threads} threads")
    own = copies(arrays)
    for first, last in itertools.pairwise([0, 1, 2, 5, *np.sort(rng.integers(6, n, 300)), n]):
        serial(table(own), first, last, STEP_KEY, in_memory(scalars))
    assert_same(form, own, expected, "in pieces at any element")


def placed(form, arrays, offset):
    """Return copies in one buffer of sentinel bytes, each some elements after a 64-byte boundary, and what is theirs.

    offset: of an array's number. Scales of 8-bit state, which kernels access one by one, are at a boundary.
    """
    offsets = [0 if operand.of_groups else offset(k) for k, operand in enumerate(operands_of_form(form))]
    arena = np.full(sum(a.nbytes + 256 + k * a.itemsize for a, k in zip(arrays, offsets, strict=True)) + 64, 0xA5, "u1")
    own, at, inside = [], -arena.ctypes.data % 64, np.zeros(arena.size, bool)
    for a, k in zip(arrays, offsets, strict=True):
        start = at + k * a.itemsize
        own.append(arena[start : start + a.nbytes].view(a.dtype))
        own[-1][:] = a
        inside[start : start + a.nbytes] = True
        at = -(-(start + a.nbytes) // 64) * 64 + 64
    return own, arena, inside
