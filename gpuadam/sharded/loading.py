"""Loading a checkpoint on many ranks, whatever number of ranks wrote it: each reads the part that it owns."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence

from .. import checks
from ..checkpoint.converting import as_saved, read_state
from ..checkpoint.format import ALGORITHMS
from ..checkpoint.loading import about, not_fitting, opened, warn_of_params
from ..checkpoint.tensors import PARAM
from ..kernels.messages import shown
from ..typing import FilePath, Integer, LearningRate, Params, Reduction, StateDtype
from . import transports
from .agreement import agreed, on_all
from .optimizer import ShardedAdam, ShardedAdamW
from .saving import sections_of_rank


def load_sharded(
    path: FilePath,
    params: Params,
    transport: transports.Transport,
    backend: str | None = None,
    *,
    lr: LearningRate | Sequence[LearningRate | None] | None = None,
    with_params: bool | None = None,
    reduction: Reduction | None = None,
    bucket_bytes: Integer = 1 << 25,
    views: bool = False,
    state_dtype: StateDtype | None = None,
    names: Mapping[str, str] | None = None,
) -> ShardedAdam:
    """Make a `ShardedAdam` from a checkpoint of `ShardedAdam` or `Adam`, with its options, hyperparameters and step counts.

    path: of the folder that `ShardedAdam.save` made, from any number of ranks, or of the file that `Adam.save` made.
    params, backend, lr, with_params, state_dtype, names: as in `gpuadam.load`.
    transport, bucket_bytes, views: as in `ShardedAdam`.
    reduction: as in `ShardedAdam`; by default the saved one, and "mean" for a checkpoint of `Adam`.

    Every rank calls this, and reads the part that it owns, so that together they read the checkpoint about once. A ShardedAdam
    has no copies and is never capturable, whatever was saved. A checkpoint of AdamW gives a ShardedAdamW.
    Raises, on all ranks, the errors of `gpuadam.load`; by then the parameters of all ranks may have become those of rank 0.

    >>> import numpy as np, gpuadam, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "step-1")
    >>> w, transport = np.ones(3, "float32"), gpuadam.transports.Local()
    >>> opt = gpuadam.ShardedAdamW({"w": w}, transport, lr=0.1)
    >>> opt.step({"w": w.copy()})
    >>> opt.save(path)
    >>> again = gpuadam.load_sharded(path, {"w": w}, transport)
    >>> alone = gpuadam.load(path, {"w": w})
    >>> type(again).__name__, again.steps, type(alone).__name__, alone.steps
    ('ShardedAdamW', 1, 'AdamW', 1)
    """
    transports.check(transport)
    with transport.calls.alone("a load"):
        location = on_all(transport, checks.path, "path", path)
    with about(location), contextlib.ExitStack() as until_loaded:

        def compared():
            checkpoint = until_loaded.enter_context(
                opened(location, params, backend, lr, with_params, state_dtype, names=names)
            )
            described = {"path": location, "the checkpoint there": checkpoint.stored.crc}
            return checkpoint, described | {"with_params": with_params, "state_dtype": state_dtype, "names": names}, False

        with transport.calls.alone("a load"):
            checkpoint, _ = agreed(transport, compared)
            stored, saved = checkpoint.stored, checkpoint.stored.saved
            headers = transport.exchange(on_all(transport, stored.read_headers, transport.rank, transport.size))
            on_all(transport, stored.arrange, itertools.chain.from_iterable(headers))
        algorithm, decoupled = ALGORITHMS[saved.name]
        make = ShardedAdamW if saved.name == "AdamW" else ShardedAdam
        options = {name: value for name, value in saved.options.items() if name != "capturable"}
        options |= {"algorithm": algorithm, "decoupled": decoupled, "backend": backend, "bucket_bytes": bucket_bytes}
        options |= {"reduction": saved.reduction if reduction is None else reduction, "views": views}
        with not_fitting():
            opt = make(checkpoint.params, transport, **checkpoint.hyperparameters, **options)
        with transport.calls.alone("a load"):
            on_all(transport, _fill, opt, stored, with_params, checkpoint.state_dtype)
            if with_params:
                opt.collect_params()
        if with_params is None and stored.has_params():
            warn_of_params(location)
    return opt


def _fill(opt, stored, with_params, state_dtype):
    """Read counts, the state of this rank, and its parameters into the buffer that the ranks collect them from.

    state_dtype: the saved one.
    """
    saved = stored.saved
    with not_fitting():
        taken = {name: checks.count(f"step of {shown(name)}", param["step"]) for name, param in saved.params.items()}
        steps = checks.count("steps", saved.steps)
    arrays = sections_of_rank(opt)
    with not_fitting():
        in_file = as_saved(arrays, state_dtype)
    stored.check(in_file, with_params)
    read_state(stored, arrays, in_file)
    for section in arrays:
        if with_params and section.key == PARAM:
            stored.read(section)
    opt.go_on_from(steps, taken)
