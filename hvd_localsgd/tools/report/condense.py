"""Millions of rounds become the few thousand that a table or a plot can show."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core.timing import PARTS, Sums
from hvd_localsgd.tools.report.runs import Rank, Run

ADDED = (*PARTS, "residual", "wall", "hidden", "bytes", "steps")
MEANS = ("loss", "drift", "interval")


def totals(rank: Rank) -> dict[str, Any]:
    """Of all rounds, what ``core.timing.Timings.sums`` says of the rounds of one training."""
    rounds = rank.rounds
    syncs = int((rounds["interval"] > 0).sum())
    sums = {name: syncs if name == "syncs" else float(rounds[name].sum()) for name in Sums().numbers}
    sums["staleness"] /= max(syncs, 1)
    return {**sums, "rank": rank.number, "host": rank.host}


def together(runs: Sequence[Run], most: int) -> int:
    """How many rounds have to be taken together for all ranks of all runs to have about ``most`` records."""
    return math.ceil(sum(len(rank.rounds) for run in runs for rank in run.ranks) / most)


def condense(rounds: np.ndarray, count: int) -> np.ndarray:
    """Each ``count`` rounds as one, of the same dtype: times, bytes and steps added, loss, drift and H the means of what is known.

    The rest is that of the first. NaN where no round knows: the drift of rounds in which no average arrived, H of the time after the last.
    """
    group = rounds["round"] // count
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    condensed = rounds[begins]
    for name in ADDED:
        condensed[name] = np.add.reduceat(rounds[name], begins)
    arrived = (rounds["bytes"] > 0) | (rounds["size"] == 1)
    for name, counts in zip(MEANS, (True, arrived, rounds["interval"] > 0), strict=True):
        known = np.isfinite(rounds[name]) & counts
        sums = np.add.reduceat(np.where(known, rounds[name], 0.0), begins)
        with np.errstate(invalid="ignore"):
            condensed[name] = sums / np.add.reduceat(known, begins, dtype=np.int64)
    return condensed


def over_ranks(run: Run, most: int) -> dict[str, np.ndarray]:
    """How a run went: about ``most`` points, each of as many rounds.

    Returns:
        ``round``; ``time`` (seconds since the run began, at the end of the round, on average); ``loss``, ``drift`` and ``interval``: the mean
        over ranks, and with ``_min`` and ``_max`` the least and the most of any rank. NaN where no rank knows.
    """
    count = math.ceil(run.rounds / most)
    points = math.ceil(run.rounds / count)
    table = {name: np.full((len(run.ranks), points), np.nan) for name in ("time", *MEANS)}
    start = run.start
    for place, rank in enumerate(run.ranks):
        cells = condense(rank.rounds, count)
        columns = (cells["round"] // count).astype(int)
        table["time"][place, columns] = cells["start"] + cells["wall"] - start
        for name in MEANS:
            table[name][place, columns] = cells[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nobody knows: NaN
        result = {"round": np.arange(points) * count, "time": np.nanmean(table["time"], axis=0)}
        for name in MEANS:
            result[name] = np.nanmean(table[name], axis=0)
            result[f"{name}_min"], result[f"{name}_max"] = (
                np.nanmin(table[name], axis=0),
                np.nanmax(table[name], axis=0),
            )
    return result


def paces(rank: Rank) -> tuple[float, float]:
    """Compute and input, in seconds of a typical local step: the median of the rounds, so that the one that compiles does not count."""
    rounds = rank.rounds[rank.rounds["steps"] > 0]
    if not len(rounds):
        return math.nan, math.nan
    return tuple(float(np.median(rounds[part] / rounds["steps"])) for part in ("compute", "input"))  # type: ignore[return-value]
