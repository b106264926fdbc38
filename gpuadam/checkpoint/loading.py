"""Loading an `Adam`. `opened`, `about` and `not_fitting` also serve the loading of many ranks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import backends, checks, family, torch_tensors
from ..groups import (
    HYPERPARAMETERS,
    as_given,
    as_list,
    check_renaming,
    differing_names_of_state,
    named_params,
    parsed_groups,
    places_of_groups,
    renamed,
    saved_settings,
    some,
)
from ..kernels.messages import shortened, shown, warn
from ..kernels.operands import NARROW
from ..kernels.view import is_array
from ..optimizer import Adam
from ..options import SAVED, STATE_DTYPES, Options
from ..sharded.layout import CELL
from ..step_arrays import bounds_of_loaded, saved_bounds
from ..typing import FilePath, LearningRate, LikeParams, Params, StateDtype
from .converting import as_saved, read_state
from .format import CLASSES, check_known, entry
from .safetensors import CheckpointError, require
from .stored import Stored, opened_file
from .tensors import PARAM, chosen, sections


def load(
    path: FilePath,
    params: Params,
    backend: str | None = None,
    *,
    lr: LearningRate | Sequence[LearningRate | None] | None = None,
    param_copies: LikeParams = None,
    with_params: bool | None = None,
    state_dtype: StateDtype | None = None,
    names: Mapping[str, str] | None = None,
) -> Adam:
    """Make the optimizer that `Adam.save` saved: of its class, with its options, hyperparameters, step counts and state.

    path: of the file, or of the folder that `ShardedAdam.save` made, from any number of ranks.
    params: the parameters, of the same names, shapes and dtypes, in the same groups; in any form that `Adam` takes, and on any
        backend. If they have names, these and the groups may come in another order, unless numbers are rounded randomly: that
        goes by the place of a parameter, as the last bits of a norm do. Hyperparameters in groups are refused if they differ from
        those that were saved, which are the optimizer's: change them in its `groups` afterwards. Only a number as the lr of a
        group gives way, so that a program that changes it from step to step goes on with the groups that it began with.
    backend, param_copies: as in `Adam`; the copies themselves are not saved.
    lr: a learning rate instead of the saved ones; for several groups a list, in which None stands for the saved one. A callable
        is not saved, so it has to be given again, here or in its group. If lr is an array of one number, which `capturable`
        takes, the saved learning rate is written into it.
    with_params: overwrite the parameters with those that were saved. By default they stay as they are, and if the file has
        parameters, a warning says so.
    state_dtype: the format of m, v and max_v, as in `Adam`, if it is to be another than the saved one. They are converted,
        rounded to nearest, through the host: `gpuadam.guide.narrow_numbers` says what that loses. Nothing else changes.
    names: a dict, old name -> new name, of the parameters that have other names now. Of arrays in a list numbers are the names:
        {"0": "w", "1": "b"} loads what was saved of them for a dict.

    The arrays of the file go straight into the state; a few MB are used beside it. Without state_dtype nothing is cast, and
    nothing is executed.
    Raises CheckpointError, a ValueError, if the checkpoint is damaged, incomplete or no checkpoint at all, or does not fit the
    parameters; FileNotFoundError if there is no such file; for bad parameters the errors of `Adam`. Nothing of the caller's has
    changed then.

    >>> import numpy as np, gpuadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "adam.safetensors")
    >>> w = np.ones(3, "float32")
    >>> opt = gpuadam.AdamW({"w": w}, lr=0.1)
    >>> opt.step({"w": w.copy()})
    >>> opt.save(path)
    >>> again = gpuadam.load(path, {"w": w})
    >>> type(again).__name__, again.steps, again.groups[0]["lr"]
    ('AdamW', 1, 0.1)
    """
    path = checks.path("path", path)
    with about(path), opened(path, params, backend, lr, with_params, state_dtype, names=names) as checkpoint:
        saved = checkpoint.stored.saved
        single = saved.name in CLASSES
        require(single, f"its class {saved.name} is one of gpuadam.ShardedAdam alone: load it with gpuadam.load_sharded")
        check_copies(saved.copies, param_copies)
        with not_fitting():
            make, settings = getattr(family, saved.name), checkpoint.hyperparameters | saved.options
            opt = make(checkpoint.params, **settings, param_copies=param_copies, backend=backend)
        fill(opt, checkpoint, with_params, path)
    return opt


def check_copies(copies, param_copies):
    """Refuse to load parameters that had copies without any. copies: their names."""
    enough = param_copies is not None or not copies
    require(enough, f"{some(copies)} had copies: give param_copies=, with None for those without one now")


def fill(opt, checkpoint, with_params, path):
    """Read state, counts and, if with_params is true, parameters into a new optimizer. checkpoint: what `opened` yields.

    If with_params is None, warn of parameters in the file of this path. Masters do not count: they are state.
    """
    stored, saved = checkpoint.stored, checkpoint.stored.saved
    stored.arrange(stored.read_headers())
    arrays = sections(opt)
    with not_fitting():
        in_file = as_saved(arrays, checkpoint.state_dtype)
    of_params = [section for section in arrays if with_params and section.key == PARAM and not section.is_master]
    stored.check(in_file, with_params)
    with not_fitting():
        for section in (*chosen(arrays, False), *of_params):
            checks.no_gaps(section.view)
        loaded = opt.checked_state_dict(_state_dict(opt, saved))
    opt.under_way.begin()  # a process that is killed now leaves no files of state that look whole
    read_state(stored, arrays, in_file)
    for section in of_params:
        stored.verify(section.array_name)
    opt.go_on_from(*loaded)
    opt.ended()
    if with_params:  # now that nothing can be wrong
        torch_tensors.wrote([param for group in opt.groups for param in group["params"]])
    for section in of_params:
        stored.read(section)
    if with_params is None and stored.has_params(besides={section.param for section in arrays if section.is_master}):
        warn_of_params(path)


def warn_of_params(path):
    """Warn of saved parameters that are not loaded."""
    warn(
        f"{shown(path, 1000)} has parameters, which are not loaded: with_params=True overwrites params with them, and "
        "with_params=False says that params are right as they are"
    )


def _state_dict(opt, saved):
    """Return the state_dict of an optimizer with the saved counts, and the saved learning rates for arrays to receive."""
    state_dict = opt.state_dict()
    for settings, group, saved_group in zip(state_dict["groups"], opt.groups, saved.groups, strict=True):
        if is_array(group["lr"]) and saved_group["lr"] is not None:
            settings["lr"] = saved_group["lr"]
    for name, state in state_dict["state"].items():
        state["step"] = saved.params[name]["step"]
    return state_dict | {"steps": saved.steps}


class Opened(NamedTuple):
    """A checkpoint that is open, and the arguments that its optimizer is made with."""

    stored: Stored
    params: Any  # the parameters or, with the hyperparameters of each, groups of them
    hyperparameters: dict[str, Any]
    state_dtype: str | None  # the saved one; the options in `stored.saved` have that of the optimizer


@contextlib.contextmanager
def opened(path, params, backend, lr, with_params, state_dtype=None, of_masters=False, names=None):
    """Open a checkpoint and compare it with the parameters that it is loaded for.

    lr, with_params, state_dtype, names: as in `load`.

    of_masters: a narrow parameter is the copy of a float32 one, which was saved.
    """
    if with_params is not None:
        checks.flag("with_params", with_params)
    if state_dtype is not None:
        checks.one_of(STATE_DTYPES, "state_dtype", state_dtype)
    check_renaming(names)
    params = as_list(params)  # an iterator can be read once
    groups, arrangement = parsed_groups(params, dict.fromkeys(HYPERPARAMETERS) | {"amsgrad": False, "components": 1})
    structures, grouped = arrangement.structures, arrangement.in_groups
    views = {}
    for name, param in named_params(groups):
        label = arrangement.label(name)
        _, (views[name],) = backends.choose([(label, checks.given(label, param))], backend)
    in_file = {new: old for old, new in (names or {}).items()}
    with opened_file(path, _longest_header({in_file.get(name, name): view for name, view in views.items()})) as stored:
        with not_fitting():
            stored.rename(renamed(stored.saved.params, names))
        saved = stored.saved
        check_known("options", saved.options, SAVED)
        masters = [name for name, view in views.items() if of_masters and view.format in NARROW]
        _check_params(saved, views | {name: views[name]._replace(dtype=np.dtype("f4"), bits="") for name in masters})
        with not_fitting():
            options = [saved.options]
            if state_dtype is not None:
                options.append(saved.options | {"state_dtype": state_dtype})
            by_place = all(Options(**of_optimizer).rounds_randomly for of_optimizer in options)
            places = places_of_groups([group["names"] for group in saved.groups], structures, by_place)
        stored.saved = saved = saved._replace(groups=[saved.groups[k] for k in places], options=options[-1])
        with not_fitting():
            for k, (given, group) in enumerate(zip(params if grouped else [], groups, strict=False)):
                _check_hyperparameters(k, given, group, saved.groups[k])
        rates = _learning_rates(lr, groups, saved.groups)
        arguments = []
        holders = [group["params"] for group in params] if grouped else [params]
        for holder, group, structure, rate, saved_group in zip(
            holders, groups, structures, rates, saved.groups, strict=True
        ):
            # the program's own dict or list, so that steps notice another array there
            is_kept = isinstance(holder, (dict, list))
            members = holder if is_kept else as_given(structure.kind, structure.names, group["params"])
            with not_fitting():
                bounds = bounds_of_loaded(saved_group.get("bounds"), group["bounds"])
            arguments.append(saved_group | {"lr": rate, "params": members, "bounds": bounds})
            del arguments[-1]["names"]
        members, hyperparameters = (arguments, {}) if grouped else (arguments[0].pop("params"), arguments[0])
        yield Opened(stored, members, hyperparameters, options[0].get("state_dtype"))


@contextlib.contextmanager
def about(path):
    """Name the checkpoint in errors."""
    try:
        yield
    except CheckpointError as error:
        why = shortened(str(error), 2000)
        raise CheckpointError(f"{shown(path, 1000)} cannot be loaded: {why}") from error.__cause__
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{shown(path, 1000)} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def not_fitting():
    """Say in errors that a checkpoint does not fit the arguments that it is loaded with."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"its content does not fit the arguments: {error}") from error


