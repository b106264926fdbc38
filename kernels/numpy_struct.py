"""What NumPy knows of its arrays, read in compiled code: some ten nanoseconds an array, where Python needs a thousand.

An array's address, shape, dtype and flags are fields of a C struct, `PyArrayObject_fields` in numpy/ndarraytypes.h. It is part
of NumPy's binary interface, which every compiled extension relies on, and `known` compares it with what Python says before
anything else here reads it. All is read anew at every call: an array's flags and shape may change while it stays the same object.
"""

import ctypes
import functools
import itertools
import sys

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache

# The columns of a table, of int64: how many elements each array of an update has, and of how many bytes; the key and the number
# of the first element, for random rounding; and from PARAM on the addresses of its operands. A row is an update.
SIZE, ITEMSIZE, KEY, START, PARAM = range(5)
GRAD, M, V, MAX_V = range(PARAM + 1, PARAM + 5)
COLUMNS = MAX_V + 1

TYPE = object.__basicsize__ - 8  # the last field of every Python object's head
DATA, NDIM, SHAPE, STRIDES, _BASE, DTYPE, FLAGS = (object.__basicsize__ + 8 * k for k in range(7))
C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400

MIXED = 4 | 8
DTYPES = {4: np.dtype("float32"), 8: np.dtype("float64")}
# What a field must hold, by its address: NumPy has one object for each dtype in native byte order. An equal one is not plain.
# Then the flags that a gradient must have.
IDENTITIES = np.array([id(np.ndarray), id(DTYPES[4]), id(DTYPES[8]), C_CONTIGUOUS | ALIGNED])
GRADS_WRITTEN = IDENTITIES | [0, 0, 0, WRITEABLE]


def tables(columns, zero_grad=False):
    """Return (itemsize, table, how many elements) of the updates of each dtype; None if an array is not plain or two overlap.

    columns: the params of all updates, their grads, m's, v's and, with AMSGrad, max_v's: lists of one length. Plain are
    NumPy's own arrays, C-contiguous, aligned, of float32 or float64 in native byte order, all but the grads writeable (and
    these too with zero_grad), and of one shape and dtype in each update.
    A table holds no references: the arrays must outlive it.
    """
    if not known():
        return None
    n, width = len(columns[0]), len(columns)
    identities = GRADS_WRITTEN if zero_grad else IDENTITIES
    rows = np.zeros((n, COLUMNS), np.int64)
    if n == 1:
        (param,), (grad,), (m,), (v,), *max_v = columns
        found = read_one(id(param), id(grad), id(m), id(v), id(max_v[0][0]) if max_v else 0, width, identities, rows)
        return [(found, rows, param.size)] if found else None
    objects = np.fromiter(map(id, itertools.chain.from_iterable(columns)), np.int64, n * width)
    found = read(objects, width, identities, rows)
    if not found:
        return None
    parts = [rows] if found != MIXED else [rows[rows[:, ITEMSIZE] == itemsize] for itemsize in DTYPES]
    return [(part[0, ITEMSIZE].item(), part, part[:, SIZE].sum().item()) for part in parts]


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


def _load(kind):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.load(builder.inttoptr(args[0], context.get_value_type(kind).as_pointer()))

        return kind(types.int64), codegen

    return load


_int64_at, _int32_at = _load(types.int64), _load(types.int32)


def _stored(function):
    return compiled_cache.stored(njit(function), function.__name__)


@_stored
def apart(starts, ends, written):
    """Return whether no extent of memory that is written overlaps another; two that are only read may. They are sorted."""
    n = 0
    for k in range(starts.size):  # what is empty overlaps nothing
        if ends[k] > starts[k]:
            starts[n], ends[n], written[n] = starts[k], ends[k], written[k]
            n += 1
    gap = 1  # sorted by Shell's method: a few lines, and quick for the few thousand arrays of a program
    while gap < n // 3:
        gap = 3 * gap + 1
    while gap:
        for i in range(gap, n):
            start, end, is_written, j = starts[i], ends[i], written[i], i
            while j >= gap and starts[j - gap] > start:
                starts[j], ends[j], written[j] = starts[j - gap], ends[j - gap], written[j - gap]
                j -= gap
            starts[j], ends[j], written[j] = start, end, is_written
        gap //= 3
    end_of_written, end_of_any = 0, 0
    for i in range(n):
        if starts[i] < end_of_written or (written[i] and starts[i] < end_of_any):
            return False
        end_of_any = max(end_of_any, ends[i])
        if written[i]:
            end_of_written = max(end_of_written, ends[i])
    return True


@_stored
def disjoint(rows, grads_written=False):
    """Return whether no array that an update writes shares memory with another; two that are only read may."""
    starts, ends = np.empty(5 * rows.shape[0], np.int64), np.empty(5 * rows.shape[0], np.int64)
    written = np.empty(5 * rows.shape[0], np.bool_)
    n = 0
    for row in range(rows.shape[0]):
        n_bytes = rows[row, SIZE] * rows[row, ITEMSIZE]
        for k in range(PARAM, COLUMNS):
            if n_bytes and rows[row, k]:
                starts[n], ends[n], written[n] = rows[row, k], rows[row, k] + n_bytes, k != GRAD or grads_written
                n += 1
    return apart(starts[:n], ends[:n], written[:n])


