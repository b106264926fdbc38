"""Steps that are as the last one but for the step's number, lr, grad_scale, the gradients and what is in the arrays.

Most programs take the same step again and again. At first it goes the long way, by `update`. The next ones are compared with it
in one compiled call (`kernels/same_objects.py`), and go the long way again as soon as anything differs: nothing is refused here.
This file says what a step of an optimizer has to have in common with the last one. A plan knows what the arrays are and how the
step is made: `repeated_on_cpu.py` has plans for NumPy's arrays, `repeated_on_gpu.py` for those of CuPy and Numba.
"""

import dataclasses
import itertools
from typing import Any

from .groups import MAPPING, ONE
from .kernels.step_objects import ANY, MOST_STEPS, same, stays
from .repeated_on_cpu import ClippedOnCpu, NormsOnCpu, StepsOnCpu, disjoint
from .repeated_on_gpu import StepsOnDevice, StepsOnGpu
from .step_norms import StepNorms
from .update import launch

NO_OPTIONS = None, None, None, None  # of `Adam.step`: change, lr_scale, where and stream
NORMS = 8  # the place of norms among all options


class Repeats:
    """The last steps of an optimizer.

    After some steps that went the long way, the next ones are compared with the last. Each time that this fails, twice as many
    long steps must pass first, at most 1,024.
    """

    norms: StepNorms | None = None  # of the last step that was taken, if it was asked for them

    def __init__(self):
        self.ready = False  # to take the next step if it is as the last one
        self._in_a_row, self._needed = 0, 1
        self._known: Any = None  # what is known of each group of parameters

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
        try:
            if self.as_last(*step):
                return True
        except Exception:
            self.put_off()  # the next one goes the long way, which says what is wrong
            raise
        self.put_off()
        return False

    def put_off(self):
        """Let more steps go the long way before the next look, and forget the arrays."""
        self.ready, self._known = False, None
        self._in_a_row, self._needed = 0, min(2 * self._needed, 1024)

    def as_last(self, *step):
        """Take the step if it is as the last one; else do nothing. Return whether it was taken."""
        raise NotImplementedError


