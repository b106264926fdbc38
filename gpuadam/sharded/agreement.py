"""What all ranks must have in common: found out before anything is written, and raised on every one of them."""

import hashlib
import textwrap

from ..checkpoint.safetensors import CheckpointError

KINDS = {kind.__name__: kind for kind in (TypeError, ValueError, CheckpointError, FileNotFoundError, OSError)}


def agreed(transport, prepare):
    """Call prepare() on every rank; return (its result, whether its flag is set on any rank) where all agree.

    prepare: returns (result, what must be the same on all ranks: a dict name -> value, flag). If it raises on one rank, every
    rank raises. Raises ValueError, the same on every rank, for what differs.

    >>> from gpuadam import transports
    >>> agreed(transports.Local(), lambda: ("checked", {"lr": 0.1}, False))
    ('checked', False)
    """
    result, described, digest, flag, error = None, {}, b"", False, None
    try:
        result, described, flag = prepare()
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16).digest()
    except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one; it is raised below
        error = caught
    problem = None if error is None else (_known(error), type(error).__name__, _text(error))
    found = transport.exchange((problem, digest, flag))
    if error is not None:
        raise error
    for rank, (problem, _, _) in enumerate(found):
        if problem is not None:
            known, kind, message = problem
            raise KINDS.get(known, RuntimeError)(f"rank {rank} raised {kind}, so all ranks stop: {message}")
    if len({digest for _, digest, _ in found}) > 1:
        # as text: what cannot be pickled on one rank would leave the others waiting
        raise ValueError(_difference(transport.exchange({name: _shown(value) for name, value in described.items()})))
    return result, any(flag for *_, flag in found)


def on_all(transport, function):
    """Call function() on every rank and return its result. If it raises on one rank, every rank raises.

    >>> from gpuadam import transports
    >>> on_all(transports.Local(), lambda: "done")
    'done'
    """
    return agreed(transport, lambda: (function(), {}, False))[0]


def _known(error):
    """Return the name of the class of an error that other ranks raise."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in KINDS), "RuntimeError")


def _text(error):
    """Return the message of an error, which may be a caller's own."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - whatever it is, the other ranks must hear of the error itself
        return "its message cannot be read"


def _shown(value):
    """Return (whether a value is text, the value as text)."""
    return (True, value) if type(value) is str else (False, repr(value))


def _difference(descriptions):
    """Return what the first thing is that is not the same on all ranks. descriptions: of each, as `_shown`."""
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                both = [d.get(name, (True, "not there")) for d in (first, other)]
                look_alike = both[0][1] == both[1][1]  # "1" and 1
                shown = (repr(text) if look_alike and is_text else text for is_text, text in both)
                ours, theirs = (textwrap.shorten(text, 500) for text in shown)
                return f"the ranks differ in {name}: {ours} on rank 0, {theirs} on rank {rank}. Give all ranks the same"
    raise AssertionError("descriptions of different digests are the same")
