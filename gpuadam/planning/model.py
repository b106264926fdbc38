"""How many bytes a step of Adam touches, and how long its parts take on a machine. `prediction.py` makes whole steps of them.

Bytes are exact integers, from the operands of `kernels/operands.py`, which the kernels themselves are built from. Seconds follow
from them and from the rates of a machine (`machines.py`), by this model:

Update. It moves the bytes of its operands once: launches * launch + max(bytes / bandwidth, elements / rate). The rate is what
conversions, random rounding and arithmetic allow; on a CPU it binds narrow formats, which have fewer bytes and more conversions.
It depends on the formats and is measured, on arrays that lie in the caches; one that is not known does not bind. Arrays that stay
in the caches from one step to the next are bound by the rate alone. Where both take about as long, a CPU hides the one behind the
other in part only, and takes up to a third longer (benchmarks/plan.py). (The roofline of Williams, Waterman & Patterson 2009,
with elements in the place of operations.)

Collectives. A message of n bytes takes alpha + n / B over a link of latency alpha and bandwidth B. A ring of p ranks
reduce-scatters or all-gathers n bytes in (p - 1) alpha + (p - 1)/p n/B, and all-reduces them in twice that: the factors (p - 1)/p
and 2 (p - 1)/p of NCCL's bus bandwidth (nccl-tests, doc/PERFORMANCE.md). Recursive halving and doubling take log2 p alpha and the
same bytes, p being a power of two (Thakur, Rabenseifner & Gropp 2005, Optimization of Collective Communication Operations in
MPICH); for other p, log2 is rounded up here. Over nodes they are hierarchical: the ranks of a node reduce-scatter all n bytes,
then each of them its share with its fellows in other nodes; all-gather is the reverse.

Overlap. Buckets and chunks go through stages one behind the other, so that the slowest stage counts whole, and of the others what
one of k pieces takes: max + (sum - max) / k. On a machine without GPUs the processors do all of it themselves, one after the
other: sum. What a network or a disk does by itself there is not counted as overlapping.

What is not in it: the norm of gradients, the backward pass, behind which a reduce-scatter can hide, contention of jobs or of a
fabric with less than full bisection, and what a device's system keeps of its memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Literal, NamedTuple

from .. import checks
from ..kernels.messages import shown
from ..kernels.operands import KINDS, NARROW, Arrays, Operand, bytes_moved_of, sharing
from ..options import STATE_DTYPES
from ..state import kept
from ..typing import Complex, Components, Format, StateDtype

PARAMS = KINDS["param"].formats
MASTERS = {"remainder": ("bfloat16",), "float32": NARROW}  # -> the parameters that may have one
ROLES = ("parameters", "gradients", "moments", "masters", "mean", "buffers")
ROLE_OF = {"param": "masters", "remainder": "masters", "ema": "mean"}  # of state; all other state is moments
COLLECTIVES = ("ring", "halving")
MOST_ELEMENTS = 10**18


class Update(NamedTuple):
    """What is updated. sizes: the elements of each parameter: numbers, complex ones or vectors."""

    sizes: tuple[int, ...]
    arrays: Arrays = Arrays()
    zero_grad: bool = False

    def is_state(self, operand: Operand) -> bool:
        """Whether an operand is of the optimizer alone, and so can be sharded and offloaded."""
        model = "param_copy" if self.arrays.param_copy else "param"  # with a float32 master the copy is the model's
        return operand.name not in (model, "grad")


def update(
    sizes: int | Iterable[int],
    param: Format = "float32",
    grad: Format | None = None,
    state: StateDtype | None = None,
    master: Literal["remainder", "float32"] | None = None,
    amsgrad: bool = False,
    ema: bool = False,
    zero_grad: bool = False,
    stochastic: bool = False,
    complex: Complex | None = None,
    components: Components = 1,
) -> Update:
    """Return the Update of parameters. The options are those of `Adam`; master may be "float32" too.

    sizes: a number of elements, or one for each parameter. param, grad: formats; grad is param's by default. With `complex` an
    element is a complex number, and these are the formats of its parts.
    ema: whether a running mean is kept. stochastic: whether a narrow param without a master is rounded randomly.

    Raises ValueError for combinations that gpuadam does not have.

    >>> update(10**13, "bfloat16", master="float32").arrays.param_copy
    'bfloat16'
    """
    sizes = (sizes,) if isinstance(sizes, int) else tuple(operator.index(size) for size in sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={shown(sizes[:5])}: at least one parameter, of at least one element each, is needed")
    if sum(sizes) > MOST_ELEMENTS:
        raise ValueError(f"the parameters have more than {MOST_ELEMENTS:.0e} elements, the most that a plan is made for")
    grad = grad or param
    checks.one_of(PARAMS, "param", param)
    checks.one_of(PARAMS, "grad", grad)
    if state:
        checks.one_of(STATE_DTYPES, "state", state)
    if master:
        checks.one_of(MASTERS, "master", master)
        if param not in MASTERS[master]:
            raise ValueError(f"master={master!r} goes with {' and '.join(MASTERS[master])} parameters, not with {param}")
    if state == "8bit" and "float64" in (param, grad):
        wide = " and ".join(f"{name}='float64'" for name, given in (("param", param), ("grad", grad)) if given == "float64")
        raise ValueError(
            f"state='8bit' does not go with {wide}, because it is computed with in float32: give another state, or float32"
        )
    if checks.complex_parts(complex) and (wrong := {param, grad} - {"float32", "float64"}):
        raise ValueError(
            f"complex parameters and gradients are of float32 or float64 parts, not of {' and '.join(sorted(wrong))}"
        )
    numbers = sharing(complex, complex, checks.components(components))
    if complex == "parts":
        sizes = tuple(2 * size for size in sizes)
    elif numbers > 1 and not complex:
        if any(size % numbers for size in sizes):
            raise ValueError(f"components={numbers} must divide the numbers of each parameter, which are {shown(sizes[:5])}")
        sizes = tuple(size // numbers for size in sizes)
    if state == "8bit" and numbers > 1:
        raise ValueError("8-bit state has a v for each number: choose another state, or complex='parts'")
    if stochastic and (master or param not in NARROW):
        given = f"param={shown(param)}" + (f" and master={shown(master)}" if master else "")
        raise ValueError(
            f"stochastic rounding is of bfloat16 and float16 parameters without a master, not of {given}: leave it out, or give "
            "such parameters"
        )
    formats = {"param": param, "grad": grad} | kept(param, state, amsgrad, master, ema)
    checks.combination("adam", formats, stochastic)
    if master == "float32":  # the parameters of the model are copies of their masters
        formats |= {"param": "float32", "param_copy": param}
    return Update(sizes, Arrays.of(formats, bool(stochastic), numbers=numbers), bool(zero_grad))


# Seconds


def kernel_seconds(arrays, operands, n, processor, launches=1, share=1):
    """Return how long a processor takes to update n elements. share: how many devices use this processor at the same time.

    >>> from gpuadam.planning.machines import Processor
    >>> from gpuadam.kernels.operands import operands_of
    >>> a_gpu = Processor(bandwidth=2.8e12)
    >>> kernel_seconds(Arrays(), operands_of(Arrays()), 10**9, a_gpu)  # 28 bytes an element
    0.01
    """
    rate = processor.rates.get(arrays)
    by_rate = share * n / rate if rate else 0.0
    held = share * sum(o.nbytes(n) for o in operands)
    by_bytes = share * bytes_moved_of(operands, n) / processor.bandwidth
    in_cache = rate and held <= processor.cache
    return launches * processor.launch + (by_rate if in_cache else max(by_rate, by_bytes))


class Ranks(NamedTuple):
    """Ranks that take part in a collective: so many in each of so many nodes."""

    within: int
    nodes: int


def collective_seconds(n_bytes, ranks, machine, algorithm="ring", calls=1):
    """Return how long it takes to reduce-scatter, or to all-gather, n_bytes in all, in so many calls.

    >>> from gpuadam.planning.machines import MACHINES
    >>> round(collective_seconds(8 * 10**9, Ranks(8, 1), MACHINES["h100"]), 6)  # 7/8 of 8 GB at 450 GB/s, and 7 latencies
    0.015579
    """
    seconds = 0.0
    for p, link in ((ranks.within, machine.within), (ranks.nodes, machine.across)):
        messages = p - 1 if algorithm == "ring" else math.ceil(math.log2(p))
        seconds += calls * messages * link.latency + (p - 1) / p * n_bytes / link.bandwidth
        n_bytes /= p
    return seconds


def overlapped(stages, pieces):
    """Return how long stages take, of these seconds each, through which so many equal pieces go one behind the other.

    >>> overlapped([4.0, 2.0, 2.0], pieces=4)
    5.0
    """
    longest = max(stages)
    return longest + (sum(stages) - longest) / pieces
