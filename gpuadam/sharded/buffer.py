"""The parameters of one group and dtype in a row, their gradients, and this rank's part of the state, bucket by bucket."""

import dataclasses
from typing import Any

import numpy as np

from ..kernels.view import Bits, View
from .layout import CELL, Layout
from .shard_adam import in_vectors
from .transports import Work


@dataclasses.dataclass
class Member:
    """A parameter of a `ShardedAdam`."""

    number: int  # among all parameters
    group: int  # the number of its group
    name: str
    view: View  # the caller's array
    numbers: int = 1  # that share a v
    taken: int = 0  # how many steps the parameter has taken
    param: Any = None  # a View of its place in the buffer of parameters
    grad: Any = None  # a View of its place in the buffer of gradients
    param_array: Any = None  # these places as arrays, which are complex if the caller's array is
    grad_array: Any = None
    shards: list["OwnedShard"] = dataclasses.field(default_factory=list)

    @property
    def settings(self):
        """Those of a group with its numbers: they are real in the buffer, and vectors also where the caller's are complex."""
        return {"complex": None, "components": self.numbers}


@dataclasses.dataclass(eq=False)
class OwnedShard:
    """A part of a parameter whose state is on this rank."""

    name: str
    shape: tuple  # of the whole parameter
    format: str  # of the parameter's elements: "float32", "bfloat16"
    start: int  # the shard has the elements start ... stop - 1 of the parameter, in C order
    stop: int
    param: Any  # 1-D: those elements, as of the last step
    sums: Any  # 1-D: the sums of all ranks' gradients, as soon as they are reduced
    number: int  # of the parameter among all
    label: str  # the name of the shard in the optimizer of its bucket
    state: dict[str, Any] = dataclasses.field(default_factory=dict)  # "step" and 1-D arrays, as in `Adam.state`


class Buffer:
    """Flat buffers of some members, which share group, dtype and how many numbers share a v, and of their gradients.

    make: makes a `ShardAdam` of a list of OwnedShards.
    views: the caller's arrays are read once, by `broadcast`, and not used from then on.
    """

    def __init__(self, kernels, members, transport, bucket_bytes, make, views=False):
        self.kernels, self.transport, self.members, self.views = kernels, transport, members, views
        first = members[0].view
        grad_dtype = np.dtype("float64" if first.format == "float64" else "float32")
        bucket_cells = bucket_bytes // (CELL * grad_dtype.itemsize)
        self.layout = Layout([member.view.size for member in members], transport.size, bucket_cells)
        self.param = kernels.zeros(self.layout.size, first.dtype, first.device)
        self.grad = kernels.zeros(self.layout.size, grad_dtype, first.device)
        for member, start in zip(members, self.layout.starts, strict=True):
            place, shape = slice(start, start + member.view.size), member.view.shape
            places = [buffer[place].reshape(shape) for buffer in (self.param, self.grad)]
            member.param, member.grad = (kernels.view("", array) for array in places)
            if member.view.of_complex:
                places = [array.view(f"complex{16 * array.itemsize}")[..., 0] for array in places]
            member.param_array, member.grad_array = places
        buckets = self.layout.buckets
        sums = kernels.zeros_in_one([bucket.part for bucket in buckets], grad_dtype, first.device)
        self.buckets = [BucketOfRank(self, *of_bucket, make) for of_bucket in zip(buckets, sums, strict=True)]


class BucketOfRank:
    """A bucket of a Buffer, this rank's `shards` in it, and an `optimizer` over them, None if there are none.

    In its methods `grads` are Views of the gradients of all parameters, by number; None for a parameter without a gradient.
    """

    def __init__(self, buffer, bucket, sums, make):
        self._kernels, self._transport = buffer.kernels, buffer.transport
        layout, members, rank = buffer.layout, buffer.members, buffer.transport.rank
        self.group = members[0].group
        self.settings = members[0].settings
        self._param, self._grad = buffer.param[bucket.start : bucket.stop], buffer.grad[bucket.start : bucket.stop]
        self._sums = sums  # of the gradients of all ranks
        within = [(members[k], layout.starts[k]) for k in layout.within(bucket.start, bucket.stop)]
        self._beginning = [member for member, start in within if start >= bucket.start]
        ending = [member for member, start in within if start + member.view.size <= bucket.stop]
        self._written = [] if buffer.views else ending
        self._sources: list[tuple[View, View]] = []  # elements here, and the same elements of the caller's arrays
        first, _ = bucket.part_of(rank)
        self.shards = [self._owned(buffer, shard, shard.place.start - first) for shard in layout.shards(bucket, rank)]
        self.optimizer = make(self.shards) if self.shards else None
        self.work = Work()  # the last collective

    def _owned(self, buffer, shard, at):
        """Return the OwnedShard of a Shard. at: its place in the sums."""
        member, param = buffer.members[shard.parameter], buffer.param[shard.place]
        view, sums = member.view, self._sums[at : at + len(param)]
        if not buffer.views and view.contiguous:
            source = self._kernels.native(view).reshape(-1)[shard.start : shard.stop]
            source = self._kernels.view("", source)._replace(stream=view.stream)
            self._sources.append((self._kernels.view("", param), source))
        elif not buffer.views and not member.shards:  # an array that has gaps or another order is read as a whole, once
            self._sources.append((member.param, view))
        array = Bits(param, view.bits) if view.bits else param
        about = member.name, view.shape, view.format, shard.start, shard.stop
        label = f"{member.name}[{shard.start}:{shard.stop}]"
        member.shards.append(OwnedShard(*about, array, sums, member.number, label))
        return member.shards[-1]

    # What a step does, in this order

    def reduce_scatter(self, grads):
        """Copy parameters, and gradients that begin in the bucket, into it, and start the sum over all ranks."""
        self.read_params()
        for member in self._beginning:
            grad = grads[member.number]
            if grad is not None and grad.pointer != member.grad.pointer:
                self._kernels.copy(member.grad, grad)
        self.work = self._transport.reduce_scatter(self._grad, self._sums)

    def update(self, grads, settings, grad_scale):
        """Update this rank's shards by the sums, and start to collect the new parameters. settings: of each group."""
        self.work.wait()
        if self.optimizer is not None:
            n = self.settings["components"]
            sums = {shard.label: None if grads[shard.number] is None else in_vectors(shard.sums, n) for shard in self.shards}
            self.optimizer.groups[0].update(settings[self.group] | self.settings)
            self.optimizer.step(sums, grad_scale=grad_scale)
        self.all_gather()

    def write_params(self, grads=None):
        """Copy the parameters that end in the bucket to the caller's arrays: all, or those that have a gradient."""
        self.work.wait()
        for member in self._written:
            if grads is None or grads[member.number] is not None:
                self._kernels.copy(member.view, member.param)

    # Parts of these, and what is done before the first step

    def read_params(self):
        """Copy this rank's shards from the arrays of the caller, who may have changed them."""
        for place, source in self._sources:
            self._kernels.copy(place, source)

    def all_gather(self):
        """Start to collect the parameters from all ranks."""
        self.work = self._transport.all_gather(self._param)

    def broadcast(self):
        """Make the parameters of all ranks those of rank 0."""
        for member in self._beginning:
            self._kernels.copy(member.param, member.view)
        self._transport.broadcast(self._param)
