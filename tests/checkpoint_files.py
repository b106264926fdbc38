"""The files of checkpoints, taken apart and put together again with right checksums: what the tests of damaged ones share."""

import json
import zlib

from gpuadam.checkpoint import safetensors as safetensors_file


def sealed(header, payload=b"", trailing=b""):
    """Return a file whose checksum of the header is right, whatever the header says. header: a dict, or bytes after the sum."""
    start = safetensors_file.FIRST
    if isinstance(header, dict):
        text = json.dumps(header, separators=(",", ":")).encode()
        begin = b'{"__metadata__":{'
        header = text[len(begin) :] if text.startswith(begin) else text
    blank = start + b'00000000",' + header
    right = start + b'%08x",' % zlib.crc32(blank) + header
    return len(right).to_bytes(8, "little") + right + payload + trailing


def taken_apart(saved):
    """Return the header of a file, without its own checksum, and the payload."""
    length = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + length])
    del header["__metadata__"]["header_crc32"]
    return header, saved[8 + length :]
