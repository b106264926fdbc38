"""The rates of this machine, for `performance_model`: measured, or read from what was measured before.

    bandwidth   what the limit kernel moves (`kernels/limit.py`), on arrays that lie in no cache
    rates       elements a second of the update itself, of all cores at once, on arrays that lie in their caches
    launch      what an update of a few elements takes
    disk        a file written until it is on the disk, and read again when it is in no cache

Constants are a dict, as JSON has it: {"cpu": {...}, "gpu": {...}, "disk": {...}}, of which any may be missing.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from ... import backends
from ...kernels import adam, limit
from ...kernels.operands import Arrays
from . import forms, measure

LARGE, FEW = 20_000_000, 256  # elements
IN_CACHE, PASSES = 1 << 14, 16  # elements, 256 kB of float32, that each core updates so many times in a launch
WARMING_UP, ON_END = 2, 4  # runs
DISK_BYTES, BLOCK = 1 << 28, 1 << 22
SMALLEST, LARGEST = 1e-9, 1e30  # of what is read


def measured(formats, folder=None, seconds=1.0):
    """Return the constants of this machine: of its CPU, of its GPU if a backend for one works, of the disk of a folder.

    formats: the `operands.Arrays` whose rates are wanted. seconds: spent on each measurement, about.
    """
    found = {"cpu": of_processor("numba-cpu", formats, seconds)}
    on_gpu = [name for name in backends.available_backends() if backends.BACKENDS[name].memory == "CUDA"]
    if on_gpu:
        found["gpu"] = of_processor(on_gpu[0], formats, seconds)
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpuadam-plan-") as own:
        found["disk"] = of_disk(Path(own))
    return found


def of_processor(backend, formats, seconds):
    """Return the constants of the processor of a backend."""
    kernels, on_cpu = backends.load(backend), backends.BACKENDS[backend].memory == "CPU"
    plain = Arrays()
    # a GPU's caches hold what it updates within a launch's time: what that takes says nothing of a rate
    wanted = list(dict.fromkeys([plain, *formats])) if on_cpu else []
    functions = [launcher(kernels, plain, LARGE, limit), launcher(kernels, plain, FEW, adam)]
    functions += [in_caches(kernels, arrays) for arrays in wanted]
    moving, launch, *each = map(typical, samples(kernels, functions, seconds))
    rates = [
        {"arrays": arrays._asdict(), "elements_per_second": rate(taken, launch)}
        for arrays, taken in zip(wanted, each, strict=True)
    ]
    facts = measure.facts(backend)
    found = {"name": facts["device"], "cores": facts["cores"], "date": facts["date"], "backend": backend}
    found |= {
        "bandwidth": 7 * 4 * LARGE / moving,
        "launch": launch,
        "rates": rates,
        "memory": _memory(backend),
    }
    return found | {"cache": _cache() if on_cpu else 0}


def samples(kernels, functions, seconds):
    """Run each function several times on end, again and again, for about so many seconds. Return the seconds of the runs of each.

    On end, so that what a function updates stays in the caches.
    """
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < deadline:
        for function, own in zip(functions, times, strict=True):
            for _ in range(WARMING_UP):
                function()
            moments = [kernels.now()]
            for _ in range(ON_END):
                function()
                moments.append(kernels.now())
            own += [kernels.seconds_between(start, end) for start, end in itertools.pairwise(moments)]
    return times


def typical(times):
    """Return the 20th percentile: other programs and machines only take away, and the fastest run of all is luck."""
    return float(np.percentile(times, 20))


def rate(taken, launch):
    """Return how many elements a second all cores update. taken: by a launch of `in_caches`."""
    return _threads() * PASSES * IN_CACHE / max(taken - launch, taken / 2)


def _threads():
    import numba

    return numba.get_num_threads()


def launcher(kernels, formats, n, rule):
    """Return a function that launches a rule on arrays of its own."""
    case = forms.Case(formats)
    return forms.launcher(kernels, case, forms.own_arrays(kernels, case, n).values(), rule)


def in_caches(kernels, formats):
    """Return a function that launches an update in which each core has arrays of its own, which stay in its caches.

    All cores at once: two of them are not twice as fast as one.
    """
    case = forms.Case(formats)
    own = [list(forms.own_arrays(kernels, case, IN_CACHE).values()) for _ in range(_threads())]
    return forms.launcher_of_all(kernels, case, [arrays for arrays in own for _ in range(PASSES)], adam)


def _memory(backend):
    if backend == "numba-cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    if backend == "cupy":
        import cupy

        return cupy.cuda.runtime.memGetInfo()[1]
    from numba import cuda

    return cuda.current_context().get_memory_info().total


def _cache():
    """Return the bytes of the last cache of the first processor, as Linux says; 0 where it does not."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    texts = [path.read_text().strip() for path in sizes]
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
        cold = hasattr(os, "posix_fadvise")
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        read = time.perf_counter() - began
    found = {"read": DISK_BYTES / read, "write": DISK_BYTES / written, "free": shutil.disk_usage(folder).free}
    return found | {"read_from_disk": cold}


