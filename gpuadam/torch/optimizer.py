"""Adam and AdamW as optimizers of torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch

from .. import backends, checks, hyperparameters
from ..groups import HYPERPARAMETERS, MAPPING, Structure, places_of_groups, some
from ..kernels.messages import label_of, shown
from ..options import Options, arguments
from ..remembered import Remembered
from ..state import key_of_parameter
from ..typing import Integer, StateDtype
from ..under_way import UnderWay
from ..update import Updates, update
from . import distributed
from . import state as torch_state
from .repeated import RepeatedSteps
from .step_counts import Clock, HostCounts

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

# The settings of a group: those that torch's Adam has
OF_A_STEP = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
SETTINGS = (*OF_A_STEP, "amsgrad", "foreach", "capturable", "differentiable", "fused")
# Options of all groups, and those that gpuadam.Adam alone has: in a group they would be ignored, as torch ignores other keys
OF_ALL_GROUPS = ("state_dtype", "master", "stochastic_rounding", "seed", "backend")
OF_ARRAYS = {*HYPERPARAMETERS, *Options.__dataclass_fields__, "param_copies"} - {*SETTINGS, "algorithm"}


class Member(NamedTuple):
    """A parameter that has a gradient."""

    number: int  # among all parameters
    name: str
    param: torch.Tensor
    state: dict[str, Any]


class Adam(torch.optim.Optimizer):
    """`torch.optim.Adam` with gpuadam's update: one launch, or one call on the CPU, for all parameters of a dtype in a group.

    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in `torch.optim.Adam`; parameters may be
        float32, float64, bfloat16, float16 or, with v of each part as torch has it, complex64 or complex128, on the CPU and on
        CUDA devices, of any strides. Of DTensors, as `fully_shard` makes them (torch 2.5 or later), each rank updates its own
        part, and state is DTensors too.
    capturable: keep the step count on the device too, for CUDA graphs; lr may then be a tensor there. All parameters of such a
        group are on one device, and either all or none of them have gradients. On the CPU it makes no difference.
    foreach, fused: accepted, not both. There is one implementation, so the numbers are the same. With fused=True
        `torch.amp.GradScaler` leaves unscaling and the check for infinities to the step, as it does for torch's fused optimizers:
        gradients in memory stay scaled, and cannot be clipped unless `scaler.unscale_` was called. differentiable: refused.
    state_dtype, master, stochastic_rounding, seed, backend: as in `gpuadam.Adam`.

    State has torch's names and shapes: "step", "exp_avg", "exp_avg_sq" and "max_exp_avg_sq", in float32 unless a parameter is
    float64 or state_dtype says otherwise. This class loads a state_dict of `torch.optim.Adam` or AdamW, and they load one of this
    class; floating-point state is cast to the dtypes of the optimizer that loads it. torch's Adam does not read "remainder", nor
    the state of 8 bits: "exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scale" and "exp_avg_sq_scale".

    Everything is checked before anything is written, in all groups. Raises what `gpuadam.adam_step` raises, ValueError and
    TypeError above all. `torch.compile` leaves the step as it is.

    >>> import torch, gpuadam.torch
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = gpuadam.torch.Adam(model.parameters(), lr=1e-2)
    >>> model(torch.ones(2, 3)).square().mean().backward()
    >>> opt.step()
    >>> sorted(opt.state[model.weight])
    ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None,
        stochastic_rounding: bool = False,
        seed: Integer = 0,
        backend: str | None = None,
    ) -> None:
        given = arguments(locals())
        # the options that torch's Adam does not have: a checkpoint does not hold them
        self.options = Options(**{name: given[name] for name in ("state_dtype", "master", "stochastic_rounding", "seed")})
        self.backend = backends.forced(backend)
        if self.backend is not None:
            backends.choose([], self.backend)  # refuses a backend that is not there
        self.under_way = UnderWay()
        self._forget()
        super().__init__(params, {name: given[name] for name in SETTINGS})
        formats = [str(param.dtype).removeprefix("torch.") for group in self.param_groups for param in group["params"]]
        checks.warn_of_no_effect(formats, master=master, stochastic_rounding=stochastic_rounding)

    def _forget(self):
        """Begin without what is known beside the state, which others may have replaced."""
        self._remembered, self._repeated, self._counts = Remembered(), RepeatedSteps(), HostCounts()
        self._clocks: list[Clock] = []

    @property
    def _step_supports_amp_scaling(self):
        """Whether GradScaler sets grad_scale and found_inf and leaves the rest to the step, as with torch's if fused."""
        return bool(self.defaults["fused"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, a dict with "params" and hyperparameters of its own, as torch's optimizers do."""
        if isinstance(param_group, dict):
            _check_keys(param_group)
            self._checked(self.defaults | param_group)
            params = param_group.get("params")
            if isinstance(params, Iterable) and not isinstance(params, (torch.Tensor, set, str)):
                param_group["params"] = list(params)  # as torch does: an iterator can be read once
                _check_given_once(param_group["params"])
        super().add_param_group(param_group)

    def _checked(self, group, grad_scale=1.0):
        """Return the Hyperparameters of a group for a step."""
        if checks.flag("differentiable", group["differentiable"]):
            raise ValueError("differentiable=True: autograd cannot follow this update. Use torch.optim.Adam for that")
        if group["foreach"] and group["fused"]:
            raise ValueError("foreach and fused cannot both be True: they name two implementations. Leave them out")
        checks.flag("capturable", group["capturable"])
        checks.flag("amsgrad", group["amsgrad"])
        arrays = self.kept(group, torch.bfloat16)  # parameters of this dtype have every kind of state
        checks.combination("adam", [array.operand for array in arrays], self.options.stochastic_rounding)
        lr, betas, eps, weight_decay, decoupled, maximize = (group[key] for key in OF_A_STEP)
        numbers = _number("lr", lr), _number("betas", betas), eps, weight_decay
        return hyperparameters.with_formulas(*numbers, maximize, grad_scale, hyperparameters.formulas(decoupled=decoupled))

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in place, and return the closure's loss.

        closure: computes the loss anew, with gradients, before the update.
        """
        self.under_way.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        turn = self.under_way.turn
        mine: list[None] = []
        try:
            self.under_way.take_turn(mine)
            if grad_scale is not None or found_inf is not None or not self._repeated.does(self):
                with torch.no_grad():
                    self._step(grad_scale, found_inf)
        finally:
            turn.update(mine)
        return loss

    def _step(self, grad_scale, found_inf):
        """Make a step the long way."""
        if found_inf is not None and not all(map(_on_device, self.param_groups)):
            if found_inf.item():
                return
            found_inf = None
        updates: list[Updates] = []
        params, counted, clocks = [], [], []
        taken: list[tuple] = []
        for k, (group, members) in enumerate(self._members()):
            pairs = []
            if members and _on_device(group):
                clocks.append(self._clock(k, group, members))
                pairs = [(members, self._captured(group, members, clocks[-1], grad_scale, found_inf))]
            elif members:
                h = self._checked(group, 1.0 if grad_scale is None else _inverse(grad_scale.item()))
                for count, alike in self._alike(members):
                    pairs.append((alike, self._update(h, count + 1, group, alike)))
                    counted.append((count + 1, _steps(alike)))
            updates += [one for _, one in pairs]
            taken.append((group, pairs))
            params += [member.param for member in members]
        if updates:
            update(updates, self.backend, remembered=self._remembered, under_way=self.under_way)
            distributed.wrote(params)
            self._counts.advance(counted)
            for clock in clocks:
                clock.copy()
            self.under_way.end()
            if grad_scale is None:
                self._repeated.note(self, taken)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do. Raises ValueError after a step that was cut short."""
        self.under_way.check()
        return super().state_dict()

    def _members(self):
        """Yield (group, Members of it). State that a parameter does not have yet is made."""
        first = 0
        for group in self.param_groups:
            params = group["params"]
            names = group.get("param_names") or map(str, range(first, first + len(params)))
            members = []
            for number, (name, param) in enumerate(zip(names, params, strict=True), first):
                if param.grad is not None:
                    state = self.state[param] or self._new_state(group, param, name)
                    members.append(Member(number, name, param, state))
            yield group, members
            first += len(params)

    def _alike(self, members):
        """Return (steps taken, Members) of those that have taken as many steps and have the same dtype: one table takes them."""
        together: dict[tuple, list[Member]] = {}
        for member in members:
            if not isinstance(step := member.state["step"], torch.Tensor):
                raise TypeError(
                    f"the step of {label_of(member.name)} is {shown(step)} ({type(step).__name__}): it is counted in a "
                    "tensor, as torch.tensor(7.0)"
                )
            key = self._counts.taken(step), member.param.dtype
            together.setdefault(key, []).append(member)
        pairs = [(label_of(alike[0].name), count, alike) for (count, _), alike in together.items()]
        return [(torch_state.count(label, count), alike) for label, count, alike in pairs]

    def _update(self, h, step, group, members, now=None):
        """Return the Updates of Members that take the same step."""
        numbers, names, params, states = map(list, zip(*members, strict=True))
        arrays = self.kept(group, params[0].dtype)
        try:
            columns = [params, [param.grad for param in params], *([state[a.name] for state in states] for a in arrays)]
        except KeyError as error:
            raise ValueError(
                f"a parameter of {some(names)} has no {error} in its state: amsgrad or a dtype was changed after its first step"
            ) from None
        columns, starts = distributed.local_columns(names, columns)
        stochastic, seed = self.options.stochastic_rounding, self.options.seed
        keys = [_key(seed, number) for number in numbers] if self.options.rounds_randomly else None
        operands, called = ("param", "grad", *(a.operand for a in arrays)), ("param", "grad", *(a.name for a in arrays))
        settings = {"now": now, "stochastic": stochastic, "seed": seed, "keys": keys, "starts": starts, "complex": "parts"}
        return Updates(h, step, columns, operands, names, called=called, **settings)

    # State

    def kept(self, group, dtype):
        """Return the Arrays of state of the parameters of some dtype in a group."""
        return torch_state.kept(self.options.state_dtype, self.options.master, group["amsgrad"], dtype)

    def _new_state(self, group, param, name):
        """Return the state that a parameter begins with, zeros, and keep it."""
        if self.options.state_dtype == "8bit" and distributed.is_distributed(param):
            raise ValueError(f"{label_of(name)} is a DTensor, which cannot have state_dtype='8bit': take 'bfloat16' or None")
        _, (view,) = backends.choose([(label_of(name), distributed.local(param))], self.backend)
        checks.one_format(view, checks.FORMATS)
        checks.layout(view)
        if self.options.state_dtype == "8bit":
            checks.eight_bits(view)
        self.state[param] = state = torch_state.new(self.kept(group, param.dtype), param, group["capturable"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Copy a state_dict of this class, of torch.optim.Adam or of torch.optim.AdamW into this optimizer.

        Settings of groups become the loaded ones. As in torch, a parameter is known by its place. But if the checkpoint has
        "param_names", and they are those of this optimizer in another order, names decide. Everything is checked first: nothing
        has changed if it raises ValueError or TypeError.

        convert: the checkpoint may have 8-bit state where this optimizer has none, and the other way round: the moments are
        converted, rounded to nearest, through the host. `gpuadam.guide.narrow_numbers` says what that loses.
        """
        loaded, convert = {}, checks.flag("convert", convert)

        # torch would cast all state to the dtype of its parameter. So state is taken out, after the hooks of others, and put back
        def take(_, state_dict):
            state_dict = state_dict | {"param_groups": self._in_own_order(state_dict["param_groups"])}
            loaded.update(self._loaded(state_dict, convert))
            self.under_way.begin()
            return state_dict | {"state": {}}

        def put(_):
            self.state.update(loaded)
            self.under_way.end()
            self.under_way.free_turn()

        was_changing = self.under_way.changing
        with self.register_load_state_dict_pre_hook(take), self.register_load_state_dict_post_hook(put, prepend=True):
            try:
                super().load_state_dict(state_dict)
            except Exception:  # torch too refuses before it changes anything
                self.under_way.changing = was_changing
                raise

    def _in_own_order(self, groups):
        """Return loaded groups in the order of this optimizer's, if its parameters have their names; else as they are."""
        own, theirs = ([group.get("param_names") for group in given] for given in (self.param_groups, groups))
        if own == theirs or None in own + theirs or set(itertools.chain(*own)) != set(itertools.chain(*theirs)):
            return groups  # the place of a parameter decides, as in torch
        structures = [Structure(MAPPING, names, amsgrad=False) for names in own]
        ordered = []
        for k, names in zip(places_of_groups(theirs, structures, self.options.rounds_randomly), own, strict=True):
            keys = dict(zip(theirs[k], groups[k]["params"], strict=True))
            ordered.append(groups[k] | {"params": [keys[name] for name in names], "param_names": names})
        return ordered

    def _loaded(self, state_dict, convert):
        """Return parameter -> state, of copies in this optimizer's dtypes and on its devices."""
        groups, loaded = state_dict["param_groups"], {}
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return {}  # torch refuses these groups, in its words
        states = torch_state.by_key(state_dict["state"], [key for group in groups for key in group["params"]])
        for present, saved in zip(self.param_groups, groups, strict=True):
            group = self.defaults | saved
            self._checked(group)
            checks.bias_correction(saved)
            names = present.get("param_names") or saved["params"]
            for key, name, param in zip(saved["params"], names, present["params"], strict=True):
                if state := states.get(key):
                    arrays, label = self.kept(group, param.dtype), label_of(name)
                    loaded[param] = torch_state.converted(state, arrays, param, group["capturable"], label, convert)
        return loaded

    def __getstate__(self):
        return super().__getstate__() | {"options": self.options, "backend": self.backend, "under_way": self.under_way}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:  # those of other versions of torch have fewer settings
            for key, default in self.defaults.items():
                group.setdefault(key, default)

    # Step counts on the device

    def _captured(self, group, members, clock, grad_scale, found_inf):
        """Return the Updates of a group whose scalars are computed on its device."""
        lr, device = group["lr"], members[0].param.device
        lr = lr if isinstance(lr, torch.Tensor) and lr.is_cuda else _number("lr", lr)
        scale = 1.0 if grad_scale is None else grad_scale.to(device, non_blocking=True).double().reciprocal()
        skip = None if found_inf is None else found_inf.to(device, non_blocking=True)
        lr, _, now = clock.on_device.numbers(lr, scale, {"found_inf": skip})
        return self._update(self._checked(group | {"lr": lr}), 1, group, members, now)

    def _clock(self, k, group, members):
        """Return the Clock of group k.

        Its count is read from the state, which waits for the device, in the first step of these parameters together, which is not
        captured, and after others have written the state.
        """
        n, n_all, first, steps = len(members), len(group["params"]), members[0], _steps(members)
        _share(n == n_all, k, f"all have gradients, or none has (here {n} of {n_all} have; give zeros to the others)")
        _share(len({member.param.device for member in members}) == 1, k, "share a device")
        clock = next((clock for clock in self._clocks if clock.is_of(steps)), None)
        if clock and clock.is_current:
            return clock
        alike = self._alike(members)
        kinds = {(count, *(a.operand for a in self.kept(group, some[0].param.dtype))) for count, some in alike}
        _share(len(kinds) == 1, k, "share a step count and have the same kinds of state")
        if clock is None:
            kernels, (view,) = backends.choose([(label_of(first.name), distributed.local(first.param))], self.backend)
            clock = Clock(steps, kernels, view.device or 0, first.param)
            self._clocks.append(clock)
        clock.set(alike[0][0])
        return clock


class AdamW(Adam):
    """`torch.optim.AdamW` with gpuadam's update: as `Adam`, but weight_decay, 0.01 by default, is decoupled.

    >>> import torch, gpuadam.torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> opt = gpuadam.torch.AdamW([w], lr=0.1, weight_decay=0.5)
    >>> w.grad = torch.zeros(2)
    >>> opt.step()
    >>> w.tolist()
    [0.949999988079071, 0.949999988079071]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None,
        stochastic_rounding: bool = False,
        seed: Integer = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()), decoupled_weight_decay=True)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # whatever was loaded: this class decouples
            group["decoupled_weight_decay"] = True


_key = functools.cache(key_of_parameter)


def _check_keys(group):
    """Refuse options of gpuadam's in a group, where they would do nothing. torch and its users put other keys there."""
    for name in group.keys() & {*OF_ALL_GROUPS, *OF_ARRAYS}:
        hint = "give it to the optimizer, for all of its groups" if name in OF_ALL_GROUPS else "gpuadam.Adam has it"
        raise ValueError(f"a group has {name}={shown(group[name])}, which does nothing there: {hint}")


def _check_given_once(params):
    """Refuse a parameter that is twice in a group. torch warns, takes two steps of it, and says that it will refuse."""
    names: list[str] = []
    first: dict[int, int] = {}
    for number, given in enumerate(params):
        name, param = given if isinstance(given, tuple) and len(given) == 2 else (str(number), given)
        names.append(name)
        if (other := first.setdefault(id(param), number)) != number:
            raise ValueError(
                f"the parameters {shown(names[other])} and {shown(name)} of a group are one tensor: give it once"
            )


def _steps(members):
    """Return the counts in the state of Members."""
    return [member.state["step"] for member in members]


def _number(name, value):
    """Return a hyperparameter, a tensor of one number as a number, betas as a tuple of numbers."""
    if isinstance(value, (tuple, list)):
        return tuple(one if type(one) is float else _number(f"{name}[{k}]", one) for k, one in enumerate(value))
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: it must be one number")
    return value.item()


def _inverse(scale):
    """Return the factor that undoes a GradScaler's scale."""
    if not scale:
        raise ValueError("the GradScaler's scale is 0, after too many infinities: make another scaler")
    return 1.0 / scale


def _share(condition, k, what):
    """Raise ValueError if a condition of capturable groups does not hold in group k. what: the condition in words."""
    if not condition:
        raise ValueError(
            f"with capturable=True the parameters of a group {what}; those of group {k} do not: put them into groups of their own"
        )


def _on_device(group):
    return group["capturable"] and any(param.is_cuda for param in group["params"])
