"""Adam and AdamW: parameters in groups, their moments, and the step over all of them."""

import inspect
import itertools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import backends, checks, functional, hyperparameters, torch_tensors
from . import step_counts as capturable_
from .clipping import global_norm
from .groups import (
    HYPERPARAMETERS,
    OF_PARAMS,
    HasGroups,
    checked_group,
    grads_of_params,
    in_order,
    in_order_of_groups,
    is_sequence,
    parsed_groups,
    saved_settings,
    what_is,
)
from .kernels import array_bytes, streams
from .kernels.operands import GROUP
from .kernels.scalars import step_key
from .kernels.view import Bits

STATE_DTYPES = ("float32", "float64", "bfloat16", "8bit")


class Adam(HasGroups):
    """Adam with L2 decay, in place on the caller's arrays.   (Kingma & Ba 2015, arXiv:1412.6980)

    params: one array, a sequence of arrays, a dict name -> array, or a list of groups such as
        `{"params": [w, b], "lr": 1e-4}`, whose own hyperparameters go before those given here (`decay_groups` makes two by
        patterns of names). Arrays as in `adam_step`.
    lr: a number, or a callable of the number of the step, counted from 1: `lambda step: 1e-3 * min(1, step / 100)`. To check it,
        it is also called with 1 here and in `load_state_dict`. It may return an array of no dimensions, which is read, and
        waited for if it is on a GPU: optax's schedules are such callables. They count from 0, so that optax's own first step
        has schedule(0), and `lr=schedule` starts with schedule(1); `lr=lambda step: schedule(step - 1)` is as in optax.
    betas, eps, weight_decay, maximize: as in `adam_step`. amsgrad: keep the running maximum of v (Reddi et al. 2018).
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
    >>> opt.step({"w": np.float32([-33.0, 1.0, 0.0]), "b": None})
    >>> print(params["w"], params["b"])
    [0.6 0.4 0.5] [0.]
    """

    _decoupled = False
    _algorithm = "adam"
    _starts: dict[str, int] | None = None  # where arrays are parts of parameters: the number of the first element of each

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
        formula="torch",
        eps_root=0.0,
        state_dtype=None,
        master=None,
        param_copies=None,
        ema_decay=None,
        zero_grad=False,
        stochastic_rounding=False,
        seed=0,
        backend=None,
    ):
        arguments = dict(locals())
        self.options = {name: arguments[name] for name in OPTIONS}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        self.backend = backends.forced(backend)  # one that was in use when the moments were made stays in use
        self._state_backend = self.backend
        self.steps = 0
        self.capturable = checks.flag("capturable", capturable)
        self._stochastic, self._seed = checks.flag("stochastic_rounding", stochastic_rounding), checks.seed(seed)
        if self._algorithm == "nadam" and self.capturable:
            raise ValueError(
                "NAdam cannot be capturable: its scalars depend on all steps before, which only the host counts"
            )
        self._further = functional.further(
            self._algorithm, 0.999 if ema_decay is None else ema_decay, zero_grad, formula, eps_root, ema_decay is not None
        )
        state_dtype = None if state_dtype is None else checks.one_of(STATE_DTYPES, "state_dtype", state_dtype)
        master = None if master is None else checks.one_of(("remainder",), "master", master)
        self._memo = functional.Memo()
        self._clocks: list[Any] = []  # a Clock for each group that has parameters
        self._norm_clocks: dict[int, Any] = {}  # without capturable, for scalars that depend on a norm on the device
        self.groups, self._structures, self._grouped = parsed_groups(params, defaults)
        self.state: dict[str, dict[str, Any]] = {}
        self._norm: Any = None
        self._computed_in: dict[str, np.dtype] = {}
        self._copies = self._param_copies(param_copies)
        views = []
        for group, structure in zip(self.groups, self._structures, strict=True):
            h = self._checked(self._with_a_number(group), structure, step=1)
            for name, param in zip(group["names"], group["params"], strict=True):
                if name in self.state:
                    raise ValueError(f"two parameters are named {name!r}: names must differ")
                label = f"params[{name!r}]"
                kernels, (view,) = backends.choose([(label, checks.given(label, param))], backend)
                checks.one_format(view, checks.FORMATS)
                checks.layout(view)
                if not view.writeable:
                    checks.read_only(view)
                kept = {moment: _state_format(view, state_dtype) for moment in ("m", "v")}
                if group["amsgrad"]:
                    kept["max_v"] = kept["m"]
                if kept["m"] == "8bit":
                    checks.eight_bits(view)
                    kept |= {"m": "uint8", "v": "uint8", "m_scale": "float32", "v_scale": "float32"}
                if master and view.format == "bfloat16":
                    kept["remainder"] = "int16"
                if ema_decay is not None:
                    kept["ema"] = "float64" if view.format == "float64" else "float32"
                checks.combination(self._algorithm, kept, self._stochastic)
                self._computed_in[name] = np.dtype("float64" if "float64" in (view.format, kept["m"]) else "float32")
                hyperparameters.check_rounding(h, self._computed_in[name])
                views.append((kernels, view, kept))
                self.state[name] = {}
        checks.overlap([view for _, view, _ in views], [])
        self._kinds = {}  # name -> (the operands after v, whether m and v are bfloat16)
        for (name, state), of_name, (*_, kept) in zip(self.state.items(), self._new_state(views), views, strict=True):
            state["step"] = 0
            state |= of_name
            operands = ("max_v", "remainder", "param_copy", "ema", "m_scale", "v_scale")
            further = [key for key in operands if key in kept or (key == "param_copy" and name in self._copies)]
            self._kinds[name] = tuple(further), kept["m"] == "bfloat16"
        kinds = [{self._kinds[name] for name in structure.names} for structure in self._structures]
        self._kind_of_group = [found.pop() if len(found) == 1 else None for found in kinds]
        # parameters are rounded by random bits of their own
        self._keys = {name: key_of_parameter(self._seed, k) for k, name in enumerate(self.state)}
        if self.capturable:
            self._start_clocks(iter(views))

    def _new_state(self, views):
        """Return {"m": zeros, ...} of each parameter. views: (kernels, view, name -> format) of each, in order."""
        made = []
        for kernels, view, kept in views:
            arrays = {}
            for key, format in kept.items():
                if key in OF_GROUPS:
                    arrays[key] = kernels.zeros(-(-view.size // GROUP), format, view.device)
                else:
                    arrays[key] = kernels.zeros_like(view, np.dtype(IN_MEMORY.get(format, format)))
            made.append(arrays)
        return made

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
            if len({self._kinds[name] for name in group["names"]}) > 1:
                raise ValueError(
                    f"with capturable=True the parameters of a group have the same kinds of state; group {k} has some with a "
                    "remainder or a copy and some without: put them into groups of their own"
                )
            clock = capturable_.Clock(backends_.pop(), devices.pop() if devices else 0, capturable_.NUMBERS)
            clock.number("lr", group["lr"])
            self._clocks.append(clock)
            for name in group["names"]:
                self.state[name]["step"] = clock.step

    def _with_a_number(self, group):
        """Return a group whose lr can be checked: what is in an array is not known before it is read."""
        return group | {"lr": 0.0} if self.capturable and capturable_.is_array(group["lr"]) else group

    def _checked(self, group, structure, step, grad_scale=1.0):
        return checked_group(group, structure, self._decoupled, step, grad_scale, self._further)

    def _in_groups(self, arrays, label):
        """Return arrays of the same structure as params, in order, for each group."""
        if self._grouped:
            return in_order_of_groups(arrays, self._structures, label)
        return [in_order(arrays, self._structures[0], label)]

    def _param_copies(self, given):
        """Return name -> copy of the parameter, of those that have one."""
        if given is None:
            return {}
        names = itertools.chain.from_iterable(structure.names for structure in self._structures)
        copies = itertools.chain.from_iterable(self._in_groups(given, "param_copies"))
        return {name: copy for name, copy in zip(names, copies, strict=True) if copy is not None}

    def step(
        self,
        grads=OF_PARAMS,
        *,
        grad_scale=1.0,
        max_norm=None,
        norm=None,
        check_finite=False,
        found_inf=None,
        stream=None,
    ):
        """Update every parameter that has a gradient, in place.

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
        stream: on a GPU, as in `adam_step`.

        Everything is checked before anything is written: one bad array or hyperparameter stops the whole step.
        """
        if grads is not OF_PARAMS:
            grads_of_groups = self._in_groups(grads, "grads")
        if len(self.groups) != len(self._structures):
            raise ValueError("groups cannot be added to an optimizer or removed from it after it is made: make another")
        if grads is OF_PARAMS:
            grads_of_groups = [grads_of_params(group) for group in self.groups]
        left_out, on_device = False, None
        if not (max_norm is norm is found_inf is None and check_finite is False):
            conditions = self._conditions(grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream)
            grad_scale, left_out, on_device = conditions
        updates: list[functional.Updates] = []
        states, clocks = [], []
        for k, group in enumerate(self.groups):
            structure, given = self._structures[k], grads_of_groups[k]
            clock = self._clocks[k] if self.capturable else None
            now, count = None, 0
            if clock and clock.on_cpu:
                scale = clock.value(grad_scale)
                h = self._checked(group | {"lr": clock.value(group["lr"])}, structure, self.steps + 1, scale)
                count = clock.count()
            elif clock:
                now = capturable_.Now(clock, group["lr"], grad_scale, **(on_device or {}))
                known = group if now.lr is None else group | {"lr": 0.0}
                h = self._checked(known, structure, self.steps + 1, 1.0 if now.grad_scale else grad_scale)
            else:
                h = self._checked(group, structure, self.steps + 1, grad_scale)
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
            if not names:
                continue
            of_group = [self.state[name] for name in names]
            if clock:
                updates.append(self._updates(h, count + 1, params, given, names, self._kinds[names[0]], now))
                clocks.append(clock)
            else:
                counts, kind = [state["step"] for state in of_group], self._kind_of_group[k]
                first = counts[0]
                if kind and type(first) is int and first >= 0 and counts.count(first) == len(counts):
                    updates.append(self._updates(h, first + 1, params, given, names, kind))
                else:
                    for chosen, step, kind in self._alike(names, counts):
                        own_params, own_grads, own_names = (
                            list(itertools.compress(column, chosen)) for column in (params, given, names)
                        )
                        updates.append(self._updates(h, step, own_params, own_grads, own_names, kind))
                states += of_group
        if on_device and not self.capturable:
            updates = self._with_norm_clocks(updates, grad_scale, on_device)
        if left_out:
            self._leave_out(updates, stream)
            return
        if updates:
            self._launch(updates, stream)
        for state in states:
            state["step"] += 1
        for clock in clocks:
            if clock.on_cpu:  # a GPU has counted by itself
                clock.step += 1
        self.steps += 1

    def _launch(self, updates, stream):
        functional.update(updates, self.backend, stream, self._memo)

    def _check(self, updates, stream):
        functional.check(updates, self.backend, stream)

    def _alike(self, names, counts):
        """Return (which of them, step, kind) of the parameters that have taken as many steps and have state of one kind.

        Those that were skipped before are at another step.
        """
        pairs = [
            (checks.count(f"the step of params[{name!r}]", n), self._kinds[name])
            for name, n in zip(names, counts, strict=True)
        ]
        return [([own == pair for own in pairs], checks.step_number(pair[0] + 1), pair[1]) for pair in dict.fromkeys(pairs)]

    def _updates(self, h, step, params, grads, names, kind, now=None):
        """Return the Updates of parameters whose state is of one kind."""
        further, narrow = kind
        of_names = [self.state[name] for name in names]
        columns = [params, grads, [state["m"] for state in of_names], [state["v"] for state in of_names]]
        for key in further:
            columns.append([self._copies[name] for name in names] if key == "param_copy" else [s[key] for s in of_names])
        if narrow:
            for k in (2, 3, *((4,) if "max_v" in further else ())):
                columns[k] = [Bits(array, "bfloat16") for array in columns[k]]
        if not narrow and not self._stochastic and "m_scale" not in further:
            return functional.Updates(h, step, columns, names, now, further)
        keys = [self._keys[name] for name in names]
        starts = [self._starts[name] for name in names] if self._starts else None
        return functional.Updates(h, step, columns, names, now, further, self._stochastic, self._seed, keys, starts)

    def _conditions(self, grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream):
        """Return the grad_scale of a step, whether to leave it out, and what a device has to decide of that, for `Now`."""
        max_norm = None if max_norm is None else checks.non_negative("max_norm", max_norm)
        check_finite = checks.flag("check_finite", check_finite)
        if norm is not None and max_norm is None and not check_finite:
            raise ValueError("norm is given, and nothing is done with it: give max_norm to clip by it, or check_finite=True")
        given = [grad for grads in grads_of_groups for grad in grads if grad is not None]
        if norm is None and given and (max_norm is not None or check_finite):
            norm = global_norm(given, out=self._norm, backend=self.backend, stream=stream)
            if not isinstance(norm, np.ndarray):
                self._norm = norm  # always in the same place, which captured graphs know
        in_device_mode = self.capturable and not all(clock is None or clock.on_cpu for clock in self._clocks)
        if isinstance(norm, np.ndarray):
            norm = float(norm)
        on_device: dict[str, Any] = {}
        on_host = {} if norm is None or capturable_.is_array(norm) else {"norm": norm}
        if not capturable_.is_array(found_inf) or isinstance(found_inf, np.ndarray):
            left_out = checks.found_inf(found_inf)
            on_host |= {} if found_inf is None else {"found_inf": found_inf}
        elif in_device_mode:
            left_out, on_device["found_inf"] = False, found_inf
        else:
            raise ValueError(
                "found_inf is an array on a GPU, which the step does not wait for: make the optimizer capturable=True"
            )
        if in_device_mode:
            on_device["on_host"] = on_host
        if capturable_.is_array(norm):
            on_device |= {"norm": norm, "max_norm": max_norm}
            if check_finite and not in_device_mode:
                raise ValueError(
                    "check_finite on a GPU needs an optimizer with capturable=True: the step does not wait to know"
                )
            on_device |= {"largest_norm": self._largest_norm()} if check_finite else {}
        elif norm is not None:
            norm = checks.norm(norm)
            scale = grad_scale
            if self.capturable and capturable_.is_array(scale):
                if in_device_mode:
                    raise TypeError("grad_scale is on the device and norm is a number: give both there, or both as numbers")
                scale = float(np.asarray(scale).reshape(()))
            if check_finite and not norm * abs(scale) <= self._largest_norm():
                left_out = True
            if max_norm is not None:
                grad_scale = capturable_.clipped(checks.finite("grad_scale", scale), norm, max_norm)
        return grad_scale, left_out, on_device

    def _largest_norm(self):
        return min(capturable_.LARGEST_NORM[dtype] for dtype in self._computed_in.values())

    def _with_norm_clocks(self, updates, grad_scale, on_device):
        """Return Updates whose scalars are computed on the device, because they depend on a norm there; the host counts steps."""
        if self._algorithm == "nadam":
            raise ValueError(
                "NAdam's scalars are the host's: clip with norm=float(gpuadam.global_norm(grads)), which waits for it"
            )
        changed = []
        for k, group in enumerate(updates):
            (param, *_), *_ = group.columns
            kernels, (view,) = backends.choose([(f"params[{group.names[0]!r}]", param)], self.backend)
            if k not in self._norm_clocks:
                self._norm_clocks[k] = capturable_.Clock(kernels, view.device or 0, capturable_.NUMBERS)
            now = capturable_.Now(self._norm_clocks[k], group.h.lr, grad_scale, counts=False, **on_device)
            changed.append(group._replace(now=now))
        return changed

    def _leave_out(self, updates, stream):
        """Check a step that is left out, and zero the gradients if a step would."""
        self._check(updates, stream)
        for group in updates:
            if group.h.fixed.zero_grad:
                torch_tensors.wrote(group.columns[1])
            for grad, name in zip(group.columns[1], group.names, strict=True):
                kernels, (view,) = backends.choose([(f"the gradient of params[{name!r}]", grad)], self.backend)
                if group.h.fixed.zero_grad:
                    kernels.fill_zero(view, streams.handle(stream))

    def state_dict(self):
        """Return {"steps", "state", "groups"}: by name, the moments themselves and not copies, and each group's settings.

        With capturable, step counts and learning rates are read from the device, as numbers, after waiting for all that is
        enqueued there, graphs included: the moments are then those of the counts.
        A learning rate that is a callable is not state: None stands in its place.
        """
        groups = []
        states = {name: dict(state) for name, state in self.state.items()}
        for k, group in enumerate(self.groups):
            settings = saved_settings(group)
            if self.capturable and self._clocks[k]:
                if not callable(group["lr"]):
                    settings["lr"] = self._clocks[k].value(group["lr"])
                count = self._clocks[k].count()
                for name in group["names"]:
                    states[name]["step"] = count
            groups.append(settings)
        return {"steps": self.steps, "state": states, "groups": groups}

    def load_state_dict(self, state_dict):
        """Copy a `state_dict()` into this optimizer, which must have parameters of the same names, shapes and dtypes.

        All of it is checked first. Raises ValueError or TypeError, and then nothing has changed.
        """
        groups, states, steps = checked_state_dict(state_dict, self)
        copies = []
        for name, state in self.state.items():
            for moment in state:
                if moment == "step" or state[moment] is states[name][moment]:
                    continue
                label = f"{moment} of params[{name!r}]"
                named = [(label, state[moment]), (f"the loaded {label}", states[name][moment])]
                checks.given(*named[1])
                kernels, (own, loaded) = backends.choose(named, self._state_backend)
                checks.same_layout(own, loaded, kernels.copies_any_layout)
                copies.append((kernels, own, loaded))
        checks.overlap([own for _, own, _ in copies], [loaded for _, _, loaded in copies])
        self._copy_state(copies)
        self._go_on_from(groups, states, steps)

    def save(self, path, *, with_params=False):
        """Write class, options, hyperparameters, step counts and state to a safetensors file, from which `gpuadam.load` goes on.

        with_params: the parameters too, as `gpuadam.load(..., with_params=True)` needs them.

        Whatever happens, the file is the new one or as it was before: it is written beside its place, flushed to the disk and
        renamed. A killed save leaves ".gpuadam-*.tmp" in that folder, which may be deleted. It takes a few MB of memory, from a
        GPU too, which is waited for. A learning rate that is a callable is not saved. The format: `gpuadam/checkpoint.py`.

        Raises CheckpointError if the file cannot be written; ValueError or TypeError for what could not be loaded again.
        """
        from .checkpoint.saving import save  # which needs this module

        save(self, path, with_params=with_params)

    def is_bfloat16(self, name, key):
        """Whether an array of the state of a parameter, "m" say, holds bfloat16 numbers as integers."""
        return self._kinds[name][1] and key in ("m", "v", "max_v")

    def _go_on_from(self, groups, states, steps):
        """Take over what `checked_state_dict` returned: all but the arrays."""
        for k, (group, settings) in enumerate(zip(self.groups, groups, strict=True)):
            clock = self._clocks[k] if self.capturable else None
            if clock and capturable_.is_array(group["lr"]) and not callable(settings["lr"]):
                clock.fill(group["lr"], settings["lr"])  # in place: a captured graph knows this array
                settings["lr"] = group["lr"]
            group.update(settings)
            if clock:
                clock.fill(clock.step, states[group["names"][0]]["step"])
            else:
                for name in group["names"]:
                    self.state[name]["step"] = states[name]["step"]
        self.steps = steps

    def _copy_state(self, copies):
        for kernels, own, loaded in copies:
            array_bytes.wait(kernels, own)  # graphs may write it on any stream
            kernels.copy(own, loaded)
            array_bytes.wait(kernels, own)  # and may read it


# What the constructor takes beside arrays, hyperparameters and backend: Adam.options, which checkpoints hold
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Adam).parameters.items()
    if name not in ("params", "param_copies", "backend", *HYPERPARAMETERS)
}
OPTIONS = tuple(DEFAULTS)


