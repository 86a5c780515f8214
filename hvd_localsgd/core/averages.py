"""One model's averages, from a start that all ranks agree on: each is decided on, sent, lands, and is refused if it is not finite."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hvd_localsgd.core import protocol
from hvd_localsgd.core.audit import audit
from hvd_localsgd.core.header import row
from hvd_localsgd.core.pipeline import Outcome, Pipeline
from hvd_localsgd.core.progress import Progress
from hvd_localsgd.core.protocol import Coordination, Decision
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.state import State
from hvd_localsgd.core.survivors import Survivors
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.errors import RankDied


class Averages:
    """Between the engine, which counts steps, and the pipeline, which moves numbers.

    Args:
        settings: what the user chose.
        coordination: how ranks come to a decision.
        pipeline: makes them.
        timings: where the seconds go.
        survivors: what happens if a rank dies.
    """

    def __init__(
        self, settings: Settings, coordination: Coordination, pipeline: Pipeline, timings: Timings, survivors: Survivors
    ) -> None:
        self.memory, self.progress, self.timings, self.survivors = pipeline.memory, Progress(), timings, survivors
        self._settings, self._coordination, self._pipeline = settings, coordination, pipeline
        self._overlap, self._wants_norm = settings.overlap, settings.guard is not None
        self._raises, self._restarts = settings.on_nonfinite == "raise", settings.on_nonfinite == "rollback"

    def begin(self, own: np.ndarray, description: str, resumes: bool) -> tuple[np.ndarray, bool]:
        """All ranks agree on what will be sent, and get rank 0's values (collective).

        Args:
            own: this rank's header.
            description: of what must be the same on all ranks.
            resumes: each rank has its own values, from a checkpoint.

        Returns:
            All ranks' headers, where rank 0's steps count for all; whether what is averaged has changed on this rank.
        """
        self._sent: Decision | None = None  # what is on its way
        self._failed: Decision | None = None  # what arrived and is not finite
        self._outcome = Outcome()  # of the round so far
        coordination, moved = self._coordination, False

        def start() -> np.ndarray:
            nonlocal moved  # if a rank dies behind the broadcast, the next one changes nothing
            table = protocol.agree(coordination.communicator, own, description)
            if not resumes:
                moved |= self.memory.broadcast(coordination.communicator, protocol.as_far(table))
            self._pipeline.start()
            coordination.start()
            return table

        table = self.survivors.agreed(start)
        table["total"] = table["total"][0]
        return table, moved

    def make(self, look: Callable[[], Mapping[str, Any]], due: bool) -> Decision:
        """Header, decision, and if it was decided an average, which with overlap is only begun (collective).

        Args:
            look: what the header says of this rank besides; again if a rank dies in here.
            due: whether its round ends here.
        """
        return self.survivors.repeat(lambda: self._make(look(), due))

    def _make(self, who: Mapping[str, Any], due: bool) -> Decision:
        progress, timings = self.progress, self.timings
        if timings.rounds:  # the first round traces and compiles
            progress.measure(timings.parts["compute"] + timings.parts["input"])
        decision = self._coordination.decide(row(**who, due=due, **self._look(), **progress.fields()), progress.last)
        timings.lap("wait")
        self._refuse_what_failed()  # the average before this one: now all ranks are here to hear of it
        progress.stopping = decision.stop
        if decision.average:
            self._send(decision)
        else:
            self.survivors.agree()
        return decision

    def _look(self) -> dict[str, float]:
        """At this rank's values: whether they are finite, and how far they have moved if a guard wants to know."""
        norm = self._pipeline.norm() if self._wants_norm else 0.0
        if self._raises:
            return {"finite": self.memory.is_finite(), "norm": norm}
        self._unfinite = self._pipeline.find_unfinite()
        return {"finite": not self._unfinite, "norm": norm}

    def _send(self, decision: Decision) -> None:
        place = self._coordination.place
        if decision.unfinite and (self._raises or not decision.goes_on):
            self._coordination.refuse(decision)
            self._outcome = Outcome(drift=math.nan)
            self.survivors.agree()
            return
        weight, blank = float(decision.weights[place]), place in decision.unfinite
        all_are_here = decision.reached > self.progress.reached  # and go on with the average
        waits = all_are_here or bool(decision.unfinite) or not self._overlap
        ranks = int((decision.weights > 0).sum())
        self._pipeline.send(weight, ranks, decision.now, waits, blank, everything=bool(decision.unfinite))
        self._sent, self.progress.landing = decision, self._overlap
        if waits:
            self._take()
            self._refuse_what_failed()
        if blank:
            self._start_again(decision.now.step)
        parts = self.timings.parts
        self.progress.measure_sync(sum(parts[part] for part in ("pack", "communicate", "unpack", "outer")))

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

    def exchange_messages(self, decision: Decision, message: bytes) -> list[bytes]:
        """Every rank's, if this sync has found that all have come further; else an empty list (collective).

        Args:
            decision: this sync's.
            message: this rank's, which counts if it has come no further than all.
        """
        if decision.reached <= self.progress.reached:
            return []
        own = message if decision.reached == self.progress.position else b""
        messages = self.survivors.agreed(lambda: self._coordination.gather(own))
        self.progress.reach(decision.reached)
        self.timings.lap("communicate")
        return messages

    def survived(self) -> None:
        """Ranks were lost, and with them what was on its way."""
        self._pipeline.survived()

    def land(self) -> None:
        """What was sent, if anything was, is here, or is waited for."""
        try:
            self._take()
        except RankDied as death:  # it will not come, and the steps of its round are still to be averaged
            self._sent = None
            self.progress.take_back()
            self.survivors.recover(death)

    def _take(self) -> None:
        if (sent := self._sent) is None:
            return
        landed = self._pipeline.land()
        self._outcome = self._outcome.and_then(landed)
        self._sent, self.progress.landing = None, 0
        if math.isfinite(landed.drift):
            self.memory.settle(sent.now.world)
            self.timings.lap("outer")
        else:
            self._failed = sent

    def _refuse_what_failed(self) -> None:
        if self._failed is not None:
            self._coordination.refuse_average(self._failed, self._pipeline.unfinite)

    def _audit(self, decision: Decision) -> None:
        """Whether all ranks hold the same now; what is on its way is not looked at."""
        if self._sent is None:
            averaged, communicator = self._pipeline.averaged(decision.now), self._coordination.communicator
            audit(communicator, self.memory, averaged, decision.now.step)

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

    def end_round(self, decision: Decision) -> None:
        """The next one begins, with what was decided."""
        averaged = not math.isnan(self._outcome.drift)
        self._record(self.progress.interval, decision.staleness)
        self.progress.begin_round(decision.now, int(decision.intervals[self._coordination.place]))
        if averaged and self._settings.audits(decision.now):
            self.survivors.agreed(lambda: self._audit(decision))

    def _record(self, interval: int, staleness: int = 0) -> None:
        """Of the round, and of the averages that landed in it."""
        who = self._coordination.communicator
        facts = {"interval": interval, "staleness": staleness, **self.progress.round(), **asdict(self._outcome)}
        self.timings.end_round(**facts, rank=who.rank, size=who.size, host=who.host)
        self._outcome = Outcome()

    def finish(self) -> None:
        """Training has ended on all ranks, which all get everybody's totals (collective)."""
        self._pipeline.finish()
        self._record(0)
        entries = self.survivors.gather(json.dumps(self.timings.sums()).encode())
        self.timings.totals = [json.loads(entry) for entry in entries]
