"""Steps over torch's tensors in CPU memory that are as the last one, but for the learning rate and the gradients' memory.

The long way makes NumPy arrays of tensors, which takes some microseconds for each. Here a step reads of each tensor what may have
changed since the last one, compares it, and updates the memory that it knows. It goes the long way as soon as anything differs.
Compiled code reads the tensors (`kernels/dlpack_struct.py`), and Python those of an older torch, which has no functions for C.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import backends, numpy_batches, torch_tensors
from ..kernels import dlpack_struct
from ..kernels.step_objects import ANY, same, stays
from ..kernels.view import bare
from ..repeated import Repeats, prepared
from ..repeated_on_cpu import StepsOnCpu, disjoint
from ..update import launch
from .distributed import PLAIN
from .step_counts import LAST

# What may change of a tensor while it stays the same object, or if another takes its place
READ = torch.Tensor.stride, torch.Tensor.size, operator.attrgetter("dtype"), operator.attrgetter("is_cpu")
IS_NEG = torch.Tensor.is_neg
NO_COUNTS = np.zeros(0, np.int64)
IS_LEAF = operator.attrgetter("is_leaf")
GRAD = operator.attrgetter("grad")


class Asked:
    """What is known of the tensors in a list, read by Python: as `dlpack_struct.Tensors`."""

    def __init__(self, tensors, move):
        self._tensors, self._known, self.addresses = None if move else tensors, _read(tensors), _pointers(tensors)

    def are(self, tensors):
        stay = self._tensors is not None
        if (stay and not same(tensors, self._tensors)) or _read(tensors) != self._known:
            return False
        before, self.addresses = self.addresses, _pointers(tensors)
        return not stay or self.addresses == before


class RepeatedPart(NamedTuple):
    """What is known, after a step, of the parameters of a group that one of its Updates was of."""

    params: list[torch.Tensor]
    states: list[dict[str, Any]]
    of_state: Callable  # the tensors of a state, of which the first is its count
    held: Asked | dlpack_struct.Tensors  # params, and those of all states
    grads: Asked | dlpack_struct.Tensors
    pointers: list[int]  # to the gradients
    counts: np.ndarray  # the addresses of the counts, float32
    written: list[torch.Tensor]
    plan: StepsOnCpu


class RepeatedSteps(Repeats):
    """The last steps of an optimizer of torch, where they were of tensors in CPU memory. An optimizer has one."""

    def note(self, optimizer, taken):
        """Take over a step that went the long way, if the next ones may be alike.

        taken: (group, pairs of Members and their Updates) of each group.
        """
        if not self.worth_a_look():
            return
        several, known = sum(len(pairs) for _, pairs in taken) > 1, []
        for group, pairs in taken:
            parts = [_known(optimizer, group, members, only, several) for members, only in pairs]
            if None in parts:
                self.put_off()
                return
            # all parameters, because random bits depend on their numbers
            known.append((list(group["params"]), sum(len(members) for members, _ in pairs), parts))
        cpu_step = self._cpu_step = backends.load("numba-cpu").cpu_step
        cpu_step.advance(NO_COUNTS)  # compiled before a step has written anything
        self._known, self.ready = known, True

    def as_last(self, optimizer):
        groups, known = optimizer.param_groups, self._known
        if len(groups) != len(known):
            return False
        present, steps, held, moved = [], [], [], []
        for group, (params, n_with_grads, parts) in zip(groups, known, strict=True):
            if not same(group["params"], params):
                return False
            if n_with_grads < len(params) and sum(param.grad is not None for param in params) != n_with_grads:
                return False
            for one in parts:
                if not _same_tensors(one, optimizer.state):
                    return False
                grads = list(map(GRAD, one.params))
                if not set(map(type, grads)) <= PLAIN or not one.grads.are(grads) or any(map(IS_NEG, grads)):
                    return False
                held.append(grads)  # until the launch has ended: the table has their addresses alone
                addresses = one.grads.addresses
                if addresses != one.pointers:
                    if not _can_be_read(grads, addresses):
                        return False
                    one.pointers.clear()  # until the new ones are known to be disjoint
                    one.plan.set_column(1, addresses)
                    moved.append((one.pointers, addresses))
                present.append(one)
                steps.append(_step(optimizer, group, one, self._cpu_step.common_count))
        plans = [one.plan for one in present]
        if None in steps or (moved and not disjoint(plans)):
            return False
        for pointers, addresses in moved:
            pointers[:] = addresses
        if len(plans) == 1:
            if not plans[0].step(*steps[0], optimizer.under_way):
                return False
        elif plans:
            batches = prepared(plans, steps)
            if not batches:
                return False
            launch(batches, optimizer.under_way)
        for one in present:
            self._cpu_step.advance(one.counts)
            torch_tensors.wrote(one.written)
        optimizer.under_way.end()
        return True


def _known(optimizer, group, members, only, several):
    """Return the RepeatedPart of Members of a group after their step, or None if steps of it are not repeated.

    only: their Updates. several: whether the step had others too.
    """
    params, states = [member.param for member in members], [member.state for member in members]
    # other keys are of torch's schedulers and of users, and mean nothing here
    settings = [value if key in optimizer.defaults and key != "lr" else ANY for key, value in group.items()]
    if not all(value is ANY or stays(value) for value in settings) or type(_number(group["lr"])) is not float:
        return None
    like, kernels = only.like, backends.load("numba-cpu")
    if like is None or like.columns.of_complex or only.now is not None or only.starts:
        return None
    if not all(set(map(type, column)) <= PLAIN for column in only.columns):
        return None
    columns = [bare(torch_tensors.all_in_numpy(column, written=False))[0] for column in only.columns]
    if not all(type(x) is np.ndarray for column in columns for x in column):
        return None
    counts, table = [state["step"] for state in states], numpy_batches.table(only, columns, like, kernels.numpy_struct)
    plan = None if table is None or not _are_counts(counts) else StepsOnCpu.of_table(optimizer, only, several, table)
    if plan is None:
        return None
    plan.expect((*plan.own_settings(optimizer), *group, *settings))
    of_state = operator.itemgetter("step", *(array.name for array in optimizer.kept(group, params[0].dtype)))
    held, grads = [*params, *itertools.chain.from_iterable(map(of_state, states))], only.columns[1]
    return RepeatedPart(
        params, states, of_state, _asked(held, False), _asked(grads, True), _pointers(grads), np.array(_pointers(counts)),
        only.written(), plan,
    )  # fmt: skip


def _are_counts(counts):
    """Whether the counts of states are such as torch makes them."""
    return all(type(c) is torch.Tensor and c.dtype is torch.float32 and c.is_cpu and c.ndim == 0 for c in counts)


def _asked(tensors, move):
    """Return what is known of the tensors in a list. move: others may take their places, at other addresses."""
    function = dlpack_struct.function_of(torch.Tensor)
    return dlpack_struct.Tensors(function, tensors, move) if function else Asked(tensors, move)


def _pointers(tensors):
    return list(map(torch.Tensor.data_ptr, tensors))


def _read(tensors):
    return [list(map(function, tensors)) for function in READ]


def _step(optimizer, group, one, common_count):
    """Return what `StepsOnCpu` takes for the step of a group, or None if it is another one."""
    lr, count = group["lr"], float(common_count(one.counts))
    if type(lr) is not float:
        lr = _number(lr)
    if type(lr) is not float or not 0 <= count < LAST or not count.is_integer():
        return None
    return None, (*one.plan.own_settings(optimizer), *group, *group.values()), int(count) + 1, lr, 1.0


def _number(lr):
    """Return a learning rate, one in a tensor in CPU memory as the number that it is now."""
    return lr.item() if type(lr) in PLAIN and lr.is_cpu and lr.numel() == 1 else lr


def _can_be_read(grads, addresses):
    """Whether gradients have elements, memory, and elements at multiples of their bytes."""
    size = grads[0].element_size()
    return all(addresses) and not any(address % size for address in addresses)


def _same_tensors(one, state):
    """Whether parameters, which are the same objects, and their state are as before."""
    params = one.params
    states = list(map(state.get, params))
    if not same(states, one.states):
        return False
    try:
        held = [*params, *itertools.chain.from_iterable(map(one.of_state, states))]
    except KeyError:
        return False
    return one.held.are(held) and all(map(IS_LEAF, params)) and not any(map(IS_NEG, held))
