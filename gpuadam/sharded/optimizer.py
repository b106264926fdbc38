"""Adam over many ranks, each of which keeps and updates a part of the state: ZeRO's stage 1."""

import itertools
import operator
from typing import Any, NamedTuple

import numpy as np

from .. import checks, functional, hyperparameters, torch_tensors
from .. import step_counts as capturable
from ..groups import (
    HYPERPARAMETERS,
    MAPPING,
    ONE,
    HasGroups,
    as_list,
    checked_group,
    in_order,
    in_order_of_groups,
    parsed_groups,
)
from ..kernels.operands import Arrays
from ..optimizer import DEFAULTS
from . import checks as shard_checks
from . import saving, transports
from .agreement import agreed
from .buffer import Buffer
from .norm import ShardedNorm

OPTIONS = ("formula", "eps_root", "state_dtype", "master", "ema_decay", "stochastic_rounding", "seed")


class OwnedShard(NamedTuple):
    """A part of a parameter whose state is on this rank."""

    name: str
    shape: tuple  # of the whole parameter
    format: str  # of its elements: "float32", "bfloat16"
    start: int  # it has the elements start ... stop - 1 of the parameter, in C order
    stop: int
    param: Any  # 1-D: those elements, as of the last step
    state: dict[str, Any]  # "step" and 1-D arrays, as in `Adam.state`


