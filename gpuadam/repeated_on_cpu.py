"""Steps of NumPy arrays that are as the last one: compared, checked and done in one compiled call (`kernels/cpu_step.py`)."""

from typing import Any

import numpy as np

from . import backends, clipping, hyperparameters
from .kernels import adam, norm_order, step_objects
from .kernels.layout import VECTOR_BYTES
from .kernels.scalars import step_key
from .kernels.step_objects import stays
from .update import Updates, launch

KEPT = 64  # plans of calls of adam_step


def plan_of(group: Updates, n_rows=None, beside=False, table=None, clips=False, sums=False):
    """Return a `cpu_step.Plan` for Updates that were made, or None if there is none for their like.

    n_rows, table: as in Plan. beside: whether the step has other launches, so that the call leaves all to its caller.
    clips: whether the caller sets another grad_scale. sums: whether it sums over the arrays, which have to be in C order then.
    """
    like, fixed = group.like, group.h.fixed
    kernels = backends.load("numba-cpu")
    if like is None or (like.random and table is None) or group.now is not None or not step_objects.known():
        return None  # or is rounded by numbers of elements, which are in no table that a call fills
    if fixed.algorithm == "nadam":
        return None
    scaled = clips or group.h.scale != 1.0
    constants = hyperparameters.constants(fixed, like.arrays, scaled)
    form, later = constants.form, constants.later
    scalars = (1.0, 0.0, constants.w1, constants.w2, 0.0, constants.eps, 0.0, *later)
    sign, most_scale = -1.0 if fixed.maximize else 1.0, kernels.cpu_step.LARGEST_SCALE if scaled else 1.0
    numbers = constants.lowest, fixed.beta1, fixed.beta2, fixed.weight_decay, constants.eps, sign, most_scale
    kernel = kernels.compiled(adam, form)
    if not hasattr(kernel, "overloads"):  # somebody's own in the place of a loop of Numba's
        return None
    formula, begins = (fixed.variant, form.decoupled), 1 if constants.first == later else 2
    most = 0 if beside or like.random else kernels.PARALLEL_FROM  # a call has no key for random rounding
    params = group.columns[0] if n_rows and table is None else ()
    plan = kernels.cpu_step.Plan(
        like.columns, form, kernel, formula, numbers, scalars, begins, most, n_rows, table, not sums, params
    )
    plan.take_orders(params)
    return plan


class RepeatedCall:
    """The last settings of adam_step, in any thread, and the plan of calls that have the same.

    A plan is whole before another thread can find it, and its settings never change; it may take more orders of memory later.
    """

    def __init__(self):
        self._plan: Any = None
        self._kernels: Any = None
        self._seen: tuple = ()  # the settings, by their numbers: arrays among them are not kept alive
        self._plans: dict[tuple, tuple] = {}  # the objects that a plan is for, by their numbers, and the plan

    def does(self, arrays, settings, step, lr, grad_scale, backend):
        """Make the update if its settings are the last ones, and its arrays like those; return whether it was made."""
        plan, kernels = self._plan, self._kernels
        if plan is None or type(step) is not int or not type(lr) is type(grad_scale) is float:
            return False
        if not 0 < step < step_objects.MOST_STEPS or not backends.takes_numpy(backend):
            return False
        settings = kernels.build, kernels.PARALLEL_FROM, *settings
        return plan.step(arrays, settings, step, lr, grad_scale) == kernels.cpu_step.DONE

    def note(self, group, settings):
        """Take over the settings of Updates that were made, if they were also those of the call before."""
        seen = tuple(map(id, settings))
        again, self._seen = seen == self._seen, seen
        arrays = [column[0] for column in group.columns]  # `Bits` have another dtype than the arrays that a plan reads
        if not again or any(type(array) is not np.ndarray for array in arrays) or not all(map(stays, settings)):
            return
        kernels = self._kernels = backends.load("numba-cpu")
        made_for = group.like, group.h.fixed, group.h.scale != 1.0, kernels.build, kernels.PARALLEL_FROM, *settings
        key = tuple(map(id, made_for))
        known = self._plans.get(key)
        if known is None:
            plan = plan_of(group)
            if plan is not None:
                plan.expect(made_for[3:])
            known = made_for, plan  # the objects are kept alive, so that no others get their numbers
            if len(self._plans) >= KEPT:
                self._plans = {}
            self._plans[key] = known
        self._plan = known[1]
        if self._plan is not None:
            self._plan.take_orders(arrays[:1])
        if self._plan is not None and self._plan.elements >= kernels.PARALLEL_FROM:
            self._plan.take_threads(kernels.build)


