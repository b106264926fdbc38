"""Adam and AdamW: parameters in groups, their moments, and the step over all of them."""

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import backends, checks, functional, hyperparameters
from . import capturable as capturable_
from .groups import HYPERPARAMETERS, checked_group, in_order, in_order_of_groups, is_sequence, parsed_groups, what_is

MOMENTS = {False: ("m", "v"), True: ("m", "v", "max_v")}  # by whether it is AMSGrad


class Adam:
    """Adam with L2 decay, in place on the caller's arrays.   (Kingma & Ba 2015, arXiv:1412.6980)

    params: one array, a sequence of arrays, a dict name -> array, or a list of groups such as
        `{"params": [w, b], "lr": 1e-4}`, whose own hyperparameters go before those given here. Arrays as in `adam_step`.
    lr: a number, or a callable of the number of the step, counted from 1: `lambda step: 1e-3 * min(1, step / 100)`. To check it,
        it is also called with 1 here and in `load_state_dict`.
    betas, eps, weight_decay, maximize: as in `adam_step`. amsgrad: keep the running maximum of v (Reddi et al. 2018).
    capturable: keep the step count on the device, so that a CUDA graph that captures `step` counts on when it is replayed.
        lr, and grad_scale in `step`, may then be arrays of one float32 or float64 on that device, whose values are read there
        when the step runs; in a captured graph they have to be, because a graph freezes numbers. All parameters of a group
        share a device and a step count, so none of them can be skipped alone. On the CPU it works the same, without graphs.
        Take a step with the same arrays on the same stream before the capture.
    backend: "cupy", "numba-cuda" or "numba-cpu"; by default the arrays decide.

    Attributes: `groups`, a list of dicts: "params", "names" and the hyperparameters, which may be changed between steps;
    `state`, name -> {"step", "m", "v", and "max_v" with amsgrad}; with capturable, "step" is the group's int64 array of one;
    `steps`, how many calls of `step` there were.
    Names are the dict's keys; without a dict, "0", "1", ... in order, through all groups.

    Raises what `adam_step` raises, and ValueError for a parameter given twice, an unknown hyperparameter or no parameters.

    >>> import numpy as np, gpuadam
    >>> params = {"w": np.full(3, 0.5, "float32"), "b": np.zeros(1, "float32")}
    >>> opt = gpuadam.Adam(params, lr=0.1)
    >>> opt.step({"w": np.float32([-33.0, 1.0, 0.0]), "b": None})
    >>> print(params["w"], params["b"])
    [0.6 0.4 0.5] [0.]
    """

    _decoupled = False

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        amsgrad=False,
        maximize=False,
        capturable=False,
        backend=None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        self.backend = backends.forced(backend)  # one that was in use when the moments were made stays in use
        self.steps = 0
        self.capturable = checks.flag("capturable", capturable)
        self._memo = functional.Memo()
        self._clocks: list[Any] = []  # a Clock for each group that has parameters
        self.groups, self._structures, self._grouped = parsed_groups(params, defaults)
        self.state: dict[str, dict[str, Any]] = {}
        views = []
        for group, structure in zip(self.groups, self._structures, strict=True):
            h = checked_group(self._with_a_number(group), structure, self._decoupled, step=1)
            for name, param in zip(group["names"], group["params"], strict=True):
                if name in self.state:
                    raise ValueError(f"two parameters are named {name!r}: names must differ")
                label = f"params[{name!r}]"
                kernels, (view,) = backends.choose([(label, checks.given(label, param))], backend)
                checks.dtype(view)
                hyperparameters.check_rounding(h, view.dtype)
                checks.layout(view)
                if not view.writeable:
                    checks.read_only(view)
                views.append((kernels, view, group["amsgrad"]))
                self.state[name] = {}
        checks.overlap([view for _, view, _ in views], [])
        for state, (kernels, view, amsgrad) in zip(self.state.values(), views, strict=True):
            state.update({"step": 0} | {moment: kernels.zeros_like(view) for moment in MOMENTS[amsgrad]})
        if self.capturable:
            self._start_clocks(iter(views))

    def _start_clocks(self, views):
        """Give each group its step count. views: (kernels, view, amsgrad) of every parameter, in order."""
        for k, group in enumerate(self.groups):
            own = [next(views)[:2] for _ in group["names"]]
            backends_ = {kernels for kernels, _ in own}
            devices = {view.device for _, view in own if view.size}
            if len(backends_) > 1 or len(devices) > 1:
                raise ValueError(
                    f"with capturable=True the parameters of a group share a device and a backend; group {k} does not"
                )
            if not own:
                self._clocks.append(None)
                continue
            dtypes = {view.dtype for _, view in own}
            clock = capturable_.Clock(backends_.pop(), devices.pop() if devices else 0, dtypes)
            clock.number("lr", group["lr"])
            self._clocks.append(clock)
            for name in group["names"]:
                self.state[name]["step"] = clock.step

    def _with_a_number(self, group):
        """Return a group whose lr can be checked: what is in an array is not known before it is read."""
        return group | {"lr": 0.0} if self.capturable and capturable_.is_array(group["lr"]) else group

    def step(self, grads, *, grad_scale=1.0, stream=None):
        """Update every parameter that has a gradient, in place.

        grads: of the same structure as params; None in an array's place skips it. For groups, a list with the gradients of
            each, or with dicts `{"params": gradients}`. They are only read.
        grad_scale: every gradient is multiplied by it first.
        stream: on a GPU, as in `adam_step`.

        Everything is checked before anything is written: one bad array or hyperparameter stops the whole step.
        """
        if self._grouped:
            grads_of_groups = in_order_of_groups(grads, self._structures)
        else:
            grads_of_groups = [in_order(grads, self._structures[0], "grads")]
        if len(self.groups) != len(self._structures):
            raise ValueError("groups cannot be added to an optimizer or removed from it after it is made: make another")
        updates: list[functional.Updates] = []
        states, clocks = [], []
        for k, group in enumerate(self.groups):
            structure, given = self._structures[k], grads_of_groups[k]
            clock = self._clocks[k] if self.capturable else None
            if clock:
                h, now, count = _now(group, structure, self._decoupled, self.steps + 1, grad_scale, clock)
            else:
                h, now, count = checked_group(group, structure, self._decoupled, self.steps + 1, grad_scale), None, 0
            names, params = group["names"], group["params"]
            if id(None) in map(id, given):
                present = [grad is not None for grad in given]
                if clock and any(present):
                    skipped = list(itertools.compress(names, map(operator.not_, present)))
                    raise ValueError(
                        f"with capturable=True the parameters of a group share a step count, and {skipped} have no gradient: "
                        "give zeros, put them into a group of their own, or skip the whole group"
                    )
                names, params, given = (list(itertools.compress(column, present)) for column in (names, params, given))
            of_group = [self.state[name] for name in names]
            columns = [params, given, [state["m"] for state in of_group], [state["v"] for state in of_group]]
            if group["amsgrad"]:
                columns.append([state["max_v"] for state in of_group])
            if not clock:
                updates += _by_step(h, columns, names, [state["step"] for state in of_group])
                states += of_group
            elif names:
                updates.append(functional.Updates(h, count + 1, columns, names, now))
                clocks.append(clock)
        if updates:
            functional.update(updates, self.backend, stream, self._memo)
        for state in states:
            state["step"] += 1
        for clock in clocks:
            if clock.on_cpu:  # a GPU has counted by itself
                clock.step += 1
        self.steps += 1

    def state_dict(self):
        """Return {"steps", "state", "groups"}: by name, the moments themselves and not copies, and each group's settings.

        With capturable, step counts and learning rates are read from the device, as numbers.
        A learning rate that is a callable is not state: None stands in its place.
        """
        groups = []
        states = {name: dict(state) for name, state in self.state.items()}
        for k, group in enumerate(self.groups):
            settings = {key: None if callable(group[key]) else group[key] for key in HYPERPARAMETERS}
            if self.capturable and self._clocks[k]:
                if not callable(group["lr"]):
                    settings["lr"] = self._clocks[k].value(group["lr"])
                for name in group["names"]:
                    states[name]["step"] = self._clocks[k].count()
            groups.append(settings | {"names": list(group["names"]), "betas": tuple(group["betas"])})
        return {"steps": self.steps, "state": states, "groups": groups}

    def load_state_dict(self, state_dict):
        """Copy a `state_dict()` into this optimizer, which must have parameters of the same names, shapes and dtypes.

        All of it is checked first. Raises ValueError or TypeError, and then nothing has changed.
        """
        groups, states, steps = _checked_state_dict(state_dict, self)
        copies = []
        for name, state in self.state.items():
            for moment in ("m", "v", "max_v"):
                if moment not in state or state[moment] is states[name][moment]:
                    continue
                label = f"{moment} of params[{name!r}]"
                named = [(label, state[moment]), (f"the loaded {label}", states[name][moment])]
                checks.given(*named[1])
                kernels, (own, loaded) = backends.choose(named, self.backend)
                checks.same_layout(own, loaded, kernels.copies_any_layout)
                copies.append((kernels, own, loaded))
        checks.overlap([own for _, own, _ in copies], [loaded for _, _, loaded in copies])
        for kernels, own, loaded in copies:
            kernels.copy(own, loaded)
        for k, (group, settings) in enumerate(zip(self.groups, groups, strict=True)):
            clock = self._clocks[k] if self.capturable else None
            if clock and capturable_.is_array(group["lr"]) and not callable(settings["lr"]):
                clock.fill(group["lr"], settings["lr"])  # in place: a captured graph knows this array
                settings["lr"] = group["lr"]
            group.update(settings)
            for name in group["names"]:
                if clock is None:
                    self.state[name]["step"] = states[name]["step"]
                else:
                    clock.fill(clock.step, states[name]["step"])
        self.steps = steps


