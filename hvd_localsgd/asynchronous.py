"""Asynchronous Local SGD: Stich (2018), Algorithm 2. No rank waits for another.

The global average is held in one-sided MPI memory, a stretch of it on every rank. Worker k, after its local steps,

    x_bar   <- x_bar + 1/K (x_k - x_read)      atomically in each element
    x_read, x_k <- x_bar

where x_read is the x_bar that it last read. Other ranks may do the same at that moment, so that a worker may see a part of another's
update: the paper's analysis allows it. The rate is that of H + tau for a delay of tau.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd import header
from hvd_localsgd.averaging import FINISHED, Chunk, LocalSGD, Settings
from hvd_localsgd.communicators import SharedVector


class AsyncLocalSGD(LocalSGD):
    """The engine of ``mode="async"``: what ``LocalSGD`` does, without waiting until training ends.

    Extra memory: a copy of the model (what was last read), and a K-th of one (the shared average).

    Raises:
        CommunicatorError: in ``begin``, on every rank: the communicator or the MPI library has no one-sided memory.
    """

    def begin(self, weights: Sequence[Any], others: Sequence[Any] = ()) -> bool:
        """The same start everywhere, which is also the global average's."""
        moved = super().begin(weights, others)
        communicator = self.communicator
        if communicator.size == 1:
            return moved
        communicator.busy = True
        self._places = self._lay_out()
        with self.variables.open() as arrays:
            for chunk, _, read in self._places:
                chunk.pack(arrays, read, 1.0)
        self._shared: dict[np.dtype, SharedVector] = {}
        for wire in dict.fromkeys(chunk.dtype for chunk in self._plan):
            start = np.concatenate([read for chunk, _, read in self._places if chunk.dtype == wire])
            self._shared[wire] = communicator.share(start)
        self._counters = communicator.share(np.zeros(2, np.int64))  # syncs of all ranks, ranks that want to stop
        largest = max((chunk.elements * chunk.dtype.itemsize for chunk in self._plan), default=0)
        self._progress, self._fetched = np.zeros(largest, np.uint8), np.zeros(largest, np.uint8)
        self._syncs_seen, self._said_stop = 0, False
        communicator.busy = False
        return moved

    def synchronise(self, message: bytes = b"", exposed: Sequence[Any] | None = None, due: bool = True) -> list[bytes]:
        """Give this rank's progress to the global average and go on from there; nobody is waited for."""
        if self.communicator.size == 1:
            return super().synchronise(message, exposed, due)
        if self.steps and not self._is_finite():
            raise FloatingPointError(
                f"NaN or infinity in the weights of rank {self.communicator.rank} on {self.communicator.host} at "
                f"local step {self.total_steps + self.steps}; they were not given to the others. Lower the "
                "learning rate, or clip the gradients (clipnorm=)."
            )
        if self.steps or self.wants_stop:
            staleness = self._count()
        if self.steps:
            drift = self._exchange_progress(exposed)
            if self.settings.optimizer_state == "reset":
                self.state.reset()
            self.watch.lap("outer")
            self._record(self.interval, 2 * self._payload, drift, staleness)
            self.interval = self.settings.schedule.interval(self.total_steps)
        return [message]

    def meet(self, position: float, message: bytes = b"") -> list[bytes]:
        """Where an epoch ends nobody waits either; only at the very end."""
        if self.communicator.size == 1:
            return super().meet(position, message)
        self.position = position
        return self.synchronise(message) if position == FINISHED or not self.settings.schedule.exact else [message]

    def finish(self) -> None:
        """All progress given, all ranks read the same final average."""
        if self.communicator.size == 1:
            return super().finish()
        communicator = self.communicator
        self.meet(FINISHED)
        header.exchange(communicator, header.row(position=FINISHED))
        communicator.busy = True
        self.watch.lap("wait")
        with self.variables.open() as arrays:
            for chunk, at, read in self._places:
                self._shared[chunk.dtype].read(read, at)
                chunk.unpack(arrays, read)
        for vector in (*self._shared.values(), self._counters):
            vector.free()
        self.watch.lap("communicate")
        self._places.clear()
        self._conclude()

    def _lay_out(self) -> list[tuple[Chunk, int, np.ndarray]]:
        """Each chunk, where it is in the shared average, and memory for what was last read of it."""
        at = dict.fromkeys((chunk.dtype for chunk in self._plan), 0)
        places = []
        for chunk in self._plan:
            places.append((chunk, at[chunk.dtype], np.empty(chunk.elements, chunk.dtype)))
            at[chunk.dtype] += chunk.elements
        return places

    def _count(self) -> int:
        """One more sync; how many others came since this rank's last."""
        says_stop = self.wants_stop and not self._said_stop
        before = np.empty(2, np.int64)
        self._counters.add(np.array([self.steps > 0, says_stop], np.int64), 0, before)
        self._said_stop |= says_stop
        self.stop = bool(before[1]) or self._said_stop
        staleness = int(before[0]) - self._syncs_seen
        self._syncs_seen = int(before[0]) + (self.steps > 0)
        return staleness

    def _exchange_progress(self, exposed: Sequence[Any] | None) -> float:
        """Algorithm 2, chunk by chunk; returns how far this rank was from the average, estimated."""
        distance, sampled = 0.0, 0
        with self.variables.open(exposed) as arrays:
            for chunk, at, read in self._places:
                size = chunk.elements * chunk.dtype.itemsize
                progress, average = self._progress[:size].view(chunk.dtype), self._fetched[:size].view(chunk.dtype)
                before = chunk.beginning(arrays, self._to_sample(chunk))
                chunk.pack(arrays, progress, 1.0)
                progress -= read
                progress *= 1 / self.communicator.size
                self.watch.lap("pack")
                self._shared[chunk.dtype].add(progress, at, average)
                self.watch.lap("communicate")
                average += progress  # what was there before, and ours: what is there now
                before -= average[: before.size]
                distance += float(np.dot(before, before))
                sampled += before.size
                read[:] = average
                chunk.unpack(arrays, average)
                self.watch.lap("unpack")
        self.watch.lap("unpack")
        return math.sqrt(distance * self.variables.elements / max(sampled, 1))


def engine_class(settings: Settings) -> type[LocalSGD]:
    """The engine for ``settings.mode``."""
    return AsyncLocalSGD if settings.mode == "async" else LocalSGD