class StepsOnCpu:
    """The plan of an optimizer's steps over arrays in CPU memory: of all of them, or of a group beside others."""

    def __init__(self, plan, only):
        self._plan, self._kernels, self._names = plan, backends.load("numba-cpu"), only.names
        self._columns, self._sign = only.like.columns, -1.0 if only.h.fixed.maximize else 1.0
        self._is_random, self._seed = only.like.random, only.seed
        self.expect = plan.expect

    @classmethod
    def of(cls, optimizer, only, clips=False, sums=False):
        """Return that of a step that went the long way, whose Updates were these, or None if there is none for its like.

        clips, sums: as in `plan_of`.
        """
        if not all(type(array) is np.ndarray for column in only.columns for array in column):
            return None
        beside = optimizer.arrangement.in_groups or sums  # all groups are compared before any is updated
        return cls.of_table(optimizer, only, beside, None, clips, sums)

    @classmethod
    def of_table(cls, optimizer, only, beside, table=None, *more):
        """Likewise of arrays that the caller compares, and has the table of. beside, more: as in `plan_of`."""
        plan = plan_of(only, len(only.names), beside, table, *more) if backends.takes_numpy(optimizer.backend) else None
        return plan and cls(plan, only)

    @property
    def table(self):
        """The table of the step that is prepared, and its Columns."""
        return self._plan.table, self._columns

    @property
    def moves(self):
        """How many steps have found arrays elsewhere than the one before."""
        return self._plan.memory[self._kernels.cpu_step.MOVES].item()

    def sizes_and_addresses(self, k):
        """The sizes and the addresses of operand k, in the step that is prepared. Complex numbers count twice."""
        struct, table = self._kernels.numpy_struct, self._plan.table
        return table[:, struct.SIZE] * self._columns.numbers, table[:, struct.PARAM + k]

    def sum_change(self, part):
        """Let a `change_sums.ChangePart` sum the change of the step that is prepared: of the same arrays, wherever they lie."""
        struct, plan = self._kernels.numpy_struct, self._plan
        part.take(plan.table[plan.table[:, struct.SIZE] > 0, struct.PARAM :])
        part.prepare(adam, plan.form, plan.scalars, None)

    def set_column(self, k, addresses):
        """Set the addresses of operand k."""
        self._plan.table[:, self._kernels.numpy_struct.PARAM + k] = addresses

    def own_settings(self, optimizer):
        """Return the objects that a step depends on beside those that the optimizer and the user have."""
        return backends.forced(optimizer.backend), optimizer.options, self._kernels.build, self._kernels.PARALLEL_FROM

    def step(self, arrays, settings, step, lr, grad_scale, under_way):
        """Make the step if it is as the last one, and return whether it was made. The arguments are those of `cpu_step.Plan`."""
        if not self._plan.rehearsed:
            self._plan.rehearse()
        under_way.begin()
        try:
            status = self._plan.step(arrays, settings, step, lr, grad_scale)
        except RecursionError:  # of Python: compiled code has none
            under_way.end()
            raise
        if status == self._kernels.cpu_step.DONE:
            return True
        under_way.end()  # nothing has been done
        if status == self._kernels.cpu_step.OTHER:
            return False
        batches = self.batches(step, lr, grad_scale)
        try:
            launch(batches, under_way)
        finally:
            self.ended()
        self._plan.take_threads(self._kernels.build)
        return True

    def same(self, arrays, settings, step, lr, grad_scale):
        """Whether the step is as the last one; if so, all but its batches is ready. Of a plan whose call makes no launch."""
        if not self._plan.rehearsed:
            self._plan.rehearse()
        return self._plan.step(arrays, settings, step, lr, grad_scale) == self._kernels.cpu_step.READY

    def clip(self, grad_scale):
        """Let the step that is prepared have another grad_scale."""
        self._plan.scalars[0] = self._sign * grad_scale

    def batches(self, step, lr, grad_scale):
        """Return the batches of a step that is the same, ready to be launched. Its scalars, of lr and grad_scale, are there."""
        plan, kernels, is_random = self._plan, self._kernels, self._is_random
        batch = kernels.batch_of(plan.table, plan.elements, None, is_random, 0, self._names, plan.held)
        batch.prepare(adam, plan.form, plan.scalars_at, None, step_key(self._seed, step) if is_random else 0)
        return [batch]

    def ended(self):
        """Let the arrays go of a step that was prepared."""
        self._plan.held.fill(None)


