"""Ways of a step of Adam on many devices: what each needs in every memory, how long it takes, what fits, and which is best.

Sharding is ZeRO's stage 1 (Rajbhandari et al. 2020): each rank has all parameters and gradients of its piece of the model, and
the state of its share; gradients are reduce-scattered, in float32 or wider, and parameters all-gathered, in buckets. Shares are
whole cells of CELL elements, in which parameters lie as in `shard_layout.py`; that of a rank whose cells are full is counted.
Without sharding gradients are all-reduced before the update, in buckets too.

Offload. State goes through the device once in each direction (update on the device), or gradients and parameters go to the host
and back (update on the host), over PCIe; with files, state goes to the disk and back too. All devices of a node share its host's
memory and its disk. (ZeRO-Offload, Ren et al. 2021, updates on the host, ZeRO-Infinity, Rajbhandari et al. 2021, has files too.)

Model parallelism cuts every parameter into pieces. They are in neighbouring devices, so that ranks that share a piece are as far
apart (as in Megatron-LM; Narayanan et al. 2021). What it costs in the forward and backward pass is not counted.

`performance_model.py` has the seconds of each part.
"""

import functools
import math
from typing import NamedTuple

from ..kernels.norm_order import CHUNK as CELL
from ..kernels.storage import FORMATS, GROUP, operands
from ..sharded.layout import placed
from .model import COLLECTIVES, ROLES, Ranks, collective_seconds, kernel_seconds, overlapped

SLOTS, CHUNKS, SMALLEST_CHUNK = 3, 256, 1 << 25  # of an offloaded step: chunks under way, how many, and their least bytes
ALIGNMENT = 64  # bytes, of each parameter's state in files and in the host's memory
LEAST_BUDGET = 1 << 15  # chunks of the fewest elements, of any formats, in as many slots as a CPU has, take no more
MOST_DEVICES = 10**7


class Way(NamedTuple):
    """A way to make a step: where the state is, whether each rank has only a share of it, and where it is updated."""

    sharded: bool
    state: str  # "device", "host" or "files"
    updated_on: str = "device"  # or "host"

    @property
    def name(self):
        places = {"device": "in memory", "host": "host memory", "files": "files"}
        where = places[self.state] if self.state == "device" else f"{places[self.state]}, {self.updated_on} updates"
        return f"sharded, {where}" if self.sharded else where

    def made_by(self, update):
        """Return the class that makes such steps; empty if none does."""
        arrays = update.arrays
        if self.sharded:
            summed = arrays.grad != "float64" or arrays.param == "float64"  # ShardedAdam rounds no gradient
            return "gpuadam.ShardedAdam" if self.state == "device" and summed and not arrays.param_copy else ""
        return "gpuadam.Adam" if self.state == "device" else "gpuadam.OffloadAdam"


def ways(machine, ranks):
    """Return the Ways that there are on a machine."""
    places = [("device", "device"), ("files", "device")]
    if machine.host:
        places = [("device", "device"), *((state, on) for state in ("host", "files") for on in ("device", "host"))]
    return [Way(sharded, *place) for sharded in (False, True)[: 1 + (ranks > 1)] for place in places]


class Settings(NamedTuple):
    """How many devices there are, and what a step may take."""

    world: int = 1  # devices
    model_parallel: int = 1  # pieces that every parameter is cut into, each on devices of its own
    reserve: int = 0  # bytes of a device for activations and the like
    budget: int = 1 << 28  # of an offloaded step, as in OffloadAdam
    bucket: int = 1 << 25  # bytes of gradients in one collective, as bucket_bytes in ShardedAdam
    collective: str = "ring"


class Prediction(NamedTuple):
    """What one way of a step needs, and how long it takes."""

    way: Way
    made_by: str
    model_parallel: int
    bytes: dict[str, int]  # role -> bytes of a device
    host_bytes: int  # of a node
    file_bytes: int
    short: dict[str, int]  # where there is not enough memory -> the bytes that are missing
    stages: dict[str, float]  # seconds
    seconds: float

    @property
    def device_bytes(self):
        return sum(self.bytes.values())

    @property
    def fits(self):
        return not self.short


class _Shape(NamedTuple):
    """How an update lies over ranks."""

    n: int  # elements of a device's piece of the model
    cells: int
    alike: int  # ranks that share a piece of the model
    ranks: Ranks  # where they are
    neighbours: int  # devices of a node
    own: int  # elements whose state a device has
    own_groups: int  # and groups of them that share scales, at most
    own_padded: int
    padded: int  # elements of a sharded buffer


