"""Thousands of random changes of files: each is refused by an error that says so, or what is loaded is what was saved.

A change is of bytes, or of a value in the JSON of a file, whose checksums are made right then. The number of a change gives it
again: `python tests/test_mutated_files.py "a file" 123`.
"""

import faulthandler
import json
import random
import sys
import tempfile
import traceback
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cases import few
from checkpoint_files import sealed, taken_apart
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam.checkpoint.safetensors import FIRST

MOST = 100e6  # bytes that a refusal may take
LOCAL = gpuadam.transports.Local()
# what is changed, and what reads it -> its errors
KINDS = {
    "a file": gpuadam.CheckpointError,
    "a folder": gpuadam.CheckpointError,
    "a folder, by ranks": gpuadam.CheckpointError,
    "state in files": (ValueError, OSError),
}
KEYS = ("m", "v", "max_v", "m_scale", "v_scale", "ema")
OPTIONS = [{"amsgrad": True}, {"state_dtype": "8bit"}, {"state_dtype": "bfloat16", "ema_decay": 0.5, "seed": 3}]
IN_JSON = ("options", "groups", "steps", "params", "copies", "crc32", "parts")  # of the metadata: JSON in a string


def groups(seed=0):
    rng = np.random.default_rng(seed)
    w, b, c = (rng.standard_normal(shape).astype("f4") for shape in ((3, 50), (5,), (7,)))
    return [{"params": {"w": w, "b": b}, "lr": 0.25}, {"params": {"c": c}, "weight_decay": 0.5, "betas": (0.5, 0.9)}]


def grads(params):
    return [
        {name: None if name == "b" else np.ones(p.shape, "f4") for name, p in group["params"].items()} for group in params
    ]


def arrays(params):
    return {name: p.tobytes() for group in params for name, p in group["params"].items()}


def save(kind, options, path):
    """Save the files of a kind: an optimizer after a step in which one parameter had no gradient."""
    if kind.startswith("a folder"):

        def of_rank(transport):
            given = groups()
            opt = gpuadam.ShardedAdam(given, transport, bucket_bytes=400, **options)
            opt.step(grads(given))
            opt.save(path, with_params=True)

        all_well(on_ranks(2, of_rank))
        return
    given = groups()
    if kind == "a file":
        opt = gpuadam.AdamW(given, **options)
        opt.step(grads(given))
        opt.save(path, with_params=True)
    else:
        with gpuadam.OffloadAdam(given, state=path, **options) as opt:
            opt.step(grads(given))


def load(kind, options, path, given):
    """Return an optimizer with what is in the files."""
    if kind == "state in files":
        return gpuadam.OffloadAdam(given, state=path, **options)
    if kind == "a folder, by ranks":
        return gpuadam.load_sharded(path, given, LOCAL, with_params=True)
    return gpuadam.load(path, given, with_params=True)


def content(opt, params):
    """Return all that is loaded: counts, the bytes of arrays, and settings."""
    if isinstance(opt, gpuadam.ShardedAdam):
        held = {(name, key): one.tobytes() for key in KEYS for name, one in opt.gathered(key).items()}
        counts = {member.name: member.taken for member in opt.members} | {"": opt.steps}
    else:
        held = {
            (name, key): one.tobytes() for name, state in opt.state.items() for key, one in state.items() if key != "step"
        }
        counts = {name: state["step"] for name, state in opt.state.items()} | {"": opt.steps}
    held |= {(name, "param"): data for name, data in arrays(params).items()}
    settings = [{key: value for key, value in group.items() if key != "params"} for group in opt.groups]
    return {"arrays": held, "counts": counts, "settings": (type(opt).__name__, opt.options, settings)}


# Changes of bytes


def of_bytes(rng, data):
    """Return bytes with a random change."""
    data, size = bytearray(data), len(data)
    start = rng.choice((rng.randrange(size + 1), min(rng.randrange(300), size)))
    stop = min(start + rng.choice((1, 2, 8, rng.randrange(1, 2000))), size)
    what = rng.randrange(8)
    if what <= 2 and start < size:
        data[start] ^= 1 << rng.randrange(8)
    elif what == 3:
        data[start:stop] = rng.randbytes(stop - start)
    elif what == 4:
        del data[start:]
    elif what == 5:
        del data[start:stop]
    elif what == 6:
        data[start:start] = rng.choice(
            (rng.randbytes(rng.randrange(1, 50)), data[start:stop], bytes(rng.randrange(5000)), b"[" * 9000)
        )
    else:
        data[start:stop] = bytes(stop - start)
    return bytes(data)


# Changes of JSON

VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "x",
    "w",
    "w.m",
]
VALUES += [
    "float32",
    "F32",
    "3",
    [],
    {},
    [0],
    [[]],
    {"a": 1},
    {"names": ["w"]},
    "\ud800",
    "\0",
    "x" * 100_000,
    [0] * 100_000,
]
TEXTS = [
    "NaN",
    "-Infinity",
    "[" * 9000 + "]" * 9000,
    '{"a": 1, "a": 2}',
    "1" * 5000,
    "",
    "1e999",
    "nul",
    "[1,]",
    "{}" * 2,
    "\ufeff1",
]


def places(value, at=()):
    """Return where values are in JSON: the keys that lead to each."""
    found = [at] if at else []
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, member in members for place in places(member, (*at, key))]


def of_json(rng, tree):
    """Change a value in JSON, in place."""
    *way, key = rng.choice(places(tree))
    node = tree
    for step in way:
        node = node[step]
    value, what = node[key], rng.randrange(6)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        other = rng.choice(("", "x", key + "x", *node))
        node[other] = node.pop(key)
    elif what == 2 and isinstance(node, list):
        node.insert(key, rng.choice(node))
    elif what == 3 and isinstance(value, (int, float)):
        node[key] = rng.choice((value + 1, value - 1, -value, 2 * value, float(value), bool(value)))
    elif what == 3 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        node[key] = rng.choice((value[:at], value[:at] + rng.choice("x0.[]/") + value[at + 1 :], value + value))
    elif what == 4 and isinstance(value, (list, dict)) and len(value) > 1:
        node[key] = value[::-1] if isinstance(value, list) else dict(zip(value, reversed(value.values()), strict=True))
    else:
        node[key] = rng.choice(VALUES)


def of_header(rng, data):
    """Return the bytes of a file with a change in its header, JSON in JSON included, and the right checksum."""
    header, payload = taken_apart(data)
    metadata = header["__metadata__"]
    for key in set(IN_JSON) & metadata.keys():
        metadata[key] = json.loads(metadata[key])
    of_json(rng, header)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        texts = {
            key: value if isinstance(value, str) and key not in IN_JSON else json.dumps(value)
            for key, value in metadata.items()
        }
        if texts and rng.random() < 0.1:
            texts[rng.choice(list(texts))] = rng.choice(TEXTS)
        header["__metadata__"] = texts
    try:
        return sealed(header, payload)
    except UnicodeEncodeError:
        return data


def of_marks(rng, data):
    """Return the bytes of a file of an OffloadAdam with a change in its JSON, and the right checksum."""
    tree = json.loads(data)
    assert tree.pop("crc32") == crc_of(tree)
    of_json(rng, tree)
    return rng.choice(TEXTS).encode() if rng.random() < 0.1 else json.dumps(tree | {"crc32": crc_of(tree)}).encode()


def crc_of(tree):
    return f"{zlib.crc32(json.dumps(tree).encode()):08x}"


def change(rng, kind, files):
    """Change some files, a dict path -> bytes. Return the path of the file, and whether checksums were made right."""
    paths = [path for path in files if not path.endswith("lock")]
    path, in_json = rng.choice(paths), rng.random() < 0.5
    if not in_json:
        files[path] = of_bytes(rng, files[path]) if rng.random() < 0.95 else files[rng.choice(paths)]
    elif kind == "state in files":
        path = rng.choice(("a/state.json", "a/steps.json"))
        files[path] = of_marks(rng, files[path])
    else:
        files[path] = of_header(rng, files[path])
        if path.startswith("a/part"):  # whose checksum is in the index, too
            header, payload = taken_apart(files["a/index.safetensors"])
            parts = json.loads(header["__metadata__"]["parts"])
            (part,) = (part for part in parts if part["file"] == path[2:])
            part.update(n_bytes=len(files[path]), crc32=files[path][8 + len(FIRST) :][:8].decode())
            header["__metadata__"]["parts"] = json.dumps(parts)
            files["a/index.safetensors"] = sealed(header, payload)
    return path, in_json


# What is right


class Saved(NamedTuple):
    """Files of an optimizer, path -> bytes, and what is loaded from them."""

    options: dict
    files: dict
    right: dict


