"""What NumPy knows of its arrays, read in compiled code: some ten nanoseconds an array, where Python needs a thousand.

An array's address, shape, dtype and flags are fields of a C struct, `PyArrayObject_fields` in numpy/ndarraytypes.h. It is part
of NumPy's binary interface, which every compiled extension relies on, and `known` compares it with what Python says before
anything else here reads it. All is read anew at every call: an array's flags and shape may change while it stays the same object.
"""

import ctypes
import functools
import itertools
import sys
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache
from gpuadam.kernels.calls import caller_at, code_of
from gpuadam.kernels.numba_memory import load_at
from gpuadam.kernels.operands import GROUP, KINDS, is_written, sharing
from gpuadam.kernels.step_objects import TYPE

# A row of a table, of int64, is an update: how many elements it has; the key and the number of the first element, for random
# rounding; and from PARAM on the addresses of its operands, in their order.
SIZE, KEY, START, PARAM = range(4)

DATA, NDIM, SHAPE, STRIDES, _BASE, DTYPE, FLAGS = (object.__basicsize__ + 8 * k for k in range(7))
C_CONTIGUOUS, F_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x2, 0x100, 0x400

NDARRAY = id(np.ndarray)
OF_C_OR_FORTRAN = 1  # what arrays may be in, for `read`

NAMES = "float64", "float32", "float16", "int16", "uint16", "uint8", "bool", "complex64", "complex128"
_formats = {id(x): x for x in map(np.dtype, NAMES)}  # by the object: NumPy has one for each dtype in native byte order

# The rows of `Columns.expected`. BYTES: of an element. LAST: the length of a last dimension of numbers of one element, or 0.
# TIMES: how many elements there are for each that the other dimensions count.
DTYPE_OBJECT, FLAGS_NEEDED, BYTES, IS_SCALE, WRITTEN, LAST, TIMES, FACTS = range(8)


class Columns(NamedTuple):
    """What the arrays of updates must be to share a table: something for each operand, in the order of the columns."""

    dtypes: tuple[str, ...]  # of numbers
    expected: np.ndarray  # int64: a column for each operand
    numbers: int = 1  # of an element
    of_complex: bool = False


