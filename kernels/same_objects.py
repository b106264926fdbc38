"""What a step is given, compared in compiled code with what the last one was given.

Compiled code reads the addresses of objects where CPython has them: in tuples and lists from memory, in dicts by a function of
Python's. It compares the settings of a step by identity, and gathers the addresses of its arrays. `numpy_struct.py` and
`cupy_struct.py` read the arrays.

It holds Python's lock while it compares, so no other thread changes or frees an object meanwhile.
"""

from numba import types
from numba.extending import intrinsic

from gpuadam.kernels import step_objects as at
from gpuadam.kernels.calls import clear_error, get_item
from gpuadam.kernels.compiled_cache import inner
from gpuadam.kernels.numba_memory import load_at, pointer_to

int64_at, pointer = load_at(intrinsic, types.int64), pointer_to(intrinsic, types.int64)


# Called by compiled code. plan: the address of a Plan's memory. Other arguments are addresses of objects.
@inner
def in_dict(x, key):
    """Return what a dict has under a key; 0 if there is nothing. PyDict_GetItem takes twice as long."""
    value = get_item(x, key)
    if value == 0:
        clear_error()  # of a key that cannot be compared
    return value


@inner
def same_settings(plan, settings):
    """Return whether a tuple has the objects that a Plan expects."""
    n = int64_at(plan + 8 * at.N_SETTINGS)
    if int64_at(settings + at.SIZE_OF_MANY) != n:
        return False
    for k in range(n):
        wanted = int64_at(plan + 8 * (at.SETTINGS + k))
        if wanted != 0 and wanted != int64_at(settings + at.ITEMS_OF_TUPLE + 8 * k):
            return False
    return True


@inner
def agrees(kept, at, x, fill):
    """Return whether a number is the one that is kept. fill: keep it."""
    if fill:
        kept[at] = x
    return kept[at] == x


@inner
def is_dict(plan, x):
    return int64_at(x + at.TYPE) == int64_at(plan + 8 * at.DICT_TYPE)


@inner
def items_of(plan, x, n):
    """Return where the items of a list or tuple of n are; 0 if it is none, or of another length."""
    kind = int64_at(x + at.TYPE)
    is_list = kind == int64_at(plan + 8 * at.LIST_TYPE)
    if (not is_list and kind != int64_at(plan + 8 * at.TUPLE_TYPE)) or int64_at(x + at.SIZE_OF_MANY) != n:
        return 0
    return int64_at(x + at.ITEMS_OF_LIST) if is_list else x + at.ITEMS_OF_TUPLE


@inner
def of_one(plan, arrays, objects):
    """Fill in the addresses of the arrays in a tuple; return whether it has as many as an update takes."""
    if int64_at(arrays + at.SIZE_OF_MANY) != len(objects):
        return False
    for k in range(len(objects)):
        objects[k] = int64_at(arrays + at.ITEMS_OF_TUPLE + 8 * k)
    return True


@inner
def of_several(plan, step, objects):
    """Fill in the addresses of the arrays of several updates, column by column; return whether all is as it has to be.

    Gradients are taken from a dict by the names, whatever else is in it.
    """
    n, width, items = int64_at(plan + 8 * at.ROWS), int64_at(plan + 8 * at.WIDTH), step + at.ITEMS_OF_TUPLE
    count, params, grads = int64_at(items + 8 * at.COUNT), int64_at(items + 8 * at.PARAMS), int64_at(items + 8 * at.GRADS)
    names, names_now = int64_at(items + 8 * at.NAMES), int64_at(items + 8 * at.NAMES_NOW)
    keys, holder = int64_at(items + 8 * at.KEYS) + at.ITEMS_OF_TUPLE, int64_at(items + 8 * at.HOLDER)
    grads_by_name, holds_by_name = is_dict(plan, grads), is_dict(plan, holder)
    param_at, name_at, name_now_at = items_of(plan, params, n), items_of(plan, names, n), items_of(plan, names_now, n)
    grad_at = name_at if grads_by_name else items_of(plan, grads, n)
    held_at = name_at if holds_by_name else items_of(plan, holder, n)
    state_at = items_of(plan, int64_at(items + 8 * at.STATES), n)
    if param_at == 0 or name_now_at == 0 or grad_at == 0 or held_at == 0:
        return False
    for k in range(0, 8 * n, 8):
        name, param, state = int64_at(name_at + k), int64_at(param_at + k), int64_at(state_at + k)
        held, grad = int64_at(held_at + k), int64_at(grad_at + k)  # or their names
        held, grad = in_dict(holder, held) if holds_by_name else held, in_dict(grads, grad) if grads_by_name else grad
        if name != int64_at(name_now_at + k) or held != param or grad == 0 or in_dict(state, int64_at(keys)) != count:
            return False
        row = k // 8
        objects[row], objects[n + row] = param, grad
        for operand in range(2, width):
            array = in_dict(state, int64_at(keys + 8 * (operand - 1)))
            if array == 0:  # it was taken away
                return False
            objects[operand * n + row] = array
    return True
