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

What many ranks save is in a folder, where index.safetensors has these metadata (`stored_arrays.py`), and also

    reduction "mean" or "sum"
    parts     JSON: the files that have the tensors
"""

import os

from .. import checks, optimizer, torch_tensors
from ..sharded import transports
from ..step_counts import is_array
from .file import written
from .format import CLASSES, of_optimizer, of_param, some
from .loading import about, arguments, not_fitting, opened
from .safetensors import CheckpointError
from .tensors import PARAM, arrays_of, tensor


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
    arrays = arrays_of(opt)
    states = state_dict["state"]
    params = {
        own.param: of_param(view, states[own.param]["step"]) for (own, key), (_, view) in arrays.items() if key == PARAM
    }
    metadata = of_optimizer(name, opt.options, state_dict["groups"], state_dict["steps"], params, opt._copies)
    kept = [(of, found) for of, found in arrays.items() if with_params or of[1] != PARAM]
    written(path, [tensor(f"{own.param}.{key}", *found) for (own, key), found in kept], metadata)


def load(path, params, backend=None, *, lr=None, param_copies=None, with_params=False):
    """Make the optimizer that `Adam.save` saved: of its class, with its options, hyperparameters, step counts and state.

    path: of the file, or of the folder that `ShardedAdam.save` made, from any number of ranks.
    params: the parameters, of the same names, shapes and dtypes, in the same groups and order; in any form that `Adam` takes, and
        on any backend. Hyperparameters in groups give way to those that were saved.
    backend, param_copies: as in `Adam`; the copies themselves are not saved.
    lr: goes before the saved learning rates; for several groups a list, in which None stands for the saved one. One that was a
        callable is not saved, so it has to be given, here or in its group. Into an array of one number, which `capturable` takes,
        the saved one is written.
    with_params: overwrite the parameters with those that were saved.

    What is read goes straight into the state; a few MB are used beside it. Nothing is cast, and nothing is executed.
    Raises CheckpointError, a ValueError, if the checkpoint is damaged, incomplete or none, or does not fit the parameters, and
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
    with about(path), opened(path, params, backend, lr) as given:
        stored = given.stored
        stored.find(transports.Local())
        name, copies = stored.saved["class"], stored.saved["copies"]
        if name not in CLASSES:
            raise CheckpointError(f"its class {name} is one of gpuadam.ShardedAdam alone: load it with gpuadam.load_sharded")
        if param_copies is None and copies:
            raise CheckpointError(f"{some(copies)} had copies: give param_copies=, with None for those without one now")
        positional, settings = arguments(given)
        with not_fitting():
            opt = CLASSES[name](
                positional, **settings, **stored.saved["options"], param_copies=param_copies, backend=backend
            )
            loaded = optimizer.checked_state_dict(_state_dict(stored.saved, opt, given.rates), opt)
        _fill(opt, stored, with_params)
        opt._go_on_from(*loaded)
    return opt


def _state_dict(saved, opt, rates):
    """Return what was saved as `state_dict` has it, without the arrays."""
    now = opt.state_dict()
    settings = []
    for own, group, rate in zip(now["groups"], saved["groups"], rates, strict=True):
        keeps_its_own = not (is_array(rate) and group["lr"] is not None)
        settings.append(own | {"lr": own["lr"] if keeps_its_own else group["lr"]})
    states = {name: state | {"step": saved["params"][name]["step"]} for name, state in now["state"].items()}
    return {"steps": saved["steps"], "groups": settings, "state": states}


def _fill(opt, stored, with_params):
    """Read the arrays: those of the state, and only when all of them were right the parameters."""
    arrays = arrays_of(opt)
    state, params = ({of: found for of, found in arrays.items() if (of[1] == PARAM) == own} for own in (False, True))
    stored.check(arrays, with_params)
    with not_fitting():
        for _, view in (arrays if with_params else state).values():
            checks.no_gaps(view)
    for of, found in state.items():
        stored.read(*of, *found)
    if with_params:
        for own, key in params:
            stored.verify(own.param, key)
        torch_tensors.wrote([param for group in opt.groups for param in group["params"]])
        for of, found in params.items():
            stored.read(*of, *found)
