"""The parameters of an `Adam`: what is checked of them when it is made, their groups, and their Updates in a step."""

import itertools
from typing import Any, NamedTuple

from . import backends, checks, hyperparameters, step_counts
from .groups import Structure, checked_group, differing_names
from .kernels.messages import label_of
from .kernels.operands import widened
from .kernels.view import View, is_array
from .state import Parameter, ParameterKind, key_of_parameter
from .step_arrays import ENDS, bounds_apart, of_bounds, without_arrays
from .update import Updates


class Beginning(NamedTuple):
    """What is known of a parameter before its state is made."""

    backend: Any
    view: View
    kept: dict[str, str]  # key of the state -> format
    numbers: int = 1  # of the parameter that share a v


def begun(opt, going_on=()):
    """Check the parameters and hyperparameters of an optimizer. Return name -> Beginning of each parameter.

    going_on: the names of those whose bounds were checked before.
    """
    beginnings: dict[str, Beginning] = {}
    bounds = of_bounds(opt.groups, opt.arrangement.structures)  # which refuses those of another structure
    for group, structure in zip(opt.groups, opt.arrangement.structures, strict=True):
        has_array = opt.options.capturable and is_array(group["lr"])  # whose number is not known before it is read
        h = checked_settings(group | {"lr": 0.0} if has_array else group, structure, opt.options, step=1)
        for name, param in zip(group["names"], group["params"], strict=True):
            label, ends = opt.arrangement.label(name), bounds.get(name, {})
            named = [] if name in going_on else [(f"{end} of {label}", array) for end, array in ends.items()]
            kernels, (view, *of_ends) = backends.choose([(label, checks.given(label, param)), *named], opt.backend)
            checks.param(view)
            hyperparameters.check_rounding(h, opt.options.computed_in(view.format))
            numbers = checks.numbers(view, structure.complex, structure.components)
            checks.ordered(view, numbers, h.fixed, ends)
            kept = opt.options.kept(view, structure.amsgrad, numbers)
            beginnings[name] = Beginning(kernels, view, kept, numbers)
            if of_ends:
                _check_bounds(beginnings[name], dict(zip(ends, of_ends, strict=True)), group["bounds"])
    views = [beginning.view for beginning in beginnings.values()]
    checks.given_once(views)
    checks.overlap(views, [])
    return beginnings


def checked_settings(settings, structure, options, step, grad_scale=1.0):
    """Return the Hyperparameters of a group for a step, checked. Its bounds may be arrays."""
    return checked_group(without_arrays(settings), structure, options, step, grad_scale)


def _check_bounds(beginning, of_ends, bounds):
    """Refuse bounds in arrays of other shapes or dtypes than their parameter's, or in CPU memory low above high.

    beginning: of the parameter. of_ends: "low" or "high" -> View. bounds: of its group, where the other end may be a number.
    """
    (kernels, view, kept, n), numbers = beginning, bounds_apart(bounds)[0]
    for end, of_end in of_ends.items():
        checks.beside(of_end, view, end, written=False, numbers=n, in_groups="m_scale" in kept)
    if kernels.memory == "CPU":
        ends = [None if x is None else hyperparameters.bound(x, view.format) for x in numbers]  # as a step has them
        in_arrays = {end: widened(of_end.array, of_end.format) for end, of_end in of_ends.items()}
        checks.order_of_bounds(view.name, *(in_arrays.get(end, x) for end, x in zip(ENDS, ends, strict=True)))


def made_parameters(beginnings, states, copies, options):
    """Return name -> Parameter. states: of each name. copies: name -> array, of those that have one."""
    parameters = {}
    for number, (name, (_, view, kept, numbers)) in enumerate(beginnings.items()):
        kind = ParameterKind.of(view, kept, name in copies, options.stochastic_rounding, numbers)
        size, key = view.size // (1 + kind.of_complex), key_of_parameter(options.seed, number)
        parameters[name] = Parameter(name, kind, states[name], tuple(kept), size, key, copies.get(name))
    return parameters


def check_state(parameter, label):
    """Refuse the state of a parameter from which something was taken, or to which something came. label: the parameter's."""
    if parameter.state.keys() != {"step", *parameter.kept}:
        needed = ["step", *parameter.kept]
        raise ValueError(
            f"the state of {label} is not as its optimizer made it: {differing_names(parameter.state, needed)}. It must have "
            f"{needed}: put back what is missing, and take out the rest"
        )