def read(path):
    """Return the constants in a file of `plan --measure --json` or of `bench --json`. Raises ValueError if there are none."""
    try:
        found = json.loads(Path(path).read_text(), parse_constant=_not_json)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("constants"), dict):
        return _checked(found["constants"], path)
    if isinstance(found, dict) and isinstance(found.get("rows"), list):
        try:
            return _checked(of_bench(found["rows"]), path)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f'{path}: its "rows" are not those of `bench --json`: {error!r}') from error
    raise ValueError(
        f'{path} has neither "constants", as `plan --measure --json` writes, nor "rows", as `bench --json` does'
    )


def _not_json(name):
    raise ValueError(f"{name} is no number")  # Python reads and writes it, others do not


def _checked(constants, path):
    for part in ("cpu", "gpu", "disk"):
        if not isinstance(own := constants.get(part, {}), dict):
            raise ValueError(f"{path}: its {part} is {own!r:.100}, and must be an object")
    for part in [part for part in ("cpu", "gpu") if part in constants]:
        own = constants[part]
        _check_number(path, part, "bandwidth", own.get("bandwidth"), "above 0")
        try:
            rates = rates_of(own)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: the rates of its {part} are not those of formats: {error}") from error
        if missing := {"name", "launch", "rates", "memory", "cache"} - set(own):
            raise ValueError(f"{path}: its {part} lacks {', '.join(sorted(missing))}")
        if not isinstance(own["name"], str):
            raise ValueError(f"{path}: the name of its {part} is {own['name']!r:.100}, and must be a string")
        for rate in rates.values():
            _check_number(path, part, "rate", rate, "above 0")
        _check_number(path, part, "launch", own["launch"], "of at least 0")
        _check_number(path, part, "cache", own["cache"], "of at least 0", int)
        if own["memory"] is not None:
            _check_number(path, part, "memory", own["memory"], "above 0", int)
    if "disk" in constants:
        for key in ("read", "write"):
            _check_number(path, "disk", key, constants["disk"].get(key), "above 0")
        _check_number(path, "disk", "free", constants["disk"].get("free"), "of at least 0", int)
    if not {"cpu", "gpu"} & set(constants):
        raise ValueError(f"{path} has no float32 rows of the limit kernel: run bench with --dtypes float32")
    return constants


def _check_number(path, part, key, value, least, kind=float):
    """Refuse what is no number, or one with which no time can be computed. kind: int for bytes, which are exact."""
    number = type(value) in (int, kind)
    if not number or not (0 if least == "of at least 0" else SMALLEST) <= value <= LARGEST:
        a_number = "an integer" if kind is int else "a number"
        raise ValueError(
            f"{path}: the {key} of its {part} is {value!r:.100}, and must be {a_number} {least}, at most {LARGEST:g}"
        )


def of_bench(rows):
    """Return the constants that rows of `bench --json` say: of float32 alone, and of no cache."""
    found = {}
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend and row["dtype"] == "float32"]
        limits = [row for row in own if row["contender"] == measure.LIMIT]
        steps = [row for row in own if row["contender"] == measure.KERNEL]
        if not limits or not steps:
            continue
        largest = max(limits, key=lambda row: row["elements"])
        launch = min(row["p50_us"] for row in steps) / 1e6
        on_cpu = backends.BACKENDS[backend].memory == "CPU"
        rate = max(row["elements"] / row["p50_us"] * 1e6 for row in steps)
        rates = [{"arrays": Arrays()._asdict(), "elements_per_second": rate}] if on_cpu else []
        facts = {key: largest[key] for key in ("cores", "date", "backend")} | {"name": largest["device"]}
        found["cpu" if on_cpu else "gpu"] = facts | {
            "bandwidth": largest["gb_per_s"] * 1e9,
            "launch": launch,
            "rates": rates,
            "memory": None,
            "cache": 0,
        }
    return found


def rates_of(processor):
    """Return the rates of a processor's constants as `machines.Processor` takes them."""
    return {Arrays(**rate["arrays"]): rate["elements_per_second"] for rate in processor.get("rates", [])}
