"""Loading an `OffloadAdam` from a checkpoint of its own or of `Adam`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from .. import backends, checks, torch_tensors
from ..checkpoint.format import ALGORITHMS
from ..checkpoint.loading import about, check_copies, fill, not_fitting, opened
from ..checkpoint.safetensors import require
from ..groups import named_params
from ..kernels.messages import shown
from ..typing import FilePath, LearningRate, LikeParams, Number, Params, Side, StateDtype
from .folder import check_new
from .optimizer import OffloadAdam, check_place, let_go
from .state import copy_master


def load_offload(
    path: FilePath,
    params: Params,
    backend: str | None = None,
    *,
    lr: LearningRate | Sequence[LearningRate | None] | None = None,
    param_copies: LikeParams = None,
    with_params: bool | None = None,
    state_dtype: StateDtype | None = None,
    names: Mapping[str, str] | None = None,
    state: FilePath = "memory",
    budget: Number = 1 << 28,
    update: Side = "auto",
    master: Literal["float32"] | None = None,
    progress: bool = False,
) -> OffloadAdam:
    """Make an `OffloadAdam` from a checkpoint of `OffloadAdam`, `Adam` or `AdamW`: its options, hyperparameters, counts, state.

    path, params, backend, lr, param_copies, with_params, state_dtype, names: as in `gpuadam.load`; the checkpoint may be a folder
        of many ranks, too.
    state: "memory", or the path of a folder that is not there yet or is empty. budget, update, progress: as in `OffloadAdam`.
    master: "float32" if bfloat16 and float16 parameters are the copies of float32 masters. A checkpoint has the masters as the
        parameters, with_params or not: that of an OffloadAdam with masters, or of an Adam of float32 parameters with
        `param_copies`, which was saved with_params. Masters are state, so loading them causes no warning. `master="remainder"` is
        in the checkpoint and is not given here.

    Training goes on bit for bit. Raises CheckpointError and the other errors of `gpuadam.load` and of `OffloadAdam`. Nothing of
    the caller's has changed then, and a folder that was made is taken away.

    >>> import numpy as np, gpuadam, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> w = np.ones(3, "float32")
    >>> opt = gpuadam.AdamW({"w": w}, lr=0.1)
    >>> opt.step({"w": w.copy()})
    >>> opt.save(folder / "adam.safetensors")
    >>> with gpuadam.load_offload(folder / "adam.safetensors", {"w": w}, state=folder / "state") as again:
    ...     print(again.steps, again.groups[0]["lr"], again.decoupled)
    1 0.1 True
    """
    path = checks.path("path", path)
    check_place(state)
    if master is not None:
        checks.one_of(("float32",), "master", master)
    of_masters = master is not None
    with about(path), opened(path, params, backend, lr, with_params, state_dtype, of_masters, names) as checkpoint:
        saved = checkpoint.stored.saved
        algorithm, decoupled = ALGORITHMS[saved.name]
        known = "which OffloadAdam is not: it is Adam or AdamW"
        require(algorithm == "adam", f"its class is {shown(saved.name)}, {known}")
        require(not saved.options.get("capturable"), "it is of a capturable optimizer, which an OffloadAdam cannot be")
        if master is None:
            check_copies(saved.copies, param_copies)
        settings = checkpoint.hyperparameters | saved.options
        settings |= {"decoupled": decoupled, "master": master or saved.options.get("master"), "param_copies": param_copies}
        if state != "memory":
            check_new(state)
        with not_fitting():
            opt = OffloadAdam(
                checkpoint.params, **settings, backend=backend, state=state, budget=budget, update=update, progress=progress
            )
        try:
            fill(opt, checkpoint, with_params, path)
        except BaseException:
            opt.discard()
            raise
    if with_params and master is not None:
        _show_masters(opt)
    let_go(opt)
    return opt


def _show_masters(opt):
    """Make narrow parameters the rounded copies of their masters, as a step does."""
    for name, param in named_params(opt.groups):
        if "master" in opt.state[name]:
            kernels, (view,) = backends.choose([(opt.arrangement.label(name), param)], opt.backend)
            copy_master(opt.state[name]["master"], view, kernels, to_master=False)
            torch_tensors.wrote([param])
