"""The parameters of one group and dtype in a row, their gradients, and this rank's part of the state, bucket by bucket."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from ..kernels.view import Bits, View
from .layout import CELL, Layout, Shard


@dataclasses.dataclass
class Member:
    """A parameter of a `ShardedAdam`."""

    number: int  # among all parameters
    group: int  # the number of its group
    name: str
    view: View  # the caller's array
    taken: int = 0  # how many steps it has taken
    param: Any = None  # a View of its place in the buffer of parameters
    grad: Any = None  # a View of its place in the buffer of gradients


class Part(NamedTuple):
    """A shard that this rank owns."""

    member: Member
    shard: Shard
    label: str  # its name in the optimizer of its bucket
    param: Any  # its elements in the buffer of parameters, 1-D
    sums: Any  # the sums of all ranks' gradients, as soon as its bucket is reduced
    copies: list  # (View here, View of the caller's array) that a step reads first


class Buffer:
    """Flat buffers of some members, which share group and dtype, and of their gradients.

    make: makes a `ShardAdam` from a dict label -> array and a dict label -> (number of the member, number of the first element).
    views: the caller's arrays are read once, by `broadcast`, and not used from then on.
    """

    def __init__(self, kernels, members, transport, bucket_bytes, make, views=False):
        self.kernels, self.transport, self.members, self.views = kernels, transport, members, views
        first = members[0].view
        self.device, self.bits = first.device, first.bits
        grad_dtype = np.dtype("float64" if first.format == "float64" else "float32")
        bucket_cells = bucket_bytes // (CELL * grad_dtype.itemsize)
        self.layout = Layout([member.view.size for member in members], transport.size, bucket_cells)
        self.param = kernels.zeros(self.layout.size, first.dtype, self.device)
        self.grad = kernels.zeros(self.layout.size, grad_dtype, self.device)
        self._grads = kernels.view("", self.grad)
        for member, start in zip(members, self.layout.starts, strict=True):
            place, shape = slice(start, start + member.view.size), member.view.shape
            member.param = kernels.view("", self.param[place].reshape(shape))
            member.grad = kernels.view("", self.grad[place].reshape(shape))
        shards = self.layout.shards(transport.rank)
        first_shards = {shard.parameter: shard for shard in reversed(shards)}
        self.buckets = []
        for k, bucket in enumerate(self.layout.buckets):
            here = [(shard, shard is first_shards[shard.parameter]) for shard in shards if shard.bucket == k]
            self.buckets.append(BucketOfRank(self, bucket, here, make))

    def written(self):
        """Return Views of what a step writes here: parameters and state."""
        arrays = [("the buffer of parameters", self.param)]
        for bucket in self.buckets:
            for part in bucket.parts:
                state = bucket.optimizer.state[part.label]
                arrays += [(f"{key} of params[{part.member.name!r}]", a) for key, a in state.items() if key != "step"]
        return [self.kernels.view(*named) for named in arrays]

    def has(self, view):
        """Whether an array lies in the buffer of gradients."""
        return 0 <= view.pointer - self._grads.pointer < self._grads.nbytes


class BucketOfRank:
    """A bucket of a Buffer, and an optimizer over this rank's part of it: `optimizer`, None if no parameter has a part there.

    In its methods `grads` are Views of the gradients of all parameters, by number; None for a parameter without a gradient.
    """

    def __init__(self, buffer, bucket, shards, make):
        self._kernels, self._transport = buffer.kernels, buffer.transport
        layout, members = buffer.layout, buffer.members
        self.group = members[0].group
        self._param, self._grad = buffer.param[bucket.start : bucket.stop], buffer.grad[bucket.start : bucket.stop]
        self._sums = self._kernels.zeros(bucket.part, self._grad.dtype, buffer.device)
        self._beginning = [members[k] for k in layout.beginning_in(bucket)]
        self._written = [] if buffer.views else [members[k] for k in layout.ending_in(bucket)]
        first, _ = bucket.part_of(self._transport.rank)
        self.parts = [self._part(buffer, shard, is_first, shard.at - first) for shard, is_first in shards]
        params = {part.label: part.param for part in self.parts}
        places = {part.label: (part.member.number, part.shard.start) for part in self.parts}
        self.optimizer: Any = make(params, places) if params else None

    def _part(self, buffer, shard, is_first, at):
        """Return the Part of a shard. is_first: whether it is the first of its parameter here. at: its place in the sums."""
        member, param = buffer.members[shard.parameter], buffer.param[shard.place]
        copies = []
        if not buffer.views and member.view.contiguous:
            theirs = self._kernels.native(member.view).reshape(-1)[shard.start : shard.stop]
            theirs = self._kernels.view("", theirs)._replace(stream=member.view.stream)
            copies = [(self._kernels.view("", param), theirs)]
        elif not buffer.views and is_first:  # an array that has gaps or another order is read as a whole
            copies = [(member.param, member.view)]
        label = f"{member.name}[{shard.start}:{shard.stop}]"
        array = Bits(param, buffer.bits) if buffer.bits else param
        return Part(member, shard, label, array, self._sums[at : at + len(param)], copies)

    # What a step does, in this order

    def read_params(self):
        """Copy this rank's shards from the arrays of the caller, who may have changed them."""
        for part in self.parts:
            for own, theirs in part.copies:
                self._kernels.copy(own, theirs)

    def reduce_scatter(self, grads):
        """Copy the gradients that begin in the bucket into it, and start the sum over all ranks. Return its Work."""
        for member in self._beginning:
            grad = grads[member.number]
            if grad is not None and grad.pointer != member.grad.pointer:
                self._kernels.copy(member.grad, grad)
        return self._transport.reduce_scatter(self._grad, self._sums)

    def update(self, grads, settings, grad_scale):
        """Update this rank's shards by the sums. settings: the hyperparameters of each group."""
        if self.optimizer is not None:
            sums = {part.label: None if grads[part.member.number] is None else part.sums for part in self.parts}
            self.optimizer.groups[0].update(settings[self.group])
            self.optimizer.step(sums, grad_scale=grad_scale)

    def all_gather(self):
        """Start to collect the new parameters from all ranks. Return its Work."""
        return self._transport.all_gather(self._param)

    def write_params(self, grads=None):
        """Copy the parameters that end in the bucket to the caller's arrays: all, or those that have a gradient."""
        for member in self._written:
            if grads is None or grads[member.number] is not None:
                self._kernels.copy(member.view, member.param)

    # Before the first step

    def broadcast(self):
        """Make the parameters of all ranks those of rank 0."""
        for member in self._beginning:
            self._kernels.copy(member.param, member.view)
        self._transport.broadcast(self._param)
