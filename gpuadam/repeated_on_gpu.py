"""Steps on a GPU that are as the last one but for the step's number, the learning rate, the gradients and what is in the arrays.

A step goes the long way first, by `update`, and its batches are kept (`remembered.py`). The next one is compared with it: the
settings and the arrays of parameters and state by identity, and of each array what its library lets change while it stays the
same object. If nothing differs, only the scalars and the launches are left to do. If anything does, the step goes the long way,
which refuses what is wrong: nothing is refused here.
"""

import itertools
import math
import operator
import threading
import weakref
from typing import Any

from . import backends, hyperparameters, remembered
from .groups import MAPPING, ONE
from .kernels import adam
from .kernels.scalars import step_key
from .kernels.view import type_name
from .repeated import NO_OPTIONS, Repeats, stays
from .step_counts import HostCount
from .update import launch

MOST_KEPT = 1024  # calls of adam_step on different arrays, in each thread


def _same(some, others):
    return len(some) == len(others) and all(map(operator.is_, some, others))


class RepeatedOnGpu(Repeats):
    """The last steps of an optimizer on a GPU. An optimizer has one."""

    def __init__(self):
        super().__init__()
        self._batches: list[Any] = []

    def note(self, optimizer, groups, updates, options):
        """Take over a step that went the long way, if the next ones may be alike. The arguments are those of `RepeatedStep`."""
        kept = optimizer.kept_batches()
        if not kept or len(groups) != 1 or len(updates) != 1 or not self.worth_a_look():
            return
        (settings,), (group,), (only,) = optimizer.groups, groups, updates
        n, held = len(group.parameters), [only.columns[0], *only.columns[2:]]
        cls, fixed = type(held[0][0]), [value for key, value in settings.items() if key not in ("lr", "params", "names")]
        name = type_name(cls)
        if (
            name not in (remembered.CUPY, remembered.NUMBA)
            or type(group.count) is not HostCount
            or group.kind is None
            or len(held[0]) != n
            or len(only.columns) != 2 + len(group.kind.kept)
            or not _same(options[1:], NO_OPTIONS)
            or not all(map(stays, (options[0], *fixed)))
            or any(type(array) is not cls for column in only.columns for array in column)
        ):
            return
        (self._changing,), (self._all,) = remembered.READ_CHANGING[name], remembered.READ_ALL[name]
        self._class, self._held, self._kind = cls, held, group.structure.kind
        self._keys, self._names, self._lr = list(settings), list(group.structure.names), list(settings).index("lr")
        self._fixed = [*options, *(settings | {"lr": None}).values()]
        self._facts_of = kept[0].backend.facts
        self._facts = self._facts_of(list(itertools.chain.from_iterable(held)))
        self._shapes = [list(map(self._changing, column)) for column in held]
        self._note_grads(only.columns[1])
        self._states = [parameter.state for parameter in group.parameters]
        self._of_state = operator.itemgetter("step", *group.kind.kept)
        self._h, self._seed = only.h.fixed, only.seed
        self._backend, self._batches, self.ready = backends.forced(optimizer.backend), kept, True

    def as_last(self, optimizer, grads, options):
        """Take the step if it is as the last one; else do nothing. options: the other arguments of `step`."""
        batches = self._batches
        if optimizer.kept_batches() is not batches:
            return False
        if len(optimizer.groups) != 1 or optimizer.under_way.changing or backends.forced(optimizer.backend) != self._backend:
            return False
        (settings,) = optimizer.groups
        if list(settings) != self._keys:
            return False
        values = list(settings.values())
        lr, values[self._lr] = values[self._lr], None
        if type(lr) is not float or not 0.0 <= lr < math.inf or not _same([*options, *values], self._fixed):
            return False
        if settings["names"] != self._names or not (grads := self._in_order(grads)):
            return False
        optimizer.arrangement.check(optimizer.groups)
        try:
            of_states = list(itertools.chain.from_iterable(map(self._of_state, self._states)))
        except KeyError:  # state was taken away
            return False
        n_kept = len(self._held)  # of each state, its step among them
        steps, held = of_states[::n_kept], [settings["params"], *(of_states[k::n_kept] for k in range(1, n_kept))]
        step = steps[0]
        if type(step) is not int or step < 0 or steps.count(step) != len(steps) or not all(map(_same, held, self._held)):
            return False
        if self._facts is not None:
            if not self._facts.unchanged():
                return False
        elif [list(map(self._changing, column)) for column in held] != self._shapes:
            return False
        if not self._like_before(grads):
            return False
        h = hyperparameters.Hyperparameters(lr, self._h)
        for batch in batches:
            form, scalars = hyperparameters.form_and_scalars(h, step + 1, batch.arrays)
            place = batch.place(None)
            if place.capturing:  # which the long way refuses
                return False
            batch.prepare(adam, form, scalars, place, step_key(self._seed, step + 1) if batch.is_random else 0)
        launch(batches, batches, (), optimizer.under_way)
        for state in self._states:
            state["step"] = step + 1
        optimizer.steps += 1
        optimizer.ended()
        return True

    def _note_grads(self, grads):
        self._grads, self._objects = list(map(self._all, grads)), list(map(weakref.ref, grads))  # none is kept alive
        self._shapes_of_grads, self._facts_of_grads = list(map(self._changing, grads)), None

    def _like_before(self, grads):
        """Whether gradients have the memory and shapes of those of the step before. Mostly they are the same objects."""
        if _same(grads, [weak() for weak in self._objects]):
            if self._facts_of_grads is not None:
                return self._facts_of_grads.unchanged()
            self._facts_of_grads = self._facts_of(
                grads
            )  # at the second step with the same objects: mostly they are new ones
            return list(map(self._changing, grads)) == self._shapes_of_grads
        if not all(type(grad) is self._class for grad in grads) or list(map(self._all, grads)) != self._grads:
            return False
        self._note_grads(grads)
        return True

    def _in_order(self, grads):
        """Return gradients in the order of the parameters, or an empty list if they are given in another form."""
        if self._kind == ONE:
            return [grads]
        if self._kind == MAPPING:
            return list(grads.values()) if type(grads) is dict and list(grads) == self._names else []
        return list(grads) if type(grads) in (list, tuple) else []


