"""Guards of the average: whose change counts, and how far the average may move.

They look at norms, which every rank tells the others in its header: all decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core.layout import Array, Block, Chunk, Stretch
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.stages import Stage
from hvd_localsgd.core.state import State, numbered, put_back

Track = tuple[float, float, int]  # mean and variance of a rank's norms, exponentially weighted, and of how many


class Outliers:
    """A rank whose change is far larger than its changes were is left out of the round; all left out: nobody moves.

    The norm g of each rank's change is compared with the mean m and the standard deviation s of its earlier ones: z = (g - m) / s. What
    is left out does not enter m and s. EDiT (Cheng et al. 2025, arXiv 2412.07210).

    Args:
        threshold: z from which a rank is left out, > 0; theirs is 3.
        decay: what a new norm weighs in m and s, between 0 and 1; theirs is 0.02.
        warm_up: syncs before anybody is left out, >= 1; theirs is 120.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, threshold: float = 3.0, decay: float = 0.02, warm_up: int = 120) -> None:
        if not threshold > 0 or not 0 < decay < 1 or warm_up < 1:
            raise ValueError(f"Received: threshold={threshold!r}, decay={decay!r}, warm_up={warm_up!r}")
        self.threshold, self.decay, self.warm_up = float(threshold), float(decay), int(warm_up)

    def weigh(
        self, weights: np.ndarray, norms: np.ndarray, tracks: Sequence[Track]
    ) -> tuple[np.ndarray, tuple[Track, ...]]:
        """The weights without outliers, and the tracks after this sync.

        Args:
            weights: of each rank, float64; they sum to 1, or nobody took a step.
            norms: of each rank's change.
            tracks: of each rank, as the last call gave them; empty before the first.
        """
        tracks = tracks or ((0.0, 0.0, 0),) * len(weights)
        kept, after = weights.copy(), []
        for rank, (norm, (mean, variance, count)) in enumerate(zip(norms.tolist(), tracks, strict=True)):
            far = norm - mean > self.threshold * math.sqrt(variance)
            if count >= self.warm_up and far:
                kept[rank] = 0.0
            if kept[rank]:
                share = max(self.decay, 1 / (count + 1))  # at first a plain mean
                delta = norm - mean
                mean, variance, count = mean + share * delta, (1 - share) * (variance + share * delta**2), count + 1
            after.append((mean, variance, count))
        total = math.fsum(kept)
        return (kept / total if total else kept), tuple(after)

    def get_config(self) -> dict[str, Any]:
        """``{"threshold": ..., "decay": ..., "warm_up": ...}``."""
        return {"threshold": self.threshold, "decay": self.decay, "warm_up": self.warm_up}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Outliers:
        """The inverse."""
        return cls(**config)

    def __repr__(self) -> str:
        return f"Outliers({', '.join(f'{key}={value!r}' for key, value in self.get_config().items())})"


class Norms:
    """Ranks weigh less the farther they have moved: weights times softmax(-norm of the change). EDiT, as ``Outliers``."""

    def weigh(
        self, weights: np.ndarray, norms: np.ndarray, tracks: Sequence[Track]
    ) -> tuple[np.ndarray, tuple[Track, ...]]:
        """As ``Outliers.weigh``; nothing is kept."""
        present = weights > 0
        if not present.any():
            return weights, ()
        own = np.where(present, weights * np.exp(-(norms - norms[present].min())), 0.0)
        return own / math.fsum(own), ()

    def get_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Norms:
        """The inverse."""
        return cls()

    def __repr__(self) -> str:
        return "Norms()"


_NAMED = {"outliers": Outliers, "norms": Norms}


def as_guard(guard: Any) -> Any:
    """A name becomes its guard; a guard and None pass.

    Raises:
        ValueError: none of these.
    """
    if guard is None or isinstance(guard, Outliers | Norms):
        return guard
    if isinstance(guard, str) and guard in _NAMED:
        return _NAMED[guard]()
    raise ValueError(
        f"guard must be None, one of {tuple(_NAMED)}, or such as Outliers(threshold=3). Received: {guard!r}"
    )


