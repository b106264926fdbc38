"""Groups of parameters: what an optimizer is given, what is checked of it at each step, and gradients of the same structure."""

from __future__ import annotations

import collections
import fnmatch
import itertools
import operator
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from typing import Any, NamedTuple, NoReturn

from . import checks, holders, hyperparameters
from .kernels.messages import label_of, shown
from .kernels.view import Bits, a_kind, is_array
from .options import Options
from .typing import Array, Group, Number

# Hyperparameters that decide which moments exist. They cannot change later.
FIXED = ("amsgrad", "complex", "components")
HYPERPARAMETERS = tuple(name for name in Group.__annotations__ if name != "params")
# Those that all groups of an optimizer share
OF_ALL_GROUPS = (*Options.__dataclass_fields__, "param_copies", "backend")
GROUP_KEYS = {"params", "names", *HYPERPARAMETERS}


class _OfAGroup:
    """A descriptor that refuses `optimizer.lr` and the like: setting it would have no effect, because groups have them."""

    def __init__(self, name):
        self.name = name

    def __get__(self, optimizer: object, _: object = None) -> Any:
        if optimizer is None:
            return self
        raise AttributeError(
            f"{self.name} belongs to a group of parameters: read or set groups[0][{self.name!r}] of the optimizer, and so on"
        )

    def __set__(self, optimizer: object, value: NoReturn) -> None:  # no value at all, so that type checkers refuse too
        self.__get__(optimizer)


class HasGroups:
    """An optimizer whose hyperparameters are in its `groups`, where a step finds what they are now."""

    lr, betas, eps, weight_decay, amsgrad, maximize, clip_value, bounds, complex, components = map(
        _OfAGroup, HYPERPARAMETERS
    )


ONE, SEQUENCE, MAPPING = "one array", "a sequence", "a dict"


class Structure(NamedTuple):
    """What a group was when the optimizer was made; the gradients share it."""

    kind: str  # ONE, SEQUENCE or MAPPING
    names: list[str]
    amsgrad: bool
    complex: str | None = None
    components: int = 1


class Arrangement(NamedTuple):
    """How an optimizer's parameters were given. Gradients and copies are given likewise."""

    structures: list[Structure]
    in_groups: bool  # as a list of groups
    places: holders.Places  # of the parameters in the dicts and lists that they were given in
    alone: bool  # as one array, in nothing

    def label(self, name):
        """Return what errors call a parameter: nobody who gave one array knows of a name."""
        return label_of(name, self.alone)

    def in_order(self, arrays, label="grads"):
        """Return arrays or None, in the order of the parameters, of each group. label: what errors call them."""
        if self.in_groups:
            return in_order_of_groups(arrays, self.structures, label)
        return [in_order(arrays, self.structures[0], label)]

    def check(self, groups):
        """Refuse more or fewer groups than when the optimizer was made, and arrays that a step would not update."""
        self.check_number(groups)
        try:
            for holder, key, array, _ in self.places:  # a call for each, or only one for all, would take longer
                if holder[key] is not array:
                    break
            else:
                return
        except LookupError:
            pass
        holders.check(self.places)

    def check_number(self, groups):
        """Refuse more or fewer groups than when the optimizer was made."""
        if len(groups) != len(self.structures):
            raise ValueError("groups cannot be added to an optimizer or removed from it after it is made: make another")


def parsed_groups(params, defaults):
    """Return the groups, dicts with "params", "names" and hyperparameters, and their Arrangement."""
    params = as_list(params)
    grouped = is_sequence(params) and len(params) and all(isinstance(p, Mapping) for p in params)
    given = params if grouped else [{"params": params}]
    groups, structures, places = [], [], holders.Places()
    of_all: list[str] = []
    for group in given:
        if "params" not in group:
            raise ValueError(f'a group needs "params", and has only {some(sorted(map(str, group)))}')
        if strange := set(group) - (GROUP_KEYS - {"names"}):
            raise ValueError(_unknown(strange))
        members = as_given_in = as_list(group["params"])
        if isinstance(members, Mapping):
            names, members, kind = list(members), list(members.values()), MAPPING
            _check_strings(names)
        else:
            _refuse_pairs(members)
            kind = SEQUENCE if is_sequence(members) else ONE
            members = list(members) if kind == SEQUENCE else [members]
            names = [str(len(of_all) + k) for k in range(len(members))]
        places.add_group(as_given_in, names, members)
        of_all += names
        settings = defaults | {key: value for key, value in group.items() if key != "params"}
        settings |= {name: _checked_fixed(name, settings[name]) for name in FIXED}
        groups.append(settings | {"params": members, "names": names})
        structures.append(Structure(kind, list(names), *(settings[name] for name in FIXED)))
    if not of_all:
        raise ValueError("there are no parameters to update")
    if twice := [name for name, n in collections.Counter(of_all).items() if n > 1]:
        raise ValueError(f"two parameters are named {shown(twice[0])}: names must differ")
    return groups, Arrangement(structures, bool(grouped), places, not grouped and structures[0].kind == ONE)


