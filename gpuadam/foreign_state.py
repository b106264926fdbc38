"""State of Adam and AdamW from torch and optax, and for them: exact, by name, or refused.

torch's exp_avg, exp_avg_sq and max_exp_avg_sq are m, v and max_v, and so are optax's mu and nu m and v. Nothing is cast: the
state's dtype here has to be theirs, `state_dtype="bfloat16"` for bfloat16. Nothing is copied between devices. Only `to_torch`
imports anything.

    from gpuadam import foreign_state
    foreign_state.from_torch(opt, torch_optimizer.state_dict(), [name for name, _ in model.named_parameters()])
"""

import contextlib
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import backends, checks
from .kernels import view as arrays

TORCH = {"m": "exp_avg", "v": "exp_avg_sq", "max_v": "max_exp_avg_sq"}
HYPERPARAMETERS_OF_TORCH = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
COUNTS_OF_OPTAX = 1 << 31  # int32


def from_torch(opt, state_dict, names=None):
    """Load a `state_dict()` of torch.optim.Adam or AdamW into an optimizer, in place: state, step counts, hyperparameters.

    names: the names here of torch's parameters, in its order, through all groups; by default those that torch was given, with
        `torch.optim.Adam(model.named_parameters())`. The groups have to be the same.

    A learning rate that is a callable here stays, as torch's schedulers are not in its state. `opt.steps` becomes the largest
    step count. Raises ValueError or TypeError if anything differs, and then nothing has changed.

    >>> import numpy as np, gpuadam
    >>> opt = gpuadam.Adam({"w": np.zeros(2, "float32")})
    >>> group = {"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
    >>> moments = {"step": 3.0, "exp_avg": np.float32([1, 2]), "exp_avg_sq": np.float32([3, 4])}
    >>> from_torch(opt, {"state": {0: moments}, "param_groups": [group | {"params": [0]}]}, ["w"])
    >>> opt.state["w"]["m"], opt.steps, opt.groups[0]["lr"]
    (array([1., 2.], dtype=float32), 3, 0.5)
    """
    _only_adam(opt)
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError('a state_dict of torch has "state" and "param_groups"; this one does not')
    theirs, of_groups, own_groups = state_dict["state"], state_dict["param_groups"], opt.state_dict()["groups"]
    name_of = _names_of_torch(of_groups, names)
    _check_names(name_of.values(), opt.state)
    if strange := [index for index in theirs if index not in name_of]:
        raise ValueError(f"the state_dict has state of {strange}, which are in none of its groups")
    if len(own_groups) != len(of_groups):
        raise ValueError(f"the state_dict has {len(of_groups)} groups, the optimizer {len(own_groups)}")
    groups = []
    for own, group in zip(own_groups, of_groups, strict=True):
        if missing := sorted({"lr", "betas", "eps", "weight_decay", "params"} - set(group)):
            raise ValueError(f"a group of the state_dict has no {missing}: it is not one of torch.optim.Adam or AdamW")
        if group.get("decoupled_weight_decay", opt._decoupled) is not opt._decoupled:
            raise ValueError(
                f"torch's decoupled_weight_decay is not that of {type(opt).__name__}: load Adam's into Adam, AdamW's into AdamW"
            )
        settings = {key: group[key] for key in HYPERPARAMETERS_OF_TORCH if key in group}
        settings["lr"] = None if own["lr"] is None else _number(group["lr"])
        settings["betas"] = tuple(map(_number, group["betas"]))
        in_group = {name_of[index] for index in group["params"]}
        if in_group != set(own["names"]):
            raise ValueError(
                f"a group of the state_dict has {sorted(in_group)}, that of the optimizer {sorted(own['names'])}"
            )
        groups.append(own | settings)
    states = {name: _from_torch(name, theirs.get(index), opt) for index, name in name_of.items()}
    steps = max(state["step"] for state in states.values())
    opt.load_state_dict({"steps": steps, "groups": groups, "state": states})


