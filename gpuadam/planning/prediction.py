"""The ways of a step, and for each the bytes of every memory and the stages that the step goes through.

A *device* is a GPU, or the CPU of a machine without one. Devices that hold the same piece of the model are *ranks* of one
another. `model.py` has the seconds of each stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from .. import checks
from ..kernels.messages import shown
from ..kernels.operands import FORMATS, GROUP, Arrays, operands_of
from ..offload.chunks import CHUNKS, SLOTS_ON_GPU, SMALLEST_CHUNK, aligned
from ..sharded.layout import CELL, placed
from .machines import Machine
from .model import COLLECTIVES, ROLE_OF, ROLES, Ranks, Update, collective_seconds, kernel_seconds, overlapped

LEAST_BUDGET = 1 << 15  # chunks of the fewest elements, of any formats, in as many slots as a CPU has, take no more
MOST_DEVICES = 10**7


class Way(NamedTuple):
    """A way to make a step: where the state is, whether each rank has only a share of it, and where it is updated."""

    sharded: bool
    state: str  # "device", "host" or "files"
    updated_on: str = "device"  # or "host"

    @property
    def name(self) -> str:
        place = {"device": "in memory", "host": "host memory", "files": "files"}[self.state]
        updates = "" if self.state == "device" else f", {self.updated_on} updates"
        return f"{'sharded, ' * self.sharded}{place}{updates}"

    def made_by(self, update: Update) -> str:
        """Return the name of the class that makes such steps; empty if none does."""
        arrays = update.arrays
        if not self.sharded:
            return "gpuadam.Adam" if self.state == "device" else "gpuadam.OffloadAdam"
        rounds_no_gradient = arrays.grad != "float64" or arrays.param == "float64"
        made = self.state == "device" and rounds_no_gradient and not arrays.param_copy and CELL % arrays.numbers == 0
        return "gpuadam.ShardedAdam" if made else ""


def ways(machine: Machine, ranks: int) -> list[Way]:
    """Return the Ways that there are on a machine, for so many ranks that hold the same piece of the model."""
    places = [("device", "device"), ("files", "device")]
    if machine.host:
        places = [("device", "device"), *((state, on) for state in ("host", "files") for on in ("device", "host"))]
    return [Way(sharded, *place) for sharded in (False, True)[: 1 + (ranks > 1)] for place in places]


class Settings(NamedTuple):
    """How many devices there are, and what a step may take."""

    world: int = 1  # devices
    model_parallel: int = 1  # pieces that every parameter is cut into, each on devices of its own
    reserve: int = 0  # bytes of a device for activations and the like
    budget: int = 1 << 28  # bytes of an offloaded step, as in OffloadAdam
    bucket: int = 1 << 25  # bytes of gradients in one collective, as bucket_bytes in ShardedAdam
    collective: str = "ring"


def plan(update: Update, machine: Machine, settings: Settings, auto: bool = False) -> list[Prediction]:
    """Return the Predictions of all ways of a step.

    update: an Update. machine: one of MACHINES, or another Machine. auto: cut the model into as few pieces as let a way fit, for
    each way by itself, instead of settings.model_parallel.

    Raises ValueError for settings that make no sense.
    """
    _check(machine, settings)
    pieces = divisors(settings.world) if auto else [settings.model_parallel]
    return [_in_fewest_pieces(way, update, machine, settings, pieces) for way in ways(machine, settings.world // pieces[0])]


def best(predictions: Iterable[Prediction]) -> Prediction | None:
    """Return the fastest Prediction of those that fit, or None."""
    return min((p for p in predictions if p.fits), key=lambda p: (p.seconds, p.device_bytes), default=None)


def _in_fewest_pieces(way, update, machine, settings, pieces):
    """Return the Prediction with the fewest of these numbers of pieces that fit, or with the most."""
    for model_parallel in pieces:
        if model_parallel < settings.world or not way.sharded:  # a piece on one device is not sharded
            prediction = Prediction(way, update, machine, settings._replace(model_parallel=model_parallel))
            if prediction.fits:
                break
    return prediction


def divisors(n: int) -> list[int]:
    """Return the divisors of n, the smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def nearest_divisors(n: int, wanted: int) -> list[int]:
    """Return the divisors of n, the smallest first: of many the six that are nearest to a number.

    >>> nearest_divisors(8, 3), nearest_divisors(10**6, 3000)
    ([1, 2, 4, 8], [1600, 2000, 2500, 3125, 4000, 5000])
    """
    nearest = sorted(divisors(n), key=lambda k: abs(math.log(k) - math.log(wanted)))
    return sorted(nearest[:6])