class ShardedAdam(HasGroups):
    """Adam for data-parallel ranks: each owns a part of the moments, and updates that part.   (Rajbhandari et al. 2020, ZeRO)

    params: as in `Adam`, the same on every rank: NumPy arrays or what shares the CPU's memory; with a transport of NCCL, CuPy
        arrays or what shares a GPU's. At the start they become those of rank 0.
    transport: how ranks are connected, one of `gpuadam.transports`.
    lr, betas, eps, weight_decay, amsgrad, maximize, formula, eps_root, state_dtype, master, ema_decay, zero_grad,
        stochastic_rounding, seed, backend: as in `Adam`. decoupled: AdamW's decay. algorithm: as in `adam_step`.
    reduction: "mean" of the ranks' gradients, which is their sum times grad_scale / ranks in one factor; or "sum".
    bucket_bytes: of gradients that go through one collective. One bucket is updated while others are summed or collected.
    views: take over the parameters. `params` are then views of one buffer for each group and dtype, and the arrays that were
        given are left as they are. Without it each step reads and writes the arrays that were given, which is a copy of them.

    `step` takes the rank's own gradients, sums those of all ranks, each element where its state is, updates it there, and
    collects the new parameters everywhere. Gradients are summed in float32, in float64 for float64 parameters. A gradient may
    lie anywhere, and is copied into a buffer, if it is not in its place in `grads` already: let the backward pass write there.

    All ranks have the same bits of parameters after every step. They are those of `Adam` for the sums of the gradients, so they
    do not depend on the number of ranks where these sums are exact; nor do the norm, random rounding and the groups of 8-bit
    state, which go by an element's place in its parameter (`gpuadam/shard_layout.py`).

    Attributes: `groups` and `steps`, as in `Adam`; `grads`, of the structure of params, the places where gradients need no
    copy; `params`; `shards`, a list of OwnedShard: which part of which parameter is this rank's, and its state.

    Every rank calls the same methods in the same order. What is wrong on one rank, or not the same on all, raises on all of them
    before anything is written. Raises what `Adam` raises, and ValueError for what differs between ranks.

    >>> import numpy as np, gpuadam
    >>> params = {"w": np.full(3, 0.5, "float32"), "b": np.zeros(1, "float32")}
    >>> opt = gpuadam.ShardedAdam(params, gpuadam.transports.Local(), lr=0.1)  # transports.MPI() for many ranks
    >>> opt.step({"w": np.float32([-33.0, 1.0, 0.0]), "b": None})
    >>> print(params["w"], params["b"])
    [0.6 0.4 0.5] [0.]
    """

    def __init__(
        self,
        params,
        transport,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        decoupled=False,
        algorithm="adam",
        amsgrad=False,
        maximize=False,
        reduction="mean",
        bucket_bytes=1 << 25,
        views=False,
        zero_grad=False,
        backend=None,
        **options,
    ):
        transports.check(transport)
        self.transport, self.steps, self._backend, self._cut_short = transport, 0, backend, False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"amsgrad": amsgrad, "maximize": maximize}
        choices = {"decoupled": decoupled, "algorithm": algorithm, "reduction": reduction}

        def prepared():
            if strange := set(options) - set(OPTIONS):
                raise TypeError(f"ShardedAdam has no option {sorted(strange)}; it has those of its signature and {OPTIONS}")
            self._reduction = checks.one_of(("mean", "sum"), "reduction", reduction)
            self._decoupled, self._views = checks.flag("decoupled", decoupled), checks.flag("views", views)
            self._zero_grad = checks.flag("zero_grad", zero_grad)
            choices["bucket_bytes"] = checks.count("bucket_bytes", bucket_bytes)
            seed = checks.seed(options.get("seed", 0))
            self._further = _further(algorithm, options)
            self._algorithm, self.options = algorithm, DEFAULTS | options | {"zero_grad": self._zero_grad}
            self.params = as_list(params)  # an iterator can be read once
            self.groups, self._structures, self._grouped = parsed_groups(self.params, defaults)
            self._names = [name for group in self.groups for name in group["names"]]
            self._taken = dict.fromkeys(self._names, 0)  # how many steps each parameter has taken
            self._state_dtype = options.get("state_dtype")
            self._kernels, self._params = shard_checks.params(self.groups, transport, self._state_dtype, backend)
            formats = {name: view.format for name, view in zip(self._names, self._params, strict=True)}
            wide = ("float64" in (one, self._state_dtype) for one in formats.values())
            self._computed_in = dict(zip(formats, ("float64" if one else "float32" for one in wide), strict=True))
            hs = self._checked_groups(1.0)
            described = {
                "the number of ranks": transport.size,
                **{v.name: f"number {k}, {v.format} of shape {v.shape}" for k, v in enumerate(self._params)},
                **_described(self.groups, hs),
                **choices,
                **{key: options.get(key) for key in OPTIONS},
                "seed": seed,
            }
            return (hs, seed), described, False

        def built():  # state that does not fit its parameters is found where it is
            state = {key: value for key, value in options.items() if key != "seed"}
            # one backend for good: one in use in a step would end the step of those ranks alone that own something
            state |= {"algorithm": algorithm, "decoupled": decoupled, "backend": self._kernels.name}
            self._buffers = self._made_buffers(choices["bucket_bytes"], seed, hs, state)
            return None, {}, False

        (hs, seed), _ = agreed(transport, prepared)
        agreed(transport, built)
        for buffer in self._buffers:
            buffer.broadcast()
            for bucket in range(0 if self._views else len(buffer.buckets)):
                buffer.write_params(bucket)
        self.grads = self._in_structure([buffer.grads for buffer in self._buffers])
        if self._views:
            self._take_over()
        else:
            torch_tensors.wrote(self._listed())
        self._as_given = self._listed(), torch_tensors.places(self._listed())
        written = [] if self._views else list(self._params)
        written += itertools.chain.from_iterable(buffer.written() for buffer in self._buffers)
        self._written = shard_checks.Written(written)
        self._norm = ShardedNorm(self._kernels, self._buffers, transport)

    def _made_buffers(self, bucket_bytes, seed, hs, state):
        """Return a Buffer for the parameters of each group and dtype. hs: of each group. state: options of `Adam`."""
        alike: dict[tuple, list[int]] = {}
        groups = [k for k, group in enumerate(self.groups) for _ in group["names"]]
        for number, (k, view) in enumerate(zip(groups, self._params, strict=True)):
            alike.setdefault((k, view.format, view.dtype), []).append(number)
        settings = [_settings(group, h) for group, h in zip(self.groups, hs, strict=True)]
        buffers = []
        for (k, *_), numbers in alike.items():
            names, views = ([column[n] for n in numbers] for column in (self._names, self._params))
            buffers.append(Buffer(self._kernels, k, numbers, names, views, self.transport, bucket_bytes))
            buffers[-1].make_state(settings[k], seed, **state)
        return buffers

    def _take_over(self):
        """Make the views of the buffers the parameters, and let go of the arrays that were given."""
        self.params = self._in_structure([buffer.params for buffer in self._buffers])
        by_number = {n: array for buffer in self._buffers for n, array in zip(buffer.numbers, buffer.params, strict=True)}
        in_order = iter([by_number[number] for number in range(len(by_number))])
        for group in self.groups:
            group["params"] = list(itertools.islice(in_order, len(group["names"])))
        for buffer in self._buffers:
            buffer.take_over()
        self._params = [view._replace(array=None) for view in self._params]

    @property
    def shards(self):
        """What of which parameter is this rank's, and its state: a list of OwnedShard."""
        found = []
        for buffer in self._buffers:
            for shard in buffer.shards:
                view = buffer.views[shard.parameter]
                about = buffer.names[shard.parameter], view.shape, view.format, shard.start, shard.stop
                found.append(OwnedShard(*about, buffer.param_of(shard), buffer.state_of(shard)))
        return found

    def gathered(self, key):
        """Return name -> the whole array of each parameter's state, as NumPy arrays in the host's memory, on every rank.

        key: "m", "v" or what else there is, such as "ema". Parameters without it, or without elements, are left out.
        """
        self._check_whole()
        agreed(self.transport, lambda: (None, {"the key of what is gathered": key}, False))
        whole = {}
        own: dict[str, list] = {name: [] for name in self._names}
        for shard in self.shards:
            if key != "step" and key in shard.state:
                own[shard.name].append((shard.start, shard.state[key]))
        for name, view in zip(self._names, self._params, strict=True):
            given = [(start, self._kernels.to_host(array)) for start, array in own[name]]
            parts = sorted(itertools.chain.from_iterable(self.transport.exchange(given)), key=operator.itemgetter(0))
            if parts:
                array = np.concatenate([part for _, part in parts])
                whole[name] = array if key.endswith("_scale") else array.reshape(view.shape)
        return whole

    def step(self, grads, *, grad_scale=1.0, max_norm=None, check_finite=False, found_inf=None):
        """Update every parameter that has a gradient, on all ranks.

        grads: this rank's own, of the same structure as params; None, on all ranks, in an array's place skips it.
        grad_scale, max_norm: as in `Adam.step`; clipped is what the ranks' gradients are reduced to, by its norm.
        check_finite: leave the step out on all ranks if that norm is not finite, or too large, as in `Adam.step`.
        found_inf: leave the step out on all ranks if this is not zero on any of them: a number of the host.

        On a GPU the work goes to CuPy's current stream. With max_norm or check_finite the host waits for the norm.

        Where something ends a step amid its collectives, Ctrl-C say, the state is of no step: what follows raises ValueError.
        """
        self._check_whole()
        (listed, given, settings, scale, max_norm, check_finite), left_out = agreed(
            self.transport, lambda: self._prepared(grads, grad_scale, max_norm, check_finite, found_inf)
        )
        if not left_out:
            self._step(given, settings, scale, max_norm, check_finite)
            torch_tensors.wrote([param for param, grad in zip(self._listed(), given, strict=True) if grad is not None])
        if self._zero_grad:
            for view in filter(None, given):
                self._kernels.fill_zero(view)
            torch_tensors.wrote(listed)

    def _prepared(self, grads, grad_scale, max_norm, check_finite, found_inf):
        """Check a step. Return its arguments, what all ranks must have in common of them, and whether to leave it out."""
        if self._grouped:
            ordered = in_order_of_groups(grads, self._structures)
        else:
            ordered = [in_order(grads, self._structures[0], "grads")]
        listed = list(itertools.chain.from_iterable(ordered))
        given = shard_checks.grads(listed, self._buffers, self.transport, self._zero_grad, self._written, self._backend)
        max_norm = None if max_norm is None else checks.non_negative("max_norm", max_norm)
        check_finite = checks.flag("check_finite", check_finite)
        scale = checks.finite("grad_scale", grad_scale) / (self.transport.size if self._reduction == "mean" else 1)
        hs = self._checked_groups(scale)
        self._check_params()
        have = {name for name, grad in zip(self._names, given, strict=True) if grad is not None}
        for h, structure in zip(hs, self._structures, strict=True):
            # one that was skipped has taken fewer steps: its bias correction is larger, and not every rank has a part of it
            for dtype, taken in {(self._computed_in[n], self._taken[n]) for n in structure.names if n in have}:
                hyperparameters.form_and_scalars(h, taken + 1, Arrays(*[dtype] * 3))
        described = {
            "the number of steps taken": self.steps,
            "the parameters without a gradient": [n for n, grad in zip(self._names, given, strict=True) if grad is None],
            "grad_scale": grad_scale,
            "max_norm": max_norm,
            "check_finite": check_finite,
        }
        described |= _described(self.groups, hs)
        settings = [_settings(group, h) for group, h in zip(self.groups, hs, strict=True)]
        return (listed, given, settings, scale, max_norm, check_finite), described, checks.found_inf(found_inf)

    def _checked_groups(self, scale):
        """Check the hyperparameters of all groups and return them for the next step."""
        if len(self.groups) != len(self._structures):
            raise ValueError("groups cannot be added to an optimizer or removed from it after it is made: make another")
        return [self._checked(*one, scale) for one in zip(self.groups, self._structures, strict=True)]

    def _checked(self, group, structure, scale):
        h = checked_group(group, structure, self._decoupled, self.steps + 1, scale, self._further)
        for dtype in {self._computed_in[name] for name in structure.names}:
            hyperparameters.check_rounding(h, dtype)
        return h

    def _check_params(self):
        """Refuse parameters that are not where they were: a step would go on with the old ones."""
        listed, places = self._as_given
        now = self._listed()
        if len(now) != len(listed) or not all(map(operator.is_, now, listed)):
            raise ValueError('the "params" of a group cannot be changed after the optimizer is made: make another')
        if torch_tensors.places(now) != places:
            raise ValueError(
                "a tensor among the parameters has other memory, or another shape or dtype, than when the optimizer was made, as "
                "by tensor.data = x or module.to(): write in place, tensor.data.copy_(x), or make another optimizer"
            )

    def _check_whole(self):
        """Raise if a step was cut short. The ranks are then not at the same collective, and this one cannot tell the others."""
        if self._cut_short:
            raise ValueError(
                "a step was cut short, and this is the state that it left: make another optimizer of a checkpoint"
            )

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} is not copied or pickled, because its state is on all ranks: use save(folder)"
        )

    def _step(self, given, settings, scale, max_norm, check_finite):
        self._cut_short = True
        work = []  # (buffer, bucket, gradients of the buffer's parameters, the sum that is under way)
        for buffer in self._buffers:
            grads = [given[number] for number in buffer.numbers]
            for bucket in range(len(buffer.buckets)):
                if not self._views:
                    buffer.read_params(bucket)
                work.append((buffer, bucket, grads, buffer.reduce_scatter(bucket, grads)))
        if max_norm is not None or check_finite:
            for *_, reduced in work:
                reduced.wait()
            norm = self._norm.norm([None if grad is None else grad.size for grad in given])
            self._cut_short = False  # nothing is written yet, and all ranks are here
            largest = min(capturable.LARGEST_NORM[np.dtype(d)] for d in self._computed_in.values())
            if check_finite and not norm * abs(scale) <= largest:
                return
            if max_norm is not None:
                scale = capturable.clipped(scale, norm, max_norm)
                for group, structure, now in zip(self.groups, self._structures, settings, strict=True):
                    self._checked(group | now, structure, scale)  # the same on every rank, and so is what it raises
            self._cut_short = True
        collected = []
        for buffer, bucket, grads, reduced in work:
            if max_norm is None and not check_finite:
                reduced.wait()
            buffer.update(bucket, grads, settings[buffer.group], scale)
            collected.append(buffer.all_gather(bucket))
        for (buffer, bucket, grads, _), gathered in zip(work, collected, strict=True):
            gathered.wait()
            if not self._views:
                buffer.write_params(bucket, grads)
        for name, grad in zip(self._names, given, strict=True):
            self._taken[name] += grad is not None
        self.steps += 1
        self._cut_short = False

    def save(self, path, *, with_params=False):
        """Write a checkpoint into a folder, from which any number of ranks, or a single `Adam`, goes on bit for bit.

        path: of the folder, which all ranks must see. It is made, but not the one it lies in; it is this checkpoint's alone.
        with_params: the parameters too, as `with_params` of `gpuadam.load` and `gpuadam.load_sharded` needs them.

        Every rank calls this, and writes what it owns, with checksums, in a few MB of memory. The last thing that is written says
        which files belong to the checkpoint. So whatever happens, also to some ranks alone, the folder has the new checkpoint or
        the one before. It has room for both while the new one is written. What a killed save leaves, the next one deletes.
        The format: `gpuadam.checkpoint`. A learning rate that is a callable is not saved.

        Raises, on all ranks, CheckpointError if something cannot be written, and ValueError or TypeError for what could not be
        loaded again.
        """
        saving.save(self, path, with_params=with_params)

    def _read_params(self):
        """Read what is this rank's of the parameters from the arrays of the caller, who may have changed them."""
        for buffer in () if self._views else self._buffers:
            for bucket in range(len(buffer.buckets)):
                buffer.read_params(bucket)

    def _collect_params(self):
        """Make all parameters, on all ranks, what their owners have."""
        for buffer in self._buffers:
            for bucket in range(len(buffer.buckets)):
                buffer.all_gather(bucket).wait()
                if not self._views:
                    buffer.write_params(bucket)
        torch_tensors.wrote(self._listed())

    def _go_on_from(self, steps, taken):
        """Take over how many steps there were, and how many each parameter has taken."""
        self.steps, self._taken = steps, taken
        for shard in self.shards:
            shard.state["step"] = taken[shard.name]

    def _listed(self):
        """Return the parameters of all groups, as they were given."""
        return [param for group in self.groups for param in group["params"]]

    def _in_structure(self, columns):
        """Return arrays in the structure of params. columns: of each buffer, in its order."""
        by_name: dict[str, Any] = {}
        for buffer, column in zip(self._buffers, columns, strict=True):
            by_name |= zip(buffer.names, column, strict=True)
        groups: list[Any] = []
        for structure in self._structures:
            of_group = {name: by_name[name] for name in structure.names}
            listed = list(of_group.values())
            groups.append(of_group if structure.kind == MAPPING else listed[0] if structure.kind == ONE else listed)
        return groups if self._grouped else groups[0]


