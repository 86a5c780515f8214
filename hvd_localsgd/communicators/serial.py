"""One process: no launcher, no MPI, nothing to wait for."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.communicators.base import Communicator


class SerialCommunicator(Communicator):
    """The identity: sums, broadcasts and gathers over a single rank."""

    name = "serial"
    rank, size, local_rank, local_size, began = 0, 1, 0, 1, 1

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.hosts, self.members = [self.host], [0]

    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """The one row there is."""
        return row.reshape(1)

    def allreduce(self, values: Any) -> Any:
        """The sum over one rank is there already."""
        return values

    def broadcast(self, array: np.ndarray) -> None:
        """Rank 0 has it already."""

    def gather(self, data: bytes) -> list[bytes]:
        """The one there is."""
        return [data]

    def restrict(self, groups: Sequence[Sequence[int]]) -> None:
        """One rank is its own group."""

    def abort(self, status: int) -> None:
        """Nobody else has to be told."""
