"""Agreement between ranks: errors and differences are found before anything is written, and are raised on every rank."""

import hashlib
import textwrap

from ..checkpoint.safetensors import CheckpointError

KINDS = (CheckpointError, FileNotFoundError, TypeError, ValueError, OSError)  # subclasses before their bases


def agreed(transport, prepare, *arguments):
    """Call prepare(*arguments) on every rank; return (its result, whether its flag is set on any rank) where all agree.

    prepare: returns (result, a dict name -> value of what must be the same on all ranks, flag). If it raises on one rank, every
    rank raises. Raises ValueError, the same on every rank, if the dicts differ.

    >>> from gpuadam import transports
    >>> agreed(transports.Local(), lambda: ("checked", {"lr": 0.1}, False))
    ('checked', False)
    """
    result, described, digest, flag, problem, error = None, {}, b"", False, None, None
    try:
        result, described, flag = prepare(*arguments)
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16).digest()
    except Exception as caught:  # noqa: BLE001 - of any kind: the other ranks must not wait for this one; it is raised below
        error = caught
        kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
        problem = kind(f"rank {transport.rank} raised {type(error).__name__}, so all ranks stop: {_text(error)}")
    of_ranks = transport.exchange((problem, digest, flag))
    if error is not None:
        raise error
    for problem, *_ in of_ranks:
        if problem is not None:
            raise problem
    if len({digest for _, digest, _ in of_ranks}) > 1:
        # as text: a value that cannot be pickled on one rank would leave the others waiting
        raise ValueError(_difference(transport.exchange({name: repr(value) for name, value in described.items()})))
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
        return str(error)
    except Exception:  # noqa: BLE001 - of any kind: the other ranks must hear of the error itself
        return "its message cannot be read"


def _difference(descriptions):
    """Return a message about the first value that is not the same on all ranks. descriptions: of each, name -> text."""
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                ours, theirs = (textwrap.shorten(values.get(name, "not there"), 500) for values in (first, other))
                return f"the ranks differ in {name}: {ours} on rank 0, {theirs} on rank {rank}. Give all ranks the same"
    raise AssertionError("descriptions of different digests are the same")
