"""What loading a checkpoint needs, whether one optimizer takes it or many ranks do."""

import contextlib
import json
from typing import Any, NamedTuple

from .. import backends, checks, groups
from ..groups import HYPERPARAMETERS, MAPPING, ONE
from ..sharded.layout import CELL
from ..step_counts import is_array
from .format import check_names, check_params
from .safetensors import CheckpointError
from .stored import Stored


class Given(NamedTuple):
    """A checkpoint that is open, and what an optimizer of it is made with."""

    stored: Stored
    members: list  # the parameters of each group
    grouped: bool  # whether they were given as groups
    rates: list[Any]  # the learning rate of each group


@contextlib.contextmanager
def opened(path, params, backend, lr):
    """Open a checkpoint and compare it with the parameters that it is loaded for. lr: as in `checkpoint.load`."""
    given, structures, grouped = groups.parsed_groups(params, dict.fromkeys(HYPERPARAMETERS) | {"amsgrad": False})
    names = [structure.names for structure in structures]
    views = _viewed(given, backend)
    with contextlib.closing(Stored(path, _longest_header(views))) as stored:
        saved = stored.saved
        check_names([group["names"] for group in saved["groups"]], names)
        check_params(saved["params"], views)
        members = [_as_given(group, structure) for group, structure in zip(given, structures, strict=True)]
        yield Given(stored, members, grouped, _learning_rates(lr, given, saved["groups"]))


def arguments(given):
    """Return the positional argument, parameters or groups of them, and the hyperparameters that an optimizer is made with."""
    settings = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items() if key != "names"}
        | {"lr": rate}
        for group, rate in zip(given.stored.saved["groups"], given.rates, strict=True)
    ]
    if given.grouped:
        return [{"params": of_group} | own for of_group, own in zip(given.members, settings, strict=True)], {}
    return given.members[0], settings[0]


@contextlib.contextmanager
def about(path):
    """Name the checkpoint in errors."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path!r} cannot be loaded: {error}") from error.__cause__
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def not_fitting():
    """Say of errors that what was saved does not fit what was given."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"what it holds does not fit what was given: {error}") from error


def _viewed(given, backend):
    """Return name -> View of all parameters."""
    labels = {name: (f"params[{name!r}]", p) for g in given for name, p in zip(g["names"], g["params"], strict=True)}
    return {
        name: backends.choose([(label, checks.given(label, param))], backend)[1][0]
        for name, (label, param) in labels.items()
    }


def _longest_header(views):
    """Return how many bytes a header has at most, a part's too, in which every CELL of a parameter may be a piece of its own.

    One that was made to harm takes some 20 times its bytes in memory.
    """
    return 2_000_000 + sum((1 + view.size // CELL) * (1200 + 20 * _in_json(name)) for name, view in views.items())


def _in_json(name):
    """Return how many bytes a name has at most in a header, where there is JSON within JSON."""
    return len(json.dumps(json.dumps(name)))


def _learning_rates(lr, given, saved):
    """Return the learning rate that each group is made with."""
    if isinstance(lr, (list, tuple)) and len(lr) != len(saved):
        raise ValueError(f"lr has {len(lr)} entries for {len(saved)} groups: give one for each, None for the saved one")
    chosen = list(lr) if isinstance(lr, (list, tuple)) else [lr] * len(saved)
    for k, (own, group) in enumerate(zip(given, saved, strict=True)):
        if chosen[k] is None:
            chosen[k] = own["lr"] if group["lr"] is None or is_array(own["lr"]) else group["lr"]
        if chosen[k] is None:
            raise CheckpointError(f"the learning rate of group {k} was a callable, which is not saved: give lr=")
    return chosen


def _as_given(group, structure):
    """Return the parameters of a group in the form that they were given in, but for iterators, which can be read once."""
    if structure.kind == MAPPING:
        return dict(zip(group["names"], group["params"], strict=True))
    return group["params"][0] if structure.kind == ONE else group["params"]
