"""From the arrays of a step to its Jobs: every array is checked, and it is found out where it lies."""

from .. import backends, checks, hyperparameters
from ..kernels.operands import KINDS, Arrays, operands_of
from ..kernels.scalars import step_key
from ..kernels.view import View
from ..update import in_elements
from .chunks import Job, Launch, PlacedOperand
from .mapped import mapping_of


def jobs_of(updates, state, on_device, backend):
    """Check all arrays of a step, and return its Jobs. updates: `update.Updates`.

    state: name -> the state of the parameter. If it has a master, the master is updated, and the parameter is its copy.
    on_device: whether the update runs on a GPU. backend: of the caller's arrays, or None.
    """
    jobs: list[Job] = []
    written: list[View] = []
    read: list[View] = []
    for group in updates:
        zero_grad = group.h.fixed.zero_grad
        launches: dict[Arrays, Launch] = {}
        for n, (name, row) in enumerate(zip(group.names, group.rows(), strict=True)):
            named, master = dict(zip(group.operands, row, strict=True)), state[name].get("master")
            views, numbers = _views(named, master, group, backend)
            (written if zero_grad else read).append(views["grad"])
            written += [view for operand, view in views.items() if operand != "grad"]
            formats = Arrays.of({operand: view.format for operand, view in views.items()}, group.stochastic, numbers=numbers)
            if formats not in launches:
                form, scalars = hyperparameters.form_and_scalars(group.h, group.step, formats)
                key = step_key(group.seed, group.step) if formats.random else 0
                launches[formats] = Launch(formats, form, scalars, key)
            operands = [
                PlacedOperand(kind, view, mapping_of(view.array), copied=on_device == (view.device is None))
                for kind, view in zip(operands_of(formats, zero_grad), views.values(), strict=True)
            ]
            jobs.append(Job(operands, views["param"].size, group.keys[n] if group.keys else 0, launches[formats]))
    checks.overlap(written, read)
    return jobs


def _views(named, master, group, backend):
    """Return what `update.in_elements` does. named: operand -> (what errors call the array, the array). group: the Updates."""
    for label, array in named.values():
        checks.given(label, array)
    state = {operand: named.pop(operand) for operand in list(named) if operand not in ("param", "grad", "param_copy")}
    if master is not None:
        named["param_copy"] = named.pop("param")
        state["param"] = f"master of {named['param_copy'][0]}", master
    views: dict[str, View] = {}
    for of_backend, arrays in ((backend, named), ("numba-cpu", state)):
        views |= zip(arrays, backends.choose(list(arrays.values()), of_backend)[1], strict=True)
    for view in views.values():
        check_contiguous(view)
    views = {operand: views[operand] for operand in KINDS if operand in views}
    # the checks ask for one device, and the state may be on another
    device = views["grad"].device
    placed, numbers = in_elements({operand: view._replace(device=device) for operand, view in views.items()}, group)
    return {operand: view._replace(device=views[operand].device) for operand, view in placed.items()}, numbers


def check_contiguous(view):
    if not view.contiguous:
        raise ValueError(f"{view.name} is not C-contiguous, which it must be to be cut into chunks: pass a copy")
