"""A step of NumPy arrays in one compiled call, for programs that take the same step again and again.

Python needs ten times as long for a step of 1,000 elements as their update takes. So what stays the same from step to step is
kept in a `Plan`: the objects that were the settings, what the arrays must be like, the kernel, the scalars that do not change.
One call of its compiled code then does the rest: it compares the settings by identity, reads and checks the arrays
(`numpy_struct.py`), computes the scalars by THE FORMULA of `scalars.py`, and launches the kernel. If anything is not as before it
has done nothing, and says so; the step then takes the long way, which knows what to refuse and how.

The call holds Python's lock, because it reads Python's objects. So an update that is worth several threads is not made here.
"""

import ctypes
import functools
import sys

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from gpuadam.kernels import compiled_cache, llvm
from gpuadam.kernels.adam import Scalars
from gpuadam.kernels.numba_memory import load_at, store_at
from gpuadam.kernels.numpy_struct import FACTS, NDARRAY, PARAM, SIZE, TYPE, read, read_one
from gpuadam.kernels.scalars import on_host

# What a call returns: the step is another one; it is done; it is one for several threads, and its table and scalars are ready; it
# was cut short, because the kernel found no memory
OTHER, DONE, LARGE, CUT_SHORT = range(4)
# Where the head of a Plan's memory has what: int64. Behind it are the settings, then `expected`, the table and the scalars.
ARRAY_TYPE, LIST_TYPE, KERNEL, MOST, BEGINS, ROWS, WIDTH, N_SETTINGS, EXPECTED, TABLE, NUMBERS, HEAD = range(12)
# Where its numbers have what: float64. The last are the scalars of the kernel.
LOWEST, BETA1, BETA2, WEIGHT_DECAY, EPS, SCALARS = range(6)
VARYING = "decay", "inv_sqrt_bias2", "eps", "neg_lr"  # among the kernel's scalars
MOST_STEPS = 1 << 53  # the formula takes the step for a float64

ITEMS_OF_TUPLE = tuple.__basicsize__  # where a tuple's items begin
SIZE_OF_MANY = object.__basicsize__  # where tuples and lists have their length
ITEMS_OF_LIST = object.__basicsize__ + 8  # where a list has the address of its items
LIST, TUPLE = id(list), id(tuple)


