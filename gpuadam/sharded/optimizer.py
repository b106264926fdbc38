"""Adam over many ranks, each of which keeps and updates a part of the state: ZeRO's stage 1."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

import numpy as np

from .. import backends, checks, hyperparameters, torch_tensors
from ..clipping import LARGEST_NORM, clipped
from ..description import of_optimizer, repr_of
from ..groups import HYPERPARAMETERS, HasGroups, as_given, as_list, checked_group, parsed_groups
from ..kernels.messages import label_of
from ..kernels.operands import Arrays
from ..options import SAVED, Options, arguments
from ..state import shape
from ..typing import (
    Algorithm,
    Array,
    Betas,
    Bounds,
    Complex,
    FilePath,
    Formula,
    Integer,
    LearningRate,
    LikeParams,
    Number,
    Params,
    Reduction,
    StateDtype,
)
from . import checks as shard_checks
from . import saving, transports
from .agreement import agreed, on_all
from .buffer import Buffer, Member, OwnedShard
from .norm import ShardedNorm
from .shard_adam import ShardAdam

OPTIONS = tuple(name for name in SAVED if name != "capturable")


class ShardedAdam(HasGroups):
    """Adam for data-parallel ranks: each owns a part of the moments, and updates that part.   (Rajbhandari et al. 2020, ZeRO)

    params: as in `Adam`, of the same names, shapes and dtypes on every rank: arrays in the CPU's memory, or with NCCL in a GPU's.
        At the start they become those of rank 0.
    transport: how ranks are connected, one of `gpuadam.transports`.
    lr, betas, eps, weight_decay, amsgrad, maximize, clip_value, bounds, complex, components, formula, eps_root, state_dtype,
        master, ema_decay, zero_grad, stochastic_rounding, seed, backend: as in `Adam`; components may be 1, 2 or 4, and bounds
        are numbers. decoupled: AdamW's decay. algorithm: as in `adam_step`.
    reduction: "mean" of the ranks' gradients, which is their sum times grad_scale / ranks in one factor; or "sum".
    bucket_bytes: about how many bytes of gradients go through one collective. One bucket is updated while others are summed or
        collected.
    views: take over the parameters. The attribute `params` then has views of one buffer for each group and dtype, and the arrays
        that were given are left as they are. Without it each step copies the parameters from the given arrays, and back.

    `step` takes the rank's own gradients. It sums the gradients of all ranks, each element on the rank that owns its state,
    updates the element there, and collects the new parameters on every rank. Gradients are summed in float32, or in float64 for
    float64 parameters. A gradient may lie anywhere, and is copied into a buffer. A gradient that lies in its place in `grads`
    needs no copy: let the backward pass write there.

    All ranks have the same bits of parameters after every step: the bits of `Adam` for the sums of the gradients. So where these
    sums are exact, the bits do not depend on the number of ranks. The norm, random rounding and the groups of 8-bit state never
    depend on it: they go by an element's place in its parameter (`gpuadam/sharded/layout.py`).

    Attributes: `groups`, `steps` and `options`, as in `Adam`; `grads`, of the structure of params, the places where gradients
    need no copy; `params`; `shards`, a list of OwnedShard, the parts of parameters that this rank owns, with their state.

    Every rank calls the same methods in the same order. The calls of several threads over a transport wait for one another. An
    error on one rank, or an argument that is not the same on all ranks, raises on all of them before anything is written. Raises
    what `Adam` raises, and ValueError for arguments that differ.

    >>> import numpy as np, gpuadam
    >>> params = {"w": np.full(3, 0.5, "float32"), "b": np.zeros(1, "float32")}
    >>> opt = gpuadam.ShardedAdam(params, gpuadam.transports.Local(), lr=0.1)  # transports.MPI() for many ranks
    >>> opt.step({"w": np.array([-33.0, 1.0, 0.0], "float32"), "b": None})
    >>> print(params["w"], params["b"])
    [0.6 0.4 0.5] [0.]
    """

    steps: int
    options: Options
    groups: list[dict[str, Any]]
    params: Any
    grads: Any

    def __init__(
        self,
        params: Params,
        transport: transports.Transport,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        decoupled: bool = False,
        algorithm: Algorithm = "adam",
        amsgrad: bool = False,
        maximize: bool = False,
        clip_value: Number | None = None,
        bounds: Bounds | None = None,
        complex: Complex | None = None,
        components: Literal[1, 2, 4] = 1,
        formula: Formula = "torch",
        eps_root: Number = 0.0,
        state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None,
        ema_decay: Number | None = None,
        zero_grad: bool = False,
        stochastic_rounding: bool = False,
        seed: Integer = 0,
        reduction: Reduction = "mean",
        bucket_bytes: Integer = 1 << 25,
        views: bool = False,
        backend: str | None = None,
    ) -> None:
        given = arguments(locals())
        transports.check(transport)
        self.transport, self.steps, self._backend = transport, 0, backend
        self.reduction, self._bucket_bytes, self._views = reduction, bucket_bytes, views
        defaults, options = ({name: given[name] for name in names} for names in (HYPERPARAMETERS, OPTIONS))
        with transport.calls.alone("the making of an optimizer"):
            settings, _ = agreed(transport, self._parsed, params, defaults, algorithm, decoupled, options)
            buffers = on_all(transport, self._made_buffers, settings)  # state may not fit into memory
            self.buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
            for bucket in self.buckets:
                bucket.broadcast()
            for bucket in self.buckets:
                bucket.write_params()
            self.grads = self._in_structure([member.grad_array for member in self.members])
            if self._views:
                self._take_over()
            torch_tensors.wrote(self._listed())
            self._as_given = self._listed(), torch_tensors.places(self._listed())
            self._taken = self._written(buffers)
            self._norm = ShardedNorm(self._kernels, self.shards, transport)

    def _parsed(self, params, defaults, algorithm, decoupled, options):
        """Check the arguments of the constructor, as `agreed` needs it. Return the settings of each group for the first step."""
        checks.one_of(("mean", "sum"), "reduction", self.reduction)
        self._views = checks.flag("views", self._views)
        self._bucket_bytes = checks.count("bucket_bytes", self._bucket_bytes)
        self.options = Options(algorithm, decoupled, **options)
        self.params = as_list(params)  # an iterator can be read once
        self.groups, self.arrangement = parsed_groups(self.params, defaults)
        self.arrangement.places.can_replace = False
        self._kernels, views = shard_checks.params(self.groups, self.arrangement, self.transport, self._backend)
        names = [(k, name) for k, group in enumerate(self.groups) for name in group["names"]]
        numbers = shard_checks.numbers(views, self.groups)
        of_all = enumerate(zip(names, views, numbers, strict=True))
        self.members = [Member(n, *name, view, of_member) for n, (name, view, of_member) in of_all]
        self._dtypes = {(member.group, self.options.computed_in(member.view.format)) for member in self.members}
        formats = [view.format for view in views]
        checks.warn_of_no_effect(formats, master=self.options.master, stochastic_rounding=self.options.stochastic_rounding)
        for member in self.members:  # here, because there may be one that no rank has a part of
            amsgrad = self.groups[member.group]["amsgrad"]
            self.options.kept(member.view._replace(contiguous=True), amsgrad, member.numbers)
        settings, of_groups = self._settings(self._checked(self.groups))
        described = {
            "the number of ranks": self.transport.size,
            **{
                f"params[{m.name!r}]": f"number {m.number}, {m.view.of_complex or m.view.format} of shape {m.view.shape}"
                for m in self.members
            },
            "the group of each parameter": [member.group for member in self.members],
            **of_groups,
            **dataclasses.asdict(self.options),
            "reduction": self.reduction,
            "bucket_bytes": self._bucket_bytes,
        }
        return settings, described, False

    def _made_buffers(self, settings):
        """Return a Buffer for the parameters of each group and dtype."""
        alike: dict[tuple, list[Member]] = {}
        for member in self.members:
            alike.setdefault((member.group, member.view.format, member.view.dtype, member.numbers), []).append(member)
        buffers = []
        for (group, *_), members in alike.items():
            # one backend for good: `use_backend` around a step would raise only on the ranks that own something
            of_buffer = settings[group] | members[0].settings
            make = functools.partial(ShardAdam, options=self.options, backend=self._kernels.name, **of_buffer)
            buffers.append(Buffer(self._kernels, members, self.transport, self._bucket_bytes, make, self._views))
        return buffers

    def _take_over(self):
        """Make the views of the buffers the parameters, and let go of the arrays that were given."""
        self.params = self._in_structure([member.param_array for member in self.members])
        self.arrangement.places.clear()
        for k, group in enumerate(self.groups):
            group["params"] = [member.param_array for member in self.members if member.group == k]
        for member in self.members:
            member.view = member.view._replace(array=None)

    def _written(self, buffers):
        """Return Views of what a step writes beside gradients that lie elsewhere. Those are written with zero_grad alone."""
        named = [("the buffer of gradients", buffer.grad) for buffer in buffers]
        views = []
        if self.options.zero_grad:
            named += [("the buffer of parameters", buffer.param) for buffer in buffers]
            for shard in self.shards:
                named += [(f"{key} of {label_of(shard.name)}", a) for key, a in shard.state.items() if key != "step"]
            views = [] if self._views else [member.view for member in self.members]
        return views + [self._kernels.view(*one) for one in named]

    def __repr__(self) -> str:
        return repr_of(self, self._description)

    def _description(self):
        """Return the text of `repr`."""
        sizes: list[list[int]] = [[] for _ in self.groups]
        for member in self.members:
            sizes[member.group].append(member.view.size // (1 + bool(member.view.of_complex)))
        rank = f"{self.transport.rank} of {self.transport.size}"
        own = {"reduction": self.reduction, "bucket_bytes": self._bucket_bytes, "views": self._views}
        return of_optimizer(self, sizes, rank=rank, backend=self._backend, **own)

    @property
    def shards(self) -> list[OwnedShard]:
        """The parts of parameters that this rank owns, and their state: a list of OwnedShard."""
        return [shard for bucket in self.buckets for shard in bucket.shards]

    def gathered(self, key: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return name -> the whole array of each parameter's state, as NumPy arrays in the host's memory, on every rank.

        key: a key of the state, such as "m", "v" or "ema". Parameters without it, or without elements, are left out.
        """
        whole = {}
        with self.transport.calls.alone("the gathering of state"):
            agreed(self.transport, lambda: (None, {"the key to gather": key}, False))
            for member in self.members:
                shards = [shard for shard in member.shards if key != "step" and key in shard.state]
                on_host = [(shard.start, self._kernels.to_host(shard.state[key]).reshape(-1)) for shard in shards]
                parts = sorted(itertools.chain.from_iterable(self.transport.exchange(on_host)))
                if parts:
                    array = np.concatenate([part for _, part in parts])
                    whole[member.name] = array.reshape(shape(key, member.view.shape, member.numbers))
        return whole

    def step(
        self,
        grads: LikeParams,
        *,
        grad_scale: Number = 1.0,
        max_norm: Number | None = None,
        check_finite: bool = False,
        found_inf: Number | Array | None = None,
    ) -> None:
        """Update every parameter that has a gradient, on all ranks.

        grads: this rank's gradients, of the same structure as params. None in an array's place, on all ranks, skips it.
        grad_scale, max_norm: as in `Adam.step`. The norm is that of the reduced gradients.
        check_finite: leave the step out on all ranks if that norm is not finite, or too large, as in `Adam.step`.
        found_inf: a number of the host. Leave the step out on all ranks if it is not zero on one of them.

        On a GPU the work goes to CuPy's current stream. With max_norm or check_finite the host waits for the norm.

        An exception amid the collectives, such as Ctrl-C, may leave parameters and state of different steps. Every later call
        over the transport raises ValueError, and says how to go on; `gpuadam.sharded` says what the other ranks do.
        """
        of_step = grads, grad_scale, max_norm, check_finite, found_inf
        with self.transport.calls.alone("a step"):
            (listed, views, settings, scale, max_norm), left_out = agreed(self.transport, self._checked_step, *of_step)
            if not left_out:
                self._take(views, settings, scale, max_norm, check_finite)
                torch_tensors.wrote([param for param, grad in zip(self._listed(), views, strict=True) if grad is not None])
            if self.options.zero_grad:
                for view in filter(None, views):
                    self._kernels.fill_zero(view)
                torch_tensors.wrote(listed)

    def _checked_step(self, grads, grad_scale, max_norm, check_finite, found_inf):
        """Check a step, as `agreed` needs it. The flag says whether to leave the step out.

        Return the gradients as they were given, Views of them, the settings of each group, the factor of the sums, and max_norm.
        """
        listed = list(itertools.chain.from_iterable(self.arrangement.in_order(grads)))
        zero_grad = self.options.zero_grad
        views = shard_checks.grads(self.members, listed, self.transport, self._taken, zero_grad, self._backend)
        max_norm = checks.max_norm(max_norm)
        check_finite = checks.flag("check_finite", check_finite)
        scale = checks.finite("grad_scale", grad_scale) / (self.transport.size if self.reduction == "mean" else 1)
        hs = self.checked_groups(scale)
        # a parameter that was skipped has taken fewer steps, so its bias correction is larger; not every rank has a part of it
        steps = {(m.group, m.view.format, m.taken + 1) for m in self.members if views[m.number] is not None}
        for group, format, number in steps:
            hyperparameters.form_and_scalars(hs[group], number, Arrays(*[self.options.computed_in(format).name] * 3))
        settings, of_groups = self._settings(hs)
        described = {
            "the number of steps taken": self.steps,
            "the parameters without a gradient": [m.name for m in self.members if views[m.number] is None],
            "grad_scale": grad_scale,
            "max_norm": max_norm,
            "check_finite": check_finite,
            **of_groups,
        }
        return (
            (listed, views, settings, scale, max_norm),
            described,
            checks.found_inf(backends.on_host("found_inf", found_inf)),
        )

    def _take(self, grads, settings, scale, max_norm, check_finite):
        """Reduce the gradients, update, and collect the parameters: each bucket while others are under way.

        grads: Views, or None, in the order of the parameters. settings: of each group. scale: the factor of the sums.
        """
        for bucket in self.buckets:
            bucket.reduce_scatter(grads)
        if max_norm is not None or check_finite:
            for bucket in self.buckets:
                bucket.work.wait()
            norm = self._norm.norm([None if grad is None else grad.size for grad in grads])
            if check_finite and not norm * abs(scale) <= min(LARGEST_NORM[dtype] for _, dtype in self._dtypes):
                return
            if max_norm is not None:
                scale = clipped(scale, norm, max_norm)
                groups = [group | now for group, now in zip(self.groups, settings, strict=True)]
                try:
                    self._checked(groups, scale)
                except ValueError:  # on every rank or on none, because the norm is the same, and before anything is written
                    self.transport.calls.over()
                    raise
        for bucket in self.buckets:
            bucket.update(grads, settings, scale)
        for bucket in self.buckets:
            bucket.write_params(grads)
        for member in self.members:
            member.taken += grads[member.number] is not None
        self.steps += 1

    def save(self, path: FilePath, *, with_params: bool = False) -> None:
        """Write a checkpoint into a folder, from which any number of ranks, or a single `Adam`, goes on bit for bit.

        path: of the folder, which all ranks must see, and which holds this checkpoint alone. It is made if its parent is there.
        with_params: save the parameters too, for `with_params=True` of `gpuadam.load` and `gpuadam.load_sharded`.

        Every rank calls this, and writes the shards that it owns, with checksums, in a few MB of memory. The index, which says
        which files belong to the checkpoint, is written last. So whatever happens, also to some ranks alone, the folder has the
        new checkpoint or the one before. Both need room while the new one is written. The next save deletes the files of a save
        that was killed. The format: `gpuadam.checkpoint`. A learning rate that is a callable is not saved.

        Raises, on all ranks, CheckpointError if something cannot be written, and ValueError or TypeError for an optimizer that
        could not be loaded again.
        """
        with self.transport.calls.alone("a save"):
            saving.save(self, path, with_params)

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} is not copied or pickled, because its state is on all ranks: use save(folder)"
        )

    # For steps and checkpoints

    def checked_groups(self, grad_scale=1.0):
        """Return the Hyperparameters of each group for the next step, after checking groups and parameters."""
        self.arrangement.check(self.groups)
        hs = self._checked(self.groups, grad_scale)
        listed, places = self._as_given
        now = self._listed()
        if list(map(id, now)) != list(map(id, listed)) or torch_tensors.places(now) != places:
            raise ValueError(
                'the "params" of a group cannot be changed after the optimizer is made, nor the memory, shape or dtype of a '
                "tensor among them, as by tensor.data = x or module.to(): write in place, as tensor.data.copy_(x) does, or "
                "make another optimizer"
            )
        return hs

    def collect_params(self):
        """Make all parameters, on all ranks, those of their owners."""
        for bucket in self.buckets:
            bucket.all_gather()
            bucket.write_params()
        torch_tensors.wrote(self._listed())

    def go_on_from(self, steps, taken):
        """Take over how many steps there were, and name -> how many steps each parameter has taken."""
        self.steps = steps
        for member in self.members:
            member.taken = taken[member.name]
            for shard in member.shards:
                shard.state["step"] = member.taken

    def _listed(self):
        """Return the parameters of all groups, as they were given."""
        return [param for group in self.groups for param in group["params"]]

    def _checked(self, groups, grad_scale=1.0):
        """Return the Hyperparameters of each group for the next step, after checking that they fit its parameters."""
        pairs, step = zip(groups, self.arrangement.structures, strict=True), self.steps + 1
        hs = [checked_group(group, structure, self.options, step, grad_scale) for group, structure in pairs]
        for group, dtype in self._dtypes:
            hyperparameters.check_rounding(hs[group], dtype)
        for member in self.members:
            checks.ordered(member.view, member.numbers, hs[member.group].fixed, ())
        return hs

    def _settings(self, hs):
        """Return the hyperparameters of each group, its lr as the number that it is in a step, and these by name. hs: of each."""
        pairs = zip(self.groups, hs, strict=True)
        settings = [{key: group[key] for key in HYPERPARAMETERS} | {"lr": h.lr} for group, h in pairs]
        named = enumerate(settings)
        return settings, {f"{key} of group {k}": value for k, of_group in named for key, value in of_group.items()}

    def _in_structure(self, arrays):
        """Return arrays, given in the order of the parameters, in the structure of params."""
        arrays, groups = iter(arrays), []
        for kind, names, *_ in self.arrangement.structures:
            groups.append(as_given(kind, names, list(itertools.islice(arrays, len(names)))))
        return groups if self.arrangement.in_groups else groups[0]


