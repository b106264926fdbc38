"""python -m gpuadam doctor: what is installed, what works, how to mend it.

A backend works if real steps ran on it, in float32 and in narrow formats, and gave the bits of the arithmetic contract
(`contract.py`). `installed.py` looks at the rest.
"""

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np

import gpuadam

from .. import backends
from ..kernels import cuda_linker
from ..kernels.messages import shortened
from ..terminal import output
from . import contract, installed
from .measuring import facts, pages

HELP = "what is installed, what works, how to mend it"
AS_THE_CONTRACT = "as the contract says"
BY_DRIVER, BY_LIBRARY = "repeated by the driver", "made by the library each time, which takes the host longer"


def add_options(parser):
    """Add nothing: `--json` is enough."""


def run(options):
    """Print the report; return 0 if at least one backend works."""
    report = {
        "machine": facts.machine(),
        "versions": facts.versions() | facts.versions_of(installed.PACKAGES),
        "backends": {name: _examine(name) for name in backends.BACKENDS},
        "cuda_libraries": _cuda_libraries(),
        "parts": installed.parts(),
        "caches": _caches(),
        "huge_pages": pages.system(),
        "warnings": _warnings(),
    }
    report["works"] = [name for name, part in report["backends"].items() if part["works"]]
    if options.json != "-":
        _print(output.console(options), report)
    output.write_json(options.json, report)
    return 0 if report["works"] else 1


def _examine(name):
    """Do the steps of the contract on a backend, and return the report on it."""
    status = backends.backend_status()[name]
    if not status.available:
        found = installed.part(False, status.reason, status.fix)
        return found | {"bits": None, "steps": {}, "launches": None, "linked": None}
    linked, text = _linked(name)
    steps, wrong, fix = {}, [], status.fix
    failed: dict[str, list[str]] = {}  # by what was raised
    for label, known in contract.CONTRACTS.items():
        try:
            digest = contract.digest_on(name, known)
        except Exception as error:  # noqa: BLE001 - whatever a driver or compiler raises is what the report is for
            steps[label] = "failed"
            failed.setdefault(f"{type(error).__name__}: {error}", []).append(label)
        else:
            steps[label] = AS_THE_CONTRACT if digest == known.bits else f"differ: {digest}"
            if digest != known.bits:
                wrong.append(f"a step ran and gave wrong bits ({label})")
                fix = fix or "see the warnings below; if there are none, please report it with this page"
    wrong += [f"a step failed ({', '.join(labels)}): {said}" for said, labels in failed.items()]
    if failed:
        fix = f"mend what the message names; reinstall it: {backends.BACKENDS[name].install}"
        if linked and linked.is_too_new:
            fix = linked.fix
    launches = None
    if any(said != "failed" for said in steps.values()):
        try:
            launches = _launches(name)
        except Exception as error:  # noqa: BLE001 - likewise
            wrong.append(f"steps of an optimizer failed: {type(error).__name__}: {error}")
            fix = fix or "please report it with this page"
    found = installed.part(not wrong, "; ".join(wrong) or status.reason, fix)
    return found | {"bits": steps["float32"], "steps": steps, "launches": launches, "linked": text}


def _linked(name):
    """Return the `cuda_linker.Linked` of numba-cuda, or None, and what is said of it. Of other backends nothing is."""
    if name != "numba-cuda":
        return None, None
    try:
        linked = backends.load(name).linked()
    except Exception as error:  # noqa: BLE001 - whatever a driver or compiler raises is what the report is for
        return None, f"what links the PTX of NVVM cannot be told: {type(error).__name__}: {shortened(str(error))}"
    return linked, linked.text


def _launches(name):
    """Return who makes the launches of an optimizer's later steps on a GPU; None on a CPU."""
    kernels = backends.load(name)
    if kernels.memory == "CPU":
        return None
    param, grad = (kernels.from_host(np.ones(1024, "float32")) for _ in range(2))
    opt = gpuadam.Adam([param], backend=name)
    for _ in range(3):  # the first compiles, the second records a launch, the third repeats it
        opt.step([grad])
    batches = opt.kept_batches()
    kernels.to_host(param)  # waits for them
    if batches and all(batch.recorded for batch in batches):
        return BY_DRIVER
    refused = getattr(kernels, "capture_refused", "").partition(". ")[0]  # what a backend of others may not have
    return BY_LIBRARY + (f" (it could not be captured: {shortened(refused)})" if refused else "")