def columns_like(operands, arrays, zero_grad, complex=None, components=1):
    """Return the Columns of updates whose first arrays are these; None if the dtype of one can be in no table.

    operands: their names. complex: what complex params are taken for, "joint" or "parts". components: numbers of real ones that
    share a v.
    """
    dtypes, of_complex = [array.dtype for array in arrays], arrays[0].dtype.kind == "c"
    numbers = sharing(of_complex, complex, components)
    lasts = [0] * len(arrays)
    if of_complex or numbers > 1:
        shared = [KINDS[name].shared and (numbers > 1 or name in ("lr_scale", "where")) for name in operands]
        if (of_complex and not complex) or (numbers == 1 and any(shared)):  # which have an element for two
            return None
        if any(dtype.kind == "c" and (one or not of_complex) for dtype, one in zip(dtypes, shared, strict=True)):
            return None
        whole = [one or dtype.kind == "c" for dtype, one in zip(dtypes, shared, strict=True)]
        lasts = [0 if one else 2 if of_complex else numbers for one in whole]
    elif any(dtype.kind == "c" for dtype in dtypes):
        return None
    for dtype in dtypes:
        if id(dtype) not in _formats:
            ml_dtypes = sys.modules.get("ml_dtypes")
            if ml_dtypes is None or dtype is not np.dtype(ml_dtypes.bfloat16):
                return None
            _formats[id(dtype)] = dtype  # kept alive, so that no other object gets its number
    written = [is_written(name, operands, zero_grad) for name in operands]
    times = 2 if of_complex and numbers == 1 else 1
    expected = [
        list(map(id, dtypes)),
        [ALIGNED | WRITEABLE * is_written for is_written in written],
        [dtype.itemsize * max(last, 1) // times for dtype, last in zip(dtypes, lasts, strict=True)],
        [KINDS[name].of_groups for name in operands],
        written,
        lasts,
        [times] * len(lasts),
    ]
    names = [f"float{4 * dtype.itemsize}" if dtype.kind == "c" else dtype.name for dtype in dtypes]
    return Columns(tuple(names), np.array(expected, np.int64), numbers, of_complex)


def table(columns, like, any_order=True):
    """Return the table of updates, if arrays are `known`.

    None if an array is not like the first ones, is not plain, or shares memory with another.

    columns: the params of all updates, their grads, m's, v's and so on: lists of one length. like: their Columns. Plain are
    NumPy's own arrays, aligned, of one shape in each update, writeable where an update writes, and in C order without gaps.
    any_order: all arrays of an update may be in another order instead, Fortran's or any.
    A table holds no references: the arrays must outlive it.
    """
    n, width = len(columns[0]), len(columns)
    rows = np.zeros((n, PARAM + width), np.int64)
    if n == 1 and width == 4:
        (param,), (grad,), (m,), (v,) = columns
        changed = read_four(id(param), id(grad), id(m), id(v), NDARRAY, like.expected, int(any_order), rows)
    else:
        objects = np.fromiter(map(id, itertools.chain.from_iterable(columns)), np.int64, n * width)
        changed = (read_one if n == 1 else read)(objects, NDARRAY, like.expected, int(any_order), rows)
    if changed < 0 and any_order is True and (order := order_of(columns[0])) != OF_C_OR_FORTRAN:
        return table(columns, like, order)
    return rows if changed >= 0 else None


def order_of(params):
    """Return what `read` takes for any_order, if some of these may be neither in C's nor in Fortran's order.

    The comparison of other orders is compiled when one has come: it would take a third of the time of the first step.
    """
    if all(param.flags.forc for param in params if type(param) is np.ndarray):
        return OF_C_OR_FORTRAN
    return _address_of_order()


@functools.cache
def known():
    """Whether arrays are laid out in memory as this file says."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8 or np.ndarray.__basicsize__ < FLAGS + 4:
        return False
    for array in (np.zeros((3, 5), "f4"), np.zeros((7, 2), "f8", order="F")[1:]):

        def field(offset, kind=ctypes.c_int64, array=array):
            return kind.from_address(id(array) + offset).value

        described = [field(TYPE), field(DATA), field(NDIM, ctypes.c_int32), field(DTYPE), field(FLAGS, ctypes.c_int32)]
        if described != [id(np.ndarray), array.ctypes.data, array.ndim, id(array.dtype), array.flags.num]:
            return False
        if [ctypes.c_int64.from_address(field(SHAPE) + 8 * k).value for k in range(2)] != list(array.shape):
            return False
    return True


_int64_at, _int32_at = load_at(intrinsic, types.int64), load_at(intrinsic, types.int32)


@compiled_cache.kept
def apart(starts, ends, written):
    """Return whether no extent of memory that is written overlaps another; two that are only read may."""
    order, gap = np.arange(starts.size), 1  # sorted by Shell's method: a few lines, and quick for thousands of arrays
    while gap < order.size // 3:
        gap = 3 * gap + 1
    while gap:
        for i in range(gap, order.size):
            k, j = order[i], i
            while j >= gap and starts[order[j - gap]] > starts[k]:
                order[j] = order[j - gap]
                j -= gap
            order[j] = k
        gap //= 3
    end_of_written, end_of_any = 0, 0
    for k in order:
        if starts[k] == ends[k]:  # what is empty overlaps nothing
            continue
        if starts[k] < end_of_written or (written[k] and starts[k] < end_of_any):
            return False
        end_of_any = max(end_of_any, ends[k])
        if written[k]:
            end_of_written = max(end_of_written, ends[k])
    return True


@compiled_cache.inner
def _end(rows, expected, row, k):
    """Return where the memory of an array of a table ends."""
    size = rows[row, SIZE]
    if expected[IS_SCALE, k]:
        size = (size + GROUP - 1) // GROUP
    return rows[row, PARAM + k] + size * expected[BYTES, k]


@compiled_cache.kept
def extents(rows, expected, starts, ends, written):
    """Fill in the extent of each array of a table, and whether an update writes it."""
    n = 0
    for row in range(rows.shape[0]):
        for k in range(expected.shape[1]):
            starts[n], ends[n] = rows[row, PARAM + k], _end(rows, expected, row, k)
            written[n] = expected[WRITTEN, k] != 0
            n += 1


@compiled_cache.inner
def disjoint_in_one(rows, expected):
    """Return whether no array that the only update of a table writes shares memory with another; two that are only read may.

    Of a few arrays each is compared with each: that takes a third of the time that `apart` takes to compile.
    """
    for k in range(expected.shape[1]):
        start, end = rows[0, PARAM + k], _end(rows, expected, 0, k)
        for j in range(k):
            either_written = expected[WRITTEN, k] | expected[WRITTEN, j]
            if either_written and max(start, rows[0, PARAM + j]) < min(end, _end(rows, expected, 0, j)):
                return False
    return True


@compiled_cache.inner
def disjoint(rows, expected):
    """Return likewise of a table of any number of updates."""
    n = rows.shape[0] * expected.shape[1]
    starts, ends, written = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)
    extents(rows, expected, starts, ends, written)
    return apart(starts, ends, written)


def all_disjoint(tables):
    """Return likewise of several tables. tables: (table, its Columns) pairs."""
    sizes = [rows.shape[0] * like.expected.shape[1] for rows, like in tables]
    starts, ends, written = (np.empty(sum(sizes), dtype) for dtype in (np.int64, np.int64, np.bool_))
    at = 0
    for (rows, like), n in zip(tables, sizes, strict=True):
        extents(rows, like.expected, starts[at : at + n], ends[at : at + n], written[at : at + n])
        at += n
    return apart(starts, ends, written)


@compiled_cache.kept
def in_one_order(objects, row, rows, expected, n):
    """Return whether the arrays of an update of n elements fill their memory without gaps, in the same order of dimensions."""
    first = objects[row]
    ndim, shape, strides = _int32_at(first + NDIM), _int64_at(first + SHAPE), _int64_at(first + STRIDES)
    for k in range(expected.shape[1]):
        if expected[LAST, k] or expected[IS_SCALE, k]:
            return False
        own = _int64_at(objects[k * rows.shape[0] + row] + STRIDES)
        for d in range(ndim):
            steps, of_first = _int64_at(own + 8 * d) * expected[BYTES, 0], _int64_at(strides + 8 * d) * expected[BYTES, k]
            if steps != of_first and _int64_at(shape + 8 * d) != 1:
                return False
    element = run = expected[BYTES, 0] * expected[TIMES, 0]
    for _ in range(ndim):
        for d in range(ndim):  # the dimension in which a run of so many bytes follows on the last one makes the run longer
            if _int64_at(strides + 8 * d) == run and _int64_at(shape + 8 * d) != 1:
                run *= _int64_at(shape + 8 * d)
    return run == n * element


_ORDER_TAKES = types.Array(types.int64, 1, "C"), types.int64, *[types.Array(types.int64, 2, "C")] * 2, types.int64


@functools.cache
def _address_of_order():
    """Return the address of the machine code of `in_one_order`, compiled."""
    in_one_order.compile(_ORDER_TAKES)
    return code_of(in_one_order, _ORDER_TAKES)


_call_order = caller_at(types.boolean, _ORDER_TAKES)


@compiled_cache.inner
def _described(objects, ndarray, expected, any_order, rows):
    """Fill rows; return how many of their numbers have changed, or -1 if an array is not as expected. Arguments: of `read`."""
    changed = 0
    for row in range(rows.shape[0]):
        first, ndim, n, orders = objects[row], 0, 1, C_CONTIGUOUS | F_CONTIGUOUS
        for k in range(expected.shape[1]):
            array = objects[k * rows.shape[0] + row]
            # of what is no array, nothing but the head may be read: it may be shorter
            if _int64_at(array + TYPE) != ndarray or _int64_at(array + DTYPE) != expected[DTYPE_OBJECT, k]:
                return -1
            flags, last = _int32_at(array + FLAGS), expected[LAST, k]
            if flags & expected[FLAGS_NEEDED, k] != expected[FLAGS_NEEDED, k]:
                return -1
            orders &= flags & C_CONTIGUOUS if last else flags
            if expected[IS_SCALE, k]:
                of_all = (n * expected[TIMES, 0] + GROUP - 1) // GROUP
                if _int32_at(array + NDIM) != 1 or _int64_at(_int64_at(array + SHAPE)) != of_all:
                    return -1
            else:
                own = _int32_at(array + NDIM) - (last != 0)
                if k == 0:
                    ndim = own
                if own != ndim or own < 0 or (last and _int64_at(_int64_at(array + SHAPE) + 8 * own) != last):
                    return -1
                for d in range(ndim):
                    length = _int64_at(_int64_at(array + SHAPE) + 8 * d)
                    if length != _int64_at(_int64_at(first + SHAPE) + 8 * d):
                        return -1
                    if k == 0:
                        n *= length
            start = _int64_at(array + DATA)
            changed += rows[row, PARAM + k] != start
            rows[row, PARAM + k] = start
        as_c_or_fortran = orders & C_CONTIGUOUS or (any_order and orders)
        if not (
            as_c_or_fortran or (any_order > OF_C_OR_FORTRAN and _call_order(any_order, objects, row, rows, expected, n))
        ):
            return -1
        size = n * expected[TIMES, 0]
        changed += rows[row, SIZE] != size
        rows[row, SIZE], rows[row, KEY], rows[row, START] = size, 0, 0
    return changed


@compiled_cache.inner
def _told(changed, rows, are_disjoint):
    """Return what a read has found."""
    if changed < 0 or not are_disjoint:
        rows[0, SIZE] = -1  # which no update has, so that the next read finds a change
        return -1
    return changed


@compiled_cache.kept
def read(objects, ndarray, expected, any_order, rows):
    """Fill rows, which are zeros at first; return how many of their numbers have changed since the last read.

    -1 if an array is not as expected, or one that is written shares memory with another. Memory is only compared if a number has
    changed, because that takes longer than the rest.

    objects: the addresses of the arrays' structs, column by column. ndarray: the address of their type. any_order: 0 for C's
    order alone, OF_C_OR_FORTRAN, or for any the address of `in_one_order`.
    """
    changed = _described(objects, ndarray, expected, any_order, rows)
    return _told(changed, rows, changed <= 0 or disjoint(rows, expected))


@compiled_cache.kept
def read_one(objects, ndarray, expected, any_order, rows):
    """Likewise of one update."""
    changed = _described(objects, ndarray, expected, any_order, rows)
    return _told(changed, rows, changed <= 0 or disjoint_in_one(rows, expected))


@compiled_cache.kept
def read_four(param, grad, m, v, ndarray, expected, any_order, rows):
    """Likewise of one update of four arrays, by the addresses of their structs: it takes Python less time to pass them."""
    objects = np.array((param, grad, m, v))
    changed = _described(objects, ndarray, expected, any_order, rows)
    return _told(changed, rows, changed <= 0 or disjoint_in_one(rows, expected))