def _by_step(h, columns, names, counts):
    """Return Updates of the arrays that have taken as many steps: those that were skipped before are at another."""
    if not names:
        return []
    first = counts[0]
    if type(first) is int and first >= 0 and counts.count(first) == len(counts):
        return [functional.Updates(h, first + 1, columns, names)]
    counts = [
        checks.count(f"the step of params[{name!r}]", n) if type(n) is not int else n
        for name, n in zip(names, counts, strict=True)
    ]
    updates = []
    for count in dict.fromkeys(counts):
        chosen = [own == count for own in counts]
        own_names, *own_columns = (list(itertools.compress(column, chosen)) for column in (names, *columns))
        updates.append(functional.Updates(h, checks.step_number(count + 1), own_columns, own_names))
    return updates


def _now(group, structure, decoupled, step, grad_scale, clock):
    """Return the Hyperparameters of a group in device mode, its capturable.Now on a GPU, and the count of steps on the CPU."""
    if clock.on_cpu:
        given = group | {"lr": clock.value(group["lr"])}
        return checked_group(given, structure, decoupled, step, clock.value(grad_scale)), None, clock.count()
    now = capturable_.Now(clock, group["lr"], grad_scale)
    given = group if now.lr is None else group | {"lr": 0.0}
    return checked_group(given, structure, decoupled, step, 1.0 if now.grad_scale else grad_scale), now, 0


