"""The arrays of a checkpoint: whole ones in a file, or pieces of them in the parts of a folder, which many ranks wrote.

    index.safetensors    metadata without tensors, with "parts": JSON, a list of {"file", "n_bytes", "crc32" of its header}
    part-0-of-4-(16 digits).safetensors, ...    pieces, named "w[4096:8192].m": elements 4096 to 8191, in C order, of "w"

What is in a piece is counted by the parameter, without padding, so that any number of ranks can read what another number wrote.
The scales of 8-bit state, one for each GROUP of elements, are named by the elements, too.
"""

import bisect
import collections
import contextlib
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

from ..kernels import array_bytes
from ..kernels.operands import GROUP
from ..optimizer import OF_GROUPS
from ..sharded.agreement import on_all
from .format import FORMAT, VERSION, parsed, some
from .safetensors import ITEMSIZE, CheckpointError, Entry, Reader, chunks, copy
from .tensors import DTYPES, PARAM, place

INDEX = "index.safetensors"
PART_FORMAT = f"{FORMAT}.part"
PIECE = re.compile(r"(.*)\[([0-9]{1,19}):([0-9]{1,19})\]\.(\w+)", re.DOTALL)


def piece_name(own, key):
    """Return the name, in a part, of the tensor with the elements of a Range.

    >>> from gpuadam.checkpoint.tensors import Range
    >>> piece_name(Range("w", 4096, 8192), "m")
    'w[4096:8192].m'
    """
    return f"{own.param}[{own.start}:{own.stop}].{key}"


class Piece(NamedTuple):
    """Where some elements of an array are: counted by the array, in which the scales of 8-bit state have places of their own."""

    start: int
    stop: int
    part: int | None  # the number of the file, None for the checkpoint's own
    name: str  # of the tensor in it
    entry: Entry


