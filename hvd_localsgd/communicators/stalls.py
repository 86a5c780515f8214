"""A rank does not come: the others say for whom they wait, and at last no longer wait."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_localsgd.errors import RankFailed, listed

_COME, _KILL = 0, 1  # what a notice says: this rank has come to that exchange; end that process


@dataclass
class Patience:
    """How long ranks wait for each other.

    Attributes:
        warning: seconds after which it is said who has not come, and again every so many.
        timeout: seconds after which that rank is given up; None: never.

    Raises:
        ValueError: one of them is not > 0.
    """

    warning: float = 60.0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not self.warning > 0 or not (self.timeout is None or self.timeout > 0):
            raise ValueError(
                f"stall_warning must be seconds > 0, and stall_timeout too, or None. Received: {self.warning!r}, {self.timeout!r}"
            )


def _from_environment() -> Patience:
    timeout = os.environ.get("HVD_LOCALSGD_STALL_TIMEOUT")
    return Patience(
        float(os.environ.get("HVD_LOCALSGD_STALL_WARNING", "60")), None if timeout is None else float(timeout)
    )


def change(warning: float | None, timeout: float | None) -> None:
    """Of this process; None: as it is.

    Raises:
        ValueError: as ``Patience``.
    """
    chosen = Patience(
        patience.warning if warning is None else warning, patience.timeout if timeout is None else timeout
    )
    patience.warning, patience.timeout = chosen.warning, chosen.timeout


patience = _from_environment()  # of this process; changed in place by ``init``


class Stalls:
    """Of one communicator. While nobody waits for long, nothing is sent.

    A rank that waits tells ranks 0 and 1. These, who then know who else waits, say who does not.

    Args:
        comm: of its own, of mpi4py.
        hosts: of each rank.
        processes: process id of each rank.
        may_die: whether a rank that is given up may be killed, and the others go on.
        seen: in words, where a rank was when it last came.
    """

    def __init__(
        self,
        comm: Any,
        hosts: list[str],
        processes: list[int],
        may_die: bool,
        seen: Callable[[int], str],
    ) -> None:
        self._comm, self._hosts, self._processes, self._seen = comm, hosts, processes, seen
        self._may_die = may_die
        self._rank, self._arrived = comm.Get_rank(), np.zeros(comm.Get_size(), np.int64)
        self._exchange, self._said, self._gave_up = 0, 0, False

    def begin(self) -> None:
        """This rank has come to the next exchange."""
        self._exchange += 1
        self._said, self._gave_up = 0, False

    def end(self) -> None:
        """All have."""
        self._read()

    def wait(self, seconds: float) -> None:
        """This rank has waited for so long, again and again.

        Raises:
            RankFailed: too long.
        """
        timeout = math.inf if patience.timeout is None else patience.timeout
        notice = 0.1 * min(patience.warning, timeout)  # who has waited for so long is known to have come
        if seconds > timeout + notice:
            self._give_up(seconds)
        if seconds < (self._said * patience.warning or notice):
            return
        self._said += 1
        if self._said == 1:
            self._tell(
                [rank for rank in (0, 1) if rank != self._rank and rank < self._arrived.size], _COME, self._exchange
            )
            return
        if missing := self._missing():
            print(
                f"hvd_localsgd: {self._me} has waited for {seconds:.0f} s; not here: {self._names(missing)}",
                file=sys.stderr,
                flush=True,
            )

    @property
    def _me(self) -> str:
        return f"rank {self._rank} on {self._hosts[self._rank]}"

    def _missing(self) -> list[int]:
        """Who has not come, for the one rank that is to say so."""
        self._read()
        self._arrived[self._rank] = self._exchange
        speaker = 0 if self._arrived[0] == self._exchange else 1
        return np.flatnonzero(self._arrived < self._exchange).tolist() if self._rank == speaker else []

    def _give_up(self, seconds: float) -> None:
        if self._gave_up:
            return  # MPI will tell us of its death
        missing, timeout = self._missing(), patience.timeout
        assert timeout is not None
        if missing and self._may_die and all(self._kill(rank) for rank in missing):
            print(
                f"hvd_localsgd: {self._me} has waited for {seconds:.0f} s, and has killed {self._names(missing)}",
                file=sys.stderr,
            )
            self._gave_up = True
            return
        if missing or seconds > 2 * timeout:
            who = self._names(missing) if missing else "others, among them ranks 0 and 1"
            raise RankFailed(f"{self._me} has waited for {seconds:.0f} s (stall_timeout={timeout:g}) for {who}.")

    def _names(self, ranks: list[int]) -> str:
        return listed([f"rank {rank} on {self._hosts[rank]}{self._seen(rank)}" for rank in ranks])

    def _kill(self, rank: int) -> bool:
        """Whether somebody who waits is on its host, and does it."""
        here = [
            other
            for other in np.flatnonzero(self._arrived == self._exchange).tolist()
            if self._hosts[other] == self._hosts[rank]
        ]
        if self._hosts[self._rank] == self._hosts[rank]:
            _end(self._processes[rank])
        elif here:
            self._tell(here[:1], _KILL, rank)
        return bool(here)

    def _tell(self, ranks: list[int], what: int, number: int) -> None:
        notice = np.array([what, self._rank, number], np.int64)
        self._sent = notice, [self._comm.Isend(notice, rank) for rank in ranks]  # kept until they have arrived

    def _read(self) -> None:
        notice = np.empty(3, np.int64)
        while self._comm.Iprobe():
            self._comm.Recv(notice)
            if notice[0] == _KILL:
                _end(self._processes[notice[2]])
            else:
                self._arrived[notice[1]] = notice[2]


def _end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(process, signal.SIGKILL)
