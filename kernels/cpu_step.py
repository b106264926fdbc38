"""A step of NumPy arrays in one compiled call, for programs that take the same step again and again.

Python needs ten times as long for a step of 1,000 elements as their update takes. So what stays the same from step to step is
kept in a `Plan`: the objects that were the settings, what the arrays must be like, the kernel, the scalars that do not change.
One call of its compiled code then does the rest: it compares the settings by identity, reads and checks the arrays
(`numpy_struct.py`), computes the scalars by THE FORMULA of `scalars.py`, and launches the kernel. If anything is not as before it
has done nothing, and says so; the step then takes the long way, which knows what to refuse and how.

The call holds Python's lock, because it reads Python's objects. It lets the lock go while several threads make a large update.
If it may not start threads, it leaves the update to its caller, and keeps the arrays alive until that is made.
"""

import functools

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from gpuadam.kernels import adam, compiled_cache, cpu_threads, step_objects
from gpuadam.kernels.adam import Scalars
from gpuadam.kernels.calls import c_function, caller_at, code_of, decref, incref
from gpuadam.kernels.numba_memory import load_at, on_stack, store_at
from gpuadam.kernels.numpy_struct import FACTS, NDARRAY, OF_C_OR_FORTRAN, PARAM, SIZE, order_of, read, read_one
from gpuadam.kernels.operands import KINDS
from gpuadam.kernels.same_objects import int64_at, of_one, of_several, pointer, same_settings
from gpuadam.kernels.scalars import on_host
from gpuadam.kernels.step_objects import OWN, ROWS, WIDTH

# What a call returns: the step is another one; it is done; its table and scalars are ready, and the launch is left to the caller
OTHER, DONE, READY = range(3)
# Where the memory of a Plan has what: int64. Behind it are `expected`, the table, the scalars, the addresses of the arrays, and
# those of the parameters of several updates. MOVES: how many calls have found arrays elsewhere than the one before. ELEMENTS: of
# the last call's update. IN_THREADS: the loop in several threads, 0 if there is none.
ARRAY_TYPE, KERNEL, MOST, BEGINS, ANY_ORDER, MOVES, ELEMENTS, IN_THREADS, COUNTER, SAFE_AT = range(OWN, OWN + 10)
EXPECTED, TABLE, NUMBERS, OBJECTS, PARAMS, HELD, HEAD = range(OWN + 10, OWN + 17)
# Where its numbers have what: float64. The last are the scalars of the kernel.
LOWEST, BETA1, BETA2, WEIGHT_DECAY, EPS, SIGN, MOST_SCALE, SCALARS = range(8)
# What a call reads: the arrays of one update, those of several, or none
ARRAYS_OF_ONE, ARRAYS, NO_ARRAY = range(3)
VARYING = "grad_scale", "decay", "inv_sqrt_bias2", "eps", "neg_lr"  # among the kernel's scalars
# A grad_scale of this size or its inverse overflows no compute type, and rounds to 0 in none.
LARGEST_SCALE = 1e30


