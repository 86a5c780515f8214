"""What ranks tell each other before anything else, and what follows from it: the header, and the decision.

Whatever one rank knows alone (it failed, it wants to stop, its data ended) reaches the others in the header and nowhere
else. The decision is a pure function of all headers, so that all ranks decide alike and make the same sequence of
collective calls. Asynchronously a rank decides on its own row alone.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from hvd_localsgd.core import failures
from hvd_localsgd.core.agreement import check, where
from hvd_localsgd.core.codecs import WARM_UP
from hvd_localsgd.core.failures import Trainer
from hvd_localsgd.core.header import exchange, row
from hvd_localsgd.core.progress import BEGIN, FINISHED
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.errors import RankFailed, RanksDiffer, listed

LESS = " Lower the learning rate, or clip the gradients (clipnorm=)."


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do next.

    Attributes:
        now: what all ranks know alike, of the local step that the farthest rank has come to.
        average: whether weights are averaged now.
        weights: of each rank in it, float64; they sum to 1, or nobody took a step, or a guard has left out all.
        intervals: H of each rank's next round, int64.
        stop: some rank wants training to stop.
        unfinite: ranks whose weights are not finite.
        goes_on: others have finite ones.
        reached: the position to which every rank has come.
        staleness: asynchronously, syncs of others since this rank last read the average.
        asked: some rank has been asked to end.
        written: every rank's file of the last checkpoint is on the disk.
        trouble: what the schedule raised on this rank, when there was no telling the others; to be raised when there is.
    """

    now: Now
    average: bool
    weights: np.ndarray
    intervals: np.ndarray
    stop: bool
    unfinite: tuple[int, ...]
    reached: float
    staleness: int = 0
    goes_on: bool = True
    asked: bool = False
    written: bool = False
    trouble: BaseException | None = None


def decide(table: np.ndarray, settings: Settings, last: Now | None = None) -> Decision:
    """The decision that follows from all ranks' headers.

    Args:
        table: of dtype ``header.HEADER``, shape (K,), by rank. Another order of the ranks only changes the order of the answer.
        settings: the same on every rank.
        last: what all ranks knew at the last sync; None: training begins.
    """
    now, trouble = _now(table, settings, last), None
    try:
        now = replace(now, next=_interval(settings, now))
    except BaseException as error:  # sys.exit as well: the others are on their way into the average
        now, trouble = replace(now, next=1), error
    weights = _weights(table, settings, now.world)
    if settings.guard is not None and weights.any():
        weights, tracks = settings.guard.weigh(weights, table["norm"], now.tracks)
        now = replace(now, tracks=tracks)
    return Decision(
        now=now,
        average=bool(table["due"].any() and table["recent"].any()),
        weights=weights,
        intervals=_intervals(table, settings, now.next),
        stop=bool(table["stop"].any()),
        unfinite=tuple(int(rank) for rank in np.flatnonzero(~table["finite"])),
        reached=float(table["position"].min()),
        goes_on=bool(table["finite"].any()),
        asked=bool(table["asked"].any()),
        written=bool(table["written"].all()),
        trouble=trouble,
    )


def _what_is_due(table: np.ndarray, settings: Settings, now: dict[str, Any], last: Now | None) -> dict[str, Any]:
    """Fields of ``Now``: everything, where all ranks have come further, to validation or to the end of an epoch; or where one has nothing finite.

    Before that a part, or a group.
    """
    parts, world, groups = range(settings.fragments), True, settings.groups
    if last is not None and now["reached"] <= last.reached and _counts(table, settings).all():
        if settings.fragments > 1:
            parts = range(_turn(settings, last.trained), _turn(settings, now["trained"]))
        world = groups is None or now["round"] % groups.every == 0
    due = frozenset(each % settings.fragments for each in parts)
    return {"parts": due, "world": world, "whole": world and len(due) == settings.fragments}


def _turn(settings: Settings, step: int) -> int:
    """How many fragments have had their turn by this local step: one each H/P steps, wherever training began."""
    return step * settings.fragments // settings.schedule.interval(Now(step))


def _counts(table: np.ndarray, settings: Settings) -> np.ndarray:
    """Which ranks are not left out because nothing of theirs is finite: all, where that is an error."""
    return table["finite"] | (settings.on_nonfinite == "raise")


