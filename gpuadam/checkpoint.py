"""Checkpoints: an optimizer's state in a safetensors file that survives a crash, and that any safetensors reader can open.

The tensors are named by parameter: "w.m", "w.v" and, as they are used, "w.max_v", "w.remainder", "w.ema", "w.m_scale",
"w.v_scale", and "w.param" if the parameters were saved too. bfloat16 state is BF16, codes of 8-bit state are U8, the remainder is
I16. The metadata, all of it strings, JSON in those marked so:

    format    "gpuadam.optimizer"           version  "1"
    class     "AdamW"                       gpuadam  the version that wrote it
    options   JSON: the constructor's options, as `Adam.options`
    groups    JSON: a list of {"names", "lr", "betas", ...}; lr is null for a callable
    steps     JSON: how many calls of `step` there were
    params    JSON: name -> {"step", "dtype", "shape"}
    copies    JSON: the names of the parameters that had a copy
    crc32, header_crc32                     checksums, as in `safetensors_file`
"""

import contextlib
import errno
import json
import numbers
import os
from functools import partial

import numpy as np

from . import array_bytes, backends, checks, groups, optimizer, torch_tensors
from .arrays import Bits
from .atomic_file import replacing
from .capturable import is_array
from .checkpoint_metadata import CLASSES, FORMAT, VERSION, check_names, check_params, parsed, some
from .groups import HYPERPARAMETERS, MAPPING, ONE
from .safetensors_file import CheckpointError, Reader, Tensor, size_of, write

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int16": "I16", "uint8": "U8"}


def save(opt, path, *, with_params=False):
    """Save an optimizer: see `Adam.save`."""
    path, name = os.fsdecode(path), type(opt).__name__
    if CLASSES.get(name) is not type(opt):
        raise TypeError(
            f"{name} is not one of {', '.join(CLASSES)}, which alone can be loaded: keep its state_dict() yourself"
        )
    with_params = checks.flag("with_params", with_params)
    state_dict = opt.state_dict()
    optimizer.checked_state_dict(state_dict, opt)  # what could not be loaded is not saved either
    params = _params(opt)
    arrays = _state(opt) | ({f"{name}.param": array for name, array in params.items()} if with_params else {})
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "class": name,
        "gpuadam": _version(),
        "options": _json(opt.options),
        "groups": _json(state_dict["groups"]),
        "steps": _json(state_dict["steps"]),
        "params": _json(
            {
                name: {"step": state_dict["state"][name]["step"], "dtype": view.format, "shape": view.shape}
                for name, (_, view) in params.items()
            }
        ),
        "copies": _json(list(opt._copies)),
    }
    tensors = [
        Tensor(name, DTYPES[view.format], view.shape, partial(array_bytes.chunks, kernels, view))
        for name, (kernels, view) in arrays.items()
    ]
    try:
        with replacing(path) as file:
            write(file, tensors, metadata)
    except OSError as error:
        advice = _advice(error, path, partial(size_of, tensors, metadata))
        raise CheckpointError(f"{path!r} was not saved: {error.strerror or error}. {advice}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path!r} was not saved: {error}") from error.__cause__


def load(path, params, backend=None, *, lr=None, param_copies=None, with_params=False):
    """Make the optimizer that `Adam.save` saved: of its class, with its options, hyperparameters, step counts and state.

    params: the parameters, of the same names, shapes and dtypes, in the same groups and order; in any form that `Adam` takes, and
        on any backend. Hyperparameters in groups give way to those that were saved.
    backend, param_copies: as in `Adam`; the copies themselves are not saved.
    lr: goes before the saved learning rates; for several groups a list, in which None stands for the saved one. One that was a
        callable is not saved, so it has to be given, here or in its group. Into an array of one number, which `capturable` takes,
        the saved one is written.
    with_params: overwrite the parameters with those that were saved.

    What is read goes straight into the state; a few MB are used beside it. Nothing is cast, and nothing is executed.
    Raises CheckpointError, a ValueError, if the file is damaged, incomplete or no checkpoint, or does not fit the parameters, and
    what `Adam` raises for bad parameters; nothing of yours has changed then. FileNotFoundError if there is no such file.

    >>> import numpy as np, gpuadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "adam.safetensors")
    >>> w = np.ones(3, "float32")
    >>> opt = gpuadam.AdamW({"w": w}, lr=0.1)
    >>> opt.step({"w": w.copy()})
    >>> opt.save(path)
    >>> again = gpuadam.load(path, {"w": w})
    >>> type(again).__name__, again.steps, again.groups[0]["lr"]
    ('AdamW', 1, 0.1)
    """
    path, with_params = os.fsdecode(path), checks.flag("with_params", with_params)
    given, structures, grouped = groups.parsed_groups(params, dict.fromkeys(HYPERPARAMETERS) | {"amsgrad": False})
    names = [structure.names for structure in structures]
    # A header that was made to harm takes some 20 times its bytes in memory
    longest = 2_000_000 + sum(1000 + 20 * _in_json(name) for of_group in names for name in of_group)
    with _about(path), open(path, "rb") as file:  # noqa: PTH123 - one line with what names the path in errors
        reader = Reader(file, longest)
        saved = parsed(reader.metadata)
        check_names([group["names"] for group in saved["groups"]], names)
        check_params(saved["params"], given, backend)
        if param_copies is None and saved["copies"]:
            raise CheckpointError(
                f"{some(saved['copies'])} had copies: give param_copies=, with None for those without one now"
            )
        rates = _learning_rates(lr, given, saved["groups"])
        members = [_as_given(group, structure) for group, structure in zip(given, structures, strict=True)]
        with _not_fitting():
            opt = _made(saved, members, grouped, rates, param_copies=param_copies, backend=backend)
            loaded = optimizer.checked_state_dict(_state_dict(saved, opt, rates), opt)
        _fill(opt, reader, with_params)
        opt._go_on_from(*loaded)
    return opt


