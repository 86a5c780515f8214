"""Local SGD: the engine behind the callback, the optimizer and ``ModelAverager``.

Stich (2018), Algorithms 1 and 2; Yu, Yang & Zhu (2018), parallel restarted SGD. Every rank k of K keeps its own weights:

    local step      x_k <- x_k - eta_t grad f_i(x_k)                    (the user's optimizer's business)
    t + 1 in I_T    x_k <- 1/K sum_j x_j                                (``synchronise``)

What surrounds the average in ``synchronise`` keeps ranks together that have different amounts of data: each rank
has a *position*, which only grows. ``meet`` takes part in everybody's syncs, with weight zero where it took no
steps, until all ranks are as far as it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

from hvd_localsgd.core import agreement, failures, header, protocol
from hvd_localsgd.core.agreement import NOTHING, Context
from hvd_localsgd.core.pipeline import Outcome, Pipeline
from hvd_localsgd.core.progress import BEGIN, FINISHED, Progress
from hvd_localsgd.core.protocol import Coordination, Decision
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.timing import Timings


class LocalSGD:
    """One model on many ranks: counts local steps, and averages when a round is over. ``assemble.engine`` makes one."""

    def __init__(
        self,
        settings: Settings,
        communicator: Any,
        coordination: Coordination,
        pipeline: Pipeline,
        timings: Timings,
        finish_at_exit: bool,
    ) -> None:
        self.communicator, self.finish_at_exit = communicator, finish_at_exit  # for failures
        self._settings, self._coordination, self._timings = settings, coordination, timings
        self._pipeline, self._memory, self._progress = pipeline, pipeline.memory, Progress()
        self.number, self.count_pending = failures.number(communicator), lambda: None

    def begin(self, total: int | None = None, context: Context = NOTHING) -> bool:
        """The same start everywhere: all ranks agree on what will be sent, then get rank 0's values.

        Returns whether that changed, on this rank, what is averaged. ``total``: local steps taken before, if not counted here;
        rank 0's counts. ``context``: what must be the same besides settings and variables. Raises, on every rank, ValueError
        naming the first difference; RankFailed if another is in the middle of training.
        """
        description = agreement.describe(self._settings, self._memory.description(), context)
        self._model = agreement.fingerprint(description)
        self._progress.total = self._progress.total if total is None else total
        failures.begin(self)
        with failures.together(self):
            own = header.row(
                engine=self.number, model=self._model, position=BEGIN, total=self._progress.total, finite=True
            )
            table = header.exchange(self.communicator, own)
            protocol.check_same_place(self.communicator, table, beginning=True)
            agreement.check(self.communicator, table["model"], description)
            moved = self._memory.broadcast(self.communicator)
            self._pipeline.start()
            self._coordination.start()
        self._progress.total = int(table["total"][0])
        self._progress.begin(int(protocol.decide(table, self._settings).intervals[0]))  # no rank has a pace yet
        self._timings.begin(self.communicator.rank)
        return moved

    def step(self, steps: int = 1, samples: float = 0.0) -> bool:
        """``steps`` more local steps were taken, on so many samples; whether the round is over."""
        self._progress.steps += steps
        self._progress.samples += samples
        return self._progress.steps >= self._progress.interval

    def synchronise(self, message: bytes = b"", due: bool = True) -> list[bytes]:
        """One sync: header, decision, average. Every rank must call it.

        Args:
            message: for the other ranks, at the moment when all have come to this rank's position.
            due: whether this rank's round ends here; if no rank's does, nothing is averaged.

        Returns:
            Every rank's ``message``, where this sync found that all ranks have come further; else an empty list.

        Raises:
            RankFailed: on all ranks alike, if one of them has failed or holds weights that are not finite.
        """
        with self._coordination.together(self):
            decision = self._decide(due)
            if decision.average:
                self._record(self._progress.interval, self._average(decision))
                self._progress.begin_round(int(decision.intervals[self._coordination.place]))
            return self._exchange_messages(decision, message)

    def meet(self, position: float, message: bytes = b"") -> list[bytes]:
        """Take part in syncs until every rank has come to ``position``; then exchange messages."""
        self._progress.position = position
        messages: list[bytes] = []
        while self._progress.reached < position:
            messages = self.synchronise(message, due=position == FINISHED or not self._settings.schedule.exact)
        return messages

    def finish(self) -> None:
        """Wait for the slowest rank's last sync; then every rank holds the same weights, and everybody's totals."""
        self.meet(FINISHED)
        with failures.together(self):
            self._coordination.meet_all()
            self._timings.lap("wait")
            self._pipeline.finish()
            self._record(0, Outcome())
            entries = self.communicator.gather(json.dumps(self._timings.sums()).encode())
            self._timings.totals = [json.loads(entry) for entry in entries]
        failures.end(self)

    # The parts of a sync, in the order in which they come.

    def _decide(self, due: bool) -> Decision:
        progress, timings = self._progress, self._timings
        if timings.rounds:  # the first round traces and compiles
            progress.measure(timings.parts["compute"] + timings.parts["input"])
        finite = self._memory.is_finite()
        own = header.row(engine=self.number, model=self._model, due=due, finite=finite, **progress.fields())
        decision = self._coordination.decide(own)
        timings.lap("wait")
        progress.stopping = decision.stop
        return decision

    def _average(self, decision: Decision) -> Outcome:
        if decision.unfinite:
            self._coordination.refuse(decision)
            return Outcome(drift=math.nan)
        weight = float(decision.weights[self._coordination.place])
        outcome = self._pipeline.send(weight, int((decision.weights > 0).sum()))
        protocol.check_finite(self.communicator, decision, outcome.drift)
        if self._settings.optimizer_state == "reset":
            self._memory.reset_state()
        self._timings.lap("outer")
        return replace(outcome, staleness=decision.staleness)

    def _exchange_messages(self, decision: Decision, message: bytes) -> list[bytes]:
        progress = self._progress
        if decision.reached <= progress.reached:
            return []
        progress.reached = decision.reached
        messages = self._coordination.gather(message if progress.reached == progress.position else b"")
        self._timings.lap("communicate")
        return messages

    def _record(self, interval: int, outcome: Outcome) -> None:
        who = self.communicator
        facts = {"interval": interval, **self._progress.round(), **asdict(outcome)}
        self._timings.end_round(**facts, rank=who.rank, size=who.size, host=who.host)

    # What front ends ask and say between syncs.

    def request_stop(self) -> None:
        """This rank wants training to stop: all will hear of it at the next sync."""
        self._progress.wants_stop = True

    @property
    def stopping(self) -> bool:
        """Whether some rank wants that, as of the last sync."""
        return self._progress.stopping

    @property
    def interval(self) -> int:
        """H of this round."""
        return self._progress.interval

    @property
    def total(self) -> int:
        """Local steps until the last sync, in all."""
        return self._progress.total
