"""The average on its way while training goes on: local steps that are taken meanwhile are kept.

CoCoD-SGD (Shen et al. 2019, arXiv 1906.12043): with x_s what a rank held when the average was begun, and x what it holds when the average
has come,

    x <- average + (x - x_s)

as if the steps taken meanwhile had been taken from the average.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hvd_localsgd.core.layout import Array, Chunk, Stretch
from hvd_localsgd.core.pipeline import Outcome, Pipeline
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.errors import RankDied

_STRETCH = 1 << 16  # elements


class Overlapped(Pipeline):
    """As ``Pipeline``, but ``send`` does not wait: a thread adds up the chunks, and ``land`` takes what has come.

    Its reducer needs a communicator of its own. Extra memory while an average is on its way: two copies of what is averaged, and what
    is laid end to end.
    """

    _flight: _Flight | None = None

    def start(self) -> None:
        """The average of a training that was broken off arrives on all ranks, and is not looked at."""
        if self._flight is not None:
            self._flight.join()
            self._flight = None
        super().start()

    def send(
        self, weight: float, ranks: int, now: Now, waits: bool = True, blank: bool = False, everything: bool = False
    ) -> None:
        """Begins the average, or makes it where it is waited for; arguments as for ``Pipeline.send``."""
        if waits:
            super().send(weight, ranks, now, waits, blank, everything)
            return
        self._outcome = Outcome()
        if self._lost:
            self._lay_out()
        if (reducer := self.reducer) is None:
            return
        due = self._due(now)
        stretches = self._stretches(due)
        self._before = reducer.state() if self.survivors.go_on else {}
        reducer.prepare(now)
        with self.memory.open() as arrays, np.errstate(over="ignore", invalid="ignore"):
            started = _copy(arrays, stretches)
            average = _copy(started, stretches)
            self._prepare(now, average, due)
            sent = [(chunk, self._out(chunk, average, self._room(chunk), weight)) for chunk in due]
        self.timings.lap("pack")
        self.survivors.agree()

        def fly() -> Outcome:
            with np.errstate(over="ignore", invalid="ignore"):
                for chunk, values in sent:
                    self._back(chunk, average, reducer.sum(chunk, values))
                return self._measure(self._drift.squared(average), weight, ranks, due)

        self._flight = Pipeline.latest = _Flight(fly, Pipeline.latest)
        self._begun = started, average, stretches, ranks, due

    def land(self) -> Outcome:
        """Waits for the average, if it is not here yet. One that is not finite stays out of the memory.

        Raises:
            RankDied: on all ranks; the average will not come, and nothing was taken of it.
            Exception: what the thread could not do.
        """
        if self._flight is None:
            return self._outcome
        flight = self._flight
        waited = flight.wait()
        self._flight = None
        self.timings.lap("communicate")
        try:
            self._outcome = replace(flight.result(), hidden=max(0.0, flight.seconds - waited))
            self.survivors.agree()
        except RankDied:
            self._carried = self._before
            raise
        if math.isfinite(self._outcome.drift):
            started, average, stretches, ranks, due = self._begun
            self._close(average, ranks, due)
            with self.memory.open() as arrays:
                self._apply(arrays, started, average, stretches)
            self.timings.lap("unpack")
        del self._begun
        return self._outcome

    def _room(self, chunk: Chunk) -> np.ndarray:
        return np.empty(0 if chunk.direct else chunk.elements * chunk.dtype.itemsize, np.uint8)

    def _apply(
        self, arrays: Sequence[Array], started: Sequence[Array], average: Sequence[Array], stretches: Sequence[Stretch]
    ) -> None:
        blocks = self.memory.blocks
        for index, first, last in stretches:
            for start in range(first, last, _STRETCH):
                stretch = slice(start, min(start + _STRETCH, last))
                array, wire = arrays[index][stretch], blocks[index].wire
                # A variance or a second moment could become negative: they are as they come.
                if blocks[index].kind.plain:
                    array[:] = average[index][stretch]
                else:
                    array[:] = average[index][stretch] + (array.astype(wire) - started[index][stretch])


class _Flight(threading.Thread):
    """A call in a thread of its own, which begins at once, or when another has ended.

    Attributes:
        seconds: how long it took.
    """

    seconds = 0.0

    def __init__(self, call: Callable[[], Outcome], before: threading.Thread | None) -> None:
        super().__init__(daemon=True)  # a rank that dies must not keep others' processes from ending
        self._call, self._before, self._outcome = call, before, Outcome()
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """The call."""
        if self._before is not None:
            self._before.join()
        began = time.perf_counter()
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._error = error
        del self._before, self._call  # the memory that it holds
        self.seconds = time.perf_counter() - began

    def wait(self) -> float:
        """Until it is over; how many seconds that took."""
        began = time.perf_counter()
        self.join()
        return time.perf_counter() - began

    def result(self) -> Outcome:
        """What it returned, or raised."""
        if self._error is not None:
            raise self._error
        return self._outcome


def _copy(arrays: Sequence[Array], stretches: Sequence[Stretch]) -> list[Array]:
    """Of these stretches; what lies between takes no memory, since nobody writes to it."""
    copies = [np.empty_like(array) for array in arrays]
    for index, start, stop in stretches:
        copies[index][start:stop] = arrays[index][start:stop]
    return copies