class Stored:
    """A checkpoint that is open. path: of the file, of the folder, or of its index. longest: bytes of a header, at most.

    Attributes: `saved`, the parsed metadata; `crc`, which differs between checkpoints; after `find`, `pieces`, which has for each
    (parameter, key) the Pieces of that array, in order. Raises CheckpointError, and OSError as files do.
    """

    def __init__(self, path, longest):
        path, self._longest = Path(path), longest
        if path.is_dir():
            path /= INDEX
            if not path.exists():
                raise CheckpointError(f"it is a folder without {INDEX}: no checkpoint was ever finished there")
        if path.exists() and not path.is_file():
            raise CheckpointError("it is a device, a pipe or a socket: give the path of a file, or of a folder")
        self._folder, self._file = path.parent, path.open("rb")
        try:
            reader = Reader(self._file, longest)
            self.saved, self.crc, self._tensors = parsed(reader.metadata), reader.crc, reader.tensors
        except BaseException:
            self._file.close()
            raise
        self.pieces: dict[tuple[str, str], list[Piece]] = {}

    def close(self):
        self._file.close()

    def find(self, transport):
        """Find out where everything is. Each rank reads the headers of some parts, and tells the others."""
        parts = self.saved["parts"]
        if parts is None:
            found = [self._whole(name, entry) for name, entry in self._tensors.items()]
        else:
            own = range(transport.rank, len(parts), transport.size)
            tables = on_all(transport, lambda: [self._table(k) for k in own])
            found = list(itertools.chain.from_iterable(itertools.chain.from_iterable(transport.exchange(tables))))
        pieces = collections.defaultdict(list)
        for of_array, piece in found:
            pieces[of_array].append(piece)
        self.pieces = dict(pieces)
        for (param, key), of_array in self.pieces.items():
            of_array.sort(key=lambda piece: piece[:2])
            self._check_all_there(param, key, of_array)

    def _size(self, param):
        return math.prod(self.saved["params"][param]["shape"])

    def _whole(self, name, entry):
        """Return what an array of a single file is of, and its only Piece."""
        param, dot, key = name.rpartition(".")
        if not dot or param not in self.saved["params"]:
            raise CheckpointError(f"it has {some([name])}, for which this optimizer has no place")
        _, stop = place(key, 0, self._size(param))
        shape = (stop,) if key in OF_GROUPS else tuple(self.saved["params"][param]["shape"])
        if entry.shape != shape:
            raise CheckpointError(f"{name!r} has shape {entry.shape}, and must have {shape}")
        return (param, key), Piece(0, stop, None, name, entry)

    def _table(self, k):
        """Read the header of a part. Return ((parameter, key), Piece) of all that it has."""
        part = self.saved["parts"][k]
        with self._part(k) as file:
            reader = Reader(file, self._longest)
            if (reader.n_bytes, reader.crc) != (part["n_bytes"], part["crc32"]):
                raise CheckpointError(f"its part {part['file']!r} is not the one that was written with its index")
            if not {"format": PART_FORMAT, "version": VERSION}.items() <= reader.metadata.items():
                raise CheckpointError(f"its part {part['file']!r} holds no part of an optimizer of gpuadam")
            return [self._piece(k, name, entry) for name, entry in reader.tensors.items()]

    def _piece(self, k, name, entry):
        match = PIECE.fullmatch(name)
        if match is None or match[1] not in self.saved["params"]:
            raise CheckpointError(f"it has {some([name])}, for which this optimizer has no place")
        param, key, first, last = match[1], match[4], int(match[2]), int(match[3])
        start, stop = place(key, first, last)
        if not first < last <= self._size(param) or first % GROUP or entry.shape != (stop - start,):
            raise CheckpointError(f"{name!r} of shape {entry.shape} is no piece of {param!r}")
        return (param, key), Piece(start, stop, k, name, entry)

    def _check_all_there(self, param, key, pieces):
        _, size = place(key, 0, self._size(param))
        end = 0
        for piece in pieces:
            if piece.start != end:
                raise CheckpointError(
                    f"the pieces of '{param}.{key}' do not fit: the next one after element {end:,} begins at {piece.start:,}"
                )
            end = piece.stop
        if end != size:
            raise CheckpointError(f"the pieces of '{param}.{key}' end at element {end:,} of {size:,}")
        if len({piece.entry.dtype for piece in pieces}) > 1:
            raise CheckpointError(f"the pieces of '{param}.{key}' have several dtypes")

    def check(self, arrays, with_params):
        """Compare what there is with what an optimizer has. arrays: of `arrays_of`."""
        wanted = {of: view for of, (_, view) in arrays.items() if with_params or of[1] != PARAM}
        needed = dict.fromkeys((own.param, key) for (own, key), view in wanted.items() if view.size)
        if missing := [array for array in needed if array not in self.pieces]:
            advice = (
                ": the parameters are saved by save(path, with_params=True)" if all(k == PARAM for _, k in missing) else ""
            )
            raise CheckpointError(f"it does not have {some([f'{param}.{key}' for param, key in missing])}{advice}")
        known = {(own.param, key) for own, key in arrays}
        params = {param for param, _ in known}
        if extra := [f"{param}.{key}" for param, key in self.pieces if param in params and (param, key) not in known]:
            raise CheckpointError(f"it has {some(extra)}, for which this optimizer has no place")
        for (own, key), view in wanted.items():
            for piece in self.pieces.get((own.param, key), [])[:1]:
                if piece.entry.dtype != DTYPES[view.format]:
                    raise CheckpointError(f"'{own.param}.{key}' is {piece.entry.dtype}, and must be {DTYPES[view.format]}")

    def read(self, of_range, key, kernels, view):
        """Read the elements of a range of an array. kernels: the backend of the View. CheckpointError where one is damaged."""
        first, last = place(key, of_range.start, of_range.stop)
        pieces = self.pieces.get((of_range.param, key), [])
        before = bisect.bisect_right(pieces, first, key=lambda piece: piece.stop)  # of pieces that end before the range
        after = bisect.bisect_left(pieces, last, key=lambda piece: piece.start)
        for piece in pieces[before:after]:
            start, stop = max(first, piece.start), min(last, piece.stop)
            itemsize = ITEMSIZE[piece.entry.dtype]
            of_tensor = (start - piece.start) * itemsize, (stop - piece.start) * itemsize
            with self._part(piece.part) as file:
                stored = chunks(file, piece.name, piece.entry, *of_tensor)
                copy(stored, array_bytes.buffers(kernels, view, start - first, stop - first))

    def verify(self, param, key):
        """Read a whole array and compare its checksums, keeping nothing."""
        for piece in self.pieces.get((param, key), []):
            with self._part(piece.part) as file:
                for _ in chunks(file, piece.name, piece.entry):
                    pass

    def _part(self, k):
        if k is None:
            return contextlib.nullcontext(self._file)
        path = self._folder / self.saved["parts"][k]["file"]
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise CheckpointError(
                f"its part {path.name!r} is not there: it was lost, or the checkpoint was replaced while it was read"
            ) from error
