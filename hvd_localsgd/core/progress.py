"""How far this rank is, and how fast it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FINISHED = math.inf
BEGIN = -1.0


@dataclass(slots=True)
class Progress:
    """One rank's training.

    Attributes:
        steps, samples: of the round.
        total: local steps before the round, since training began.
        interval: H of the round.
        position: where this rank is; it only grows (two per epoch in ``fit``), and is infinite when it has finished.
        reached: where every rank has come to, as of the last sync.
        pace: seconds of a local step, lately; 0: not known yet.
        wants_stop: this rank wants training to stop.
        stopping: some rank does, as of the last sync.
    """

    steps: int = 0
    samples: float = 0.0
    total: int = 0
    interval: int = 0
    position: float = 0.0
    reached: float = FINISHED
    pace: float = 0.0
    wants_stop: bool = False
    stopping: bool = False

    def begin(self, total: int, interval: int) -> None:
        """A training of its own; steps are counted on from ``total``."""
        self.total = total
        self.steps, self.samples, self.interval = 0, 0.0, interval
        self.position = self.reached = 0.0
        self.pace, self.wants_stop, self.stopping = 0.0, False, False

    def begin_round(self, interval: int) -> None:
        """The steps of the last round are behind us."""
        self.total += self.steps
        self.steps, self.samples, self.interval = 0, 0.0, interval

    def measure(self, seconds: float) -> None:
        """The steps of this round took so long: half of it counts, half what was measured before."""
        if self.steps:
            latest = seconds / self.steps
            self.pace = (self.pace + latest) / 2 if self.pace else latest

    def round(self) -> dict[str, int]:
        """The steps of this round, for its record."""
        return {"first_step": self.total + 1, "last_step": self.total + self.steps, "steps": self.steps}

    def fields(self) -> dict[str, Any]:
        """For the header."""
        return {
            "position": self.position,
            "steps": self.steps,
            "total": self.total + self.steps,
            "samples": self.samples,
            "pace": self.pace,
            "stop": self.wants_stop,
        }
