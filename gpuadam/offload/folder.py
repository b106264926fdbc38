"""State in files: a folder with one file for each kind of state, and with the marks that say whether the files are consistent.

    state.json   which parameters and options the state belongs to, written once
    steps.json   how many steps were taken, whether one is under way, and whether the files are known to be on the disk
    m, v, ...    the arrays of all parameters, one after the other, each at a multiple of 64 bytes
    lock         held while an optimizer is open

A step writes steps.json before it changes the first byte of state and after it has changed the last. A process that ends in
between leaves "under_way" behind. `flush` waits until everything is on the disk. If the machine stops, steps since the last flush
are lost, or worse, only some of their bytes are: a folder that was not flushed before the machine stopped is refused.

The two files of JSON have a checksum, "crc32", that of the rest of them as Python writes it by default. Files of older versions
have none.
"""

import contextlib
import json
import os
import threading
import zlib
from pathlib import Path

import numpy as np

from ..checkpoint.atomic_file import replacing
from ..checkpoint.regular_file import locked, opened, unlock
from ..checkpoint.safetensors import parsed_json, require
from ..kernels.messages import shortened, shown
from ..options import Options
from .state import Store, laid_out

LAYOUT = 1
STATE, STEPS, LOCK = "state.json", "steps.json", "lock"
TEMPORARY = ".gpuadam-"  # how names begin of files that `replacing` did not finish
MEND = "Delete the folder, make the optimizer anew, and set it (load_state_dict) and the parameters to a checkpoint"
TORN = f"the parameters and this state are of two different steps. {MEND}"
DAMAGED = f"the state is damaged. {MEND}"


