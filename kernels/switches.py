"""Environment variables that switch something on."""

import os

ON, OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def is_on(name):
    """Whether an environment variable switches something on. Raises ValueError if it has another value than ON and OFF.

    >>> is_on("GPUADAM_NOT_SET")
    False
    """
    value = os.environ.get(name, "")
    if value.lower() not in (*ON, *OFF):
        raise ValueError(
            f"the environment variable {name}={value!r} must be one of {', '.join(ON)}, or of {', '.join(OFF[1:])} if it is set"
        )
    return value.lower() in ON
