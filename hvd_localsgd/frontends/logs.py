"""An epoch's logs: averaged over ranks, how far the ranks are apart, and what that says of H and the outer rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core.timing import PARTS

SHOWN = ("averaging",)  # in the progress bar, of what is added to the user's metrics
_EPOCHS = 2  # in a row, before a hint is given


def numbers(value: Any) -> Any:
    """A log as JSON has it: a number, or lists of numbers; None if it is something else, such as words."""
    try:
        array = np.asarray(value)
        return array.astype("float64").tolist() if array.dtype.kind in "biufV" else None  # V: bfloat16
    except (TypeError, ValueError):
        return None


def average(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each metric's mean over the ranks that have it, weighted by the samples behind it.

    Of an array element by element; where the ranks' shapes differ there is no mean, and each rank keeps its own.
    """
    averaged = {}
    for key in sorted({key for entry in entries for key in entry["logs"]}):
        weight_key = "validation_samples" if key.startswith("val_") else "samples"
        pairs = [(np.array(entry["logs"][key]), entry[weight_key]) for entry in entries if key in entry["logs"]]
        if len({value.shape for value, _ in pairs}) > 1:
            continue
        if not any(weight for _, weight in pairs):
            pairs = [(value, 1.0) for value, _ in pairs]
        weighted = [value * weight for value, weight in pairs if weight]  # a NaN with weight zero is not counted
        mean = sum(weighted) / sum(weight for _, weight in pairs)
        averaged[key] = mean if mean.ndim else float(mean)
    return averaged


def spread(entries: Sequence[dict[str, Any]], drift: float) -> dict[str, float]:
    """How far the ranks are apart: ``loss_min`` and ``loss_max`` of those with samples, and the mean ``drift`` of the epoch's syncs.

    NaN is what there was none of: a loss that is one number, a sync.
    """
    trained = [entry for entry in entries if entry["samples"]] or entries
    losses = [loss for entry in trained if isinstance(loss := entry["logs"].get("loss"), float)] or [math.nan]
    return {"loss_min": float(np.min(losses)), "loss_max": float(np.max(losses)), "drift": drift}


def times(sums: Mapping[str, Any]) -> dict[str, float]:
    """Of the epoch's sums: the share of the time that averaging took, waiting for others not counted; and where the time went, in seconds."""
    averaging = sum(sums[part] for part in ("pack", "communicate", "unpack", "outer"))
    share = averaging / sums["wall"] if sums["wall"] else 0.0
    return {"averaging": share, **{f"seconds_{part}": sums[part] for part in PARTS}}


class Apart:
    """Whether ranks come apart instead of learning: a hint, once in a training.

    A spread alone says nothing: shards that differ have one that no sync closes, and a rate or an H that grows widens it. So two things must come
    together, in two epochs in a row. Every rank has lost more than half of what all had gained by the best epoch (or half of the loss, where
    that is more: what little a trained model gains is noise). And the spread is wider than it was then, in losses or in drift.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] | None = None
        self._best: dict[str, float] | None = None
        self._epochs = 0  # in a row
        self._said = False

    def see(self, spread: dict[str, float]) -> str:
        """An epoch's spread, the same on all ranks; the hint, or an empty string."""
        first = self._first = self._first or spread
        if self._best is None or spread["loss_max"] < self._best["loss_max"]:
            self._best = spread
        best = self._best
        gained = max(first["loss_max"] - best["loss_max"], abs(best["loss_max"]))
        lost = spread["loss_min"] - best["loss_max"] > gained / 2
        wider = spread["drift"] > best["drift"] or _width(spread) > _width(best)
        self._epochs = self._epochs + 1 if lost and wider else 0
        if self._said or self._epochs < _EPOCHS:
            return ""
        self._said = True
        return (
            f"The ranks come apart instead of learning: their losses are {_words(spread)}, and were {_words(best)} in the best epoch. H or "
            "the rate of the outer step is too large: lower sync_every, or that rate; if one rank alone does the same, lower the learning rate."
        )


def _width(spread: dict[str, float]) -> float:
    return spread["loss_max"] - spread["loss_min"]


def _words(spread: dict[str, float]) -> str:
    return f"{spread['loss_min']:.3g} to {spread['loss_max']:.3g} with a drift of {spread['drift']:.3g}"
