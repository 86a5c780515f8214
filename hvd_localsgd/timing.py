"""How long: every second of a round belongs to exactly one part, and every round leaves a record."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

PARTS = ("compute", "input", "wait", "pack", "communicate", "unpack", "outer")


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
    syncs of other ranks came between this rank's last read of the global average and this sync.
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


class Timings:
    """The rounds of this rank, oldest first; with a folder, also one JSON line per round in ``rank-K.jsonl``.

    Args:
        folder: made if missing; a file from an earlier run is overwritten.
        rank: this rank.
    """

    def __init__(self, folder: str | Path | None = None, rank: int = 0) -> None:
        self.rounds: list[Round] = []
        self.totals: list[dict[str, Any]] = []  # of all ranks, once training has ended
        self._file: TextIO | None = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = (Path(folder) / f"rank-{rank}.jsonl").open("w", encoding="utf-8")

    def add(self, record: Round) -> None:
        """Keep the record and flush its line, so that a job that is killed leaves all rounds it finished."""
        self.rounds.append(record)
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()

    def sums(self) -> dict[str, Any]:
        """Sums over this rank's rounds: each part, wall, residual (s), bytes, steps, syncs; and its rank and host.

        ``staleness`` is the mean over syncs.
        """
        rounds = self.rounds
        sums: dict[str, Any] = {
            name: sum(getattr(r, name) for r in rounds) for name in (*PARTS, "wall", "residual", "bytes", "steps")
        }
        sums["syncs"] = sum(r.interval > 0 for r in rounds)
        sums["staleness"] = sum(r.staleness for r in rounds) / max(sums["syncs"], 1)
        sums["rank"], sums["host"] = rounds[-1].rank, rounds[-1].host
        return sums


def mean(totals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over ranks of what ``Timings.sums`` gives (numbers only)."""
    numbers = [key for key, value in totals[0].items() if key not in ("rank", "host")]
    return {key: sum(t[key] for t in totals) / len(totals) for key in numbers}


def print_table(totals: Sequence[dict[str, Any]], title: str) -> None:
    """Where the time went: a row per rank, their total and their mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    average = mean(totals)
    total = {key: value * len(totals) for key, value in average.items()}
    shown = list(totals) if len(totals) <= 32 else []
    rows = [(f"{t['rank']} {t['host']}", t) for t in shown] + [("total", total), ("mean", average)]
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    columns = {
        "compute": ("compute",),
        "input": ("input",),
        "wait": ("wait",),
        "communicate": ("communicate",),
        "pack+unpack": ("pack", "unpack"),
        "outer": ("outer",),
        "residual": ("residual",),
    }
    table.add_column("rank", no_wrap=True)
    for heading in (*columns, "wall", "syncs", "MB", "MB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, row in rows:
        if label == "total":
            table.add_section()
        cells = []
        for parts in columns.values():
            seconds = sum(row[part] for part in parts)
            cells.append(f"{seconds:.2f} s {100 * seconds / max(row['wall'], 1e-9):.1f}%")
        speed = row["bytes"] / 1e6 / row["communicate"] if row["communicate"] else 0.0
        cells += [f"{row['wall']:.2f} s", f"{row['syncs']:.0f}", f"{row['bytes'] / 1e6:.1f}", f"{speed:.0f}"]
        table.add_row(label, *cells)
    # In a file or a narrow terminal a long line is easier to read than a wrapped one.
    Console(color_system=None, highlight=False, width=max(Console().width, 160)).print(table)
