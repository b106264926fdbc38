"""`Adam`: parameters in groups, their state, and the step over all of them."""

from __future__ import annotations

import itertools
from typing import Any, Literal, overload

from . import backends, checks, clipping, gradients, step_counts
from . import state as state_
from .description import of_adam, repr_of
from .device_step import Now
from .groups import HYPERPARAMETERS, OF_PARAMS, HasGroups, grads_of_params, named_params, parsed_groups
from .growing import Grows
from .kernels import streams
from .options import SAVED, Options, arguments
from .parameters import begun, made_group, made_parameters
from .remembered import Remembered
from .repeated import RepeatedStep
from .step_arrays import StepArrays, of_bounds
from .step_norms import StepNorms, norms_of
from .typing import (
    Algorithm,
    Array,
    Betas,
    Complex,
    Components,
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
        group's params, with None for a parameter that has none. Their shapes and dtypes are checked here, in `add` and in
        `replace`, for which they are put into `groups` first; and where they are in CPU memory, that no low end is above the high
        one: on a GPU that would wait for it. They are not state: a checkpoint does not hold them.
    amsgrad: keep the running maximum of v (Reddi et al. 2018).
    complex, components: as in `adam_step`, for the complex and for the real parameters of a group. m, max_v and ema of a complex
        parameter are real arrays with a last dimension of 2, and so is v of "parts". Groups may have their own, fixed with them.
    capturable: keep the step count on the device, so that a CUDA graph that captures `step` counts on when it is replayed.
        lr, and grad_scale in `step`, may then be arrays of one float32 or float64 on that device, whose values are read there
        when the step runs; in a captured graph they have to be, and norm and found_inf too, because a graph freezes numbers.
        betas, eps, weight_decay, max_norm and which parameters have gradients stay in a graph what they were at the capture.
        All parameters of a group share a device and a step count, so none of them can be skipped alone. On the CPU it works
        the same, without graphs. Take a step with the same options before the capture, on any stream, which loads the kernels.
        A graph keeps the addresses of the arrays that it was captured with, gradients too: these arrays have to live on.
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
    capturable, "step" is the group's int64 array of one; `steps`, how many were taken and not left out; `options`, what the
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
        self.norm_at: Any = None  # the array on a GPU that a step's norm of the gradients is in; None on the CPU
        self._norms: list[Any] = []  # such arrays, one for each device and library
        self._step_norms: Any = None  # of every step, if capturable
        # for scalars that depend on a norm on the device, where the host counts: by number of the Updates, backend and device
        self._norm_counts: dict[tuple, Any] = {}
        beginnings = begun(self)
        self._take(beginnings, self.copies_of(param_copies, beginnings))
        self.warn_of_no_effect({"master": master, "stochastic_rounding": stochastic_rounding})

    def __repr__(self) -> str:
        """Return class, parameters, elements, calls of `step`, and what is not the default. No GPU is waited for."""
        return repr_of(self, self._description)

    def _description(self):
        """Return the text of `repr`."""
        return of_adam(self)

    def with_groups(self, groups, states, copies):
        """Return an optimizer like this one with other groups. states: name -> state that goes on. copies: name -> array."""
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self))
        structures = [s._replace(names=list(g["names"])) for s, g in zip(self.arrangement.structures, groups, strict=True)]
        twin._repeated = RepeatedStep()
        twin.groups, twin.arrangement = groups, self.arrangement._replace(structures=structures)
        twin._take(begun(twin, states), copies, states, [group.count for group in self._groups])
        return twin

    def _take(self, beginnings, copies, states=None, counts=None):
        """Make the Parameters and the Groups.

        copies: name -> array. states: name -> state that goes on; others are at their start. counts: of each group, if these go
        on.
        """
        states = dict(states or {})
        new = {name: beginning for name, beginning in beginnings.items() if name not in states}
        states |= {name: {"step": 0} | arrays for name, arrays in self.new_state(new).items()}
        self.parameters = made_parameters(beginnings, states, copies, self.options)
        self.state = state_.States((name, parameter.state) for name, parameter in self.parameters.items())
        computed_in = {self.options.computed_in(beginning.view.format) for beginning in beginnings.values()}
        self.largest_norm = min(map(clipping.LARGEST_NORM.__getitem__, computed_in))
        self._groups = [
            made_group(k, settings, structure, beginnings, self, count)
            for k, (settings, structure, count) in enumerate(
                zip(self.groups, self.arrangement.structures, counts or [None] * len(self.groups), strict=True)
            )
        ]

    def warn_of_no_effect(self, options):
        """Warn of options that do nothing for parameters of these formats."""
        checks.warn_of_no_effect([parameter.kind.param for parameter in self.parameters.values()], **options)

    # OffloadAdam does the following in its own way: `new_state` when it is made; `conditions`, `check`, `step_arrays`,
    # `norms_of_step`, `leave_out` and `launch` in a step; `copy_state` when a state_dict is loaded. It has no `with_groups`.

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

    @overload
    def step(
        self, grads: LikeParams = ..., *, grad_scale: Number | Array = ..., max_norm: Number | None = ...,
        norm: Number | Array | None = ..., check_finite: bool = ..., found_inf: Number | Array | None = ...,
        change: LikeParams = ..., lr_scale: LikeParams = ..., where: LikeParams | Literal["nonzero"] = ...,
        norms: Literal[False] = ..., stream: Stream | None = ...,
    ) -> None: ...  # fmt: skip

    @overload
    def step(
        self, grads: LikeParams = ..., *, grad_scale: Number | Array = ..., max_norm: Number | None = ...,
        norm: Number | Array | None = ..., check_finite: bool = ..., found_inf: Number | Array | None = ...,
        change: LikeParams = ..., lr_scale: LikeParams = ..., where: LikeParams | Literal["nonzero"] = ...,
        norms: Literal[True], stream: Stream | None = ...,
    ) -> StepNorms: ...  # fmt: skip

    @overload
    def step(
        self, grads: LikeParams = ..., *, grad_scale: Number | Array = ..., max_norm: Number | None = ...,
        norm: Number | Array | None = ..., check_finite: bool = ..., found_inf: Number | Array | None = ...,
        change: LikeParams = ..., lr_scale: LikeParams = ..., where: LikeParams | Literal["nonzero"] = ...,
        norms: bool = ..., stream: Stream | None = ...,
    ) -> StepNorms | None: ...  # fmt: skip

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
            multiply them by max_norm / (norm + 1e-6) if that is below 1. Infinity clips no finite norm. Where the norm is NaN,
            all gradients become NaN; check_finite leaves such a step out.
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

        Everything is checked before anything is written: one bad array or hyperparameter stops the whole step. A step is refused
        (ValueError) while another thread takes one. An interrupt or an error between the first launch and the end leaves
        parameters and state of two different steps: `step`, `state_dict` and `save` refuse from then on, until `load_state_dict`
        has set all of the state; the parameters have to be set too.
        """
        if type(grad_scale) is not float:
            grad_scale = checks.as_float(grad_scale)
        options = grad_scale, max_norm, norm, check_finite, found_inf, change, lr_scale, where, norms, stream
        turn = self.under_way.turn
        mine: list[None] = []
        try:
            self.under_way.take_turn(mine)
            if self.repeats and self._repeated.does(self, grads, options):
                return self._repeated.norms
            return self._step(grads, options)
        finally:
            turn.update(mine)

    def _step(self, grads, options):
        """Make a step the long way. options: the other arguments of `step`."""
        grad_scale, max_norm, norm, check_finite, found_inf, change, lr_scale, where, norms, stream = options
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
        if any(settings.get("bounds") is not None for settings in self.groups):
            bounds = of_bounds(self.groups, self.arrangement.structures)
        if bounds or not change is lr_scale is where is None:
            further = self.step_arrays(change, lr_scale, where, bounds)
        of_step = None if norms is False or not checks.flag("norms", norms) else self.norms_of_step()
        updates: list[Updates] = []
        taking: list[tuple] = []
        for settings, group, grads in zip(self.groups, self._groups, grads_of_groups, strict=True):
            of_group, parameters = group.updates(settings, grads, grad_scale, on_device, self.steps + 1, self.options)
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
            of_step.prepare(streams.handle(stream))
            of_step.launch()
        result = of_step and StepNorms(*of_step.result)
        if of_step and self.options.capturable:
            self._step_norms = of_step.backend, result  # always in the same place, which captured graphs know
        if left_out:
            return result
        for count, parameters in taking:
            count.advance(parameters)
        self.steps += 1
        self.ended()
        if self.repeats:
            self._repeated.note(self, self._groups, updates, options, of_step)
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

    def step_arrays(self, change, lr_scale, where, bounds):
        """Return the `StepArrays` of a step."""
        return StepArrays(self.arrangement, change, lr_scale, where, bounds)

    def norms_of_step(self):
        """Return the `change_sums.NormPasses` of a step."""
        return norms_of(dict(named_params(self.groups)), self._step_norms, self.backend)

    def kept_batches(self):
        """Return the batches of the last step that can be launched again, in the same list for as long as it is remembered."""
        return self._remembered.kept

    def launch(self, updates, stream, norms=None):
        """Check the Updates of a step and launch them. norms: `change_sums.NormPasses`, which are made too."""
        update(updates, self.backend, stream, self._remembered, self.under_way, norms)

    def check(self, updates, stream):
        """Raise what `launch` would raise, and do nothing else."""
        check(updates, self.backend, stream)

    def conditions(self, grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream):
        """Return what `clipping.conditions` does of a step; the norm is computed here if a step needs it."""
        max_norm = checks.max_norm(max_norm)
        check_finite = checks.flag("check_finite", check_finite)
        if norm is not None and max_norm is None and not check_finite:
            raise ValueError("norm is given, and nothing is done with it: give max_norm to clip by it, or check_finite=True")
        grads = [grad for grads in grads_of_groups for grad in grads if grad is not None]
        if norm is None and grads and (max_norm is not None or check_finite):
            norm = clipping.norm_in_place(grads, self._norms, self.backend, stream)
            self.norm_at = None if isinstance(norm, float) else norm
        device_mode = any(group.count.on_device for group in self._groups)
        capturable, largest = self.options.capturable, self.largest_norm
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
            place = k, kernels.name, view.device or 0
            if place not in self._norm_counts:
                self._norm_counts[place] = step_counts.DeviceCount(kernels, place[-1])
            group.now = Now(self._norm_counts[place], group.h.lr, grad_scale, counts=False, **on_device)

    def leave_out(self, updates, stream):
        """Check a step that is left out, and zero the gradients if a step would."""
        self.check(updates, stream)
        of_groups = [
            zip(map(self.arrangement.label, group.names), *group.columns[:2], strict=True)
            for group in updates
            if group.h.fixed.zero_grad
        ]
        gradients.fill_with_zeros(itertools.chain.from_iterable(of_groups), self.backend, stream)
