"""A rule as a Numba loop over memory of the CPU.

A launch takes a table of arrays and goes through it as through one long array, so that one array and a thousand cost one call.
LLVM vectorises the loop, and the vector body, the scalar tail and any split between threads give the same bits, because every
operation is rounded by itself.
"""

import functools

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, cpu_strided, cpu_threads, numba_access, processor
from gpuadam.kernels.cpu_strided import (
    ADDRESS,
    BLOCKS,
    DIMS,
    ELEMENTS,
    HOW,
    IN_PLACE,
    ITEMSIZE,
    NDIM,
    ON_STACK,
    address,
    copy_block,
)  # fmt: skip
from gpuadam.kernels.numba_access import BLOCK, KEPT
from gpuadam.kernels.numba_memory import on_stack, store_at, tuple_at
from gpuadam.kernels.numpy_struct import KEY, PARAM, SIZE, START
from gpuadam.kernels.operands import GROUP, operands_of_form
from gpuadam.kernels.processor import CACHE_LINE


@functools.cache
def build(rule, form, loop):
    """Return the compiled kernel of a form. loop: "serial" or "parallel", after "strided " if it is for arrays of any strides."""
    if loop.endswith("parallel"):
        return cpu_threads.parallel_of(build(rule, form, loop.replace("parallel", "serial")))
    update, access = numba_access.update_of(rule, form, intrinsic), numba_access.functions(form, intrinsic)
    load, store, moved, stepped = access.load, access.store, access.moved, access.stepped
    this_loop = getattr(rule, "LOOP", processor.loop_of(form))
    AHEAD, FETCHED, MANY = this_loop.ahead, this_loop.fetched(operands_of_form(form)), processor.cached(form)
    fetch = numba_access.fetch_of(form, intrinsic, FETCHED)
    choose_vectors, store_address = numba_access.choose_vectors(intrinsic, this_loop.wide), store_at(intrinsic, types.int64)
    operands_at, scalars_at = tuple_at(intrinsic, len(operands_of_form(form))), numba_access.scalars_at(form, intrinsic)
    ITEMSIZES = [operand.itemsize for operand in operands_of_form(form)]
    PARAM_SIZE, BLOCK_SIZE = ITEMSIZES[0], cpu_strided.block_of(ITEMSIZES)
    stack_memory = on_stack(intrinsic, cpu_strided.places_of(ITEMSIZES)[1])
    addresses_memory, steps_memory = (on_stack(intrinsic, 8 * len(ITEMSIZES)) for _ in range(2))

    def serial(table, first, last, key, scalars):
        """Update the elements first ... last - 1, counted through all rows. scalars: the address of the step's, float64."""
        choose_vectors()
        s = scalars_at(scalars)
        end, many = 0, last - first > MANY
        for row in range(table.shape[0]):
            begin, end = end, end + table[row, SIZE]
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                at = operands_at(table.ctypes.data + (row * table.shape[1] + PARAM) * 8)
                row_key, index = key ^ table[row, KEY], table[row, START]
                # NumPy's large arrays start 16 bytes after a cache line, and half of LLVM's vectors would lie across two lines:
                # a tenth slower. So what is before the first line of param is a part of its own.
                line = start + min(-(table[row, PARAM] + start * PARAM_SIZE) % CACHE_LINE // PARAM_SIZE, stop - start)
                while start < stop:
                    high = (index + start) >> 32
                    end_of_part = min(line if start < line else stop, ((high + 1) << 32) - index)
                    here, first_here = moved(at, start), index + start
                    if AHEAD and many:
                        for block in range(0, end_of_part - start, FETCHED):
                            fetch(here, block + AHEAD)
                            for i in range(block, min(block + FETCHED, end_of_part - start)):
                                store(here, i, update(load(here, i), s), first_here, high, row_key)
                    else:
                        for i in range(end_of_part - start):
                            store(here, i, update(load(here, i), s), first_here, high, row_key)
                    start = end_of_part

    def strided(table, first, last, key, scalars):
        """Update the elements first ... last - 1 of arrays of any strides. table: of `cpu_strided.py`."""
        choose_vectors()
        s, stack, addresses, steps = scalars_at(scalars), stack_memory(), addresses_memory(), steps_memory()
        how, last_dim = table[0, HOW], DIMS + table[0, NDIM] - 1
        length = table[0, last_dim]
        row, i = first // length, first % length
        for k in range(1, table.shape[0]):
            store_address(steps + 8 * (k - 1), table[k, last_dim])
        while first < last:
            index = table[0, cpu_strided.START] + first
            n = min(last - first, ((index >> 32) + 1 << 32) - index)
            n = min(n, BLOCK_SIZE if how == BLOCKS else length - i)
            if how == BLOCKS:
                copy_block(table, first, n, stack, False)
            for k in range(1, table.shape[0]):
                at = stack + table[k, ON_STACK]
                if table[k, ON_STACK] == IN_PLACE:
                    at = table[k, ADDRESS] + first * table[k, ITEMSIZE]
                elif how != BLOCKS:
                    at = address(table, k, row, i)
                store_address(addresses + 8 * (k - 1), at)
            here = operands_at(addresses)
            if how == ELEMENTS:
                step = operands_at(steps)
                for j in range(n):
                    store(here, 0, update(load(here, 0), s), index + j, index >> 32, key)
                    here = stepped(here, step, 1)
            else:
                for j in range(n):
                    store(here, j, update(load(here, j), s), index, index >> 32, key)
            if how == BLOCKS:
                copy_block(table, first, n, stack, True)
            first, i = first + n, i + n
            if i == length:  # in blocks it may go beyond, and is not used
                row, i = row + 1, 0

    if form.arrays.grouped:
        serial = _over_groups(access, update, operands_at, scalars_at, choose_vectors)
    kernel = compiled_cache.named(strided if loop == "strided serial" else serial, rule.__name__, form)
    return compiled_cache.of_rule(njit(**compiled_cache.KERNEL)(kernel), rule, form)


def _over_groups(groups, update, operands_at, scalars_at, choose_vectors):
    load, units, store, magnitudes, codec = groups.load, groups.units, groups.store, groups.magnitudes, groups.codec
    scales, encode, keep, kept = groups.scales, groups.encode, groups.keep, groups.kept
    keep_largest, kept_largest, moved, ZERO = groups.keep_largest, groups.kept_largest, groups.moved, np.int32(0)
    block_memory = on_stack(intrinsic, KEPT)

    def block(at, first, count, n, start, key, memory, s):
        """Update `count` groups of n elements, and encode them."""
        for k in range(count):
            i = (first + k) * GROUP
            high = (start + i) >> 32  # of all: a parameter's groups begin at multiples of GROUP
            unit, here = units(at, first + k), moved(at, i)
            m, root = ZERO, ZERO
            for j in range(n):
                new = update(load(here, j, unit), s)
                store(here, j, new, start + i, high, key)
                keep(memory, k * GROUP + j, new)
                own_m, own_root = magnitudes(new, 1)
                m, root = max(m, own_m), max(root, own_root)
            keep_largest(memory, k, m, root)
        for k in range(count):
            i = (first + k) * GROUP
            high, here = (start + i) >> 32, moved(at, i)
            m, root = kept_largest(memory, k)
            scales(at, first + k, m, root)
            how = codec(m, root)
            for j in range(n):
                encode(here, j, kept(memory, k * GROUP + j), how, start + i, high, key)

    block = njit(error_model="numpy", inline="always")(block)

    def serial(table, first, last, key, scalars):
        """Update the groups that begin among the elements first ... last - 1, counted through all rows. scalars: as above."""
        choose_vectors()
        memory, s = block_memory(), scalars_at(scalars)
        end = 0
        for row in range(table.shape[0]):
            size = table[row, SIZE]
            begin, end = end, end + size
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                at = operands_at(table.ctypes.data + (row * table.shape[1] + PARAM) * 8)
                row_key, index = key ^ table[row, KEY], table[row, START]
                group, after = (start + GROUP - 1) // GROUP, (stop + GROUP - 1) // GROUP
                full = min(after, size // GROUP)
                while group < full:
                    count = min(BLOCK, full - group)
                    block(at, group, count, GROUP, index, row_key, memory, s)  # with a constant, which LLVM unrolls
                    group += count
                if group < after:
                    block(at, group, 1, size - group * GROUP, index, row_key, memory, s)

    return serial
