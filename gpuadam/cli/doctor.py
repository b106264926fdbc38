"""python -m gpuadam doctor: what is installed, what works, how to mend it.

A backend works if real steps ran on it, in float32 and in narrow formats, and gave the bits that the arithmetic contract says
(`contract.py`).
"""

import os
import tempfile
import textwrap
from pathlib import Path

import numpy as np

from .. import backends
from . import contract, installed, output

AS_THE_CONTRACT = "as the contract says"


def run(options):
    """Print the report; return 0 if at least one backend works."""
    report = {
        "machine": output.machine(),
        "versions": output.versions() | output.versions_of(installed.PACKAGES),
        "backends": {name: _examine(name) for name in backends.BACKENDS},
        "parts": installed.parts(),
        "caches": _caches(),
        "warnings": _warnings(),
    }
    report["works"] = [name for name, found in report["backends"].items() if found["works"]]
    if options.json:
        output.write_json(options.json, report)
    if options.json != "-":
        _print(report)
    return 0 if report["works"] else 1


def _examine(name):
    status = backends.backend_status()[name]
    found = {"works": False, "reason": status.reason, "fix": status.fix, "bits": None, "steps": {}}
    if not status.available:
        return found
    wrong = []
    for label, known in contract.CONTRACTS.items():
        try:
            digest = contract.digest_on(name, known)
        except Exception as error:  # noqa: BLE001 - whatever a driver or compiler raises is what the report is for
            found["steps"][label] = "failed"
            wrong.append(f"a step failed ({label}): {type(error).__name__}: {error}")
            found["fix"] = "mend what the message names; reinstall with " + backends.GPU_EXTRA
            continue
        found["steps"][label] = AS_THE_CONTRACT if digest == known.bits else f"differ: {digest}"
        if digest != known.bits:
            wrong.append(f"a step ran and gave wrong bits ({label})")
            found["fix"] = found["fix"] or "see the warnings below; if there are none, please report it with this page"
    found["bits"] = found["steps"]["float32"]
    return found | ({"reason": "; ".join(wrong)} if wrong else {"works": True})


def _caches():
    """Return, for each compile cache, its folder and whether it can be written."""
    cupy = os.environ.get("CUPY_CACHE_DIR") or str(Path("~/.cupy/kernel_cache").expanduser())
    caches = {"CuPy": {"folder": cupy, "writable": _writable(Path(cupy)), "fix": "set CUPY_CACHE_DIR"}}
    if "numba-cpu" in backends.available_backends():
        folder = _numba_folder()
        caches["Numba"] = {"folder": folder or "(no folder)", "writable": folder is not None, "fix": "set NUMBA_CACHE_DIR"}
    return caches


def _numba_folder():
    from ..kernels import compiled_cache

    return compiled_cache.folder()


def _writable(folder):
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def _warnings():
    warnings = []
    if np.float32(1e-38) * np.float32(0.01) == 0:
        warnings.append(
            "this thread flushes subnormal numbers to zero (FTZ), so the CPU's bits differ: some library set it, such as "
            "torch.set_flush_denormal(True)"
        )
    cupys = [name for name, version in output.versions().items() if name.startswith("cupy") and version]
    if len(cupys) > 1:
        warnings.append(f"{' and '.join(cupys)} are installed together and break each other: uninstall all but one")
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    if wanted and not _writable(Path(wanted)):
        warnings.append(
            f"NUMBA_CACHE_DIR={wanted} cannot be written, so Numba keeps compiled kernels elsewhere, if anywhere"
        )
    return warnings


def _print(report):
    versions = dict(report["versions"])
    print(f"gpuadam {versions.pop('gpuadam')} on {report['machine']['system']}, {report['machine']['cpu']}")
    with_them = "with " + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    print(textwrap.fill(with_them, 120, subsequent_indent="     ", break_on_hyphens=False))
    print()
    for name, found in report["backends"].items():
        _print_part(name, found)
        for label, bits in found["steps"].items():
            print(f"{'':23}bits of a 1,024-element step, {label}: {bits}")
    print()
    for name, found in report["parts"].items():
        _print_part(name, found)
    print()
    for name, cache in report["caches"].items():
        state = "can be written" if cache["writable"] else f"CANNOT be written: {cache['fix']}"
        print(f"{name}'s kernel cache {cache['folder']} {state}")
    for warning in report["warnings"]:
        print("Warning:", warning)
    print("Works:", ", ".join(report["works"]) or "nothing")


def _print_part(name, found):
    mark = {True: "works", False: "NO", None: "-"}[found["works"]]
    print(f"{mark:>7}  {name:<13} {found['reason']}" + (f": {found['fix']}" if found["works"] is None else ""))
    if found["works"] is False:
        print(f"{'':23}to mend it: {found['fix']}")
