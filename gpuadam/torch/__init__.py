"""Adam and AdamW for PyTorch: the interface and the checkpoints of `torch.optim`, the update of gpuadam.

`import gpuadam` does not import torch; `import gpuadam.torch` does.
"""

import functools
import itertools
from typing import NamedTuple

import torch

from .. import backends, checks, functional, hyperparameters
from .. import step_counts as capturable_
from ..optimizer import STATE_DTYPES, key_of_parameter
from . import state as torch_state


class Options(NamedTuple):
    """What torch's Adam does not have. It is the optimizer's, not a checkpoint's."""

    state_dtype: str | None
    master: str | None
    stochastic_rounding: bool
    seed: int
    backend: str | None


class Adam(torch.optim.Optimizer):
    """`torch.optim.Adam` with gpuadam's update: one launch, or one call on the CPU, for all parameters of a group.

    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in `torch.optim.Adam`; parameters may be
        float32, float64, bfloat16 or float16, on the CPU and on CUDA devices, of any strides.
    capturable: keep the step count on the device too, for CUDA graphs; lr may then be a tensor there. All parameters of such a
        group are on one device, and all of them have gradients or none. On the CPU it makes no difference.
    foreach, fused: accepted, and without effect, because there is one implementation; not both. differentiable: refused.
    state_dtype, master, stochastic_rounding, seed, backend: as in `gpuadam.Adam`.

    State has torch's names and shapes: "step", "exp_avg", "exp_avg_sq" and "max_exp_avg_sq", in float32 unless a parameter is
    float64 or state_dtype says otherwise. It loads a state_dict of `torch.optim.Adam` or AdamW, and they load one of this;
    floating-point state becomes that of the dtypes of the optimizer that loads it. Beside it there may be "remainder", and for 8
    bits "exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scale" and "exp_avg_sq_scale", which torch's Adam does not read.

    `torch.amp.GradScaler` leaves unscaling to the step, as it does for torch's fused optimizers. Everything is checked before
    anything is written, in all groups. Raises what `gpuadam.adam_step` raises, ValueError and TypeError above all.

    >>> import torch, gpuadam.torch
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = gpuadam.torch.Adam(model.parameters(), lr=1e-2)
    >>> model(torch.ones(2, 3)).square().mean().backward()
    >>> opt.step()
    >>> sorted(opt.state[model.weight])
    ['exp_avg', 'exp_avg_sq', 'step']
    """

    _step_supports_amp_scaling = True  # so GradScaler sets grad_scale and found_inf and calls step

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        foreach=None,
        maximize=False,
        capturable=False,
        differentiable=False,
        fused=None,
        decoupled_weight_decay=False,
        state_dtype=None,
        master=None,
        stochastic_rounding=False,
        seed=0,
        backend=None,
    ):
        self.options = Options(
            None if state_dtype is None else checks.one_of(STATE_DTYPES, "state_dtype", state_dtype),
            None if master is None else checks.one_of(("remainder",), "master", master),
            checks.flag("stochastic_rounding", stochastic_rounding),
            checks.seed(seed),
            backends.forced(backend),
        )
        if self.options.backend:
            backends.choose([], self.options.backend)  # refuses one that is not there
        self._memo, self._clocks = functional.Memo(), {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """Add a group of parameters, a dict with "params" and hyperparameters of its own, as torch's optimizers do."""
        if isinstance(param_group, dict):
            self._checked(self.defaults | param_group)
        super().add_param_group(param_group)

    def _checked(self, group, grad_scale=1.0):
        """Return the Hyperparameters of a group for a step."""
        if checks.flag("differentiable", group["differentiable"]):
            raise ValueError("differentiable=True: autograd cannot follow this update. Use torch.optim.Adam for that")
        if group["foreach"] and group["fused"]:
            raise ValueError("foreach and fused cannot both be True: they name two implementations. Leave them out")
        checks.flag("capturable", group["capturable"])
        operands = {"m_scale": self.options.state_dtype == "8bit", "max_v": checks.flag("amsgrad", group["amsgrad"])}
        operands["remainder"] = self.options.master is not None
        checks.combination("adam", [name for name, there in operands.items() if there], self.options.stochastic_rounding)
        return hyperparameters.checked(
            lr=_number(group["lr"]),
            betas=_numbers(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, in place, and return the closure's loss.

        closure: computes the loss anew, with gradients, before the update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not all(map(_on_device, self.param_groups)) and found_inf.item():
            return loss
        updates, steps, first = [], [], 0
        for k, group in enumerate(self.param_groups):
            params = group["params"]
            names = group.get("param_names") or [str(n) for n in range(first, first + len(params))]
            given = [
                (n, param, name, self.state[param] or self._new_state(group, param, name))
                for n, param, name in zip(itertools.count(first), params, names)
                if param.grad is not None
            ]
            first += len(params)
            if given and _on_device(group):
                updates.append(self._captured(k, group, given, grad_scale, found_inf))
            elif given:
                h = self._checked(group, 1.0 if grad_scale is None else _inverse(grad_scale.item()))
                updates += [self._updates(h, step + 1, group, own) for step, own in self._alike(given)]
            steps += [(state["step"], _on_device(group)) for *_, state in given]
        if updates:
            functional.update(updates, self.options.backend, memo=self._memo)
        _count(steps, found_inf)
        return loss

    def _alike(self, given):
        """Return (steps taken, parameters) of those that have taken as many steps and have the same kind of state."""
        bfloat16 = torch.bfloat16 if self.options.master else None  # of which some have a remainder
        kinds = [(state["step"].item(), param.dtype is bfloat16) for _, param, _, state in given]
        alike = [list(itertools.compress(given, [kind == own for own in kinds])) for kind in dict.fromkeys(kinds)]
        return [(torch_state.count(f"params[{own[0][2]!r}]", own[0][3]["step"]), own) for own in alike]

    def _updates(self, h, step, group, given, now=None):
        """Return the Updates of parameters of a group. given: (number, parameter, name, state) of each."""
        numbers, params, names, states = map(list, zip(*given, strict=True))
        kept = self._kept(group, params[0])
        try:
            columns = [params, [param.grad for param in params], *([state[key] for state in states] for key in kept)]
        except KeyError as error:
            raise ValueError(
                f"a parameter of {names} has no {error} in its state: amsgrad or a dtype was changed after its first step"
            ) from None
        seed = self.options.seed
        keys = [_key(seed, n) for n in numbers] if self._is_random() else None
        operands = tuple(torch_state.OPERANDS[key] for key in kept)
        return functional.Updates(h, step, columns, names, now, operands[2:], self.options.stochastic_rounding, seed, keys)

    def _is_random(self):
        return self.options.stochastic_rounding or self.options.state_dtype in ("bfloat16", "8bit")

    # State

    def _kept(self, group, param):
        return torch_state.kept(self.options.state_dtype, self.options.master, group["amsgrad"], param.dtype)

    def _new_state(self, group, param, name):
        """Return the state that a parameter begins with, zeros, and keep it."""
        _, (view,) = backends.choose([(f"params[{name!r}]", param)], self.options.backend)
        checks.one_format(view, checks.FORMATS)
        checks.layout(view)
        if self.options.state_dtype == "8bit":
            checks.eight_bits(view)
        self.state[param] = state = torch_state.new(self._kept(group, param), param, group["capturable"])
        return state

    def load_state_dict(self, state_dict):
        """Copy a state_dict of this class, of torch.optim.Adam or of torch.optim.AdamW into this optimizer.

        Settings of groups become the loaded ones. All is checked first: where it raises ValueError or TypeError, nothing has
        changed.
        """
        loaded = {}

        # torch would cast all state to the dtype of its parameter: it is taken out after the hooks of others, and put back
        def take(_, given):
            loaded.update(self._loaded(given))
            return given | {"state": {}}

        def put(_):
            self.state.update(loaded)

        hooks = self.register_load_state_dict_pre_hook(take), self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _loaded(self, state_dict):
        """Return parameter -> state, of copies in this optimizer's dtypes and on its devices."""
        groups, states = state_dict["param_groups"], dict(state_dict["state"])
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return {}  # which torch refuses, in its words
        loaded = {}
        for own, saved in zip(self.param_groups, groups, strict=True):
            group = self.defaults | saved
            self._checked(group)
            for key, param in zip(saved["params"], own["params"], strict=True):
                if state := states.pop(key, None):
                    kept = self._kept(group, param)
                    loaded[param] = torch_state.converted(state, kept, param, group["capturable"], f"params[{key!r}]")
        return loaded | states

    def __getstate__(self):
        return super().__getstate__() | {"options": self.options}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._memo, self._clocks = functional.Memo(), {}
        for group in self.param_groups:  # those of other versions of torch have fewer
            for key, default in self.defaults.items():
                group.setdefault(key, default)

    # Step counts on the device

    def _captured(self, k, group, given, grad_scale, found_inf):
        """Return the Updates of a group whose scalars are computed on its device."""
        if len(given) < len(group["params"]):
            raise ValueError(
                f"with capturable=True the parameters of a group share a step count, and {len(given)} of the "
                f"{len(group['params'])} in group {k} have gradients: give zeros, put the others into a group of their own, or "
                "skip the whole group"
            )
        if len({param.device for _, param, *_ in given}) > 1:
            raise ValueError(f"with capturable=True the parameters of a group share a device; those of group {k} do not")
        _, param, name, _ = given[0]
        if k not in self._clocks:  # waits for the device: in the first step, which is not captured
            counts = [step for step, _ in self._alike(given)]
            if len(counts) > 1:
                raise ValueError(
                    "with capturable=True the parameters of a group share a step count and have the same kinds of state; those "
                    f"of group {k} do not: put them into groups of their own"
                )
            kernels, (view,) = backends.choose([(f"params[{name!r}]", param)], self.options.backend)
            clock = capturable_.Clock(kernels, view.device or 0, capturable_.NUMBERS)
            clock.fill(clock.step, counts[0])
            self._clocks[k] = clock
        lr, device = group["lr"], param.device
        is_there = isinstance(lr, torch.Tensor) and lr.is_cuda
        h = self._checked(group | {"lr": 0.0} if is_there else group)
        scale = 1.0 if grad_scale is None else grad_scale.to(device, non_blocking=True).double().reciprocal()
        skip = None if found_inf is None else found_inf.to(device, non_blocking=True)
        now = capturable_.Now(self._clocks[k], lr if is_there else h.lr, scale, found_inf=skip)
        return self._updates(h, 1, group, given, now)


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

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, **options):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # whatever was loaded: it is what this class is
            group["decoupled_weight_decay"] = True


_key = functools.cache(key_of_parameter)


def _number(value):
    """Return a hyperparameter, which may be a tensor of one, as a number."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"a hyperparameter is a tensor of shape {tuple(value.shape)}: it must be one number")
    return value.item()


def _numbers(betas):
    return tuple(map(_number, betas)) if isinstance(betas, (tuple, list)) else betas


def _inverse(scale):
    """Return the factor that undoes a GradScaler's scale."""
    if not scale:
        raise ValueError("the GradScaler's scale is 0, after too many infinities: make another scaler")
    return 1.0 / scale


def _on_device(group):
    return group["capturable"] and any(param.is_cuda for param in group["params"])


def _count(steps, found_inf):
    """Add 1 to step counts, but where a device has to decide by found_inf. steps: (tensor, whether it is one of those)."""
    if steps:
        torch._foreach_add_([step for step, _ in steps], 1)  # as torch's own optimizers do: one call for all
    if found_inf is not None:
        there = [step for step, on_device in steps if on_device]
        if there:
            torch._foreach_sub_(there, [found_inf.to(step.device, non_blocking=True) for step in there])
