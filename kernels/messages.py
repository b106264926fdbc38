"""What users are told: their values in messages, which stay readable whatever the values are, and warnings."""

import inspect
import warnings


def shown(value, most=200):
    """Return the repr of a user's value, shortened to about `most` characters.

    >>> shown("w" * 1000, most=20)
    "'wwwwwwwww[982 characters left out]wwwwwwwww'"
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of any kind: the error that is to be reported is another
        text = f"<{type(value).__name__}, whose repr fails>"
    return shortened(text, most)


def shortened(text, most=200):
    """Return a text, without its middle if it is long."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}[{len(text) - 2 * half:,} characters left out]{text[-half:]}"


def how_many(n, noun):
    """Return a number of things, in words.

    >>> how_many(1, "element"), how_many(1000, "element")
    ('1 element', '1,000 elements')
    """
    return f"{n:,} {noun}{'s' * (n != 1)}"


def label_of(name, alone=False):
    """Return what errors call a parameter. alone: it was given as one array.

    >>> label_of("w"), label_of("0", alone=True)
    ("params['w']", 'params')
    """
    return "params" if alone else f"params[{shown(name)}]"


def warn(message):
    """Warn, and name the line of the caller of gpuadam."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("gpuadam."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
