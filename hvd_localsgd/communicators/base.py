"""Through what the ranks talk: one small interface."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_localsgd.errors import CommunicatorError

MOST = 1 << 28  # numbers, or bytes, in one call: MPI counts with 31 bits


def in_pieces(data: bytes, lengths: np.ndarray, gather: Callable[[np.ndarray, list[int]], np.ndarray]) -> list[bytes]:
    """Every rank's bytes, by rank, of which ``MOST`` travel at a time (collective).

    Args:
        data: this rank's.
        lengths: of every rank's, int64.
        gather: makes one array of every rank's bytes (uint8), given this rank's and how many each rank has.
    """
    own, share = np.frombuffer(data, np.uint8), max(1, MOST // len(lengths))
    found = [bytearray() for _ in lengths]
    for start in range(0, int(lengths.max()), share):
        counts = np.clip(lengths - start, 0, share)
        everything, ends = gather(own[start : start + share], counts.tolist()), np.cumsum(counts)
        for entry, end, count in zip(found, ends, counts, strict=True):
            entry += everything[end - count : end].tobytes()
    return [bytes(entry) for entry in found]


class OfThisProcess:
    """An attribute that only the process that set it can read: a forked child copies the whole object and is no rank.

    Raises:
        CommunicatorError: read in another process.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, holder: Any, value: Any) -> None:
        holder.__dict__[self._name] = (os.getpid(), value)

    def __get__(self, holder: Any, kind: type) -> Any:
        process, value = holder.__dict__[self._name]
        if process != os.getpid():
            raise CommunicatorError(
                f"Process {os.getpid()} was forked from process {process}, which is a rank, and cannot talk to the other ranks "
                "in its place. Train in the rank itself; or, to train alone in the child, make a new callback or optimizer there."
            )
        return value


class SharedVector(ABC):
    """A vector that every rank can read and add to at any time, without the others taking part."""

    @abstractmethod
    def add(self, values: np.ndarray, at: int, before: np.ndarray) -> None:
        """From element ``at``: put what is there into ``before`` and add ``values``, atomically for each element."""

    @abstractmethod
    def read(self, values: np.ndarray, at: int) -> None:
        """Fill ``values`` with what is there from element ``at``."""

    @abstractmethod
    def free(self) -> None:
        """Collective."""


class Communicator(ABC):
    """Transport, and nothing else: what the engine needs from MPI, Horovod or a single process.

    Every method is collective unless it says otherwise: all ranks call it, in the same order.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    hosts: list[str]  # of every rank
    began: int  # how many ranks there were at first
    members: list[int]  # what number each rank had then
    resilient = False  # whether the others can go on when a rank dies: then calls raise RankDied
    generation = 0  # how often it has shrunk: sub-groups made before are lost
    # What a row that was exchanged says of where a rank is, in words.
    seen: Callable[[Any], str] = staticmethod(lambda row: "")
    threads = True  # whether two threads may call at the same moment, each a communicator of its own
    beside = False  # whether a thread calls it beside the one that trains: waiting gives the core to others
    takes_tensors = False  # whether ``allreduce`` takes tensors too, and would rather have them: they may be on a GPU

    @abstractmethod
    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """Allgather of one row of a structured dtype per rank: shape ``(size,)``, rank k's row at index k.

        Waiting for slower ranks happens here, gently (the core is given to others).
        Raises TimeoutError if ``timeout`` seconds were not enough.
        """

    @abstractmethod
    def allreduce(self, values: Any) -> Any:
        """The sum over ranks of 1-D, contiguous float32 or float64; in place, if it is a numpy array."""

    def sendrecv(self, values: np.ndarray, to: int, received: np.ndarray, source: int) -> None:
        """Send ``values`` to one rank and fill ``received`` from another. Not collective."""
        raise CommunicatorError(f"communicator {self.name!r} has no messages from rank to rank. Use 'mpi'.")

    def alltoall(self, parts: np.ndarray, received: np.ndarray) -> None:
        """Row k goes to rank k, and row k comes from it. Both of shape (size, bytes), uint8; what is in its own row means nothing."""
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            self.sendrecv(parts[to], to, received[source], source)

    def allgather(self, part: np.ndarray, received: np.ndarray) -> None:
        """Every rank's ``part``, of equally many bytes (uint8), by rank: ``received`` is of shape (size, bytes)."""
        received[self.rank] = part
        self.alltoall(np.broadcast_to(part, received.shape), received)

    @abstractmethod
    def broadcast(self, array: np.ndarray) -> None:
        """Rank 0's content to all, in place; contiguous, any dtype."""

    @abstractmethod
    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in order of rank, on every rank."""

    @abstractmethod
    def restrict(self, groups: Sequence[Sequence[int]]) -> None:
        """Become the communicator of this rank's group, in place: whoever holds this one follows.

        Args:
            groups: disjoint; together all ranks; the same on every rank. Ranks keep their order inside a group.
        """

    def subgroup(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The communicator of this rank's group, and this one as it is; arguments as for ``restrict``."""
        part = copy.copy(self)
        part.restrict(groups)
        return part

    def agree(self, well: bool) -> bool:
        """Whether every rank says that all is well, and none has died; the same on all that are left."""
        return well

    def dead(self, seconds: float) -> list[int]:
        """The ranks that this one knows to have died, waiting for so long to know of any. Not collective."""
        return []

    def shrink(self) -> list[int]:
        """Become the communicator of the ranks that are left, in place; their numbers before, in order."""
        raise CommunicatorError(f"communicator {self.name!r} cannot go on without a rank that has died.")

    def share(self, values: np.ndarray) -> SharedVector:
        """One-sided memory with ``values`` in it, the same on every rank; a stretch lies on each."""
        raise CommunicatorError(f"mode='async' needs one-sided MPI; communicator {self.name!r} has none. Use 'mpi'.")

    def about(self) -> dict[str, Any]:
        """What is to be known of the library behind it, as JSON has it. Not collective."""
        return {}

    @abstractmethod
    def abort(self, status: int) -> None:
        """End the whole job with this status, 1 to 255. Not collective; does not return where size > 1."""
