"""Arrays of any strides on the CPU: blocks of elements are gathered, updated without gaps, and scattered.

LLVM makes no vectors of a loop whose steps it does not know. So an operand whose elements do not follow one another, in the order
in which the update goes through them, is copied to the stack, a block at a time, and back if it is written. One whose elements do
is taken where it is. Where all arrays are rows without gaps, as a part of a matrix, each row is updated where it is. And where
most accesses would be of copies, vectors do not pay for them: elements are updated one by one.
"""

import numpy as np
from numba import types
from numba.extending import intrinsic

from gpuadam.kernels.compiled_cache import inner
from gpuadam.kernels.layout import collapse
from gpuadam.kernels.numba_memory import load_at, store_at
from gpuadam.kernels.processor import CACHE_LINE

# The table of an update, of int64. Its first row has the number of the first element, for random rounding; how many dimensions
# there are; how it is updated; and from DIMS on the lengths of the dimensions. Each further row is an operand: its address; the
# bytes of an element; where its block is on the stack, or IN_PLACE; whether an update writes it; and its strides, in bytes.
START, NDIM, HOW = range(3)
BLOCKS, ROWS, ELEMENTS = range(3)
ADDRESS, ITEMSIZE, ON_STACK, WRITTEN, DIMS = range(5)
IN_PLACE = -1

LONG_ROW = 8  # elements from which on a row is a block of its own
STACK = 1 << 14  # bytes of all blocks, which a core's first cache holds


def block_of(itemsizes):
    """Return how many elements a block has. itemsizes: of all operands, in bytes."""
    return max(1, min(256, STACK // sum(itemsizes)))


def places_of(itemsizes):
    """Return where the blocks of operands are on the stack, and the bytes of all."""
    places, end = [], 0
    for itemsize in itemsizes:
        places.append(end)
        end += -(-block_of(itemsizes) * itemsize // CACHE_LINE) * CACHE_LINE
    return places, end


def table_of(views, written, start, in_c_order):
    """Return the table of an update. written: of each operand. in_c_order: as in `layout.collapse`."""
    itemsizes = [view.dtype.itemsize for view in views]
    shape, strides = collapse(views[0].shape, [view.strides for view in views], in_c_order)
    if not shape:
        shape, strides = (1,), [(itemsize,) for itemsize in itemsizes]
    in_place = [_is_run(shape, steps, itemsize) for steps, itemsize in zip(strides, itemsizes, strict=True)]
    in_rows = all(steps[-1] == itemsize for steps, itemsize in zip(strides, itemsizes, strict=True))
    places, _ = places_of(itemsizes)
    accesses = [1 + is_written for is_written in written]
    copied = sum(n for n, there in zip(accesses, in_place, strict=True) if not there)
    how = ROWS if in_rows and shape[-1] >= LONG_ROW else ELEMENTS if 2 * copied > sum(accesses) else BLOCKS
    rows = [[start, len(shape), how, 0, *shape]]
    for k, view in enumerate(views):
        rows.append([view.pointer, itemsizes[k], IN_PLACE if in_place[k] else places[k], written[k], *strides[k]])
    return np.array(rows, np.int64)


def _is_run(shape, strides, itemsize):
    """Whether the elements of an array follow one another without gaps."""
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride != itemsize:
            return False
        itemsize *= n
    return True


WORDS = types.uint8, types.uint16, types.uint32, types.uint64
load1, load2, load4, load8 = (load_at(intrinsic, word, align=1) for word in WORDS)
store1, store2, store4, store8 = (store_at(intrinsic, word, align=1) for word in WORDS)


@inner
def _copy(to, to_step, source, step, n, itemsize):
    """Copy n elements that lie some bytes apart."""
    if itemsize == 4:
        for i in range(n):
            store4(to + i * to_step, load4(source + i * step))
    elif itemsize == 8:
        for i in range(n):
            store8(to + i * to_step, load8(source + i * step))
    elif itemsize == 2:
        for i in range(n):
            store2(to + i * to_step, load2(source + i * step))
    elif itemsize == 1:
        for i in range(n):
            store1(to + i * to_step, load1(source + i * step))
    else:  # several numbers, of two bytes each at least
        for i in range(n):
            for j in range(0, itemsize, 2):
                store2(to + i * to_step + j, load2(source + i * step + j))


@inner
def address(table, operand, row, i):
    """Return the address of element i of a row: the rows are those of the last dimension, in the order of the others."""
    last = table[0, NDIM] - 1
    at = table[operand, ADDRESS] + i * table[operand, DIMS + last]
    for d in range(last - 1, 0, -1):
        at += row % table[0, DIMS + d] * table[operand, DIMS + d]
        row //= table[0, DIMS + d]
    return at + row * table[operand, DIMS] if last else at


@inner
def copy_block(table, first, n, stack, back):
    """Copy the elements first ... first + n - 1 to the stack, or what is written back."""
    last = table[0, NDIM] - 1
    length = table[0, DIMS + last]
    first_row, first_i = first // length, first % length
    for k in range(1, table.shape[0]):
        if table[k, ON_STACK] != IN_PLACE and (table[k, WRITTEN] or not back):
            row, i, left = first_row, first_i, n
            itemsize, step, kept = table[k, ITEMSIZE], table[k, DIMS + last], stack + table[k, ON_STACK]
            of_row = address(table, k, row, 0)
            while left:
                here, there = min(length - i, left), of_row + i * step
                if back:
                    _copy(there, step, kept, itemsize, here, itemsize)
                else:
                    _copy(kept, itemsize, there, step, here, itemsize)
                row, i, left, kept = row + 1, 0, left - here, kept + here * itemsize
                if last == 1:
                    of_row += table[k, DIMS]  # without divisions, which take longer than to copy a short row
                elif left:
                    of_row = address(table, k, row, 0)