def _check_strings(names):
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the names of parameters must be strings, not {shown(name)}")


def _refuse_pairs(params):
    """Refuse (name, array) pairs, such as named_parameters() of a model or items() of a dict."""
    if not is_sequence(params) or not len(params):
        return
    if all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in params):
        raise TypeError(
            f"params has pairs of a name and an array, the first of {shown(params[0][0])}: give a dict, dict(params) or "
            "dict(model.named_parameters())"
        )


def _unknown(keys):
    """Return what is wrong with keys of a group that it cannot have, in words."""
    names = sorted(map(str, keys))
    of_all = [name for name in names if name in OF_ALL_GROUPS]
    hint = f". Of all groups are {some(of_all)}: give them to the optimizer" if of_all else ""
    return f"a group has unknown {some(names)}; its hyperparameters are {', '.join(HYPERPARAMETERS)}{hint}"


def _checked_fixed(name, value):
    """Return a hyperparameter of FIXED, checked."""
    if name == "amsgrad":
        return checks.flag(name, value)
    return checks.complex_parts(value) if name == "complex" else checks.components(value)


def in_order_of_groups(grads, structures, label="grads"):
    """Return the gradients or None, in the order of the parameters, of each group.

    Where every group has names, they may be one dict, as what computes gradients knows of no groups.
    """
    grads = as_list(grads)
    if isinstance(grads, Mapping) and all(structure.kind == MAPPING for structure in structures):
        names = [name for structure in structures for name in structure.names]
        one = iter(in_order(grads, Structure(MAPPING, names, amsgrad=False), label))
        return [list(itertools.islice(one, len(structure.names))) for structure in structures]
    if not is_sequence(grads) or len(grads) != len(structures):
        raise ValueError(f"{label} must be a list of {len(structures)} entries, one for each group; it is {what_is(grads)}")
    ordered = []
    for k, (group, structure) in enumerate(zip(grads, structures, strict=True)):
        if isinstance(group, Mapping) and set(group) == {"params"} and structure.names != ["params"]:
            group = group["params"]
        ordered.append(in_order(group, structure, f"{label}[{k}]"))
    return ordered


def in_order(grads, structure, label):
    """Return the gradients or None, in the order of the parameters, of one group."""
    if structure.kind == ONE:
        if type(grads) in (list, tuple, dict) and len(grads) == 1:  # with its array, mostly: others are no arrays
            raise TypeError(f"{label} is {what_is(grads)}, and the parameter was given as one array: give {label} so, too")
        return [grads]
    grads, names = as_list(grads), structure.names
    if structure.kind == MAPPING:
        if not isinstance(grads, Mapping) or grads.keys() != set(names):
            wrong = differing_names(grads, names) if isinstance(grads, Mapping) else f"it is {what_is(grads)}"
            raise ValueError(f"{label} must be a dict with the names {some(names)} (None skips one); {wrong}")
        return [grads[name] for name in names]
    if not is_sequence(grads) or len(grads) != len(names):
        raise ValueError(f"{label} must be a sequence of {len(names)} (None skips one); it is {what_is(grads)}")
    return list(grads)


class _OfParams:
    """The default of `grads`: the `.grad` of each parameter."""

    def __repr__(self):
        return "OF_PARAMS"


OF_PARAMS: Any = _OfParams()


def named_params(groups):
    """Yield the name and the array of each parameter."""
    for group in groups:
        yield from zip(group["names"], group["params"], strict=True)


def grads_of_params(group, arrangement, method="step"):
    """Return the `.grad` of each parameter of a group, None included. method: which needs them, for the error."""
    for name, param in zip(group["names"], group["params"], strict=False):
        if not hasattr(param, "grad"):
            label = arrangement.label(name)
            raise TypeError(f"{label} is {a_kind(param)}, which has no .grad: give the gradients, {method}(grads)")
    return [param.grad for param in group["params"]]


def saved_settings(group):
    """Return the names and hyperparameters of a group as a state_dict has them: None for an lr that is a callable."""
    settings = {key: None if callable(group[key]) else group[key] for key in HYPERPARAMETERS}
    pairs = {key: tuple(group[key]) for key in ("betas", "bounds") if isinstance(group[key], Iterable)}
    return settings | pairs | {"names": list(group["names"])}


def as_list(x):
    """Return generators and the like, such as `model.parameters()` and `d.values()`, as lists."""
    if type(x) in (list, tuple, dict):  # what it mostly is; asking for the abstract types takes longer
        return x
    return list(x) if isinstance(x, (Iterator, ValuesView, ItemsView)) else x