@dataclasses.dataclass(slots=True, eq=False)
class RepeatedGroup:
    """What is known of a group of parameters after a step."""

    plan: StepsOnCpu | StepsOnGpu
    states: list[dict[str, Any]]
    keys: tuple[str, ...]  # of a state: the count's, and those of its arrays
    names: list[str]
    alone: bool  # whether the group is one array, in nothing
    by_name: bool  # whether it is a dict
    holder: Any  # the dict or list that the parameters were given in; None if they were in nothing that is kept
    counted: Any  # the array that the device counts its steps in; None if the host does
    lr: Any  # the array on the device that has the learning rate; None if it is a number
    grad_scale: Any  # likewise
    on_host: bool  # whether none of these three is an array

    @classmethod
    def of(cls, optimizer, group, k, only, options, clips, sums):
        """Return what is known of the k-th group after a step whose k-th Updates were these; None if steps are not repeated.

        options: of the step. clips: whether it depends on the norm of the gradients. sums: whether there is any norm.
        """
        settings = optimizer.groups[k]
        kind, names = group.kind, list(group.structure.names)
        others = [value for key, value in settings.items() if key not in ("params", "names", "lr")]
        if kind is None or len(only.columns) != 2 + len(kind.kept) or only.names != names or not all(map(stays, others)):
            return None  # of several kinds, with more arrays, or not of all parameters
        states, now = [parameter.state for parameter in group.parameters], only.now
        counted = group.count.step if group.count.on_device else None
        if not all(
            type(x) is dict and (type(x["step"]) is int if counted is None else x["step"] is counted) for x in states
        ):
            return None  # or of an ArrayCount
        own = set(names)
        places = [place for place in optimizer.arrangement.places if place[3] in own]
        if not _in_one(places, names):
            return None
        plan = StepsOnCpu.of(optimizer, only, clips, sums) or StepsOnGpu.of(optimizer, k, only)
        if plan is None:
            return None
        values = [ANY if key == "lr" else value for key, value in settings.items()]
        plan.expect((*plan.own_settings(optimizer), ANY, *options[1:], *settings, *values))
        for state in states:
            state["step"] = states[0]["step"]  # one object, which compiled code finds again
        keys, form, holder = ("step", *kind.kept), group.structure.kind, places[0][0] if places else None
        lr = settings["lr"] if now and now.lr else None
        grad_scale = options[0] if now and now.grad_scale else None
        on_host = counted is lr is grad_scale is None
        return cls(plan, states, keys, names, form == ONE, form == MAPPING, holder, counted, lr, grad_scale, on_host)

    def step(self, optimizer, settings, grads, options, n_named):
        """Return what the plan takes for a step: arrays, settings, the step's number, lr, grad_scale. None if it is another one.

        n_named: how long a dict of gradients has to be. Only known names are looked up in it, so another one would go unnoticed.
        """
        if (type(grads) is dict) != self.by_name or (self.by_name and len(grads) != n_named):
            return None
        lr, count, params = settings.get("lr"), self.states[0].get("step"), settings.get("params")
        grad_scale, steps = options[0], count
        if not self.on_host:
            lr, grad_scale = _number(lr, self.lr, 0.0), _number(grad_scale, self.grad_scale, 1.0)
            steps = count if self.counted is None else 0 if count is self.counted else None
        if not (type(settings) is dict and type(lr) is type(grad_scale) is float and type(steps) is int):
            return None
        if not 0 <= steps < MOST_STEPS - 1:
            return None
        grads, holder = [grads] if self.alone else grads, params if self.holder is None else self.holder
        arrays = count, params, grads, self.states, self.keys, self.names, settings.get("names"), holder
        settings = *self.plan.own_settings(optimizer), *options, *settings, *settings.values()
        return arrays, settings, steps + 1, lr, grad_scale

    def count(self):
        """Count a step that was made, if the host does."""
        if self.counted is not None:
            return
        count = self.states[0]["step"] + 1
        for state in self.states:
            state["step"] = count


class RepeatedStep(Repeats):
    """The last steps of an `Adam`."""

    _further: Any = None  # what a step needs beside the plans of its groups: ClippedOnCpu, NormsOnCpu or StepsOnDevice
    _in_groups = _several = False
    _moves: Any = None  # the plans and their `moves`, when no memory was shared between their groups

    def put_off(self):
        super().put_off()
        self._further = self._moves = self.norms = None

    def note(self, optimizer, groups, updates, options, passes):
        """Take over a step that went the long way, if the next ones may be alike.

        groups: the optimizer's, with parameters. updates: all of the step's. options: all arguments of `step` but the gradients.
        passes: the `change_sums.NormPasses` of its norms, or None.
        """
        if not self.worth_a_look():
            return
        _, max_norm, norm, check_finite, *_ = options
        clips, on_device = norm is None and (max_norm is not None or check_finite), any(group.now for group in updates)
        known: list[Any] = [None]
        if len(updates) == len(groups) and _repeatable(updates, options):
            of_groups, sums = zip(groups, itertools.count(), updates), clips or passes is not None
            known = [RepeatedGroup.of(optimizer, *one, options, clips, sums) for one in of_groups]
        self._further = self._moves = self.norms = None
        if None not in known and (clips or on_device or passes):
            self._further = _further_of(optimizer, [one.plan for one in known], updates, clips, options, passes)
            known = known if self._further else [None]
        if None in known:
            self.put_off()
            return
        self._known, self._in_groups = known, optimizer.arrangement.in_groups
        self._several = self._in_groups or self._further is not None  # whether a step has more than the plan of one group
        self.ready = True

    def as_last(self, optimizer, grads, options):
        """Take the step if it is as the last one; else do nothing. options: the other arguments of `step`."""
        known, groups = self._known, optimizer.groups
        if len(groups) != len(known):
            return False
        if self._several:
            made = self._groups_as_last(optimizer, grads, options)
        else:  # without lists of one, which would take a third of the time of a small step
            one = known[0]
            step = one.step(optimizer, groups[0], grads, options, len(one.names))
            made = step and one.plan.step(*step, optimizer.under_way)
        if not made:
            return False
        for one in known:
            one.count()
        optimizer.steps += 1
        optimizer.ended()
        return True

    def _apart(self, plans):
        """Return whether no array that a group writes shares memory with one of another group: as before, if none has moved."""
        moves = [(plan, plan.moves) for plan in plans]
        if len(plans) > 1 and moves != self._moves and not disjoint(plans):
            return False
        self._moves = moves
        return True

    def _groups_as_last(self, optimizer, grads, options):
        """Make the step of all groups, or of none; return whether it was made. It may be clipped."""
        known = self._known
        if not self._in_groups:
            grads = grads if type(grads) is dict else [grads]
        lengths = [len(one.names) for one in known]
        if type(grads) is dict:  # of all names
            grads, lengths = [grads] * len(known), [sum(lengths)] * len(known)
        if type(grads) not in (list, tuple) or len(grads) != len(known):
            return False
        plans = [one.plan for one in known]
        of_groups = zip(known, optimizer.groups, grads, lengths, strict=True)
        steps = [one.step(optimizer, group, own, options, n) for one, group, own, n in of_groups]
        try:
            launches = prepared(plans, steps, self._further, options)
            if not launches or not self._apart(plans):
                return False
            launch(launches, optimizer.under_way)
            if options[NORMS]:
                self.norms = StepNorms(*self._further.passes.result)
            return True
        finally:
            for plan in plans:
                plan.ended()


