"""Steps that are as the last one but for the step's number, the learning rate, the gradients and what is in the arrays.

Most programs take the same step again and again. At first it goes the long way, by `update`. The next ones are compared with it
in one compiled call (`kernels/same_objects.py`), and go the long way again as soon as anything differs: nothing is refused here.
This file says what a step of an optimizer has to have in common with the last one. A plan knows what the arrays are and how the
step is made: `repeated_on_cpu.py` has plans for NumPy's arrays, `repeated_on_gpu.py` for those of CuPy and Numba.
"""

import operator
from typing import Any

from .groups import MAPPING, ONE
from .kernels.step_objects import ANY, MOST_STEPS, stays
from .repeated_on_cpu import StepsOnCpu
from .repeated_on_gpu import StepsOnGpu
from .step_counts import HostCount

NO_OPTIONS = None, None, False, None, None, None, None, False, None  # of `Adam.step`, but for grad_scale


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
    """The last steps of an `Adam`."""

    def note(self, optimizer, groups, updates, options):
        """Take over a step that went the long way, if the next ones may be alike.

        groups: the optimizer's, with parameters. updates: all of the step's. options: all arguments of `step` but the gradients.
        """
        if not self.worth_a_look() or len(groups) != 1 or len(updates) != 1:
            return
        (settings,), (group,), (only,) = optimizer.groups, groups, updates
        kind, n = group.kind, len(group.parameters)
        others = [value for key, value in settings.items() if key not in ("params", "names")]
        if kind is None or len(only.columns) != 2 + len(kind.kept) or len(only.columns[0]) != n:
            return  # of several kinds, with more arrays, or not of all parameters
        if not all(map(operator.is_, options[1:], NO_OPTIONS)) or not all(map(stays, (options[0], *others))):
            return
        states, names = [parameter.state for parameter in group.parameters], list(group.structure.names)
        places, by_name = optimizer.arrangement.places, group.structure.kind == MAPPING
        if type(group.count) is not HostCount or not all(type(x) is dict and type(x["step"]) is int for x in states):
            return
        if not _in_one(places, names):
            return
        plan = StepsOnCpu.of(optimizer, only, by_name) or StepsOnGpu.of(optimizer, only, by_name)
        if plan is None:
            return
        values = [ANY if key == "lr" else value for key, value in settings.items()]
        plan.expect((*plan.own_settings(optimizer), *options, *settings, *values))
        self._plan, self._states, self._keys, self._names = plan, states, ("step", *kind.kept), names
        self._alone, self._holder = group.structure.kind == ONE, places[0][0] if places else None
        for state in states:
            state["step"] = states[0]["step"]  # one object, which compiled code finds again
        self.ready = True

    def as_last(self, optimizer, grads, options):
        """Take the step if it is as the last one; else do nothing. options: the other arguments of `step`."""
        if len(optimizer.groups) != 1 or optimizer.under_way.changing:
            return False
        (settings,), plan, states, holder = optimizer.groups, self._plan, self._states, self._holder
        lr, count, params = settings.get("lr"), states[0].get("step"), settings.get("params")
        if type(lr) is not float or type(count) is not int or not 0 <= count < MOST_STEPS - 1:
            return False
        grads, holder = [grads] if self._alone else grads, params if holder is None else holder
        arrays = count, params, grads, states, self._keys, self._names, settings.get("names"), holder
        objects = *plan.own_settings(optimizer), *options, *settings, *settings.values()
        if not plan.step(arrays, objects, count + 1, lr, optimizer.under_way):
            return False
        count += 1
        for state in states:
            state["step"] = count
        optimizer.steps += 1
        optimizer.ended()
        return True


def _in_one(places, names):
    """Whether parameters were given in one dict under their names, in one list that has no others, or in nothing that is kept."""
    if not places:
        return True
    holder: Any = places[0][0]
    keys = names if type(holder) is dict else range(len(holder))
    same = type(holder) in (dict, list) and len(places) == len(names) and [place[1] for place in places] == list(keys)
    return same and all(place[0] is holder for place in places)