IN_MEMORY = {"bfloat16": "uint16"}  # the dtype of a format that NumPy does not know
OF_GROUPS = ("m_scale", "v_scale")  # of which there is one for each GROUP of neighbours
OF_PARAMETERS = 0xD1B54A32D192ED03  # so that the keys of parameters are none of a step


def key_of_parameter(seed, number):
    """Return the key of the number-th parameter of all groups, counted from 0, for random rounding."""
    return step_key(seed ^ OF_PARAMETERS, number)


def _state_format(view, given):
    """Return the format of the moments of a parameter."""
    return given or ("float64" if view.format == "float64" else "float32")


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

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **options):
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class NAdam(Adam):
    """Adam with Nesterov momentum.   (Dozat 2016, Incorporating Nesterov Momentum into Adam)

    As `Adam`, with the defaults and the schedule of torch.optim.NAdam (momentum_decay 0.004). It has no amsgrad, and cannot be
    capturable: its scalars depend on all steps before.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.NAdam(w, lr=0.1).step(np.float32([-33.0, 1.0]))
    >>> print(w.round(4))
    [ 0.6056 -0.1056]
    """

    _algorithm = "nadam"

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class RAdam(Adam):
    """Adam whose step is rectified while the variance of 1 / sqrt(v) is large.   (Liu et al. 2020, arXiv:1908.03265)

    As `Adam`, with the rule of torch.optim.RAdam. It has no amsgrad.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.RAdam(w, lr=0.1).step(np.float32([-3.0, 1.0]))  # as momentum at first
    >>> print(w)
    [ 0.8 -0.1]
    """

    _algorithm = "radam"