class Folder(Store):
    """The files of an optimizer. They are created, or opened if they are there; `existed` says which.

    options: name -> value of those that decide what the numbers of state mean. beginnings: name -> `parameters.Beginning`.
    """

    existed = True  # until it is known that the files are this optimizer's own, which an error may delete

    def __init__(self, path, options, beginnings):
        super().__init__()
        self.path = Path(os.path.realpath(path))  # which stays when the working directory becomes another
        self.place = f"files in {self.path}"
        parameters = {
            name: {"shape": list(view.shape), "format": view.of_complex or view.format, "state": kept}
            | ({"numbers": numbers} if numbers > 1 else {})
            for name, (_, view, kept, numbers) in beginnings.items()
        }
        description = {"layout": LAYOUT, "options": options, "parameters": parameters}
        # bytes of JSON. A malicious file can take 20 times its size in memory when it is parsed
        self._longest = 1_000_000 + 2 * len(_text(description))
        self._kinds = {kind for beginning in beginnings.values() for kind in beginning.kept}
        self._maps: list[np.memmap] = []
        self._marking = threading.RLock()  # of steps.json: one thread may flush while another takes steps
        there = self.path.exists()
        names = self._names_there(description) if there else None
        self._was_empty = there and names is None  # then it is the caller's, and stays when the files are taken away
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock, self._process = locked(self.path / LOCK), os.getpid()
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is the state of an optimizer that is open: close() that one first") from error
        try:
            names = self._names_there(description)  # again, now that no other process changes it
            if names is None and (self.path / STEPS).exists():
                self._check_beginning()
            self.existed = names is not None
            for left in self.path.glob(f"{TEMPORARY}*.tmp"):
                with contextlib.suppress(OSError):  # a file that stays does no harm
                    left.unlink()
            # under way until the arrays are filled
            new = {"steps": 0, "behind": {}, "under_way": True, "unflushed": _boot()}
            self.marks = self._reliable_marks() if self.existed else new
            self.arrays = laid_out({name: beginnings[name] for name in names or beginnings}, self._memory_of)
            if not self.existed:
                self._write(STEPS, self.marks)
                self._write(STATE, description)  # last: with it the folder is complete
        except BaseException:
            with contextlib.suppress(OSError):  # the first error says more
                (self._free if self.existed else self.discard)()
            raise

    def _names_there(self, description):
        """Return the names of the parameters whose state is there, in its order, or None. Refuse other files or other state."""
        files = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(self.path)}
        if STATE in files:
            names, there = _read(
                self.path / STATE, self._longest, lambda content: ([*content["parameters"]], _facts(content))
            )
            for fact, value in _facts(description).items():
                if there.get(fact) != value:
                    made = f"the state in {self.path} was made with {shortened(fact)}={shown(there.get(fact))}"
                    raise ValueError(
                        f"{made}, this optimizer with {shortened(fact)}={shown(value)}: give the same, or another folder"
                    )
            return names
        # a process that was killed while it made the files leaves the lock, which comes first, and some of the others
        expected = {LOCK, STEPS, *self._kinds} if LOCK in files else set()
        ours = {name for name, is_file in files.items() if is_file and (name in expected or name.startswith(TEMPORARY))}
        if strangers := sorted(files.keys() - ours):
            raise ValueError(f"{self.path} has {strangers[:5]} in it and no {STATE}: give a folder of its own for the state")
        return None

    def _check_beginning(self):
        """Refuse files without a state.json that were in use: a process that was killed while it made them took no step."""
        marks = _read(self.path / STEPS, self._longest, _marks)
        if taken := max(marks["steps"], *marks["behind"].values(), 0):
            raise ValueError(
                f"{self.path} has state after {taken:,} steps, and no {STATE}, which says whose state it is: put that file back. "
                f"If it is lost, {MEND[0].lower()}{MEND[1:]}"
            )

    def _reliable_marks(self):
        """Return what steps.json says, or refuse state that cannot be relied on."""
        marks = _read(self.path / STEPS, self._longest, _marks)
        if marks["under_way"]:
            raise ValueError(f"a step on the state in {self.path} was cut short: {TORN}")
        if marks["unflushed"] not in (None, _boot()):
            why = f"{self.path} was not flushed before the machine stopped, so some of it may not have reached the disk"
            raise ValueError(f"the state in {why}: {TORN}. flush() or close() make it safe")
        return marks

    def check_open(self):
        if self._lock.closed:
            raise ValueError("this optimizer is closed: make another with the same folder, which continues where it was")
        if self._process != os.getpid():
            raise ValueError(f"this process was forked from the one that opened {self.path}, which alone can use it")

    def _memory_of(self, kind, n_bytes):
        """Return the bytes of the file of a kind, mapped into memory."""
        if not n_bytes:
            return np.zeros(0, np.uint8)
        path = self.path / kind
        if not self.existed:
            try:
                reserve(path, n_bytes)
            except OSError as error:
                why = f"no file of {n_bytes:,} bytes can be made: {error.strerror}"
                raise OSError(error.errno, why, str(path)) from error
        elif not path.exists() or path.stat().st_size != n_bytes:
            raise ValueError(f"{path} should have {n_bytes:,} bytes, so the state is not complete: {TORN}")
        with opened(path, os.O_RDWR) as file:
            self._maps.append(np.memmap(file, np.uint8, "r+", shape=(n_bytes,)))
        return self._maps[-1]

    def begin(self):
        with self._marking:
            # after a power cut the disk must say "unflushed" if anything was changed since the last flush
            self._mark(durable=self.marks["unflushed"] is None, under_way=True, unflushed=_boot())
            super().begin()

    def end_at(self, steps, behind):
        with self._marking:
            self._mark(durable=False, steps=steps, behind=behind, under_way=False)
            super().end_at(steps, behind)

    def flush(self):
        with self._marking:
            if self.changing:
                raise ValueError(f"a step on the state in {self.path} is under way, or was cut short: flush between steps")
            for whole in self._maps:
                whole.flush()
            self._mark(durable=True, unflushed=None)

    def close(self):
        """Flush, and let the folder be opened by another optimizer. If the disk fails, the folder is free and stays "unflushed".

        A folder in the midst of a step stays so, and cannot be opened again. A process that was forked leaves all this to the
        process that opened the folder.
        """
        if not self._lock.closed:
            try:
                if self._process == os.getpid() and not self.changing:
                    self.flush()
            finally:
                self._free()

    def discard(self):
        """Take the files away, and the folder unless it was found empty. Raises ValueError if they are another's by now."""
        self.check_open()
        try:
            # A folder without marks is known to be no state, and one without both files of JSON is begun anew. The lock goes
            # last, and while it is held: then it can be another's
            for name in (STEPS, STATE, *self._kinds, LOCK):
                (self.path / name).unlink(missing_ok=True)
        finally:
            self._free()
        if not self._was_empty:
            with contextlib.suppress(OSError):  # a folder with something in it
                self.path.rmdir()

    def _free(self):
        if self._process == os.getpid():
            unlock(self._lock)
        self._lock.close()

    def _mark(self, durable, **changes):
        """Change steps.json. If it cannot be written, `marks` stay what they were."""
        self.check_open()
        marks = self.marks | changes
        if durable or marks != self.marks:
            self._write(STEPS, marks, durable)
            self.marks = marks

    def _write(self, name, content, durable=True):
        with replacing(self.path / name, durable=durable) as file:
            file.write(_text(content | {"crc32": _crc(content)}))


