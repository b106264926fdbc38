"""Which arrays belong to which backend; a backend is loaded on first use; why one is unavailable.

`cupy` and `numba-cuda` update arrays in CUDA memory, `numba-cpu` arrays in the CPU's. The arrays decide: there is no copy between
devices, and no fallback from one to the other. To add a backend: a class in kernels/ and a row in BACKENDS, or `register`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from . import checks, torch_tensors
from .kernels import array_bytes
from .kernels import view as arrays
from .kernels.backend import Backend
from .kernels.messages import shown
from .kernels.operands import widened

WARNED = "let this warning pass: give no -W error, or unset PYTHONWARNINGS"
GPU_EXTRA = 'pip install "gpuadam[cuda13]" (or cuda12: `nvidia-smi` shows what the driver takes)'
DRIVER = "on a machine with an NVIDIA GPU, install its driver; `nvidia-smi` should then list the GPU"


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for, or that the arrays belong to, cannot run here. The message says why and what to do."""


class Status(NamedTuple):
    """Whether a backend can run here, why (not), and what mends it."""

    available: bool
    reason: str
    fix: str = ""


class Row(NamedTuple):
    """What is known of a backend before it is loaded."""

    name: str
    module: str  # whose `backend` is the instance of `kernels.backend.Backend`
    memory: str  # "CUDA" or "CPU"
    package: str = ""  # whose arrays are its own
    needs: str = ""  # a module that has to be installed
    library: str = ""  # the module's name in errors
    install: str = "as you installed it"  # how to install it


# Most preferred first.
BACKENDS = {
    row.name: row
    for row in (
        Row("cupy", "gpuadam.kernels.cupy_backend", "CUDA", "cupy", "cupy", "CuPy", GPU_EXTRA),
        Row("numba-cuda", "gpuadam.kernels.numba_cuda_backend", "CUDA", "numba", "numba_cuda", "numba-cuda", GPU_EXTRA),
        Row("numba-cpu", "gpuadam.kernels.cpu_backend", "CPU", "numpy", "numba", "Numba", "pip install numba"),
    )
}


def register(backend: Backend, package: str = "") -> None:
    """Register a backend, less preferred than the others. `backend=`, `use_backend` and GPUADAM_BACKEND then take its name.

    backend: an instance of a subclass of `gpuadam.kernels.backend.Backend`, which its module calls `backend`. package: the
    top-level package whose arrays go to it by themselves. Raises ValueError if there is a backend of this name.
    """
    if backend.name in BACKENDS:
        raise ValueError(f"there is a backend {shown(backend.name)} already")
    BACKENDS[backend.name] = Row(backend.name, type(backend).__module__, backend.memory, package)


def unregister(name: str) -> None:
    """Forget a backend that was registered."""
    del BACKENDS[_known(name, "unregister")]
    load.cache_clear()
    _probe.cache_clear()


_environment = os.environ.get("GPUADAM_BACKEND")
_chosen: ContextVar[str | None] = ContextVar("gpuadam_backend", default=None)


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run here, most preferred first.

    >>> "numba-cpu" in available_backends()
    True
    """
    return tuple(name for name, status in backend_status().items() if status.available)


def some_available():
    """Return the same, or raise BackendUnavailableError if there are none, with all that mends it."""
    if not (names := available_backends()):
        of_each = "; ".join(
            f"{name}: {status.reason} (to mend it: {status.fix})" for name, status in backend_status().items()
        )
        raise BackendUnavailableError(f"no backend is available. {of_each}")
    return names


def backend_status() -> dict[str, Status]:
    """Return, for each backend's name, whether it can run here, why (not), and what mends it.

    >>> backend_status()["numba-cpu"].available
    True
    """
    return {name: _probe(name) for name in BACKENDS}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend, as if every call within the `with` block had `backend=name`.

    The environment variable GPUADAM_BACKEND, read when gpuadam is imported, does so for a whole process. A `backend=` argument
    goes before both. Threads that are started inside the block do not inherit it.

    >>> import gpuadam
    >>> with gpuadam.use_backend("numba-cpu"):
    ...     pass
    """
    token = _chosen.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


@functools.cache
def load(name):
    """Import a backend and return it, an instance of `kernels.backend.Backend`, or raise BackendUnavailableError."""
    status = _probe(name)
    if not status.available:
        others = ", ".join(available_backends()) or "none"
        raise BackendUnavailableError(
            f"backend {shown(name)} is not available: {status.reason}. To mend it: {status.fix}. Available: {others}"
        )
    return importlib.import_module(BACKENDS[name].module).backend


def forced(backend=None):
    """Return the backend that a call with this `backend=` has to use, or None if the arrays decide."""
    return (_chosen.get() or _environment or None) if backend is None else backend


def takes_numpy(backend=None):
    """Whether a call with this `backend=` would give NumPy arrays to numba-cpu."""
    return forced(backend) in (None, "numba-cpu")


