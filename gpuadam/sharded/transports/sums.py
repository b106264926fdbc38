"""The reduce-scatter over MPI: ranks send one another pieces of their gradients, and each adds up what it receives.

On one machine this takes a quarter of the time of MPICH's own reduce-scatter between two ranks, and two thirds between four
(`benchmarks/collectives.py`). That one allocates memory of the size of the buffers in each call, and the system has to make its
pages. Here a piece is received into memory that is kept, straight from the sender's, and is added while it is in the caches.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Bytes from each rank. In smaller pieces the messages cost more than their bytes; larger ones leave the caches.
PIECE = 1 << 20
UNDER_WAY = 2  # pieces: one comes while another is added


class Sums:
    """The sums that ranks make over a communicator. tag: of its messages.

    Pieces are sent, asked for and added in the order in which sums are started, which is that of all ranks. So a message needs no
    name. At most UNDER_WAY pieces are asked for; what else was sent stays with its sender. So a rank keeps UNDER_WAY * PIECE
    bytes for each other rank, and no more than as many parts of a buffer.
    """

    def __init__(self, mpi: Any, comm: Any, tag: int) -> None:
        self._comm, self._tag, self._all_done = comm, tag, mpi.Request.Testall
        rank, size = comm.rank, comm.size
        self._rank, self._size = rank, size
        # each rank begins with another one, so that they do not all send to the same
        self._to, self._from = ([(rank + sign * k) % size for k in range(1, size)] for sign in (1, -1))
        self._rooms = [np.empty(0, np.uint8) for _ in range(UNDER_WAY)]
        self._started, self._asked, self._added = 0, 0, 0  # pieces
        self._waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        self._coming: collections.deque[_Piece] = collections.deque()

    def start(self, buffer: Any, part: Any) -> Callable[[], bool]:
        """Start to store in part the sum over all ranks of the rank-th part of their buffers.

        Return what tests whether this is done. Nothing happens to the sum in between.
        """
        parts, length = buffer.reshape(self._size, part.size), PIECE // part.itemsize
        pieces = [slice(at, at + length) for at in range(0, part.size, length)]
        sent = [self._comm.Isend(parts[rank, piece], rank, self._tag) for piece in pieces for rank in self._to]
        self._waiting.extend((parts[self._rank, piece], part[piece]) for piece in pieces)
        self._started += len(pieces)
        self._ask()
        return functools.partial(self._is_done, self._started, sent)

    def _ask(self) -> None:
        """Ask for the next pieces, where there is room for them."""
        while self._waiting and len(self._coming) < UNDER_WAY:
            own, sums = self._waiting.popleft()
            k, n_bytes = self._asked % UNDER_WAY, own.nbytes * (self._size - 1)
            if self._rooms[k].size < n_bytes:
                self._rooms[k] = np.empty(n_bytes, np.uint8)
            terms = [*self._rooms[k][:n_bytes].view(own.dtype).reshape(self._size - 1, own.size)]
            terms.insert(self._rank, own)
            requests = [self._comm.Irecv(terms[rank], rank, self._tag) for rank in self._from]
            self._coming.append(_Piece(terms, sums, requests))
            self._asked += 1

    def _is_done(self, pieces: int, sent: list[Any]) -> bool:
        """Add the next piece if it has come. Return whether so many pieces are added, and those that were sent have arrived."""
        if self._coming and self._all_done(self._coming[0].requests):
            self._coming[0].add()
            self._coming.popleft()
            self._added += 1
            self._ask()
        return self._added >= pieces and self._all_done(sent)


class _Piece(NamedTuple):
    """Neighbouring elements of a sum, and the requests of what is still to come of them."""

    terms: list[Any]  # the gradients of each rank, in the order of the ranks
    sums: Any  # where the sums come to be
    requests: list[Any]

    def add(self) -> None:
        if len(self.terms) == 1:
            self.sums[...] = self.terms[0]
            return
        np.add(self.terms[0], self.terms[1], out=self.sums)
        for term in self.terms[2:]:
            np.add(self.sums, term, out=self.sums)
