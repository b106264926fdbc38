"""The safetensors format, in pieces: neither the file nor its tensors have to fit into memory, nor lie in the host's.

    8 bytes   the length of the header, a little-endian integer
    header    JSON: {"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [start, end]}, ...}, and spaces
    payload   the elements of every tensor in C order, little-endian, one after the other without gaps

The package `safetensors` takes all tensors at once, and in the host's memory. It can read what is written here; what it writes is
refused here, because it lacks the checksums that `write` adds to the metadata. They are CRC-32, of eight hexadecimal digits:
"crc32" is JSON, with those of each tensor's payload in a row, one for every BLOCK bytes of it and one for the rest, and
"header_crc32", which comes first of all, is the header's own, computed with zeros in its place. So no byte can change without
being noticed, and a part of a tensor can be read and known to be right without the rest.
"""

import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1}
MAX_HEADER = 100_000_000  # bytes, as the format says
BLOCK = 1 << 20  # bytes that have a checksum of their own
ALIGNMENT = 8  # of the payload; every tensor is then aligned to its elements, because the widest come first
FIRST = b'{"__metadata__":{"header_crc32":"'
BLANK = "00000000"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or loaded into these parameters. The message says which, why and what to do."""


class Tensor(NamedTuple):
    """A tensor to be written. `chunks()` gives its bytes in buffers, each of which is written before the next is asked for."""

    name: str
    dtype: str  # as in ITEMSIZE
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]


class Entry(NamedTuple):
    """Where the bytes of a tensor are in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    end: int
    crc: str  # of all blocks


def size_of(tensors, metadata):
    """Return how many bytes a file has."""
    tensors = _in_order(tensors)
    header = _header(tensors, metadata, _blank(tensors))
    return 8 + len(header) + sum(map(_nbytes, tensors))


def write(file, tensors, metadata):
    """Write tensors to a binary file that can seek, reading each of them once. Return the checksum of its header.

    metadata: string -> string. Raises CheckpointError for a header that is too long, OSError as the file does.
    """
    _needs_little_endian()
    tensors = _in_order(tensors)
    header = _header(tensors, metadata, _blank(tensors))
    if len(header) > MAX_HEADER:
        raise CheckpointError(
            f"{len(tensors)} tensors need a header of {len(header):,} bytes; the format allows {MAX_HEADER:,}"
        )
    file.write(len(header).to_bytes(8, "little") + header)
    crcs = {}
    for tensor in tensors:
        sums = _Sums()
        for chunk in tensor.chunks():
            sums.add(chunk)
            file.write(chunk)
        if sums.n_bytes != _nbytes(tensor):
            raise RuntimeError(f"{tensor.name!r} gave {sums.n_bytes} bytes and has {_nbytes(tensor)}")
        crcs[tensor.name] = sums.digits()
    header = _header(tensors, metadata, crcs)  # as long as the first was
    file.seek(8)
    file.write(header)
    return _own_crc(header)


class _Sums:
    """Checksums of the blocks of what comes in chunks of any size."""

    def __init__(self):
        self.n_bytes, self._whole, self._crc = 0, [], 0

    def add(self, chunk):
        chunk = memoryview(chunk)
        while len(chunk):
            room = BLOCK - self.n_bytes % BLOCK
            self._crc = zlib.crc32(chunk[:room], self._crc)
            self.n_bytes += min(room, len(chunk))
            if self.n_bytes % BLOCK == 0:
                self._whole.append(_digits(self._crc))
                self._crc = 0
            chunk = chunk[room:]

    def digits(self):
        return "".join(self._whole) + (_digits(self._crc) if self.n_bytes % BLOCK else "")


def _blank(tensors):
    """Return checksums as long as they will be."""
    return {tensor.name: BLANK * _n_blocks(_nbytes(tensor)) for tensor in tensors}


def _n_blocks(n_bytes):
    return -(-n_bytes // BLOCK)


def _in_order(tensors):
    return sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype])


def _nbytes(tensor):
    n = ITEMSIZE[tensor.dtype]
    for extent in tensor.shape:
        n *= extent
    return n


def _digits(crc):
    return f"{crc:08x}"


def _header(tensors, metadata, crcs):
    entries: dict[str, Any] = {
        "__metadata__": {"header_crc32": BLANK, **metadata, "crc32": json.dumps(crcs, ensure_ascii=False)}
    }
    start = 0
    for tensor in tensors:
        end = start + _nbytes(tensor)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    if len(entries) != len(tensors) + 1:
        raise CheckpointError("two tensors have the same name")
    try:
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{error.object[error.start - 10 : error.end + 10]!r} in a name is no valid text") from error
    header += b" " * (-len(header) % ALIGNMENT)
    return _with_crc(header, _digits(zlib.crc32(header)))


def _own_crc(header):
    """Return the checksum that a header has of itself."""
    return header[len(FIRST) : len(FIRST) + len(BLANK)].decode(errors="replace")


def _with_crc(header, digits):
    return FIRST + digits.encode() + header[len(FIRST) + len(digits) :]


