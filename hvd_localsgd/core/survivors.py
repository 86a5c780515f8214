"""A rank has died: the others notice, agree on what counts, and go on without it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hvd_localsgd.core import failures
from hvd_localsgd.core.agreement import where
from hvd_localsgd.errors import RankDied, RankFailed

_KNOWN_SECONDS = 2.0  # in which MPI knows who died
_Result = TypeVar("_Result")


class Survivors:
    """Of a training on this communicator, which all its trainings share.

    A call that a rank's death breaks off has come to its end on some ranks and not on others. So what it has done counts once all
    have agreed that they came to its end; else all that are left make it again.

    Args:
        communicator: shrinks in place.
        go_on: whether that is wanted. Without ULFM it cannot be had: the launcher ends the job when a rank dies.
    """

    def __init__(self, communicator: Any, go_on: bool) -> None:
        self._communicator, self._wanted = communicator, go_on

    @property
    def go_on(self) -> bool:
        """Whether a rank may die."""
        return self._wanted and self._communicator.resilient

    def agree(self) -> None:
        """All ranks have come to here, and what they have done counts (collective).

        Raises:
            RankDied: on all ranks that are left, if one has died meanwhile.
        """
        if self.go_on and not self._communicator.agree(True):
            raise RankDied("a rank has died", all_know=True)

    def repeat(self, call: Callable[[], _Result]) -> _Result:
        """The result of a call that ends with ``agree``, and that all ranks make together; as often as it is broken off.

        Raises:
            RankFailed: a rank has died, and nobody wanted to go on without it.
        """
        while True:
            try:
                return call()
            except RankDied as death:
                self.recover(death)

    def agreed(self, call: Callable[[], _Result]) -> _Result:
        """The result of a call to whose end all ranks have come (collective).

        Raises:
            RankFailed: as ``repeat``.
        """

        def to_the_end() -> _Result:
            result = call()
            self.agree()
            return result

        return self.repeat(to_the_end)

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank that is left, in order of rank (collective).

        Raises:
            RankFailed: as ``repeat``.
        """
        return self.agreed(lambda: self._communicator.gather(data))

    def recover(self, death: RankDied) -> None:
        """Without the dead (collective).

        Raises:
            RankFailed: nobody wanted that.
        """
        communicator = self._communicator
        if not self.go_on:
            who = where(communicator.dead(_KNOWN_SECONDS), communicator.hosts) or "a rank"
            raise RankFailed(f"{who} has died. Under on_failure='continue' the others would go on.") from death
        began = time.perf_counter()
        if not death.all_know:
            communicator.agree(False)
        members, hosts, before = list(communicator.members), list(communicator.hosts), communicator.size
        left = communicator.shrink()
        failures.survived(communicator, left)
        if communicator.rank == 0 and communicator.size < before:
            dead = [rank for rank in range(before) if rank not in left]
            names = where([members[rank] for rank in dead], dict(zip(members, hosts, strict=True)))
            seconds = time.perf_counter() - began
            print(
                f"hvd_localsgd: {names} died; {communicator.size} of {communicator.began} ranks go on after {seconds:.3f} s. What it was "
                "training on is not seen any more, unless shard() has dealt out a Dataset.",
                file=sys.stderr,
                flush=True,
            )
