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
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core import agreement, failures, header, protocol
from hvd_localsgd.core.agreement import NOTHING, Context
from hvd_localsgd.core.averages import Averages
from hvd_localsgd.core.keeper import Keeper
from hvd_localsgd.core.pipeline import Pipeline
from hvd_localsgd.core.progress import BEGIN, FINISHED, Progress
from hvd_localsgd.core.protocol import Coordination, Decision
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.survivors import Survivors
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.errors import RankDied


class LocalSGD:
    """One model on many ranks: counts local steps, and averages when a round is over. ``assemble.engine`` makes one."""

    def __init__(
        self,
        settings: Settings,
        communicator: Any,
        coordination: Coordination,
        pipeline: Pipeline,
        timings: Timings,
        survivors: Survivors,
        finish_at_exit: bool,
    ) -> None:
        self.communicator, self.finish_at_exit = communicator, finish_at_exit  # for failures
        communicator.seen = header.seen
        self.number, self.count_pending = failures.number(communicator), lambda: None
        self.thread, self.goes_on = threading.get_ident(), survivors.go_on
        self.progress = Progress()  # for front ends, to be read
        self.keeper = Keeper()  # of checkpoints; a front end has another
        self._settings, self._coordination, self._timings, self._survivors = settings, coordination, timings, survivors
        self._averages = Averages(pipeline, coordination, self.progress, timings, settings)

    def begin(self, total: int | None = None, context: Context = NOTHING) -> bool:
        """The same start everywhere: all ranks agree on what will be sent, then get rank 0's values.

        Returns whether that changed, on this rank, what is averaged. ``total``: local steps taken before, if not counted here;
        rank 0's counts. ``context``: what must be the same besides settings and variables. Raises, on every rank, ValueError
        naming the first difference; RankFailed if another is in the middle of training.
        """
        memory = self._averages.memory
        description = agreement.describe(self._settings, memory.description(), context)
        self._model = agreement.fingerprint(description)
        own = header.row(engine=self.number, model=self._model, position=BEGIN, finite=True, **self.progress.seen)
        own["total"] = self.progress.total if total is None else total
        own["brought"] = 0 if self.keeper.found else context.brought

        def start() -> tuple[np.ndarray, bool]:
            table = protocol.agree(self.communicator, own, description)
            moved = not self.keeper.found and memory.broadcast(self.communicator, protocol.as_far(table))
            self._averages.start()
            self._coordination.start()
            self._survivors.agree()
            return table, moved

        failures.begin(self)
        with failures.together(self):
            table, moved = self._survivors.repeat(start)
        table["total"] = table["total"][0]
        decision = protocol.decide(table, self._settings)  # no rank has a pace yet
        self.progress.begin(decision.now, int(decision.intervals[0]), self._settings.syncs_per_average)
        self._timings.begin(self.communicator.rank)
        self.keeper.begin(self.progress, self._averages)
        return moved

    def step(self, steps: int = 1, samples: float = 0.0) -> bool:
        """``steps`` more local steps were taken, on so many samples; whether it is time to ``proceed``."""
        self.progress.steps += steps
        self.progress.samples += samples
        return self.progress.steps >= self.progress.next_step

    def proceed(self) -> list[bytes]:
        """The round is over: a sync; or the average that was on its way is taken, and the round goes on."""
        if self.progress.steps >= self.progress.interval:
            return self.synchronise()
        with failures.together(self):
            self._land()
            self.keeper.take()
        return []

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
            self._land()
            self.keeper.take()
            decision = self._survivors.repeat(lambda: self._average(due))
            if decision.average:
                if self._settings.audits(decision.now):
                    self._survivors.repeat(lambda: self._averages.audit(decision))
                self._averages.end_round(self.communicator, self.progress.interval, decision.staleness)
                self.progress.begin_round(decision.now, int(decision.intervals[self._coordination.place]))
            messages = self._survivors.repeat(lambda: self._exchange_messages(decision, message))
            self.keeper.see(decision)
            self.keeper.take()
            return messages

    def meet(self, position: float, message: bytes = b"") -> list[bytes]:
        """Take part in syncs until every rank has come to ``position``; then exchange messages."""
        self.progress.position = position
        messages: list[bytes] = []
        while self.progress.reached < position:
            messages = self.synchronise(message, due=position == FINISHED or not self._settings.schedule.exact)
        return messages

    def finish(self) -> None:
        """Wait for the slowest rank's last sync; then every rank holds the same weights, and everybody's totals."""
        self.meet(FINISHED)
        with failures.together(self):
            self._coordination.meet_all()
            self._timings.lap("wait")
            self._averages.finish()
            self._averages.end_round(self.communicator, 0)
            self._timings.totals = self._survivors.repeat(self._exchange_totals)
        failures.end(self)

    def tell(self, **seen: float) -> None:
        """What this rank sees of ``rate``, ``loss`` and ``remaining``: all will hear of it at the next sync."""
        self.progress.seen.update(seen)

    def request_stop(self) -> None:
        """This rank wants training to stop: all will hear of it at the next sync."""
        self.progress.wants_stop = True

    def survived(self, left: Sequence[int]) -> None:
        """Ranks have died; those with these numbers are left, and go on with their own weights."""
        self.progress.survived(left)
        self._averages.survived()
        self.keeper.survived()

    # What surrounds the average.

    def _land(self) -> None:
        try:
            self._averages.land()
        except RankDied as death:  # the steps of its round are still to be averaged
            self._survivors.recover(death)

    def _average(self, due: bool) -> Decision:
        decision = self._decide(due)
        if decision.average:
            self._averages.make(decision)
        else:
            self._survivors.agree()
        return decision

    def _decide(self, due: bool) -> Decision:
        progress, timings = self.progress, self._timings
        if timings.rounds:  # the first round traces and compiles
            progress.measure(timings.parts["compute"] + timings.parts["input"])
        known = {**self._averages.look(), **self.keeper.look(), **progress.fields()}
        own = header.row(engine=self.number, model=self._model, due=due, **known)
        decision = self._coordination.decide(own, progress.last)
        timings.lap("wait")
        self._averages.refuse_what_failed()  # the average before this one: now all ranks are here to hear of it
        progress.stopping = decision.stop
        return decision

    def _exchange_messages(self, decision: Decision, message: bytes) -> list[bytes]:
        if decision.reached <= self.progress.reached:
            return []
        messages = self._coordination.gather(message if decision.reached == self.progress.position else b"")
        self._survivors.agree()
        self.progress.reach(decision.reached)
        self._timings.lap("communicate")
        return messages

    def _exchange_totals(self) -> list[dict[str, Any]]:
        entries = self.communicator.gather(json.dumps(self._timings.sums()).encode())
        self._survivors.agree()
        return [json.loads(entry) for entry in entries]
