"""The dicts and lists that parameters were given in: an array that a program puts there later is none that a step updates.

Updates are in place. After `params["w"] = params["w"] * 2` a program reads one array, and its optimizer would update another. So
each step looks whether a dict or list still holds, by identity, the arrays that it held when the optimizer was made.
"""

from . import backends
from .kernels.messages import shown
from .kernels.view import a_kind


class Places(list):
    """Tuples (holder, key, array, name): a dict or list, a place in it, the array there, and the name of the parameter.

    They are plain tuples because each step unpacks them, which takes longer of any other. A copy of an optimizer has other arrays
    than the program has, and so no places. `of_groups`: the holder of each group, which may have no parameter yet, or None.
    `can_replace`: whether the optimizer lets another array take a parameter's place.
    """

    can_replace = True

    def __init__(self):
        self.of_groups: list[dict | list | None] = []

    def add_group(self, given, names, arrays):
        """Add a group, whose parameters were given in a dict or a list, or in something in which nothing is put later."""
        holder = given.whole if isinstance(given, Part) else given
        self.of_groups.append(holder if isinstance(holder, (dict, list)) else None)
        if self.of_groups[-1] is not None:
            keys = names if isinstance(holder, dict) else range(len(names))
            self += [(holder, *place) for place in zip(keys, arrays, names, strict=True)]

    def clear(self):
        super().clear()
        self.of_groups = []

    def __reduce__(self):
        return (Places, ())


class Part(dict):
    """Some parameters of a dict, and that dict, which a program goes on using."""

    def __init__(self, arrays, whole):
        super().__init__(arrays)
        self.whole = whole

    def __reduce__(self):
        return (dict, (dict(self),))


def check(places):
    """Refuse a dict or list that holds another array than `places` say, and bring these up to date."""
    now = []
    for holder, key, array, name in places:
        try:
            held = holder[key]
        except LookupError:  # the program has no array of this name any more
            continue
        if held is not array and not _same_memory(held, array):
            raise _rebound(holder, key, held, name, places.can_replace)
        now.append((holder, key, held, name))
    places[:] = now


def replaced(places, name, param):
    """Bring `places` up to date after another array has taken the place of the parameter of this name.

    A dict or list that does not hold it is let go, and so is the memory of the array before.
    """
    holder, key = next((place[:2] for place in places if place[3] == name), (None, None))
    if holder is None:
        return
    if holds(holder, key, param):
        places[:] = [(holder, key, param, name) if place[3] == name else place for place in places]
    else:
        places[:] = [place for place in places if place[0] is not holder]
        places.of_groups = [None if one is holder else one for one in places.of_groups]


def added(places, group, name, param):
    """Bring `places` up to date after a parameter has come to a group, given by its number."""
    holder = places.of_groups[group] if places.of_groups else None  # a copy of an optimizer has none
    if holder is not None and holds(holder, name, param):
        places.append((holder, name, param, name))


def removed(places, name):
    """Bring `places` up to date after the parameter of this name has gone."""
    places[:] = [place for place in places if place[3] != name]


def holds(holder, key, array):
    """Whether a dict or a list has an array at a key."""
    try:
        return holder[key] is array
    except LookupError:
        return False


def _same_memory(held, array):
    """Whether an array is another object for the same elements, such as a view of all of them."""
    try:
        _, (one, other) = backends.choose([("the array that is there", held), ("the array before", array)])
    except (TypeError, ValueError, backends.BackendUnavailableError):  # no array, or of another device or library
        return False
    return (one.pointer, one.shape, one.strides, one.format, one.device) == (
        other.pointer, other.shape, other.strides, other.format, other.device
    )  # fmt: skip


def _rebound(holder, key, held, name, can_replace):
    kind, label = "dict" if isinstance(holder, dict) else "list", f"params[{shown(key)}]"
    other = f"optimizer.replace({shown(name)}, {label}, rows)" if can_replace else "make another optimizer"
    return ValueError(
        f"{label} is no longer the array that the optimizer updates: the {kind} that it was given in holds another object there, "
        f"{a_kind(held)}, as after {label} = {label} * 2. Updates are in place, so write into the array: {label}[...] = x. To "
        f"go on with another array: {other}. If the {kind} serves something else by now, give the optimizer one of its own: "
        f"{kind}(params)"
    )
