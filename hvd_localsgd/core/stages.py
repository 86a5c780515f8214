"""What happens to a chunk on its way out to the other ranks, and on its way back. Stages nest: first out, last back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hvd_localsgd.core.layout import Array, Block, Chunk, Stretch
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.state import State, numbered, put_back


class Stage:
    """May change values in place, and returns what goes on. What it keeps, it keeps by block: chunk sizes are measured.

    Attributes:
        part: of a round's time, what its ``close`` is counted as.
        own: whether what it keeps is this rank's, and not the same on all.
    """

    part = "unpack"
    own = False

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """Training begins with these values."""

    def prepare(self, now: Now, arrays: Sequence[Array]) -> None:
        """A sync begins."""

    def send(self, chunk: Chunk, values: Array) -> Array:
        """On the way out, before values are weighted."""
        return values

    def receive(self, chunk: Chunk, values: Array) -> Array:
        """On the way back."""
        return values

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """All chunks have come back, and are in the arrays: there ``averaged`` is what was averaged, the rest is not."""

    def state(self) -> State:
        """What it keeps from sync to sync: no copies."""
        return {}

    def load(self, state: State) -> None:
        """The inverse, once started."""


class Progress(Stage):
    """Algorithm 2 of Stich (2018): out goes x_k - x_read; what comes back is x_bar, from now on x_read."""

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """x_read is the common start. Extra memory: a copy of the model."""
        self._read = [array.astype(block.wire) for block, array in zip(blocks, arrays, strict=True)]

    def send(self, chunk: Chunk, values: Array) -> Array:
        """What this rank has learned since it last read the average."""
        for index, own, place in chunk.places():
            values[place] -= self._read[index][own]
        return values

    def receive(self, chunk: Chunk, values: Array) -> Array:
        """The average as it is now."""
        chunk.save(self._read, values)
        return values


Place = tuple[int, int, int]  # block, start, stop


class PooledVariance(Stage):
    """v + (m - m_0)^2 goes out in place of v, and (m - m_0)^2 of the average is taken off what comes back.

    That is mean(v) + mean(m^2) - mean(m)^2, the variance of all ranks' data together. m_0 is the mean after the last sync of all: without
    it the squares of large means would swallow small variances.

    Args:
        pairs: where in the memory the means lie, and the variances that belong to them.
    """

    def __init__(self, pairs: Sequence[tuple[Place, Place]]) -> None:
        self._pairs = pairs

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """m_0 is the common start."""
        self._means = [np.array(arrays[block][start:stop]) for (block, start, stop), _ in self._pairs]

    def prepare(self, now: Now, arrays: Sequence[Array]) -> None:
        """Out goes the second moment."""
        self._all_have_it = now.world
        self._add(arrays, 1)

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """What came back becomes a variance."""
        self._add(arrays, -1)
        if self._all_have_it:
            self.start((), arrays)

    def state(self) -> State:
        """m_0."""
        return numbered("mean", self._means)

    def load(self, state: State) -> None:
        """The inverse."""
        put_back("mean", state, self._means)

    def _add(self, arrays: Sequence[Array], sign: int) -> None:
        for ((block, start, stop), (other, first, last)), mean in zip(self._pairs, self._means, strict=True):
            arrays[other][first:last] += sign * (arrays[block][start:stop] - mean) ** 2


def scale(values: Array, weight: float) -> tuple[Array, float]:
    """Values times a weight, in place where they can be; and a number that is not finite if one of the values was not.

    Every value is a factor in the product of the two halves. Finite values may overflow there.
    """
    half = (values.shape[0] + 1) // 2
    if isinstance(values, np.ndarray):
        product = values[:half].dot(values[-half:])
    else:
        product = np.asarray(values[None, :half] @ values[-half:, None]).item()
    values *= weight
    return values, product


class Weigh:
    """Gives what goes out its weight, and looks whether it is finite: both in the same pass, where that is compiled.

    Args:
        scale: as ``scale``.

    Attributes:
        found: (block, element) of the first that was not.
    """

    found: tuple[int, int] | None = None

    def __init__(self, scale: Callable[[Array, float], tuple[Array, float]]) -> None:
        self._scale = scale

    def __call__(self, chunk: Chunk, values: Array, weight: float) -> Array:
        """The values, weighted."""
        values, witness = self._scale(values, weight)
        if not math.isfinite(witness) and self.found is None:
            self._look_closely(chunk, np.asarray(values))
        return values

    def _look_closely(self, chunk: Chunk, values: np.ndarray) -> None:
        for index, own, place in chunk.places():
            unfinite = ~np.isfinite(values[place])
            if unfinite.any():
                self.found = index, own.start + int(unfinite.argmax())
                return
