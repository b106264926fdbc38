"""The arrays of a checkpoint that is open: whole ones in a file, or pieces of them in the parts of a folder."""

import bisect
import contextlib
import math
import re
from pathlib import Path
from typing import NamedTuple

from .. import state
from ..groups import some
from ..kernels import array_bytes
from ..kernels.messages import shown
from ..kernels.operands import GROUP
from .format import INDEX, PART_FORMAT, VERSION, decoded
from .regular_file import opened
from .safetensors import ITEMSIZE, CheckpointError, Entry, Reader, chunks, require
from .tensors import DTYPES, PARAM, chosen

WHOLE = re.compile(r"(?P<param>.*)\.(?P<key>\w+)", re.DOTALL)
PIECE = re.compile(r"(?P<param>.*)\[(?P<first>[0-9]{1,19}):(?P<last>[0-9]{1,19})\]\.(?P<key>\w+)", re.DOTALL)


class Piece(NamedTuple):
    """Where some elements of an array are. They are counted in the array: there are fewer scales of 8-bit state than elements."""

    array_name: str  # "w.m"
    start: int
    stop: int
    part: int | None  # the number of the file, None for the checkpoint's own
    name: str  # of the tensor in the file
    entry: Entry


@contextlib.contextmanager
def opened_file(path, longest):
    """Open a checkpoint and yield it as Stored. path: of the file, of the folder, or of its index.

    longest: how many bytes a header has at most. Raises CheckpointError, and OSError as files do.
    """
    path = Path(path)
    if path.is_dir():
        path /= INDEX
        require(path.exists(), f"it is a folder without {INDEX}: no checkpoint was ever finished there")
    with opened(path, follow=True) as file:
        yield Stored(path.parent, file, longest)


