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

from .. import backends, checks, hyperparameters, torch_tensors
from ..kernels import adam, dlpack_struct
from ..kernels.step_objects import same, stays
from ..numpy_batches import Like
from ..repeated import Repeats
from ..update import launch
from .distributed import PLAIN
from .step_counts import LAST

OPEN = "params", "param_names", "lr"  # the settings of a group that may be other objects, or are compared in another way
# What may change of a tensor while it stays the same object, or if another takes its place
READ = torch.Tensor.stride, torch.Tensor.size, operator.attrgetter("dtype"), operator.attrgetter("is_cpu")
IS_NEG = torch.Tensor.is_neg
NO_COUNTS = np.zeros(0, np.int64)
IS_LEAF = operator.attrgetter("is_leaf")
GRAD = operator.attrgetter("grad")


class Asked:
    """What is known of the tensors in a list, read by Python: as `dlpack_struct.Tensors`."""

    def __init__(self, tensors, move):
        self._tensors, self._known, self._pointers = None if move else tensors, _read(tensors), _pointers(tensors)

    def are(self, tensors):
        if self._tensors is None:
            if _read(tensors) != self._known:
                return False
            self._pointers = _pointers(tensors)
            return True
        return same(tensors, self._tensors) and _pointers(tensors) == self._pointers and _read(tensors) == self._known

    def addresses(self):
        return self._pointers


class RepeatedGroup(NamedTuple):
    """What is known of a group of parameters after a step."""

    settings: dict[str, Any]
    params: list[torch.Tensor]  # that have gradients
    lacks: bool  # whether others have none
    states: list[dict[str, Any]]
    of_state: Callable | None  # the tensors of a state, of which the first is its count
    held: Asked | dlpack_struct.Tensors  # params, and those of all states
    grads: Asked | dlpack_struct.Tensors
    pointers: list[int]  # to the gradients
    counts: np.ndarray  # the addresses of the counts, float32
    h: hyperparameters.Hyperparameters | None
    like: Like | None
    table: np.ndarray
    n: int  # elements of the table
    names: list[str]
    written: list[torch.Tensor]


class RepeatedSteps(Repeats):
    """The last steps of an optimizer of torch, where they were of tensors in CPU memory. An optimizer has one."""

    def note(self, optimizer, taken):
        """Take over a step that went the long way, if the next ones may be alike.

        taken: (group, Members, list of their Updates) of each group.
        """
        if not self.worth_a_look():
            return
        known = [_known(optimizer, *of_group) for of_group in taken]
        if None in known:
            self.put_off()
            return
        self._known, self.ready = known, True

    def as_last(self, optimizer):
        groups, known = optimizer.param_groups, self._known
        if len(groups) != len(known) or optimizer.under_way.changing or not backends.takes_numpy(optimizer.backend):
            return False
        kernels, held = backends.load("numba-cpu"), []
        moved: list[tuple[list[int], list[int]]] = []
        for group, one in zip(groups, known, strict=True):
            if not (_same_settings(group, one.settings) and _same_tensors(group, one, optimizer.state)):
                return False
            grads = list(map(GRAD, one.params))
            if not set(map(type, grads)) <= PLAIN or not one.grads.are(grads) or any(map(IS_NEG, grads)):
                return False
            pointers = one.grads.addresses()
            held.append(grads)  # until the launch has ended: the table has their addresses alone
            if pointers != one.pointers:
                if not all(pointers) or any(pointer % grads[0].element_size() for pointer in pointers):
                    return False  # one has no elements, or its storage was freed, or it lies between elements
                one.pointers.clear()  # until the new ones are known to be disjoint
                one.table[:, kernels.numpy_struct.PARAM + 1] = pointers
                moved.append((one.pointers, pointers))
        present = [(group["lr"], one) for group, one in zip(groups, known, strict=True) if one.params]
        if moved and not kernels.numpy_struct.all_disjoint([(one.table, one.like.columns) for _, one in present]):
            return False
        for known_pointers, pointers in moved:
            known_pointers[:] = pointers
        batches = []
        for lr, one in present:
            nearest = kernels.cpu_step.common_count(one.counts)
            if not 0 <= nearest < LAST or nearest != (count := int(nearest)):
                return False
            h = hyperparameters.Hyperparameters(checks.non_negative("lr", lr), one.h.fixed)
            form, scalars = hyperparameters.form_and_scalars(h, count + 1, one.like.arrays)
            batches.append(kernels.batch_of(one.table, one.n, one.like.arrays, False, 0, one.names))
            batches[-1].prepare(adam, form, scalars, None)
        kernels.cpu_step.advance(NO_COUNTS)  # compiled before anything is written
        launch(batches, batches, under_way=optimizer.under_way)
        for _, one in present:
            kernels.cpu_step.advance(one.counts)
            torch_tensors.wrote(one.written)
        optimizer.under_way.end()
        return True


def _known(optimizer, group, members, updates):
    """Return the RepeatedGroup of a group after its step, or None if steps of it are not repeated."""
    settings, params = dict(group), [member.param for member in members]
    lacks = len(params) < len(group["params"])
    if not all(stays(value) for key, value in settings.items() if key not in OPEN) or type(group["lr"]) is not float:
        return None
    if not members:
        none = Asked([], False)
        return RepeatedGroup(settings, [], lacks, [], None, none, none, [], NO_COUNTS, None, None, NO_COUNTS, 0, [], [])
    like = updates[0].like if len(updates) == 1 else None
    only, kernels = updates[0], backends.load("numba-cpu")
    if like is None or like.random or like.columns.of_complex or only.now is not None or only.starts:
        return None
    if not all(set(map(type, column)) <= PLAIN for column in only.columns):
        return None
    columns = [torch_tensors.all_in_numpy(column, written=False) for column in only.columns]
    table = (
        kernels.numpy_struct.table(columns, like.columns)
        if all(type(x) is np.ndarray for column in columns for x in column)
        else None
    )
    states = [member.state for member in members]
    counts = [state["step"] for state in states]
    if table is None or not _are_counts(counts):
        return None
    names_of_state = [array.name for array in optimizer.kept(group, params[0].dtype)]
    of_state, (_, grads, *_) = operator.itemgetter("step", *names_of_state), only.columns
    held = [*params, *itertools.chain.from_iterable(map(of_state, states))]
    return RepeatedGroup(
        settings, params, lacks, states, of_state, _asked(held, False), _asked(grads, True), _pointers(grads),
        np.array(_pointers(counts)), only.h, like, table, table[:, kernels.numpy_struct.SIZE].sum().item(), only.names,
        only.written(),
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


def _same_settings(group, known):
    """Whether the settings of a group are the same objects as before, but for lr, which has to be a float."""
    if type(group["lr"]) is not float or list(group) != list(known):
        return False
    known["lr"] = group["lr"]
    return same(group.values(), known.values())


def _same_tensors(group, one, state):
    """Whether the parameters of a group and their state are as before, the same tensors, and the same have gradients."""
    params = group["params"]
    if one.lacks:
        params = [param for param in params if param.grad is not None]
    if not same(params, one.params):
        return False
    states = list(map(state.get, params))
    if not same(states, one.states):
        return False
    try:
        held = [*params, *itertools.chain.from_iterable(map(one.of_state, states))]
    except KeyError:
        return False
    return one.held.are(held) and all(map(IS_LEAF, params)) and not any(map(IS_NEG, held))