def as_clip(clip: Any) -> float | None:
    """A norm, > 0, or None.

    Raises:
        ValueError: something else.
    """
    if clip is None:
        return None
    if isinstance(clip, int | float) and not isinstance(clip, bool) and clip > 0:
        return float(clip)
    raise ValueError(f"clip_change must be a norm > 0, or None. Received: {clip!r}")


class Anchor(Stage):
    """Weights as they were after the last sync, and statistics too: where a change is measured from, and what stays.

    Extra memory: a copy of the model.

    Args:
        clip: the norm that the change of the average may have at most; None: any.
    """

    part = "outer"

    def __init__(self, clip: float | None) -> None:
        self._clip = clip

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """The common start."""
        self.old = [np.array(array, block.wire) for block, array in zip(blocks, arrays, strict=True)]
        self._weights = [(index, 0, block.size) for index, block in enumerate(blocks) if not block.kind.plain]

    def prepare(self, now: Now, arrays: Sequence[Array]) -> None:
        """An average inside a group leaves the anchor where it is."""
        self.holds = not now.world

    def norm(self, arrays: Sequence[Array], stretches: Sequence[Stretch] | None = None) -> float:
        """Of the change since, of weights alone; of all of them if ``stretches`` is None."""
        own = self._weights if stretches is None else self._of_weights(stretches)
        return math.sqrt(math.fsum(_squared(arrays[i][a:b], self.old[i][a:b]) for i, a, b in own))

    def _of_weights(self, stretches: Sequence[Stretch]) -> list[Stretch]:
        weights = {index for index, _, _ in self._weights}
        return [stretch for stretch in stretches if stretch[0] in weights]

    def restore(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """What was, stays."""
        for index, start, stop in averaged:
            arrays[index][start:stop] = self.old[index][start:stop]

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """Shortens the change if it is too long."""
        if self._clip is None or self.holds or (norm := self.norm(arrays, averaged)) <= self._clip:
            return
        for index, start, stop in self._of_weights(averaged):
            old, array = self.old[index][start:stop], arrays[index][start:stop]
            array[:] = old + (array - old) * (self._clip / norm)

    def state(self) -> State:
        """The weights after the last sync."""
        return numbered("old", self.old)

    def load(self, state: State) -> None:
        """The inverse."""
        put_back("old", state, self.old)


class AnchorMoves(Stage):
    """Outermost of these: whatever has become of the average is where the next change starts."""

    part = "outer"

    def __init__(self, anchor: Anchor) -> None:
        self._anchor = anchor

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """For the next sync."""
        for index, start, stop in () if self._anchor.holds else averaged:
            self._anchor.old[index][start:stop] = arrays[index][start:stop]


class Change(Stage):
    """x_k - x_old goes out, where it is encoded, and is added to x_old when it comes back.

    Args:
        anchor: x_old, the same on all ranks once they have averaged.
    """

    def __init__(self, anchor: Anchor) -> None:
        self._anchor = anchor

    def prepare(self, now: Now, arrays: Sequence[Array]) -> None:
        """The first syncs are of the weights themselves."""
        self._rests = not now.encoded

    def send(self, chunk: Chunk, values: Array) -> Array:
        """The change."""
        for index, own, place in self._places(chunk):
            values[place] -= self._anchor.old[index][own]
        return values

    def receive(self, chunk: Chunk, values: Array) -> Array:
        """The same sum on all ranks, on the same x_old."""
        for index, own, place in self._places(chunk):
            values[place] += self._anchor.old[index][own]
        return values

    def _places(self, chunk: Chunk) -> Iterable[tuple[int, slice, slice]]:
        return () if chunk.exact or self._rests else chunk.places()


def _squared(array: Array, old: np.ndarray) -> float:
    difference = array.astype(old.dtype) - old
    return float(np.dot(difference, difference))
