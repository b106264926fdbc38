"""python -m gpuadam doctor: what is installed, what works, how to mend it.

"Works" means that a real step ran on the backend and gave the bits that the arithmetic contract says, on every machine the
same: subnormals, infinities and NaN are among the 1,024 elements.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from .. import backends, hyperparameters
from ..kernels.storage import Arrays
from . import output

# sha256 of param, m, v and max_v after three steps, every NaN as one; the same on every backend and architecture.
CONTRACT_BITS = "3e5f14bc758011dea89910eacd5030398b931ff4c01c79ec8709586f785e7b3a"


def run(options):
    """Print the report; return 0 if at least one backend works."""
    report = {
        "machine": output.machine(),
        "versions": output.versions(),
        "backends": {name: _examine(name) for name in backends.BACKENDS},
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
    found = {"works": False, "reason": status.reason, "fix": status.fix, "bits": None}
    if not status.available:
        return found
    try:
        digest = step_digest(name)
    except Exception as error:  # noqa: BLE001 - whatever a driver or compiler raises is what the report is for
        fix = "mend what the message names; reinstall with " + backends.GPU_EXTRA
        return found | {"reason": f"a step failed: {type(error).__name__}: {error}", "fix": fix}
    if digest == CONTRACT_BITS:
        return found | {"works": True, "bits": "as the contract says"}
    fix = "see the warnings below; if there are none, please report it with this page"
    return found | {"reason": "a step ran and gave wrong bits", "bits": f"differ: {digest}", "fix": fix}


def step_digest(name):
    """Run three steps on a backend and return the sha256 of what they leave."""
    kernels = backends.load(name)
    arrays = [kernels.from_host(a) for a in contract_arrays()]
    views = [kernels.view(label, a) for label, a in zip(("param", "grad", "m", "v", "max_v"), arrays, strict=True)]
    for form, scalars in contract_steps():
        kernels.launch(form, views, scalars)
    return digest_of([kernels.to_host(a) for a in arrays])


def contract_steps():
    """Return (Form, Scalars) of the three steps."""
    h = hyperparameters.checked(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True, maximize=True, grad_scale=0.7
    )
    return [hyperparameters.form_and_scalars(h, step, Arrays(amsgrad=True)) for step in (1, 2, 3)]


def digest_of(arrays):
    """Return the sha256 of float32 arrays in which every NaN is one."""
    digest = hashlib.sha256()
    for array in arrays:
        bits = array.view("u4")
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        digest.update(np.where(is_nan, np.uint32(0x7FC00000), bits).astype("<u4").tobytes())
    return digest.hexdigest()


def contract_arrays(n=1024):
    """Return param, grad, m, v and max_v: every kind of float32, the same on every machine."""
    # multiples of odd constants run through all bit patterns evenly (Knuth's multiplicative hashing)
    arrays = [(np.arange(1, n + 1, dtype="u4") * np.uint32(odd)).view("f4") for odd in (2654435761, 2246822519, 3266489917)]
    arrays += [
        (np.arange(1, n + 1, dtype="u4") * np.uint32(odd) >> np.uint32(1)).view("f4") for odd in (668265263, 374761393)
    ]
    for k, array in enumerate(arrays):
        array[k * 8 : k * 8 + 4] = [0.0, np.inf, 1e-45, np.nan]
    return arrays


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
    print("with " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    print()
    for name, found in report["backends"].items():
        print(f"{'works' if found['works'] else 'NO':>7}  {name:<12} {found['reason']}")
        if found["works"]:
            print(f"{'':22}bits of a 1,024-element step: {found['bits']}")
        else:
            print(f"{'':22}to mend it: {found['fix']}")
    print()
    for name, cache in report["caches"].items():
        state = "can be written" if cache["writable"] else f"CANNOT be written: {cache['fix']}"
        print(f"{name}'s kernel cache {cache['folder']} {state}")
    for warning in report["warnings"]:
        print("Warning:", warning)
    print("Works:", ", ".join(report["works"]) or "nothing")
