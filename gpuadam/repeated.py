"""Steps that are as the last one but for the step's number, the learning rate and what is in the arrays.

Most programs take the same step again and again. At first it goes the long way, by `update`. If it was one of NumPy arrays, the
next ones are compared with it, checked and done in one compiled call (`kernels/cpu_step.py`), and go the long way again as soon
as anything differs: so nothing is refused here. This file says what a step has to have in common with the last one.
"""

import operator
from typing import Any

import numpy as np

from . import backends, hyperparameters
from .groups import MAPPING, ONE
from .kernels import adam
from .update import Updates, known_like, launch

IMMUTABLE = type(None), bool, int, float, str  # types of settings that stay what they are while they are the same objects
NO_OPTIONS = None, None, False, None, None, None, None, False, None  # of `Adam.step`, but for grad_scale
KEPT = 64  # plans of calls of adam_step


def plan_of(group: Updates, n_rows=None):
    """Return a `cpu_step.Plan` for Updates that were made, or None if there is none for their like. n_rows: as in Plan."""
    like, fixed = known_like(group), group.h.fixed
    kernels = backends.load("numba-cpu")
    if like is None or like.random or like.arrays.grouped or group.now is not None or not kernels.cpu_step.known():
        return None
    joint = like.columns.of_complex and like.arrays.numbers > 1
    if fixed.algorithm == "nadam" or (joint and (fixed.ordered or like.arrays.bounded)):
        return None
    constants = hyperparameters.constants(fixed, like.arrays)
    form, later = constants.form, constants.later
    scalars = (constants.grad_scale, 0.0, constants.w1, constants.w2, 0.0, constants.eps, 0.0, *later)
    numbers = constants.lowest, fixed.beta1, fixed.beta2, fixed.weight_decay, constants.eps
    kernel = kernels.compiled(adam, form, scalars)
    if not hasattr(kernel, "overloads"):  # somebody's own in the place of a loop of Numba's
        return None
    formula, begins = (fixed.variant, form.decoupled), 1 if constants.first == later else 2
    return kernels.cpu_step.Plan(like.columns, kernel, formula, numbers, scalars, begins, kernels.PARALLEL_FROM, n_rows)


class RepeatedCall:
    """The last settings of adam_step, and the plan of calls that have the same."""

    def __init__(self):
        self._plan: Any = None
        self._kernels: Any = None
        self._seen: tuple = ()
        self._plans: dict[tuple, Any] = {}

    def does(self, arrays, settings, step, lr, backend):
        """Make the update if its settings are the last ones, and its arrays like those; return whether it was made."""
        plan, kernels = self._plan, self._kernels
        if plan is None or type(step) is not int or type(lr) is not float or not backends.takes_numpy(backend):
            return False
        if not 0 < step < kernels.cpu_step.MOST_STEPS:
            return False
        return plan.step(arrays, (kernels.build, kernels.PARALLEL_FROM, *settings), step, lr) == kernels.cpu_step.DONE

    def note(self, group, settings):
        """Take over the settings of Updates that were made, if they were also those of the call before."""
        again = len(settings) == len(self._seen) and all(map(operator.is_, settings, self._seen))
        self._seen = settings
        if not again or type(group.columns[0][0]) is not np.ndarray or not all(map(stays, settings)):
            return
        kernels = self._kernels = backends.load("numba-cpu")
        like = known_like(group)
        key = id(like), group.h.fixed, kernels.build, kernels.PARALLEL_FROM
        if key not in self._plans:
            if len(self._plans) == KEPT:
                self._plans.clear()
            self._plans[key] = plan_of(group), like  # kept alive, so that no other gets its number
        self._plan, _ = self._plans[key]
        if self._plan is not None:
            self._plan.expect((kernels.build, kernels.PARALLEL_FROM, *settings))


def stays(setting):
    """Whether a setting stays what it is while it is the same object."""
    return type(setting) in IMMUTABLE or (type(setting) is tuple and all(map(stays, setting)))


class Repeats:
    """The last steps of an optimizer.

    A step is taken over once several in a row were alike, and after more of them each time that the next one was not.
    """

    def __init__(self):
        self.ready = False  # to take the next step if it is as the last one
        self._in_a_row, self._needed = 0, 1

    def __reduce__(self):  # a copy of an optimizer has other arrays
        return (type(self), ())

    def worth_a_look(self):
        """Count a step that went the long way, and return whether the next ones may be as this one."""
        self._in_a_row += 1
        return self._in_a_row > self._needed

    def does(self, *step):
        """Take the step if it is as the last one, and return whether it was taken. step: what `as_last` takes."""
        if not self.ready:
            return False
        if self.as_last(*step):
            return True
        self.ready, self._in_a_row, self._needed = False, 0, min(2 * self._needed, 1024)
        return False

    def as_last(self, *step):
        """Take the step if it is as the last one; else do nothing. Return whether it was taken."""
        raise NotImplementedError


