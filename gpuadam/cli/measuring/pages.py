"""On which pages arrays of the CPU lie, and whether this system gives out huge ones (`gpuadam.kernels.huge_pages`)."""

import errno
import functools
import mmap
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...kernels import huge_pages

SMAPS = Path("/proc/self/smaps")
BOUNDARY = 64
# What each value of "enabled" means
MEANING = {
    "always": "large arrays of every library get them, as far as they are aligned",
    "madvise": "gpuadam's arrays of 4 MB and more and NumPy's large ones get them",
    "never": "only memory that is made huge afterwards gets them",
}
NONE = "this system has none for arrays"
SLOW = "A step over large arrays may take twice as long"
REMEDY = f"{SLOW} where they are NumPy's. To have them: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root"


class Mapping(NamedTuple):
    """A range of addresses of this process, and how many bytes of it are in memory, and on huge pages."""

    start: int
    end: int
    in_memory: int
    huge: int


def parsed(smaps):
    """Return the Mappings of the text of /proc/self/smaps, in the order of their addresses.

    >>> parsed("7f00-9f00 rw-p 00000000 00:00 0\\nRss:   8 kB\\nAnonHugePages:   4 kB\\nVmFlags: rd wr hg\\n")
    [Mapping(start=32512, end=40704, in_memory=8192, huge=4096)]
    """
    mappings: list[Mapping] = []
    for line in smaps.splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            start, end = (int(address, 16) for address in key.split("-"))
            mappings.append(Mapping(start, end, 0, 0))
        elif key == "Rss:":
            mappings[-1] = mappings[-1]._replace(in_memory=1024 * int(values[0]))
        elif key == "AnonHugePages:":
            mappings[-1] = mappings[-1]._replace(huge=1024 * int(values[0]))
    return mappings


def percent_huge(extents, mappings=None):
    """Return what percentage of the bytes of some memory lies on huge pages; None where the system does not say it.

    Of a mapping that holds an array in part, the mean of all of its memory counts.

    extents: (address, bytes) of each array. mappings: as of `parsed`; by default those of this process now.
    """
    if mappings is None:
        if sys.platform != "linux" or not SMAPS.exists():
            return None
        mappings = parsed(SMAPS.read_text())
    n_bytes = sum(size for _, size in extents)
    if not n_bytes:
        return None
    mappings = [mapping for mapping in mappings if mapping.huge]
    huge = 0.0
    for start, size in extents:
        for mapping in mappings:
            shared = min(start + size, mapping.end) - max(start, mapping.start)
            huge += max(shared, 0) * mapping.huge / mapping.in_memory
    return round(100 * huge / n_bytes, 1)


def extents(arrays):
    """Return (address, bytes) of NumPy arrays."""
    return [(huge_pages.address_of(array), array.nbytes) for array in arrays]


def system():
    """Return what this system says of huge pages: its settings, and what a large allocation of gpuadam's gets.

    {"enabled", "defrag": the settings, None where there are none; "collapse": whether MADV_COLLAPSE is there; "percent": of an
    allocation of 8 huge pages; "meaning": which arrays get them}
    """
    enabled, defrag = (_setting(name) for name in ("enabled", "defrag"))
    memory = huge_pages.zeros(8 * huge_pages.page_bytes(), BOUNDARY)
    memory[...] = 1
    percent, collapses = percent_huge(extents([memory])), can_collapse()
    meaning = MEANING.get(enabled or "", NONE)
    if enabled == "never" and not percent:
        meaning = "no array gets them"
    return {"enabled": enabled, "defrag": defrag, "collapse": collapses, "percent": percent, "meaning": meaning}


def described(system):
    """Return a line on what `system` returned."""
    if system["enabled"] is None:
        return f"Huge pages: {system['meaning']}. {SLOW}"
    got = "" if system["percent"] is None else f" ({system['percent']:.0f} % of one that was tried)"
    collapse = "yes" if system["collapse"] else "no"
    settings = f"Setting: {system['enabled']}; defrag: {system['defrag']}; MADV_COLLAPSE: {collapse}"
    remedy = f". {REMEDY}" if system["enabled"] == "never" else ""
    return f"Huge pages: {system['meaning']}{got}. {settings}{remedy}"


def _setting(name):
    """Return the word in brackets of a setting, such as madvise in "always [madvise] never"."""
    path = huge_pages.SETTINGS / name
    if not path.exists():
        return None
    _, _, rest = path.read_text().partition("[")
    return rest.partition("]")[0]


@functools.cache
def can_collapse():
    """Whether the system has MADV_COLLAPSE, by trying it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    page = huge_pages.page_bytes()
    memory = np.frombuffer(mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory[::page] = 1
    memory[-huge_pages.address_of(memory) % page] = 1
    try:
        huge_pages.advise(-(-huge_pages.address_of(memory) // page) * page, page, huge_pages.COLLAPSE)
    except OSError as error:
        return error.errno != errno.EINVAL  # of a system that does not know it; others have no huge page left
    return True