def choose(named_arrays, backend=None):
    """Return (the backend, a View of each array).

    named_arrays: (name, array) pairs. Raises TypeError if no one backend holds them all, ValueError for an unknown name,
    BackendUnavailableError if the backend cannot run here.
    """
    given = [_given(name, array) for name, array in named_arrays]
    name = forced(backend)
    source = ""
    if name is not None:
        source = _source(name)
        chosen = BACKENDS[_known(name, source)]
        strangers = [one for one in given if one.memory != chosen.memory]
        if strangers:
            raise TypeError(
                f"backend {chosen.name!r} holds arrays in {chosen.memory} memory, and nothing is copied between devices: "
                f"{_listing(strangers)}{OF_SOURCE[source]}"
            )
    else:
        owners = {_owner(one.plain, one.memory).name for one in given}
        if len(owners) > 1:
            raise TypeError(
                f"the arrays of one update must come from one library: {_listing(given)}. Convert them, or give backend= if one "
                "backend can hold them all"
            )
        chosen = BACKENDS[owners.pop()]
    try:
        kernels = load(chosen.name)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(f"{error}{OF_SOURCE[source]}") from None
    return kernels, [_view(kernels, one) for one in given]


# What errors about a backend say of where its name comes from
OF_SOURCE = {
    "": "",
    "backend": "",
    "use_backend": ". use_backend asks for it",
    "GPUADAM_BACKEND": ". The environment variable GPUADAM_BACKEND asks for it: unset it, and the arrays decide",
}


def _source(name):
    """Return where the name of a backend comes from that a call has to use: an optimizer keeps the one that it was made with."""
    if name == _chosen.get():
        return "use_backend"
    return "GPUADAM_BACKEND" if name == _environment else "backend"


class _Given(NamedTuple):
    """An array of a caller, and what is known before a backend views it."""

    name: str
    array: Any  # as the caller gave it, without Bits
    plain: Any  # the array that holds its memory
    memory: str
    bits: str  # the format that the elements stand for, or ""
    immutable: str  # why it must not be written, if its library says so


def _given(name, array):
    bits = why = ""
    if type(array) is arrays.Bits:
        bits, array = checks.format_of_bits(name, array), checks.given(name, array.array)
    plain = array
    if torch_tensors.is_tensor(array):
        plain, why = torch_tensors.plain(name, array), torch_tensors.why_immutable(array)
        if type(plain) is arrays.Bits:
            plain, bits = plain
    elif arrays.is_jax(array):
        why = (
            "is a jax.Array, and JAX takes for granted that these never change. Keep it as np.array(x), update that, and give "
            "JAX jnp.array(x). As a gradient it is fine"
        )
    return _Given(name, array, plain, _memory(name, plain), bits, why)


def _view(kernels, given):
    view = kernels.view(given.name, given.plain)
    if view.dtype.kind == "c":
        view = view.in_parts()
    if given.bits:
        view = checks.bits(view, given.bits)
    return view._replace(writeable=False, immutable=given.immutable) if given.immutable else view


def _listing(given):
    return ", ".join(f"{one.name} is {arrays.a_kind(one.array)} in {one.memory} memory" for one in given)


def number(name, array):
    """Return what an array of one element holds, as a number of Python's. On a GPU this waits for the device."""
    kernels, (view,) = choose([(name, array)])
    if view.size != 1 or view.dtype.kind not in "biuf":
        raise ValueError(f"{name} is an array of dtype {view.format} and shape {view.shape}: it must be one real number")
    return widened(np.frombuffer(b"".join(array_bytes.chunks(kernels, view)), view.dtype), view.format).item()


def on_host(name, value):
    """Return a number that may be in an array as a number of Python's, but an array on a GPU as it is."""
    if not arrays.is_array(value) or _given(name, value).memory == "CUDA":
        return value
    return number(name, value)


def home(name, array):
    """Return the name of the backend that an array belongs to, whichever one is in use. name: what errors call the array."""
    array = array.array if type(array) is arrays.Bits else array
    return _owner(array, _memory(name, array)).name


def _known(name, source):
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source}: there is no backend {shown(name)}, only {', '.join(BACKENDS)}")
    return name


