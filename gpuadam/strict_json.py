"""JSON as its standard has it: Python's reader takes more."""

import json


def parsed(text):
    """Return the value that JSON stands for. Raises ValueError, also for what is nested deeper than Python can read.

    Objects in which a key comes twice are refused, and so are NaN and the infinities, which JSON does not have.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refused)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _without_repetition(pairs):
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError("a key comes twice in an object")
    return parsed


def _refused(constant):
    raise ValueError(f"{constant} is no number of JSON")