class Reader:
    """A file that `write` wrote. Making one checks all but the payload, against which nothing is allocated.

    file: a binary file that can seek. max_header: bytes that its header may have.
    Attributes: `metadata`, string -> string; `tensors`, name -> Entry; `crc`, of the header; `n_bytes`, of the file.
    Raises CheckpointError.
    """

    def __init__(self, file, max_header=MAX_HEADER):
        _needs_little_endian()
        self.file = file
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"it is cut off, or no safetensors file: it has {size:,} bytes, and a header of {length:,}"
            )
        if length > min(max_header, MAX_HEADER):
            raise CheckpointError(
                f"its header has {length:,} bytes, and at most {min(max_header, MAX_HEADER):,} are expected"
            )
        header = file.read(length)
        if len(header) != length or not header.startswith(FIRST):
            raise CheckpointError(
                "it is no checkpoint of gpuadam: its metadata does not begin with a checksum of the header"
            )
        self.n_bytes, self.crc = size, _own_crc(header)
        if _digits(zlib.crc32(_with_crc(header, BLANK))) != self.crc:
            raise CheckpointError("its header is damaged: its checksum differs")
        entries = parsed_json(header, "its header")
        metadata = entries.pop("__metadata__") if isinstance(entries, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError("its metadata must be strings")
        self.metadata: dict[str, str] = metadata
        crcs = parsed_json(self.metadata.get("crc32", ""), "crc32 in its metadata")
        if not isinstance(crcs, dict) or crcs.keys() != entries.keys():
            raise CheckpointError("crc32 in its metadata must have a checksum for each tensor, and no other")
        self.tensors = {name: _entry(name, entry, crcs[name], 8 + length) for name, entry in entries.items()}
        end = 8 + length
        for name, entry in sorted(self.tensors.items(), key=lambda item: item[1][2:4]):
            if entry.start != end:
                raise CheckpointError(
                    f"the tensor {name!r} starts at byte {entry.start:,}, and the one before ends at {end:,}"
                )
            end = entry.end
        if end != size:
            raise CheckpointError(f"it is cut off or has bytes too many: it has {size:,}, and its tensors end at {end:,}")


def chunks(file, name, entry, first=0, last=None):
    """Yield bytes first ... last - 1 of a tensor as buffers, each good until the next is asked for, and known to be right.

    entry: the tensor's, of a Reader of the file. Raises CheckpointError where a checksum differs. Whole blocks are read.
    """
    last = entry.end - entry.start if last is None else last
    scratch = memoryview(bytearray(min(BLOCK, entry.end - entry.start)))
    for number in range(first // BLOCK, _n_blocks(last)):
        at = number * BLOCK
        block = scratch[: min(BLOCK, entry.end - entry.start - at)]
        file.seek(entry.start + at)
        if file.readinto(block) != len(block):
            raise CheckpointError(f"it was cut off while it was read: {name!r} ends at byte {entry.end:,}")
        if _digits(zlib.crc32(block)) != entry.crc[8 * number : 8 * number + 8]:
            raise CheckpointError(f"the tensor {name!r} is damaged: its checksum differs")
        yield block[max(first - at, 0) : last - at]


def copy(chunks, buffers):
    """Fill writable buffers, in turn, with the bytes of chunks, of which there are as many."""
    chunk = memoryview(b"")
    chunks = iter(chunks)
    for buffer in buffers:
        buffer, done = memoryview(buffer), 0
        while done < len(buffer):
            if not len(chunk):
                chunk = memoryview(next(chunks))
            n = min(len(chunk), len(buffer) - done)
            buffer[done : done + n] = chunk[:n]
            chunk, done = chunk[n:], done + n


def parsed_json(text, what):
    """Return what JSON stands for, or raise CheckpointError; what: what it is, for the message. A key may come once."""
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refused)
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deeply") from error
    except ValueError as error:  # not JSON, not UTF-8, a key twice, or an integer of thousands of digits
        raise CheckpointError(f"{what} cannot be read as JSON: {error}") from error


def _without_repetition(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in an object")
    return found


def _refused(constant):
    raise ValueError(f"{constant} is no number of JSON")


def _entry(name, entry, crc, origin):
    """Check what a header says of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"the tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(f"the tensor {name!r} has dtype {dtype!r}; it must be one of {', '.join(ITEMSIZE)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise CheckpointError(
                f"the tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}: these are no sizes"
            )
    if len(shape) > 64 or len(offsets) != 2 or offsets[1] - offsets[0] != _nbytes(Tensor(name, dtype, tuple(shape), tuple)):
        raise CheckpointError(f"the tensor {name!r} has data_offsets {offsets}, which are not those of {dtype} and {shape}")
    n_digits = 8 * _n_blocks(offsets[1] - offsets[0])
    if not isinstance(crc, str) or len(crc) != n_digits or not re.fullmatch("[0-9a-f]*", crc):
        raise CheckpointError(
            f"the tensor {name!r} has the checksum {str(crc)[:80]!r}, which is none of its {n_digits // 8} blocks"
        )
    return Entry(dtype, tuple(shape), origin + offsets[0], origin + offsets[1], crc)


def _needs_little_endian():
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian and this machine is not: save and load on another")