class ShardedAdamW(ShardedAdam):
    """`ShardedAdam` with decoupled weight decay, 0.01 by default: what `AdamW` is to `Adam`.

    >>> import numpy as np, gpuadam
    >>> w = np.ones(2, "float32")
    >>> opt = gpuadam.ShardedAdamW(w, gpuadam.transports.Local(), lr=0.1, weight_decay=0.5)
    >>> opt.step(np.zeros(2, "float32"))
    >>> print(w)
    [0.95 0.95]
    """

    def __init__(
        self,
        params: Params,
        transport: transports.Transport,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 1e-2,
        *,
        decoupled: bool = True,
        algorithm: Algorithm = "adam",
        amsgrad: bool = False,
        maximize: bool = False,
        clip_value: Number | None = None,
        bounds: Bounds | None = None,
        complex: Complex | None = None,
        components: Literal[1, 2, 4] = 1,
        formula: Formula = "torch",
        eps_root: Number = 0.0,
        state_dtype: StateDtype | None = None,
        master: Literal["remainder"] | None = None,
        ema_decay: Number | None = None,
        zero_grad: bool = False,
        stochastic_rounding: bool = False,
        seed: Integer = 0,
        reduction: Reduction = "mean",
        bucket_bytes: Integer = 1 << 25,
        views: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))
