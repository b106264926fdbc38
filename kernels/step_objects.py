"""The objects that a step is given, and the memory in which compiled code finds those of the last step.

Python needs some 50 ns to look at an object, and a step of GPT-2 small has 592 arrays, in lists and dicts. Compiled code compares
them in less time (`same_objects.py`).
"""

import ctypes
import functools
import operator
import sys

import numpy as np

TYPE = object.__basicsize__ - 8  # the last field of every Python object's head
ITEMS_OF_TUPLE = tuple.__basicsize__  # where a tuple's items begin
SIZE_OF_MANY = object.__basicsize__  # where tuples and lists have their length
ITEMS_OF_LIST = object.__basicsize__ + 8  # where a list has the address of its items
LIST, TUPLE, DICT = id(list), id(tuple), id(dict)

# Where the memory of a Plan has what: int64. Behind the settings is what a kind of Plan adds.
LIST_TYPE, TUPLE_TYPE, DICT_TYPE, ROWS, WIDTH, N_SETTINGS, SETTINGS = range(7)
MOST_SETTINGS = 96
OWN = SETTINGS + MOST_SETTINGS

# What a step of several updates is given: a tuple of these. States are dicts, each with the count and the arrays of one parameter
# under the same keys, the count first. The holder is the dict or list that the parameters were given in, or else their own list.
COUNT, PARAMS, GRADS, STATES, KEYS, NAMES, NAMES_NOW, HOLDER = range(8)


@functools.cache
def known():
    """Whether tuples and lists are laid out in memory as this file says, and Python's lock keeps them what they are."""
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8 or not has_lock:
        return False
    items = [object(), object(), object()]
    in_tuple = tuple(items)

    def int64(address):
        return ctypes.c_int64.from_address(address).value

    of_tuple = [int64(id(in_tuple) + ITEMS_OF_TUPLE + 8 * k) for k in range(3)]
    of_list = [int64(int64(id(items) + ITEMS_OF_LIST) + 8 * k) for k in range(3)]
    heads = [(int64(id(x) + TYPE), int64(id(x) + SIZE_OF_MANY)) for x in (in_tuple, items)]
    return of_tuple == of_list == list(map(id, items)) and heads == [(TUPLE, 3), (LIST, 3)]


IMMUTABLE = type(None), bool, int, float, str  # types of settings that stay what they are while they are the same objects
MOST_STEPS = 1 << 53  # the formula takes the step for a float64
ANY = object()  # among the settings that a Plan expects: any object


def stays(setting):
    """Whether a setting stays what it is while it is the same object."""
    return type(setting) in IMMUTABLE or (type(setting) is tuple and all(map(stays, setting)))


def same(some, others):
    """Whether two sequences have the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


class Plan:
    """The memory that compiled code compares a step with: an address, `address`, of int64 numbers.

    width: how many arrays an update has. n_rows: of several updates, how many there are. n_own: how many numbers a kind of Plan
    adds.
    """

    def __init__(self, width, n_rows=1, n_own=0):
        self.memory = np.zeros(OWN + n_own, np.int64)
        self.memory[:SETTINGS] = LIST, TUPLE, DICT, n_rows, width, 0
        self.address = self.memory.ctypes.data
        self._settings = ()

    def expect(self, settings):
        """Take over the objects that are the settings: ANY stands for one that may be any object."""
        assert len(settings) <= MOST_SETTINGS
        addresses = [0 if x is ANY else id(x) for x in settings]
        self.memory[N_SETTINGS] = 0
        self._settings = settings  # kept alive, so that no other objects get their addresses
        self.memory[SETTINGS : SETTINGS + len(settings)] = addresses
        self.memory[N_SETTINGS] = len(settings)