def to_torch(opt, names=None):
    """Return the state as a `state_dict()` that torch.optim.Adam or AdamW loads, of tensors that are copies on the same device.

    names: the names here of torch's parameters, in its order, through all groups; by default the optimizer's own order. It may
        permute within a group. Parameters have to be of the state's dtype, because torch would cast the state to theirs.

    Raises ValueError or TypeError for what torch's Adam cannot hold. Nothing changes here.
    """
    torch = importlib.import_module("torch")
    _only_adam(opt)
    ours = opt.state_dict()
    names = [name for group in ours["groups"] for name in group["names"]] if names is None else list(names)
    if sorted(names) != sorted(opt.state):
        raise ValueError(f"names must be those of the optimizer, {list(opt.state)}, not {names}")
    states, of_groups, start = {}, [], 0
    for group, held in zip(ours["groups"], opt.groups, strict=True):
        params = dict(zip(group["names"], held["params"], strict=True))
        indices = list(range(start, start + len(params)))
        start += len(params)
        if {names[k] for k in indices} != set(params):
            raise ValueError(f"names must go through the groups in order, as torch numbers its parameters; they are {names}")
        if group["lr"] is None:
            raise ValueError(
                "the learning rate is a callable, which torch's state cannot hold: put a number into opt.groups"
            )
        settings = {key: group[key] for key in HYPERPARAMETERS_OF_TORCH}
        flags = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
        of_groups.append(settings | flags | {"decoupled_weight_decay": opt._decoupled, "params": indices})
        for k in indices:
            state = ours["state"][names[k]]
            if state["step"]:  # torch has no state of a parameter that took no step
                states[k] = _to_torch(names[k], state, params[names[k]], opt, torch)
    return {"state": states, "param_groups": of_groups}


def from_optax(opt, state, separator="."):
    """Load the state of optax.adam or optax.adamw into an optimizer, in place: m, v and the step counts.

    state: what `init` or `update` returned, alone or inside the states of `optax.chain` and others. It has one ScaleByAdamState.
    separator: a nested tree's parameter is named by its keys, or places in a list, with this between them; a tree that is one
        array is "0", as in `Adam`.

    optax holds no hyperparameters in its state, so those of the optimizer stay. Raises ValueError or TypeError if anything
    differs, and then nothing has changed.

    >>> import numpy as np, gpuadam
    >>> from typing import NamedTuple
    >>> ScaleByAdamState = NamedTuple("ScaleByAdamState", [("count", int), ("mu", dict), ("nu", dict)])
    >>> opt = gpuadam.Adam({"layer.w": np.zeros(2, "float32")})
    >>> mu, nu = ({"layer": {"w": np.float32(x)}} for x in ([1, 2], [3, 4]))
    >>> from_optax(opt, (ScaleByAdamState(3, mu, nu), ()))
    >>> opt.state["layer.w"]["v"], opt.state["layer.w"]["step"]
    (array([3., 4.], dtype=float32), 3)
    """
    _only_adam(opt)
    found = _adam_state(state)
    count = _count(found.count)
    mu, nu = _leaves(found.mu, separator), _leaves(found.nu, separator)
    _check_names(mu, opt.state)
    _check_names(nu, opt.state)
    states = {
        name: {"step": count, "m": _held("m", name, mu[name], opt), "v": _held("v", name, nu[name], opt)} for name in mu
    }
    opt.load_state_dict({"steps": count, "groups": opt.state_dict()["groups"], "state": states})


def to_optax(opt, like, separator="."):
    """Return the state of optax.adam or optax.adamw with m, v and the step count of an optimizer.

    like: a state of the same tree, such as `optax.adam(lr).init(params)`. What is returned is a copy of it, in which the
        ScaleByAdamState and the counts of schedules are replaced, with JAX arrays where it has them and NumPy arrays elsewhere.
    separator: as in `from_optax`.

    All parameters must have taken as many steps: optax has one count. Raises ValueError or TypeError if anything differs.
    """
    _only_adam(opt)
    found, ours = _adam_state(like), opt.state_dict()["state"]
    for state in ours.values():
        if strange := set(state) - {"step", "m", "v"}:
            raise ValueError(f"the state has {sorted(strange)}, for which optax's Adam has no place")
    counts = sorted({state["step"] for state in ours.values()})
    if len(counts) > 1 or counts[0] >= COUNTS_OF_OPTAX:
        raise ValueError(f"optax has one step count, an int32, for all parameters; here they are {counts}")
    trees = []
    for key, tree in (("m", found.mu), ("v", found.nu)):
        _check_names(_leaves(tree, separator), ours)
        trees.append(_mapped(tree, lambda name, leaf, key=key: _like(leaf, ours[name][key], key, name, opt), separator))
    m, v = trees
    return _replaced(like, found._replace(count=_count_like(found.count, counts[0]), mu=m, nu=v), counts[0])


