"""Agreement between ranks: errors and differences are found before anything is written, and are raised on every rank."""

import hashlib
import numbers
import textwrap
from collections.abc import Mapping

import numpy as np

from ..checkpoint.safetensors import CheckpointError
from ..kernels.messages import shortened
from .transports import RankEnded

KINDS = (CheckpointError, FileNotFoundError, TypeError, ValueError, OSError)  # subclasses before their bases


def agreed(transport, prepare, *arguments):
    """Call prepare(*arguments) on every rank; return (its result, whether its flag is set on any rank) where all agree.

    prepare: returns (result, a dict name -> value of what must be the same on all ranks, flag). If it raises on one rank, every
    rank raises. Raises ValueError, the same on every rank, if the dicts differ. Either ends the call (`transports.Calls`).

    >>> from gpuadam import transports
    >>> agreed(transports.Local(), lambda: ("checked", {"lr": 0.1}, False))
    ('checked', False)
    """
    result, described, digest, flag, problem, error = None, {}, b"", False, None, None
    try:
        result, described, flag = prepare(*arguments)
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16).digest()
    except BaseException as caught:  # noqa: BLE001 - Ctrl-C too: the other ranks must not wait; it is raised below
        error = caught
        kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
        problem = kind(f"rank {transport.rank} raised {type(error).__name__}, so all ranks stop: {_text(error)}")
    try:
        of_ranks = transport.exchange((problem, digest, flag))
    except RankEnded:
        transport.calls.over()
        raise
    problem = next((one for one in (error, *(problem for problem, *_ in of_ranks)) if one is not None), None)
    if problem is None and len({digest for _, digest, _ in of_ranks}) > 1:
        problem = _difference(transport.exchange(on_all(transport, _texts, described)))
    if problem is not None:
        transport.calls.over()
        raise problem
    return result, any(flag for *_, flag in of_ranks)


def on_all(transport, function, *arguments):
    """Call function(*arguments) on every rank and return its result. If it raises on one rank, every rank raises.

    >>> from gpuadam import transports
    >>> on_all(transports.Local(), lambda: "done")
    'done'
    """
    return agreed(transport, lambda: (function(*arguments), {}, False))[0]


def _text(error):
    """Return the message of an error, whose class may be a caller's own."""
    try:
        return shortened(str(error), 2000)
    except Exception:  # noqa: BLE001 - of any kind: the other ranks must hear of the error itself
        return "its message cannot be read"


def _texts(described):
    """Return name -> (a text that equal values share, a text to show). A value itself may be one that cannot be pickled."""
    return {name: (_meaning(value), repr(value)) for name, value in described.items()}


def _meaning(value):
    """Return a text that equal values share, whatever their types are: 1, 1.0 and NumPy's 1; 0.0 and -0.0; (1, 2) and [1, 2].

    A flag is no number, as in `checks`. NaN is NaN.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
        return repr(int(value) if isinstance(value, float) and value.is_integer() else value)
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_meaning, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_meaning(key)}: {_meaning(member)}' for key, member in value.items()))}}}"
    return repr(value)


MISSING = "", "not there"


def _difference(descriptions):
    """Return a ValueError about the first value that is not the same on all ranks, or None. descriptions: `_texts` of each."""
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for name in [*first, *other]:
            (meant, shown), (other_meant, other_shown) = first.get(name, MISSING), other.get(name, MISSING)
            if meant != other_meant:
                ours, theirs = textwrap.shorten(shown, 500), textwrap.shorten(other_shown, 500)
                what = f"the ranks differ in {shortened(name)}"
                return ValueError(f"{what}: {ours} on rank 0, {theirs} on rank {rank}. Give all ranks the same")
    return None
