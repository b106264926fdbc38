"""The rates of this machine, for `gpuadam.planning`: measured, or read from a file of former measurements.

    bandwidth   bytes a second that the limit kernel moves (`kernels/limit.py`), on arrays that lie in no cache
    rates       elements a second of the update itself, of all cores at once, on arrays that lie in their caches
    launch      seconds of an update of a few elements
    disk        bytes a second of a file that is written through to the disk, and read again when it is in no cache

Constants are a dict, as in JSON: {"cpu": {...}, "gpu": {...}, "disk": {...}}, any of which may be missing.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from ... import backends, strict_json
from ...kernels import adam, limit
from ...kernels.messages import shown
from ...kernels.operands import Arrays
from . import facts, forms, measure

LARGE, FEW = 20_000_000, 256  # elements
IN_CACHE, PASSES = 1 << 14, 16  # elements, 256 kB of float32, that each core updates so many times in a launch
ON_END = {"untimed": 2, "timed": 4}  # runs, so that the arrays of a function stay in the caches
DISK_BYTES, BLOCK = 1 << 28, 1 << 22


def measured(formats, folder=None, seconds=1.0):
    """Return the constants of this machine: of its CPU, of its GPU if a backend for one works, of the disk of a folder.

    formats: the `operands.Arrays` whose rates are wanted. seconds: spent on each measurement, about.
    """
    on_gpu = [name for name in backends.available_backends() if backends.BACKENDS[name].memory == "CUDA"]
    with tempfile.TemporaryDirectory(
        dir=folder, prefix="gpuadam-plan-"
    ) as scratch:  # first: it may be that none can be made
        constants = {"cpu": of_processor("numba-cpu", formats, seconds)}
        if on_gpu:
            constants["gpu"] = of_processor(on_gpu[0], formats, seconds)
        constants["disk"] = of_disk(Path(scratch))
    return constants


def of_processor(backend, formats, seconds):
    """Return the constants of the processor of a backend."""
    kernels, on_cpu = backends.load(backend), backends.BACKENDS[backend].memory == "CPU"
    # a GPU's caches hold so little that an update of it takes no longer than a launch: its time says nothing of a rate
    wanted = list(dict.fromkeys([Arrays(), *formats])) if on_cpu else []
    functions = [launcher(kernels, Arrays(), LARGE, limit), launcher(kernels, Arrays(), FEW, adam)]
    functions += [in_caches(kernels, arrays) for arrays in wanted]
    moving, launch, *each = map(typical, measure.in_turn(kernels, functions, seconds, **ON_END))
    rates = [
        {"arrays": arrays._asdict(), "elements_per_second": rate(taken, launch)}
        for arrays, taken in zip(wanted, each, strict=True)
    ]
    numbers = {"bandwidth": 7 * 4 * LARGE / moving, "launch": launch, "rates": rates}
    numbers |= {"memory": memory(backend)[1], "cache": _cache() if on_cpu else 0}
    return _processor(backend, facts.of_backend(backend)) | numbers


def _processor(backend, row):
    """Return the part of a processor's constants that names it. row: a row of `bench`, or the facts in one."""
    return {"name": row["device"], "cores": row["cores"], "date": row["date"], "backend": backend}


def typical(times):
    """Return the 20th percentile: other programs only make a run slower, and the fastest run of all is luck."""
    return float(np.percentile(times, 20))


def rate(taken, launch):
    """Return how many elements a second all cores update. taken: the seconds of a launch of `in_caches`."""
    return backends.load("numba-cpu").n_threads() * PASSES * IN_CACHE / max(taken - launch, taken / 2)


def launcher(kernels, formats, n, rule):
    """Return a function that launches a rule on arrays of its own."""
    case = forms.Case(formats)
    return forms.launcher(kernels, case, forms.new_arrays(kernels, case, n).values(), rule)


def in_caches(kernels, formats):
    """Return a function that launches an update in which each core has arrays of its own, which stay in its caches.

    All cores at once: two of them are not twice as fast as one.
    """
    case = forms.Case(formats)
    of_cores = [list(forms.new_arrays(kernels, case, IN_CACHE).values()) for _ in range(kernels.n_threads())]
    return forms.launcher_of_all(kernels, case, [arrays for arrays in of_cores for _ in range(PASSES)], adam)


