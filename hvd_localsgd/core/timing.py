"""How long: every second of a round belongs to exactly one part, and every round leaves a record."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

PARTS = ("compute", "input", "wait", "pack", "communicate", "unpack", "outer")
WINDOW = 1000  # rounds that are kept in memory: a record takes half a kilobyte, and a long training has millions


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one rank. Times are in seconds; the parts add up to ``wall`` less ``residual``.

    ``compute``: train steps, until the device has finished. ``input``: between train steps (data, other
    callbacks, validation) and, estimated by sampling, the wait for data inside Keras' compiled step.
    ``wait``: this rank stood ready and others did not (skew). ``pack`` / ``communicate`` / ``unpack``: copying
    out and scaling, the allreduce, copying back. ``outer``: what happens to the average and to the optimizer
    state afterwards. ``bytes``: what this rank gave to the allreduce. ``drift``: root mean square over ranks of
    the distance between a rank's weights and their average, just before averaging. ``interval``: H of this
    round; ``steps``: what this rank really took (fewer where its data ended). ``staleness``: asynchronously, how many
    syncs of other ranks came between this rank's last read of the global average and this sync. ``error``: with compression, what
    it has lost of this rank's change, as a share of its norm. ``hidden``: with overlap, how long the average was on its way while this
    rank went on, in no part's time; what is in ``bytes``, ``drift``, ``error`` and ``hidden`` is then of the average that came in this round.
    ``loss``: this rank's training loss as the front end knew it when the round ended (Keras': the mean of the epoch so far); None if it did not.
    """

    round: int
    first_step: int
    last_step: int
    interval: int
    steps: int
    start: float
    wall: float
    compute: float
    input: float
    wait: float
    pack: float
    communicate: float
    unpack: float
    outer: float
    residual: float
    bytes: int
    drift: float
    staleness: int
    error: float
    hidden: float
    loss: float | None
    rank: int
    size: int
    host: str


class Stopwatch:
    """Laps: each call gives the time since the call before to one part, so no time is lost or counted twice."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new round begins now."""
        self.start = time.time()
        self._began = self._last = time.perf_counter()
        self.parts = dict.fromkeys(PARTS, 0.0)

    def lap(self, part: str) -> None:
        """All the time since the last lap was ``part``."""
        now = time.perf_counter()
        self.parts[part] += now - self._last
        self._last = now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Of the time given to ``source``, ``seconds`` really belong to ``target``."""
        seconds = min(seconds, self.parts[source])
        self.parts[source] -= seconds
        self.parts[target] += seconds

    def wall(self) -> float:
        """Seconds since the round began."""
        return time.perf_counter() - self._began


class Sums:
    """Over rounds, without keeping them.

    Attributes:
        numbers: each part, wall, residual, hidden (s), bytes, steps, syncs, staleness.
    """

    _ADDED = (*PARTS, "wall", "residual", "hidden", "bytes", "steps", "staleness")

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = dict.fromkeys((*Sums._ADDED, "syncs"), 0)
        self._drifts, self._averages = 0.0, 0

    def add(self, record: Round) -> None:
        """One round more."""
        numbers = self.numbers
        for name in Sums._ADDED:
            numbers[name] += getattr(record, name)
        numbers["syncs"] += int(record.interval > 0)
        if record.bytes or record.size == 1:  # with overlap nothing arrives in some rounds
            self._drifts += record.drift
            self._averages += 1

    @property
    def drift(self) -> float:
        """The mean of the averages that arrived; NaN if none did."""
        return self._drifts / self._averages if self._averages else math.nan


class Timings(Stopwatch):
    """The latest rounds of this rank, oldest first; with a folder, all of them, as one JSON line each in ``rank-K.jsonl``.

    Args:
        folder: for the file, which is opened when training begins, and to which another fit, or a resumed run, appends.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self.rounds: deque[Round] = deque(maxlen=WINDOW)
        self.totals: list[dict[str, Any]] = []  # of all ranks, once training has ended
        self.training, self.epoch = Sums(), Sums()  # all rounds since each began
        self._number = 0  # of the next round
        self.loss: float | None = None  # of the round, if the front end knows it
        self.folder = folder
        self._file: TextIO | None = None

    def begin(self, rank: int) -> None:
        """Training begins, and with it a round."""
        if self.folder is not None and self._file is None:
            path = Path(self.folder) / f"rank-{rank}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
            self._file.seek(max(0, self._file.seek(0, 2) - 1))
            if self._file.read() not in ("", "\n"):  # a run was killed as it wrote: its last line ends here
                self._file.write("\n")
        self.training = Sums()
        self.restart()

    def begin_epoch(self) -> None:
        """For a front end that has epochs."""
        self.epoch = Sums()

    def end_round(self, **facts: Any) -> None:
        """Keep a record with what the stopwatch says, and restart."""
        wall = self.wall()
        seconds: dict[str, Any] = {**self.parts, "wall": wall, "residual": wall - sum(self.parts.values())}
        self.keep(Round(round=self._number, start=self.start, loss=self.loss, **seconds, **facts))
        self._number += 1
        self.loss = None
        self.restart()

    def keep(self, record: Round) -> None:
        """Add it to the sums, and flush its line: a killed job leaves all rounds it finished."""
        self.rounds.append(record)
        self.training.add(record)
        self.epoch.add(record)
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()

    def sums(self) -> dict[str, Any]:
        """Sums over this rank's rounds of this training: each part, wall, residual, hidden (s), bytes, steps, syncs; and its rank and host.

        ``staleness`` is the mean over syncs.
        """
        last, sums = self.rounds[-1], dict(self.training.numbers)
        sums["staleness"] /= max(sums["syncs"], 1)
        sums["rank"], sums["host"] = last.rank, last.host
        return sums


class Recorded:
    """A front end, whose rounds are recorded in ``_timings``."""

    _timings: Timings

    @property
    def timings(self) -> list[Round]:
        """This rank's rounds, oldest first: the latest thousand. ``Round.round`` counts all of them; the file has all of them."""
        return list(self._timings.rounds)

    @property
    def totals(self) -> list[dict[str, Any]]:
        """When training has ended: sums over its rounds, one dict per rank."""
        return self._timings.totals


def mean(totals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over ranks of what ``Timings.sums`` gives (numbers only)."""
    numbers = [key for key, value in totals[0].items() if key not in ("rank", "host")]
    return {key: sum(t[key] for t in totals) / len(totals) for key in numbers}
