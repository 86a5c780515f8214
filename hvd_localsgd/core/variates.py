"""Control variates: what a rank's gradients are off the mean of all ranks', estimated from what is averaged anyway.

VRL-SGD (Liang et al. 2019, arXiv 1912.12844). Where ranks hold different data, each rank's local steps lead to its own optimum, the
farther the larger H is. So each rank k keeps a correction Delta_k, zero at first, and

    local step      x_k <- x_k - rate (grad f_k(x_k) - Delta_k)                     (the front end's business)
    sync            Delta_k <- Delta_k + (x_bar - x_k) / (sum of the rates of k's steps since the last sync)

The fraction is the mean of k's corrected gradients less the mean of all ranks'. If rates and numbers of steps are the same on all ranks,
and ranks count equally, the corrections sum to zero over ranks: the average moves as if there were none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hvd_localsgd.core.layout import Array, Block, Chunk, Stretch
from hvd_localsgd.core.stages import Place, Stage
from hvd_localsgd.core.state import State, numbered, put_back


class Variates(Stage):
    """Sees x_k as it goes out, and x_bar as it comes back; of weights, not of statistics. Extra memory: two copies of the weights."""

    own = True

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """Nothing is known of the ranks' gradients: a training begins as Local SGD."""
        self._rates = 0.0
        self._corrections = [np.zeros(0 if block.kind.plain else block.size, block.wire) for block in blocks]
        self._sent = [np.empty_like(correction) for correction in self._corrections]

    def count(self, rates: float) -> None:
        """This rank has taken local steps whose rates sum to this."""
        self._rates += rates

    def send(self, chunk: Chunk, values: Array) -> Array:
        """A copy: ``values`` become the average."""
        for index, own, place in self._pieces(chunk):
            self._sent[index][own] = values[place]
        return values

    def receive(self, chunk: Chunk, values: Array) -> Array:
        """How far it is from there to the average."""
        for index, own, place in self._pieces(chunk):
            np.subtract(values[place], self._sent[index][own], out=self._sent[index][own])
        return values

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """A rank that took no steps is not in the average, and has learned nothing of its gradients."""
        for index, start, stop in averaged if self._rates else ():
            if self._corrections[index].size:
                self._corrections[index][start:stop] += self._sent[index][start:stop] / self._rates
        self._rates = 0.0

    def state(self) -> State:
        """The corrections, and the rates since the last sync."""
        return numbered("correction", self._corrections) | {"rates": np.array(self._rates)}

    def load(self, state: State) -> None:
        """The inverse; whoever holds a correction sees it."""
        put_back("correction", state, self._corrections)
        self._rates = float(state["rates"])

    def correction(self, place: Place) -> np.ndarray:
        """Of the weights that lie there: a view, which changes at each sync."""
        block, start, stop = place
        return self._corrections[block][start:stop]

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[int, slice, slice]]:
        """Of all that is weights."""
        return (each for each in chunk.places() if self._corrections[each[0]].size)