class RepeatedStep(Repeats):
    """The last steps of an `Adam` over NumPy arrays."""

    def note(self, optimizer, groups, updates, options):
        """Take over a step that went the long way, if the next ones may be alike.

        groups: the optimizer's, with parameters. updates: all of the step's. options: all arguments of `step` but the gradients.
        """
        if not self.worth_a_look() or len(groups) != 1 or len(updates) != 1:
            return
        (settings,), (group,), (only,) = optimizer.groups, groups, updates
        parameters, places = group.parameters, optimizer.arrangement.places
        states, names, n = [parameter.state for parameter in parameters], group.structure.names, len(parameters)
        kind, others = group.kind, [value for key, value in settings.items() if key not in ("params", "names")]
        holder: Any = places[0][0] if places else None
        if kind is None or len(only.columns) != 2 + len(kind.kept) or len(only.columns[0]) != n:
            return  # of several kinds, with more arrays, or not of all parameters
        if not all(map(operator.is_, options[1:], NO_OPTIONS)) or not all(map(stays, (options[0], *others))):
            return
        if places and (type(holder) not in (dict, list) or not len(places) == len(holder) == n):
            return  # in several, or beside others
        if not all(type(state["step"]) is int for state in states):
            return
        if not all(type(array) is np.ndarray for column in only.columns for array in column):
            return
        self._plan = plan_of(only, n)
        if self._plan is None:
            return
        kernels = self._kernels = backends.load("numba-cpu")
        values = [kernels.cpu_step.ANY if key == "lr" else value for key, value in settings.items()]
        self._plan.expect((kernels.build, kernels.PARALLEL_FROM, *options, *settings, *values))
        self._kind, self._states, self._names, self._holder = group.structure.kind, states, names, holder
        self._of_state = operator.itemgetter("step", *kind.kept)
        self._form = hyperparameters.constants(only.h.fixed, known_like(only).arrays).form
        for state in states:
            state["step"] = states[0]["step"]  # one object, which compiled code finds again
        self.ready = True

    def as_last(self, optimizer, grads, options):
        plan, kernels, under_way, names = self._plan, self._kernels, optimizer.under_way, self._names
        if len(optimizer.groups) != 1 or under_way.changing or not backends.takes_numpy(optimizer.backend):
            return False
        (settings,) = optimizer.groups
        lr, states, count = settings.get("lr"), self._states, self._states[0].get("step")
        if type(lr) is not float or type(count) is not int or not 0 <= count < kernels.cpu_step.MOST_STEPS - 1:
            return False
        if self._kind == ONE:
            grads = [grads]
        elif self._kind == MAPPING:
            grads = list(grads.values()) if type(grads) is dict and list(grads) == names else None
        else:
            grads = list(grads) if type(grads) in (list, tuple) else None
        params, holder = settings.get("params"), self._holder
        params = list(params) if type(params) is list else None  # of its own: no other thread lets an array go meanwhile
        try:
            arrays: tuple[Any, ...] = count, params, grads, list(map(self._of_state, states)), settings.get("names"), names
        except KeyError:  # state was taken away
            return False
        if type(holder) is dict:
            arrays += list(holder), names, list(holder.values()), params
        elif holder is not None:
            arrays += holder, params
        if not plan.rehearsed:
            plan.rehearse()
        under_way.begin()
        status = plan.step(
            arrays, (kernels.build, kernels.PARALLEL_FROM, *options, *settings, *settings.values()), count + 1, lr
        )
        if status != kernels.cpu_step.DONE:
            under_way.end()  # nothing has been done
            if status == kernels.cpu_step.OTHER:
                return False
            batch = kernels.batch_of(
                plan.table, plan.table[:, kernels.numpy_struct.SIZE].sum().item(), None, False, 0, names
            )
            batch.prepare(adam, self._form, plan.scalars.tolist(), None)
            launch([batch], [batch], under_way=under_way)
        for state in states:
            state["step"] = count + 1
        optimizer.steps += 1
        optimizer.ended()
        return True
