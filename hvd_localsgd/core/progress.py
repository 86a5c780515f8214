"""How far this rank is, and how fast it goes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hvd_localsgd.core.schedules import Now

FINISHED = math.inf
BEGIN = -1.0
NOTHING_SEEN = {"rate": math.nan, "loss": math.nan, "remaining": math.nan}


@dataclass(slots=True)
class Progress:
    """One rank's training.

    Attributes:
        steps, samples: of the round.
        recorded: how many of its steps are in the record of an earlier round, whose average was lost.
        total: local steps before the round, since training began.
        earlier: steps and samples of the rounds before it that are not in all of the model's averages yet.
        interval: H of the round.
        landing: the step of the round after which the average that is on its way is taken; 0: none is.
        position: where this rank is; it only grows (two per epoch in ``fit``), and is infinite when it has finished.
        reached: where every rank has come to, as of the last sync.
        pace: seconds of a local step, lately; 0: not known yet.
        sync: seconds of a sync, lately, without waiting for others; 0: not known yet.
        began: when, by ``time.perf_counter``.
        seen: what the schedule needs of ``rate``, ``loss`` and ``remaining``; NaN where it does not.
        last: what all ranks knew at the last sync.
        wants_stop: this rank wants training to stop.
        stopping: some rank does, as of the last sync.
    """

    steps: int = 0
    samples: float = 0.0
    recorded: int = 0
    total: int = 0
    earlier: deque[tuple[int, float]] = field(default_factory=deque)
    interval: int = 0
    landing: int = 0
    position: float = 0.0
    reached: float = FINISHED
    pace: float = 0.0
    sync: float = 0.0
    began: float = 0.0
    seen: dict[str, float] = field(default_factory=lambda: dict(NOTHING_SEEN))
    last: Now | None = None
    wants_stop: bool = False
    stopping: bool = False
    _before: Progress | None = None  # at the end of the last round

    def begin(self, now: Now, interval: int, several: int) -> None:
        """A training of its own; steps are counted on from ``now``'s. ``several``: syncs in which the whole model is averaged."""
        self.earlier, self.landing = deque(maxlen=several - 1), 0
        self.total, self.last, self.began, self.sync = now.step, now, time.perf_counter(), 0.0
        self.steps, self.samples, self.recorded, self.interval = 0, 0.0, 0, interval
        self.position = self.reached = 0.0
        self.pace, self.wants_stop, self.stopping = 0.0, False, False

    def begin_round(self, now: Now, interval: int) -> None:
        """The steps of the last round are behind us."""
        if self.landing:  # its average may be lost
            self._before = replace(self, earlier=self.earlier.copy(), _before=None)
        self.last = now
        if now.whole:
            self.earlier.clear()
        else:
            self.earlier.append((self.steps, self.samples))
        self.total += self.steps
        self.steps, self.samples, self.recorded, self.interval = 0, 0.0, 0, interval

    def take_back(self) -> None:
        """The average that the last round has sent will not come: its steps are this round's too."""
        before = self._before
        assert before is not None
        self.steps, self.samples = self.steps + before.steps, self.samples + before.samples
        self.recorded = before.steps
        self.total, self.earlier, self.interval = before.total, before.earlier, before.interval
        self.last, self.landing = before.last, 0

    def survived(self, left: Sequence[int]) -> None:
        """Of all ranks these are left: what is known of each."""
        for each in (self, self._before):
            if each is not None and each.last is not None and each.last.tracks:
                each.last = replace(each.last, tracks=tuple(each.last.tracks[rank] for rank in left))

    @property
    def next_step(self) -> int:
        """Of the round, after which there is something to do: its end, or an average to take before."""
        return min(self.landing or self.interval, self.interval)

    def reach(self, reached: float) -> None:
        """All ranks have come to this position."""
        assert self.last is not None
        self.reached, self.last = reached, replace(self.last, reached=reached)

    def measure(self, seconds: float) -> None:
        """The steps of this round took so long: half of it counts, half what was measured before."""
        if self.steps:
            latest = seconds / self.steps
            self.pace = (self.pace + latest) / 2 if self.pace else latest

    def measure_sync(self, seconds: float) -> None:
        """Likewise."""
        self.sync = (self.sync + seconds) / 2 if self.sync else seconds

    def state(self) -> dict[str, Any]:
        """As JSON takes it; times are those since training began."""
        kept = asdict(self)
        del kept["_before"]
        kept["earlier"] = list(self.earlier)
        kept["elapsed"] = time.perf_counter() - kept.pop("began")
        for name in ("wants_stop", "stopping"):
            del kept[name]
        kept["last"] = _plain(kept["last"])
        return kept

    def load(self, kept: dict[str, Any], alike: bool) -> None:
        """The inverse, after ``begin``. Not ``alike``: as another rank, or among more or fewer, where what all ranks know counts."""
        last = _now(kept.pop("last"))
        self.began = time.perf_counter() - kept.pop("elapsed")
        earlier = kept.pop("earlier")
        for name, value in kept.items():
            setattr(self, name, value)
        self.reached = 0.0 if self.reached == FINISHED else self.reached  # it had ended, and has more to do now
        self.position = self.reached  # who was ahead comes there again
        self.last = None if last is None else replace(last, reached=self.reached)
        if alike:
            self.earlier.extend((steps, samples) for steps, samples in earlier)
            return
        self.steps, self.samples, self.recorded, self.pace, self.landing = 0, 0.0, 0, 0.0, 0
        self.last = None if self.last is None else replace(self.last, tracks=())

    def round(self) -> dict[str, int]:
        """The steps of this round, for its record."""
        first = self.total + self.recorded + 1
        return {"first_step": first, "last_step": self.total + self.steps, "steps": self.steps - self.recorded}

    def fields(self) -> dict[str, Any]:
        """For the header."""
        return {
            "position": self.position,
            "steps": self.steps,
            "total": self.total + self.steps,
            "samples": self.samples,
            "recent": self.steps + sum(steps for steps, _ in self.earlier),
            "recent_samples": self.samples + sum(samples for _, samples in self.earlier),
            "pace": self.pace,
            "sync": self.sync,
            "clock": time.perf_counter() - self.began,
            **self.seen,
            "stop": self.wants_stop,
        }


def _plain(now: dict[str, Any] | None) -> dict[str, Any] | None:
    """As JSON takes it."""
    if now is None:
        return None
    return {**now, "parts": sorted(now["parts"]), "first": _plain(now["first"]), "last": _plain(now["last"])}


def _now(kept: dict[str, Any] | None) -> Now | None:
    """From JSON, which knows neither tuples nor sets."""
    if kept is None:
        return None
    inner = {name: _now(kept[name]) for name in ("first", "last")}
    tracks = tuple(tuple(track) for track in kept["tracks"])
    return Now(**{**kept, **inner, "tracks": tracks, "parts": frozenset(kept["parts"])})
