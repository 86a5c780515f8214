"""One model's averages: each is sent, lands, and is refused if it is not finite."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from hvd_localsgd.core.pipeline import Outcome, Pipeline
from hvd_localsgd.core.progress import Progress
from hvd_localsgd.core.protocol import Coordination, Decision
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.state import State
from hvd_localsgd.core.timing import Timings


class Averages:
    """Between the engine, which decides, and the pipeline, which moves numbers.

    Args:
        pipeline: makes them.
        coordination: how ranks hear of one that is not finite.
        progress: of the engine.
        timings: where the seconds go.
        settings: what the user chose.
    """

    def __init__(
        self, pipeline: Pipeline, coordination: Coordination, progress: Progress, timings: Timings, settings: Settings
    ) -> None:
        self.memory, self._pipeline, self._coordination = pipeline.memory, pipeline, coordination
        self._progress, self._timings = progress, timings
        self._overlap, self._wants_norm = settings.overlap, settings.guard is not None

    def start(self) -> None:
        """All ranks hold the same values and are about to train (collective)."""
        self._pipeline.start()
        self._sent: Decision | None = None  # what is on its way
        self._failed: Decision | None = None  # what arrived and is not finite
        self._outcome = Outcome()  # of the round so far

    def look(self) -> dict[str, float]:
        """What the header says of this rank's values: whether they are finite, and how far they have moved if a guard wants to know."""
        norm = self._pipeline.norm() if self._wants_norm else 0.0
        return {"finite": self.memory.is_finite(), "norm": norm}

    def make(self, decision: Decision) -> None:
        """The average that was decided on; with overlap it may only be begun."""
        if decision.unfinite:
            self._coordination.refuse(decision)
            self._outcome = Outcome(drift=math.nan)
            return
        weight = float(decision.weights[self._coordination.place])
        all_are_here = decision.reached > self._progress.reached  # and go on with the average
        waits = all_are_here or not self._overlap
        self._pipeline.send(weight, int((decision.weights > 0).sum()), decision.now, waits)
        self._sent, self._progress.landing = decision, self._overlap
        if waits:
            self.land()
            self.refuse_what_failed()
        parts = self._timings.parts
        self._progress.measure_sync(sum(parts[part] for part in ("pack", "communicate", "unpack", "outer")))

    def land(self) -> None:
        """What was sent, if anything was, is here, or is waited for."""
        if (sent := self._sent) is None:
            return
        landed = self._pipeline.land()
        self._outcome = self._outcome.and_then(landed)
        self._sent, self._progress.landing = None, 0
        if math.isfinite(landed.drift):
            self.memory.settle(sent.now.world)
            self._timings.lap("outer")
        else:
            self._failed = sent

    def refuse_what_failed(self) -> None:
        """Where all ranks are here to hear of it."""
        if self._failed is not None:
            self._coordination.refuse_average(self._failed, self._pipeline.unfinite)

    @property
    def flies(self) -> bool:
        """Whether one is on its way."""
        return self._sent is not None

    def state(self) -> State:
        """What is kept from one to the next; none may be on its way."""
        return self._pipeline.state()

    def load(self, state: State) -> None:
        """The inverse, once started."""
        self._pipeline.load(state)

    def end_round(self, who: Any, interval: int, staleness: int = 0) -> None:
        """A record of the round, and of the averages that landed in it."""
        outcome, self._outcome = replace(self._outcome, staleness=staleness), Outcome()
        facts = {"interval": interval, **self._progress.round(), **asdict(outcome)}
        self._timings.end_round(**facts, rank=who.rank, size=who.size, host=who.host)

    def finish(self) -> None:
        """Training has ended on all ranks (collective)."""
        self._pipeline.finish()
