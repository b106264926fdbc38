"""The types of the public interface: nothing lacks one, each can be read, and what type checkers refuse is refused when it runs.

`tests/typed/check.py` shows that mypy and pyright accept the right uses and refuse the wrong ones.
"""

import ast
import importlib
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import few
from typed import right_uses, wrong_uses

import gpuadam
import gpuadam.typing

MODULES = ["gpuadam", *(f"gpuadam.{name}" for name in ("backends", "checkpoint", "foreign_state", "offload", "planning"))]
MODULES += [f"gpuadam.{name}" for name in ("reference", "sharded.transports", "testing", "typing", "kernels.backend")]
FAMILY = [gpuadam.AdamW, gpuadam.NAdam, gpuadam.RAdam, gpuadam.AdaMax]
OPTIMIZERS = [gpuadam.Adam, *FAMILY, gpuadam.OffloadAdam, gpuadam.ShardedAdam, gpuadam.ShardedAdamW]
# What other files of gpuadam call, in a module without __all__
INTERNAL = ["choose", "forced", "home", "load", "number", "on_host", "some_available", "takes_numpy", "unregister"]
OF_OPTIMIZERS = ["__init__", "step", "zero_grad", "state_dict", "load_state_dict", "save", "replace", "add", "remove"]
OF_OPTIMIZERS += ["gathered", "shards", "describe", "flush"]


def public():
    """Yield (name, function) of all public functions and methods."""
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", set(dir(module)) - set(INTERNAL)):
            value, label = getattr(module, name), f"{module.__name__}.{name}"
            own = getattr(value, "__module__", "").startswith(
                module.__name__ if not hasattr(module, "__all__") else "gpuadam"
            )
            if name.startswith("_") or not own or getattr(value, "_is_protocol", False):
                continue
            if inspect.isfunction(value):
                yield label, value
            elif inspect.isclass(value):
                yield from methods(label, value)


def methods(label, cls):
    """Yield (name, function) of the methods of a class that users call, those of its bases in gpuadam included."""
    is_optimizer = issubclass(cls, (gpuadam.Adam, gpuadam.ShardedAdam))
    for base in (base for base in cls.__mro__ if base.__module__.startswith("gpuadam")):
        for name, value in vars(base).items():
            value = getattr(value, "fget", getattr(value, "func", value))  # of a property
            is_for_users = name in OF_OPTIMIZERS if is_optimizer else name == "__init__" or not name.startswith("_")
            if inspect.isfunction(value) and is_for_users:
                yield f"{label}.{name}", value


PUBLIC = dict(public())


def test_the_public_interface_is_found():
    assert {"gpuadam.adam_step", "gpuadam.AdamW.step", "gpuadam.AdamW.replace", "gpuadam.Rule.scalars"} <= PUBLIC.keys()
    assert {"gpuadam.backends.register", "gpuadam.testing.Reference.step", "gpuadam.planning.plan"} <= PUBLIC.keys()
    assert "gpuadam.kernels.backend.Backend.batches" in PUBLIC and len(PUBLIC) > 150


def test_each_parameter_and_result_has_a_type():
    lacking = []
    for name, function in PUBLIC.items():
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        lacking += [f"{name}({p.name})" for p in parameters if p.annotation is p.empty]
        lacking += [f"{name} -> ?"] * (signature.return_annotation is signature.empty)
    assert lacking == []


@pytest.mark.parametrize("name", sorted({name.rpartition(".")[0] for name in PUBLIC}))
def test_each_type_can_be_read_at_run_time(name):
    for function in (function for label, function in PUBLIC.items() if label.rpartition(".")[0] == name):
        typing.get_type_hints(function, localns={"Unpack": typing.Optional})  # which Python has from 3.11 on


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_signature_lists_the_options(cls):
    parameters = inspect.signature(cls).parameters.values()
    assert {"weight_decay", "state_dtype", "seed", "backend"} <= {p.name for p in parameters}
    assert [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] == []


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_an_unknown_option_is_blamed_on_the_class_that_was_called(cls):
    arguments = [np.ones(3), gpuadam.transports.Local()][: 1 + issubclass(cls, gpuadam.ShardedAdam)]
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\.__init__\(\) got an unexpected keyword argument 'weight_dacay'"):
        cls(*arguments, weight_dacay=1)


@pytest.mark.parametrize("cls", FAMILY)
def test_the_family_has_the_arguments_of_adam(cls):
    own, adam = (dict(inspect.signature(c).parameters) for c in (cls, gpuadam.Adam))
    assert list(own) == list(adam)
    differing = {name for name in own if own[name] != adam[name] and "Literal" not in str(own[name].annotation)}
    assert differing <= {"lr", "weight_decay"}


@pytest.mark.parametrize("cls", FAMILY)
def test_the_family_hands_all_arguments_on(cls):
    given = {"lr": 0.5, "betas": (0.5, 0.25), "eps": 0.125, "weight_decay": 0.375, "maximize": True, "clip_value": 3.0}
    given |= {"bounds": (-9.0, 9.0), "components": 3}
    options = {"state_dtype": "bfloat16", "ema_decay": 0.5, "zero_grad": True, "stochastic_rounding": False, "seed": 7}
    opt = cls(np.ones(3, "float32"), **given, **options)
    assert {name: opt.groups[0][name] for name in given} == given
    assert {name: getattr(opt.options, name) for name in options} == options


def test_the_sharded_classes_have_the_same_arguments():
    own, adam = (dict(inspect.signature(c).parameters) for c in (gpuadam.ShardedAdamW, gpuadam.ShardedAdam))
    assert {name for name in own if own[name] != adam.get(name)} == {"weight_decay", "decoupled"} and list(own) == list(adam)


def test_the_page_lists_every_type():
    table = gpuadam.typing.__doc__
    assert [name for name in gpuadam.typing.__all__ if f"`{name}`" not in table] == []


RIGHT = [n for n, f in vars(right_uses).items() if inspect.isfunction(f) and f.__module__ == right_uses.__name__]


@pytest.mark.parametrize("name", few(RIGHT, *(name for name in RIGHT if name != "adam_step_of_arrays")))  # with nine kernels
def test_the_right_uses_run(name):
    function = getattr(right_uses, name)
    if not inspect.signature(function).parameters:
        function()


def wrong():
    """Yield each line of the wrong uses."""
    source = Path(wrong_uses.__file__).read_text(encoding="utf-8")
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    yield from (ast.get_source_segment(source, statement) for statement in function.body)


@pytest.mark.parametrize("line", list(wrong()))
def test_a_wrong_use_is_refused_when_it_runs(line):
    params = {"w": np.ones(3, "float32")}
    names: dict[str, Any] = vars(wrong_uses) | {"w": params["w"], "params": params, "opt": gpuadam.Adam(params)}
    names |= {"local": gpuadam.transports.Local(), "nested": {"v": [1.0]}}
    with pytest.raises((TypeError, ValueError, AttributeError)):
        exec(textwrap.dedent(line), names)
