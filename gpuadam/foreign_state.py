"""The state of Adam and AdamW, exchanged with torch and optax: by name, exactly, or not at all.

torch's exp_avg, exp_avg_sq and max_exp_avg_sq are m, v and max_v; optax's mu and nu are m and v. Nothing is rounded, unless
`convert=True` is given: then moments of an optimizer with bfloat16 or 8-bit state come from float32 ones, or become them, rounded
to nearest, through the host, and `gpuadam.guide.narrow_numbers` says what that loses. Without it loaded state may be of a
narrower dtype than the optimizer's, such as bfloat16 with `mu_dtype` of optax, and is widened; state that is given away has the
dtype of the other library's, with `state_dtype="bfloat16"` for bfloat16. Nothing is copied between devices. Only `to_torch`
imports another library.

torch's state goes with its hyperparameters, so the optimizer's formula must have the same eps: "torch", "apex", or "optax"
without eps_root. With amsgrad "optax" is refused too, because its max_v is that of the corrected v.

    from gpuadam import foreign_state
    foreign_state.from_torch(opt, torch_optimizer.state_dict(), [name for name, _ in model.named_parameters()])
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from . import backends, checks
from .groups import MAPPING, check_names, places_of_groups, some
from .kernels.messages import shortened, shown
from .kernels.view import Bits, a_kind, is_jax
from .optimizer import Adam
from .state import OF_GROUPS, check_meaning
from .state_conversion import CONVERTED, conversion
from .torch_tensors import is_tensor

TORCH = {"m": "exp_avg", "v": "exp_avg_sq", "max_v": "max_exp_avg_sq"}
HYPERPARAMETERS_OF_TORCH = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
COUNTS_OF_OPTAX = 1 << 31  # int32
# format -> those that hold all of its numbers
WIDER = {"float64": (), "float32": ("float64",), **dict.fromkeys(("float16", "bfloat16"), ("float32", "float64"))}
# what a state_dict says of the meaning of moments
OF_TORCH, OF_OPTAX = ({"algorithm": "adam", "formula": formula} for formula in ("torch", "optax"))


def from_torch(
    opt: Adam, state_dict: Mapping[str, Any], names: Iterable[str] | None = None, *, convert: bool = False
) -> None:
    """Load a `state_dict()` of torch.optim.Adam or AdamW into an optimizer, in place: state, step counts, hyperparameters.

    names: this optimizer's names of torch's parameters, in torch's order, through all groups. By default the names in the
        state_dict, which it has if torch's optimizer was made by `torch.optim.Adam(model.named_parameters())`. Both optimizers
        must have the same groups, in any order.
    convert: this optimizer's state may have another format than torch's, such as 8 bits.

    If this optimizer's learning rate is a callable, it stays: torch's schedulers are not in its state. `opt.steps` becomes the
    largest step count. Raises ValueError or TypeError if anything differs, and then nothing has changed.

    >>> import numpy as np, gpuadam
    >>> opt = gpuadam.Adam({"w": np.zeros(2, "float32")})
    >>> group = {"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
    >>> moments = {"step": 3.0, "exp_avg": np.array([1, 2], "float32"), "exp_avg_sq": np.array([3, 4], "float32")}
    >>> gpuadam.foreign_state.from_torch(opt, {"state": {0: moments}, "param_groups": [group | {"params": [0]}]}, ["w"])
    >>> opt.state["w"]["m"], opt.steps, opt.groups[0]["lr"]
    (array([1., 2.], dtype=float32), 3, 0.5)
    """
    _only_adam(opt)
    _check_eps(opt)
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError('a state_dict of torch has "state" and "param_groups"; this one does not')
    theirs, their_groups, groups = state_dict["state"], state_dict["param_groups"], opt.state_dict()["groups"]
    name_of = _names_of_torch(their_groups, names)
    check_names(name_of.values(), opt.state)
    if strange := [index for index in theirs if index not in name_of]:
        raise ValueError(f"the state_dict has state of {some(strange)}, which are in none of its groups")
    structures = [structure._replace(kind=MAPPING) for structure in opt.arrangement.structures]  # all have names now
    named = [[name_of[index] for index in group["params"]] for group in their_groups]
    for group, k in zip(groups, places_of_groups(named, structures, by_place=False), strict=True):
        their_group = their_groups[k]
        if missing := sorted({"lr", "betas", "eps", "weight_decay", "params"} - set(their_group)):
            raise ValueError(f"a group of the state_dict has no {missing}: it is not one of torch.optim.Adam or AdamW")
        checks.bias_correction(their_group)
        if their_group.get("decoupled_weight_decay", opt.decoupled) is not opt.decoupled:
            raise ValueError("torch's decoupled_weight_decay differs: load Adam's state into Adam, AdamW's into AdamW")
        lr = None if group["lr"] is None else _number(their_group["lr"])
        group |= {key: their_group[key] for key in HYPERPARAMETERS_OF_TORCH if key in their_group}
        group |= {"lr": lr, "betas": tuple(map(_number, their_group["betas"]))}
    convert = checks.flag("convert", convert)
    states = {name: _from_torch(name, theirs.get(index), opt, convert) for index, name in name_of.items()}
    steps = max(state["step"] for state in states.values())
    opt.load_state_dict({"steps": steps, "groups": groups, "state": states, **OF_TORCH}, convert=convert)


def to_torch(opt: Adam, names: Iterable[str] | None = None, *, convert: bool = False) -> dict[str, Any]:
    """Return the state as a `state_dict()` that torch.optim.Adam or AdamW loads, of tensors that are copies on the same device.

    names: this optimizer's names of torch's parameters, in torch's order, through all groups; by default in this optimizer's
        order. The order may differ within a group. Parameters must have the state's dtype, because torch would cast the state.
    convert: moments of another format, such as 8 bits, become the parameter's, which is float32, float64 or bfloat16.

    Raises ValueError or TypeError for what torch's Adam cannot hold. Nothing changes here.
    """
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError('to_torch needs torch: pip install "gpuadam[torch]"', name=error.name) from error
    _only_adam(opt)
    _check_eps(opt)
    ours = opt.state_dict()
    names = list(opt.state if names is None else names)
    flags = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    groups, stop = [], 0
    for group in ours["groups"]:
        start, stop = stop, stop + len(group["names"])
        if sorted(names[start:stop]) != sorted(group["names"]) or len(names) != len(opt.state):
            raise ValueError(
                f"names must be those of the optimizer, {some(opt.state)}, group by group; they are {some(names)}"
            )
        if group["lr"] is None:
            raise ValueError("the learning rate is a callable, and torch's state has a number: put one into opt.groups")
        if not group["clip_value"] is group["bounds"] is None:
            raise ValueError(
                "torch's Adam has no clip_value and no bounds: set those of opt.groups to None, and clip yourself"
            )
        settings = {key: group[key] for key in HYPERPARAMETERS_OF_TORCH} | flags
        groups.append(settings | {"decoupled_weight_decay": opt.decoupled, "params": list(range(start, stop))})
    # torch has no state of a parameter that took no step
    stepped = {k: name for k, name in enumerate(names) if ours["state"][name]["step"]}
    convert = checks.flag("convert", convert)
    states = {k: _to_torch(name, ours["state"][name], opt, torch, convert) for k, name in stepped.items()}
    return {"state": states, "param_groups": groups}


def from_optax(opt: Adam, state: Any, separator: str = ".", *, convert: bool = False) -> None:
    """Load the state of optax.adam or optax.adamw into an optimizer, in place: m, v and the step counts.

    state: a state that `init` or `update` returned, also one of `optax.chain` and the like. It has one ScaleByAdamState. The
        states of optax.adamax and optax.yogi have this type too, and nothing in them tells that their nu is another: they must
        not be given.
    separator: goes between the keys, or places in lists, that name a parameter of a nested tree. A tree that is one array is
        named "0", as in `Adam`.
    convert: this optimizer's state may have another format than optax's, such as 8 bits.

    optax holds no hyperparameters in its state, so those of the optimizer stay. Raises ValueError or TypeError if anything
    differs, and then nothing has changed.

    >>> import numpy as np, gpuadam
    >>> from typing import Any, NamedTuple
    >>> ScaleByAdamState = NamedTuple("ScaleByAdamState", [("count", int), ("mu", Any), ("nu", Any)])
    >>> opt = gpuadam.Adam({"layer.w": np.zeros(2, "float32")})
    >>> mu, nu = ({"layer": {"w": np.array(x, "float32")}} for x in ([1, 2], [3, 4]))
    >>> gpuadam.foreign_state.from_optax(opt, (ScaleByAdamState(3, mu, nu), ()))
    >>> opt.state["layer.w"]["v"], opt.state["layer.w"]["step"]
    (array([3., 4.], dtype=float32), 3)
    """
    _only_adam(opt)
    convert = checks.flag("convert", convert)
    _, adam = _adam_state(state)
    count = _count(adam.count)
    states: dict[str, dict] = {name: {"step": count} for name in opt.state}
    for key, tree in (("m", adam.mu), ("v", adam.nu)):
        leaves = _leaves(tree, separator)
        check_names(leaves, opt.state)
        for name, leaf in leaves.items():
            states[name][key] = leaf if convert else _held(key, name, leaf, opt)
    loaded = {"steps": count, "groups": opt.state_dict()["groups"], "state": states, **OF_OPTAX}
    opt.load_state_dict(loaded, convert=convert)


def to_optax(opt: Adam, like: Any, separator: str = ".") -> Any:
    """Return the state of optax.adam or optax.adamw with m, v and the step count of an optimizer.

    like: a state of the same tree, such as `optax.adam(lr).init(params)`. The returned state is a copy of it, in which the
        moments and all counts are replaced, by JAX arrays in the place of JAX arrays and by NumPy arrays elsewhere.
    separator: as in `from_optax`.

    All parameters must have taken the same number of steps, because optax has one count. Raises ValueError or TypeError if
    anything differs.
    """
    _only_adam(opt)
    (where, adam), ours = _adam_state(like), opt.state_dict()["state"]
    for name, state in ours.items():
        _check_keys(name, state, ("m", "v"), "optax")
    for tree in (adam.mu, adam.nu):
        check_names(_leaves(tree, separator), opt.state)
    counts = sorted({state["step"] for state in ours.values()})
    if len(counts) > 1 or counts[0] >= COUNTS_OF_OPTAX:
        raise ValueError(f"optax has one step count, an int32, for all parameters; here they are {some(counts)}")
    trees, depth = {(*where, "mu"): "m", (*where, "nu"): "v"}, len(where) + 1

    def replaced(path, node):
        if key := trees.get(path[:depth]):
            return _like(node, key, _name(path[depth:], separator), opt) if _is_leaf(node) else node
        fields = getattr(node, "_fields", ())
        has_count = path == where or fields == ("count",) or "hyperparams" in fields  # schedules have one
        return node._replace(count=_count_like(node.count, counts[0])) if has_count else node

    return _mapped(like, replaced)


def _only_adam(opt):
    if opt.algorithm != "adam":
        raise TypeError(f"{type(opt).__name__}'s state is not exchanged with other libraries, only Adam's and AdamW's")
    for name, parameter in opt.parameters.items():
        if parameter.kind.of_complex or parameter.kind.numbers > 1:
            raise TypeError(
                f"{opt.arrangement.label(name)} is complex or has components, and its state is not exchanged with other "
                "libraries: copy m and v of opt.state yourself"
            )


def _check_eps(opt):
    """Refuse a formula whose eps is not torch's."""
    if opt.options.formula == "eps-hat" or opt.options.eps_root:
        has = f"formula={opt.options.formula!r} with eps_root={opt.options.eps_root}"
        raise ValueError(f"the optimizer has {has}, in which eps is not what it is in torch: use one with formula='torch'")


def _check_keys(name, state, known, library):
    """Refuse to give away state that another library would lose."""
    if strange := sorted(set(state) - {"step", *known}):
        raise ValueError(f"the state of {shown(name)} has {some(strange)}, for which {library}'s Adam has no place")


def _number(value):
    """Return a number of a tensor of one, or of the host."""
    return value.item() if hasattr(value, "item") else value


def _count(value):
    """Return a step count, which torch keeps as a float, as an int."""
    value = _number(value)
    return checks.count("a step count", int(value) if isinstance(value, float) and value.is_integer() else value)


def _format(array):
    return str(array.dtype).removeprefix("torch.")


def _format_here(key, name, opt):
    array = opt.array_of_state(name, key)
    return array.format if type(array) is Bits else _format(array)


def _held(key, name, array, opt):
    """Return another library's array as the state here is held: a narrower format widened, and bfloat16 as uint16."""
    if isinstance(array, np.ndarray):
        _, (view,) = backends.choose([(f"{key} of {shown(name)}", array)], "numba-cpu")
        array = view.array  # not of a subclass, which may have its own idea of a dtype
    if not hasattr(array, "dtype"):
        raise TypeError(f"{key} of {shown(name)} is {a_kind(array)}, not an array")
    theirs, ours = _format(array), _format_here(key, name, opt)
    if theirs in WIDER and ours in WIDER[theirs]:
        array = array.to(getattr(sys.modules["torch"], ours)) if is_tensor(array) else array.astype(ours)
        theirs = _format(array)
    if theirs != ours:
        wide = "float64" if "float64" in (theirs, ours) else "float32"
        wider = f"Nothing is rounded: make the optimizer with state_dtype={wide!r}, or give convert=True"
        advice = wider if theirs in WIDER else "Moments are floats"
        raise TypeError(f"{key} of {shown(name)} is {shortened(theirs)} there and {ours} here. {advice}")
    if ours != "bfloat16":
        return array
    if is_jax(array):
        return sys.modules["jax"].lax.bitcast_convert_type(array, "uint16")
    return array.view(sys.modules["torch"].uint16 if is_tensor(array) else np.uint16)


# torch


def _names_of_torch(groups, names):
    """Return torch's number of a parameter -> its name here."""
    indices = [index for group in groups for index in group["params"]]
    if names is None:
        if not all("param_names" in group for group in groups):
            raise ValueError("the state_dict has numbers and no names: give names=, in the order of torch's parameters")
        names = [name for group in groups for name in group["param_names"]]
    names = list(names)
    if len(names) != len(indices) or len(set(names)) != len(names):
        raise ValueError(
            f"names must be {len(indices)} different names, one for each parameter of torch; they are {some(names)}"
        )
    return dict(zip(indices, names, strict=True))


def _from_torch(name, state, opt, convert):
    """Return the state of a parameter as `load_state_dict` takes it. torch has none of a parameter that took no step."""
    ours = {key: array for key, array in opt.state[name].items() if key != "step"}
    if state is None:
        named = [(f"{key} of {opt.arrangement.label(name)}", array) for key, array in ours.items()]
        backend, views = backends.choose(named, opt.state_backend)
        return {"step": 0} | {
            key: backend.zeros_like_all([view], view.dtype)[0] for key, view in zip(ours, views, strict=True)
        }
    if convert:
        ours = {key: array for key, array in ours.items() if key not in OF_GROUPS}
    if set(state) != {"step"} | {TORCH.get(key, key) for key in ours}:
        differ = f"has {some(sorted(map(str, state)))} there and {sorted(ours)} here: amsgrad and the like must agree"
        raise ValueError(f"the state of {shown(name)} {differ}")
    loaded = {key: state[TORCH.get(key, key)] for key in ours}
    loaded = loaded if convert else {key: _held(key, name, array, opt) for key, array in loaded.items()}
    return {"step": _count(state["step"])} | loaded


def _to_torch(name, state, opt, torch, convert):
    """Return the state of a parameter as torch has it."""
    of_param = opt.parameters[name].kind.param
    _check_keys(name, state, (*TORCH, *OF_GROUPS) if convert else TORCH, "torch")
    check_meaning(state, opt.options, **OF_TORCH)
    if float(np.float32(state["step"])) != state["step"]:
        raise ValueError(f"{shown(name)} has taken {shown(state['step'])} steps, which torch's float32 count cannot hold")
    tensors = {"step": torch.tensor(float(state["step"]), dtype=torch.float32)}
    moments = [key for key in TORCH if key in state]
    if convert and of_param != "float16" and any(_format_here(key, name, opt) != of_param for key in moments):
        return tensors | _converted_for_torch(name, state, moments, opt, torch)
    for key in moments:
        format_ = _format_here(key, name, opt)
        if format_ != of_param:
            raise TypeError(f"{key} of {shown(name)} is {format_}, and torch would cast it to the parameter's {of_param}")
        array = state[key].view(np.int16) if format_ == "bfloat16" else state[key]
        _, (view,) = backends.choose([(f"{key} of {opt.arrangement.label(name)}", array)], opt.state_backend)
        device = "cpu" if view.device is None else f"cuda:{view.device}"  # else torch moves the memory to its current one
        tensor = torch.as_tensor(view.array, device=device).clone()
        tensors[TORCH[key]] = tensor.view(torch.bfloat16) if format_ == "bfloat16" else tensor
    return tensors


def _converted_for_torch(name, state, moments, opt, torch):
    """Return the moments of a parameter as tensors of the parameter's dtype, beside the state."""
    label, parameter = opt.arrangement.label(name), opt.parameters[name]
    _, (view,) = backends.choose([(f"m of {label}", state["m"])], opt.state_backend)
    device, dtype = "cpu" if view.device is None else f"cuda:{view.device}", getattr(torch, parameter.kind.param)
    converted = {key: torch.empty(tuple(state[key].shape), dtype=dtype, device=device) for key in moments}
    own = {key: opt.array_of_state(name, key) for key in state if key in CONVERTED}
    conversion(label, converted, own).run()
    return {TORCH[key]: tensor for key, tensor in converted.items()}


# optax


def _is_leaf(node):
    return node is not None and not isinstance(node, (Mapping, tuple, list))


def _children(node):
    """Return (key, child) of each child of a tree's node; a leaf has none."""
    if isinstance(node, Mapping):
        return [(str(key), child) for key, child in node.items()]
    if isinstance(node, (tuple, list)):
        return list(zip(getattr(node, "_fields", map(str, range(len(node)))), node, strict=True))
    return []


def _nodes(node, path=()):
    """Yield (path, node) of each node of a tree. A path is the keys that lead there."""
    yield path, node
    for key, child in _children(node):
        yield from _nodes(child, (*path, key))


def _mapped(node, function, path=()):
    """Return a tree in which function(path, node) takes the place of each node, children first."""
    children = [_mapped(child, function, (*path, key)) for key, child in _children(node)]
    if isinstance(node, Mapping):
        node = type(node)(dict(zip(node, children, strict=True)))  # type: ignore[call-arg]  # a dict, or flax's FrozenDict
    elif isinstance(node, (tuple, list)):
        node = type(node)(*children) if hasattr(node, "_fields") else type(node)(children)
    return function(path, node)


def _name(path, separator):
    return separator.join(path) or "0"


def _leaves(tree, separator):
    """Return name -> leaf."""
    pairs = [(_name(path, separator), node) for path, node in _nodes(tree) if _is_leaf(node)]
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"two parameters of the tree get the same name: choose another separator than {shown(separator)}")
    return dict(pairs)


