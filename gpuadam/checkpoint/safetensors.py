"""The safetensors format, in pieces: neither the file nor its tensors have to fit into memory, nor lie in the host's.

    8 bytes   the length of the header, a little-endian integer
    header    JSON: {"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [start, end]}, ...}, and spaces
    payload   the elements of every tensor in C order, little-endian, one after the other without gaps

The package `safetensors` takes all tensors at once, and in the host's memory. It can read what is written here. Files that it
wrote are refused here, because they lack the checksums that `write` adds to the metadata, or have them in another order.

A checksum is a CRC-32, written as eight hexadecimal digits. "header_crc32", the first of the metadata, is the header's, computed
with zeros in its own place. "crc32" is JSON: name -> the checksums of a tensor's payload in a row, one for every BLOCK bytes and
one for the rest. So no byte can change without being noticed, and a part of a tensor can be read and known to be right without
the rest.
"""

import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .. import strict_json
from ..kernels.messages import shown

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1}
MAX_HEADER = 100_000_000  # bytes, as the format says
BLOCK = 1 << 20  # bytes that have a checksum of their own
ALIGNMENT = 8  # of the payload; every tensor is then aligned to its elements, because the widest come first
FIRST = b'{"__metadata__":{"header_crc32":"'  # the beginning of a header, before its checksum
OTHER_ENDIAN = "safetensors files are little-endian and this machine is not: save and load on another"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or loaded into these parameters. The message says which, why and what to do."""


def require(condition, message):
    """Raise CheckpointError unless a condition holds."""
    if not condition:
        raise CheckpointError(message)


class Tensor(NamedTuple):
    """A tensor to be written. `chunks()` gives its bytes in buffers, each of which is written before the next is asked for."""

    name: str
    dtype: str  # as in ITEMSIZE
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]

    @property
    def n_bytes(self):
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


class Entry(NamedTuple):
    """Where the bytes of a tensor are in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    end: int
    crc: str  # the checksums of all blocks


def write(file, tensors, metadata):
    """Write tensors to a binary file that can seek, reading each of them once. Return the checksum of its header.

    metadata: string -> string. Raises CheckpointError for a header that is too long, OSError as the file does.
    """
    require(sys.byteorder == "little", OTHER_ENDIAN)
    tensors = sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype])
    zeros = {tensor.name: _digits(0) * _n_blocks(tensor.n_bytes) for tensor in tensors}
    length = len(_header(tensors, metadata, zeros))
    require(length <= MAX_HEADER, f"the header of {len(tensors)} tensors has {length:,} bytes, more than {MAX_HEADER:,}")
    file.seek(8 + length)
    header = _header(tensors, metadata, {tensor.name: _write_payload(file, tensor) for tensor in tensors})
    file.seek(0)
    file.write(length.to_bytes(8, "little") + header)  # which is as long as it was with zeros for checksums
    return _crc_in(header)


def _write_payload(file, tensor):
    """Write the bytes of a tensor. Return the checksums of their blocks."""
    n_bytes = 0
    crcs: list[int] = []
    for buffer in tensor.chunks():
        chunk = memoryview(buffer)
        for first in range(-(n_bytes % BLOCK), len(chunk), BLOCK):  # of each block, which may have begun in the last chunk
            block = bytes(chunk[max(first, 0) : first + BLOCK])  # another thread may change the chunk after the next line
            file.write(block)
            crcs += [0] if first >= 0 else []
            crcs[-1] = zlib.crc32(block, crcs[-1])
        n_bytes += len(chunk)
    if n_bytes != tensor.n_bytes:
        raise RuntimeError(f"{shown(tensor.name)} gave {n_bytes} bytes and has {tensor.n_bytes}")
    return "".join(map(_digits, crcs))


