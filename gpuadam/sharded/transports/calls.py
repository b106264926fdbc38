"""The calls of the ranks over a transport: one at a time, and none after a call that was cut short."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


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
