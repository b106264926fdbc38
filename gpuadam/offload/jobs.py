"""From the arrays of a step to what is cut into chunks: checked, and each with what is known of where it lies."""

from .. import backends, checks, functional, hyperparameters
from ..kernels.operands import operands_of
from ..kernels.scalars import step_key
from ..kernels.view import View, bare
from .chunks import Job, Operand
from .mapped import mapping_of
from .stages import Launch


def jobs_of(updates, stages, has_master, backend):
    """Check all arrays of a step, and return its Jobs. updates: `functional.Updates`.

    stages: OnHost or OnDevice. has_master: whether a parameter, by its name, is the copy of a master. backend: of the caller's
    arrays, or None.
    """
    jobs: list[Job] = []
    written: list[View] = []
    read: list[View] = []
    maps: dict = {}
    for group in updates:
        zero_grad, launches = group.h.fixed.zero_grad, {}
        for n, given in enumerate(zip(*group.columns, strict=True)):
            name = group.names[n]
            named = dict(zip(group.operands, functional.labelled(given, group.operands, name), strict=True))
            views = _views(named, has_master(name), zero_grad, backend)
            for operand, view in views.items():
                if not view.contiguous:
                    raise ValueError(
                        f"{view.name} is not C-contiguous, and is to be cut into runs of neighbours: pass a copy"
                    )
                (written if operand != "grad" or zero_grad else read).append(view)
            formats = functional.formats_of(views, group)
            if formats not in launches:
                form, scalars = hyperparameters.form_and_scalars(group.h, group.step, formats)
                key = step_key(group.seed, group.step) if formats.random else 0
                launches[formats] = Launch(formats, form, scalars, key)
            operands = []
            given_bare, _ = bare(list(given))
            for o, array, view in zip(operands_of(formats, zero_grad), given_bare, views.values(), strict=True):
                mapping = mapping_of(array, maps)
                operands.append(Operand(view, o.loads, o.stores, o.of_groups, mapping))
            moved = tuple(stages.moves(operand.view, operand.mapping) for operand in operands)
            key = group.keys[n] if group.keys else 0
            jobs.append(Job(operands, views["param"].size, key, launches[formats], moved))
    checks.overlap(written, read)
    return jobs


def _views(named, has_master, zero_grad, backend):
    """Return the View of each operand of an update, checked. Some are the caller's, the others the optimizer's own."""
    for label, array in named.values():
        checks.given(label, array)
    callers = [operand for operand in named if operand in ("grad", "param_copy") or (operand == "param" and not has_master)]
    own = [operand for operand in named if operand not in callers]
    _, views = backends.choose([named[operand] for operand in callers], backend)
    found = dict(zip(callers, views, strict=True))
    _, views = backends.choose([named[operand] for operand in own], "numba-cpu")
    found |= zip(own, views, strict=True)
    device = found[callers[0]].device
    # the state is elsewhere, and that is right
    beside = {operand: found[operand]._replace(device=device) if operand in own else found[operand] for operand in named}
    checks.update(beside, zero_grad)
    return {operand: found[operand] for operand in named}