# What saving needs


def _params(opt):
    """Return name -> (kernels, View) of the parameters."""
    found = {}
    for group in opt.groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            kernels, (view,) = backends.choose([(f"params[{name!r}]", param)], opt.backend)
            found[name] = kernels, view
    return found


def _state(opt):
    """Return the name of the tensor -> (kernels, View) of the arrays of the state."""
    found = {}
    for name, state in opt.state.items():
        for key in (key for key in state if key != "step"):
            array = Bits(state[key], "bfloat16") if opt.is_bfloat16(name, key) else state[key]
            kernels, (view,) = backends.choose([(f"{key} of params[{name!r}]", array)], opt.backend)
            found[f"{name}.{key}"] = kernels, view
    return found


def _version():
    from . import __version__  # the package is not ready while this file is imported

    return __version__


def _json(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(number):
    """Return a number that JSON does not know, such as NumPy's, as one of Python's."""
    if isinstance(number, np.bool_):
        return bool(number)
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _advice(error, path, n_bytes):
    """Return what to do about an OSError of writing."""
    before = "A file that was there is as it was"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{before}. The new one has {n_bytes():,} bytes: make room for them, or save elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{before}. Save into a folder that can be read and written"
    if error.errno == errno.ENOENT:
        return "Make its folder first"
    if error.errno in (errno.EISDIR, errno.EEXIST):
        return "Give the path of a file"
    return f"{before}. See to the disk, or save elsewhere"


# What loading needs


@contextlib.contextmanager
def _about(path):
    """Name the file in errors."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path!r} cannot be loaded: {error}") from error.__cause__
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _not_fitting():
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"what it holds does not fit what was given: {error}") from error


def _in_json(name):
    """Return how many bytes a name has at most in a header, where there is JSON within JSON."""
    return len(json.dumps(json.dumps(name)))


def _learning_rates(lr, given, saved):
    """Return the learning rate that each group is made with."""
    if isinstance(lr, (list, tuple)) and len(lr) != len(saved):
        raise ValueError(f"lr has {len(lr)} entries for {len(saved)} groups: give one for each, None for the saved one")
    chosen = list(lr) if isinstance(lr, (list, tuple)) else [lr] * len(saved)
    for k, (own, group) in enumerate(zip(given, saved, strict=True)):
        if chosen[k] is None:
            chosen[k] = own["lr"] if group["lr"] is None or is_array(own["lr"]) else group["lr"]
        if chosen[k] is None:
            raise CheckpointError(f"the learning rate of group {k} was a callable, which is not saved: give lr=")
    return chosen


def _as_given(group, structure):
    """Return the parameters of a group in the form that they were given in, but for iterators, which can be read once."""
    if structure.kind == MAPPING:
        return dict(zip(group["names"], group["params"], strict=True))
    return group["params"][0] if structure.kind == ONE else group["params"]


def _made(saved, members, grouped, rates, **given):
    """Return an optimizer whose state is zero."""
    settings = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items() if key != "names"} | {"lr": rate}
        for group, rate in zip(saved["groups"], rates, strict=True)
    ]
    make = CLASSES[saved["class"]]
    if grouped:
        of_groups = [{"params": of_group} | own for of_group, own in zip(members, settings, strict=True)]
        return make(of_groups, **saved["options"], **given)
    return make(members[0], **settings[0], **saved["options"], **given)


def _state_dict(saved, opt, rates):
    """Return what was saved as `state_dict` has it, without the arrays."""
    now = opt.state_dict()
    settings = []
    for own, group, rate in zip(now["groups"], saved["groups"], rates, strict=True):
        keeps_its_own = not (is_array(rate) and group["lr"] is not None)
        settings.append(own | {"lr": own["lr"] if keeps_its_own else group["lr"]})
    states = {name: state | {"step": saved["params"][name]["step"]} for name, state in now["state"].items()}
    return {"steps": saved["steps"], "groups": settings, "state": states}


def _fill(opt, reader, with_params):
    """Read the arrays: those of the state, and only when all of them were right the parameters."""
    state, params = _state(opt), {f"{name}.param": array for name, array in _params(opt).items()}
    if with_params and (missing := [name for name in params if name not in reader.tensors]):
        raise CheckpointError(f"it does not have {some(missing)}: the parameters are saved by save(path, with_params=True)")
    if missing := [name for name in state if name not in reader.tensors]:
        raise CheckpointError(f"it does not have {some(missing)}")
    if extra := [name for name in reader.tensors if name not in state and name not in params]:
        raise CheckpointError(f"it has {some(extra)}, for which this optimizer has no place")
    wanted = state | (params if with_params else {})
    for name, (_, view) in wanted.items():
        entry = reader.tensors[name]
        if (entry.dtype, entry.shape) != (DTYPES[view.format], view.shape):
            raise CheckpointError(
                f"{name!r} is {entry.dtype} {entry.shape}, and has to be {DTYPES[view.format]} {view.shape}"
            )
        with _not_fitting():
            checks.no_gaps(view)
    for name in params if with_params else ():
        reader.verify(name)
    given = [param for group in opt.groups for param in group["params"]]
    if with_params and torch_tensors.among([given]):
        torch_tensors.wrote(given)
    for name, (kernels, view) in wanted.items():
        reader.read(name, array_bytes.buffers(kernels, view))