def _only_adam(opt):
    if opt._algorithm != "adam":
        raise TypeError(f"{type(opt).__name__}'s state is not exchanged with other libraries, only Adam's and AdamW's")


def _check_names(theirs, ours):
    if set(theirs) != set(ours):
        missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        raise ValueError(f"the parameters' names differ: only here are {missing}, only there {extra}")


def _number(value):
    """Return a number of a tensor of one, or of the host."""
    return value.item() if hasattr(value, "item") else value


def _count(value):
    """Return a step count, which torch keeps as a float, as an int."""
    value = _number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return checks.count("a step count", value)


def _format(array):
    return str(array.dtype).removeprefix("torch.")


def _format_here(key, name, opt):
    return "bfloat16" if opt.is_bfloat16(name, key) else _format(opt.state[name][key])


def _held(key, name, array, opt):
    """Return another library's array as the state here is held: bfloat16 as uint16."""
    if not hasattr(array, "dtype"):
        raise TypeError(f"{key} of {name!r} is {arrays.a_kind(array)}, not an array")
    if _format(array) != _format_here(key, name, opt):
        raise TypeError(
            f"{key} of {name!r} is {_format(array)} there and {_format_here(key, name, opt)} here, and nothing is cast: make the "
            "optimizer with that state_dtype"
        )
    if _format(array) != "bfloat16":
        return array
    if _package(array) in ("jax", "jaxlib"):
        return sys.modules["jax"].lax.bitcast_convert_type(array, "uint16")
    return array.view(sys.modules["torch"].uint16 if _package(array) == "torch" else np.uint16)


def _package(array):
    return type(array).__module__.partition(".")[0]


# torch


def _names_of_torch(of_groups, names):
    """Return torch's number of a parameter -> its name here."""
    indices = [index for group in of_groups for index in group["params"]]
    if names is None:
        if not all("param_names" in group for group in of_groups):
            raise ValueError("the state_dict has numbers and no names: give names=, in the order of torch's parameters")
        names = [name for group in of_groups for name in group["param_names"]]
    names = list(names)
    if len(names) != len(indices) or len(set(names)) != len(names):
        raise ValueError(f"names must be {len(indices)} different names, one for each parameter of torch; they are {names}")
    return dict(zip(indices, names, strict=True))


def _from_torch(name, state, opt):
    """Return the state of a parameter as `load_state_dict` takes it. torch has none of one that took no step."""
    own = {key: array for key, array in opt.state[name].items() if key != "step"}
    if state is None:
        named = [(f"{key} of params[{name!r}]", array) for key, array in own.items()]
        kernels, views = backends.choose(named, opt.backend)
        return {"step": 0} | {key: kernels.zeros_like(view) for key, view in zip(own, views, strict=True)}
    if set(state) != {"step"} | {TORCH.get(key, key) for key in own}:
        raise ValueError(
            f"the state of {name!r} has {sorted(state)} there and {sorted(own)} here: amsgrad and the like must agree"
        )
    return {"step": _count(state["step"])} | {key: _held(key, name, state[TORCH.get(key, key)], opt) for key in own}


def _to_torch(name, state, param, opt, torch):
    """Return the state of a parameter as torch has it."""
    _, (view,) = backends.choose([(f"params[{name!r}]", param)], opt.backend)
    if strange := set(state) - {"step", *TORCH}:
        raise ValueError(f"the state of {name!r} has {sorted(strange)}, for which torch's Adam has no place")
    if float(np.float32(state["step"])) != state["step"]:
        raise ValueError(f"{name!r} has taken {state['step']} steps, which torch's float32 count cannot hold")
    found = {"step": torch.tensor(float(state["step"]), dtype=torch.float32)}
    for key, theirs in TORCH.items():
        if key in state:
            format_ = _format_here(key, name, opt)
            if format_ != view.format:
                raise TypeError(f"{key} of {name!r} is {format_}, and torch would cast it to the parameter's {view.format}")
            array = state[key].view(np.int16) if format_ == "bfloat16" else state[key]
            _, (own,) = backends.choose([(f"{key} of params[{name!r}]", array)], opt._state_backend)
            tensor = _tensor(torch, own).clone()
            found[theirs] = tensor.view(torch.bfloat16) if format_ == "bfloat16" else tensor
    return found


