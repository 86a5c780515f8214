"""What becomes of the average: the outer step, with the weights of the last sync as where it starts from.

Delta = x_old - x_bar, what the ranks have learned since the last sync with its sign turned, is a gradient for the outer step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core.layout import Array, Block, Stretch
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.stages import Stage
from hvd_localsgd.core.state import State, numbered, put_back

_STRETCH = 1 << 16  # elements


class Outer(ABC):
    """A rule for the outer step: element by element, with one further number kept for each.

    Attributes:
        needs: as of a ``Schedule``.
    """

    needs: frozenset[str] = frozenset()

    @abstractmethod
    def step(self, old: np.ndarray, average: np.ndarray, momentum: np.ndarray, rate: float | None) -> None:
        """In place: ``average`` becomes the new weights, ``momentum`` the new momentum.

        Args:
            old: the weights after the last outer step, float32 or float64, flat; may be overwritten.
            average: of the ranks' weights now, of the same shape.
            momentum: what the last call has left, at first zeros.
            rate: the learning rate of the local steps, if it is needed.
        """

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Outer:
        """The inverse of ``get_config``."""
        return cls(**config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.get_config().items())})"


class Mean(Outer):
    """The average itself, and nothing kept: Local SGD."""

    def step(self, old: np.ndarray, average: np.ndarray, momentum: np.ndarray, rate: float | None) -> None:
        """Not called: nothing is to be done."""

    def get_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class SlowMo(Outer):
    """Slow momentum: u <- beta u + (x_old - x_bar) / rate, x <- x_old - alpha rate u.

    Wang, Tantia, Ballas & Rabbat (2020, arXiv 1910.00643), with the *current* rate of the local steps. With beta = 0 and one rank it
    is Lookahead. The momentum of local SGD is set to zero at each sync, that of Adam is kept, as they do.

    Args:
        alpha: > 0; theirs is 1.
        beta: 0 <= beta < 1; theirs are 0.4 to 0.8, for H = 12 to 48.

    Raises:
        ValueError: out of range.
    """

    needs = frozenset({"rate"})

    def __init__(self, alpha: float = 1.0, beta: float = 0.5) -> None:
        self.alpha, self.beta = _positive("alpha", alpha), _momentum("beta", beta)

    def step(self, old: np.ndarray, average: np.ndarray, momentum: np.ndarray, rate: float | None) -> None:
        """With a rate of 0 nothing has moved, and nothing moves."""
        if not rate:
            average[:] = old
            return
        momentum *= self.beta
        np.subtract(old, average, out=average)
        average *= 1 / rate
        momentum += average
        np.multiply(momentum, -self.alpha * rate, out=average)
        average += old

    def get_config(self) -> dict[str, Any]:
        """``{"alpha": ..., "beta": ...}``."""
        return {"alpha": self.alpha, "beta": self.beta}


class Nesterov(Outer):
    """Nesterov's momentum on Delta: u <- m u + Delta, x <- x_old - rate (Delta + m u). DiLoCo's outer step.

    Douillard et al. (2023, arXiv 2311.08105): rate 0.7, momentum 0.9, with AdamW inside, whose moments are kept, and H of 100 and more.

    Args:
        learning_rate: > 0.
        momentum: 0 <= m < 1.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, learning_rate: float = 0.7, momentum: float = 0.9) -> None:
        self.learning_rate = _positive("learning_rate", learning_rate)
        self.momentum = _momentum("momentum", momentum)

    def step(self, old: np.ndarray, average: np.ndarray, momentum: np.ndarray, rate: float | None) -> None:
        """As above."""
        delta = np.subtract(old, average, out=average)
        momentum *= self.momentum
        momentum += delta
        delta += self.momentum * momentum
        delta *= -self.learning_rate
        average += old  # which delta is

    def get_config(self) -> dict[str, Any]:
        """``{"learning_rate": ..., "momentum": ...}``."""
        return {"learning_rate": self.learning_rate, "momentum": self.momentum}


OUTERS: tuple[type[Outer], ...] = (Mean, Nesterov, SlowMo)
_NAMED = {"mean": Mean, "slowmo": SlowMo, "diloco": Nesterov}


def as_outer(outer: Any) -> Any:
    """A name becomes its rule; a rule passes, and so does what looks like a Keras optimizer.

    Raises:
        ValueError: none of these.
    """
    if isinstance(outer, Outer) or (hasattr(outer, "apply_gradients") and hasattr(outer, "get_config")):
        return outer
    if isinstance(outer, str) and outer in _NAMED:
        return _NAMED[outer]()
    raise ValueError(
        f"outer must be one of {tuple(_NAMED)}, a rule such as SlowMo(), or a Keras optimizer. Received: {outer!r}"
    )


class OuterStep(Stage):
    """The rule at work, on weights and not on statistics. Extra memory: two copies of the weights."""

    part = "outer"

    def __init__(self, rule: Outer) -> None:
        self._rule = rule
        self._momentum: list[np.ndarray] | None = None  # goes on from training to training, as the optimizer's does
        self._rate: float | None = None

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """x_old is the common start."""
        self._old = [
            np.empty(0, block.wire) if block.kind.plain else np.array(array, block.wire)
            for block, array in zip(blocks, arrays, strict=True)
        ]
        if self._momentum is None:
            self._momentum = [np.zeros_like(old) for old in self._old]

    def prepare(self, now: Now, arrays: Sequence[Array]) -> None:
        """The rate at this sync; an average inside a group is no more than that."""
        self._rate, self._rests = now.rate, not now.world

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """The average becomes the new weights, in stretches that stay in cache."""
        assert self._momentum is not None
        for index, first, last in averaged:
            if self._rests or not self._old[index].size:
                continue
            for start in range(first, last, _STRETCH):
                stretch = slice(start, min(start + _STRETCH, last))
                old = self._old[index][stretch]
                average = np.array(arrays[index][stretch], old.dtype)
                self._rule.step(old, average, self._momentum[index][stretch], self._rate)
                arrays[index][stretch] = old[:] = average

    def state(self) -> State:
        """x_old and the momentum."""
        return numbered("old", self._old) | numbered("momentum", self._momentum or [])

    def load(self, state: State) -> None:
        """The inverse."""
        put_back("old", state, self._old)
        put_back("momentum", state, self._momentum or [])


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be > 0. Received: {value!r}")
    return float(value)


def _momentum(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1. Received: {value!r}")
    return float(value)
