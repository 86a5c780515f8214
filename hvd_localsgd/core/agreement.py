"""Is it the same everywhere? Nothing is sent before all ranks agree on what it is; the first difference is named in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvd_localsgd.core.settings import Settings
from hvd_localsgd.errors import RanksDiffer, listed

_SAME = "Build the same model, and the same optimizer, on every rank."
STRETCH = 1 << 20  # elements broadcast at a time


@dataclass(frozen=True, slots=True)
class Context:
    """What a front end knows of a training that must be the same on all ranks.

    Attributes:
        facts: name and value.
        parts: of the model, in order: ``"class"`` and configuration of its layers and its optimizers, as JSON takes it.
        updates: steps that the optimizer has taken in its life, as it says itself; 0: the engine has counted all of them.
        brought: local steps that this rank's optimizer has taken in another process: what a file has restored.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Mapping[str, Any]] = ()
    brought: int = 0
    updates: int = 0


NOTHING = Context()


def describe(settings: Settings, variables: Sequence[Sequence[Any]], context: Context) -> str:
    """All that must be the same on all ranks, as text.

    Args:
        settings: what the user chose.
        variables: ``[name, shape, dtype]`` of each that is ever sent, in order.
        context: what the front end knows besides.
    """
    facts = {**context.facts, **settings.description()}
    return json.dumps([facts, list(context.parts), list(variables)])


def fingerprint(description: str) -> int:
    """64 bits of it, for the header."""
    return int.from_bytes(hashlib.sha256(description.encode()).digest()[:8], "little")


def check(communicator: Any, fingerprints: np.ndarray, description: str) -> None:
    """Raise unless all ranks have the same description (collective).

    Raises:
        RanksDiffer: the same on every rank.
    """
    if (differs := fingerprints != fingerprints[0]).any():
        raise RanksDiffer(_difference(communicator, int(differs.argmax()), description))


def _difference(communicator: Any, rank: int, description: str) -> str:
    """Between this rank and rank 0, who alone send what they have: of thousands of ranks it would be gigabytes."""
    sent = communicator.gather(description.encode() if communicator.rank in (0, rank) else b"")
    names = communicator.hosts
    (first_facts, first_parts, first_variables), (facts, parts, variables) = json.loads(sent[0]), json.loads(sent[rank])
    who, whose = where([rank], names), where([0], names)
    for name in {**first_facts, **facts}:
        if facts.get(name) != first_facts.get(name):
            return f"Settings differ: {who} has {name}={facts.get(name)}, {whose} has {name}={first_facts.get(name)}."
    for what, theirs, ours in (("variable", variables, first_variables), ("part", parts, first_parts)):
        for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
            if one != other:
                one, other = _where_they_differ(one, other)
                return f"Ranks hold different models: {what} {index} is {one} on {who}, but {other} on {whose}. {_SAME}"
        if len(theirs) != len(ours):
            return f"Ranks hold different models: {len(theirs)} {what}s on {who}, {len(ours)} on {whose}. {_SAME}"
    return "Ranks hold different models."  # not reached: a different fingerprint has a different description


def _where_they_differ(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two things of the same class, what each has that the other has not."""
    if not isinstance(one, dict) or one.get("class") != other.get("class"):
        return one, other
    names = [name for name in {**one, **other} if name == "class" or one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def where(ranks: Sequence[int], names: Sequence[str] | Mapping[int, str]) -> str:
    """``rank 2 on node7``: how errors name the ranks they are about."""
    return listed([f"rank {rank} on {names[rank]}" for rank in ranks])


def from_rank_0(own: np.ndarray, communicator: Any) -> np.ndarray | None:
    """Rank 0's values of a flat array, any dtype; None where they are this rank's already (collective).

    In stretches, so that no copy is needed where nothing differs.
    """
    value = None
    for start in range(0, own.size, STRETCH):
        stretch = slice(start, start + STRETCH)
        received = own[stretch].copy()
        communicator.broadcast(received)
        if received.tobytes() != own[stretch].tobytes():
            value = own.copy() if value is None else value
            value[stretch] = received
    return value