def _tensor(torch, view):
    """Return a tensor over the memory of an array. On a GPU torch would else move it to its own current device."""
    if view.device is None:
        return torch.from_numpy(view.array)
    return torch.as_tensor(view.array, device=f"cuda:{view.device}")


# optax


def _adam_state(state):
    """Return the one ScaleByAdamState in a state."""
    found = []

    def search(node):
        fields = getattr(node, "_fields", ())
        if {"count", "mu", "nu"} <= set(fields):
            found.append(node)
        elif isinstance(node, (tuple, list, Mapping)):
            for child in node.values() if isinstance(node, Mapping) else node:
                search(child)

    search(state)
    if len(found) != 1 or set(found[0]._fields) != {"count", "mu", "nu"}:
        kinds = [type(node).__name__ for node in found]
        raise ValueError(f"the state must have one ScaleByAdamState, with count, mu and nu; it has {kinds or 'none'}")
    return found[0]


def _mapped(tree, function, separator, path=()):
    """Return a tree of the same structure, with function(name, leaf) in place of each leaf."""
    if isinstance(tree, Mapping):
        return _like_mapping(
            tree, {key: _mapped(child, function, separator, (*path, str(key))) for key, child in tree.items()}
        )
    if isinstance(tree, (list, tuple)):
        keys = getattr(tree, "_fields", map(str, range(len(tree))))
        children = [_mapped(child, function, separator, (*path, key)) for key, child in zip(keys, tree, strict=True)]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return None if tree is None else function(separator.join(path) or "0", tree)


def _like_mapping(mapping: Any, items):
    return type(mapping)(items)  # a dict, or flax's FrozenDict


def _leaves(tree, separator):
    """Return name -> leaf."""
    pairs: list[tuple[str, Any]] = []
    _mapped(tree, lambda name, leaf: pairs.append((name, leaf)), separator)
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"two parameters of the tree get the same name: choose another separator than {separator!r}")
    return dict(pairs)


def _like(leaf, array, key, name, opt):
    """Return a copy of an array of the state, of a leaf's library and dtype."""
    if not hasattr(leaf, "dtype") or (tuple(leaf.shape), _format(leaf)) != (array.shape, _format_here(key, name, opt)):
        what = f"{leaf.dtype} of shape {tuple(leaf.shape)}" if hasattr(leaf, "dtype") else f"{arrays.a_kind(leaf)}"
        raise TypeError(
            f"{key} of {name!r} is {what} in `like`, and {_format_here(key, name, opt)} of shape {array.shape} here"
        )
    if not hasattr(array, "copy"):
        raise TypeError(f"{key} of {name!r} is {arrays.a_kind(array)}: only NumPy and CuPy arrays go to optax")
    with contextlib.nullcontext() if isinstance(array, np.ndarray) else array.device:  # CuPy copies to the current one
        copy = array.copy()
    if _package(leaf) not in ("jax", "jaxlib"):
        return copy.view(leaf.dtype)
    jax = sys.modules["jax"]
    found = jax.numpy.asarray(copy) if isinstance(copy, np.ndarray) else jax.dlpack.from_dlpack(copy)
    return jax.lax.bitcast_convert_type(found, leaf.dtype) if _format(leaf) == "bfloat16" else found


def _count_like(old, count):
    if _package(old) in ("jax", "jaxlib"):
        return sys.modules["jax"].numpy.asarray(count, old.dtype)
    return np.asarray(count, old.dtype) if hasattr(old, "dtype") else count


def _replaced(node, adam, count):
    """Return a state with another ScaleByAdamState, and the counts of schedules set."""
    fields = getattr(node, "_fields", ())
    if set(fields) == {"count", "mu", "nu"}:
        return adam
    if isinstance(node, Mapping):
        return _like_mapping(node, {key: _replaced(child, adam, count) for key, child in node.items()})
    if not isinstance(node, (tuple, list)):
        return node
    children = [_replaced(child, adam, count) for child in node]
    node = type(node)(*children) if hasattr(node, "_fields") else type(node)(children)
    if fields == ("count",) or "hyperparams" in fields:
        node = node._replace(count=_count_like(node.count, count))
    return node