def _longest_header(views):
    """Return how many bytes a header has at most, a part's too, in which every CELL of a parameter may be a piece of its own.

    A malicious header can take 20 times its size in memory when it is parsed.
    """
    in_json = {name: len(json.dumps(json.dumps(name))) for name in views}  # in a header there is JSON within JSON
    return 2_000_000 + sum((1 + view.size // CELL) * (1200 + 20 * in_json[name]) for name, view in views.items())


def _check_params(saved, views):
    """Compare names, shapes and dtypes of the parameters, before any state is made for them. views: name -> View."""
    difference = differing_names_of_state(saved.params, views)
    require(not difference, difference)
    in_words = "{dtype} of shape {shape}".format
    was = {name: in_words(**of_name) for name, of_name in saved.params.items()}
    now = {name: in_words(**entry(view)) for name, view in views.items()}
    wrong = [f"{shown(name)} was {shortened(was[name])}, and is {now[name]}" for name in now if was[name] != now[name]]
    require(not wrong, "; ".join(wrong[:8]) + ": nothing is cast or reshaped")


def _check_hyperparameters(k, given, group, saved):
    """Refuse hyperparameters in the group of number k that differ from the saved ones. given: the group as it was given."""
    own = saved_settings(group | {"bounds": saved_bounds(group["bounds"])})
    saved = {"components": 1, **saved}  # None, as all that an old file does not have, is the default of the others
    for key in given.keys() - {"params", "lr"}:
        if own[key] != saved.get(key):
            raise ValueError(
                f"group {k} has {key}={shown(own[key])}, and was saved with {key}={shown(saved.get(key))}: leave it out, and set "
                f"opt.groups[{k}]['{key}'] of the loaded optimizer, if it may change"
            )


def _learning_rates(lr, groups, saved):
    """Return the learning rate that each group is made with."""
    rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * len(saved)
    if len(rates) != len(saved):
        raise ValueError(f"lr has {len(rates)} entries for {len(saved)} groups: give one for each, None for the saved one")
    for k, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        if rates[k] is None:
            differs = callable(group["lr"]) and saved_group["lr"] is not None
            require(
                not differs,
                f"group {k} has a callable as lr, and was saved with lr={shown(saved_group['lr'])}: give lr= to say which",
            )
            rates[k] = group["lr"] if saved_group["lr"] is None or is_array(group["lr"]) else saved_group["lr"]
        require(rates[k] is not None, f"the learning rate of group {k} was a callable, which is not saved: give lr=")
    return rates