def _cuda_libraries():
    """Return {library: its version and path, or why there is none}. One of an older CUDA refuses what a newer one compiled."""
    found: dict[str, str] = {}
    for name in cuda_linker.LIBRARIES:
        try:
            path, version = cuda_linker.library(name)
            found[name] = " ".join(filter(None, (version and ".".join(map(str, version)), os.path.realpath(path))))
        except ImportError:  # no package of NVIDIA's is there
            return {}
        except (RuntimeError, OSError, AttributeError) as error:
            found[name] = f"not found: {error}".splitlines()[0]
    return found


def _caches():
    """Return, for the compile cache of each library that is installed, its folder and whether it can be written."""
    folders = {}
    if importlib.util.find_spec("cupy"):
        folders["CuPy"] = os.environ.get("CUPY_CACHE_DIR") or str(Path("~/.cupy/kernel_cache").expanduser())
    if "numba-cpu" in backends.available_backends():
        compiled_cache = importlib.import_module("gpuadam.kernels.compiled_cache")  # not before: it imports Numba
        folders["Numba"] = compiled_cache.folder()  # None if there is none that can be written
    caches = {}
    for library, folder in folders.items():
        writable, fix = bool(folder) and _writable(Path(folder)), f"set {library.upper()}_CACHE_DIR"
        caches[library] = {"folder": folder or "(no folder)", "writable": writable, "fix": fix}
    return caches


def _writable(folder):
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def _warnings():
    cupys = [name for name, version in facts.versions().items() if name.startswith("cupy") and version]
    folder = os.environ.get("NUMBA_CACHE_DIR")
    warnings = []
    if np.float32(1e-38) * np.float32(0.01) == 0:
        flushing = "this thread flushes subnormal numbers to zero (FTZ), so the CPU's bits differ"
        warnings.append(f"{flushing}: some library set it, such as torch.set_flush_denormal(True)")
    if len(cupys) > 1:
        warnings.append(f"{' and '.join(cupys)} are installed together and break each other: uninstall all but one")
    if folder and not _writable(Path(folder)):
        elsewhere = "so Numba keeps compiled kernels elsewhere, if anywhere"
        warnings.append(f"NUMBA_CACHE_DIR={folder} cannot be written, {elsewhere}")
    return warnings


def _print(console, report):
    versions = [f"{name} {version}" for name, version in report["versions"].items() if version]
    console.print(f"{versions[0]} on {report['machine']['system']}, {report['machine']['cpu']}")
    console.print("with " + ", ".join(versions[1:]), indent=5)
    for parts in (report["backends"], report["parts"]):
        console.print()
        for name, part in parts.items():
            mark = {True: "works", False: "NO", None: "-"}[part["works"]]
            console.print(f"{mark:>7}  {name:<13} {part['reason']}", indent=23)
            if not part["works"]:
                console.print(f"{'':23}to mend it: {part['fix']}", indent=23)
            if part.get("linked"):
                console.print(f"{'':23}{part['linked']}", indent=23)
            for label, bits in part.get("steps", {}).items():
                console.print(f"{'':23}bits of a step, {label}: {bits}", indent=23)
            if part.get("launches"):
                console.print(f"{'':23}launches of later steps: {part['launches']}", indent=23)
    console.print()
    for library, where in report["cuda_libraries"].items():
        console.print(f"CUDA's {library} {where}", indent=5)
    for name, cache in report["caches"].items():
        state = "can be written" if cache["writable"] else f"CANNOT be written: {cache['fix']}"
        console.print(f"{name}'s kernel cache {cache['folder']} {state}", indent=5)
    console.print(pages.described(report["huge_pages"]), indent=5)
    for warning in report["warnings"]:
        console.print(f"Warning: {warning}", indent=5)
    console.print(f"Works: {', '.join(report['works']) or 'nothing'}")
