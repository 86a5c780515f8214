"""Local SGD: the engine behind the callback, the optimizer and ``ModelAverager``.

Stich (2018), Algorithms 1 and 2; Yu, Yang & Zhu (2018), parallel restarted SGD. Every rank k of K keeps its own weights:

    local step      x_k <- x_k - eta_t grad f_i(x_k)                    (the user's optimizer's business)
    t + 1 in I_T    x_k <- 1/K sum_j x_j                                (``synchronise``)

What surrounds the average in ``synchronise`` keeps ranks together that have different amounts of data: each rank
has a *position*, which only grows. ``meet`` takes part in everybody's syncs, with weight zero where it took no
steps, until all ranks are as far as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from hvd_localsgd.core import agreement, failures, header, protocol
from hvd_localsgd.core.agreement import NOTHING, Context
from hvd_localsgd.core.averages import Averages
from hvd_localsgd.core.keeper import Keeper
from hvd_localsgd.core.progress import BEGIN, FINISHED
from hvd_localsgd.core.protocol import Coordination
from hvd_localsgd.core.settings import Settings


class LocalSGD:
    """One model on many ranks: counts local steps, and averages when a round is over. ``assemble.engine`` makes one."""

    def __init__(
        self,
        settings: Settings,
        communicator: Any,
        coordination: Coordination,
        averages: Averages,
        finish_at_exit: bool,
        count_pending: Callable[[], None],
    ) -> None:
        # For failures.
        self.communicator, self.finish_at_exit, self.count_pending = communicator, finish_at_exit, count_pending
        communicator.seen, self.number = header.seen, failures.number(communicator)
        self.thread, self.goes_on = threading.get_ident(), averages.survivors.go_on
        self.overlaps = settings.overlap > 0
        self.progress = averages.progress  # for front ends, to be read
        self._settings, self._coordination, self._averages = settings, coordination, averages
        self._timings = averages.timings

    def begin(self, total: int | None = None, context: Context = NOTHING, keeper: Keeper | None = None) -> bool:
        """The same start everywhere: all ranks agree on what will be sent, then get rank 0's values.

        Returns whether that changed, on this rank, what is averaged. ``total``: local steps taken before, if not counted here;
        rank 0's counts. ``context``: what must be the same besides settings and variables. ``keeper``: of checkpoints. Raises, on
        every rank, ValueError naming the first difference; RankFailed if another is in the middle of training.
        """
        self.keeper = keeper or Keeper()
        description = agreement.describe(self._settings, self._averages.memory.description(), context)
        self._who = {"engine": self.number, "model": agreement.fingerprint(description)}
        own = header.row(**self._who, position=BEGIN, finite=True, **self.progress.seen)
        own["total"] = self.progress.total if total is None else total
        own["brought"], own["updates"] = 0 if self.keeper.found else context.brought, context.updates
        failures.begin(self)
        with failures.together(self):
            table, moved = self._averages.begin(own, description, resumes=bool(self.keeper.found))
        decision = protocol.decide(table, self._settings)  # no rank has a pace yet
        if decision.trouble is not None:
            raise decision.trouble
        self.progress.begin(decision.now, int(decision.intervals[0]), self._settings.syncs_per_average)
        self._timings.begin(self.communicator.rank)
        self.keeper.begin(self.progress, self._averages)
        return moved

    def step(self, steps: int = 1, samples: float = 0.0) -> bool:
        """``steps`` more local steps were taken, on so many samples; whether it is time to ``proceed``."""
        progress = self.progress
        progress.steps += steps
        progress.samples += samples
        return progress.steps >= progress.next_step

    def proceed(self) -> list[bytes]:
        """The round is over: a sync; or the average that was on its way is taken, and the round goes on."""
        if self.progress.steps >= self.progress.interval:
            return self.synchronise()
        with failures.together(self):
            self._averages.land()
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
            self._averages.land()
            self.keeper.take()
            decision = self._averages.make(lambda: self._who | self.keeper.look(), due)
            if decision.average:
                self._averages.end_round(decision)
            messages = self._averages.exchange_messages(decision, message)
            self.keeper.see(decision)
            self.keeper.take()
        if decision.trouble is not None:
            raise decision.trouble
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
