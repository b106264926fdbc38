"""The methods that `ShardedAdam` needs of a transport, and what the transports share."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from ...kernels import view as arrays


class RankEnded(RuntimeError):
    """A rank has ended, or has closed its transport, and takes part in no call any more. This call has written nothing."""


class RankMissing(RuntimeError):
    """A rank did not come to a collective within the transport's timeout. The call is cut short."""


class Calls:
    """The calls over a transport, its attribute `calls`. A call is what the ranks do together: a step, a save, a load.

    `under_way`: what a call does that has begun and is not over, such as "a step"; else "". A call is over when it is done on all
    ranks, or refused on all of them. A call that an exception cuts short stays under way, and refuses whatever comes after: the
    ranks are no longer at the same collective.
    """

    def __init__(self) -> None:
        self.under_way = ""
        # of the thread that is in a call; a call that a signal's handler makes in that thread comes in, and is refused
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Make a call, after those of other threads. Raise ValueError amid a call of this thread, and after one cut short."""
        with self._lock:
            if self.under_way:
                raise ValueError(
                    f"{self.under_way} was cut short, or is under way in this thread, before {what}. If it was cut short, ranks "
                    "may be in different states: start all of them again from a checkpoint. One rank alone can also make "
                    "another transport, and load the checkpoint there"
                )
            self.under_way = what
            yield
            self.over()

    def over(self) -> None:
        """Note that the call has ended on all ranks, and in the same way."""
        self.under_way = ""


class Work(NamedTuple):
    """A collective under way. A Work without arguments is one that was done when its call returned.

    wait: returns when the collective is done; on a GPU, makes CuPy's current stream wait for it. More calls do nothing.
    """

    wait: Callable[[], Any] = lambda: None


class Transport(Protocol):
    """What `ShardedAdam` asks of a transport. Buffers are 1-D arrays without gaps, of one size on all ranks.

    Every rank calls the same methods in the same order. A buffer that was given to one of the first two methods is not touched
    before `wait` of the Work has returned. `memory` says whose buffers it takes: "CPU", those of NumPy; "CUDA", of CuPy; "any".
    `calls` is set by the first optimizer if the transport has none.
    """

    rank: int
    size: int
    memory: str
    calls: Calls

    def reduce_scatter(self, buffer: Any, part: Any) -> Work:
        """Store in part, of 1/size of the buffer, the sum over all ranks of the rank-th part of their buffers."""

    def all_gather(self, buffer: Any) -> Work:
        """Fill the buffer, whose rank-th part is there, with the parts of the other ranks. They are bytes of any dtype."""

    def broadcast(self, buffer: Any) -> None:
        """Overwrite the buffer on every rank with that of rank 0. Return when this is done."""

    def exchange(self, item: Any) -> list:
        """Return the items of all ranks, in the order of the ranks: Python objects that can be pickled, and NumPy arrays."""


def imported(name, fix):
    """Return a module that a transport is made of, or raise ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # mpi4py raises the second where there is no library of MPI
        raise ImportError(f"{name} is needed for this transport and cannot be imported ({error}): {fix}") from error


def check(transport: Any) -> None:
    """Raise TypeError for an object that is no transport, before it is used. Give it `calls` if it has none."""
    for name in ("rank", "size", "memory", "reduce_scatter", "all_gather", "broadcast", "exchange"):
        if isinstance(transport, type) or not hasattr(transport, name):
            kind = f"the class {transport.__name__}" if isinstance(transport, type) else arrays.a_kind(transport)
            raise TypeError(
                f"transport is {kind}, which has no {name}: pass gpuadam.transports.MPI(), NCCL(), Torch() or Local()"
            )
    if not hasattr(transport, "calls"):
        try:
            transport.calls = Calls()
        except (AttributeError, TypeError) as error:
            kind = arrays.a_kind(transport)
            raise TypeError(
                f"transport is {kind} without calls: give it an attribute, calls = transports.Calls()"
            ) from error
