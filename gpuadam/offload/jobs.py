"""From the arrays of a step to its Jobs: every array is checked, and it is found out where it lies."""

from .. import backends, checks, hyperparameters
from ..kernels.operands import Arrays, operands_of
from ..kernels.scalars import step_key
from ..kernels.view import View, bare
from ..update import arrays_of
from .chunks import Job, Launch, Operand
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
            if master is not None:
                named["param"] = named["param"][0], master
            views = _views(named, master is not None, zero_grad, backend)
            (written if zero_grad else read).append(views["grad"])
            written += [view for operand, view in views.items() if operand != "grad"]
            formats = arrays_of({operand: view.format for operand, view in views.items()}, group.stochastic)
            if formats not in launches:
                form, scalars = hyperparameters.form_and_scalars(group.h, group.step, formats)
                key = step_key(group.seed, group.step) if formats.random else 0
                launches[formats] = Launch(formats, form, scalars, key)
            operands = []
            in_memory, _ = bare([array for _, array in named.values()])
            for kind, view, array in zip(operands_of(formats, zero_grad), views.values(), in_memory, strict=True):
                operands.append(Operand(kind, view, mapping_of(array), copied=on_device == (view.device is None)))
            jobs.append(Job(operands, views["param"].size, group.keys[n] if group.keys else 0, launches[formats]))
    checks.overlap(written, read)
    return jobs


def _views(named, has_master, zero_grad, backend):
    """Return the View of each operand of an update, checked. named: operand -> (what errors call the array, the array)."""
    for label, array in named.values():
        checks.given(label, array)
    callers = [operand for operand in named if operand in ("grad", "param_copy") or (operand == "param" and not has_master)]
    state = [operand for operand in named if operand not in callers]
    views: dict[str, View] = {}
    for operands, of_backend in ((callers, backend), (state, "numba-cpu")):
        views |= zip(operands, backends.choose([named[operand] for operand in operands], of_backend)[1], strict=True)
    for view in views.values():
        check_contiguous(view)
    # the checks ask for one device, and the state may be on another
    device = views[callers[0]].device
    checks.update({operand: views[operand]._replace(device=device) for operand in named}, zero_grad)
    return {operand: views[operand] for operand in named}


def check_contiguous(view):
    if not view.contiguous:
        raise ValueError(f"{view.name} is not C-contiguous, which it must be to be cut into chunks: pass a copy")