def _check(machine, settings):
    for name, least in {"world": 1, "model_parallel": 1, "budget": LEAST_BUDGET, "bucket": 1}.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={shown(value)} must be an integer of at least {least:,}")
    world, pieces = settings.world, settings.model_parallel
    if world > MOST_DEVICES:
        raise ValueError(f"world={shown(world)} is more than the {MOST_DEVICES:,} devices that a plan is made for")
    if world % pieces:
        *others, last = map(str, nearest_divisors(world, pieces))
        fitting = " or ".join([", ".join(others), last] if others else [last])
        raise ValueError(f"model_parallel={shown(pieces)} must divide world={world}: give {fitting}")
    if not 0 <= settings.reserve < machine.memory:
        raise ValueError(
            f"reserve={shown(settings.reserve)} bytes must be at least 0, and less than the {machine.memory:,} of a device"
        )
    checks.one_of(COLLECTIVES, "collective", settings.collective)


class Prediction:
    """What one way of a step needs, and how long it takes.

    made_by: the name of the class that makes such steps, or empty. model_parallel: as in Settings.
    bytes, device_bytes: of each role in a device's memory, and of all. host_bytes, file_bytes: of a node.
    short: {memory that is too small: the bytes that are missing}. fits: whether there is none.
    stages, seconds: of each stage by itself, and of the step.

    Nothing is checked here: `plan` does it.
    """

    def __init__(self, way: Way, update: Update, machine: Machine, settings: Settings) -> None:
        self.way, self.update, self.machine, self.settings = way, update, machine, settings
        self.made_by = way.made_by(update)
        self.model_parallel = settings.model_parallel
        self.ranks = settings.world // settings.model_parallel  # that hold the same piece of the model
        self.neighbours = min(machine.per_node, settings.world)  # devices of a node
        self.elements, self.cells, self.groups = _piece(update.sizes, settings.model_parallel)
        self.part = self.buffer = self.elements  # of the flat buffer: what a device updates, and all
        self.arrays, self.buckets = update.arrays, 1
        if way.sharded:
            self.part = -(-self.cells // self.ranks) * CELL
            self.buffer = self.ranks * self.part
            self.groups = min(self.part // GROUP, self.groups)
            self.arrays = of_shard(update.arrays)
            of_element = self.arrays.numbers * FORMATS[self.arrays.grad]  # bytes
            of_bucket = max(settings.bucket // of_element // CELL // self.ranks, 1) * self.ranks
            self.buckets = -(-self.cells // of_bucket)
        self.operands = operands_of(self.arrays, update.zero_grad)
        self.state = [operand for operand in self.operands if update.is_state(operand)]
        self.others = [operand for operand in self.operands if not update.is_state(operand)]
        self.bytes = self._bytes()
        self.device_bytes = sum(self.bytes.values())
        state_of_node = self._state_of_node() if way.state != "device" else 0
        # chunks of files go through the host's memory; the device of a machine without GPUs has counted them already
        buffered = machine.host if way.state == "files" else way.updated_on == "host"
        self.host_bytes = state_of_node * (way.state == "host") + (self.neighbours * settings.budget if buffered else 0)
        self.file_bytes = state_of_node * (way.state == "files")
        short = {
            "device": self.device_bytes - (machine.memory - settings.reserve),
            "files": self.file_bytes - machine.disk,
            "host": self.host_bytes - machine.host_memory if machine.host else 0,
        }
        self.short = {memory: n_bytes for memory, n_bytes in short.items() if n_bytes > 0}
        self.fits = not self.short

    def _bytes(self):
        way, by_role = self.way, dict.fromkeys(ROLES, 0)
        gradient, summed = (self.arrays.numbers * FORMATS[x.grad] for x in (self.update.arrays, self.arrays))  # bytes
        in_buffer = way.sharded and summed == gradient  # where the gradients lie; others are copied into it
        by_role["gradients"] = gradient * (self.buffer if in_buffer else self.elements)
        by_role["parameters"] = sum(operand.nbytes(self.buffer) for operand in self.others if operand.name != "grad")
        for operand in self.state if way.state == "device" else ():
            by_role[ROLE_OF.get(operand.name, "moments")] += self._nbytes(operand)
        if way.sharded:
            by_role["buffers"] += summed * (self.part if in_buffer else self.part + self.buffer)
        if way.state != "device" and way.updated_on == "device":
            by_role["buffers"] += self.settings.budget
        return by_role

    @functools.cached_property
    def stages(self) -> dict[str, float]:
        machine, stages = self.machine, {}
        summed = self.arrays.numbers * FORMATS[self.arrays.grad]  # bytes
        if self.way.sharded:
            model = next(operand for operand in self.others if operand.name != "grad")
            stages["reduce-scatter"] = self._collective(self.buffer * summed, self.buckets)
            stages["all-gather"] = self._collective(model.nbytes(self.buffer), self.buckets)
        elif self.ranks > 1:
            n_bytes = self.elements * summed
            stages["all-reduce"] = 2 * self._collective(n_bytes, -(-n_bytes // self.settings.bucket))
        on_device = self.way.updated_on == "device"
        processor, sharing = (machine.device, 1) if on_device else (machine.host, self.neighbours)
        launches, n = max(self._chunks, self.buckets), min(self.part, self.elements)
        stages["update"] = kernel_seconds(self.arrays, self.operands, n, processor, launches, sharing)
        if self.way.state != "device" and machine.host and machine.pcie:
            up, down = self._over_pcie
            stages["to the device"] = up / machine.pcie.bandwidth + self._chunks * machine.pcie.latency
            stages["to the host"] = down / machine.pcie.bandwidth + self._chunks * machine.pcie.latency
            if on_device:
                stages["host memory"] = self.neighbours * (up + down) / machine.host.bandwidth
        if self.way.state == "files":
            read, written = self._traffic(self.state)
            stages["disk"] = self.neighbours * (read / machine.disk_read + written / machine.disk_write)
        return stages

    @property
    def seconds(self) -> float:
        if not self.machine.host:
            return sum(self.stages.values())
        stages = dict(self.stages)
        before = stages.pop("all-reduce", 0.0)
        links = stages.pop("reduce-scatter", 0.0) + stages.pop("all-gather", 0.0)  # both take the same link
        pieces = [self.buckets] * self.way.sharded + [self._chunks] * (self.way.state != "device")
        return before + overlapped([links, *stages.values()], min(pieces, default=1))

    def _nbytes(self, operand):
        """Return the bytes of an operand for the elements that the device updates."""
        return operand.itemsize * (self.groups if operand.of_groups else min(self.part, self.elements))

    def _traffic(self, touched):
        """Return the bytes that an update loads of these operands, and the bytes that it stores."""
        loaded = sum(self._nbytes(operand) for operand in touched if operand.loads)
        return loaded, sum(self._nbytes(operand) for operand in touched if operand.stores)

    @property
    def _over_pcie(self):
        """The bytes that go up to the device, and those that come down from it; of a machine without GPUs, to files and back."""
        if self.way.updated_on == "device":
            return self._traffic(self.state)
        loaded, stored = self._traffic(self.others)
        return stored, loaded

    def _state_of_node(self):
        """Return the bytes of the state of all devices of a node, where it is not in their memories."""
        if self.way.sharded:
            return self.neighbours * sum(map(self._nbytes, self.state))
        return self.neighbours * sum(_aligned(self.update.sizes, self.model_parallel, operand) for operand in self.state)

    @property
    def _chunks(self):
        """Into how many chunks the step is cut, as by OffloadAdam."""
        if self.way.state == "device":
            return 1
        n_bytes = sum(self._over_pcie)
        room = min(max(n_bytes // CHUNKS, SMALLEST_CHUNK), max(self.settings.budget // SLOTS_ON_GPU, 1))
        return max(-(-n_bytes // room), 1)

    def _collective(self, n_bytes, calls):
        within = min(max(self.machine.per_node // self.model_parallel, 1), self.ranks)
        ranks = Ranks(within, -(-self.ranks // within))
        return collective_seconds(n_bytes, ranks, self.machine, self.settings.collective, calls)


@functools.lru_cache(maxsize=256)
def _piece(sizes, model_parallel):
    """Return the elements, cells and groups of a piece of a model with parameters of these sizes."""
    cut = [-(-size // model_parallel) for size in sizes]
    _, end = placed(cut)
    return sum(cut), -(-end // CELL), sum(-(-size // GROUP) for size in cut)


@functools.lru_cache(maxsize=256)
def _aligned(sizes, model_parallel, operand):
    """Return the bytes of an operand of a piece whose parameters lie one by one, aligned, as OffloadAdam has them."""
    return sum(aligned(operand.nbytes(-(-size // model_parallel))) for size in sizes)


def of_shard(arrays: Arrays) -> Arrays:
    """Return the formats of a sharded update, which takes the sums of gradients: those are float32 at least."""
    return arrays._replace(grad="float64" if "float64" in (arrays.param, arrays.grad) else "float32")
