"""Timing files become arrays: of each run its ranks, of each rank its rounds."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from hvd_localsgd.core.timing import Round

try:
    from orjson import loads as _fast_loads
except ImportError:  # several times as slow, which only files of hundreds of megabytes show
    from json import loads as _fast_loads  # type: ignore[assignment]

_NUMBERS = tuple(each.name for each in fields(Round) if each.type != "str")
RECORD = np.dtype([(name, np.float64) for name in _NUMBERS])
_LARGE = 100_000_000  # bytes, from which on all cores read: to start processes takes time
_BEGINNING = json.dumps({fields(Round)[0].name: 0}).encode()[:-2]  # of every line


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a run, by the number in its file's name (a record has another, once ranks have died).

    Attributes:
        rounds: an array of ``RECORD``, oldest first: each number of ``core.timing.Round``, in its unit; NaN for what is not known.
            Rounds are counted on where a run was started again.
    """

    number: int
    host: str
    rounds: np.ndarray

    @property
    def finished(self) -> bool:
        """Whether the training of this rank has come to its end: the last record is of the time after the last sync."""
        return bool(len(self.rounds)) and self.rounds["interval"][-1] == 0


@dataclass(frozen=True, slots=True)
class Run:
    """What a folder holds. ``notes``: what a reader should know of the files, in words."""

    name: str
    ranks: list[Rank]
    notes: list[str] = field(default_factory=list)

    @property
    def start(self) -> float:
        """Unix time, seconds: when the first rank began, by its own clock."""
        return min(float(rank.rounds["start"][0]) for rank in self.ranks if len(rank.rounds))

    @property
    def rounds(self) -> int:
        """How many there were, on the rank that has come furthest."""
        return 1 + max(int(rank.rounds["round"][-1]) for rank in self.ranks if len(rank.rounds))


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, named by the folder, or by its whole path where two would have the same name.

    Raises:
        ValueError: a folder is given twice or holds no run, or a file is damaged or not ours; names file and line.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ValueError(f"A run is given twice. Received: {', '.join(map(str, folders))}")
    names = [place.name for place in places]
    return [
        read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read(folder: Path, name: str) -> Run:
    """One run, which may still be going on.

    Raises:
        ValueError: as ``read_all``.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"A run is a folder, the one that was given as timings=. Received: {folder}, which {what}.")
    numbers = sorted(
        int(found[1]) for each in folder.iterdir() if (found := re.fullmatch(r"rank-(\d+)\.jsonl", each.name))
    )
    if not numbers:
        raise ValueError(
            f"There is no timing file (rank-0.jsonl, rank-1.jsonl, ...) in {folder}: was it given as timings=?"
        )
    run = Run(name, [])
    for rank, notes in _read_ranks([folder / f"rank-{number}.jsonl" for number in numbers], numbers):
        run.ranks.append(rank)
        run.notes.extend(notes)
    if not any(len(rank.rounds) for rank in run.ranks):
        raise ValueError(f"No round has ended yet in {folder}: its files are empty.")
    size = max(int(rank.rounds["size"].max(initial=0)) for rank in run.ranks)
    if size > len(numbers):
        run.notes.append(f"of {size} ranks {len(numbers)} have a file here")
    if unfinished := sum(not rank.finished for rank in run.ranks):
        run.notes.append(f"{unfinished} of {len(numbers)} ranks have not come to the end of training")
    _count_on(run.ranks)
    return run


def _read_ranks(paths: Sequence[Path], numbers: Sequence[int]) -> list[tuple[Rank, list[str]]]:
    if sum(path.stat().st_size for path in paths) < _LARGE:
        return list(map(_read_rank, paths, numbers))
    with ProcessPoolExecutor() as processes:
        return list(processes.map(_read_rank, paths, numbers))


def _read_rank(path: Path, number: int) -> tuple[Rank, list[str]]:
    values, host, cut = bytearray(), "", 0
    notes: list[str] = []
    select, pack = itemgetter(*_NUMBERS), struct.Struct(f"{len(_NUMBERS)}d").pack
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            try:
                record = _fast_loads(line)
            except ValueError:
                try:
                    record = json.loads(line)  # knows NaN, which a drift may be
                except ValueError as error:
                    if cut or not _is_cut(line):
                        raise _foreign(path, count, f"it is not JSON ({error})") from None
                    cut = count
                    continue
            try:
                if record["loss"] is None:
                    record["loss"] = math.nan
                values += pack(*select(record))
                host = record["host"]
            except (KeyError, TypeError, struct.error):
                raise _foreign(path, count, _difference(record)) from None
            if cut:
                if record["round"]:  # a run that was killed as it wrote, and was started again, counts from 0
                    raise _foreign(path, cut, "it is not complete")
                notes.append(f"{path.name}:{cut} was cut off, and is left out")
                cut = 0
    if cut:
        notes.append(f"{path.name}:{cut} is not complete, and is left out")
    return Rank(number, host, np.frombuffer(values, RECORD)), notes


def _difference(record: Any) -> str:
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    for each in fields(Round):
        if each.name not in record:
            return f"it has no {each.name!r}"
        if each.name in _NUMBERS and not isinstance(record[each.name], int | float):
            return f"{each.name!r} is {record[each.name]!r}, and no number"
    return "a number is too large"


def _is_cut(line: bytes) -> bool:
    """Whether a record may have begun like this."""
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line.rstrip(b"\n"))


def _foreign(path: Path, line: int, why: str) -> ValueError:
    return ValueError(
        f"{path}:{line} is no record of a round as this version writes it: {why}. Correct the line or take it out."
    )


def _count_on(ranks: Sequence[Rank]) -> None:
    """Number the rounds through where a run was started again, and its numbers with it.

    Of several ranks those stretches belong together that overlap in time: a rank may have been missing in one.
    """
    stretches = []
    for rank in ranks:
        again = np.flatnonzero(np.diff(rank.rounds["round"]) <= 0) + 1
        stretches += [part for part in np.split(rank.rounds, again) if len(part)]
    stretches.sort(key=lambda part: float(part["start"][0]))
    until, offset, reached = -math.inf, 0.0, 0.0
    for part in stretches:
        if part["start"][0] >= until:
            offset = reached
        part["round"] += offset
        until = max(until, float(part["start"][-1] + part["wall"][-1]))
        reached = max(reached, float(part["round"][-1]) + 1)