def check_new(path):
    """Refuse the path of a folder in which there is state already."""
    if (Path(path) / STATE).exists():
        raise ValueError(
            f"{shown(os.fspath(path))} has the state of an optimizer, which a checkpoint would take the place of: give another "
            "folder, or delete this one"
        )


def reserve(path, n_bytes):
    """Create a file of zeros. Its room on the disk is taken now: a full disk in the midst of a step would end the process.

    The zeros are written, too: Linux then has the file in large pieces of its page cache. Memory that is first touched here and
    there would have single pages for good, and steps would take twice as long.
    """
    zeros = bytes(1 << 22)
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        for start in range(0, n_bytes, len(zeros)):
            file.write(zeros[: n_bytes - start])


def _boot():
    """Return the identity of this run of the machine, as far as the system knows one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def _text(content):
    return json.dumps(content, indent=1).encode()


def _crc(content):
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def _read(path, longest, parsed):
    """Return parsed(content) of a file of the folder, which has so many bytes at most. Refuse a file that is damaged."""
    try:
        with opened(path) as file:
            text = file.read(longest + 1)
        require(len(text) <= longest, f"it has more than the {longest:,} bytes that are expected")
        content = parsed_json(text, "it")
        require(content.pop("crc32", None) in (None, _crc(content)), "its checksum differs")
        return parsed(content)
    except (FileNotFoundError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({shown(error)}). If an optimizer made the folder, {DAMAGED}") from error


def _facts(description):
    """Return all that optimizers of the same state have in common, by the names for error messages."""
    params = description["parameters"]
    _check_keys(description, {"layout", "options", "parameters"})
    of_params = {f"params[{name!r}].{key}": value for name, param in params.items() for key, value in param.items()}
    first = {"layout": description["layout"], "algorithm": "adam"}  # what older folders do not say, all of which are Adam's
    # numbers are rounded randomly by the place of a parameter
    names = list(params) if Options(**description["options"]).rounds_randomly else sorted(params)
    return first | description["options"] | {"the names of parameters": names} | of_params


def _marks(content):
    """Return what steps.json has, after checking that nothing is missing."""
    counts = content["steps"], *content["behind"].values()
    _check_keys(content, {"steps", "behind", "under_way", "unflushed"})
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("it does not say how many steps were taken")
    return content


def _check_keys(content, keys):
    """Refuse a file that lacks something, or has more, such as a checksum whose name is damaged."""
    require(content.keys() == keys, f"it has {shortened(str(sorted(content)))}, and must have {sorted(keys)}")