# All that checks and launches depend on of an array, without the array
READ = {
    remembered.CUPY: operator.attrgetter("data.ptr", "data.device_id", "shape", "strides", "dtype"),
    remembered.NUMBA: operator.attrgetter(
        "device_ctypes_pointer.value", "gpu_data.context.device.id", "shape", "strides", "dtype", "stream"
    ),
}


class CallsOnGpu(threading.local):
    """The batches of the last calls of adam_step in a thread, by what `READ` says of their arrays.

    It takes the place of a `remembered.Remembered`. No array is kept alive: one with the same memory, shape and dtype is as good.
    """

    def __init__(self):
        self._batches: dict[tuple, list] = {}
        self._key: Any = None

    def takes(self, array):
        """Whether arrays of this type are remembered."""
        return type_name(type(array)) in READ

    def batches(self, groups, backend):
        """Return the batches of an earlier call with the same settings on such arrays, or None."""
        self._key = None
        (group,) = groups
        arrays = list(itertools.chain.from_iterable(group.columns))
        cls = type(arrays[0])
        if any(type(array) is not cls for array in arrays):
            return None
        settings = group.operands, group.stochastic, group.nonzero, group.complex, group.components, group.h.fixed
        self._key = cls, backends.forced(backend), *settings, *map(READ[type_name(cls)], arrays)
        return self._batches.get(self._key)

    def keep(self, groups, backend, batches):
        """Take over the batches of a call: to launch them again, if that is possible, or to release them."""
        if self._key is None or not all(batch.lasts and batch.table is None for batch in batches):
            remembered.release(batches)
            return
        if len(self._batches) == MOST_KEPT:
            remembered.release(self._batches.pop(next(iter(self._batches))))
        self._batches[self._key] = batches
