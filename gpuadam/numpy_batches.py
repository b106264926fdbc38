"""Batches of NumPy's arrays, which are read in their structs by compiled code (`kernels/numpy_struct.py`)."""

from typing import Any, NamedTuple

import numpy as np

from . import backends, checks
from .kernels.operands import Arrays
from .kernels.view import Bits

IN_STRUCTS = np.ndarray, Bits


class Like(NamedTuple):
    """What the arrays of Updates must be like to be in one table."""

    columns: Any  # a numpy_struct.Columns
    arrays: Arrays
    random: bool  # whether a number is rounded randomly
    plain: bool  # whether an element is a number of NumPy's


_likes: dict[tuple, Like] = {}
_latest: dict[tuple, Like] = {}  # by `_settings_of`


def batches(groups):
    """Return the batches of Updates of NumPy arrays that pass every check; None if an array does not, or may not."""
    kernels = backends.load("numba-cpu")
    struct = kernels.numpy_struct
    made, tables = [], []
    for k, group in enumerate(groups):
        columns, rows = group.columns, None
        if type(columns[0][0]) not in IN_STRUCTS:
            return None
        # most often the latest Like fits; reading the arrays shows whether it does
        like = _latest.get(_settings_of(group))
        if like is not None:
            rows = table(group, columns, like, struct)
        if rows is None:
            columns, like = _like(group, struct)
            rows = like and table(group, columns, like, struct)
        if like is None or rows is None:
            return None
        joint = not like.plain and like.columns.of_complex and like.arrays.numbers > 1
        if joint and (group.h.fixed.ordered or like.arrays.bounded):
            return None  # which `update` refuses
        n = columns[0][0].size if like.plain and len(rows) == 1 else rows[:, struct.SIZE].sum().item()
        made.append(kernels.batch_of(rows, n, like.arrays, like.random, k, group.names))
        tables.append((rows, like.columns))
        group.like = like
    return made if len(tables) == 1 or struct.all_disjoint(tables) else None


def table(group, columns, like, struct):
    """Return the table of Updates, as `numpy_struct.table` does. columns: theirs, without `Bits`."""
    rows = struct.table(columns, like.columns, not like.random)
    if like.random and rows is not None:
        if group.keys:
            rows[:, struct.KEY] = group.keys
        if group.starts:
            rows[:, struct.START] = group.starts
    return rows


def _settings_of(group):
    """Return the settings that Updates of one table share."""
    settings = group.operands, group.bits, group.stochastic, group.h.fixed.zero_grad, group.nonzero
    return (*settings, group.complex, group.components)


def _like(group, struct):
    """Return the columns of Updates without `Bits`, and their Like by the first arrays; None if these are in no table."""
    columns, bits = list(group.columns), list(group.bits or [""] * len(group.columns))
    for k, column in enumerate(columns):
        if all(type(array) is Bits and array.format == column[0].format for array in column):
            columns[k], bits[k] = [array.array for array in column], column[0].format
    first = [column[0] for column in columns]
    if not struct.known() or not all(type(array) is np.ndarray for array in first):
        return columns, None
    settings = _settings_of(group)
    key = *settings, tuple(bits), *[id(array.dtype) for array in first]
    like = _likes.get(key)
    if like is None:
        like_first = struct.columns_like(group.operands, first, group.h.fixed.zero_grad, group.complex, group.components)
        arrays = like_first and _arrays_of_dtypes(group, like_first, bits)
        if arrays is None:
            return columns, None
        like = _likes[key] = Like(like_first, arrays, arrays.random, not like_first.of_complex and arrays.numbers == 1)
    if not any(type(column[0]) is Bits for column in group.columns):
        _latest[settings] = like
    return columns, like


def _arrays_of_dtypes(group, columns, bits):
    """Return the `operands.Arrays` of Updates with NumPy arrays of Columns, or None if `checks.formats` refuses them."""
    formats = dict(zip(group.operands, columns.dtypes, strict=True))
    for operand, format in zip(group.operands, bits, strict=False):
        if format:
            if format not in ("bfloat16", "float16") or formats[operand] not in ("int16", "uint16"):
                return None
            formats[operand] = format
    try:
        named = {operand: _Named(operand, format) for operand, format in formats.items()}
        checks.formats(named, group.nonzero, columns.numbers)
    except TypeError:  # which `update` reports by the array's name
        return None
    return Arrays.of(formats, group.stochastic, group.nonzero, columns.numbers)


class _Named(NamedTuple):
    """As much of a View as `checks.formats` needs."""

    name: str
    format: str
    dtype: np.dtype = np.dtype("uint8")
    of_complex: str = ""