def is_sequence(x):
    return type(x) in (list, tuple) or (isinstance(x, Sequence) and not isinstance(x, (str, bytes, Bits)))


LENGTH = 600  # of the names in an error message


def some(names, most=12):
    """Return names for an error message: of a large model, the first few, and of long names fewer."""
    names = list(names)
    first: list[str] = []
    for name in names[:most]:
        if first and sum(map(len, first)) > LENGTH:
            break
        first.append(shown(name))
    more = f" and {len(names) - len(first)} more" if len(first) < len(names) else ""
    return f"[{', '.join(first)}]{more}"


def what_is(x):
    if isinstance(x, Mapping):
        return f"a dict with the names {some(x)}"
    return f"a sequence of {len(x)}" if is_sequence(x) else f"{a_kind(x)}"


def checked_group(group, structure, options, step, grad_scale=1.0):
    """Check a group and return its Hyperparameters for a step, lr called if it is a callable.

    options: `Options`. Raises TypeError or ValueError.
    """
    check_keys(group)
    lr, betas, eps, weight_decay, amsgrad, maximize, clip_value, bounds, pairs, components, names, params = _values(group)
    if names != structure.names or len(params) != len(names):
        raise ValueError('the "params" and "names" of a group cannot be changed after the optimizer is made: make another')
    if not (amsgrad is structure.amsgrad and pairs is structure.complex and components is structure.components):
        for name in FIXED:
            if _checked_fixed(name, group[name]) != getattr(structure, name):
                raise ValueError(f"{name} cannot be changed after the optimizer is made: it decides which moments there are")
    if type(lr) is not float:
        if is_array(lr):
            raise TypeError(
                f"lr is {a_kind(lr)}: it must be a number or a callable or, with capturable=True, an array of one number beside "
                "the parameters. step(lr_scale=...) takes arrays by which lr is multiplied"
            )
        lr = checks.scheduled(lr, step) if callable(lr) else lr
    of_options = options.formulas
    return hyperparameters.with_formulas(lr, betas, eps, weight_decay, maximize, grad_scale, of_options, clip_value, bounds)


def check_keys(group):
    """Refuse a group that lacks a setting, or has one more."""
    if group.keys() != GROUP_KEYS:
        if unknown := group.keys() - GROUP_KEYS:
            raise ValueError(_unknown(unknown))
        missing = sorted(GROUP_KEYS - group.keys())
        raise ValueError(f"a group lacks {missing}; its hyperparameters are {', '.join(HYPERPARAMETERS)}")


_values = operator.itemgetter(*HYPERPARAMETERS, "names", "params")


def as_given(kind, names, arrays):
    """Return a list of arrays in the form that parameters were given in: ONE, SEQUENCE or MAPPING."""
    if kind == MAPPING:
        return dict(zip(names, arrays, strict=True))
    return arrays[0] if kind == ONE else arrays


def differing_names(theirs, ours):
    """Return how names of gradients or of state differ from those of the parameters, in words, or nothing if they do not.

    >>> differing_names(["w", "c"], ["w", "b"])
    "it lacks ['b'] and only it has ['c']"
    """
    theirs, ours = dict.fromkeys(theirs), dict.fromkeys(ours)  # in their order
    missing, extra = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    return " and ".join([f"it lacks {some(missing)}"] * bool(missing) + [f"only it has {some(extra)}"] * bool(extra))


def check_names(theirs, ours):
    """Refuse state of other names than those of the parameters."""
    if difference := differing_names(theirs, ours):
        raise ValueError(f"the parameters' names differ: {difference}")


def differing_names_of_state(theirs, ours):
    """Return how the names of state that is loaded differ from those of the parameters, and what to do; nothing if they do not.

    >>> print(differing_names_of_state(["w", "c"], ["w"]).partition("never to a place. ")[2])
    Load with the parameters that were saved, and then use opt.remove('c')
    """
    difference = differing_names(theirs, ours)
    if not difference:
        return ""
    gone, new = ([shown(x) for x in one if x not in other] for one, other in ((theirs, set(ours)), (ours, set(theirs))))
    moves = [f"opt.remove({name})" for name in gone[:1]] + [f"opt.add({name}, param)" for name in new[:1]]
    ways = f"load with the parameters that were saved, and then use {' and '.join(moves)}"
    if gone and new:
        ways = f"give names={{{gone[0]}: {new[0]}}} if that is its new name, and so on. If one went and another came, {ways}"
    return (
        f"the parameters' names differ: {difference}. State belongs to a name, never to a place. {ways[0].upper()}{ways[1:]}"
    )