class Plan(step_objects.Plan):
    """The compiled step of updates of one kind.

    like: the `numpy_struct.Columns` of the arrays. If one is rounded randomly, which takes a key, the caller has to make the
    launches. kernel: the serial loop of the form, which has been called. formula: (variant, decoupled) of `scalars.on_host`.
    numbers: the first ones of NUMBERS, up to MOST_SCALE: SIGN is that of grad_scale, -1 to maximize; MOST_SCALE is LARGEST_SCALE,
    or 1 for a kernel that takes no other.
    scalars: those of a step, of which the call computes VARYING. begins: the first step for which these scalars hold. most:
    with so many elements or more, several threads make the update; 0 leaves all launches to the caller. n_rows: of several
    updates, how many there are. table: of updates whose arrays the caller has compared, and whose gradients' addresses it puts
    there; the call reads no array. any_order: whether all arrays of an update may be in an order other than C's. params:
    those of several updates, which have to stay the same.
    """

    def __init__(
        self, like, form, kernel, formula, numbers, scalars, begins, most, n_rows=None, table=None, any_order=True, params=()
    ):
        width = like.expected.shape[1]
        reads = NO_ARRAY if table is not None else ARRAYS_OF_ONE if n_rows is None else ARRAYS
        n_rows = n_rows or 1
        sizes = like.expected.size, n_rows * (PARAM + width), SCALARS + adam.MOST_SCALARS, n_rows * width, len(params)
        expected, table_at, of_numbers, objects, params_at, end = (HEAD + sum(sizes[:k]) for k in range(6))
        super().__init__(width, n_rows, end - OWN)
        at = [self.address + 8 * k for k in (expected, table_at, of_numbers, objects, params_at)]
        # the arrays of a step of several updates that is READY. They are let go by `held.fill(None)`
        self.held = np.empty(n_rows * width if reads == ARRAYS else 0, object)
        self.memory[ARRAY_TYPE:MOVES] = NDARRAY, code_of(kernel, OF_A_KERNEL), most, begins, any_order
        self.memory[EXPECTED:HEAD] = *at, self.held.ctypes.data
        self.memory[expected:table_at] = like.expected.ravel()
        self.table = self.memory[table_at:of_numbers].reshape(n_rows, PARAM + width)
        if table is not None:
            self.table[...] = table
        floats = self.memory[of_numbers:objects].view(np.float64)
        floats[:SCALARS], self.scalars = numbers, floats[SCALARS : SCALARS + len(scalars)]
        self.scalars[...] = scalars
        self.scalars_at = at[2] + 8 * SCALARS
        self.memory[params_at:end] = [id(param) for param in params]
        self._kept = [like, kernel, params, cpu_threads.safe]  # whose memory the compiled code knows
        self.form = form
        self._call, self.rehearsed = compiled(*formula, reads), False

    @property
    def elements(self):
        """How many elements the last call's update has."""
        return self.memory[ELEMENTS].item()

    def rehearse(self):
        """Make a call that finds other settings and does nothing: it compiles the call, which may fail or be interrupted."""
        self._call(self.address, id(()), id(()), 0, 0.0, 0.0)
        self.rehearsed = True

    def take_orders(self, params):
        """Let calls take arrays in the orders of memory that parameters have, if they may be in another than C's."""
        if self.memory[ANY_ORDER] == OF_C_OR_FORTRAN:
            self.memory[ANY_ORDER] = order_of(params)

    def take_threads(self, build):
        """Let calls start threads, if the loop in threads has been compiled. build: of `cpu_kernels`."""
        if self.memory[IN_THREADS] or not self.memory[MOST] or not cpu_threads.numba_threads_are_safe():
            return
        loop = build(adam, self.form, "parallel")
        if OF_A_KERNEL in getattr(loop, "overloads", ()):
            self._kept.append(loop)
            self.memory[COUNTER], self.memory[SAFE_AT] = cpu_threads.counter_at(), cpu_threads.safe.ctypes.data
            self.memory[IN_THREADS] = code_of(loop, OF_A_KERNEL)

    def step(self, arrays, settings, t, lr, grad_scale):
        """Return DONE, READY or OTHER. Of updates beside others, one call at a time: threads take turns (`gpuadam/under_way.py`).

        arrays: a tuple of the arrays of one update; of several, what `same_objects.of_several` takes; anything if there is a
        table. settings: a tuple. t: the step, from 1. lr, grad_scale: floats.
        """
        return self._call(self.address, id(arrays), id(settings), t, lr, grad_scale)


def takes(grad_scale):
    """Whether a kernel that multiplies the gradient takes this: else the long way has to round it, or to refuse it."""
    return grad_scale == 1.0 or 1.0 / LARGEST_SCALE < abs(grad_scale) < LARGEST_SCALE


# The arguments of a kernel: table, first, last, key and the address of its scalars; in threads table, n, n_threads, key and these
OF_A_KERNEL = types.Array(types.int64, 2, "C"), *[types.int64] * 4

_float64_at = load_at(intrinsic, types.float64)
_store, _store_count = (store_at(intrinsic, kind) for kind in (types.float64, types.int64))
_launch, _launch_in_threads = (caller_at(types.none, OF_A_KERNEL, unlocked) for unlocked in (False, True))
_count_threads = c_function(0)


@compiled_cache.inner
def of_none(plan, arrays, objects):
    return True


@compiled_cache.inner
def read_none(objects, array_type, expected, any_order, table):
    return 0


@functools.cache
def _formula(variant, decoupled):
    """Return the functions of a Formula, compiled."""
    formula = on_host(variant, decoupled)
    return [compiled_cache.compiler(variant, decoupled)(function) for function in (formula.powers, formula.of_step)]