def read(path):
    """Return the bytes of a file, or of those in a folder, by their paths."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {f"a/{file.name}" if path.is_dir() else "a": file.read_bytes() for file in files}


def saved(kind, options):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(kind, options, folder / "a")
        files = read(folder / "a")
        opt = load(kind, options, folder / "a", given := groups(seed=1))
        right = content(opt, given)
        if kind == "state in files":
            opt.close()
    return Saved(options, files, right)


def check(kind, all_saved, number):
    """Change files in the way of a number, and load them. Return whether they were refused; if not, all must be right."""
    rng = random.Random(f"{kind} {number}")
    options, files, right = rng.choice(all_saved)
    changed = dict(files)
    path, in_json = change(rng, kind, changed)
    with tempfile.TemporaryDirectory() as name:
        folder, given = Path(name), groups(seed=1)
        for file, data in changed.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(data)
        before = arrays(given)
        tracemalloc.reset_peak()
        try:
            opt = load(kind, options, folder / "a", given)
        except KINDS[kind] as error:
            assert arrays(given) == before and len(str(error)) < 5000, path
            return True
        finally:
            assert tracemalloc.get_traced_memory()[1] < MOST, path
        try:
            found = content(opt, given)
            if kind == "state in files":
                compare_state(found, right, changed, path, in_json)
            elif in_json:
                opt.save(folder / "again")
                assert says(metadata_of(changed), metadata_of(read(folder / "again"))), path
                assert found["arrays"] == right["arrays"], path
            else:
                assert found == right, path
            step(opt, given, in_json)
        finally:
            if kind == "state in files":
                opt.close()
    return False


def compare_state(found, right, changed, path, in_json):
    """Compare state in files. Arrays have no checksums: they are what is in the files."""
    for (_, key), array in found["arrays"].items():
        assert key == "param" or array in changed[f"a/{key}"], path
    if path not in (f"a/{key}" for _, key in found["arrays"]):
        assert found["arrays"] == right["arrays"], path
    wanted = right["counts"]
    if in_json:
        marks = json.loads(changed["a/steps.json"])
        wanted = {name: marks["behind"].get(name, marks["steps"]) for name in "wbc"} | {"": marks["steps"]}
    assert found["counts"] == wanted, path


def says(wanted, found):
    """Whether a value found has what JSON says: all members of objects, and the same numbers and texts."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and says(wanted[key], found[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(wanted) == len(found) and all(map(says, wanted, found))
    return wanted == found


def metadata_of(files):
    """Return the metadata of a checkpoint, as JSON, that say what is loaded."""
    header, _ = taken_apart(files.get("a/index.safetensors") or files["a"])
    metadata = header["__metadata__"]
    found = {key: json.loads(metadata[key]) for key in ("options", "groups", "steps", "params")} | {
        "class": metadata["class"]
    }
    found["options"].pop("capturable", None)  # which ranks never are
    for group in found["groups"]:
        if group.get("lr", 0) is None:  # a callable's place: the rate of the given group is taken
            del group["lr"]
    return found


def step(opt, params, in_json):
    """Take a step with what was loaded, which must not be anything that a step chokes on.

    A huge count is refused, or a learning rate that is too large for this step; it may not be for a later one.
    """
    try:
        opt.step(grads(params))
    except (OverflowError, ValueError) as error:
        assert in_json and ("step" in str(error) or "overflows float32" in str(error)), error


@pytest.mark.filterwarnings("ignore:stochastic_rounding=True does nothing here")  # such a file says what an optimizer would
@pytest.mark.filterwarnings("ignore:master='remainder' does nothing here")
@pytest.mark.parametrize("kind", few(KINDS, "a file"))
def test_a_changed_file_is_refused_or_is_what_was_saved(kind, examples):
    faulthandler.dump_traceback_later(1800, exit=True)  # whatever waits
    all_saved = [saved(kind, options) for options in examples(OPTIONS[1:2], OPTIONS)]
    refused, count = 0, examples(40, 2500)
    for number in range(min(count, 100)):
        check(kind, all_saved, number)  # compiles what is needed, which takes several times as long while memory is traced
    tracemalloc.start()
    try:
        for number in range(count):
            try:
                refused += check(kind, all_saved, number)
            except BaseException as error:
                raise AssertionError(f"change {number} of {kind}: {type(error).__name__}: {error}") from error
    finally:
        tracemalloc.stop()
        faulthandler.cancel_dump_traceback_later()
    assert count // 2 < refused < count


if __name__ == "__main__":
    what, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[-1])
    tracemalloc.start()
    of_kind, escapes, refused = [saved(what, options) for options in OPTIONS], Counter(), 0
    for k in range(first, last + 1):
        try:
            refused += check(what, of_kind, k)
        except Exception as error:  # noqa: BLE001 - it is printed
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} {where.filename.rpartition('/')[2]}:{where.lineno} {str(error)[:150]}"
            escapes[kind] += 1
            print(k, kind)
    print(refused, "refused", sum(escapes.values()), "escapes", Counter(escapes))