def memory(backend):
    """Return how many bytes of a backend's memory are free, and how many there are; None for what the system does not say."""
    if backends.BACKENDS[backend].memory == "CPU":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        meminfo = Path("/proc/meminfo")
        lines = meminfo.read_text().splitlines() if meminfo.exists() else []
        available = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        return next(available, total), total
    return backends.load(backend).memory_info()


def _cache():
    """Return the bytes of the last cache of the first processor, as Linux says; 0 where it does not."""
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)


def of_disk(folder):
    """Return the rates of the disk of a folder, and what is free on it."""
    path, block = folder / "blocks", np.random.default_rng(0).bytes(BLOCK)  # random: some disks compress
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        if cold := hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        read = time.perf_counter() - began
    free = shutil.disk_usage(folder).free
    return {"read": DISK_BYTES / read, "write": DISK_BYTES / written, "free": free, "read_from_disk": cold}


def read(path):
    """Return the constants in a file of `plan --measure --json` or of `bench --json`. Raises ValueError if there are none."""
    try:
        content = strict_json.parsed(Path(path).read_text())
        constants = dict(content["constants"]) if "constants" in content else of_bench(content["rows"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, ZeroDivisionError) as error:
        of = "`plan --measure --json` writes, nor rows as `bench --json` does"
        raise ValueError(f"{path} has neither constants as {of}: {error!r}") from error
    return _checked(constants, path)


def _checked(constants, path):
    for part, checks in PARTS.items():
        values = constants.get(part, {})
        if not isinstance(values, dict):
            raise ValueError(f"{path}: its {part} is {shown(values, 100)}, and must be an object")
        for key, (wanted, holds) in checks.items() if part in constants else ():
            if not holds(values.get(key)):
                raise ValueError(f"{path}: the {key} of its {part} is {shown(values.get(key), 100)}, and must be {wanted}")
    if not {"cpu", "gpu"} & constants.keys():
        raise ValueError(f"{path} has no float32 rows of the limit kernel: run bench with --dtypes float32")
    return constants


def _number(least, kind=float):
    return lambda value: type(value) in (int, kind) and least <= value <= 1e30


def _are_rates(rates):
    try:
        return all(map(_number(SMALLEST), rates_of({"rates": rates or []}).values()))
    except (KeyError, TypeError):
        return False


SMALLEST = 1e-9  # no time can be computed with less
POSITIVE, SIZE = ("a number above 0", _number(SMALLEST)), ("an integer of at least 0", _number(0, int))
# What is read of each part: key -> (what it must be, whether it is)
PROCESSOR = {
    "rates": ("a list of formats, each with its elements_per_second above 0", _are_rates),
    "bandwidth": POSITIVE,
    "launch": ("a number of at least 0", _number(0)),
    "cache": SIZE,
    "memory": ("an integer above 0, or null", lambda value: value is None or _number(1, int)(value)),
    "name": ("a string", lambda value: isinstance(value, str)),
}
PARTS = {"cpu": PROCESSOR, "gpu": PROCESSOR, "disk": {"read": POSITIVE, "write": POSITIVE, "free": SIZE}}


def of_bench(rows):
    """Return the constants that follow from rows of `bench --json`: of float32 alone, and of no cache."""
    constants = {}
    groups = measure.groups([row for row in rows if row["dtype"] == "float32"], "backend", "contender")
    for (backend, contender), limits in groups.items():
        if contender == measure.LIMIT and (steps := groups.get((backend, measure.KERNEL))):
            largest = max(limits, key=lambda row: row["elements"])
            on_cpu = backends.BACKENDS[backend].memory == "CPU"
            rate = max(row["elements"] / row["p50_us"] * 1e6 for row in steps)
            constants["cpu" if on_cpu else "gpu"] = _processor(backend, largest) | {
                "bandwidth": largest["gb_per_s"] * 1e9,
                "launch": min(row["p50_us"] for row in steps) / 1e6,
                "rates": [{"arrays": Arrays()._asdict(), "elements_per_second": rate}] if on_cpu else [],
                "memory": None,
                "cache": 0,
            }
    return constants


def rates_of(processor):
    """Return the rates of a processor's constants as `machines.Processor` takes them."""
    return {Arrays(**rate["arrays"]): rate["elements_per_second"] for rate in processor.get("rates", [])}
