"""How a chunk is added over ranks: the library, a ring, one-sided; and the measurement that chooses."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from hvd_localsgd.core import huge_pages, layout
from hvd_localsgd.core.layout import Array, Block, Chunk
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.state import State

_SMALL_CHUNK = 2 << 20
_LARGE_CHUNK = 32 << 20
_SMALLEST_PROBE, _LARGEST_PROBE = 16 << 20, 40 << 20  # more than caches hold, or one call looks as good as chunks
_SLOW_SECONDS = 0.1  # for the smallest probe: a network, whose noise is small beside this
_ENOUGH_SECONDS = 1.0
_MOST_MEGABYTES = 2048


class Reducer(Protocol):
    """Gives every rank the same bits (one-sided: what the others will read)."""

    @property
    def chunk_bytes(self) -> int | None:
        """What it is best given at a time; None: whole blocks, which may be tensors on a device."""

    @property
    def one_sided(self) -> bool:
        """Whether the others need not take part."""

    def start(self, plan: Sequence[Chunk], arrays: Sequence[Array]) -> None:
        """All ranks are about to train, with these values (collective)."""

    def prepare(self, now: Now) -> None:
        """A sync begins."""

    def sum(self, chunk: Chunk, values: Array) -> Array:
        """The sum over ranks; in place where values are host memory."""

    def total(self, value: float) -> float:
        """The sum of a number over the ranks that take part in this average."""

    def bytes(self, chunk: Chunk) -> int:
        """What a rank gives to the reduction of a chunk."""

    @property
    def error(self) -> float:
        """What this sync has lost of this rank's change, |e| / |change|."""

    def state(self) -> State:
        """What this rank keeps from sync to sync, by block: chunks are of another size another time."""

    def load(self, state: State) -> None:
        """The inverse, once started."""

    def free(self) -> None:
        """All ranks have finished (collective)."""


class Library:
    """The communicator's own allreduce."""

    one_sided = False
    error = 0.0

    def __init__(self, communicator: Any, chunk_bytes: int | None) -> None:
        self.communicator, self.chunk_bytes = communicator, chunk_bytes

    def start(self, plan: Sequence[Chunk], arrays: Sequence[Array]) -> None:
        """Nothing is kept."""

    def prepare(self, now: Now) -> None:
        """All syncs are alike."""

    def sum(self, chunk: Chunk, values: Array) -> Array:
        """One allreduce."""
        return self.communicator.allreduce(values)

    def total(self, value: float) -> float:
        """One more, of eight bytes."""
        return float(self.communicator.allreduce(np.array([value]))[0])

    def bytes(self, chunk: Chunk) -> int:
        """All of it."""
        return chunk.elements * chunk.dtype.itemsize

    def state(self) -> State:
        """Nothing is kept."""
        return {}

    def load(self, state: State) -> None:
        """Nothing was kept."""

    def free(self) -> None:
        """Nothing was kept."""


class Ring(Library):
    """Reduce-scatter, then allgather, each in K - 1 steps around the ring, 1/K of the chunk at a time.

    On Ethernet every link is busy in both directions all the time, which the library's choice may not achieve.
    """

    def sum(self, chunk: Chunk, values: Array) -> Array:
        """The same bits everywhere: each part is added up by one rank after the other, and then passed on."""
        rank, size, sendrecv = self.communicator.rank, self.communicator.size, self.communicator.sendrecv
        if values.size < size:
            return super().sum(chunk, values)
        parts = [values[start:stop] for start, stop in pairwise(np.linspace(0, values.size, size + 1).astype(int))]
        incoming = np.empty(max(map(len, parts)), values.dtype)
        right, left = (rank + 1) % size, (rank - 1) % size
        for step in range(size - 1):
            mine, theirs = parts[(rank - step) % size], parts[(rank - step - 1) % size]
            sendrecv(mine, right, incoming[: len(theirs)], left)
            theirs += incoming[: len(theirs)]
        for step in range(size - 1):
            mine, theirs = parts[(rank + 1 - step) % size], parts[(rank - step) % size]
            sendrecv(mine, right, theirs, left)
        return values


class OneSided:
    """Algorithm 2 of Stich (2018): x_bar <- x_bar + p, atomically in each element; the sum is what x_bar then is.

    The average lies in one-sided memory, a stretch of it on every rank. Others may add at the same moment, so that a
    rank may see a part of another's update: the paper's analysis allows it.
    """

    one_sided = True
    error = 0.0

    def __init__(self, communicator: Any, chunk_bytes: int | None) -> None:
        self.communicator, self.chunk_bytes = communicator, chunk_bytes

    def prepare(self, now: Now) -> None:
        """All syncs are alike."""

    def start(self, plan: Sequence[Chunk], arrays: Sequence[Array]) -> None:
        """x_bar is the common start. Extra memory: a K-th of the model, and a chunk."""
        largest = max((chunk.elements * chunk.dtype.itemsize for chunk in plan), default=0)
        self._fetched = np.zeros(largest, np.uint8)
        self._at: dict[int, int] = {}
        self._shared = {}
        for wire in dict.fromkeys(chunk.dtype for chunk in plan):
            own = [chunk for chunk in plan if chunk.dtype == wire]
            ends = np.cumsum([chunk.elements for chunk in own])
            start = np.empty(ends[-1], wire)
            for chunk, end in zip(own, ends, strict=True):
                self._at[chunk.number] = int(end) - chunk.elements
                start[end - chunk.elements : end] = chunk.load(arrays, self._fetched)
            self._shared[wire] = self.communicator.share(start)

    def sum(self, chunk: Chunk, values: Array) -> Array:
        """One fetch-and-add for each rank that owns a part of the chunk."""
        before = self._fetched[: chunk.elements * chunk.dtype.itemsize].view(chunk.dtype)
        self._shared[chunk.dtype].add(values, self._at[chunk.number], before)
        values += before
        return values

    def total(self, value: float) -> float:
        """Nobody else takes part."""
        return value

    def bytes(self, chunk: Chunk) -> int:
        """There and back."""
        return 2 * chunk.elements * chunk.dtype.itemsize

    def state(self) -> State:
        """No rank can speak for the average: others add to it at any time."""
        return {}

    def load(self, state: State) -> None:
        """Nothing was kept."""

    def free(self) -> None:
        """The shared memory."""
        for vector in self._shared.values():
            vector.free()


