"""When the ranks synchronise: how many local steps (H) the next round has."""

from __future__ import annotations

import math
import operator
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

NEVER = sys.maxsize  # a step that no training comes to


class Schedule(ABC):
    """Decides the interval of the next round, once per synchronisation, on all ranks alike.

    A subclass must be a pure function of ``step``: every rank evaluates it and must get the same answer.

    Attributes:
        exact: averages at these steps and at the end of training, nowhere else; otherwise also before validation and
            where an epoch ends. What validation and the callbacks of an epoch then see is each rank's own model.
    """

    exact = False

    @abstractmethod
    def interval(self, step: int) -> int:
        """Local steps (>= 1) in the round that starts after ``step`` local steps."""

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as Keras' serialisation wants them."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """The inverse of ``get_config``."""
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Constant(Schedule):
    """The same number of local steps in every round: gap(I_T) = H in Stich (2018), I in Yu et al. (2018).

    Args:
        sync_every: H >= 1. With 1 the ranks average after every step, which for SGD without momentum is
            parallel mini-batch SGD.

    Raises:
        ValueError: not an integer, or below 1.
    """

    def __init__(self, sync_every: int = 16) -> None:
        self.sync_every = _positive_integer("sync_every", sync_every)

    def interval(self, step: int) -> int:
        """Always H."""
        return self.sync_every

    def get_config(self) -> dict[str, Any]:
        """``{"sync_every": H}``."""
        return {"sync_every": self.sync_every}


class OneShot(Schedule):
    """One-shot averaging: every rank trains alone, and the weights are averaged once, at the end.

    H = T in Stich (2018), section 2: outside the theorem, which needs H = O(sqrt(T)); a baseline.
    """

    exact = True

    def interval(self, step: int) -> int:
        """More steps than any training has."""
        return NEVER - step


class SyncSteps(Schedule):
    """Any set I_T of synchronisation times: average after exactly these local steps, and at the end of training.

    Stich (2018), Definition 2.1: the theorem depends on gap(I_T), the longest round.

    Args:
        steps: local steps after which to average, counted from 1, strictly increasing.

    Attributes:
        gap: the longest distance between two of them, or from 0 to the first. The round after the last one ends when
            training ends, and may be longer.

    Raises:
        ValueError: empty, not integers >= 1, or not strictly increasing.
    """

    exact = True

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = [_positive_integer("each of steps", step) for step in steps]
        if not self.steps:
            raise ValueError("steps is empty; for a single average at the end of training take OneShot().")
        if any(late <= early for early, late in pairwise(self.steps)):
            raise ValueError(f"steps must be strictly increasing. Received: {steps!r}")
        self.gap = max(late - early for early, late in pairwise([0, *self.steps]))

    def interval(self, step: int) -> int:
        """Up to the next of the steps."""
        place = bisect_right(self.steps, step)
        return (self.steps[place] if place < len(self.steps) else NEVER) - step

    def get_config(self) -> dict[str, Any]:
        """``{"steps": [...]}``."""
        return {"steps": self.steps}

    def __repr__(self) -> str:
        return f"SyncSteps({len(self.steps)} steps up to {self.steps[-1]}, gap {self.gap})"


class Growing(Schedule):
    """Rounds that grow with the square root of time: H_t = scale sqrt(t), for when the end is unknown.

    H = O(sqrt(T / (K b))) keeps the linear speed-up (Stich 2018, Corollary 2.3); where T is unknown the paper advises
    to communicate more often at the start. This applies the rule to the time that has passed.

    Args:
        scale: > 0; the rule's is 1 / sqrt(K b) for K ranks and batches of b.
        maximum: H is never larger; None for no limit.

    Raises:
        ValueError: scale is not positive, maximum not an integer >= 1.
    """

    def __init__(self, scale: float = 1.0, maximum: int | None = None) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be > 0. Received: {scale!r}")
        self.scale = float(scale)
        self.maximum = None if maximum is None else _positive_integer("maximum", maximum)

    def interval(self, step: int) -> int:
        """scale sqrt(step), rounded down, between 1 and ``maximum``."""
        return min(max(1, int(self.scale * math.sqrt(step))), self.maximum or NEVER)

    def get_config(self) -> dict[str, Any]:
        """``{"scale": ..., "maximum": ...}``."""
        return {"scale": self.scale, "maximum": self.maximum}


SCHEDULES: tuple[type[Schedule], ...] = (Constant, OneShot, SyncSteps, Growing)


def as_schedule(sync_every: int | Schedule) -> Schedule:
    """An int becomes ``Constant``; a schedule passes.

    Raises:
        ValueError: neither an integer >= 1 nor a schedule.
    """
    return sync_every if isinstance(sync_every, Schedule) else Constant(sync_every)


def _positive_integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be an integer >= 1 (local steps per round) or a Schedule. Received: {value!r}")
    return number
