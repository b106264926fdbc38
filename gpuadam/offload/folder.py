"""State in files: a folder with one file for each kind of state, and with the marks that say whether the files are consistent.

    state.json   which parameters and options the state belongs to, written once
    steps.json   how many steps were taken, whether one is under way, and whether the files are known to be on the disk
    m, v, ...    the arrays of all parameters, one after the other, each at a multiple of 64 bytes
    lock         held while an optimizer is open

A step writes steps.json before it changes the first byte of state and after it has changed the last. A process that ends in
between leaves "under_way" behind. `flush` waits until everything is on the disk. If the machine stops, steps since the last flush
are lost, or worse, only some of their bytes are: a folder that was not flushed before the machine stopped is refused.
"""

import errno
import json
import os
from pathlib import Path

import numpy as np

from .state import Store, laid_out

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LAYOUT = 1
STATE, STEPS, LOCK = "state.json", "steps.json", "lock"
MEND = "Delete the folder, make the optimizer anew, and set it (load_state_dict) and the parameters to a checkpoint"
TORN = f"the parameters and this state are of two different steps. {MEND}"
DAMAGED = f"the state is damaged. {MEND}"


class Folder(Store):
    """The files of an optimizer. They are created, or opened if they are there; `existed` says which.

    description: a dict for state.json. arrays: the StateArrays to keep.
    """

    def __init__(self, path, description, arrays):
        self.path = Path(path).resolve()  # which stays when the working directory becomes another
        self.place = f"files in {self.path}"
        description = json.loads(json.dumps(description, default=_plain_number))
        self._kinds, self._maps = {array.kind for array in arrays}, []
        if self.path.exists():
            _check_content(self.path, description, self._kinds)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock, self._process = _locked(self.path / LOCK), os.getpid()
        try:
            self.existed = _check_content(self.path, description, self._kinds)  # again, now that no other process changes it
            # under way until the arrays are filled
            new = {"steps": 0, "behind": {}, "under_way": True, "unflushed": _boot()}
            self.marks = _checked_marks(self.path / STEPS) if self.existed else new
            self.arrays = laid_out(arrays, self._memory_of)
            if not self.existed:
                self._write(STEPS, self.marks)
                self._write(STATE, description)  # last: with it the folder is complete
        except BaseException:
            self._free()
            raise

    def check_open(self):
        if self._lock.closed:
            raise ValueError("this optimizer is closed: make another with the same folder, which continues where it was")
        if self._process != os.getpid():
            raise ValueError(f"this process was forked from the one that opened {self.path}, which alone can take steps")

    def _memory_of(self, kind, n_bytes):
        """Return the bytes of the file of a kind, mapped into memory."""
        if not n_bytes:
            return np.zeros(0, np.uint8)
        path = self.path / kind
        if not self.existed:
            try:
                reserve(path, n_bytes)
            except OSError as error:
                for made in self._kinds:  # which may have taken all the room that there was
                    (self.path / made).unlink(missing_ok=True)
                why = f"no file of {n_bytes:,} bytes can be made: {error.strerror}"
                raise OSError(error.errno, why, str(path)) from error
        elif not path.exists() or path.stat().st_size != n_bytes:
            raise ValueError(f"{path} should have {n_bytes:,} bytes, so the state is not complete: {TORN}")
        self._maps.append(np.memmap(path, np.uint8, "r+", shape=(n_bytes,)))
        return self._maps[-1]

    def begin(self):
        # after a power cut the disk must say "unflushed" if anything was changed since the last flush
        self._mark(durable=self.marks["unflushed"] is None, under_way=True, unflushed=_boot())
        super().begin()

    def end(self, steps, behind):
        self._mark(durable=False, steps=steps, behind=behind, under_way=False)
        super().end(steps, behind)

    def flush(self):
        for whole in self._maps:
            whole.flush()
        self._mark(durable=True, unflushed=None)

    def close(self):
        """Flush, and let the folder be opened by another optimizer. If the disk fails, the folder is free and stays "unflushed".

        A process that was forked leaves both to the process that opened the folder.
        """
        if not self._lock.closed:
            try:
                if self._process == os.getpid():
                    self.flush()
            finally:
                self._free()

    def _free(self):
        if fcntl and self._process == os.getpid():
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing it would leave the lock to processes that were forked meanwhile
        self._lock.close()

    def _mark(self, durable, **changes):
        """Change steps.json. If it cannot be written, `marks` stay what they were."""
        marks = self.marks | changes
        if durable or marks != self.marks:
            self._write(STEPS, marks, durable)
            self.marks = marks

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


def _plain_number(number):
    """Return a number of any type as one that JSON has."""
    return int(number) if int(number) == number else float(number)


def reserve(path, n_bytes):
    """Create a file of zeros. Its room on the disk is taken now: a full disk in the midst of a step would end the process.

    The zeros are written, too: Linux then has the file in large pieces of its page cache. Memory that is first touched here and
    there would have single pages for good, and steps would take twice as long.
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
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"{path.parent} is the state of an optimizer that is open: close() that one first") from error
    return file


def _boot():
    """Return the identity of this run of the machine, as far as the system knows one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def _check_content(path, description, kinds):
    """Refuse a folder of other files or other state. Return whether this state is there already."""
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "state must be a folder, and this is none", str(path))
    names = {p.name for p in path.iterdir()}
    if STATE in names:
        _check_same(path, _read(path / STATE), description)
        return True
    # a process that was killed while it made the files leaves the lock, which comes first, and some of the others
    expected = {LOCK, STEPS, "steps.new", "state.new", *kinds} if LOCK in names else set()
    if strangers := sorted(names - expected):
        raise ValueError(f"{path} has {strangers[:5]} in it and no {STATE}: give a folder of its own for the state")
    return False


def _read(path):
    """Return the dict in a file of the folder."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. If an optimizer made the folder, {DAMAGED}") from error
    return content


def _check_same(path, there, here):
    """Refuse a folder whose description is not that of this optimizer. The error names the first difference."""
    if there.get("layout") != LAYOUT:
        raise ValueError(f"{path} has files of a layout that is unknown here: {there.get('layout')!r}, not {LAYOUT}")
    try:
        facts = _facts(there)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE} does not say what the state belongs to: {DAMAGED}") from error
    for fact, value in _facts(here).items():
        if facts.get(fact) != value:
            made = f"the state in {path} was made with {fact}={facts.get(fact)!r}"
            raise ValueError(f"{made}, this optimizer with {fact}={value!r}: give the same, or another folder")


def _facts(description):
    """Return all that optimizers of the same state have in common, by the names for error messages."""
    params = description["parameters"]
    of_params = {f"params[{name!r}].{key}": value for name, param in params.items() for key, value in param.items()}
    return {**description["options"], "the names of parameters": list(params), **of_params}


def _checked_marks(path):
    """Return what steps.json says, or refuse state that cannot be relied on."""
    marks = _read(path)
    try:
        counts = marks["steps"], *marks["behind"].values()
    except (AttributeError, KeyError):
        counts = (None,)
    if not all(type(n) is int and n >= 0 for n in counts) or not {"under_way", "unflushed"} <= marks.keys():
        raise ValueError(f"{path} does not say how many steps were taken: {DAMAGED}")
    if marks["under_way"]:
        raise ValueError(f"a step on the state in {path.parent} was cut short: {TORN}")
    if marks["unflushed"] not in (None, _boot()):
        why = f"{path.parent} was not flushed before the machine stopped, so some of it may not have reached the disk"
        raise ValueError(f"the state in {why}: {TORN}. flush() or close() make it safe")
    return marks