def _weights(table: np.ndarray, settings: Settings, world: bool) -> np.ndarray:
    """A rank without steps has none; the others count equally, or by their samples. They sum to 1, in each group if it is by itself."""
    steps, samples = ("recent", "recent_samples") if world else ("steps", "samples")
    counts = _counts(table, settings)
    share = ((table[steps] > 0) & counts).astype(np.float64)
    if settings.weighting == "samples" and (share * table[samples]).any():
        share *= table[samples]
    if not share.any() and not counts.all():
        share = counts.astype(np.float64)  # they hold the last average
    if world:
        total = _sum(share)
        return share / total if total else share
    order = np.argsort(table["group"])
    by_group = share[order]
    ends = np.flatnonzero(np.diff(table["group"][order])) + 1
    for start, stop in pairwise([0, *ends.tolist(), len(order)]):
        own = by_group[start:stop]
        if not own.any():
            own[:] = 1.0  # they hold the same, and keep it
        own /= _sum(own)
    share[order] = by_group
    return share


def _sum(values: np.ndarray) -> float:
    """Exact, so that it does not depend on the order of the ranks."""
    return math.fsum(values.tolist())


def _now(table: np.ndarray, settings: Settings, last: Now | None) -> Now:
    """The table in few numbers, none of which depends on the order of the ranks, and what the last sync has left behind.

    All but ``next``, and what a guard then makes of ``tracks``.
    """
    losses, weights = table["loss"], np.maximum(table["steps"], 1) * np.isfinite(table["loss"])
    rate, remaining = (table[name][np.isfinite(table[name])] for name in ("rate", "remaining"))
    step = int(table["total"].max())
    now: dict[str, Any] = {
        "step": step,
        "round": 0 if last is None else last.round + 1,
        "remaining": int(remaining.max()) if remaining.size else None,
        "rate": float(rate.max()) if rate.size else None,
        "loss": _sum(np.where(weights, losses, 0.0) * weights) / _sum(weights) if weights.any() else None,
        "seconds": float(table["clock"].max()),
        "step_seconds": float(table["pace"].max()),
        "sync_seconds": float(table["sync"].max()),
        "reached": max(0.0, float(table["position"].min())),
        "trained": step if last is None else last.trained + int(table["steps"].max()),
    }
    now["encoded"] = now["round"] > WARM_UP * settings.syncs_per_average
    behind = {} if last is None else _left_behind(last, now["rate"])
    return Now(**now, **_what_is_due(table, settings, now, last), **behind)


def _left_behind(last: Now, rate: float | None) -> dict[str, Any]:
    """Fields of ``Now``: by the sync before one at this learning rate."""
    return {
        "interval": last.next,
        "first": last.first or (last if last.loss is not None or last.rate is not None else None),
        "fallen": last.fallen or (rate is not None and last.rate is not None and rate < last.rate),
        "last": replace(last, first=None, last=None, tracks=()),  # no chain: of the last one only its own numbers
        "tracks": last.tracks,
    }


