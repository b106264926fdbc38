"""What the metadata of a checkpoint says, and whether it is of these parameters. `checkpoint.py` lists it."""

import json
import numbers
import re

import numpy as np

from .. import optimizer
from ..groups import HYPERPARAMETERS
from .safetensors import CheckpointError, parsed_json

FORMAT, VERSION = "gpuadam.optimizer", "1"
CLASSES = {
    cls.__name__: cls for cls in (optimizer.Adam, optimizer.AdamW, optimizer.NAdam, optimizer.RAdam, optimizer.AdaMax)
}

# class -> (algorithm, decoupled) of an optimizer over ranks. Those with a W that are not in CLASSES exist over ranks alone
ALGORITHMS = {
    name + "W" * decoupled: (name.lower(), decoupled)
    for name in ("Adam", "NAdam", "RAdam", "AdaMax")
    for decoupled in (False, True)
}
REDUCTIONS = ("mean", "sum")
PART = "part-{}-of-{}-{}.safetensors"
IS_PART = re.compile(PART.replace(".", r"\.").format("[0-9]+", "[0-9]+", "[0-9a-f]{16}"))


def of_optimizer(name, options, groups, steps, params, copies=()):
    """Return the metadata of an optimizer. name: of its class. groups, steps: as in a state_dict. params: as it is written."""
    from .. import __version__  # the package is not ready while this file is imported

    return {
        "format": FORMAT,
        "version": VERSION,
        "class": name,
        "gpuadam": __version__,
        "options": as_json(options),
        "groups": as_json(groups),
        "steps": as_json(steps),
        "params": as_json(params),
        "copies": as_json(list(copies)),
    }


def of_param(view, step):
    """Return what the metadata say of a parameter."""
    return {"step": step, "dtype": view.format, "shape": view.shape}


def as_json(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(number):
    """Return a number that JSON does not know, such as NumPy's, as one of Python's."""
    if isinstance(number, np.bool_):
        return bool(number)
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def parsed(metadata):
    """Check what metadata says, as far as the optimizer does not do it, and return it."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"it holds no optimizer of gpuadam: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"it has version {metadata.get('version')!r} of the format, not {VERSION}: use a newer gpuadam"
        )
    if metadata.get("class") not in ALGORITHMS:
        raise CheckpointError(
            f"its class is {metadata.get('class')!r}, not one of {', '.join(ALGORITHMS)}: use a newer gpuadam"
        )
    saved = {"class": metadata["class"], "reduction": metadata.get("reduction", "mean"), "parts": None}
    if saved["reduction"] not in REDUCTIONS:
        raise CheckpointError(f"reduction in its metadata is {saved['reduction']!r}, not one of {REDUCTIONS}")
    if "parts" in metadata:
        saved["parts"] = parsed_json(metadata["parts"], "parts in its metadata")
        if not isinstance(saved["parts"], list) or not all(map(_is_part, saved["parts"])):
            raise CheckpointError("each of the parts in its metadata must have file, n_bytes and crc32")
        if len({part["file"] for part in saved["parts"]}) < len(saved["parts"]):
            raise CheckpointError("a file comes twice among the parts in its metadata")
    for key, kind in (("options", dict), ("groups", list), ("steps", int), ("params", dict), ("copies", list)):
        saved[key] = parsed_json(metadata.get(key, ""), f"{key} in its metadata")
        if not isinstance(saved[key], kind):
            raise CheckpointError(f"{key} in its metadata must be a {kind.__name__}")
    for group in saved["groups"]:
        if not isinstance(group, dict) or not {"names", "lr"} <= group.keys() or not _are_strings(group["names"]):
            raise CheckpointError("each of the groups in its metadata must have names and lr")
        _check_known("hyperparameters", group, {"names", *HYPERPARAMETERS})
    _check_known("options", saved["options"], set(optimizer.OPTIONS))
    entries = saved["params"].values()
    if not all(isinstance(entry, dict) and entry.keys() == {"step", "dtype", "shape"} for entry in entries):
        raise CheckpointError("each of the params in its metadata must have step, dtype and shape")
    if sorted(saved["params"]) != sorted(name for group in saved["groups"] for name in group["names"]):
        raise CheckpointError("groups and params in its metadata must have the same names")
    if not _are_strings(saved["copies"]):
        raise CheckpointError("copies in its metadata must be names")
    return saved


def _is_part(part):
    return (
        isinstance(part, dict)
        and part.keys() == {"file", "n_bytes", "crc32"}
        and isinstance(part["file"], str)
        and bool(IS_PART.fullmatch(part["file"]))
        and type(part["n_bytes"]) is int
        and part["n_bytes"] >= 0
    )


def _are_strings(names):
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _check_known(what, found, known):
    if unknown := sorted(set(found) - known):
        raise CheckpointError(f"it has {what} {some(unknown)}, which this gpuadam does not know: use a newer one")


def some(names):
    """Return names for a message, but not thousands of them."""
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def check_names(saved, given):
    """Compare the names of the parameters, by group and in order."""
    ours, theirs = ([name for group in names for name in group] for names in (given, saved))
    known = set(ours), set(theirs)
    if known[0] != known[1]:
        missing = [name for name in ours if name not in known[1]]
        extra = [name for name in theirs if name not in known[0]]
        parts = [f"it does not have {some(missing)}"] * bool(missing) + [f"only it has {some(extra)}"] * bool(extra)
        raise CheckpointError(f"the parameters' names differ: {'; '.join(parts)}. State belongs to a name, never to a place")
    if ours != theirs:
        wrong = [name for name, other in zip(ours, theirs, strict=False) if name != other]
        raise CheckpointError(
            f"the parameters come in another order, {some(wrong)}: it was {some(theirs)}, and random rounding depends on it"
        )
    if given != saved:
        sizes = [len(names) for names in saved], [len(names) for names in given]
        raise CheckpointError(f"the groups differ: those saved have {sizes[0]} parameters, those given {sizes[1]}")


def check_params(saved, views):
    """Compare shapes and dtypes of the parameters, before any state is made for them. views: name -> View."""
    wrong = []
    for name, view in views.items():
        entry = saved[name]
        if (entry["shape"], entry["dtype"]) != (list(view.shape), view.format):
            wrong.append(f"{name!r} was {entry['dtype']} of shape {entry['shape']}, and is {view.format} {list(view.shape)}")
    if wrong:
        raise CheckpointError("; ".join(wrong[:8]) + ": nothing is cast or reshaped")
