"""On which CUDA stream a launch goes, and with which other streams it is ordered. Streams are driver handles."""

from gpuadam.kernels.messages import shown

NAMING_NONE = [None]
LEGACY_DEFAULT = 1  # the default stream's name in __cuda_array_interface__; 0 names it elsewhere


def handle(stream):
    """Return the handle of what a caller gives as `stream=`: a CuPy, Numba or torch stream, or a handle. None stays None."""
    if stream is None:
        return None
    if hasattr(stream, "__cuda_stream__"):
        _, stream = stream.__cuda_stream__()
    elif hasattr(stream, "cuda_stream"):  # torch
        stream = stream.cuda_stream
    if isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream is {shown(stream)}; it must be a CuPy, Numba or torch stream, or the handle of one")
    return stream or LEGACY_DEFAULT


def choose(asked, current, named):
    """Return the stream of a launch, and the other streams to order it with.

    asked: the stream that the caller asks for, or None. current: CuPy's current stream, or None without CuPy. named: the streams
    that the arrays name; None stands for an array that names no stream, and the current one is taken. A stream that the caller
    chose goes before one that an array was last used on.

    >>> choose(None, 1, [77, 77])
    (77, [])
    >>> choose(None, 5, [1, 77])
    (5, [1, 77])
    >>> choose(8, 5, [None])
    (8, [5])
    """
    if asked is None and named == NAMING_NONE:  # mostly, and in less time
        return current or LEGACY_DEFAULT, []
    named = list(dict.fromkeys(stream or current or LEGACY_DEFAULT for stream in named))
    chosen = asked or (current if current not in (None, LEGACY_DEFAULT) else None)
    target = chosen or (named[0] if named else LEGACY_DEFAULT)
    return target, [stream for stream in named if stream != target]
