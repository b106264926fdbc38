"""The metadata of a checkpoint: written from the facts of an optimizer, and read and checked. The package's page lists them."""

import json
import numbers
import re
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..groups import HYPERPARAMETERS, some
from .safetensors import parsed_json, require

FORMAT, VERSION = "gpuadam.optimizer", "1"
CLASSES = ("Adam", "AdamW", "NAdam", "RAdam", "AdaMax")
# class -> (algorithm, decoupled) of an optimizer over ranks. Those with a W that are not in CLASSES exist over ranks alone
ALGORITHMS: dict[str, tuple[str, bool]] = {
    name + "W" * decoupled: (name.lower(), decoupled)
    for name in ("Adam", "NAdam", "RAdam", "AdaMax")
    for decoupled in (False, True)
}
INDEX = "index.safetensors"
PART = "part-{}-of-{}-{}.safetensors"
PART_FORMAT = f"{FORMAT}.part"
IS_PART = re.compile(PART.replace(".", r"\.").format("[0-9]+", "[0-9]+", "[0-9a-f]{16}"))


class Saved(NamedTuple):
    """The metadata of a checkpoint, decoded."""

    name: str  # of the class
    reduction: str
    options: dict[str, Any]
    groups: list[dict[str, Any]]
    steps: int
    params: dict[str, dict[str, Any]]  # name -> {"step", "dtype", "shape"}
    copies: list[str]
    parts: list[dict[str, Any]] | None  # {"file", "n_bytes", "crc32"}, in the index of a folder


def check_class(opt, names):
    """Refuse to save an optimizer of a class that is not the package's own: loading knows no other."""
    cls = type(opt)
    if cls.__name__ not in names or not cls.__module__.startswith("gpuadam."):
        raise TypeError(
            f"{cls.__name__} is not one of {', '.join(names)}, and no other class can be loaded: keep its state yourself"
        )


def encoded(name, *, options, groups, steps, params, copies=(), **texts):
    """Return the metadata of an optimizer: string -> string.

    name: of its class. groups: as in a state_dict. params: name -> (View, steps taken). copies: names. texts: as they are.
    """
    params = {name: {"step": step, "dtype": view.format, "shape": view.shape} for name, (view, step) in params.items()}
    decoded = {"options": options, "groups": groups, "steps": steps, "params": params, "copies": list(copies)}
    in_json = {key: as_json(value) for key, value in decoded.items()}
    return {"format": FORMAT, "version": VERSION, "class": name, "gpuadam": __version__} | in_json | texts


def as_json(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(number):
    """Return a number that JSON does not know, such as NumPy's, as one of Python's."""
    if isinstance(number, np.bool_):
        return bool(number)
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _is_group(group):
    return isinstance(group, dict) and {"names", "lr"} <= group.keys() and _are_names(group["names"])


def _is_param(param):
    return isinstance(param, dict) and param.keys() == {"step", "dtype", "shape"}


def _is_part(part):
    return (
        isinstance(part, dict)
        and part.keys() == {"file", "n_bytes", "crc32"}
        and isinstance(part["file"], str)
        and bool(IS_PART.fullmatch(part["file"]))
        and type(part["n_bytes"]) is int
    )


def _are_names(names):
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


# key -> the texts that this version knows
TEXTS = {"format": (FORMAT,), "version": (VERSION,), "class": tuple(ALGORITHMS), "reduction": ("mean", "sum")}
# key -> (whether a value decoded from JSON is right, the words for a right one). The optimizer checks what is not checked here
VALUES = {
    "options": (lambda value: isinstance(value, dict), "a dict"),
    "groups": (lambda value: isinstance(value, list) and all(map(_is_group, value)), "a list of dicts with names and lr"),
    "steps": (lambda value: isinstance(value, int), "an integer"),
    "params": (
        lambda value: isinstance(value, dict) and all(map(_is_param, value.values())),
        "a dict of dicts with step, dtype and shape",
    ),
    "copies": (_are_names, "a list of names"),
    "parts": (
        lambda value: value is None or (isinstance(value, list) and all(map(_is_part, value))),
        "a list of dicts with file, n_bytes and crc32",
    ),
}


def decoded(metadata):
    """Return metadata as Saved. Raises CheckpointError where they are not as `encoded` makes them."""
    metadata = {"reduction": "mean", "parts": "null"} | metadata  # only what many ranks saved has these
    for key, known in TEXTS.items():
        advice = "it holds no optimizer of gpuadam" if key == "format" else "use a newer gpuadam"
        require(metadata.get(key) in known, f"its {key} is {metadata.get(key)!r}, not {' or '.join(known)}: {advice}")
    values = {}
    for key, (is_right, words) in VALUES.items():
        values[key] = parsed_json(metadata.get(key, ""), f"{key} in its metadata")
        require(is_right(values[key]), f"{key} in its metadata must be {words}")
    saved = Saved(metadata["class"], metadata["reduction"], **values)
    files = [part["file"] for part in saved.parts or ()]
    require(len(set(files)) == len(files), "a file comes twice among the parts in its metadata")
    for group in saved.groups:
        check_known("hyperparameters", group, {"names", *HYPERPARAMETERS})
    in_groups = [name for group in saved.groups for name in group["names"]]
    require(sorted(saved.params) == sorted(in_groups), "groups and params in its metadata must have the same names")
    return saved


def check_known(what, names, known):
    unknown = sorted(set(names) - set(known))
    require(not unknown, f"it has {what} {some(unknown)}, which this gpuadam does not know: use a newer one")
