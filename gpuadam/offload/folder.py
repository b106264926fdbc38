"""State in files: a folder with one file for each kind of state, and what says whether they can be relied on.

    state.json   which parameters and options the state belongs to, written once
    steps.json   how many steps were taken, whether one is under way, and whether the files are known to be on the disk
    m, v, ...    the arrays of all parameters, one after the other, each at a multiple of 64 bytes, in their order
    lock         held while an optimizer is open

A step writes steps.json before it changes the first byte and after it has changed the last. A process that ends in between leaves
"under_way" behind. `flush` waits until all is on the disk; what was stepped since then is lost if the machine stops before the
system has written it, and parts of it may be, so a folder that was not flushed before the machine started anew is refused.
"""

import errno
import json
import os
from pathlib import Path

import numpy as np

from .chunks import aligned

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LAYOUT = 1
STATE, STEPS, LOCK = "state.json", "steps.json", "lock"
MEND = (
    "the parameters and this state are of two different steps. Delete the folder, make the optimizer anew and load the last "
    "checkpoint into both, with load_state_dict"
)

DAMAGED = (
    "the state is damaged. Delete the folder, make the optimizer anew and load the last checkpoint into it and the parameters, "
    "with load_state_dict"
)


class Folder:
    """The files of an optimizer. It creates them, or opens those that are there; `existed` says which."""

    def __init__(self, path, description, kinds):
        """description: a dict for state.json. kinds: name -> [(name of the parameter, shape, dtype)] of each kind of state."""
        self.path = Path(path).resolve()  # it stays there when the working directory becomes another
        description = json.loads(json.dumps(description))
        if self.path.exists():
            _check_own(self.path, description, kinds)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock, self._process = _locked(self.path / LOCK), os.getpid()
        try:
            self.existed = _check_own(self.path, description, kinds)  # again, now that no other process changes it
            self.steps = {"steps": 0, "behind": {}, "under_way": True, "unflushed": _boot()}  # a new one is yet to be filled
            if self.existed:
                self.steps = self._checked_steps()
            self.arrays, self._maps = self._opened(kinds)
            if not self.existed:
                self._write(STEPS, self.steps)
                self._write(STATE, description)  # last: with it the folder is one that can be opened
        except BaseException:
            self._free()
            raise

    @property
    def is_of_this_process(self):
        """Whether this process opened it. One that was forked from that has a copy of everything but the files."""
        return self._process == os.getpid()

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
                    self._reserve(path, total, kinds)
                elif not path.exists() or path.stat().st_size != total:
                    raise ValueError(f"{path} should have {total:,} bytes: the state is not complete; {MEND}")
                whole = np.memmap(path, np.uint8, "r+", shape=(total,))
                maps.append(whole)
            at = 0
            for (name, shape, dtype), size in zip(of_parameters, sizes, strict=True):
                arrays.setdefault(name, {})[kind] = whole[at : at + size].view(dtype).reshape(shape)
                at += aligned(size)
        return arrays, maps

    def _reserve(self, path, n_bytes, kinds):
        try:
            reserve(path, n_bytes)
        except OSError as error:
            for kind in kinds:  # of which some may have taken all the room that there was
                (self.path / kind).unlink(missing_ok=True)
            raise OSError(error.errno, f"no file of {n_bytes:,} bytes can be made: {error.strerror}", str(path)) from error

    def _checked_steps(self):
        found = _read(self.path / STEPS)
        behind = found.get("behind")
        counts = [found.get("steps"), *(behind.values() if isinstance(behind, dict) else [None])]
        marks = type(found.get("under_way")), type(found.get("unflushed", 0))
        if not all(type(n) is int and n >= 0 for n in counts) or marks not in ((bool, str), (bool, type(None))):
            raise ValueError(f"{self.path / STEPS} does not say how many steps were taken: {DAMAGED}")
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
        now = self.steps | {"under_way": True, "unflushed": _boot()}
        self._write(STEPS, now, durable)
        self.steps = now  # not before: what cannot be written has not begun

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
        now = self.steps | {"unflushed": None}
        self._write(STEPS, now)
        self.steps = now

    def close(self):
        """Flush, and let the folder be opened by another. If the disk fails, it is freed and stays "unflushed".

        A process that was forked leaves both to the one that opened the folder.
        """
        if not self._lock.closed:
            try:
                if self.is_of_this_process:
                    self.flush()
            finally:
                self._free()

    def _free(self):
        if fcntl and self.is_of_this_process:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing it leaves the lock to processes that were forked meanwhile
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
    if not fcntl:
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


def _check_own(path, description, kinds):
    """Refuse what holds other files or other state. Return whether this state is there already."""
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "state must be a folder, and this is none", str(path))
    names = {p.name for p in path.iterdir()}
    if STATE in names:
        _check_same(path, _read(path / STATE), description)
        return True
    # a process that was killed while it made the files leaves some, and the lock, its first
    own = {LOCK, STEPS, "steps.new", "state.new", *kinds} if LOCK in names else set()
    if strangers := sorted(names - own):
        raise ValueError(f"{path} has {strangers[:5]} in it and no {STATE}: give a folder of its own for the state")
    return False


def _read(path):
    """Return the dict in a file of the folder."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. If an optimizer made the folder, {DAMAGED}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} has no JSON object in it. If an optimizer made the folder, {DAMAGED}")
    return found


def _check_same(path, found, wanted):
    """Refuse a folder that holds the state of something else, naming what differs first."""
    if found.get("layout") != LAYOUT:
        raise ValueError(
            f"{path} has a layout of files, {found.get('layout')!r}, that this version does not know: it writes {LAYOUT}"
        )
    options, there, here = found.get("options"), found.get("parameters"), wanted["parameters"]
    if not isinstance(options, dict) or not isinstance(there, dict) or not all(isinstance(x, dict) for x in there.values()):
        raise ValueError(f"{path / STATE} does not say what the state belongs to: {DAMAGED}")
    for key in wanted["options"]:
        if options.get(key) != wanted["options"][key]:
            raise ValueError(
                f"the state in {path} was made with {key}={options.get(key)!r}, this optimizer with "
                f"{key}={wanted['options'][key]!r}: give the same, or another folder"
            )
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
