"""State of another format: moments are converted piece by piece, in a few MB of the host's memory, wherever they lie.

`gpuadam.guide.narrow_numbers` says what a conversion loses, and `kernels/state_formats.py` how numbers are rounded.
"""

from typing import Any, NamedTuple

import numpy as np

from . import backends, checks
from .kernels import array_bytes, state_formats
from .kernels.messages import shortened
from .kernels.view import Bits, View
from .state import MOMENTS, OF_GROUPS, dtype_of, place

CONVERTED = (*MOMENTS, *OF_GROUPS)  # what a conversion reads and writes
FORMATS = ("float32", "float64", "bfloat16", "float16", "uint8")  # of moments that can be converted
PIECE = 96 << 12  # elements that are converted at once: whole groups, and whole vectors of 2, 3 or 4


class Conversion(NamedTuple):
    """Moments of a parameter that are to be converted: key -> (backend, View)."""

    sources: dict[str, tuple[Any, View]]
    targets: dict[str, tuple[Any, View]]
    numbers: int  # of the parameter that share a v

    def run(self):
        """Fill the targets. Both sides are waited for, on whatever stream they are used."""
        for array in (*self.sources.values(), *self.targets.values()):
            array_bytes.wait(*array)
        convert(
            {key: (view.format, array_bytes.chunks(backend, view)) for key, (backend, view) in self.sources.items()},
            {key: (view.format, array_bytes.buffers(backend, view)) for key, (backend, view) in self.targets.items()},
            self.targets["m"][1].size,
            self.numbers,
        )


def conversion(label, own, loaded, numbers=1, backend=None):
    """Return the Conversion of loaded moments into one's own, checked, or None if their formats are the same.

    label: of the parameter, for errors. own, loaded: key -> array, of moments and scales; numbers: of an element. backend: of
    one's own. The loaded arrays may lie anywhere. Raises ValueError or TypeError.
    """
    targets, sources = _viewed(label, own, backend), _viewed(f"the loaded state of {label}", loaded, None)
    if {key: view.format for key, (_, view) in targets.items()} == {key: view.format for key, (_, view) in sources.items()}:
        return None
    for _, view in targets.values():
        checks.no_gaps(view)
        checks.writeable(view)
    moments = [key for key in MOMENTS if key in targets]
    is_coded = any(sources[key][1].format == "uint8" for key in moments if key in sources)
    needed = {*moments, *(OF_GROUPS if is_coded else ())}
    if set(sources) != needed:
        raise ValueError(f"the loaded state of {label} has {sorted(sources)}, and {sorted(needed)} can be converted")
    for key, (_, view) in sources.items():
        allowed = ("float32",) if key in OF_GROUPS else ("uint8",) if is_coded else FORMATS
        if view.format not in allowed or not view.dtype.isnative:
            dtype, advice = shortened(str(view.dtype)), checks.cast(view, wide(targets[key][1]))
            raise TypeError(
                f"{view.name} has dtype {dtype}, and must be {' or '.join(allowed)}, in native byte order: {advice}"
            )
        of_m = targets["m"][1].size
        first, last = place(key, 0, of_m, numbers)
        its_shape = (last - first,) if key in OF_GROUPS else targets[key][1].shape
        if view.shape != its_shape:
            raise ValueError(f"{view.name} has shape {view.shape}, and must have {its_shape}")
    return Conversion(sources, targets, numbers)


def is_convertible(view):
    """Whether moments of a View's format can be converted. Integers of 16 bits are bfloat16."""
    return view.dtype.isnative and view.format in (*FORMATS, "uint16")


def wide(view):
    """Return the format that numbers are cast to, which may then be converted to that of a View."""
    return "float64" if view.format == "float64" else "float32"


def _viewed(label, arrays, backend):
    """Return key -> (backend, View) of moments and scales. Integers of 16 bits are bfloat16."""
    viewed = {}
    for key in CONVERTED:
        if key in arrays:
            name = f"{key} of {label}"
            array = checks.given(name, arrays[key])
            of_key, (view,) = backends.choose([(name, array)], backend)
            if view.format == "uint16":
                of_key, (view,) = backends.choose([(name, Bits(array, "bfloat16"))], backend)
            viewed[key] = of_key, view
    return viewed


def convert(sources, targets, n, numbers=1):
    """Fill moments with those of another format.

    sources: key -> (format, their bytes in C order, as chunks). targets: key -> (format, buffers for theirs). n: how many
    elements m has. numbers: of them that share a v.

    >>> source = {"m": ("float32", [np.float32([1, -2, 3]).tobytes()]), "v": ("float32", [np.float32([1, 4, 9]).tobytes()])}
    >>> m, v = np.zeros((2, 3), "uint16")
    >>> convert(source, {"m": ("bfloat16", [m.view("u1").data]), "v": ("bfloat16", [v.view("u1").data])}, 3)
    >>> [hex(x) for x in m]
    ['0x3f80', '0xc000', '0x4040']
    """
    readers = {key: (format, array_bytes.Pieces(chunks)) for key, (format, chunks) in sources.items()}
    writers = {key: (format, array_bytes.Pieces(buffers)) for key, (format, buffers) in targets.items()}
    for start in range(0, n, PIECE):
        stored = {}
        for key, (format, reader) in readers.items():
            first, last = place(key, start, min(start + PIECE, n), numbers)
            dtype = dtype_of(format)
            stored[key] = np.frombuffer(reader.read((last - first) * dtype.itemsize), dtype)
        moments = {
            key: state_formats.decoded(stored[key], readers[key][0], key, stored.get(f"{key}_scale"))
            for key in MOMENTS
            if key in stored
        }
        in_8_bits = state_formats.in_8_bits(moments["m"], moments["v"]) if "m_scale" in targets else {}
        for key, (format, writer) in writers.items():
            new = in_8_bits[key] if in_8_bits else state_formats.encoded(moments[key], format)
            writer.write(new.tobytes())
    for _, writer in writers.values():
        writer.close()