class Group(NamedTuple):
    """A group of parameters, beside its settings in `Adam.groups`."""

    structure: Structure
    parameters: list[Parameter]
    kind: ParameterKind | None  # of all parameters, if they have one
    count: Any  # of steps, one of step_counts.py
    alone: bool  # the parameter was given as one array, so that nobody knows its name

    def updates(self, settings, grads, grad_scale, on_device, step, options):
        """Return the Updates of the parameters that have a gradient, and these parameters.

        settings: those of the group in `Adam.groups`. on_device: the conditions that the device looks at, of
        `clipping.conditions`. step: the number of this call of `Adam.step`.
        """
        parameters, arrays = self.parameters, settings.get("params")
        own_lr = settings.get("lr")  # checked_settings says which settings are missing
        if on_device and all(grad is None for grad in grads):
            on_device = None  # nothing is updated here, and the norm may be on the device of another group
        lr, grad_scale, now = self.count.numbers(own_lr, grad_scale, on_device)
        settings = settings if lr is own_lr else settings | {"lr": lr}
        h = checked_settings(settings, self.structure, options, step, grad_scale)
        if id(None) in map(id, grads):
            present = [grad is not None for grad in grads]
            self.count.check_present(parameters, present)
            parameters, arrays, grads = (list(itertools.compress(x, present)) for x in (parameters, arrays, grads))
        updates = []
        try:
            for number, chosen in self.count.alike(parameters, self.kind):
                alike, *columns = parameters, arrays, grads
                if chosen:
                    alike, *columns = (list(itertools.compress(x, chosen)) for x in (parameters, arrays, grads))
                updates.append(self._updates_of(alike, columns, h, number, now, options))
        except KeyError:
            for parameter in parameters:
                check_state(parameter, label_of(parameter.name, self.alone))
            raise
        return updates, parameters

    def _updates_of(self, parameters, columns, h, step, now, options):
        """Return the Updates of parameters of one kind. columns: their arrays and gradients, to which those of the state come."""
        _, operands, kept, bits, counted, *_ = parameters[0].kind
        structure, states = self.structure, [parameter.state for parameter in parameters]
        names = structure.names if len(parameters) == len(structure.names) else [p.name for p in parameters]
        for operand in kept:
            columns.append([state[operand] for state in states])
        if len(columns) < len(operands):
            columns.insert(operands.index("param_copy"), [parameter.copy for parameter in parameters])
        updates = Updates(h, step, columns, operands, names, now, structure.complex, structure.components)
        updates.alone = self.alone
        if counted:
            updates.bits, updates.stochastic, updates.seed = bits, options.stochastic_rounding, options.seed
            updates.keys, updates.starts = [p.key for p in parameters], [p.start for p in parameters]
        return updates


def made_group(k, settings, structure, beginnings, opt, count=None):
    """Return the Group of number k of an optimizer. count: of its steps, if it goes on."""
    members = [opt.parameters[name] for name in settings["names"]]
    kinds = {parameter.kind for parameter in members}
    if opt.options.capturable:
        count = _count_in_array(k, settings, structure, beginnings, opt, count)
        for parameter in () if count is None else members:
            parameter.state["step"] = count.step
    kind = kinds.pop() if len(kinds) == 1 else None
    return Group(structure, members, kind, count or step_counts.HostCount(), opt.arrangement.alone)


def _count_in_array(k, settings, structure, beginnings, opt, count):
    """Return the count of a group's steps beside its parameters, or None if it has none yet."""
    places = {(beginning.backend, beginning.view.device) for beginning in map(beginnings.get, structure.names)}
    if not structure.names and is_array(settings["lr"]):
        kernels, (view,) = backends.choose([("lr", settings["lr"])], opt.backend)
        places = {(kernels, view.device)}
    if not places:
        return count
    if len({opt.parameters[name].kind.operands for name in structure.names}) > 1:
        raise ValueError(
            f"with capturable=True the parameters of a group have the same kinds of state; group {k} has some with a "
            "remainder or a copy and some without: put them into groups of their own"
        )
    if len({backend for backend, _ in places}) > 1 or len({device for _, device in places} - {None}) > 1:
        raise ValueError(f"with capturable=True the parameters of a group share a device and a backend; group {k} does not")
    kernels, device = max(places, key=lambda place: place[1] or 0)
    count = step_counts.in_array(kernels, device, count)
    count.number("lr", settings["lr"])
    return count
