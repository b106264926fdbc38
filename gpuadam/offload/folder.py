"""State in files: a folder with one file for each kind of state, and what says whether they can be relied on.

    state.json   which parameters and options the state belongs to, written once
    steps.json   how many steps were taken, whether one is under way, and whether the files are known to be on the disk
    m, v, ...    the arrays of all parameters, one after the other, each at a multiple of 64 bytes, in their order
    lock         held while an optimizer is open

A step writes steps.json before it changes the first byte and after it has changed the last. A process that ends in between leaves
"under_way" behind. `flush` waits until all is on the disk; what was stepped since then is lost if the machine stops before the
system has written it, and parts of it may be, so a folder that was not flushed before the machine started anew is refused.
"""

import json
import os
from pathlib import Path

import numpy as np

from .chunks import aligned

LAYOUT = 1
STATE, STEPS, LOCK = "state.json", "steps.json", "lock"
MEND = (
    "the parameters and this state are of two different steps. Delete the folder, make the optimizer anew and load the last "
    "checkpoint into both, with load_state_dict"
)


class Folder:
    """The files of an optimizer. It creates them, or opens those that are there; `existed` says which."""

    def __init__(self, path, description, kinds):
        """description: a dict for state.json. kinds: name -> [(name of the parameter, shape, dtype)] of each kind of state."""
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path / LOCK)
        try:
            self.existed = (self.path / STATE).exists()
            self.steps = {"steps": 0, "behind": {}, "under_way": True, "unflushed": _boot()}  # a new one is yet to be filled
            if self.existed:
                _check_same(self.path, json.loads((self.path / STATE).read_text()), json.loads(json.dumps(description)))
                self.steps = self._checked_steps()
            elif strangers := sorted(
                {p.name for p in self.path.iterdir()} - {LOCK, STEPS, "steps.new", "state.new", *kinds}
            ):
                raise ValueError(
                    f"{self.path} has {strangers[:5]} in it and no {STATE}: give a folder of its own for the state"
                )
            self.arrays, self._maps = self._opened(kinds)
            if not self.existed:
                self._write(STEPS, self.steps)
                self._write(STATE, description)  # last: with it the folder is one that can be opened
        except BaseException:
            self._lock.close()
            raise

    def _opened(self, kinds):
        """Return parameter -> {kind: array} and the map of each kind's file."""
        arrays: dict = {}
        maps = []
        for kind, of_parameters in kinds.items():
            sizes = [int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in of_parameters]
            total = sum(map(aligned, sizes))
            whole = np.zeros(0, np.uint8)
            if total:
                path = self.path / kind
                if not self.existed:
                    reserve(path, total)
                elif not path.exists() or path.stat().st_size != total:
                    raise ValueError(f"{path} should have {total:,} bytes: the state is not complete; {MEND}")
                whole = np.memmap(path, np.uint8, "r+", shape=(total,))
                maps.append(whole)
            at = 0
            for (name, shape, dtype), size in zip(of_parameters, sizes, strict=True):
                arrays.setdefault(name, {})[kind] = whole[at : at + size].view(dtype).reshape(shape)
                at += aligned(size)
        return arrays, maps

    def _checked_steps(self):
        found = json.loads((self.path / STEPS).read_text())
        if found["under_way"]:
            raise ValueError(f"a step on the state in {self.path} was cut short: {MEND}")
        if found["unflushed"] not in (None, _boot()):
            raise ValueError(
                f"the state in {self.path} was not flushed before the machine stopped (or on another machine), so some of it may "
                f"not have reached the disk: {MEND}. flush() or close() make it safe"
            )
        return found

    def begin(self):
        """Mark the state as in flux, until `end`."""
        # what the disk has is what a power cut leaves: it must say "unflushed" before the first change after a flush
        durable = self.steps["unflushed"] is None
        self.steps |= {"under_way": True, "unflushed": _boot()}
        self._write(STEPS, self.steps, durable)

    def end(self, steps, behind):
        """Note how many steps were taken. behind: the parameters that took another number, and which."""
        now = {"steps": steps, "behind": behind, "under_way": False}
        if self.steps != self.steps | now:
            self.steps |= now
            self._write(STEPS, self.steps, durable=False)

    def flush(self):
        """Wait until the files are on the disk."""
        for whole in self._maps:
            whole.flush()
        self.steps["unflushed"] = None
        self._write(STEPS, self.steps)

    def close(self):
        """Flush, and let the folder be opened by another."""
        if not self._lock.closed:
            self.flush()
            self._lock.close()

    def _write(self, name, content, durable=True):
        path = self.path / name
        beside = path.with_suffix(".new")
        with beside.open("w") as file:
            json.dump(content, file, indent=1)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)  # at once: no reader finds a part of it
        if durable and os.name == "posix":
            folder = os.open(self.path, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def reserve(path, n_bytes):
    """Create a file of zeros. Its room on the disk is taken now: a full disk in the midst of a step would end the process.

    They are written, too: Linux then has the file in large pieces of its page cache, where memory that is touched first here and
    there would have single pages for good, and steps take twice as long.
    """
    zeros = bytes(1 << 22)
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        for start in range(0, n_bytes, len(zeros)):
            file.write(zeros[: n_bytes - start])


def _locked(path):
    file = path.open("a")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"{path.parent} is the state of an optimizer that is open, here or in another process: close() it first"
        ) from error
    return file


def _boot():
    """Return what tells this run of the machine from others, as far as the system says it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def _check_same(path, found, wanted):
    """Refuse a folder that holds the state of something else, naming what differs first."""
    if found.get("layout") != LAYOUT:
        raise ValueError(
            f"{path} has a layout of files, {found.get('layout')!r}, that this version does not know: it writes {LAYOUT}"
        )
    for key in wanted["options"]:
        if found["options"].get(key) != wanted["options"][key]:
            raise ValueError(
                f"the state in {path} was made with {key}={found['options'].get(key)!r}, this optimizer with "
                f"{key}={wanted['options'][key]!r}: give the same, or another folder"
            )
    there, here = found["parameters"], wanted["parameters"]
    if list(there) != list(here):
        missing, extra = [n for n in here if n not in there], [n for n in there if n not in here]
        what = f"not there {missing}, only there {extra}" if missing or extra else "they are the same in another order"
        raise ValueError(f"the state in {path} is of parameters with other names: {what}")
    for name, own in here.items():
        for key, value in own.items():
            if there[name].get(key) != value:
                raise ValueError(
                    f"the state in {path} is of a params[{name!r}] with {key} {there[name].get(key)}; here it has {value}"
                )
