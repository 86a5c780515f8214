"""What a launcher tells the processes that it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Launch:
    """Who started this process.

    Attributes:
        launcher: in words, as a user would name it.
        size: how many processes it says that it started.
        rank: which of them this is.
        slots: how many it thinks there is room for; None: it does not say.
        joins: whether its processes are to find each other even where it is one alone.
        hint: what somebody who has one process only may have meant to do.
    """

    launcher: str
    size: int
    rank: int
    slots: int | None = None
    joins: bool = True
    hint: str = ""


def number(environment: Environment, *names: str, default: int) -> int:
    """The first of these variables that holds a number >= 0."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)
