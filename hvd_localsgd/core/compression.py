"""Changes in fewer bits: encoded by who sends them, added up in float32 by one rank, encoded once more, decoded by all.

What an encoding loses is kept and added to what is sent next (error feedback), by the rank that sends its change and by the rank that
sends the sum. Every rank decodes the same bytes, the owner of a sum too: all get the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.core.codecs import BLOCK, Codec
from hvd_localsgd.core.layout import Array, Chunk
from hvd_localsgd.core.reducers import Reducer
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.state import State

SMALL = 256  # elements; what is smaller is not worth it


class Encoded:
    """A reducer of changes; what is to stay exact goes through ``plain``.

    Extra memory: a copy of what is encoded, for what was lost, and its K-th part; two chunks on their way.

    Args:
        communicator: of the ranks that add up.
        codec: the encoding.
        plain: for the rest, and for the first syncs.
    """

    one_sided = False

    def __init__(self, communicator: Any, codec: Codec, plain: Reducer) -> None:
        self.communicator, self.codec, self.plain = communicator, codec, plain
        self.chunk_bytes, self._encodes = plain.chunk_bytes, False
        self._lost, self._moved = 0.0, 0.0

    def start(self, plan: Sequence[Chunk], arrays: Sequence[Array]) -> None:
        """Nothing is lost yet."""
        self.plain.start(plan, arrays)
        self._rank = self.communicator.rank  # which changes with the communicator, if others die
        self._chunks = encoded = [chunk for chunk in plan if not chunk.exact]
        self._own = {
            chunk.number: np.zeros(self._share(chunk) * self.communicator.size, np.float32) for chunk in encoded
        }
        self._sums = {chunk.number: np.zeros(self._share(chunk), np.float32) for chunk in encoded}
        largest = max((self.codec.bytes(self._share(chunk)) for chunk in encoded), default=0)
        self._outgoing, self._incoming = np.zeros((2, self.communicator.size * largest), np.uint8)

    def prepare(self, now: Now) -> None:
        """The first syncs are plain."""
        self.plain.prepare(now)
        self._encodes = now.encoded
        self._lost, self._moved = 0.0, 0.0

    def sum(self, chunk: Chunk, values: Array) -> Array:
        """Each rank adds up one part of the chunk."""
        if not self._is_encoded(chunk):
            return self.plain.sum(chunk, values)
        rank, size, codec = self.communicator.rank, self.communicator.size, self.codec
        change, total = self._own[chunk.number], self._sums[chunk.number]  # they begin with what the last sync has lost
        raw = codec.bytes(total.size)
        outgoing, incoming = (each[: size * raw].reshape(size, raw) for each in (self._outgoing, self._incoming))
        change[: values.size] += values
        parts = change.reshape(size, -1)
        total += parts[rank]
        parts[rank] = 0  # it is not sent
        for other in range(size):
            if other != rank:
                moved, lost = codec.encode(parts[other], outgoing[other])
                self._moved, self._lost = self._moved + moved, self._lost + lost
        self.communicator.alltoall(outgoing, incoming)
        for other in range(size):
            if other != rank:
                codec.add(incoming[other], total)
        codec.encode(total, outgoing[rank])
        self.communicator.allgather(outgoing[rank], incoming)
        for other in range(size):
            codec.decode(incoming[other], values[other * total.size : (other + 1) * total.size])
        return values

    def _is_encoded(self, chunk: Chunk) -> bool:
        """Not where the parts would be mostly filling."""
        return self._encodes and not chunk.exact and chunk.elements >= self.communicator.size * BLOCK

    def _share(self, chunk: Chunk) -> int:
        return -(-chunk.elements // (self.communicator.size * BLOCK)) * BLOCK

    def total(self, value: float) -> float:
        """As it is."""
        return self.plain.total(value)

    def bytes(self, chunk: Chunk) -> int:
        """Encoded."""
        if not self._is_encoded(chunk):
            return self.plain.bytes(chunk)
        return self.communicator.size * self.codec.bytes(self._share(chunk))

    @property
    def error(self) -> float:
        """Of what this rank had to send to others; what the sums lose is not in it."""
        return math.sqrt(self._lost / self._moved) if self._moved else 0.0

    def state(self) -> State:
        """What was lost: of each part of a chunk by this rank's change, of the part that it adds up by the sum."""
        ends: dict[int, int] = {}
        for index, own, _ in (place for chunk in self._chunks for place in chunk.places()):
            ends[index] = max(ends.get(index, 0), own.stop)
        lost = {index: np.zeros(end, np.float32) for index, end in ends.items()}
        for chunk in self._chunks:
            total = self._sums[chunk.number]
            parts = self._own[chunk.number].reshape(-1, total.size).copy()
            parts[self._rank] = total
            for index, own, place in chunk.places():
                lost[index][own] = parts.reshape(-1)[place]
        return {str(index): block for index, block in lost.items()}

    def load(self, state: State) -> None:
        """The inverse, to the bit where as many ranks add up chunks of the same size."""
        for chunk in self._chunks if state else ():
            parts = self._own[chunk.number]
            for index, own, place in chunk.places():
                parts[place] = state[str(index)][own]
            own_part = parts.reshape(self.communicator.size, -1)[self.communicator.rank]
            self._sums[chunk.number][:] = own_part
            own_part[:] = 0

    def free(self) -> None:
        """The plain reducer's."""
        self.plain.free()
