"""How far this rank is from the average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from hvd_localsgd.core.layout import Array, Chunk, Stretch

_SAMPLE = 1 << 16  # elements; the drift of larger models is estimated from the beginning of every chunk


class Drift:
    """|x_k - average|^2, from a look at the arrays before the average and one after.

    Not chunk by chunk on their way: what Python touches between two reductions has left the caches, which takes twice as long.

    Args:
        plan: all chunks there are.
    """

    def __init__(self, plan: Sequence[Chunk]) -> None:
        share = min(1.0, _SAMPLE / max(sum(chunk.elements for chunk in plan), 1))
        self._places = [list(_beginning(chunk, math.ceil(chunk.elements * share))) for chunk in plan]
        size = sum(stop - start for places in self._places for _, start, stop in places)
        self._sample = np.empty(size, np.result_type(np.float32, *(chunk.dtype for chunk in plan)))

    def look(self, arrays: Sequence[Array], due: Sequence[Chunk]) -> None:
        """What this rank has, of what is about to be averaged."""
        at = 0
        self._due = due
        for index, start, stop in self._looked_at():
            self._sample[at : at + stop - start] = arrays[index][start:stop]
            at += stop - start

    def squared(self, arrays: Sequence[Array]) -> float:
        """|x_k - average|^2, estimated where the model is large, if what was looked at is the average now."""
        at = 0
        for index, start, stop in self._looked_at():
            self._sample[at : at + stop - start] -= arrays[index][start:stop]
            at += stop - start
        difference = self._sample[:at]
        return float(np.dot(difference, difference)) * sum(chunk.elements for chunk in self._due) / max(at, 1)

    def _looked_at(self) -> Iterator[Stretch]:
        return (place for chunk in self._due for place in self._places[chunk.number])


def _beginning(chunk: Chunk, elements: int) -> Iterator[Stretch]:
    """Where its first elements lie."""
    for index, start, stop, offset in chunk.pieces:
        if offset < elements:
            yield index, start, min(stop, start + elements - offset)
