"""When the ranks synchronise: how many local steps (H) the next round has."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Any

import keras


class Schedule(ABC):
    """Decides the interval of the next round, once per synchronisation, on all ranks alike.

    A subclass must be a pure function of ``step``: every rank evaluates it and must get the same answer.
    """

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


@keras.saving.register_keras_serializable("hvd_localsgd")
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