def check_renaming(names):
    """Refuse what is no dict of names. names: old name of a parameter -> new name, or None."""
    if names is not None and not (isinstance(names, Mapping) and all(isinstance(x, str) for x in (*names, *names.values()))):
        raise TypeError(f"names must be a dict of strings, old name of a parameter -> new name, not {shown(names)}")


def renamed(saved, names):
    """Return old name -> new name of all saved parameters. names: those that differ, as `check_renaming` takes them."""
    names = names or {}
    if unknown := [name for name in names if name not in saved]:
        raise ValueError(f"names has {some(unknown)}, which were not saved. Its keys are old names; there are {some(saved)}")
    now = {name: names.get(name, name) for name in saved}
    if twice := [name for name, n in collections.Counter(now.values()).items() if n > 1]:
        both = some(old for old, new in now.items() if new == twice[0])
        raise ValueError(f"with names, {both} would all be named {shown(twice[0])}: give each a name of its own")
    return now


def places_of_groups(names, structures, by_place):
    """Return, for each Structure, which of the loaded groups has its parameters. names: of each of these.

    Parameters with names may come in another order, and so may their groups, unless by_place: what is kept of a parameter goes
    by its place among all. In a sequence numbers are the names. Raises ValueError if groups or orders differ.

    >>> places_of_groups([["a"], ["c", "b"]], [Structure(MAPPING, ["b", "c"], False), Structure(MAPPING, ["a"], False)], False)
    [1, 0]
    """
    by_names: dict[tuple, list[int]] = {}
    for k, of_group in enumerate(names):
        by_names.setdefault(tuple(sorted(of_group)), []).append(k)
    places = []
    for kind, own, *_ in structures:
        alike = by_names.get(tuple(sorted(own)))
        if alike and (kind == MAPPING or names[alike[0]] == own):
            places.append(alike.pop(0))
    saved, ours = list(itertools.chain(*names)), [name for structure in structures for name in structure.names]
    was = f"they were {some(saved)} in groups of {some(map(len, names))}"
    if not len(places) == len(names) == len(structures):
        raise ValueError(f"the parameters are in other groups, or in another order where numbers are their names: {was}")
    if by_place and saved != ours:
        raise ValueError(f"the parameters have another order, by which numbers are rounded randomly: {was}")
    return places


def decay_groups(params: Mapping[str, Array], no_decay: str | Iterable[str], weight_decay: Number = 1e-2) -> list[Group]:
    """Return two groups for `Adam` or `AdamW`: the parameters that decay, and those that do not.

    params: a dict name -> array.
    no_decay: patterns of the names of the parameters that do not decay, as in a shell and case-sensitive: `*` stands for any
        characters, dots too, `?` for one, and `[ab]` for one of these. One string is one pattern.
    weight_decay: the weight decay of the other parameters.

    The groups are `{"params": dict of the arrays under their names, "weight_decay": number}`. The arrays are not copied, and each
    group keeps the order of params. A group may have no parameters. The gradients for `step` can be one dict of all names.

    Raises ValueError for a pattern that matches no name, and TypeError for params that are not a dict.

    >>> import numpy as np, gpuadam
    >>> params = {"dense.weight": np.ones((2, 2)), "dense.bias": np.ones(2), "norm.scale": np.ones(2)}
    >>> groups = gpuadam.decay_groups(params, no_decay=("*.bias", "norm.*"), weight_decay=0.5)
    >>> opt = gpuadam.AdamW(groups, lr=0.1)
    >>> [(group["names"], group["weight_decay"]) for group in opt.groups]
    [(['dense.weight'], 0.5), (['dense.bias', 'norm.scale'], 0.0)]
    >>> opt.step({name: np.zeros_like(p) for name, p in params.items()})
    >>> print(params["dense.weight"][0], params["dense.bias"])
    [0.95 0.95] [1. 1.]
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {a_kind(params)}; patterns need names: pass a dict name -> array")
    _check_strings(params)
    if not isinstance(no_decay, Iterable):
        raise TypeError(f"no_decay must be patterns of names, not {shown(no_decay)}")
    exempt: set[str] = set()
    for pattern in [no_decay] if isinstance(no_decay, (str, bytes)) else no_decay:
        if not isinstance(pattern, str):
            raise TypeError(f"the patterns of no_decay must be strings, not {shown(pattern)}")
        matched = [name for name in params if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"no_decay: no parameter's name matches {shown(pattern)}; there are {some(params)}")
        exempt.update(matched)
    parts = [{name: p for name, p in params.items() if (name in exempt) is is_exempt} for is_exempt in (False, True)]
    decays = checks.non_negative("weight_decay", weight_decay), 0.0
    pairs = zip(parts, decays, strict=True)
    return [{"params": holders.Part(part, params), "weight_decay": decay} for part, decay in pairs]
