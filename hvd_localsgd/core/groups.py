"""Groups of ranks that average among themselves more often than all do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core.layout import Array, Chunk
from hvd_localsgd.core.reducers import Library, Reducer
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.state import State
from hvd_localsgd.errors import RanksDiffer


class Groups:
    """Inside a group every H steps, over all ranks every ``every`` * H: hierarchical local SGD.

    Lin et al. (2018, arXiv 1808.07217), hierarchical local SGD; Castiglia, Das & Patterson (2021, arXiv 2010.13700).

    Args:
        ranks: ``"node"``: ranks on the same host are a group; or lists of ranks, each rank in one of them.
        every: >= 2, the rounds of a group after which the average is over all ranks.

    Raises:
        ValueError: something else.
    """

    def __init__(self, ranks: str | Sequence[Sequence[int]] = "node", every: int = 4) -> None:
        listed = [] if isinstance(ranks, str) else [[int(rank) for rank in group] for group in ranks]
        everybody = sorted(rank for group in listed for rank in group)
        if (isinstance(ranks, str) and ranks != "node") or everybody != list(range(len(everybody))) or [] in listed:
            raise ValueError(
                f'groups must be "node", or lists of ranks with each rank in one of them. Received: {ranks!r}'
            )
        if type(every) is not int or every < 2:
            raise ValueError(f"every must be a number of rounds >= 2. Received: {every!r}")
        self.ranks: str | list[list[int]] = "node" if isinstance(ranks, str) else listed
        self.every = every

    def of_ranks(self, communicator: Any) -> list[list[int]]:
        """The ranks of each group, as they are numbered now.

        Raises:
            RanksDiffer: on all ranks, if the lists are not of this job's ranks.
        """
        if communicator.size == 1:
            return [[0]]
        if isinstance(self.ranks, str):
            hosts = communicator.hosts
            return [[rank for rank, host in enumerate(hosts) if host == each] for each in dict.fromkeys(hosts)]
        if sum(map(len, self.ranks)) != communicator.began:
            raise RanksDiffer(f"groups={self.ranks!r} are not of {communicator.began} ranks, which this job has.")
        now = {member: rank for rank, member in enumerate(communicator.members)}  # some may have died
        listed = [[now[member] for member in group if member in now] for group in self.ranks]
        return [group for group in listed if group]

    def get_config(self) -> dict[str, Any]:
        """``{"ranks": ..., "every": ...}``."""
        return {"ranks": self.ranks, "every": self.every}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Groups:
        """The inverse."""
        return cls(**config)

    def __repr__(self) -> str:
        return f"Groups({self.ranks!r}, every={self.every})"


def as_groups(groups: Any) -> Groups | None:
    """``"node"``, and lists of ranks, become ``Groups``; these and None pass.

    Raises:
        ValueError: as ``Groups``.
    """
    return groups if groups is None or isinstance(groups, Groups) else Groups(groups)


class Grouped:
    """A reducer of reducers: first inside each group; over all ranks the first of each group then add up what they have, and tell it.

    So that of a host's ranks one speaks to other hosts: what crosses the network does not depend on how many there are.

    Args:
        communicator: of all ranks.
        inside: of this rank's group.
        across: of the first ranks of all groups; on the others it is not used.
        leads: whether this rank is the first of its group.
    """

    one_sided = False

    def __init__(self, communicator: Any, inside: Library, across: Reducer, leads: bool) -> None:
        self.communicator, self.inside, self.across, self.leads = communicator, inside, across, leads
        self.chunk_bytes, self._world = inside.chunk_bytes, True

    def start(self, plan: Sequence[Chunk], arrays: Sequence[Array]) -> None:
        """That of its parts."""
        self.across.start(plan, arrays)

    def prepare(self, now: Now) -> None:
        """Which ranks this sync is over."""
        self.across.prepare(now)
        self._world = now.world

    def sum(self, chunk: Chunk, values: Array) -> Array:
        """Of the group, or of all."""
        values = self.inside.sum(chunk, values)
        if not self._world:
            return values
        if self.leads:
            values = self.across.sum(chunk, values)
        else:
            values *= 0.0
        return self.inside.sum(chunk, values)

    def total(self, value: float) -> float:
        """Always over all ranks, which have to know alike whether something is wrong."""
        return float(self.communicator.allreduce(np.array([value]))[0])

    def bytes(self, chunk: Chunk) -> int:
        """Of those given to other groups, and to this rank's own."""
        own = self.inside.bytes(chunk)
        return own if not self._world else 2 * own + (self.across.bytes(chunk) if self.leads else 0)

    @property
    def error(self) -> float:
        """Changes are encoded between groups only."""
        return self.across.error

    def state(self) -> State:
        """Between groups."""
        return self.across.state()

    def load(self, state: State) -> None:
        """The inverse."""
        self.across.load(state)

    def free(self) -> None:
        """That of its parts."""
        self.across.free()
