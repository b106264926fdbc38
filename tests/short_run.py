"""What of the tests is left for `pytest --exhaustive`: the rule that conftest.py follows.

A test of many parameters has many combinations of them. Marked by `@pytest.mark.in_short(...)`, it has in the short run each
value of each parameter, each combination of the parameters that the marker names, and no more. What is compiled for several
architectures is so without being marked: the key forms by each compiler, and the others by one of NVRTC and Numba, about half of
them by each. The older of two NVRTCs compiles the first of the key forms. `test_gpu_code_bits.py` goes by this. Of other tests of
compiled code there is what one compiler compiles: NVRTC in about half of the tests, Numba in the others.
"""

import itertools
import zlib
from collections import Counter, defaultdict

import cases
from cases import ARCHITECTURES, DTYPES, FORMS, KEY_FORMS


def select(config, items):
    """Mark the tests, and leave those marked `exhaustive` out of the short run."""
    mark(items, cases.exhaustive)
    if not cases.exhaustive:
        left_out = {item for item in items if item.get_closest_marker("exhaustive")}
        leave_out(config, items, left_out)
    if part := config.getoption("--part", None):
        k, n = map(int, part.split("/"))
        leave_out(config, items, {item for item in items if zlib.crc32(item.nodeid.encode()) % n != k})


def leave_out(config, items, left_out):
    """Take tests out of a run."""
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def mark(items, exhaustive):
    """Mark what the short run leaves out by `exhaustive`, and in the other run what looks at more examples there."""
    functions = defaultdict(list)
    for item in items:
        if item.get_closest_marker("gpu"):  # there are few, and most runs skip them
            continue
        if exhaustive and "examples" in getattr(item, "fixturenames", ()):
            item.add_marker("exhaustive")
        elif hasattr(item, "callspec") and not item.get_closest_marker("exhaustive"):
            functions[item.nodeid.partition("[")[0]].append(item)
    for alike in functions.values():
        marker, places = alike[0].get_closest_marker("in_short"), [item.callspec.params for item in alike]
        if marker or {"compiler", "arch"} <= set(places[0]):
            any_of = () if marker or "name" in places[0] else ("arch",)  # forms go over the architectures, others take a few
            kept = cover(places, marker.args if marker else ("compiler", "name"), any_of)
            if not marker:
                kept -= {k for k in kept if _is_as_others(places[k])}
            for k in set(range(len(alike))) - kept:
                alike[k].add_marker("exhaustive")
        if "compiler" in places[0] and alike[0].path.name != "test_gpu_code_bits.py":
            leave_to_one_compiler([item for item in alike if not item.get_closest_marker("exhaustive")])


def leave_to_one_compiler(alike):
    """Mark the items of a test, which are in the short run, but for those of one compiler."""
    compilers = sorted({item.callspec.params["compiler"] for item in alike} - {"cupy-cuda12"})
    if compilers:
        own = compilers[zlib.crc32(alike[0].originalname.encode()) % len(compilers)]
        for item in alike:
            if item.callspec.params["compiler"] != own:
                item.add_marker("exhaustive")


def cover(places, together=(), any_of=()):
    """Return which of some combinations of parameters have, between them, each value of each, and each combination of some.

    places: dicts of a parameter's name and its value. together: names of parameters. any_of: names of those of which not all
    values have to be there. Values come up about as often as each other.
    """
    facts = []
    for place in places:
        values = {name: id(value) for name, value in place.items()}  # some values cannot be compared
        combined = tuple((name, values.pop(name)) for name in together if name in values)
        facts.append({*values.items(), combined})
    missing = {fact for fact in itertools.chain(*facts) if not fact or fact[0] not in any_of}
    kept, seen = set(), Counter()
    while missing:
        best = max(
            range(len(facts)),
            key=lambda k: (len(facts[k] & missing), _usual(places[k]), -sum(seen[fact] for fact in facts[k])),
        )
        kept.add(best)
        missing -= facts[best]
        seen.update(facts[best])
    return kept


def _is_as_others(place):
    """Whether other places stand for a compiler and form: the form by the other compiler, or another form by this one."""
    name = place.get("name")
    if name is None:
        return False
    if place["compiler"] == "cupy-cuda12":  # NVRTC of CUDA 12 has the text of CUDA 13's
        return name in FORMS and name != KEY_FORMS[0]
    return name not in KEY_FORMS and place["compiler"] != ("cupy", "numba-cuda")[zlib.crc32(name.encode()) % 2]


def _usual(place):
    """Return how much a combination is like others of its form: what is compiled for one test then serves the others.

    Each form has a dtype and an architecture that it has in all tests, as far as they can choose.
    """
    name = place.get("name")
    its_dtype = name in FORMS and place.get("dtype") == DTYPES[list(FORMS).index(name) % len(DTYPES)]
    its_arch = place.get("arch") == ARCHITECTURES[zlib.crc32(str(name).encode()) % len(ARCHITECTURES)]
    return its_dtype + its_arch
