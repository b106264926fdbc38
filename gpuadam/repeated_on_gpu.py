"""Steps on a GPU that are as the last one but for the step's number, lr, grad_scale, the gradients and what is in the arrays.

A step goes the long way first, by `update`, and its batches are kept (`remembered.py`). The next one is compared with it. CuPy's
arrays are read by compiled code (`kernels/cupy_struct.py`). Numba's are Python's objects: compiled code sees whether their
attributes are the same (`kernels/numba_attributes.py`), and if not, Python reads what these say. If nothing differs, only the
scalars and the launches are left to do.
"""

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from . import backends, hyperparameters, remembered
from .kernels import adam, step_objects
from .kernels.scalars import step_key
from .kernels.step_objects import same, stays
from .kernels.view import is_array, type_name
from .update import Updates, launch, prepared

MOST_STREAMS = 4  # of clipped steps, for which norms are kept
MOST_KEPT = 1024  # calls of adam_step on different arrays, in each thread


def _again(lr, grad_scale, fixed):
    """Return the Hyperparameters of another step, or None if the long way refuses them."""
    if not 0.0 <= lr < math.inf or not math.isfinite(grad_scale):
        return None
    return hyperparameters.Hyperparameters(lr + 0.0, fixed, grad_scale + 0.0)  # of -0.0 this makes 0.0, as the long way does


def prepared_again(batches, lr, grad_scale, fixed, seed, step):
    """Return batches ready to be launched with the scalars of another step; None if a graph would freeze these."""
    h = _again(lr, grad_scale, fixed)
    if h is None:
        return None
    for batch in batches:
        place = batch.place(None)
        if place.capturing:  # which the long way refuses
            return None
        form, scalars = hyperparameters.form_and_scalars(h, step, batch.arrays)
        batch.prepare(adam, form, scalars, place, step_key(seed, step) if batch.is_random else 0)
    return batches


def launch_again(batches, under_way=None):
    """Launch batches, if there are any; return whether there were."""
    if batches:
        launch(batches, under_way)
    return bool(batches)


class StepsOnGpu:
    """The plan of an optimizer's steps over arrays of CuPy or Numba: of all of them, or of a group beside others."""

    moves = 0  # an array that has moved is none of the last step's: the step goes the long way

    def __init__(self, batches, only):
        self.kept, self._fixed, self._seed = batches, only.h.fixed, only.seed
        columns, kernels = only.columns, batches[0].backend
        self.kernels = kernels
        struct, attributes = kernels.struct, kernels.attributes
        # kept alive, so that no others get their addresses; gradients are not, but their dtypes are
        self._held: tuple = columns[0], [grad.dtype for grad in columns[1]], columns[2:]
        # the ways to find out that nothing differs: what compiled code compares, and what Python reads beside
        self._ways: list[tuple[Any, ReadInPython | None]] = []
        told = struct.told(itertools.chain.from_iterable(columns)) if struct else None
        if told is not None:
            self._ways.append((kernels.gpu_step.Plan(columns, struct, told), None))
            return
        if attributes and (of_attributes := attributes.told(columns)):
            words, kept = of_attributes
            self._held += (kept,)
            self._ways.append((kernels.gpu_step.Plan(columns, attributes, words), None))
        self._ways.append((kernels.gpu_step.Plan(columns, None, None), ReadInPython(columns)))

    def expect(self, settings):
        """Take over the objects that are the settings of a step."""
        for plan, _ in self._ways:
            plan.expect(settings)

    @classmethod
    def of(cls, optimizer, k, only):
        """Return that of a step that went the long way, whose k-th Updates were these, or None if there is none for its like."""
        batches = [batch for batch in optimizer.kept_batches() or () if batch.group == k]
        cls_of_arrays = type(only.columns[0][0])
        if not batches or type_name(cls_of_arrays) not in remembered.READ or not step_objects.known():
            return None
        alike = all(type(array) is cls_of_arrays for column in only.columns for array in column)
        return cls(batches, only) if alike else None

    def own_settings(self, optimizer):
        """Return the objects that a step depends on beside those that the optimizer and the user have."""
        return backends.forced(optimizer.backend), optimizer.options, optimizer.kept_batches()

    def step(self, arrays, settings, step, lr, grad_scale, under_way):
        """Make the step if it is as the last one, and return whether it was made. The arguments are those of `cpu_step.Plan`."""
        same = self.same(arrays, settings, step, lr, grad_scale)
        return same and launch_again(self.batches(step, lr, grad_scale), under_way)

    def same(self, arrays, settings, step, lr, grad_scale):
        """Whether the step is as the last one."""
        return any(plan.same(arrays, settings) and (read is None or read.same(arrays)) for plan, read in self._ways)

    def batches(self, step, lr, grad_scale):
        """Return the batches of a step that is the same, ready to be launched; None if a graph would freeze its scalars."""
        return prepared_again(self.kept, lr, grad_scale, self._fixed, self._seed, step)

    def ended(self):
        """Do nothing: a step that was prepared keeps no array alive."""


