"""What optimizers say of themselves: their `repr`, which is short, waits for no GPU and never fails."""

import dataclasses
import inspect
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from .checks import is_number
from .groups import HYPERPARAMETERS
from .kernels.messages import how_many, shown
from .kernels.view import is_array

MOST_GROUPS = 4  # that are described one by one
LONGEST = 60  # characters of a value


def repr_of(described, text):
    """Return text(), or if that fails a text that says so: a debugger asks amid a constructor, too, and after any fault."""
    try:
        return text()
    except Exception as error:  # noqa: BLE001 - of any kind: nobody expects one of repr
        return f"<{type(described).__name__}, which cannot be described: {type(error).__name__}>"


def of_optimizer(opt, sizes, **further):
    """Return the description of an optimizer.

    sizes: the elements of the parameters of each group, a list of lists. further: name -> value of arguments of its constructor
    that are neither in its groups nor in its options; those that are None or its defaults are left out.
    """
    cls, fields = type(opt), dataclasses.fields(opt.options)
    defaults = {field.name: field.default for field in fields} | defaults_of(cls)
    defaults |= {name: getattr(cls, name) for name in ("algorithm", "decoupled") if hasattr(cls, name)}
    options = {field.name: getattr(opt.options, field.name) for field in fields}
    options |= {name: value for name, value in further.items() if value is not None}
    texts = [{key: _text(group[key]) for key in HYPERPARAMETERS} for group in opt.groups]
    alike = {key for key in HYPERPARAMETERS if len({group[key] for group in texts}) == 1}
    of_all = [
        how_many(sum(map(len, sizes)), "parameter"),
        how_many(sum(map(sum, sizes)), "element"),
        f"steps={_text(opt.steps)}",
    ]
    of_all += [f"{key}={texts[0][key]}" for key in HYPERPARAMETERS if key in alike and _worth(key, texts[0][key], defaults)]
    if len(texts) > 1:
        groups = []
        for group, of_group in zip(texts[:MOST_GROUPS], sizes, strict=False):
            differing = [f"{key}={text}" for key, text in group.items() if key not in alike]
            groups.append(f"({', '.join([how_many(len(of_group), 'parameter'), *differing])})")
        more = [f"and {len(texts) - MOST_GROUPS:,} more"] * (len(texts) > MOST_GROUPS)
        of_all.append(f"groups=[{', '.join(groups + more)}]")
    return of_values(cls.__name__, options, defaults, of_all)


def of_adam(opt, **further):
    """Return the description of an `Adam` or of a class that is derived from it."""
    sizes = [[opt.parameters[name].size for name in group["names"]] for group in opt.groups]
    return of_optimizer(opt, sizes, backend=opt.backend, **further)


def of_values(name, values, defaults, first=()):
    """Return a description of a name, some texts, and the values that are not the defaults."""
    others = [f"{key}={_text(value)}" for key, value in values.items() if _worth(key, _text(value), defaults)]
    return f"{name}({', '.join([*first, *others])})"


def defaults_of(cls):
    """Return name -> default of the arguments of a class's constructor, those that it hands on to its bases included."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found


def _worth(key, text, defaults):
    """Whether a value is said: the learning rate always, others if they are not the default."""
    return key == "lr" or key not in defaults or text != _text(defaults[key])


def _text(value):
    """Return a value as text. The numbers of an array may be on a GPU, which would be waited for: its type stands for it."""
    if is_array(value):
        return f"<{type(value).__name__}>"
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if is_number(value):
        return shown(int(value), LONGEST) if isinstance(value, Integral) else f"{float(value):.6g}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, Mapping) or callable(value):
        return f"<{getattr(value, '__name__', type(value).__name__)}>"
    return shown(value, LONGEST)