class ShardedAdamW(ShardedAdam):
    """`ShardedAdam` with decoupled weight decay, 0.01 by default: what `AdamW` is to `Adam`.

    >>> import numpy as np, gpuadam
    >>> w = np.ones(2, "float32")
    >>> opt = gpuadam.ShardedAdamW(w, gpuadam.transports.Local(), lr=0.1, weight_decay=0.5)
    >>> opt.step(np.zeros(2, "float32"))
    >>> print(w)
    [0.95 0.95]
    """

    def __init__(self, params, transport, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **options):
        super().__init__(params, transport, lr, betas, eps, weight_decay, **{"decoupled": True} | options)


def _further(algorithm, options):
    """Return the hyperparameters that few use, as `functional.further` does."""
    given = {"ema_decay": None, "formula": "torch", "eps_root": 0.0} | options
    ema_decay = 0.999 if given["ema_decay"] is None else given["ema_decay"]
    return functional.further(
        algorithm, ema_decay, False, given["formula"], given["eps_root"], given["ema_decay"] is not None
    )


def _settings(group, h):
    """Return the hyperparameters of a group, its lr as the number that it is now."""
    return {key: group[key] for key in HYPERPARAMETERS} | {"lr": h.lr}


def _described(groups, hs):
    """Return the hyperparameters of all groups as `agreed` takes them."""
    described: dict[str, Any] = {"how many parameters each group has": [len(group["names"]) for group in groups]}
    for k, (group, h) in enumerate(zip(groups, hs, strict=True)):
        of_group = f" of group {k}" if len(groups) > 1 else ""
        described |= {f"{key}{of_group}": value for key, value in _settings(group, h).items()}
    return described