class StepsOnDevice:
    """Steps whose scalars the device computes: of what it counts, of arrays of one number, or of the norm of the gradients."""

    def __init__(self, groups, kernels, norm, given, told):
        self._kernels, self._given, self._told = kernels, given, told
        self._groups = [Updates(group.h, group.step, [], now=group.now, seed=group.seed) for group in groups]  # less arrays
        self._norms: list[Any] = []  # for one stream each: streams share no memory
        self._at: Any = None  # the View of the norm
        if norm is not None:
            self._at = kernels.view("norm", norm)
            named = itertools.chain.from_iterable(zip(group.names, group.columns[1], strict=True) for group in groups)
            views = [kernels.view(name, grad) for name, grad in named]
            views = [view.in_parts() if view.dtype.kind == "c" else view for view in views]
            self._grads = [view._replace(array=None) for view in views]
            self._streams = [*dict.fromkeys(view.stream for view in views), self._at.stream]

    @classmethod
    def of(cls, groups, kernels, norm, given):
        """Return those of a step that went the long way, or None if what it was given cannot be read.

        groups: its Updates. kernels: the backend of all. norm: the array that the norm is written to; None if none is taken.
        given: numbers, of which some are in arrays on the device.
        """
        arrays = [x for x in (*given, norm) if is_array(x)]
        told = remembered.read(arrays, remembered.READ_ALL)
        return None if told is None else cls(groups, kernels, norm, arrays, told)

    def launches(self, plans, steps, options):
        """Return what to launch for a step that plans found to be as the last one, or None if it is another one for all that.

        steps: what `StepsOnGpu.step` takes for each plan. options: of the step.
        """
        of_groups = zip(self._groups, steps, strict=True)
        new = [_again(lr, grad_scale, group.h.fixed) for group, (_, _, _, lr, grad_scale) in of_groups]
        if None in new or remembered.read(self._given, remembered.READ_ALL) != self._told:
            return None
        if self._at:
            place = self._kernels.place(self._at.device, None, self._streams)
            if place.capturing:  # the graph would keep the table of the norm for ever
                return None
            self._norm_for(place).launch(place, self._at.pointer)  # before the step begins: it writes no array of the user's
        for group, h, step in zip(self._groups, new, steps, strict=True):
            group.h, group.step = h, step[2]
        return prepared(self._groups, [batch for plan in plans for batch in plan.kept])

    def _norm_for(self, place):
        """Return the norm of a Place's stream: one that was launched there, or a new one."""
        with self._kernels.at(self._at.device, place):
            norm = next((norm for norm in self._norms if norm.goes_on(place)), None)
        if norm is None:
            if len(self._norms) == MOST_STREAMS:
                self._norms.pop(0).release()
            norm = self._kernels.norm_again(self._grads, self._at.device)
            self._norms.append(norm)
        return norm


class ReadInPython:
    """What Python reads of the arrays of a step whose objects no compiled code knows."""

    def __init__(self, columns):
        params, grads, *state = columns
        self._held = [*params, *itertools.chain.from_iterable(state)]
        self._then = self._now(grads)

    def _now(self, grads):
        return remembered.read(self._held, remembered.READ_CHANGING), remembered.read(grads, remembered.READ_ALL)

    def same(self, step):
        """Whether arrays are what they were. step: what `same_objects.of_several` takes, known to have the same state."""
        grads = step[step_objects.GRADS]
        if type(grads) is dict:
            grads = [grads[name] for name in step[step_objects.NAMES]]
        return self._now(grads) == self._then