class Stored:
    """A checkpoint that is open.

    Attributes: `saved`, the decoded metadata; `crc`, which differs between checkpoints; after `arrange`, `pieces`, which has the
    Pieces of each array, in order.
    """

    def __init__(self, folder, file, longest):
        self._folder, self._file, self._longest = folder, file, longest
        self._reader = Reader(file, longest)
        self.saved, self.crc = decoded(self._reader.metadata), self._reader.crc
        self._numbers = self.saved.numbers()
        self._names = {name: name for name in self.saved.params}  # of parameters, by those in the files
        self.pieces: dict[str, list[Piece]] = {}

    def rename(self, names):
        """Give the parameters other names than those in the files. names: old name -> new name, of all."""
        saved, self._names = self.saved, names
        self.saved = saved._replace(
            groups=[group | {"names": [names[name] for name in group["names"]]} for group in saved.groups],
            params={names[name]: entry for name, entry in saved.params.items()},
            copies=[names.get(name, name) for name in saved.copies],
        )
        self._numbers = self.saved.numbers()

    def read_headers(self, rank=0, ranks=1):
        """Return the Pieces in every file, or in this rank's share of the files."""
        if self.saved.parts is None:
            return [self._piece(None, *item) for item in self._reader.tensors.items()] if rank == 0 else []
        return [piece for k in range(rank, len(self.saved.parts), ranks) for piece in self._pieces_in(k)]

    def _pieces_in(self, k):
        """Return the Pieces in a part."""
        part = self.saved.parts[k]
        with self._open(k) as file:
            reader = Reader(file, self._longest)
        belongs = (reader.n_bytes, reader.crc) == (part["n_bytes"], part["crc32"])
        require(belongs, f"its part {shown(part['file'])} is not the one that was written with its index")
        is_part = {"format": PART_FORMAT, "version": VERSION}.items() <= reader.metadata.items()
        require(is_part, f"its part {shown(part['file'])} holds no part of an optimizer of gpuadam")
        return [self._piece(k, *item) for item in reader.tensors.items()]

    def _piece(self, part, name, entry):
        match = (WHOLE if part is None else PIECE).fullmatch(name)
        if match is None or match["param"] not in self._names:
            raise CheckpointError(f"it has {some([name])}, for which this optimizer has no place")
        param, key = self._names[match["param"]], match["key"]
        shape = self.saved.shape(param)
        size = math.prod(shape)
        first, last = (0, size) if part is None else map(int, match.group("first", "last"))
        numbers = self._numbers[param]
        start, stop = state.place(key, first, last, numbers)
        wanted = state.shape(key, shape, numbers) if part is None else (stop - start,)
        if part is not None and (not first < last <= size or first % GROUP):
            raise CheckpointError(f"{shown(name)} is no piece of {shown(param)}")
        if entry.shape != wanted:
            raise CheckpointError(f"{shown(name)} has shape {entry.shape}, and must have {wanted}")
        return Piece(f"{param}.{key}", start, stop, part, name, entry)

    def arrange(self, pieces):
        """Put the Pieces of all files in order. Every array must be there from its first element to its last."""
        for piece in sorted(pieces):
            self.pieces.setdefault(piece.array_name, []).append(piece)
        for array, of_array in self.pieces.items():
            param, _, key = array.rpartition(".")
            _, size = state.place(key, 0, math.prod(self.saved.shape(param)), self._numbers[param])
            ends, starts = [0, *(piece.stop for piece in of_array)], [*(piece.start for piece in of_array), size]
            for end, start in zip(ends, starts, strict=True):
                if start != end:
                    where = f"elements {min(start, end):,} to {max(start, end):,} of {size:,}"
                    raise CheckpointError(f"the pieces of {shown(array)} do not fit: {where} are missing or come twice")
            require(len({piece.entry.dtype for piece in of_array}) == 1, f"the pieces of {shown(array)} have several dtypes")

    def check(self, sections, with_params):
        """Compare what there is with the Sections of an optimizer."""
        wanted = chosen(sections, with_params)
        needed = dict.fromkeys(section.array_name for section in wanted if section.view.size)
        missing = [array for array in needed if array not in self.pieces]
        only_params = all(array.endswith(f".{PARAM}") for array in missing)
        hint = ": the parameters are saved by save(path, with_params=True)" if only_params else ""
        require(not missing, f"it does not have {some(missing)}{hint}")
        params, known = {section.param for section in sections}, {section.array_name for section in sections}
        extra = [array for array in self.pieces if array not in known and array.rpartition(".")[0] in params]
        require(not extra, f"it has {some(extra)}, for which this optimizer has no place")
        for section in wanted:
            for piece in self.pieces.get(section.array_name, [])[:1]:  # they are alike
                dtype = DTYPES[section.view.format]
                require(
                    piece.entry.dtype == dtype, f"{shown(section.array_name)} is {piece.entry.dtype}, and must be {dtype}"
                )

    def has_params(self, besides=()):
        """Whether there are parameters beside the state, and beside those of some names, after `arrange`."""
        return any(key == PARAM and name not in besides for name, _, key in (array.rpartition(".") for array in self.pieces))

    def read(self, section):
        """Read the elements of a Section. Raises CheckpointError where they are damaged."""
        with contextlib.closing(self.chunks(section, section.key)) as stored:  # its file: a destructor would lose Ctrl-C
            pieces = array_bytes.Pieces(array_bytes.buffers(section.backend, section.view))
            for chunk in stored:
                pieces.write(chunk)
            pieces.close()

    def chunks(self, section, key):
        """Yield the bytes of an array of the state, of the elements of a Section, as buffers. Each is good until the next."""
        first, last = state.place(key, section.start, section.stop, section.numbers)
        pieces = self.pieces.get(f"{section.param}.{key}", [])
        before = bisect.bisect_right(pieces, first, key=lambda piece: piece.stop)  # of pieces that end before the section
        after = bisect.bisect_left(pieces, last, key=lambda piece: piece.start)
        for piece in pieces[before:after]:
            start, stop = max(first, piece.start), min(last, piece.stop)
            in_tensor = [(at - piece.start) * ITEMSIZE[piece.entry.dtype] for at in (start, stop)]
            with self._open(piece.part) as file:
                yield from chunks(file, piece.name, piece.entry, *in_tensor)

    def verify(self, array):
        """Read a whole array and compare its checksums, keeping nothing."""
        for piece in self.pieces.get(array, []):
            with self._open(piece.part) as file:
                for _ in chunks(file, piece.name, piece.entry):
                    pass

    def _open(self, part):
        if part is None:
            return contextlib.nullcontext(self._file)
        path = self._folder / self.saved.parts[part]["file"]
        try:
            return opened(path, follow=True)
        except FileNotFoundError as error:
            reason = "it was lost, or the checkpoint was replaced while it was read"
            raise CheckpointError(f"its part {shown(path.name)} is not there: {reason}") from error
        except OSError as error:
            raise CheckpointError(f"its part {shown(path.name)} cannot be read: {error.strerror}") from error