def _adam_state(state):
    """Return (path, node) of the one ScaleByAdamState in a state."""
    states = [(path, node) for path, node in _nodes(state) if {"count", "mu", "nu"} <= set(getattr(node, "_fields", ()))]
    kinds = [type(node).__name__ for _, node in states]
    if kinds != ["ScaleByAdamState"] or set(states[0][1]._fields) != {"count", "mu", "nu"}:
        raise ValueError(
            f"the state must have one ScaleByAdamState, with count, mu and nu; it has {some(kinds) if kinds else 'none'}"
        )
    return states[0]


def _like(leaf, key, name, opt):
    """Return a copy of an array of the state, of a leaf's library and dtype."""
    array, format_ = opt.state[name][key], _format_here(key, name, opt)
    if not hasattr(leaf, "dtype") or (tuple(leaf.shape), _format(leaf)) != (array.shape, format_):
        what = f"{shortened(str(leaf.dtype))} of shape {tuple(leaf.shape)}" if hasattr(leaf, "dtype") else a_kind(leaf)
        advice = "Nothing is rounded: give a `like` of the dtype here, which mu_dtype sets for mu"
        raise TypeError(f"{key} of {shown(name)} is {what} in `like`, and {format_} of shape {array.shape} here. {advice}")
    if not hasattr(array, "copy"):
        raise TypeError(f"{key} of {shown(name)} is {a_kind(array)}: only NumPy and CuPy arrays go to optax")
    with contextlib.nullcontext() if isinstance(array, np.ndarray) else array.device:  # CuPy copies to the current one
        copy = array.copy()
    if not is_jax(leaf):
        return copy.view(leaf.dtype)
    jax = sys.modules["jax"]
    shared = jax.numpy.asarray(copy) if isinstance(copy, np.ndarray) else jax.dlpack.from_dlpack(copy)
    return jax.lax.bitcast_convert_type(shared, leaf.dtype) if format_ == "bfloat16" else shared


def _count_like(old, count):
    if is_jax(old):
        return sys.modules["jax"].numpy.asarray(count, old.dtype)
    return np.asarray(count, old.dtype) if hasattr(old, "dtype") else count
