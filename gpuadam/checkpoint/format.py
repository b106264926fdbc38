"""The metadata of a checkpoint: written from the facts of an optimizer, and read and checked. The package's page lists them."""

import json
import numbers
import re
from typing import Any, NamedTuple

import numpy as np

from ..groups import HYPERPARAMETERS, some
from ..kernels.messages import shown
from ..kernels.operands import sharing
from ..version import __version__
from .safetensors import parsed_json, require

FORMAT, VERSION = "gpuadam.optimizer", "1"
CLASSES = ("Adam", "AdamW", "NAdam", "RAdam", "AdaMax")
# class -> (algorithm, decoupled). Those with a W that are not in CLASSES exist over ranks alone
ALGORITHMS: dict[str, tuple[str, bool]] = {
    name + "W" * decoupled: (name.lower(), decoupled)
    for name in ("Adam", "NAdam", "RAdam", "AdaMax")
    for decoupled in (False, True)
}
CLASS_OF = {of_class: name for name, of_class in ALGORITHMS.items()}
INDEX = "index.safetensors"
PART = "part-{}-of-{}-{}.safetensors"
PART_FORMAT = f"{FORMAT}.part"
COMPLEX = ("complex64", "complex128")
IS_PART: re.Pattern[str] = re.compile(PART.replace(".", r"\.").format("[0-9]+", "[0-9]+", "[0-9a-f]{16}"))


class Saved(NamedTuple):
    """The metadata of a checkpoint, decoded."""

    name: str  # of the class
    reduction: str
    options: dict[str, Any]
    groups: list[dict[str, Any]]
    steps: int
    params: dict[str, dict[str, Any]]  # name -> {"step", "dtype", "shape"}
    copies: list[str]
    parts: list[dict[str, Any]] | None = None  # {"file", "n_bytes", "crc32"}, in the index of a folder

    def shape(self, name):
        """Return the shape of a parameter's numbers: a complex one has two, in a last dimension."""
        entry = self.params[name]
        return [*entry["shape"], 2] if entry["dtype"] in COMPLEX else entry["shape"]

    def numbers(self):
        """Return name -> how many numbers of a parameter share a v."""
        return {name: self._numbers_in(group, name) for group in self.groups for name in group["names"]}

    def _numbers_in(self, group, name):
        components = group.get("components", 1)
        if type(components) is not int or not 1 <= components <= 4:
            components = 1  # the optimizer that is made with any other value refuses it
        return sharing(self.params[name]["dtype"] in COMPLEX, group.get("complex"), components)


def check_class(opt, names):
    """Refuse to save an optimizer of a class that is not the package's own: loading knows no other."""
    cls = type(opt)
    if cls.__name__ not in names or not cls.__module__.startswith("gpuadam."):
        raise TypeError(
            f"{cls.__name__} is not one of {', '.join(names)}, and no other class can be loaded: keep its state yourself"
        )


def encoded(opt, groups, params, copies=()):
    """Return the metadata of an optimizer: string -> string.

    groups: as in a state_dict. params: name -> (View, steps taken). copies: names.
    """
    name = CLASS_OF[opt.options.algorithm, opt.options.decoupled]
    params = {name: entry(view) | {"step": step} for name, (view, step) in params.items()}
    values = {"options": opt.options.saved(), "groups": groups, "steps": opt.steps, "params": params, "copies": list(copies)}
    in_json = {key: as_json(value) for key, value in values.items()}
    return {"format": FORMAT, "version": VERSION, "class": name, "gpuadam": __version__} | in_json


def entry(view):
    """Return what is saved of a parameter beside its step."""
    shape = view.shape[:-1] if view.of_complex else view.shape
    return {"dtype": view.of_complex or view.format, "shape": list(shape)}


def as_json(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(number):
    """Return a number that JSON does not know, such as NumPy's, as one of Python's."""
    if isinstance(number, np.bool_):
        return bool(number)
    return int(number) if isinstance(number, numbers.Integral) else float(number)


# key -> the texts that this version knows
TEXTS = {"format": (FORMAT,), "version": (VERSION,), "class": tuple(ALGORITHMS), "reduction": ("mean", "sum")}
# key -> the schema of a value in JSON: a type, [schema of all members] or {key: schema}, where ... stands for any other key.
# What has the schema `object` here is checked where it is used.
SCHEMAS: dict[str, Any] = {
    "options": dict,
    "groups": [{"names": [str], "lr": object, ...: object}],
    "steps": int,
    "params": {...: {"step": object, "dtype": str, "shape": [int]}},
    "copies": [str],
    "parts": [{"file": str, "n_bytes": int, "crc32": str}],
}


def decoded(metadata):
    """Return metadata as Saved. Raises CheckpointError where they are not as `encoded` makes them."""
    metadata = {"reduction": "mean", **metadata}  # an optimizer of one process has none
    for key, known in TEXTS.items():
        advice = "it holds no optimizer of gpuadam" if key == "format" else "use a newer gpuadam"
        require(metadata.get(key) in known, f"its {key} is {shown(metadata.get(key))}, not {' or '.join(known)}: {advice}")
    values = {}
    for key, schema in SCHEMAS.items():
        if key != "parts" or key in metadata:  # only an index has parts
            values[key] = parsed_json(metadata.get(key, ""), f"{key} in its metadata")
            require(_fits(values[key], schema), f"{key} in its metadata is not as gpuadam writes it")
    for group in values["groups"]:
        check_known("hyperparameters", group, {"names", *HYPERPARAMETERS})
        group |= {key: tuple(group[key]) for key in ("betas", "bounds") if isinstance(group.get(key), list)}
    saved = Saved(metadata["class"], metadata["reduction"], **values)
    files = [part["file"] for part in saved.parts or ()]
    right = all(map(IS_PART.fullmatch, files)) and len(set(files)) == len(files)
    require(right, "a file comes twice among the parts in its metadata, or is no part")
    in_groups = [name for group in saved.groups for name in group["names"]]
    require(sorted(saved.params) == sorted(in_groups), "groups and params in its metadata must have the same names")
    return saved


def _fits(value, schema):
    """Whether a value is as a schema says."""
    if isinstance(schema, list):
        return isinstance(value, list) and all(_fits(member, schema[0]) for member in value)
    if isinstance(schema, dict):
        needed, others = schema.keys() - {...}, schema.get(..., ())
        has_all = isinstance(value, dict) and needed <= value.keys()
        return has_all and all(_fits(member, schema.get(key, others)) for key, member in value.items())
    return isinstance(value, schema)


def check_known(what, names, known):
    unknown = sorted(set(names) - set(known))
    require(not unknown, f"it has {what} {some(unknown)}, which this gpuadam does not know: use a newer one")
