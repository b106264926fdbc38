"""The tables of gpuadam/guide/options.py, cell by cell: what they name is refused, and every other class has the option."""

import importlib
import inspect
import re
from pathlib import Path

import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam import transports

PAGE = (Path(__file__).parent.parent / "gpuadam/guide/options.py").read_text(encoding="utf-8")
SHAPE = (2, 32)
ARRAYS = {"array": np.ones(SHAPE, "float32"), "rows": np.ones(SHAPE[:1], "float32")}
IN_ADAM_STEP = {"amsgrad": "max_v", "state_dtype": "m_scale", "master": "remainder", "param_copies": "param_copy"}


def table(number):
    """Return the cells of a table of the page, row by row, without its first two."""
    lines = re.findall(r"(?:^\|.*\n)+", PAGE, re.M)[number].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


(_, *NAMES), *ROWS = table(0)
CLASSES = ["Adam", "AdamW", *(name.strip("`") for name in NAMES)]
HAS = {
    (option.strip("`"), name): cell == ""
    for option, *cells in ROWS
    for name, cell in zip(CLASSES, ["no" if "float32" in option else ""] * 2 + cells, strict=True)
}
PAIRS = [(option.strip("`"), other) for option, others in table(1)[1:] for other in re.findall("`(.*?)`", others)]


def arguments(*options):
    """Return the arguments that options, as the page writes them, are: of the constructor, and of step."""
    given = {}
    for option in options:
        given |= eval(f"dict({option})", ARRAYS)
    if "where" in given:
        given["where"] = given["where"] != 0
    if "eps_root" in given:
        given["formula"] = "optax"
    of_step = inspect.signature(gpuadam.Adam.step).parameters
    return [{name: x for name, x in given.items() if (name in of_step) == step} for step in (False, True)]


def take_a_step(name, *options):
    (made, of_step), grad_shape = arguments(*options), SHAPE
    param = np.zeros(SHAPE, "complex64" if "complex" in made else "float32")
    if {"master", "stochastic_rounding"} & {*made}:
        param = gpuadam.Bits(np.zeros(SHAPE, "uint16"), "bfloat16")
    if "components" in made:
        param = np.zeros((32, made["components"]), "float32")
        grad_shape = param.shape
    if name == "gpuadam.torch":
        torch = libraries.imported("torch")
        importlib.import_module(name).Adam([torch.zeros(SHAPE)], **made).step(**of_step)
        return
    transport = [transports.Local()] if name == "ShardedAdam" else []
    getattr(gpuadam, name)(param, *transport, **made).step(np.ones(grad_shape, "float32"), **of_step)


def parameters(name):
    """Return the names of all arguments of a class, and of its step."""
    if name == "adam_step":
        return {*inspect.signature(gpuadam.adam_step).parameters}
    if name == "gpuadam.torch":
        libraries.imported("torch")
    cls = importlib.import_module(name).Adam if name == "gpuadam.torch" else getattr(gpuadam, name)
    return {*inspect.signature(cls).parameters, *inspect.signature(cls.step).parameters}


@pytest.mark.parametrize("option, name", HAS)
def test_a_class_has_the_options_that_the_table_gives_it(option, name):
    key = option.partition("=")[0]
    if name == "adam_step":
        key = IN_ADAM_STEP.get(key, key)
    there = key in parameters(name)
    if HAS[option, name]:
        assert there
    elif there and (name, option) != ("adam_step", 'master="float32"'):  # a remainder is adam_step's only master
        with pytest.raises((ValueError, TypeError)):
            take_a_step(name, option)


@pytest.mark.parametrize("option, other", PAIRS)
def test_options_that_do_not_go_together_are_refused(option, other):
    with pytest.raises((ValueError, TypeError)):
        take_a_step("OffloadAdam" if 'master="float32"' in (option, other) else "Adam", option, other)


def test_the_tables_were_read():
    assert len(HAS) > 250 and len(PAIRS) > 10 and {*np.ravel(PAIRS)} <= {option for option, _ in HAS}