@functools.lru_cache(maxsize=256)
def _pieces(sizes, model_parallel):
    """Return the elements, cells and groups of what is left of parameters of these sizes."""
    cut = [-(-size // model_parallel) for size in sizes]
    _, end = placed(cut)
    return sum(cut), -(-end // CELL), sum(-(-size // GROUP) for size in cut)


@functools.lru_cache(maxsize=256)
def _apart(sizes, model_parallel, operand):
    """Return the bytes of an array for each parameter, each array aligned."""
    each = (operand.nbytes(-(-size // model_parallel)) for size in sizes)
    return sum(-(-n_bytes // ALIGNMENT) * ALIGNMENT for n_bytes in each)


def _shape(update, machine, settings, sharded):
    n, cells, groups = _pieces(update.sizes, settings.model_parallel)
    alike = settings.world // settings.model_parallel
    within = min(max(machine.per_node // settings.model_parallel, 1), alike)
    ranks = Ranks(within, -(-alike // within))
    own_padded = -(-cells // alike) * CELL if sharded else n
    own = min(own_padded, n)
    own_groups = min(own_padded // GROUP, groups) if sharded else groups
    neighbours = min(machine.per_node, settings.world)
    return _Shape(n, cells, alike, ranks, neighbours, own, own_groups, own_padded, alike * own_padded if sharded else n)


def _own_bytes(operand, shape):
    return operand.itemsize * (shape.own_groups if operand.of_groups else shape.own)


def of_shard(arrays):
    """Return the formats of a sharded update: it takes the sums of gradients, which are float32 at least."""
    return arrays._replace(grad="float64" if "float64" in (arrays.param, arrays.grad) else "float32")


def predict(way, update, machine, settings):
    """Return the Prediction of a way of a step. `plan` checks what it is given."""
    shape = _shape(update, machine, settings, way.sharded)
    arrays = of_shard(update.arrays) if way.sharded else update.arrays
    reduced = FORMATS[arrays.grad]
    own = operands(arrays, update.zero_grad)
    state = [o for o in own if update.is_state(o)]
    n_state = sum(_own_bytes(o, shape) for o in state)
    offloaded = n_state
    if way.state != "device" and not way.sharded:
        offloaded = sum(_apart(update.sizes, settings.model_parallel, o) for o in state)
    by_role = _bytes_of_device(way, update, settings, shape, own, reduced)
    host_bytes, file_bytes = _bytes_of_node(way, machine, settings, shape, offloaded)

    here = way.updated_on == "device"
    moved = state if here else [o for o in own if not update.is_state(o)]
    up, down = (sum(_own_bytes(o, shape) * which(o) for o in moved) for which in (lambda o: o.loads, lambda o: o.stores))
    up, down = (up, down) if here else (down, up)  # what the host stores goes up to the device
    chunks = 1 if way.state == "device" else _chunks(up + down if machine.host else 2 * n_state, settings.budget)
    buckets = _buckets(shape, settings.bucket // reduced) if way.sharded else 1

    stages = {}
    model = next(o for o in own if o.name == update.of_model)
    if way.sharded:
        link = functools.partial(collective_seconds, ranks=shape.ranks, machine=machine, algorithm=settings.collective)
        stages["reduce-scatter"] = link(shape.padded * reduced, calls=buckets)
        stages["all-gather"] = link(model.nbytes(shape.padded), calls=buckets)
    elif shape.alike > 1:
        calls = -(-reduced * shape.n // settings.bucket)
        one_way = collective_seconds(reduced * shape.n, shape.ranks, machine, settings.collective, calls)
        stages["all-reduce"] = 2 * one_way
    processor, share = (machine.device, 1) if here else (machine.host, shape.neighbours)
    stages["update"] = kernel_seconds(arrays, own, shape.own, processor, max(chunks, buckets), share)
    if way.state != "device" and machine.host:
        stages["to the device"] = up / machine.pcie.bandwidth + chunks * machine.pcie.latency
        stages["to the host"] = down / machine.pcie.bandwidth + chunks * machine.pcie.latency
        if here:
            stages["host memory"] = shape.neighbours * (up + down) / machine.host.bandwidth
    if way.state == "files":
        read, written = (
            sum(_own_bytes(o, shape) * flag for o, flag in zip(state, flags, strict=True)) for flags in _flags(state)
        )
        stages["disk"] = shape.neighbours * (read / machine.disk_read + written / machine.disk_write)

    return Prediction(
        way,
        way.made_by(update),
        settings.model_parallel,
        by_role,
        host_bytes,
        file_bytes,
        _short(machine, settings, sum(by_role.values()), host_bytes, file_bytes),
        stages,
        _seconds(stages, chunks, buckets, way) if machine.host else sum(stages.values()),
    )


def _flags(state):
    return [o.loads for o in state], [o.stores for o in state]


def _bytes_of_device(way, update, settings, shape, own, reduced):
    """Return role -> bytes of a device."""
    found = dict.fromkeys(ROLES, 0)
    for o in own:
        if o.name == "grad":
            found["gradients"] += FORMATS[update.arrays.grad] * shape.n
        elif not update.is_state(o):
            found["parameters"] += o.nbytes(shape.padded)
        elif way.state == "device":
            found[update.role(o)] += _own_bytes(o, shape)
    if way.sharded:
        whole = reduced * shape.padded  # gradients that are as wide lie in it, others are copied
        if reduced == FORMATS[update.arrays.grad]:
            found["gradients"], whole = whole, 0
        found["buffers"] += whole + reduced * shape.own_padded
    if way.state != "device" and way.updated_on == "device":
        found["buffers"] += settings.budget
    return found


def _bytes_of_node(way, machine, settings, shape, n_state):
    """Return the bytes of a node's host memory and of its files."""
    if way.state == "device":
        return 0, 0
    if way.state == "files":
        budget = settings.budget if machine.host else 0  # a CPU's own is in its memory already
        return shape.neighbours * budget, shape.neighbours * n_state
    return shape.neighbours * (n_state + (settings.budget if way.updated_on == "host" else 0)), 0


def _chunks(n_bytes, budget):
    """Return into how many chunks an offloaded step is cut."""
    room = min(max(n_bytes // CHUNKS, SMALLEST_CHUNK), max(budget // SLOTS, 1))
    return max(-(-n_bytes // room), 1)


def _buckets(shape, elements):
    """Return into how many buckets the buffer of a sharded step is cut. elements: of a bucket, about."""
    cells = max(elements // CELL // shape.alike, 1) * shape.alike
    return -(-shape.cells // cells)


def _seconds(stages, chunks, buckets, way):
    stages = dict(stages)
    before = stages.pop("all-reduce", 0.0)
    links = stages.pop("reduce-scatter", 0.0) + stages.pop("all-gather", 0.0)  # both take the same link
    pieces = [k for k, many in ((buckets, way.sharded), (chunks, way.state != "device")) if many]
    return before + overlapped([links, *stages.values()], min(pieces, default=1))


def _short(machine, settings, device, host, files):
    available = {"device": (device, machine.memory - settings.reserve), "files": (files, machine.disk)}
    if machine.host:
        available["host"] = (host, machine.host_memory)
    return {where: need - there for where, (need, there) in available.items() if need > there}


def plan(update, machine, settings, auto=False):
    """Return the Predictions of all ways of a step.

    update: from `performance_model.update`. machine: of `machines.MACHINES`, or another Machine. auto: cut the model into as few
    pieces as let a way fit, for each way by itself, instead of settings.model_parallel.

    Raises ValueError for settings that make no sense.

    >>> from gpuadam.planning.machines import MACHINES
    >>> from gpuadam.planning.model import update
    >>> found = plan(update(2**33, "bfloat16", master="remainder"), MACHINES["h100"], Settings(world=8))
    >>> [(p.way.name, p.device_bytes >> 30) for p in found[:1] + found[5:6]]  # GiB
    [('in memory', 112), ('sharded, in memory', 78)]
    """
    _check(machine, settings)
    if not auto:
        ranks = settings.world // settings.model_parallel
        return [predict(way, update, machine, settings) for way in ways(machine, ranks)]
    found = []
    for way in ways(machine, settings.world):
        for pieces in divisors(settings.world):
            if way.sharded and pieces == settings.world:
                continue  # nothing is left to shard
            prediction = predict(way, update, machine, settings._replace(model_parallel=pieces))
            if prediction.fits:
                break
        found.append(prediction)
    return found


def _check(machine, settings):
    for name in ("world", "model_parallel", "budget", "bucket"):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    if settings.world > MOST_DEVICES:
        raise ValueError(f"world={settings.world:,} is more than the {MOST_DEVICES:,} devices that a plan is made for")
    if settings.world % settings.model_parallel:
        raise ValueError(
            f"{settings.world:,} devices cannot hold a model in {settings.model_parallel:,} pieces equally often: "
            "model_parallel must divide world"
        )
    if settings.budget < LEAST_BUDGET:
        raise ValueError(f"budget={settings.budget:,} bytes is too little for a step in chunks: {LEAST_BUDGET:,} are enough")
    if not 0 <= settings.reserve < machine.memory:
        raise ValueError(
            f"reserve={settings.reserve:,} bytes must be at least 0 and less than the {machine.memory:,} of a device"
        )
    if settings.collective not in COLLECTIVES:
        raise ValueError(f"collective={settings.collective!r}: choose from {', '.join(COLLECTIVES)}")


def best(predictions):
    """Return the fastest of those that fit, or None."""
    return min((p for p in predictions if p.fits), key=lambda p: (p.seconds, p.device_bytes), default=None)


def divisors(n):
    """Return the divisors of n, the smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return small + [n // k for k in reversed(small) if k * k != n]