class Alike(NamedTuple):
    """Calls of adam_step that had the same settings: their batches by what was read of their arrays."""

    settings: tuple
    key_of: Callable  # of a tuple of arrays and the settings; None if they are others
    backend: str | None
    fixed: hyperparameters.Fixed
    seed: int
    batches: dict[Any, list]

    @classmethod
    def of(cls, settings, group, arrays, backend, kernels):
        """Return those of a call that was made. backend: the one that is forced. kernels: the `GpuBackend` that made it."""
        struct = kernels.struct
        if struct and step_objects.known() and struct.told(arrays) is not None:
            calls = kernels.gpu_step.Calls(len(arrays), struct)
            calls.expect(settings)
            key_of = calls.key
        else:
            array_type = type(arrays[0])
            read = remembered.READ[type_name(array_type)]

            def key_of(arrays, others):
                alike = same(settings, others) and all(type(array) is array_type for array in arrays)
                return tuple(map(read, arrays)) if alike else None

        return cls(settings, key_of, backend, group.h.fixed, group.seed, {})


class CallsOnGpu(threading.local):
    """The last calls of adam_step in a thread, by what is read of their arrays.

    It takes the place of a `remembered.Remembered`. No array is kept alive: one with the same memory, shape and dtype is as good.
    """

    def __init__(self):
        self._batches: dict[tuple, list] = {}
        self._key: Any = None
        self._seen: tuple = ()  # the settings, by their numbers
        self._alike: Alike | None = None
        self._told: Any = None  # of the arrays of the latest call

    def takes(self, array):
        """Whether arrays of this type are remembered."""
        return type_name(type(array)) in remembered.READ

    def does(self, arrays, settings, step, lr, grad_scale, backend):
        """Make the update if its settings are the last ones and its arrays were in a call; return whether it was made."""
        alike, self._told = self._alike, None
        if alike is None or type(step) is not int or not type(lr) is type(grad_scale) is float:
            return False
        if not 0 < step < step_objects.MOST_STEPS:
            return False
        self._told = alike.key_of(arrays, settings)
        batches = alike.batches.get(self._told)
        if batches is None or backends.forced(backend) != alike.backend:
            return False
        return launch_again(prepared_again(batches, lr, grad_scale, alike.fixed, alike.seed, step))

    def note(self, group, settings):
        """Take over Updates that were made after `does`, if their settings were also those of the call before."""
        seen = tuple(map(id, settings))
        again, self._seen = seen == self._seen, seen
        batches = self._batches.get(self._key) if again and all(map(stays, settings)) else None
        if not batches:
            return
        alike, backend = self._alike, self._key[1]
        if alike is None or self._told is None or alike.backend != backend or len(alike.batches) == MOST_KEPT:
            arrays = tuple(array for (array,) in group.columns)
            self._alike = Alike.of(settings, group, arrays, backend, batches[0].backend)
        else:
            alike.batches[self._told] = batches

    def batches(self, groups, backend):
        """Return the batches of an earlier call with the same settings on such arrays, or None."""
        self._key = None
        (group,) = groups
        arrays = list(itertools.chain.from_iterable(group.columns))
        cls = type(arrays[0])
        if any(type(array) is not cls for array in arrays):
            return None
        settings = group.operands, group.stochastic, group.nonzero, group.complex, group.components, group.h.fixed
        self._key = cls, backends.forced(backend), *settings, *map(remembered.READ[type_name(cls)], arrays)
        return self._batches.get(self._key)

    def keep(self, groups, backend, batches):
        """Take over the batches of a call: to launch them again, if that is possible, or to release them."""
        if self._key is None or not all(batch.lasts and batch.table is None for batch in batches):
            remembered.release(batches)
            return
        if len(self._batches) == MOST_KEPT:
            remembered.release(self._batches.pop(next(iter(self._batches))))
        self._batches[self._key] = batches