@functools.cache
def compiled(variant, decoupled, reads):
    """Return the compiled call of a Plan. reads: what it reads, one of ARRAYS_OF_ONE, ARRAYS and NO_ARRAY."""
    key, (powers, of_step) = (variant, decoupled, reads), _formula(variant, decoupled)
    gather, read_all = {ARRAYS_OF_ONE: (of_one, read_one), ARRAYS: (of_several, read), NO_ARRAY: (of_none, read_none)}[reads]
    of_one_update, of_several_updates = reads == ARRAYS_OF_ONE, reads == ARRAYS
    memory_of_row, MOST_SCALARS = on_stack(intrinsic, 8 * (PARAM + len(KINDS) + adam.MOST_SCALARS)), adam.MOST_SCALARS
    GRAD_SCALE, DECAY, INV_SQRT_BIAS2, NEW_EPS, NEG_LR = (SCALARS + Scalars._fields.index(name) for name in VARYING)

    def step(plan, arrays, settings, t, lr, grad_scale):
        if t < int64_at(plan + 8 * BEGINS) or not 0.0 <= lr < np.inf or not same_settings(plan, settings):
            return OTHER
        n_rows, width = int64_at(plan + 8 * ROWS), int64_at(plan + 8 * WIDTH)
        objects = carray(pointer(int64_at(plan + 8 * OBJECTS)), n_rows * width)
        if not gather(plan, arrays, objects):
            return OTHER
        if of_several_updates:
            for k in range(n_rows):
                if objects[k] != int64_at(int64_at(plan + 8 * PARAMS) + 8 * k):
                    return OTHER
        expected = carray(pointer(int64_at(plan + 8 * EXPECTED)), (FACTS, width))
        table = carray(pointer(int64_at(plan + 8 * TABLE)), (n_rows, PARAM + width))
        moved = read_all(objects, int64_at(plan + 8 * ARRAY_TYPE), expected, int64_at(plan + 8 * ANY_ORDER), table)
        if moved < 0:
            return OTHER
        if moved:
            _store_count(plan + 8 * MOVES, int64_at(plan + 8 * MOVES) + 1)
        numbers = int64_at(plan + 8 * NUMBERS)
        scale, most_scale = _float64_at(numbers + 8 * SIGN) * grad_scale, _float64_at(numbers + 8 * MOST_SCALE)
        if scale != 1.0 and not 1.0 / most_scale < abs(scale) < most_scale:
            return OTHER
        beta2, weight_decay = _float64_at(numbers + 8 * BETA2), _float64_at(numbers + 8 * WEIGHT_DECAY)
        power1, power2 = powers(t, _float64_at(numbers + 8 * BETA1), beta2)
        eps = _float64_at(numbers + 8 * EPS)
        lr += 0.0  # of -0.0 this makes 0.0, as the long way does
        decay, inv_sqrt_bias2, eps, neg_lr = of_step(t, power1, power2, lr, beta2, weight_decay, eps)
        lowest = _float64_at(numbers + 8 * LOWEST)
        if decay < lowest or neg_lr < lowest:
            return OTHER
        _store(numbers + 8 * GRAD_SCALE, scale)
        _store(numbers + 8 * DECAY, decay)
        _store(numbers + 8 * INV_SQRT_BIAS2, inv_sqrt_bias2)
        _store(numbers + 8 * NEW_EPS, eps)
        _store(numbers + 8 * NEG_LR, neg_lr)
        elements = 0
        for row in range(n_rows):
            elements += table[row, SIZE]
        _store_count(plan + 8 * ELEMENTS, elements)
        if elements < int64_at(plan + 8 * MOST):
            _launch(int64_at(plan + 8 * KERNEL), table, 0, elements, 0, numbers + 8 * SCALARS)
            return DONE
        if of_several_updates:
            for k in range(n_rows * width):
                incref(objects[k])
        in_threads = int64_at(plan + 8 * IN_THREADS)
        if in_threads == 0 or int64_at(int64_at(plan + 8 * SAFE_AT)) == 0:
            if of_several_updates:
                held = carray(pointer(int64_at(plan + 8 * HELD)), n_rows * width)
                for k in range(n_rows * width):
                    before, held[k] = held[k], objects[k]
                    decref(before)
            return READY
        if of_one_update:  # another thread may make a call of this Plan meanwhile
            own = memory_of_row()
            row = carray(pointer(own), (1, PARAM + width))
            for k in range(PARAM + width):
                row[0, k] = table[0, k]
            own += 8 * (PARAM + width)
            for k in range(MOST_SCALARS):
                _store(own + 8 * k, _float64_at(numbers + 8 * (SCALARS + k)))
            table, numbers = row, own - 8 * SCALARS
        n_threads = _count_threads(int64_at(plan + 8 * COUNTER))
        _launch_in_threads(in_threads, table, elements, n_threads, 0, numbers + 8 * SCALARS)
        if of_several_updates:
            for k in range(n_rows * width):
                decref(objects[k])
        return DONE

    return compiled_cache.kept(step, *key, error_model="numpy")


_float32_at, _store_float32 = load_at(intrinsic, types.float32), store_at(intrinsic, types.float32)


@compiled_cache.kept
def common_count(addresses):
    """Return the number that the float32 at all addresses are, or -1."""
    count = _float32_at(addresses[0])
    for k in range(1, addresses.size):
        if _float32_at(addresses[k]) != count:
            return np.float32(-1)
    return count


@compiled_cache.kept
def advance(addresses):
    """Add 1 to the float32 at all addresses."""
    for k in range(addresses.size):
        _store_float32(addresses[k], _float32_at(addresses[k]) + np.float32(1))