@_stored
def read(objects, width, identities, rows):
    """Fill rows and return the arrays' itemsize, or MIXED; or 0 if an array is not plain, or overlaps another.

    objects: the addresses of the arrays' structs.
    """
    itemsizes = 0
    for row in range(rows.shape[0]):
        first, dtype, ndim, n = objects[row], 0, 0, 1
        for k in range(width):
            array = objects[k * rows.shape[0] + row]
            needed = identities[3] if k == GRAD - PARAM else C_CONTIGUOUS | ALIGNED | WRITEABLE
            # of what is no array, nothing but the head may be read: it may be shorter
            if _int64_at(array + TYPE) != identities[0] or _int32_at(array + FLAGS) & needed != needed:
                return 0
            if k == 0:
                dtype, ndim = _int64_at(first + DTYPE), _int32_at(first + NDIM)
            if _int64_at(array + DTYPE) != dtype or _int32_at(array + NDIM) != ndim:
                return 0
            for d in range(ndim):
                length = _int64_at(_int64_at(array + SHAPE) + 8 * d)
                if length != _int64_at(_int64_at(first + SHAPE) + 8 * d):
                    return 0
                if k == 0:
                    n *= length
            rows[row, PARAM + k] = _int64_at(array + DATA)
        if dtype != identities[1] and dtype != identities[2]:
            return 0
        if width == MAX_V - PARAM:
            rows[row, MAX_V] = 0
        rows[row, SIZE] = n
        rows[row, ITEMSIZE] = 4 if dtype == identities[1] else 8
        itemsizes |= rows[row, ITEMSIZE]
    return itemsizes if disjoint(rows, identities[3] & WRITEABLE != 0) else 0


@_stored
def read_one(param, grad, m, v, max_v, width, identities, rows):
    """Likewise for one update, whose arrays' structs are at these addresses: it takes Python less time to pass them."""
    return read(np.array((param, grad, m, v, max_v)), width, identities, rows)


# What is written down of an array, to be compared at the next step: where and what it is, and up to MAX_NDIM lengths and strides.
MAX_NDIM = 4
DESCRIBED = 4 + 2 * MAX_NDIM
_COMPARED = C_CONTIGUOUS | ALIGNED | WRITEABLE | 0x2  # and Fortran's order


def described(arrays):
    """Return what is written down of arrays, a row for each; None if one is not NumPy's own, or has too many dimensions."""
    rows = np.empty((len(arrays), DESCRIBED), np.int64)
    objects = np.fromiter(map(id, arrays), np.int64, len(arrays))
    return rows if known() and describe(objects, IDENTITIES, rows) else None


@_stored
def describe(objects, identities, rows):
    """Fill rows; return whether all are NumPy arrays of at most MAX_NDIM dimensions."""
    for k in range(objects.size):
        array = objects[k]
        if _int64_at(array + TYPE) != identities[0] or _int32_at(array + NDIM) > MAX_NDIM:
            return False
        ndim = _int32_at(array + NDIM)
        rows[k, 0], rows[k, 1] = _int64_at(array + DATA), ndim
        rows[k, 2], rows[k, 3] = _int64_at(array + DTYPE), _int32_at(array + FLAGS) & _COMPARED
        for d in range(MAX_NDIM):
            rows[k, 4 + d] = _int64_at(_int64_at(array + SHAPE) + 8 * d) if d < ndim else 0
            rows[k, 4 + MAX_NDIM + d] = _int64_at(_int64_at(array + STRIDES) + 8 * d) if d < ndim else 0
    return True


@_stored
def again(objects, identities, before, rows, table, itemsizes, grads_written, starts, ends, written):
    """Return whether arrays are what they were, gradients perhaps elsewhere; then table has the addresses of the gradients.

    objects: the addresses of the arrays' structs, column by column. before: what was written down of them. rows: room for it.
    itemsizes: of the columns. starts, ends, written: filled with the extent of each array, for `apart`.
    """
    if not describe(objects, identities, rows):
        return False
    n = table.shape[0]
    for k in range(itemsizes.size):
        for row in range(n):
            i = k * n + row
            for field in range(DESCRIBED):
                if rows[i, field] != before[i, field] and (field or k != GRAD - PARAM):
                    return False
            n_bytes = itemsizes[k]
            for d in range(rows[i, 1]):
                n_bytes *= rows[i, 4 + d]
            starts[i], ends[i], written[i] = rows[i, 0], rows[i, 0] + n_bytes, k != GRAD - PARAM or grads_written
            if k == GRAD - PARAM:
                table[row, GRAD] = rows[i, 0]
    return True