def _memory(name, array):
    """Return "CPU" or "CUDA", without importing anything."""
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a masked array, and an update cannot heed its mask: pass x.data, or x.filled(0) where 0 is meant"
            )
        if hasattr(type(array), "__cuda_array_interface__"):  # Numba's managed and mapped arrays, and slices of them
            raise TypeError(
                f"{name} is {arrays.a_kind(array)}, whose memory is the host's and a GPU's too: pass numba.cuda.as_cuda_array(x) "
                "to have it updated on the GPU, or np.asarray(x) on the CPU, once the device has done its work"
            )
        return "CPU"
    if arrays.always_cuda(array):
        return "CUDA"
    if isinstance(array, type) or array is None:
        raise TypeError(f"{name} is {shown(array)}, not an array")
    try:
        if hasattr(array, "__cuda_array_interface__"):
            return "CUDA"
        device = array.__dlpack_device__() if hasattr(array, "__dlpack_device__") else None
        device_type = device and int(device[0])
    except Exception as error:  # libraries refuse in their own ways; torch alone has two
        raise TypeError(f"{name}, {arrays.a_kind(array)}, does not share its memory: {error}") from error
    if isinstance(array, np.generic):
        raise TypeError(
            f"{name} is {arrays.a_kind(array)}, a number and not an array, as NumPy's arithmetic makes of arrays of no "
            "dimensions: pass np.asarray(x) as a gradient, and keep np.array(x) as a parameter"
        )
    if device_type is None:
        raise TypeError(f"{name} is {arrays.a_kind(array)}, not an array: {_instead(name, array)}")
    names = {1: "CPU", 3: "CPU", 2: "CUDA", 13: "CUDA"}  # DLDeviceType: kDLCPU, kDLCUDAHost, kDLCUDA, kDLCUDAManaged
    if device_type not in names:
        raise TypeError(f"{name} is on a device of DLPack type {device_type}; only CPU and CUDA memory can be updated")
    return names[device_type]


def _instead(name, array):
    """Return what to give in the place of what is no array. name: what errors call it."""
    if hasattr(array, "named_parameters"):
        return "give the parameters of a model, as dict(model.named_parameters())"
    operand = name.partition(" ")[0]
    if operand == "where" and isinstance(array, (bool, list, tuple)):
        return "np.asarray(x, bool), or cupy.asarray, has a flag for each element or row"
    if operand == "where":
        return f"it has a flag for each element or row: {checks.FLAGS_OF_INDICES}"
    if operand == "lr_scale" and isinstance(array, (int, float)):
        return (
            "multiply lr, of the group, by a number for all elements. np.full(shape, x, 'float32') has it for each of them"
        )
    if isinstance(array, (set, frozenset)):
        return "a set has no order; give a list, or a dict with names"
    if isinstance(array, Mapping):
        return "a dict of parameters holds arrays, not dicts; give all of them in one, with names such as 'layer.weight'"
    if isinstance(array, (list, tuple)) and any(map(arrays.is_array, array)):
        return "give the arrays in one list or dict that has no lists in it"
    if name == "grad" or name.startswith("the gradient of "):
        if isinstance(array, (int, float)):
            return "nothing is broadcast. np.full_like(param, x), or cupy.full_like, has a number in all places"
        if isinstance(array, (list, tuple)):
            return "np.asarray(x, 'float32') makes an array of numbers, and cupy.asarray does for parameters of CuPy"
    if isinstance(array, (int, float, list, tuple)):
        return "x = np.array(x, 'float32') is one, which can be updated in place"
    return "NumPy, CuPy, Numba device arrays and whatever has DLPack or __cuda_array_interface__ can be updated in place"


def _owner(array, memory):
    """Return the backend of an array: its library's own, else the most preferred that is available for its memory."""
    package = type(array).__module__.partition(".")[0].replace("numba_cuda", "numba")
    for backend in BACKENDS.values():
        if backend.memory == memory and backend.package == package:
            return backend
    fitting = [b for b in BACKENDS.values() if b.memory == memory]
    return next((b for b in fitting if _probe(b.name).available), fitting[0])


@functools.cache
def _probe(name):
    row = BACKENDS[name]
    try:
        if row.needs and importlib.util.find_spec(row.needs) is None:
            return Status(False, f"{row.library} is not installed", row.install)
        available, reason, *fix = importlib.import_module(row.module).backend.status()
        return Status(available, reason, *(fix or ["" if available else DRIVER]))
    except Exception as error:  # noqa: BLE001 - a GPU library can fail in any way when imported; the reason is kept
        if isinstance(error, Warning):  # `python -W error` makes errors of warnings
            return Status(False, f"its import warned, and warnings are errors here: {type(error).__name__}: {error}", WARNED)
        if isinstance(error, ValueError) and "Number of threads" in str(error) and "NUMBA_NUM_THREADS" in os.environ:
            fix = "set NUMBA_NUM_THREADS to 1 or more, or unset it"
            return Status(False, f"NUMBA_NUM_THREADS={shown(os.environ['NUMBA_NUM_THREADS'])}: {error}", fix)
        fix = (
            "set CUPY_CACHE_DIR to a folder that can be written"
            if name == "cupy" and isinstance(error, OSError) and error.filename  # not of a library that cannot be opened
            else f"reinstall it: {row.install}"
        )
        return Status(False, f"it cannot be loaded: {type(error).__name__}: {error}", fix)