@functools.cache
def known():
    """Whether tuples and lists are laid out in memory as this file says."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    items = [object(), object(), object()]
    in_tuple = tuple(items)

    def int64(address):
        return ctypes.c_int64.from_address(address).value

    of_tuple = [int64(id(in_tuple) + ITEMS_OF_TUPLE + 8 * k) for k in range(3)]
    of_list = [int64(int64(id(items) + ITEMS_OF_LIST) + 8 * k) for k in range(3)]
    heads = [(int64(id(x) + TYPE), int64(id(x) + SIZE_OF_MANY)) for x in (in_tuple, items)]
    return of_tuple == of_list == list(map(id, items)) and heads == [(TUPLE, 3), (LIST, 3)]


ANY = object()  # among the settings that a Plan expects: any object
MOST_SETTINGS = 96


class Plan:
    """The compiled step of updates of one kind.

    like: the `numpy_struct.Columns` of the arrays, of which none is rounded randomly. kernel: a serial loop of `cpu_kernels`
    that has been called. formula: (variant, decoupled) of `scalars.on_host`. numbers: the first ones of NUMBERS, up to EPS.
    scalars: those of a step, of which the call computes VARYING. begins: the first step with these scalars. most: from how many
    elements on the call leaves the launch to several threads. n_rows: of several updates, how many there are.
    """

    def __init__(self, like, kernel, formula, numbers, scalars, begins, most, n_rows=None):
        width, n = like.expected.shape[1], len(scalars)
        several, n_rows = n_rows is not None, n_rows or 1
        sizes = MOST_SETTINGS, like.expected.size, n_rows * (PARAM + width), SCALARS + n
        expected, table, of_numbers, end = (HEAD + sum(sizes[:k]) for k in range(1, 5))
        self.memory = np.zeros(end, np.int64)
        address = self.memory.ctypes.data
        at = [address + 8 * k for k in (expected, table, of_numbers)]
        self.memory[:HEAD] = NDARRAY, LIST, address_of(kernel, n), most, begins, n_rows, width, 0, *at
        self.memory[expected:table] = like.expected.ravel()
        self.table = self.memory[table:of_numbers].reshape(n_rows, PARAM + width)
        floats = self.memory[of_numbers:].view(np.float64)
        floats[:SCALARS], floats[SCALARS:] = numbers, scalars
        self.scalars = floats[SCALARS:]
        self._kept = like, kernel  # whose memory the compiled code knows
        self._settings, self._address, self._call = (), address, compiled(*formula, n, several)
        self.rehearsed = False

    def expect(self, settings):
        """Take over the objects that are the settings: ANY stands for one that may be any object."""
        addresses = [0 if x is ANY else id(x) for x in settings]
        self.memory[N_SETTINGS] = 0
        self._settings = settings  # kept alive, so that no other objects get their addresses
        self.memory[HEAD : HEAD + len(settings)] = addresses
        self.memory[N_SETTINGS] = len(settings)

    def rehearse(self):
        """Make a call that finds other settings and does nothing: it compiles the call, which may fail or be interrupted."""
        self._call(self._address, id(()), id(()), 0, 0.0)
        self.rehearsed = True

    def step(self, arrays, settings, t, lr):
        """Return DONE, LARGE or OTHER. Raise MemoryError if the step was cut short.

        arrays: a tuple of the arrays of one update; or, of several, (count, params, gradients, states, *more): lists, of states
        one of tuples (count, *arrays), where each count has to be the same object, and more are pairs of lists that have to have
        the same objects. settings: a tuple. t: the step, from 1. lr: a float.
        """
        status = self._call(self._address, id(arrays), id(settings), t, lr)
        if status == CUT_SHORT:
            raise MemoryError("a loop found no memory for itself, and its step was cut short")
        return status


def address_of(kernel, n):
    """Return the address of the machine code of a kernel that has been called with n scalars, and perhaps with other types."""
    signature = *OF_A_KERNEL, *[types.float64] * n
    made = kernel.overloads[signature]
    return made.library.get_pointer_to_function(made.fndesc.llvm_func_name)


_int64_at, _float64_at = load_at(intrinsic, types.int64), load_at(intrinsic, types.float64)
_store = store_at(intrinsic, types.float64)
_pointer = llvm.function(
    intrinsic, "pointer", lambda b, address: b.inttoptr(address, ir.IntType(8).as_pointer()), types.voidptr(types.int64)
)
OF_A_KERNEL = (
    types.Array(types.int64, 2, "C"),
    types.int64,
    types.int64,
    types.int64,
)  # table, first, last, key; then its scalars


def _launching(n):
    """Return a function that calls a kernel of n scalars at an address, and returns 0 if it ended well."""
    arguments = *OF_A_KERNEL, *[types.float64] * n

    def codegen(context, b, signature, args):
        kernel, table, elements, scalars = args
        kind = context.call_conv.get_function_type(types.none, arguments)
        start = b.inttoptr(scalars, llvm.F64.as_pointer())
        numbers = [b.load(b.gep(start, [llvm.U64(k)])) for k in range(n)]
        values = [table, llvm.U64(0), elements, llvm.U64(0), *numbers]
        # Numba's functions take the places of a result and of an error before their arguments
        places = [cgutils.alloca_once_value(b, ir.Constant(place.pointee, None)) for place in kind.args[:2]]
        packed = context.get_arg_packer(arguments).as_arguments(b, values)
        return b.sext(b.call(b.inttoptr(kernel, kind.as_pointer()), [*places, *packed]), llvm.U64)

    @intrinsic
    def launch(typingctx, kernel, table, elements, scalars):
        return types.int64(types.int64, arguments[0], types.int64, types.int64), codegen

    return launch


@functools.cache
def compiled(variant, decoupled, n_scalars, several):
    """Return the compiled call of a Plan. several: whether there are several updates."""
    formula, launch = on_host(variant, decoupled), _launching(n_scalars)
    quick = njit(**compiled_cache.INNER)
    read_all = read if several else read_one
    powers, of_step, gather = quick(formula.powers), quick(formula.of_step), quick(_of_several if several else _of_one)
    DECAY, INV_SQRT_BIAS2, NEW_EPS, NEG_LR = (SCALARS + Scalars._fields.index(name) for name in VARYING)

    def step(plan, arrays, settings, t, lr):
        n = _int64_at(plan + 8 * N_SETTINGS)
        if _int64_at(settings + SIZE_OF_MANY) != n:
            return OTHER
        for k in range(n):
            wanted = _int64_at(plan + 8 * (HEAD + k))
            if wanted != 0 and wanted != _int64_at(settings + ITEMS_OF_TUPLE + 8 * k):
                return OTHER
        n_rows, width = _int64_at(plan + 8 * ROWS), _int64_at(plan + 8 * WIDTH)
        objects = np.empty(n_rows * width, np.int64)
        if (
            t < _int64_at(plan + 8 * BEGINS)
            or not 0.0 <= lr < np.inf
            or not gather(arrays, n_rows, width, _int64_at(plan + 8 * LIST_TYPE), objects)
        ):
            return OTHER
        expected = carray(_pointer(_int64_at(plan + 8 * EXPECTED)), (FACTS, width), np.int64)
        table = carray(_pointer(_int64_at(plan + 8 * TABLE)), (n_rows, PARAM + width), np.int64)
        if not read_all(objects, _int64_at(plan + 8 * ARRAY_TYPE), expected, True, table):
            return OTHER
        numbers = _int64_at(plan + 8 * NUMBERS)
        beta2, weight_decay = _float64_at(numbers + 8 * BETA2), _float64_at(numbers + 8 * WEIGHT_DECAY)
        power1, power2 = powers(t, _float64_at(numbers + 8 * BETA1), beta2)
        eps = _float64_at(numbers + 8 * EPS)
        lr += 0.0  # of -0.0 this makes 0.0, as the long way does
        decay, inv_sqrt_bias2, eps, neg_lr = of_step(t, power1, power2, lr, beta2, weight_decay, eps)
        lowest = _float64_at(numbers + 8 * LOWEST)
        if decay < lowest or neg_lr < lowest:
            return OTHER
        _store(numbers + 8 * DECAY, decay)
        _store(numbers + 8 * INV_SQRT_BIAS2, inv_sqrt_bias2)
        _store(numbers + 8 * NEW_EPS, eps)
        _store(numbers + 8 * NEG_LR, neg_lr)
        elements = 0
        for row in range(n_rows):
            elements += table[row, SIZE]
        if elements >= _int64_at(plan + 8 * MOST):
            return LARGE
        ended = launch(_int64_at(plan + 8 * KERNEL), table, elements, numbers + 8 * SCALARS)
        return DONE if ended == 0 else CUT_SHORT

    return compiled_cache.stored(njit(error_model="numpy")(step), "step", variant, decoupled, n_scalars, several)


def _of_one(arrays, n_rows, width, list_type, objects):
    """Fill in the addresses of the arrays in a tuple; return whether it has as many as an update takes."""
    if _int64_at(arrays + SIZE_OF_MANY) != width:
        return False
    for k in range(width):
        objects[k] = _int64_at(arrays + ITEMS_OF_TUPLE + 8 * k)
    return True


def _of_several(arrays, n_rows, width, list_type, objects):
    """Fill in the addresses of the arrays of several updates, column by column; return whether all is as it has to be.

    arrays: the address of (count, params, gradients, states, *more), as in `Plan.step`.
    """
    items = arrays + ITEMS_OF_TUPLE
    for k in range(1, _int64_at(arrays + SIZE_OF_MANY)):
        one = _int64_at(items + 8 * k)
        if _int64_at(one + TYPE) != list_type or _int64_at(one + SIZE_OF_MANY) != n_rows:
            return False
    for k in range(4, _int64_at(arrays + SIZE_OF_MANY), 2):
        one = _int64_at(_int64_at(items + 8 * k) + ITEMS_OF_LIST)
        other = _int64_at(_int64_at(items + 8 * (k + 1)) + ITEMS_OF_LIST)
        for row in range(n_rows):
            if _int64_at(one + 8 * row) != _int64_at(other + 8 * row):
                return False
    count = _int64_at(items)
    params = _int64_at(_int64_at(items + 8) + ITEMS_OF_LIST)
    grads = _int64_at(_int64_at(items + 16) + ITEMS_OF_LIST)
    states = _int64_at(_int64_at(items + 24) + ITEMS_OF_LIST)
    for row in range(n_rows):
        state = _int64_at(states + 8 * row) + ITEMS_OF_TUPLE
        if _int64_at(state) != count:
            return False
        objects[row], objects[n_rows + row] = _int64_at(params + 8 * row), _int64_at(grads + 8 * row)
        for k in range(2, width):
            objects[k * n_rows + row] = _int64_at(state + 8 * (k - 1))
    return True


def _stored(function):
    return compiled_cache.stored(njit(function), function.__name__)


_float32_at, _store_float32 = load_at(intrinsic, types.float32), store_at(intrinsic, types.float32)


@_stored
def common_count(addresses):
    """Return the number that the float32 at all addresses are, or -1."""
    count = _float32_at(addresses[0])
    for k in range(1, addresses.size):
        if _float32_at(addresses[k]) != count:
            return np.float32(-1)
    return count


@_stored
def advance(addresses):
    """Add 1 to the float32 at all addresses."""
    for k in range(addresses.size):
        _store_float32(addresses[k], _float32_at(addresses[k]) + np.float32(1))