_KINDS: dict[Any, type[Library]] = {each.__name__: each for each in (Library, Ring)}
_fastest: WeakKeyDictionary[Any, tuple[int, type[Library], int]] = WeakKeyDictionary()


def fastest(communicator: Any, payload: int) -> Library:
    """The reducer for ``payload`` bytes a sync (collective); measured once for each communicator, and when it has lost ranks.

    In shared memory, chunks that stay in cache halve the time; on Ethernet each costs a round trip. The environment
    variable HVD_LOCALSGD_CHUNK_MB sets the chunk size instead. Models below 16 MiB are not worth measuring, and Horovod
    tunes itself.

    Raises:
        ValueError: that size is too small or too large.
    """
    if communicator.takes_tensors:
        return Library(communicator, None)
    if chosen := os.environ.get("HVD_LOCALSGD_CHUNK_MB"):
        if not 0 < float(chosen) <= _MOST_MEGABYTES:
            raise ValueError(
                f"HVD_LOCALSGD_CHUNK_MB must be > 0, and at most {_MOST_MEGABYTES}, for MPI counts with 31 bits. Received: {chosen}"
            )
        return Library(communicator, int(float(chosen) * (1 << 20)))
    if communicator.size == 1 or payload < _SMALLEST_PROBE:
        return Library(communicator, _SMALL_CHUNK)
    if communicator not in _fastest or _fastest[communicator][0] != communicator.generation:
        found = _measure(communicator, min(payload, _LARGEST_PROBE))
        _fastest[communicator] = communicator.generation, type(found), found.chunk_bytes or _SMALL_CHUNK
    _, kind, chunk_bytes = _fastest[communicator]
    return kind(communicator, chunk_bytes)


def chosen(communicator: Any) -> list[Any] | None:
    """What was measured: kind and chunk size (bytes), as JSON takes them; None: nothing was."""
    _, kind, chunk_bytes = _fastest.get(communicator, (0, None, 0))
    return None if kind is None else [kind.__name__, chunk_bytes]


def check(chosen: Any) -> None:
    """Whether ``chosen`` can have said this.

    Raises:
        ValueError: it cannot.
    """
    if chosen is not None:
        name, chunk_bytes = chosen if isinstance(chosen, list) and len(chosen) == 2 else (None, None)
        if name not in _KINDS or type(chunk_bytes) is not int or not 0 < chunk_bytes <= 1 << 31:
            raise ValueError(f"the manifest names a reducer that there is not: {chosen!r}")


def prefer(communicator: Any, chosen: Sequence[Any] | None) -> None:
    """What ``chosen`` once said: with three ranks and more another kind, or another chunk size of a ring, gives other bits."""
    if chosen is not None:
        name, chunk_bytes = chosen
        kind = _KINDS[name]
        _fastest[communicator] = communicator.generation, kind, int(chunk_bytes)


def _measure(communicator: Any, payload: int) -> Library:
    """Time small chunks and, between hosts, large ones and the ring, on a probe of ``payload`` bytes."""
    candidates = [Library(communicator, _SMALL_CHUNK), Library(communicator, _SMALL_CHUNK // 2)]
    large = Library(communicator, _LARGE_CHUNK)
    if communicator.local_size < communicator.size:
        candidates += [large, Ring(communicator, _LARGE_CHUNK)]
    probe = np.ones(payload // 4, np.float32)
    huge_pages.use(probe)
    few = probe[: _SMALLEST_PROBE // 4]
    slow = min(_seconds(large, few) for _ in range(2)) > _SLOW_SECONDS  # the first makes connections
    rounds: list[list[float]] = []
    while len(rounds) < 5 and np.sum(rounds) < _ENOUGH_SECONDS:  # the same sums on every rank
        # In turn, so that what disturbs the machine for a moment disturbs all alike.
        rounds.append([_seconds(candidate, few if slow else probe) for candidate in candidates])
    best = np.min(rounds, axis=0)
    # The first unless something is clearly faster: small chunks take less memory, and are scaled while in cache.
    return candidates[int(np.argmax(best < 1.1 * best.min()))]


def _seconds(reducer: Library, probe: np.ndarray) -> float:
    """Of the slowest rank."""
    communicator = reducer.communicator
    chunks = layout.plan([Block(probe.size, probe.dtype, whole=True)], reducer.chunk_bytes)
    communicator.allreduce(np.zeros(1, np.float32))  # a barrier
    began = time.perf_counter()
    for chunk in chunks:
        reducer.sum(chunk, chunk.load([probe], probe[:0]))
    return float(communicator.exchange(np.array(time.perf_counter() - began)).max())