class AdaMax(Adam):
    """Adam by the infinity norm: v is max(beta2 * v, |gradient| + eps), and divides.   (Kingma & Ba 2015, Algorithm 2)

    As `Adam`, with the defaults of torch.optim.Adamax. It has no amsgrad.

    >>> import numpy as np, gpuadam
    >>> w = np.array([0.5, 0.0], "float32")
    >>> gpuadam.AdaMax(w, lr=0.1).step(np.float32([-33.0, 1.0]))
    >>> print(w)
    [ 0.6 -0.1]
    """

    _algorithm = "adamax"

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
        super().__init__(params, lr, betas, eps, weight_decay, **options)


def checked_state_dict(state_dict, optimizer):
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
        h = optimizer._checked(own | loaded, structure, step=1)
        for name in structure.names:
            hyperparameters.check_rounding(h, optimizer._computed_in[name])
        settings.append(loaded)
    for name, own in optimizer.state.items():
        if set(states[name]) != set(own):
            raise ValueError(f"the state of {name!r} has {sorted(states[name])}, the optimizer's {sorted(own)}")
    for group in optimizer.groups if optimizer.capturable else ():
        if len({states[name]["step"] for name in group["names"]}) > 1:
            raise ValueError(
                f"with capturable=True the parameters {group['names']} share a step count; the state_dict's differ"
            )
        if any(checks.count("step", states[name]["step"]) >= 1 << 63 for name in group["names"]):
            raise ValueError("with capturable=True a step count is an int64; the state_dict's is larger")
    counted = {
        name: dict(state) | {"step": checks.count(f"step of {name!r}", state["step"])} for name, state in states.items()
    }
    return settings, counted, checks.count("steps", state_dict["steps"])