class NormPlan:
    """The plan of the norm of all arrays of one operand of a step, wherever they lie in the next ones.

    operand: its number. views: of its arrays, those of all groups.
    """

    def __init__(self, operand, views):
        # The plan of a norm leaves out what is empty, and goes by formats: so each address is the number of its array at first.
        # Those that are taken are in C order, whatever these are.
        numbered = [view._replace(pointer=VECTOR_BYTES * k, contiguous=True) for k, view in enumerate(views)]
        self._operand, self.plan = operand, norm_order.plan(numbered)
        n = sum(one.n_rows for one in self.plan.passes if one.form.squares)
        self._addresses = self.plan.table[: n * norm_order.COLUMNS].reshape(n, norm_order.COLUMNS)[:, norm_order.OPERANDS]
        self._numbers, self._sizes = self._addresses // VECTOR_BYTES, [view.size for view in views]

    def takes(self, plans):
        """Take the arrays of `StepsOnCpu`s that are prepared; return whether they have the sizes of the first ones."""
        sizes, addresses = np.concatenate([plan.sizes_and_addresses(self._operand) for plan in plans], axis=1)
        self._addresses[...] = addresses[self._numbers]
        return sizes.tolist() == self._sizes


class ClippedOnCpu:
    """The norm of the gradients of the plans of a step, which are `StepsOnCpu`s, and the step that is clipped to it.

    groups: the Updates of the step that went the long way. largest: the norm from which on it is not finite.
    """

    def __init__(self, groups, largest):
        self._kernels, self._largest = backends.load("numba-cpu"), largest
        grads = [("", grad) for group in groups for grad in group.columns[1]]
        self._norm = NormPlan(1, backends.choose(grads, "numba-cpu")[1])

    def launches(self, plans, steps, options):
        """Return what to launch for a step that plans found to be as the last one. options: of the step.

        None if it is left out, or if a number overflows.
        """
        grad_scale, max_norm, _, check_finite, *_ = options
        if not self._norm.takes(plans):
            return None
        norm = self._kernels.norm_of_plan(self._norm.plan)
        if check_finite and not norm * abs(grad_scale) <= self._largest:
            return None
        if max_norm is not None:
            grad_scale = clipping.clipped(grad_scale, norm, max_norm)
        if not self._kernels.cpu_step.takes(grad_scale):
            return None
        for plan in plans:
            plan.clip(grad_scale)
        return [batch for plan, step in zip(plans, steps, strict=True) for batch in plan.batches(*step[2:])]


class NormsOnCpu:
    """The norms of the steps of some plans, which are `StepsOnCpu`s.

    passes: the `change_cpu.CpuNormPasses` of the step that went the long way; its arrays are let go. clipped: a ClippedOnCpu, if
    the step is clipped.
    """

    def __init__(self, passes, clipped):
        self.passes, self._clipped = passes, clipped
        self._params = NormPlan(0, passes.params)
        passes.again_with(self._params.plan)

    def launches(self, plans, steps, options):
        """As those of ClippedOnCpu."""
        if self._clipped:
            batches = self._clipped.launches(plans, steps, options)
        else:
            batches = [batch for plan, step in zip(plans, steps, strict=True) for batch in plan.batches(*step[2:])]
        if batches is None or not self._params.takes(plans):
            return None
        for plan, part in zip(plans, self.passes.parts, strict=True):
            plan.sum_change(part)
        self.passes.renew()
        return [*self.passes.parts, *batches, self.passes]


def disjoint(plans):
    """Return whether no array that the prepared steps of several plans write shares memory with another.

    Those of StepsOnGpu lie where they did when that was checked.
    """
    tables = [plan.table for plan in plans if isinstance(plan, StepsOnCpu)]
    return not tables or backends.load("numba-cpu").numpy_struct.all_disjoint(tables)
