"""What a plan needs to know of a machine, and what is known of some GPUs and the servers they come in.

All rates are bytes a second in one direction; a GB is 10^9 bytes. They are data sheets' rates, which no program quite reaches:
times predicted from them are what can be hoped for. `python -m gpuadam plan --measure` puts measured ones in their place.

Memory, its bandwidth and NVLink are from NVIDIA's data sheets: H100 (2023), H200 (2024), DGX B200 (2024: 1,440 GB for eight),
A100 (2021), L40S (2023). The bandwidth of a B200 is what its driver tells, the clock of its memory times the width of its bus:
7,672 GB/s, where the data sheet rounds to 8 TB/s. That of the RTX 4090 is from the Ada architecture's white paper (2022: 384 bits
at 21 Gb/s). Data sheets add both directions of NVLink and PCIe: 900 GB/s are 450 each way, and PCIe 5.0 x16 is 64, PCIe 4.0 x16
is 32. Networks and hosts are those of DGX systems (user guides: one port for each GPU, of 200 Gb/s with A100, else of 400; 2 TB
of memory, two processors with eight channels each). Latencies are those by which NCCL chooses its algorithms (hwLat in its
src/graph/tuning.cc, ring, protocol Simple): 3.4 us over NVLink, 5.7 over PCIe, 14 over a network.

Assumed, without such a source: 10 us for a launch; drives of 6.5 GB/s read and 3.5 GB/s written, eight of 3.84 TB in a DGX; of
L40S servers a network of 100 Gb/s for each GPU, and 1 TB of host memory; of the RTX 4090 one GPU, 10 Gb/s, 128 GB of memory at
83 GB/s (two channels of DDR5-5200) and one drive of 2 TB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..kernels.operands import Arrays

GB = 10**9
NVLINK_LATENCY, PCIE_LATENCY, NETWORK_LATENCY = 3.4e-6, 5.7e-6, 14e-6


class Link(NamedTuple):
    """A way for bytes, which each device has to itself in both directions at once."""

    bandwidth: float  # bytes a second in one direction
    latency: float = 0.0  # seconds of one message


class Processor(NamedTuple):
    """What updates: a GPU, or the CPUs of a machine."""

    bandwidth: float  # bytes a second of its memory
    launch: float = 0.0  # seconds of an update of nothing
    rates: Mapping[Arrays, float] = {}  # formats -> elements a second that conversions and arithmetic allow, where known
    cache: int = 0  # bytes that stay in its caches from one step to the next; 0 if that cannot be relied on


class Machine(NamedTuple):
    """A node of a cluster of equal nodes."""

    name: str
    device: Processor
    memory: int  # bytes of a device
    per_node: int  # devices
    within: Link  # between devices of a node
    across: Link  # between nodes, of each device
    host: Processor | None  # None if the device is the host's CPU
    host_memory: int  # bytes of a node
    pcie: Link | None  # between a device and its host
    disk: int  # bytes of a node
    disk_read: float  # bytes a second of a node
    disk_write: float

    def figures(self) -> dict[str, float]:
        """Return {name: number}, of names such as "memory" and "device bandwidth"."""
        figures: dict[str, float] = {}
        for field, value in self._asdict().items():
            parts = value._asdict() if isinstance(value, (Processor, Link)) else {"": value}
            figures |= {f"{field} {key}".strip(): n for key, n in parts.items() if isinstance(n, (int, float))}
        return figures

    def with_figure(self, name: str, number: float) -> Machine:
        """Return a machine with another figure, named as in `figures`."""
        part, _, key = name.rpartition(" ")
        change = {key: number}
        return self._replace(**({part: getattr(self, part)._replace(**change)} if part else change))


def _dgx(name, memory, bandwidth, nvlink, pcie, network, host_bandwidth):
    device, host = Processor(bandwidth * GB, launch=10e-6), Processor(host_bandwidth * GB)
    within, across = Link(nvlink * GB, NVLINK_LATENCY), Link(network * GB, NETWORK_LATENCY)
    disks = 8 * 3840 * GB, 8 * 6.5 * GB, 8 * 3.5 * GB
    return Machine(name, device, memory * GB, 8, within, across, host, 2000 * GB, Link(pcie * GB, PCIE_LATENCY), *disks)


OVER_PCIE = Link(32 * GB, PCIE_LATENCY)
DESKTOP = {"per_node": 1, "host_memory": 128 * GB, "disk": 2000 * GB, "disk_read": 5.0 * GB, "disk_write": 4.0 * GB}
# DDR4-3200 in 16 channels is 409.6 GB/s, DDR5-4800 614.4, DDR5-5600 716.8
MACHINES = {
    "a100-40gb": _dgx("A100 SXM 40 GB", 40, 1555, 300, 32, 25, 409.6),
    "a100-80gb": _dgx("A100 SXM 80 GB", 80, 2039, 300, 32, 25, 409.6),
    "h100": _dgx("H100 SXM 80 GB", 80, 3350, 450, 64, 50, 614.4),
    "h200": _dgx("H200 SXM 141 GB", 141, 4800, 450, 64, 50, 614.4),
    "b200": _dgx("B200 SXM 180 GB", 180, 7672, 900, 64, 50, 716.8),
    "l40s": _dgx("L40S 48 GB", 48, 864, 32, 32, 12.5, 614.4)._replace(within=OVER_PCIE, host_memory=1000 * GB),
    "rtx4090": _dgx("RTX 4090 24 GB", 24, 1008, 32, 32, 1.25, 83.2)._replace(within=OVER_PCIE, **DESKTOP),
}
# Where the figures of MACHINES are from.
DATA_SHEET = ("memory", "device bandwidth", "per_node", "within bandwidth", "pcie bandwidth")
DATA_SHEET_OF_DGX = ("across bandwidth", "host_memory", "host bandwidth", "disk")
NCCL = ("within latency", "across latency", "pcie latency")


def sources(kind: str) -> dict[str, str]:
    """Return {figure: where it is from} of one of MACHINES."""
    of_dgx = () if kind in ("l40s", "rtx4090") else DATA_SHEET_OF_DGX
    of_driver = {"device bandwidth": "driver"} if kind == "b200" else {}
    known = dict.fromkeys(MACHINES[kind].figures(), "assumed") | dict.fromkeys((*DATA_SHEET, *of_dgx), "data sheet")
    return known | dict.fromkeys(NCCL, "NCCL's tuning") | of_driver


def cpu_only(name: str, processor: Processor, memory: int, disk: int, disk_read: float, disk_write: float) -> Machine:
    """Return a machine whose only device is its CPU, on a network of 100 Gb/s."""
    network = Link(12.5 * GB, NETWORK_LATENCY)
    return Machine(name, processor, memory, 1, network, network, None, memory, None, disk, disk_read, disk_write)
