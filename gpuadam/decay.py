"""Which parameters decay, chosen by their names."""

import fnmatch
from collections.abc import Iterable, Mapping

from . import checks
from .groups import some
from .kernels import view as arrays


def decay_groups(params, no_decay, weight_decay=1e-2):
    """Return two groups for `Adam` or `AdamW`: the parameters that decay, and those that do not.

    params: a dict name -> array. no_decay: patterns of the names of those that do not decay, as in a shell and case-sensitive:
        `*` stands for any characters, dots too, `?` for one, and `[ab]` for one of these. One string is one pattern.
    weight_decay: of the others.

    The groups are `{"params": dict of the arrays under their names, "weight_decay": number}`. The arrays are not copied, and each
    group keeps the order of params. One of them may have no parameters. The gradients for `step` can be one dict of all names.

    Raises ValueError for a pattern that matches no name, and TypeError for params that are no dict.

    >>> import numpy as np, gpuadam
    >>> params = {"dense.weight": np.ones((2, 2)), "dense.bias": np.ones(2), "norm.scale": np.ones(2)}
    >>> groups = gpuadam.decay_groups(params, no_decay=("*.bias", "norm.*"), weight_decay=0.5)
    >>> [(list(group["params"]), group["weight_decay"]) for group in groups]
    [(['dense.weight'], 0.5), (['dense.bias', 'norm.scale'], 0.0)]
    >>> opt = gpuadam.AdamW(groups, lr=0.1)
    >>> opt.step({name: np.zeros_like(p) for name, p in params.items()})
    >>> print(params["dense.weight"][0], params["dense.bias"])
    [0.95 0.95] [1. 1.]
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {arrays.a_kind(params)}; patterns need names: pass a dict name -> array")
    for name in params:
        if not isinstance(name, str):
            raise TypeError(f"the names of parameters must be strings, not {name!r}")
    if not isinstance(no_decay, Iterable):
        raise TypeError(f"no_decay must be patterns of names, not {no_decay!r}")
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    exempt: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"the patterns of no_decay must be strings, not {pattern!r}")
        matched = [name for name in params if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"no_decay: no parameter's name matches {pattern!r}; there are {some(params)}")
        exempt.update(matched)
    weight_decay = checks.non_negative("weight_decay", weight_decay)
    return [
        {"params": {name: p for name, p in params.items() if name not in exempt}, "weight_decay": weight_decay},
        {"params": {name: p for name, p in params.items() if name in exempt}, "weight_decay": 0.0},
    ]