def _interval(settings: Settings, now: Now) -> int:
    """H, and no more than the steps that remain."""
    interval = settings.schedule.interval(now)
    if settings.fragments > 1:
        interval = -(-(_turn(settings, now.trained) + 1) * interval // settings.fragments) - now.trained
    return min(interval, now.remaining) if now.remaining and not settings.schedule.exact else interval


def _intervals(table: np.ndarray, settings: Settings, interval: int) -> np.ndarray:
    """H; balanced, each rank's own, so that all take equally long (Yu et al. 2018, workers of unequal speed)."""
    pace = table["pace"]
    if settings.interval == "equal" or not pace.all():
        return np.full(len(table), interval, np.int64)
    seconds = interval * len(table) / _sum(1 / pace)  # in which the ranks take H steps on average
    whole = max(1, round(seconds / pace.max())) * pace.max()  # the slowest has the fewest, and so the coarsest
    return np.maximum(1, np.rint(whole / pace)).astype(np.int64)


class Coordination(Protocol):
    """How a rank comes to a decision."""

    communicator: Any

    @property
    def place(self) -> int:
        """This rank's, in the decision's arrays."""

    def start(self) -> None:
        """All ranks are about to train (collective)."""

    def together(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Around a sync."""

    def decide(self, own: np.ndarray, last: Now | None) -> Decision:
        """What to do, given this rank's header, and what the last sync has left behind."""

    def refuse(self, decision: Decision) -> None:
        """Weights are not finite, and are not averaged: raise, or warn if training ends because of it."""

    def refuse_average(self, decision: Decision, variable: str) -> None:
        """Raise: the average is not finite, because of this rank's ``variable`` if that is not empty."""

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all that came to the same position."""

    def meet_all(self) -> None:
        """Every rank has made its last sync (collective)."""


class Together:
    """Algorithm 1: all ranks' headers before every sync."""

    def __init__(self, communicator: Any, settings: Settings) -> None:
        self.communicator, self.settings = communicator, settings

    @property
    def place(self) -> int:
        """In order of rank."""
        return self.communicator.rank

    def start(self) -> None:
        """Which group this rank belongs to."""
        self._group, self._generation = 0, self.communicator.generation
        if self.settings.groups is not None:
            ranks = self.settings.groups.of_ranks(self.communicator)
            self._group = next(number for number, group in enumerate(ranks) if self.communicator.rank in group)

    def together(self, trainer: Trainer) -> AbstractContextManager[None]:
        """All ranks are in it."""
        return failures.together(trainer)

    def decide(self, own: np.ndarray, last: Now | None) -> Decision:
        """On the headers of all, once all are about the same model."""
        while True:
            if self._generation != self.communicator.generation:
                self.start()  # others were lost
            own["group"] = self._group
            table = exchange(self.communicator, own)
            check_same_place(self.communicator, table, beginning=False)
            if (table["engine"] == own["engine"]).all():
                decision = decide(table, self.settings, last)
                self._say_who_is_left_out(table, decision)
                return decision
            self._help(table, own)

    def _say_who_is_left_out(self, table: np.ndarray, decision: Decision) -> None:
        """By a guard; on rank 0."""
        left_out = (
            np.flatnonzero((table["recent"] > 0) & table["finite"] & (decision.weights == 0)).tolist()
            if self.settings.guard
            else []
        )
        if decision.average and left_out:
            names = self.communicator.hosts
            if self.communicator.rank == 0:
                who = listed([f"{where([rank], names)} (norm {table['norm'][rank]:.3g})" for rank in left_out])
                warnings.warn(
                    f"guard={self.settings.guard}: left out of the average at local step {decision.now.step}: {who}",
                    stacklevel=2,
                )

    def _help(self, table: np.ndarray, own: np.ndarray) -> None:
        """A rank that waits for the end of one model takes part in the syncs that others still make of another."""
        wanted = set(table["engine"][table["position"] < FINISHED].tolist())
        trainer = failures.trainer(self.communicator, next(iter(wanted))) if len(wanted) == 1 else None
        if trainer is None:
            raise RankFailed(
                f"Ranks average different models at the same moment (seen on rank {self.communicator.rank} on "
                f"{self.communicator.host}): train several models in the same order on every rank, in one thread."
            )
        if trainer.number != own["engine"]:
            trainer.count_pending()
            trainer.synchronise()

    def refuse(self, decision: Decision) -> None:
        """Names the ranks (collective)."""
        ranks = where(decision.unfinite, self.communicator.hosts)
        text = f"NaN or infinity in the weights of {ranks} at local step {decision.now.step}; nothing was averaged."
        if not decision.stop:
            raise RankFailed(text + LESS)
        # Somebody, TerminateOnNaN perhaps, has seen it and ends training in good order.
        warnings.warn(text, stacklevel=2)

    def refuse_average(self, decision: Decision, variable: str) -> None:
        """Names the ranks and their variables (collective)."""
        found = [entry.decode() for entry in self.communicator.gather(variable.encode())]
        names = self.communicator.hosts
        who = [f"{found[rank]} of {where([rank], names)}" for rank in range(len(found)) if found[rank]]
        what = f"NaN or infinity in {listed(who)}" if who else "the average overflowed"
        became = "the average was not used" if self.settings.overlap else "all ranks have averaged it"
        raise RankFailed(f"{what} at local step {decision.now.step}; {became}.{LESS}")

    def gather(self, message: bytes) -> list[bytes]:
        """All of them."""
        return self.communicator.gather(message)

    def meet_all(self) -> None:
        """They have met in the last sync."""


class Alone:
    """Algorithm 2: nobody is waited for. Two counters in one-sided memory say what others did meanwhile."""

    place = 0

    def __init__(self, communicator: Any, settings: Settings) -> None:
        self.communicator, self.settings = communicator, settings

    def start(self) -> None:
        """Syncs of all ranks, and ranks that want to stop: none so far."""
        self._counters = self.communicator.share(np.zeros(2, np.int64))
        self._seen, self._said_stop, self._stop = 0, False, False

    def together(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Nobody else is in it: whoever fails in here can still tell the others."""
        return nullcontext()

    def decide(self, own: np.ndarray, last: Now | None) -> Decision:
        """On this rank's header. Every rank weighs 1/K, whenever it comes."""
        staleness = self._count(own) if own["steps"] or own["stop"] else 0
        own = own.copy()
        own["stop"] |= self._stop
        decision = decide(own.reshape(1), self.settings, last)
        return replace(decision, weights=decision.weights / self.communicator.size, staleness=staleness, goes_on=True)

    def _count(self, own: np.ndarray) -> int:
        """One more sync; how many others came since this rank's last."""
        says_stop = bool(own["stop"]) and not self._said_stop
        before = np.empty(2, np.int64)
        self._counters.add(np.array([own["steps"] > 0, says_stop], np.int64), 0, before)
        self._said_stop |= says_stop
        self._stop = bool(before[1]) or self._said_stop
        staleness = int(before[0]) - self._seen
        self._seen = int(before[0]) + int(own["steps"] > 0)
        return staleness

    def refuse(self, decision: Decision) -> None:
        """This rank's own, which the others will hear of as its error."""
        self.refuse_average(decision, "the weights")

    def refuse_average(self, decision: Decision, variable: str) -> None:
        """Likewise."""
        what = f"NaN or infinity in {variable}" if variable else "the average overflowed: seen in the weights"
        who = f"rank {self.communicator.rank} on {self.communicator.host}"
        text = f"{what} of {who} at local step {decision.now.step}; they were not given to the others."
        raise FloatingPointError(text + LESS)

    def gather(self, message: bytes) -> list[bytes]:
        """Its own."""
        return [message]

    def meet_all(self) -> None:
        """The only time that anybody waits."""
        exchange(self.communicator, row(position=FINISHED))
        self._counters.free()


def agree(communicator: Any, own: np.ndarray, description: str) -> np.ndarray:
    """All ranks' headers, once all begin to train the same (collective).

    Raises:
        RankFailed: on all ranks, if some begin to train and others do not.
        RanksDiffer: on all ranks, with the first difference between their descriptions, or where they go on from different steps.
    """
    table = exchange(communicator, own)
    check_same_place(communicator, table, beginning=True)
    check(communicator, table["model"], description)
    steps = sorted(set(table["brought"].tolist()) - {0})
    if len(steps) > 1:  # a rank that brings none takes what rank 0 has
        names = communicator.hosts
        who = (f"{where(np.flatnonzero(table['brought'] == each).tolist(), names)}: {each}" for each in steps)
        raise RanksDiffer(
            f"Ranks go on from different local steps, as their optimizers have it from files: {'; '.join(who)}. Load the same checkpoint on "
            "every rank, or one on rank 0 alone, which all others then get."
        )
    return table


def as_far(table: np.ndarray) -> bool:
    """Whether all ranks' optimizers have taken the same number of steps, so that each may go on with its own state."""
    return bool(table["total"][0]) and all((table[name] == table[name][0]).all() for name in ("total", "updates"))


def check_same_place(communicator: Any, table: np.ndarray, beginning: bool) -> None:
    """All ranks are between the same two calls, or none goes on: the alternative is a hang or a wrong sum.

    Raises:
        RankFailed: on all ranks, if some begin to train and others do not.
    """
    models = set(table["engine"].tolist()) if beginning else set()
    if ((table["position"] == BEGIN) != beginning).any() or len(models) > 1:
        raise RankFailed(
            f"Some ranks start to train while others are in the middle of it, or train another model (seen on rank {communicator.rank} "
            f"on {communicator.host}). Call fit equally often on every rank, with the same callbacks, and let no rank leave it early."
        )