def _header(tensors, metadata, crcs):
    """Return the header of a file. crcs: name -> checksums of the payload."""
    metadata = {"header_crc32": _digits(0), **metadata, "crc32": json.dumps(crcs, ensure_ascii=False)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for tensor in tensors:
        end = start + tensor.n_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    try:
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{error.object[error.start - 10 : error.end + 10]!r} in a name is no valid text") from error
    header += b" " * (-len(header) % ALIGNMENT)
    return _with_crc(header, _crc_of(header))


def _with_crc(header, digits):
    return FIRST + digits.encode() + header[len(FIRST) + 8 :]


def _crc_in(header):
    """Return the checksum that a header has of itself."""
    return header[len(FIRST) : len(FIRST) + 8].decode(errors="replace")


def _crc_of(header):
    """Return the checksum that a header should have of itself."""
    return _digits(zlib.crc32(_with_crc(header, _digits(0))))


def _digits(crc):
    return f"{crc:08x}"


def _n_blocks(n_bytes):
    return -(-n_bytes // BLOCK)


class Reader:
    """A file that `write` wrote.

    The constructor checks everything except the payload, and allocates no memory of the payload's size.

    file: a binary file that can seek. max_header: bytes that its header may have.
    Attributes: `metadata`, string -> string; `tensors`, name -> Entry; `crc`, of the header; `n_bytes`, of the file.
    Raises CheckpointError.
    """

    def __init__(self, file, max_header=MAX_HEADER):
        require(sys.byteorder == "little", OTHER_ENDIAN)
        self.n_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        length, most = int.from_bytes(file.read(8), "little"), min(max_header, MAX_HEADER)
        cut_off = f"it is cut off, or no safetensors file: it has {self.n_bytes:,} bytes, and a header of {length:,}"
        require(length <= self.n_bytes - 8, cut_off)
        require(length <= most, f"its header has {length:,} bytes, and at most {most:,} are expected")
        header = file.read(length)
        if not header.startswith(FIRST):
            raise CheckpointError(_why_not_ours(header))
        self.crc = _crc_in(header)
        require(
            self.crc == _crc_of(header), "its header is damaged, or another program rewrote the file: its checksum differs"
        )
        entries = parsed_json(header, "its header")
        self.metadata: dict[str, str] = entries.pop("__metadata__")
        require(all(isinstance(value, str) for value in self.metadata.values()), "its metadata must be strings")
        crcs = parsed_json(self.metadata.get("crc32", ""), "crc32 in its metadata")
        complete = isinstance(crcs, dict) and crcs.keys() == entries.keys()
        require(complete, "crc32 in its metadata must have a checksum for each tensor, and no other")
        end = 8 + length
        self.tensors = {name: _entry(name, entry, crcs[name], end) for name, entry in entries.items()}
        for name, entry in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise CheckpointError(
                    f"the tensor {shown(name)} starts at byte {entry.start:,}, the one before ends at {end:,}"
                )
            end = entry.end
        cut_off = f"it is cut off or has bytes too many: it has {self.n_bytes:,}, and its tensors end at {end:,}"
        require(end == self.n_bytes, cut_off)


def _why_not_ours(header):
    """Return what is wrong with a header that does not begin as `write` begins it."""
    entries = parsed_json(header, "it is no checkpoint of gpuadam: its header")
    metadata = entries.get("__metadata__") if isinstance(entries, dict) else None
    if isinstance(metadata, dict) and {"header_crc32", "crc32"} & metadata.keys():
        return (
            "another program rewrote this checkpoint of gpuadam, as save_file of the package safetensors does: the checksum of "
            "its header is not the first of its metadata, and does not fit any more. Load the file that `save` wrote, or a copy "
            "of its bytes. From the rewritten one, read the arrays and the metadata yourself, and give them to load_state_dict"
        )
    return (
        "it is no checkpoint of gpuadam: its metadata does not begin with a checksum of the header. If it was one, another "
        "program rewrote it without its metadata, as save_file(tensors, path) of the package safetensors does, and step counts "
        "and hyperparameters are lost. Load the file that `save` wrote, or make the optimizer anew and give the arrays to "
        "load_state_dict"
    )


def _entry(name, entry, crc, origin):
    """Check what a header says of a tensor, and return it as an Entry. origin: the place of the payload in the file."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        are_sizes = type(shape) is list and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end))
        right = are_sizes and len(entry) == 3 and len(shape) <= 64 and end - start == ITEMSIZE[dtype] * math.prod(shape)
    except (LookupError, TypeError, ValueError):
        right = False
    if not right:
        needed = f"a dtype of {', '.join(ITEMSIZE)}, a shape, and the data_offsets of so many elements"
        raise CheckpointError(f"the tensor {shown(name)} must have {needed}; it has {str(entry)[:200]}")
    n_blocks = _n_blocks(end - start)
    if not isinstance(crc, str) or len(crc) != 8 * n_blocks or not re.fullmatch("[0-9a-f]*", crc):
        raise CheckpointError(
            f"the tensor {shown(name)} has the checksum {str(crc)[:80]!r}, which is none of {n_blocks} blocks"
        )
    return Entry(dtype, tuple(shape), origin + start, origin + end, crc)


def chunks(file, name, entry, first=0, last=None):
    """Yield bytes first ... last - 1 of a tensor as buffers, each good until the next is asked for, and known to be right.

    entry: the tensor's, of a Reader of the file. Raises CheckpointError where a checksum differs. Whole blocks are read.
    """
    size = entry.end - entry.start
    last = size if last is None else last
    scratch = memoryview(bytearray(min(BLOCK, size)))
    for number in range(first // BLOCK, _n_blocks(last)):
        at = number * BLOCK
        block = scratch[: size - at]
        file.seek(entry.start + at)
        if file.readinto(block) != len(block):
            raise CheckpointError(f"it was cut off while it was read: {shown(name)} ends at byte {entry.end:,}")
        if _digits(zlib.crc32(block)) != entry.crc[8 * number : 8 * number + 8]:
            raise CheckpointError(f"the tensor {shown(name)} is damaged: its checksum differs")
        yield block[max(first - at, 0) : last - at]


def parsed_json(text, what):
    """Return the value that JSON stands for, or raise CheckpointError. what: a name of the text, for the message."""
    try:
        return strict_json.parsed(text)
    except ValueError as error:  # not JSON, not UTF-8, a key twice, an integer of thousands of digits
        raise CheckpointError(f"{what} cannot be read as JSON: {error}") from error