class AdamW(Adam):
    """Adam with decoupled weight decay.   (Loshchilov & Hutter 2019, arXiv:1711.05101)

    As `Adam`, but weight_decay, 0.01 by default, takes lr * weight_decay * param off each parameter.

    >>> import numpy as np, gpuadam
    >>> w = np.ones(2, "float32")
    >>> gpuadam.AdamW(w, lr=0.1, weight_decay=0.5).step(np.zeros(2, "float32"))
    >>> print(w)
    [0.95 0.95]
    """

    _decoupled = True

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        amsgrad=False,
        maximize=False,
        capturable=False,
        backend=None,
    ):
        options = {"amsgrad": amsgrad, "maximize": maximize, "capturable": capturable, "backend": backend}
        super().__init__(params, lr, betas, eps, weight_decay, **options)


def _checked_state_dict(state_dict, optimizer):
    """Return (settings of each group, state of each name, steps), after checking all but the arrays."""
    if not isinstance(state_dict, Mapping) or not {"steps", "state", "groups"} <= set(state_dict):
        raise ValueError(f'a state_dict has "steps", "state" and "groups"; this is {what_is(state_dict)}')
    states, groups = state_dict["state"], state_dict["groups"]
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise ValueError('"state" of a state_dict must be a dict: name -> dict of "step" and moments')
    if not is_sequence(groups) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError('"groups" of a state_dict must be a list of dicts')
    if set(states) != set(optimizer.state):
        missing, extra = sorted(set(optimizer.state) - set(states)), sorted(map(str, set(states) - set(optimizer.state)))
        raise ValueError(f"the parameters' names differ: not in the state_dict {missing}, only in it {extra}")
    if [list(g["names"]) if isinstance(g.get("names"), (list, tuple)) else None for g in groups] != [
        g["names"] for g in optimizer.groups
    ]:
        raise ValueError("the state_dict's groups do not hold the same parameters as the optimizer's, in the same order")
    settings = []
    for own, group, structure in zip(optimizer.groups, groups, optimizer._structures, strict=True):
        if set(group) != {"names", *HYPERPARAMETERS}:
            raise ValueError(
                f'a group of a state_dict has "names" and {HYPERPARAMETERS}; this one has {sorted(map(str, group))}'
            )
        loaded = {key: group[key] for key in HYPERPARAMETERS}
        if loaded["lr"] is None:
            if not callable(own["lr"]):
                raise ValueError("the saved lr was a callable, which is not saved: give this optimizer's group one first")
            loaded["lr"] = own["lr"]
        h = checked_group(own | loaded, structure, optimizer._decoupled, step=1)
        for name in structure.names:
            hyperparameters.check_rounding(h, np.dtype(optimizer.state[name]["m"].dtype))
        settings.append(loaded)
    for name, own in optimizer.state.items():
        if set(states[name]) != set(own):
            raise ValueError(f"the state of {name!r} has {sorted(states[name])}, the optimizer's {sorted(own)}")
    for group in optimizer.groups if optimizer.capturable else ():
        if len({states[name]["step"] for name in group["names"]}) > 1:
            raise ValueError(
                f"with capturable=True the parameters {group['names']} share a step count; the state_dict's differ"
            )
    counted = {
        name: dict(state) | {"step": checks.count(f"step of {name!r}", state["step"])} for name, state in states.items()
    }
    return settings, counted, checks.count("steps", state_dict["steps"])
