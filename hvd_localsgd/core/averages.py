"""One model's averages: each is sent, lands, and is refused if it is not finite."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, replace
from typing import Any

from hvd_localsgd.core.audit import audit
from hvd_localsgd.core.pipeline import Outcome, Pipeline
from hvd_localsgd.core.progress import Progress
from hvd_localsgd.core.protocol import Coordination, Decision
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.state import State
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.errors import RankDied


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
        self.memory, self.survivors = pipeline.memory, pipeline.survivors
        self._pipeline, self._coordination = pipeline, coordination
        self._progress, self._timings = progress, timings
        self._overlap, self._wants_norm = settings.overlap, settings.guard is not None
        self._raises, self._restarts = settings.on_nonfinite == "raise", settings.on_nonfinite == "rollback"

    def start(self) -> None:
        """All ranks hold the same values and are about to train (collective)."""
        self._pipeline.start()
        self._sent: Decision | None = None  # what is on its way
        self._failed: Decision | None = None  # what arrived and is not finite
        self._outcome = Outcome()  # of the round so far

    def look(self) -> dict[str, float]:
        """What the header says of this rank's values: whether they are finite, and how far they have moved if a guard wants to know."""
        norm = self._pipeline.norm() if self._wants_norm else 0.0
        if self._raises:
            return {"finite": self.memory.is_finite(), "norm": norm}
        self._unfinite = self._pipeline.find_unfinite()
        return {"finite": not self._unfinite, "norm": norm}

    def make(self, decision: Decision) -> None:
        """The average that was decided on; with overlap it may only be begun."""
        place = self._coordination.place
        if decision.unfinite and (self._raises or not decision.goes_on):
            self._coordination.refuse(decision)
            self._outcome = Outcome(drift=math.nan)
            self.survivors.agree()
            return
        weight, blank = float(decision.weights[place]), place in decision.unfinite
        all_are_here = decision.reached > self._progress.reached  # and go on with the average
        waits = all_are_here or bool(decision.unfinite) or not self._overlap
        self._pipeline.send(weight, int((decision.weights > 0).sum()), decision.now, waits, blank)
        self._sent, self._progress.landing = decision, self._overlap
        if waits:
            self.land()
            self.refuse_what_failed()
        if blank:
            self._start_again(decision.now.step)
        parts = self._timings.parts
        self._progress.measure_sync(sum(parts[part] for part in ("pack", "communicate", "unpack", "outer")))

    def _start_again(self, step: int) -> None:
        """This rank has taken the others' average."""
        who = self._coordination.communicator
        if self._restarts:
            self.memory.restart()
        warnings.warn(
            f"NaN or infinity in {self._unfinite} of rank {who.rank} on {who.host} at local step {step}: it was left out of the average, and goes "
            "on from it" + (" with a new optimizer." if self._restarts else "."),
            stacklevel=2,
        )

    def survived(self) -> None:
        """Ranks were lost, and with them what was on its way."""
        self._pipeline.survived()

    def land(self) -> None:
        """What was sent, if anything was, is here, or is waited for.

        Raises:
            RankDied: it will not come: the round that has sent it goes on.
        """
        if (sent := self._sent) is None:
            return
        try:
            landed = self._pipeline.land()
        except RankDied:
            self._sent = None
            self._progress.take_back()
            raise
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

    def audit(self, decision: Decision) -> None:
        """Whether all ranks hold the same now (collective); what is on its way is not looked at."""
        if self._sent is None:
            averaged, communicator = self._pipeline.averaged(decision.now), self._coordination.communicator
            audit(communicator, self.memory, averaged, decision.now.step)
        self.survivors.agree()

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
