"""Parameters of one group and dtype in a row, their gradients, and the state of what this rank owns of them."""

import itertools

import numpy as np

from ..kernels.view import Bits
from ..optimizer import Adam, key_of_parameter
from .layout import CELL, Layout


class Buffer:
    """Flat buffers of some parameters and of their gradients, and an optimizer over this rank's shards in each bucket.

    group: the number of theirs. numbers, names, views: of the parameters; their numbers are those among all.
    """

    def __init__(self, kernels, group, numbers, names, views, transport, bucket_bytes):
        self.kernels, self.transport = kernels, transport
        self.group, self.numbers, self.names, self.views = group, numbers, names, views
        first = views[0]
        self.format, self._bits, device = first.format, first.bits, first.device
        grad_dtype = np.dtype("float64" if self.format == "float64" else "float32")
        self.layout = Layout([v.size for v in views], transport.size, bucket_bytes // (CELL * grad_dtype.itemsize))
        self.buckets, self.shards = self.layout.buckets, self.layout.shards(transport.rank)
        *self._own_starts, n_own = itertools.accumulate((bucket.part for bucket in self.buckets), initial=0)
        self.param = kernels.zeros(self.layout.size, first.dtype, device)
        self.grad = kernels.zeros(self.layout.size, grad_dtype, device)
        self._sums = kernels.zeros(n_own, grad_dtype, device)  # of this rank's parts of the gradients
        self.params, self.grads = self._in_shapes(self.param), self._in_shapes(self.grad)
        self.param_views, self.grad_views = ([kernels.view("", a) for a in own] for own in (self.params, self.grads))
        whole = kernels.view("", self.grad)
        self._grad_bytes = whole.pointer, whole.pointer + whole.nbytes
        self.first_in = [self.layout.beginning_in(k) for k in range(len(self.buckets))]
        self.last_in = [self.layout.ending_in(k) for k in range(len(self.buckets))]
        self.shards_in = [[s for s in self.shards if s.bucket == k] for k in range(len(self.buckets))]
        self.sums = {s: self._sum_of(s) for s in self.shards}  # of the gradients, when a bucket's reduce-scatter is done
        self._to_read = self._own_and_given()
        self.optimizers: list[OfShards | None] = []

    def _in_shapes(self, buffer):
        places = zip(self.layout.starts, self.views, strict=True)
        return [buffer[start : start + view.size].reshape(view.shape) for start, view in places]

    def make_state(self, settings, seed, **options):
        """Make the state of this rank's shards."""
        for shards in self.shards_in:
            arrays = {self._label(s): self.param_of(s) for s in shards}
            keys = {self._label(s): key_of_parameter(seed, self.numbers[s.parameter]) for s in shards}
            starts = {self._label(s): s.start for s in shards}
            own = OfShards(arrays, keys, starts, settings, seed=seed, **options) if shards else None
            self.optimizers.append(own)
        # options are checked where nothing is owned, too
        nothing = Bits(self.param[:0], self._bits) if self._bits else self.param[:0]
        OfShards({self.names[0]: nothing}, {}, {}, settings, seed=seed, **options)

    def _label(self, shard):
        return f"{self.names[shard.parameter]}[{shard.start}:{shard.stop}]"

    def param_of(self, shard):
        """Return this rank's shard of a parameter."""
        array = self.param[shard.at : shard.at + shard.stop - shard.start]
        return Bits(array, self._bits) if self._bits else array

    def _sum_of(self, shard):
        first, _ = self.buckets[shard.bucket].part_of(self.transport.rank)
        at = self._own_starts[shard.bucket] + shard.at - first
        return self._sums[at : at + shard.stop - shard.start]

    def _own_and_given(self):
        """Return for each bucket Views of its shards here and in the caller's arrays.

        A parameter that has gaps or another order is read as a whole, with the first bucket that has a shard of it.
        """
        pairs: list[list] = []
        whole = set()
        for shards in self.shards_in:
            pairs.append([])
            for shard in shards:
                k = shard.parameter
                if self.views[k].contiguous:
                    pairs[-1].append(self._shard_and_given(shard))
                elif k not in whole:
                    pairs[-1].append((self.param_views[k], self.views[k]))
                    whole.add(k)
        return pairs

    def _shard_and_given(self, shard):
        view = self.views[shard.parameter]
        given = self.kernels.native(view).reshape(-1)[shard.start : shard.stop]
        own = self.param[shard.at : shard.at + shard.stop - shard.start]
        return self.kernels.view("", own), self.kernels.view("", given)._replace(stream=view.stream)

    def state_of(self, shard):
        """Return the state of a shard: the optimizer's own dict of it."""
        own = self.optimizers[shard.bucket]
        assert own is not None
        return own.state[self._label(shard)]

    # What a step does, bucket by bucket

    def broadcast(self):
        """Make the parameters on all ranks those of rank 0."""
        for own, view in zip(self.param_views, self.views, strict=True):
            self.kernels.copy(own, view)
        for bucket in self.buckets:
            self.transport.broadcast(self.param[bucket.start : bucket.stop])

    def take_over(self):
        """Let go of the caller's arrays."""
        self.views, self._to_read = [view._replace(array=None) for view in self.views], []

    def reduce_scatter(self, bucket, grads):
        """Put the gradients that begin in a bucket into it, and start the sum of all ranks'. grads: Views, or None, of all."""
        for k in self.first_in[bucket]:
            if grads[k] is not None and grads[k].pointer != self.grad_views[k].pointer:
                self.kernels.copy(self.grad_views[k], grads[k])
        start, stop, part = self.buckets[bucket]
        first = self._own_starts[bucket]
        return self.transport.reduce_scatter(self.grad[start:stop], self._sums[first : first + part])

    def update(self, bucket, grads, settings, grad_scale):
        """Update this rank's shards in a bucket."""
        optimizer = self.optimizers[bucket]
        if optimizer is not None:
            sums = [None if grads[s.parameter] is None else self.sums[s] for s in self.shards_in[bucket]]
            optimizer.groups[0].update(settings)
            optimizer.step(dict(zip(optimizer.state, sums, strict=True)), grad_scale=grad_scale)

    def all_gather(self, bucket):
        """Start to collect the new parameters of a bucket from all ranks."""
        start, stop, _ = self.buckets[bucket]
        return self.transport.all_gather(self.param[start:stop])

    def read_params(self, bucket):
        """Read this rank's shards in a bucket from the arrays of the caller, who may have changed them."""
        for own, given in self._to_read[bucket]:
            self.kernels.copy(own, given)

    def written(self):
        """Return Views of what a step writes here: parameters and state."""
        arrays = [("the buffer of parameters", self.param)]
        for shard in self.shards:
            name = self.names[shard.parameter]
            arrays += [(f"{key} of params[{name!r}]", a) for key, a in self.state_of(shard).items() if key != "step"]
        return [self.kernels.view(*one) for one in arrays]

    def has(self, view):
        """Whether an array lies in the buffer of gradients."""
        return self._grad_bytes[0] <= view.pointer < self._grad_bytes[1]

    def write_params(self, bucket, grads=None):
        """Write the new parameters that end in a bucket to the caller's arrays: those that have a gradient, or all."""
        for k in self.last_in[bucket]:
            if grads is None or grads[k] is not None:
                self.kernels.copy(self.views[k], self.param_views[k])


class OfShards(Adam):
    """Adam over shards, whose elements count as in their parameters. keys, starts: of each, by its name."""

    def __init__(self, arrays, keys, starts, settings, *, algorithm, decoupled, **options):
        self._algorithm, self._decoupled = algorithm, decoupled
        super().__init__(arrays, **settings, **options)
        self._keys, self._starts = keys, starts
