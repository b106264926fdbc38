"""`Adam`: parameters in groups, their state, and the step over all of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from . import backends, checks, clipping, gradients, hyperparameters, step_counts, torch_tensors
from . import state as state_
from .description import of_adam, repr_of
from .device_step import Now
from .groups import (
    HYPERPARAMETERS,
    OF_PARAMS,
    HasGroups,
    Structure,
    checked_group,
    grads_of_params,
    is_sequence,
    named_params,
    parsed_groups,
    places_of_groups,
    saved_settings,
    some,
    what_is,
)
from .growing import Grows
from .kernels import array_bytes, streams
from .kernels.messages import shortened, shown
from .kernels.scalars import step_key
from .kernels.view import Bits, View, is_array
from .options import SAVED, Options, arguments
from .remembered import Remembered
from .repeated import RepeatedStep
from .state import OF_GROUPS, Parameter, ParameterKind
from .state_conversion import CONVERTED, Conversion, conversion
from .step_arrays import StepArrays, bounds_of_loaded, of_bounds, saved_bounds, without_arrays
from .step_norms import NormsOfStep, StepNorms
from .typing import (
    Algorithm,
    Array,
    Betas,
    Complex,
    Components,
    FilePath,
    Formula,
    Integer,
    LearningRate,
    LikeParams,
    Number,
    ParamBounds,
    Params,
    StateDtype,
    Stream,
)
from .under_way import UnderWay
from .update import Updates, check, update

# The options that a state_dict has, because the meaning of the moments depends on them, and their values
OF_MOMENTS = {"algorithm": hyperparameters.ALGORITHMS, "formula": hyperparameters.FORMULAS}


# What an error says of moments in another format
CONVERT = ": load_state_dict(state_dict, convert=True) converts moments to another format"


class Beginning(NamedTuple):
    """What an optimizer begins with of a parameter."""

    backend: Any
    view: View
    kept: dict[str, str]  # key of the state -> format
    numbers: int = 1  # of the parameter that share a v


class Group(NamedTuple):
    """A group of parameters, beside its settings in `Adam.groups`."""

    structure: Structure
    parameters: list[Parameter]
    kind: ParameterKind | None  # of all parameters, if they have one
    count: Any  # of steps, one of step_counts.py


class Adam(HasGroups, Grows):
    """Adam with L2 decay, in place on the caller's arrays.   (Kingma & Ba 2015, arXiv:1412.6980)

    params: one array, a sequence of arrays, a dict name -> array, or a list of groups such as
        `{"params": [w, b], "lr": 1e-4}`, whose own hyperparameters go before those given here (`decay_groups` makes two by
        patterns of names). Arrays as in `adam_step`. They are updated in place, so write into them, as `params["w"][...] = x`
        does. If a dict or a list holds another array there than before, as after `params["w"] = params["w"] * 2`, a step refuses:
        it would update the old one. `replace` puts another array in a parameter's place.
    lr: a number, or a callable of the number of the step, counted from 1: `lambda step: 1e-3 * min(1, step / 100)`. To check it,
        it is also called with 1 here and in `load_state_dict`. It may return an array of no dimensions, which is read, and
        waited for if it is on a GPU: optax's schedules are such callables. They count from 0, so that optax's own first step
        has schedule(0), and `lr=schedule` starts with schedule(1); `lr=lambda step: schedule(step - 1)` is as in optax.
    betas, eps, weight_decay, maximize, clip_value, bounds: as in `adam_step`. Bounds that are arrays have the structure of the
        group's params, with None for a parameter that has none. They are not state: a checkpoint does not hold them.
    amsgrad: keep the running maximum of v (Reddi et al. 2018).
    complex, components: as in `adam_step`, for the complex and for the real parameters of a group. m, max_v and ema of a complex
        parameter are real arrays with a last dimension of 2, and so is v of "parts". Groups may have their own, fixed with them.
    capturable: keep the step count on the device, so that a CUDA graph that captures `step` counts on when it is replayed.
        lr, and grad_scale in `step`, may then be arrays of one float32 or float64 on that device, whose values are read there
        when the step runs; in a captured graph they have to be, and norm and found_inf too, because a graph freezes numbers.
        betas, eps, weight_decay, max_norm and which parameters have gradients stay in a graph what they were at the capture.
        All parameters of a group share a device and a step count, so none of them can be skipped alone. On the CPU it works
        the same, without graphs. Take a step with the same arrays on the same stream before the capture.
    backend: "cupy", "numba-cuda" or "numba-cpu"; by default the arrays decide.

    state_dtype: "float32", "float64", "bfloat16" or "8bit", of m, v and max_v; by default float64 for float64 parameters, else
        float32. bfloat16 is kept as uint16 integers, and 8 bits as codes with scales "m_scale" and "v_scale"; both are rounded
        randomly. 8 bits need C-contiguous parameters of at most 32 bits, and have no max_v.
    master: "remainder" keeps, for each bfloat16 parameter, the 16 bits that make it an exact float32. To begin they are zero.
    param_copies: arrays of the same structure as params that are overwritten with the new parameters, rounded: say, bfloat16 or
        float16 copies of float32 parameters.
    ema_decay: keep a running mean of each parameter: its value after its first step, then ema += (1 - ema_decay) * (param - ema).
    zero_grad: store zeros in the gradients in the same pass. formula, eps_root, stochastic_rounding, seed: as in `adam_step`.

    Attributes: `groups`, a list of dicts: "params", "names" and the hyperparameters, which may be changed between steps;
    `state`, name -> {"step", "m", "v", and, as they are used, "max_v", "remainder", "ema", "m_scale", "v_scale"}; with
    capturable, "step" is the group's int64 array of one; `steps`, how many calls of `step` there were; `options`, what the
    constructor was given beside arrays, hyperparameters and backend, which is what `gpuadam.load` makes such an optimizer from.
    Names are the dict's keys; without a dict, "0", "1", ... in order, through all groups.

    Raises what `adam_step` raises, and ValueError for a parameter given twice, an unknown hyperparameter or no parameters.

    >>> import numpy as np, gpuadam
    >>> params = {"w": np.full(3, 0.5, "float32"), "b": np.zeros(1, "float32")}
    >>> opt = gpuadam.Adam(params, lr=0.1)
    >>> opt.step({"w": np.array([-33.0, 1.0, 0.0], "float32"), "b": None})
    >>> print(params["w"], params["b"])
    [0.6 0.4 0.5] [0.]
    >>> opt
    Adam(2 parameters, 4 elements, steps=1, lr=0.1)
    """

    decoupled: bool = False
    algorithm: Algorithm = "adam"
    steps: int
    options: Options
    repeats = True  # steps that are as the last ones take the short way

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        clip_value: Number | None = None,
        bounds: ParamBounds | None = None,
        complex: Complex | None = None,
        components: Components = 1,
        capturable: bool = False,
        formula: Formula = "torch",
        eps_root: Number = 0.0,
        state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None,
        param_copies: LikeParams = None,
        ema_decay: Number | None = None,
        zero_grad: bool = False,
        stochastic_rounding: bool = False,
        seed: Integer = 0,
        backend: str | None = None,
    ) -> None:
        given = arguments(locals())
        self.backend = backends.forced(backend)  # one that was in use when the moments were made stays in use
        self.state_backend = self.backend
        self.steps = 0
        self.options = Options(self.algorithm, self.decoupled, **{name: given[name] for name in SAVED})
        self.groups, self.arrangement = parsed_groups(params, {name: given[name] for name in HYPERPARAMETERS})
        self._remembered, self._repeated, self.under_way = Remembered(), RepeatedStep(), UnderWay()
        self._norm: Any = None  # of the last step, on a GPU
        self._step_norms: Any = None  # of every step, if capturable
        self._norm_counts: dict[int, Any] = {}  # for scalars that depend on a norm on the device, where the host counts
        beginnings = self._checked_params()
        self._make_parameters(beginnings, self.copies_of(param_copies, beginnings))
        self._make_groups(beginnings)
        self.warn_of_no_effect({"master": master, "stochastic_rounding": stochastic_rounding})

    def __repr__(self) -> str:
        """Return class, parameters, elements, calls of `step`, and what is not the default. No GPU is waited for."""
        return repr_of(self, self._description)

    def _description(self):
        """Return the text of `repr`."""
        return of_adam(self)

    def with_groups(self, groups, states, copies):
        """Return an optimizer like this one with other groups. states: name -> state that goes on. copies: name -> array."""
        twin = copy.copy(self)
        structures = [s._replace(names=list(g["names"])) for s, g in zip(self.arrangement.structures, groups, strict=True)]
        twin._repeated = RepeatedStep()
        twin.groups, twin.arrangement = groups, self.arrangement._replace(structures=structures)
        beginnings = twin._checked_params()
        twin._make_parameters(beginnings, copies, states)
        twin._make_groups(beginnings, [group.count for group in self._groups])
        return twin

    def _checked_params(self):
        """Check the parameters and hyperparameters. Return name -> Beginning of each parameter."""
        beginnings: dict[str, Beginning] = {}
        of_bounds(self.groups, self.arrangement.structures)  # which refuses those of another structure
        for group, structure in zip(self.groups, self.arrangement.structures, strict=True):
            has_array = self.options.capturable and is_array(group["lr"])  # whose number is not known before it is read
            h = self.checked(group | {"lr": 0.0} if has_array else group, structure, step=1)
            for name, param in zip(group["names"], group["params"], strict=True):
                if name in beginnings:
                    raise ValueError(f"two parameters are named {shown(name)}: names must differ")
                label = self.arrangement.label(name)
                kernels, (view,) = backends.choose([(label, checks.given(label, param))], self.backend)
                checks.param(view)
                hyperparameters.check_rounding(h, self.options.computed_in(view.format))
                numbers = checks.numbers(view, structure.complex, structure.components)
                checks.ordered(view, numbers, h.fixed, ())
                kept = self.options.kept(view, structure.amsgrad, numbers)
                beginnings[name] = Beginning(kernels, view, kept, numbers)
        views = [beginning.view for beginning in beginnings.values()]
        checks.given_once(views)
        checks.overlap(views, [])
        return beginnings

    def _make_parameters(self, beginnings, copies, states=None):
        """Make a Parameter of each. copies: name -> array. states: name -> state that goes on; others are at their start."""
        states = dict(states or {})
        new = self.new_state({name: beginning for name, beginning in beginnings.items() if name not in states})
        states |= {name: {"step": 0} | arrays for name, arrays in new.items()}
        seed, stochastic = checks.seed(self.options.seed), self.options.stochastic_rounding
        self.parameters = {}
        for number, (name, (_, view, kept, numbers)) in enumerate(beginnings.items()):
            kind = ParameterKind.of(view, kept, name in copies, stochastic, numbers)
            key = key_of_parameter(seed, number)
            self.parameters[name] = Parameter(name, kind, states[name], key, copies.get(name))
        self.state = {name: parameter.state for name, parameter in self.parameters.items()}
        computed_in = {self.options.computed_in(beginning.view.format) for beginning in beginnings.values()}
        self._largest_norm = min(map(clipping.LARGEST_NORM.__getitem__, computed_in))

    def _make_groups(self, beginnings, counts=None):
        """Make the Group of each. counts: of each, if they go on."""
        given = zip(self.groups, self.arrangement.structures, counts or [None] * len(self.groups), strict=True)
        self._groups = [self._made_group(k, *of_group, beginnings) for k, of_group in enumerate(given)]

    def _made_group(self, k, settings, structure, count, beginnings):
        """Return the Group of number k."""
        members = [self.parameters[name] for name in settings["names"]]
        kinds = {parameter.kind for parameter in members}
        places = {(beginning.backend, beginning.view.device) for beginning in map(beginnings.get, structure.names)}
        if not members and self.options.capturable and is_array(settings["lr"]):
            kernels, (view,) = backends.choose([("lr", settings["lr"])], self.backend)
            places = {(kernels, view.device)}
        if places and self.options.capturable:
            if len({kind.operands for kind in kinds}) > 1:
                raise ValueError(
                    f"with capturable=True the parameters of a group have the same kinds of state; group {k} has some with a "
                    "remainder or a copy and some without: put them into groups of their own"
                )
            if len({backend for backend, _ in places}) > 1 or len({device for _, device in places} - {None}) > 1:
                raise ValueError(
                    f"with capturable=True the parameters of a group share a device and a backend; group {k} does not"
                )
            kernels, device = max(places, key=lambda place: place[1] or 0)
            if not (isinstance(count, step_counts.ArrayCount) and count.is_at(kernels, device)):
                count = step_counts.in_array(kernels, device)
            count.number("lr", settings["lr"])
            for parameter in members:
                parameter.state["step"] = count.step
        return Group(structure, members, kinds.pop() if len(kinds) == 1 else None, count or step_counts.HostCount())

    def warn_of_no_effect(self, options):
        """Warn of options that do nothing for parameters of these formats."""
        checks.warn_of_no_effect([parameter.kind.param for parameter in self.parameters.values()], **options)

    # OffloadAdam does the following in its own way: `copies_of` and then `new_state` when it is made; `conditions`, `check`,
    # `step_arrays`, `norms_of_step`, `leave_out` and `launch` in a step; `copy_state` when a state_dict is loaded. It has no
    # `with_groups`.

    def new_state(self, beginnings):
        """Return name -> {key: zeros} of the state of all parameters. beginnings: name -> Beginning."""
        states: dict[str, dict[str, Any]] = {}
        for structure in self.arrangement.structures:
            states |= state_.zeros({name: beginnings[name] for name in structure.names if name in beginnings})
        return states

    def copies_of(self, param_copies, beginnings):
        """Return name -> copy of the parameter, of those that have one."""
        if param_copies is None:
            return {}
        copies = itertools.chain.from_iterable(self.arrangement.in_order(param_copies, "param_copies"))
        return {name: copy for name, copy in zip(beginnings, copies, strict=True) if copy is not None}

    def checked(self, group, structure, step, grad_scale=1.0):
        """Return the Hyperparameters of a group for a step, checked."""
        return checked_group(without_arrays(group), structure, self.options, step, grad_scale)

    @overload
    def step(
        self,
        grads: LikeParams = ...,
        *,
        grad_scale: Number | Array = ...,
        max_norm: Number | None = ...,
        norm: Number | Array | None = ...,
        check_finite: bool = ...,
        found_inf: Number | Array | None = ...,
        change: LikeParams = ...,
        lr_scale: LikeParams = ...,
        where: LikeParams | Literal["nonzero"] = ...,
        norms: Literal[False] = ...,
        stream: Stream | None = ...,
    ) -> None: ...

    @overload
    def step(
        self,
        grads: LikeParams = ...,
        *,
        grad_scale: Number | Array = ...,
        max_norm: Number | None = ...,
        norm: Number | Array | None = ...,
        check_finite: bool = ...,
        found_inf: Number | Array | None = ...,
        change: LikeParams = ...,
        lr_scale: LikeParams = ...,
        where: LikeParams | Literal["nonzero"] = ...,
        norms: Literal[True],
        stream: Stream | None = ...,
    ) -> StepNorms: ...

    @overload
    def step(
        self,
        grads: LikeParams = ...,
        *,
        grad_scale: Number | Array = ...,
        max_norm: Number | None = ...,
        norm: Number | Array | None = ...,
        check_finite: bool = ...,
        found_inf: Number | Array | None = ...,
        change: LikeParams = ...,
        lr_scale: LikeParams = ...,
        where: LikeParams | Literal["nonzero"] = ...,
        norms: bool = ...,
        stream: Stream | None = ...,
    ) -> StepNorms | None: ...

    def step(
        self,
        grads: LikeParams = OF_PARAMS,
        *,
        grad_scale: Number | Array = 1.0,
        max_norm: Number | None = None,
        norm: Number | Array | None = None,
        check_finite: bool = False,
        found_inf: Number | Array | None = None,
        change: LikeParams = None,
        lr_scale: LikeParams = None,
        where: LikeParams | Literal["nonzero"] = None,
        norms: bool = False,
        stream: Stream | None = None,
    ) -> StepNorms | None:
        """Update every parameter that has a gradient, in place. Return None, or with norms the norms of the step.

        grads: of the same structure as params; None in an array's place skips it. For groups, a list with the gradients of
            each, or with dicts `{"params": gradients}`, or, if every group is a dict by names, one dict of all names. By default
            the `.grad` of each parameter, for tensors of torch. They are only read, unless zero_grad is on.
        grad_scale: every gradient is multiplied by it first.
        max_norm: clip the gradients, scaled by grad_scale, to this norm over all of them, as torch.nn.utils.clip_grad_norm_ does:
            multiply them by max_norm / (norm + 1e-6) if that is below 1.
        norm: their norm before grad_scale, a number or what `global_norm` returned; by default it is computed here, which reads
            the gradients once more. On a GPU it stays there.
        check_finite: leave the step out if the norm is not finite, or if it is so large that a square may overflow (1.8e19 for
            float32). Nothing changes then but the gradients, if zero_grad is on. On a GPU this needs capturable.
        found_inf: leave the step out, likewise, if this is not zero: a number, or with capturable an array of one beside the
            parameters.
        change, lr_scale, where: as in `adam_step`, arrays of the same structure as params, with None for a parameter that has
            none; where may be "nonzero" for all of them. A step that is left out leaves change as it is. With capturable, all or
            none of the parameters of a group have one.
        norms: return (change, param), two float64 arrays of shape () beside the parameters, which have to be on one device:
            the norm of what the step adds to all parameters, and the norm of these after it (`gpuadam.guide.array_programs`).
            On a GPU nothing waits for them. With capturable they are the same two arrays at each step, which a graph writes.
        stream: on a GPU, as in `adam_step`.

        Everything is checked before anything is written: one bad array or hyperparameter stops the whole step. An interrupt or an
        error between the first launch and the end leaves parameters and state of two different steps: `step`, `state_dict` and
        `save` refuse from then on, until `load_state_dict` has set all of the state; the parameters have to be set too.
        """
        options = grad_scale, max_norm, norm, check_finite, found_inf, change, lr_scale, where, norms, stream
        if self._repeated.does(self, grads, options):
            return None
        self.under_way.check()
        self.arrangement.check(self.groups)
        if grads is OF_PARAMS:
            grads_of_groups = [grads_of_params(group, self.arrangement) for group in self.groups]
        else:
            grads_of_groups = self.arrangement.in_order(grads)
        left_out, on_device = False, None
        if type(grad_scale) is not float:
            grad_scale = backends.on_host("grad_scale", grad_scale)
        if not (max_norm is norm is found_inf is None and check_finite is False):
            conditions = self.conditions(grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream)
            grad_scale, left_out, on_device = conditions
        further = bounds = None
        for settings in self.groups:
            if settings["bounds"] is not None:
                bounds = of_bounds(self.groups, self.arrangement.structures)
        if bounds or not change is lr_scale is where is None:
            further = self.step_arrays(change, lr_scale, where, bounds)
        of_step = None if norms is False or not checks.flag("norms", norms) else self.norms_of_step()
        updates: list[Updates] = []
        taking: list[tuple] = []
        for settings, group, grads in zip(self.groups, self._groups, grads_of_groups, strict=True):
            of_group, parameters = self._updates_of(settings, group, grads, grad_scale, on_device)
            if further:
                of_group = [part for whole in of_group for part in further.parts(whole)]
            updates += of_group
            taking.append((group.count, parameters))
        if on_device and not self.options.capturable:
            self._clip_on_the_device(updates, grad_scale, on_device)
        if left_out:
            self.leave_out(updates, stream)
        elif updates:
            self.launch(updates, stream, of_step)
        if of_step and (left_out or not updates):
            of_step.without_update(stream)
        result = of_step and of_step.result()
        if of_step and self.options.capturable:
            self._step_norms = of_step.backend, result  # always in the same place, which captured graphs know
        if left_out:
            return result
        for count, parameters in taking:
            count.advance(parameters)
        self.steps += 1
        self.ended()
        if self.repeats:
            self._repeated.note(self, self._groups, updates, options)
        return result

    def zero_grad(self, grads: LikeParams = OF_PARAMS, *, stream: Stream | None = None) -> None:
        """Fill gradients with zeros, in place; without gradients, set the `.grad` of each tensor of torch to None.

        For gradients that are summed up over several backward passes: an optimizer does not keep them. A step with the option
        zero_grad does both in one pass over memory.

        grads: as in `step`, arrays beside the parameters that may be written. With torch, `[p.grad for p in params]` keeps the
            tensors where they are, as a captured graph needs it.
        stream: on a GPU, as in `adam_step`.

        Raises TypeError or ValueError, for an array that shares memory with a parameter too, and then nothing has changed.

        >>> import numpy as np, gpuadam
        >>> grads = {"w": np.ones(3, "float32")}
        >>> gpuadam.Adam({"w": np.ones(3, "float32")}).zero_grad(grads)
        >>> grads
        {'w': array([0., 0., 0.], dtype=float32)}
        """
        self.arrangement.check(self.groups)
        if grads is OF_PARAMS:
            for group in self.groups:
                grads_of_params(group, self.arrangement, "zero_grad")  # which refuses arrays that have no .grad
            for param in itertools.chain.from_iterable(group["params"] for group in self.groups):
                param.grad = None
            return
        of_groups = zip(self.groups, self.arrangement.in_order(grads), strict=True)
        labelled = [
            zip(map(self.arrangement.label, group["names"]), group["params"], of_group, strict=True)
            for group, of_group in of_groups
        ]
        gradients.fill_with_zeros(itertools.chain.from_iterable(labelled), self.backend, stream)

    def _updates_of(self, settings, group, grads, grad_scale, on_device):
        """Return the Updates of a group's parameters that have a gradient, and these parameters."""
        (structure, parameters, kind, count), arrays = group, settings["params"]
        lr, grad_scale, now = count.numbers(settings["lr"], grad_scale, on_device)
        known = settings if lr is settings["lr"] else settings | {"lr": lr}
        known = known if known["bounds"] is None else without_arrays(known)
        h = checked_group(known, structure, self.options, self.steps + 1, grad_scale)
        if id(None) in map(id, grads):
            present = [grad is not None for grad in grads]
            count.check_present(parameters, present)
            parameters, arrays, grads = (list(itertools.compress(x, present)) for x in (parameters, arrays, grads))
        updates = []
        for step, alike in count.alike(parameters, kind):
            columns, names = [arrays, grads], structure.names
            if len(alike) < len(names):
                names = [parameter.name for parameter in alike]
            if len(alike) < len(parameters):
                chosen = set(map(id, alike))
                columns = [list(itertools.compress(x, [id(p) in chosen for p in parameters])) for x in columns]
            updates.append(self._updates(h, structure, step, alike, names, columns, now))
        return updates, parameters

    def _updates(self, h, structure, step, parameters, names, columns, now):
        """Return the Updates of parameters of one kind. columns: their arrays and gradients, to which those of the state come."""
        _, operands, kept, bits, counted, *_ = parameters[0].kind
        states = [parameter.state for parameter in parameters]
        for operand in kept:
            columns.append([state[operand] for state in states])
        if len(columns) < len(operands):
            columns.insert(operands.index("param_copy"), [parameter.copy for parameter in parameters])
        updates = Updates(h, step, columns, operands, names, now, structure.complex, structure.components)
        updates.alone = self.arrangement.alone
        if counted:
            updates.bits, updates.stochastic = bits, self.options.stochastic_rounding
            updates.seed = checks.seed(self.options.seed)
            updates.keys, updates.starts = [p.key for p in parameters], [p.start for p in parameters]
        return updates

    def step_arrays(self, change, lr_scale, where, bounds):
        """Return the `StepArrays` of a step."""
        return StepArrays(self.arrangement, change, lr_scale, where, bounds)

    def norms_of_step(self):
        """Return the `NormsOfStep` of a step."""
        return NormsOfStep(dict(named_params(self.groups)), self._step_norms, self.backend)

    def kept_batches(self):
        """Return the batches of the last step that can be launched again, in the same list for as long as it is remembered."""
        return self._remembered.kept

    def launch(self, updates, stream, norms=None):
        """Check the Updates of a step and launch them. norms: a `NormsOfStep`, which is computed too."""
        update(updates, self.backend, stream, self._remembered, self.under_way, norms)

    def check(self, updates, stream):
        """Raise what `launch` would raise, and do nothing else."""
        check(updates, self.backend, stream)

    def conditions(self, grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream):
        """Return the `clipping.Conditions` of a step, checked; the norm is computed here if a step needs it."""
        max_norm = None if max_norm is None else checks.non_negative("max_norm", max_norm)
        check_finite = checks.flag("check_finite", check_finite)
        if norm is not None and max_norm is None and not check_finite:
            raise ValueError("norm is given, and nothing is done with it: give max_norm to clip by it, or check_finite=True")
        grads = [grad for grads in grads_of_groups for grad in grads if grad is not None]
        if norm is None and grads and (max_norm is not None or check_finite):
            norm = clipping.global_norm(grads, out=self._norm, backend=self.backend, stream=stream)
            if not isinstance(norm, np.ndarray):
                self._norm = norm  # always in the same place, which captured graphs know
        device_mode = any(group.count.on_device for group in self._groups)
        capturable, largest = self.options.capturable, self._largest_norm
        return clipping.conditions(grad_scale, max_norm, norm, check_finite, found_inf, capturable, device_mode, largest)

    def _clip_on_the_device(self, updates, grad_scale, on_device):
        """Let the scalars of Updates be computed on the device, because they depend on a norm there; the host counts steps."""
        if self.algorithm == "nadam":
            raise ValueError(
                "NAdam's scalars are the host's: clip with norm=float(gpuadam.global_norm(grads)), which waits for it"
            )
        for k, group in enumerate(updates):
            (param, *_), *_ = group.columns
            kernels, (view,) = backends.choose([(self.arrangement.label(group.names[0]), param)], self.backend)
            if view.device is None and kernels.memory == "CPU":
                clipping.refuse_on_gpu("norm")
            if k not in self._norm_counts:
                self._norm_counts[k] = step_counts.DeviceCount(kernels, view.device or 0)
            group.now = Now(self._norm_counts[k], group.h.lr, grad_scale, counts=False, **on_device)

    def leave_out(self, updates, stream):
        """Check a step that is left out, and zero the gradients if a step would."""
        self.check(updates, stream)
        for group in updates:
            if not group.h.fixed.zero_grad:
                continue
            grads = group.columns[1]
            torch_tensors.wrote(grads)
            for grad, name in zip(grads, group.names, strict=True):
                label = f"the gradient of {self.arrangement.label(name)}"
                kernels, (view,) = backends.choose([(label, grad)], self.backend)
                kernels.fill_zero(view, streams.handle(stream))

    def state_dict(self) -> dict[str, Any]:
        """Return {"steps", "state", "groups", "algorithm", "formula"}.

        "state" has, by name, the moments themselves and not copies, and "groups" the settings of each group. "algorithm" and
        "formula" say what the numbers of the moments mean.

        With capturable, step counts and learning rates are read from the device, as numbers, after waiting for all that is
        enqueued there, graphs included: the moments are then those of the counts.
        A learning rate that is a callable is not state: None stands in its place.
        """
        self.under_way.check()
        groups, states = [], {name: dict(state) for name, state in self.state.items()}
        for own, group in zip(self.groups, self._groups, strict=True):
            settings = saved_settings(own | {"bounds": saved_bounds(own["bounds"])})
            if is_array(settings["lr"]):
                settings["lr"] = group.count.value(settings["lr"])
            groups.append(settings)
        for name, n in self._counts().items():
            states[name]["step"] = n
        of_moments = {key: getattr(self.options, key) for key in OF_MOMENTS}
        return {"steps": self.steps, "state": states, "groups": groups} | of_moments

    def _counts(self):
        """Return how many steps each parameter has taken, by name."""
        read = [(group.parameters, group.count.read(group.parameters)) for group in self._groups]
        return {p.name: n for parameters, counts in read for p, n in zip(parameters, counts, strict=True)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """Copy a `state_dict()` into this optimizer, which must have parameters of the same names, shapes and dtypes.

        Groups must have the same parameters. Where these have names, they and the groups may come in another order, unless
        numbers are rounded randomly, which goes by the place of a parameter.

        An array that is the optimizer's own, because the state_dict was not copied when it was taken, has gone on since: it is
        refused if the parameter has. Moments that mean something else are refused: v of AdaMax is no mean of squares, and max_v
        of formula="optax" is that of the corrected v.

        convert: m, v and max_v may be in another format of `state_dtype`, also on another device, and are converted, rounded to
        nearest, through the host. `gpuadam.guide.narrow_numbers` says what that loses. Otherwise they are refused.

        All of it is checked first. Raises ValueError or TypeError, and then nothing has changed.
        """
        loaded = self.checked_state_dict(state_dict, checks.flag("convert", convert))
        states, copies, counts = loaded[1], [], self._counts()
        conversions: list[Conversion] = []
        for name, state in self.state.items():
            converted = self._conversion(name, states[name]) if convert else None
            if converted is not None:
                conversions.append(converted)
            for key in state.keys() - {"step", *(CONVERTED if converted else ())}:
                label = f"{key} of {self.arrangement.label(name)}"
                if state[key] is states[name][key]:
                    if self.under_way.changing or counts[name] != states[name]["step"]:
                        raise ValueError(
                            f"{label} in the state_dict is the optimizer's own array, which has changed since the state_dict was "
                            f"taken, at step {shown(states[name]['step'])}: give the arrays of a checkpoint, or of a copy that "
                            "was made then, as by copy.deepcopy(optimizer.state_dict())"
                        )
                    continue
                named = [(label, state[key]), (f"the loaded {label}", states[name][key])]
                checks.given(*named[1])
                kernels, (to, source) = backends.choose(named, self.state_backend)
                if key in CONVERTED and to.dtype != source.dtype and to.shape == source.shape:
                    theirs = shortened(str(source.dtype))
                    raise ValueError(f"{source.name} has dtype {theirs}, the optimizer's {to.dtype}{CONVERT}")
                checks.same_layout(to, source, kernels.copies_any_layout)
                copies.append((kernels, to, source))
        written, read = [to for _, to, _ in copies], [source for *_, source in copies]
        for to_convert in conversions:
            written += [view for _, view in to_convert.targets.values()]
            read += [view for _, view in to_convert.sources.values()]
        checks.overlap(written, read)
        self.under_way.begin()
        self.copy_state(copies)
        for to_convert in conversions:
            to_convert.run()
        self.go_on_from(*loaded)
        self.ended()

    def _conversion(self, name, loaded):
        """Return the `Conversion` of loaded moments into those of a parameter, or None if they have the same format."""
        own = {key: self.array_of_state(name, key) for key in self.state[name] if key in CONVERTED}
        loaded = {key: array for key, array in loaded.items() if key in CONVERTED}
        label, numbers = self.arrangement.label(name), self.parameters[name].kind.numbers
        return conversion(label, own, loaded, numbers, self.state_backend)

    def checked_state_dict(self, state_dict, convert=False):
        """Return (settings of each group, state of each name, steps) of a state_dict, after checking all but the arrays.

        convert: moments may be in another format.
        """
        if not isinstance(state_dict, Mapping) or not {"steps", "state", "groups"} <= set(state_dict):
            raise ValueError(f'a state_dict has "steps", "state" and "groups"; this is {what_is(state_dict)}')
        if missing := [key for key in OF_MOMENTS if key not in state_dict]:
            raise ValueError(
                f"the state_dict has no {missing}, and does not say what its moments mean. An older gpuadam made it: add "
                'those of the optimizer that it was taken from, such as state_dict | {"algorithm": "adam", "formula": "torch"}'
            )
        states, groups = state_dict["state"], state_dict["groups"]
        if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
            raise ValueError('"state" of a state_dict must be a dict: name -> dict of "step" and moments')
        if not is_sequence(groups) or not all(isinstance(group, Mapping) for group in groups):
            raise ValueError('"groups" of a state_dict must be a list of dicts')
        if set(states) != set(self.state):
            missing, extra = sorted(set(self.state) - set(states)), sorted(map(str, set(states) - set(self.state)))
            difference = f"not in the state_dict {some(missing)}, only in it {some(extra)}"
            raise ValueError(f"the parameters' names differ: {difference}")
        names = [group.get("names") for group in groups]
        if not all(isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own) for own in names):
            raise ValueError('the "names" of a group of a state_dict must be a list of strings')
        structures, by_place = self.arrangement.structures, self.options.rounds_randomly
        groups = [groups[k] for k in places_of_groups(list(map(list, names)), structures, by_place)]
        saved = {key: checks.one_of(known, f"the state_dict's {key}", state_dict[key]) for key, known in OF_MOMENTS.items()}
        settings = [self._checked_settings(k, group) for k, group in enumerate(groups)]
        counted = {}
        for name, state in self.state.items():
            differing, scales = set(states[name]) ^ set(state), set(OF_GROUPS)
            if differing - (scales if convert else set()):
                theirs, hint = some(sorted(map(str, states[name]))), "" if differing - scales else CONVERT
                raise ValueError(f"the state of {shown(name)} has {theirs}, the optimizer's {sorted(state)}{hint}")
            state_.check_meaning(state, self.options, **saved)
            counted[name] = dict(states[name]) | {"step": checks.count(f"step of {shown(name)}", states[name]["step"])}
        for group in self._groups:
            group.count.check_counts([counted[p.name]["step"] for p in group.parameters], group.parameters)
        return settings, counted, checks.count("steps", state_dict["steps"])

    def _checked_settings(self, k, saved):
        """Return the hyperparameters of group k in a state_dict."""
        # older ones do not have all
        saved = {"clip_value": None, "bounds": None, "complex": None, "components": 1} | saved
        if set(saved) != {"names", *HYPERPARAMETERS}:
            raise ValueError(
                f'a group of a state_dict has "names" and {HYPERPARAMETERS}; this one has {some(sorted(map(str, saved)))}'
            )
        settings = {key: saved[key] for key in HYPERPARAMETERS}
        if settings["lr"] is None:
            if not callable(self.groups[k]["lr"]):
                raise ValueError("the saved lr was a callable, which is not saved: give this optimizer's group one first")
            settings["lr"] = self.groups[k]["lr"]
        own_lr, count = self.groups[k]["lr"], self._groups[k].count
        if is_array(own_lr) and not callable(settings["lr"]):
            count.check_fill("lr", own_lr)
        settings["bounds"] = bounds_of_loaded(settings["bounds"], self.groups[k]["bounds"])
        h = self.checked(self.groups[k] | settings, self.arrangement.structures[k], step=1)
        for parameter in self._groups[k].parameters:
            hyperparameters.check_rounding(h, self.options.computed_in(parameter.kind.param))
        return settings

    def save(self, path: FilePath, *, with_params: bool = False) -> None:
        """Write class, options, hyperparameters, step counts and state to a safetensors file, from which `gpuadam.load` goes on.

        with_params: the parameters too, as `gpuadam.load(..., with_params=True)` needs them.

        Whatever happens, the file is the new one or as it was before: it is written beside its place, flushed to the disk and
        renamed. A killed save leaves ".gpuadam-*.tmp" in that folder, which may be deleted. It takes a few MB of memory, from a
        GPU too, which is waited for. A learning rate that is a callable is not saved. The format: `gpuadam.checkpoint`.

        Raises CheckpointError if the file cannot be written, or if another thread, or a graph with capturable, took a step
        meanwhile; ValueError or TypeError for what could not be loaded again.
        """
        from .checkpoint import saving  # a fifth of the time of importing gpuadam, which most programs need not wait for

        begun, counts = self.under_way.begun, self._counts()  # before `state_dict` sees that no step is under way

        def is_unchanged():
            return begun == self.under_way.begun and counts == self._counts()

        state_dict = self.state_dict()
        self.checked_state_dict(state_dict)  # what could not be loaded is not saved either
        saving.save(self, state_dict, path, is_unchanged, with_params=with_params)

    def array_of_state(self, name, key):
        """Return an array of the state of a parameter, in `Bits` if it is of integers that stand for other numbers."""
        kind, array = self.parameters[name].kind, self.state[name][key]
        bits = dict(zip(kind.operands, kind.bits, strict=True)).get(key)
        return Bits(array, bits) if bits else array  # type: ignore[arg-type]  # its name is one of these

    def ended(self):
        """Note that a step, or the loading of a state, has ended."""
        self.under_way.end()

    def go_on_from(self, groups, states, steps):
        """Take over what `checked_state_dict` returned: all but the arrays."""
        for own, group, settings in zip(self.groups, self._groups, groups, strict=True):
            if is_array(own["lr"]) and not callable(settings["lr"]):
                group.count.fill(own["lr"], settings["lr"])  # in place: a captured graph knows this array
                settings["lr"] = own["lr"]
            own.update(settings)
            if group.parameters:
                group.count.set(group.parameters, [states[parameter.name]["step"] for parameter in group.parameters])
        self.steps = steps

    def copy_state(self, copies):
        """Copy arrays of state into others. copies: (backend, View of one, View of what is loaded into it)."""
        for kernels, to, source in copies:
            array_bytes.wait(kernels, to)  # graphs may write it on any stream
            kernels.copy(to, source)
            array_bytes.wait(kernels, to)  # and may read it


OF_PARAMETERS = 0xD1B54A32D192ED03  # so that the keys of parameters are none of a step


def key_of_parameter(seed, number):
    """Return the key of the number-th parameter of all groups, counted from 0, for random rounding."""
    return step_key(seed ^ OF_PARAMETERS, number)
