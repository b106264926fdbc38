"""The state of an `Adam` as a dict: given away, checked, and taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import backends, checks, hyperparameters
from . import state as state_
from .groups import (
    FIXED,
    HYPERPARAMETERS,
    Arrangement,
    check_keys,
    check_renaming,
    differing_names_of_state,
    is_sequence,
    places_of_groups,
    renamed,
    saved_settings,
    some,
    what_is,
)
from .kernels import array_bytes
from .kernels.messages import shortened, shown
from .kernels.view import Bits, is_array
from .options import Options
from .parameters import Group, check_state, checked_settings
from .state import OF_GROUPS, Parameter, States
from .state_conversion import CONVERTED, Conversion, conversion, is_convertible, wide
from .step_arrays import bounds_of_loaded, saved_bounds
from .typing import FilePath
from .under_way import UnderWay

# The options that a state_dict has, because the meaning of the moments depends on them, and their values
OF_MOMENTS = {"algorithm": hyperparameters.ALGORITHMS, "formula": hyperparameters.FORMULAS}


# What an error says of moments in another format
CONVERT = ": load_state_dict(state_dict, convert=True) converts moments to another format"


class HasState:
    """What `Adam` does with its state beside updating it."""

    parameters: dict[str, Parameter]
    groups: list[dict[str, Any]]
    state: States
    arrangement: Arrangement
    options: Options
    steps: int
    under_way: UnderWay
    state_backend: str | None
    _groups: list[Group]

    def state_dict(self) -> dict[str, Any]:
        """Return {"steps", "state", "groups", "algorithm", "formula", "decoupled"}.

        "state" has, by name, the moments themselves and not copies, and "groups" the settings of each group. "algorithm" and
        "formula" say what the numbers of the moments mean, and "decoupled" what weight decay is, AdamW's or Adam's.

        With capturable, step counts and learning rates are read from the device, as numbers, after waiting for all that is
        enqueued there, graphs included: the moments are then those of the counts.
        A learning rate that is a callable is not state: None stands in its place.

        Raises ValueError after a step that was cut short, and if something was taken out of `state` or put into it.
        """
        self.under_way.check()
        self._check_state()
        groups, states = [], {name: dict(state) for name, state in self.state.items()}
        for own, group in zip(self.groups, self._groups, strict=True):
            check_keys(own)
            settings = saved_settings(own | {"bounds": saved_bounds(own["bounds"])})
            if is_array(settings["lr"]):
                settings["lr"] = group.count.value(settings["lr"])
            groups.append(settings)
        for name, n in self._counts().items():
            states[name]["step"] = n
        of_moments = {key: getattr(self.options, key) for key in OF_MOMENTS}
        return {"steps": self.steps, "state": states, "groups": groups} | of_moments | {"decoupled": self.options.decoupled}

    def __copy__(self):
        raise TypeError(
            f"a copy.copy of this {type(self).__name__} would share its arrays and counts, and each would take steps of which "
            "the other does not know: use copy.deepcopy(optimizer), or copy.deepcopy((params, optimizer)) for the parameters too"
        )

    def _check_state(self):
        """Refuse state that has other entries than the options ask for."""
        for name, parameter in self.parameters.items():
            check_state(parameter, self.arrangement.label(name))

    def _counts(self):
        """Return how many steps each parameter has taken, by name."""
        read = [(group.parameters, group.count.read(group.parameters)) for group in self._groups]
        return {p.name: n for parameters, counts in read for p, n in zip(parameters, counts, strict=True)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, convert: bool = False, names: Mapping[str, str] | None = None
    ) -> None:
        """Copy a `state_dict()` into this optimizer, which must have parameters of the same names, shapes and dtypes.

        Groups must have the same parameters. Where these have names, they and the groups may come in another order, unless
        numbers are rounded randomly, which goes by the place of a parameter. Their hyperparameters become those of the
        state_dict. Two changes are refused, which nobody would notice: of a group with bounds into one without, and of AdamW's
        weight decay into Adam's or the other way round.

        An array that is the optimizer's own, because the state_dict was not copied when it was taken, has gone on since: it is
        refused if the parameter has. Moments that mean something else are refused: v of AdaMax is no mean of squares, and max_v
        of formula="optax" is that of the corrected v.

        convert: m, v and max_v may be in another format of `state_dtype`, also on another device, and are converted, rounded to
        nearest, through the host. `gpuadam.guide.narrow_numbers` says what that loses. Otherwise they are refused.
        names: a dict, old name -> new name, of the parameters that have other names now. Of arrays in a list numbers are the
        names: {"0": "w", "1": "b"}.

        All of it is checked first. Raises ValueError or TypeError, and then nothing has changed.
        """
        self._check_state()
        check_renaming(names)
        loaded = self.checked_state_dict(state_dict, checks.flag("convert", convert), names)
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
                    has = f"{source.name} has dtype {shortened(str(source.dtype))}, the optimizer's {to.dtype}"
                    if is_convertible(source):
                        raise ValueError(has + CONVERT)
                    then = "" if to.format == wide(to) else f". Then{CONVERT}"
                    raise ValueError(f"{has}: {checks.cast(source, wide(to))}{then}")
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
        self.under_way.free_turn()

    def _conversion(self, name, loaded):
        """Return the `Conversion` of loaded moments into those of a parameter, or None if they have the same format."""
        own = {key: self.array_of_state(name, key) for key in self.state[name] if key in CONVERTED}
        loaded = {key: array for key, array in loaded.items() if key in CONVERTED}
        label, numbers = self.arrangement.label(name), self.parameters[name].kind.numbers
        return conversion(label, own, loaded, numbers, self.state_backend)

    def checked_state_dict(self, state_dict, convert=False, new_names=None):
        """Return (settings of each group, state of each name, steps) of a state_dict, after checking all but the arrays.

        convert: moments may be in another format. new_names: of some parameters, by their names there.
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
        now = renamed(states, new_names)
        states = {now[name]: state for name, state in states.items()}
        if difference := differing_names_of_state(states, self.state):
            raise ValueError(difference)
        names = [group.get("names") for group in groups]
        if not all(isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own) for own in names):
            raise ValueError('the "names" of a group of a state_dict must be a list of strings')
        structures, by_place = self.arrangement.structures, self.options.rounds_randomly
        names = [[now.get(name, name) for name in of_group] for of_group in names]
        groups = [groups[k] for k in places_of_groups(names, structures, by_place)]
        saved = {key: checks.one_of(known, f"the state_dict's {key}", state_dict[key]) for key, known in OF_MOMENTS.items()}
        settings = [self._checked_settings(k, group) for k, group in enumerate(groups)]
        decoupled = checks.flag("the state_dict's decoupled", state_dict.get("decoupled", self.options.decoupled))
        if decoupled != self.options.decoupled and any(group["weight_decay"] for group in settings):
            theirs, ours = (
                "decoupled, as AdamW's" if one else "added to the gradient, as Adam's"
                for one in (decoupled, self.options.decoupled)
            )
            raise ValueError(
                f"the weight decay of the state_dict is {theirs}, and this {type(self).__name__}'s is {ours}: make an optimizer "
                "of the class that was saved, or set the weight_decay of each group in the state_dict to 0"
            )
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
        settings, own = {key: saved[key] for key in HYPERPARAMETERS}, self.arrangement.structures[k]
        if not any(parameter.kind.of_complex for parameter in self._groups[k].parameters):  # to which it says nothing
            checks.complex_parts(settings["complex"])
            settings["complex"] = own.complex
        for name in FIXED:
            if settings[name] != getattr(own, name):
                ours, theirs = (f"{name}={shown(value)}" for value in (getattr(own, name), settings[name]))
                raise ValueError(
                    f"group {k} of the optimizer has {ours}, and that of the state_dict {theirs}: it decides which moments there "
                    "are. Make the optimizer as that was which was saved"
                )
        if settings["lr"] is None:
            if not callable(self.groups[k]["lr"]):
                raise ValueError("the saved lr was a callable, which is not saved: give this optimizer's group one first")
            settings["lr"] = self.groups[k]["lr"]
        own_lr, count = self.groups[k]["lr"], self._groups[k].count
        if is_array(own_lr) and not callable(settings["lr"]):
            count.check_fill("lr", own_lr)
        if settings["bounds"] is None and self.groups[k]["bounds"] is not None:
            raise ValueError(
                f"group {k} of the optimizer has bounds, and the same group of the state_dict has none. To go on with bounds, "
                f'write them there, as optimizer.state_dict()["groups"][{k}]["bounds"] has them; to go on without, set '
                f'optimizer.groups[{k}]["bounds"] = None first'
            )
        settings["bounds"] = bounds_of_loaded(settings["bounds"], self.groups[k]["bounds"])
        h = checked_settings(self.groups[k] | settings, own, self.options, step=1)
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

        self._check_state()
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