def _repeatable(updates, options):
    """Whether the options of a step stay what they are, or are arrays that the device looks at. updates: all of the step's."""
    _, max_norm, norm, check_finite, found_inf, *others, norms, stream = options
    for name, value in (("norm", norm), ("found_inf", found_inf)):
        if value is not None and not all(group.now and getattr(group.now, name) for group in updates):
            return False
    return same((*others, stream), NO_OPTIONS) and stays((max_norm, check_finite, norms))


def _further_of(optimizer, plans, updates, clips, options, passes):
    """Return what a step that was made by Updates needs beside its plans, or None if it is not repeated."""
    grad_scale, _, norm, _, found_inf, *_ = options
    on_gpu = all(type(plan) is StepsOnGpu for plan in plans) and all(group.now for group in updates)
    if on_gpu and passes is None:
        given = [grad_scale, norm, found_inf, *(settings["lr"] for settings in optimizer.groups)]
        return StepsOnDevice.of(updates, plans[0].kernels, optimizer.norm_at if clips else None, given)
    if all(type(plan) is StepsOnCpu for plan in plans) and not any(group.now for group in updates):
        clipped = ClippedOnCpu(updates, optimizer.largest_norm) if clips else None
        return NormsOnCpu(passes, clipped) if passes else clipped
    return None


def _number(given, array, instead):
    """Return a number, in the place of the array that it was in the last step another one; None if it is something else."""
    if array is not None:
        return instead if given is array else None
    return given if type(given) is float else None


def prepared(plans, steps, further=None, options=()):
    """Return what to launch for the steps of several plans, all prepared; None if one is another step than its last.

    steps: what `step` of each plan takes, or None. further: what they need beside their batches, a ClippedOnCpu, a NormsOnCpu or
    a `StepsOnDevice`. options: of the step, which it takes.
    """
    for plan, step in zip(plans, steps, strict=True):
        if step is None or not plan.same(*step):
            return None
    if further:
        return further.launches(plans, steps, options)
    launches: list[Any] = []
    for plan, (_, _, step, lr, grad_scale) in zip(plans, steps, strict=True):
        batches = plan.batches(step, lr, grad_scale)
        if batches is None:
            return None
        launches += batches
    return launches


def _in_one(places, names):
    """Whether parameters were given in one dict under their names, in one list that has no others, or in nothing that is kept."""
    if not places:
        return True
    holder: Any = places[0][0]
    keys = names if type(holder) is dict else range(len(holder))
    same = type(holder) in (dict, list) and len(places) == len(names) and [place[1] for place in places] == list(keys)
    return same and all(place[0] is holder for place in places)
