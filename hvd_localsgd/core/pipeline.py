"""Load, send, weight, sum, receive, save: the one loop through which all that is averaged goes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from hvd_localsgd.core import huge_pages, layout
from hvd_localsgd.core.drift import Drift
from hvd_localsgd.core.guards import Anchor
from hvd_localsgd.core.layout import Array, Block, Chunk
from hvd_localsgd.core.reducers import Reducer
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.stages import Stage, Weigh
from hvd_localsgd.core.state import State, below, under
from hvd_localsgd.core.survivors import Survivors
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.errors import RankDied


class Memory(Protocol):
    """A framework's variables: what is averaged, a fixed list in a fixed order, and what all ranks start with alike."""

    @property
    def blocks(self) -> Sequence[Block]:
        """What is averaged as one array each."""

    def place(self, variable: Any) -> tuple[int, int, int]:
        """Where it lies: block, start, stop."""

    def name(self, block: int, element: int) -> str:
        """Of the variable that this element of a block belongs to."""

    def description(self) -> list[list[Any]]:
        """``[name, shape, dtype]`` of every variable that will ever be sent: what all ranks must agree on."""

    def broadcast(self, communicator: Any, as_far: bool = False) -> bool:
        """Give all ranks rank 0's start (collective); whether that changed, on this rank, what is averaged.

        Args:
            as_far: all have taken the same number of steps already: what each rank keeps for itself stays its own.
        """

    def is_finite(self) -> bool:
        """No NaN or infinity, as far as a look at one variable can tell: one in the loss is in every gradient."""

    def clear(self, arrays: list[Array]) -> None:
        """Zeros in what ``open`` has handed out, or instead of it."""

    def restart(self) -> None:
        """This rank's optimizer starts anew."""

    def settle(self, world: bool) -> None:
        """After a sync, what has to be put right: an optimizer's state that is reset, weights that obey a constraint.

        Args:
            world: whether it was of all ranks: inside a group state is not reset.
        """

    def open(self) -> AbstractContextManager[list[Array]]:
        """An array for each block, to read and to write; what is written counts when the ``with`` block ends.

        No view of an array may live longer: the framework's next update would copy it.
        """


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one average.

    Attributes:
        drift: sqrt(1/K sum_k |x_k - average|^2); NaN or infinite if something that was averaged is.
        bytes: what this rank gave to the reduction.
        error: what compression has lost of this rank's change, |e| / |change|.
        hidden: seconds that the average was on its way while this rank went on.
    """

    drift: float = 0.0
    bytes: int = 0
    error: float = 0.0
    hidden: float = 0.0

    def and_then(self, later: Outcome) -> Outcome:
        """Of two averages of the same round."""
        return replace(later, bytes=self.bytes + later.bytes, hidden=self.hidden + later.hidden)


class Pipeline:
    """One average, blocking.

    Args:
        memory: of what.
        choose: the reducer for so many bytes, None for a rank that is alone; called when training begins, on all ranks
            together, since it may measure.
        outer: what becomes of the average.
        stages: what happens to the values on their way, outermost first.
        timings: where the seconds go.
        survivors: what happens if a rank dies.
        scale: as ``stages.scale``.
        parts: fragments of the model that are averaged one after another.
    """

    # The latest average of any model that a thread computes: they go one after another, in the same order on all ranks.
    latest: ClassVar[threading.Thread | None] = None

    def __init__(
        self,
        memory: Memory,
        choose: Callable[[int], Reducer | None],
        outer: Sequence[Stage],
        stages: Sequence[Stage],
        timings: Timings,
        survivors: Survivors,
        scale: Callable[[Array, float], tuple[Array, float]],
        parts: int = 1,
    ) -> None:
        self.memory, self.timings, self.survivors, self._parts = memory, timings, survivors, parts
        self.reducer: Reducer | None = None
        self._choose = choose
        self._weigh = Weigh(scale)
        self._anchor = next((stage for stage in outer if isinstance(stage, Anchor)), None)
        self._stages: tuple[Stage, ...] = (*outer, *stages)
        self._outcome = Outcome()
        self._carried: State = {}  # what a reducer kept, on to the one after it

    def start(self) -> None:
        """All ranks hold the same values and are about to train (collective)."""
        self._carried, self._weigh.found = {}, None
        self._lay_out()
        if self.reducer is not None:
            with self.memory.open() as arrays:
                for stage in self._stages:
                    stage.start(self.memory.blocks, arrays)

    def survived(self) -> None:
        """Ranks were lost: the next average goes another way."""
        if self.reducer is not None and not self._carried:
            self._carried = self.reducer.state()
        self._lost = True

    def _lay_out(self) -> None:
        """The reducer, and what it takes at a time (collective)."""
        self._lost, blocks = False, self.memory.blocks
        self.reducer = self._choose(sum(block.size * block.wire.itemsize for block in blocks))
        if self.reducer is None:
            return
        self._plan = layout.plan(blocks, self.reducer.chunk_bytes, self._parts)
        self._everywhere, self._drift = layout.stretches(self._plan), Drift(self._plan)
        packed = (chunk.elements * chunk.dtype.itemsize for chunk in self._plan if not chunk.direct)
        self._scratch = np.zeros(max(packed, default=0), np.uint8)
        with self.memory.open() as arrays:
            direct = {chunk.pieces[0][0] for chunk in self._plan if chunk.direct}
            for memory in (self._scratch, *(arrays[index] for index in sorted(direct))):
                huge_pages.use(memory)
            self._kept = [np.empty_like(array) for array in arrays] if self.survivors.go_on else []
            self.reducer.start(self._plan, arrays)
        self.reducer.load(self._carried)
        self._carried = {}

    def send(
        self, weight: float, ranks: int, now: Now, waits: bool = True, blank: bool = False, everything: bool = False
    ) -> None:
        """x_k <- sum_j w_j x_j, all ranks together (or, if the reducer is one-sided, this one by itself).

        Args:
            weight: this rank's, w_k.
            ranks: how many have a weight; none: what was, stays.
            now: what all ranks know.
            waits: whether the average must be there when this returns; here it is in any case.
            blank: what this rank has is not finite, and is not looked at.
            everything: whatever is due now, since some rank is blank.
        """
        lap = self.timings.lap
        self._outcome = Outcome()
        if self._lost:
            self._lay_out()
        if (reducer := self.reducer) is None:
            return
        if Pipeline.latest is not None:
            Pipeline.latest.join()
            lap("communicate")
        due = self._plan if everything else self._due(now)
        reducer.prepare(now)
        # What is not finite is looked at in the end.
        with self.memory.open() as arrays, np.errstate(over="ignore", invalid="ignore"), self._undone(arrays):
            if blank:
                self.memory.clear(arrays)
            self._prepare(now, arrays, due)
            for chunk in due:
                values = self._out(chunk, arrays, self._scratch, weight)
                if reducer.one_sided and self._weigh.found:
                    self._outcome = Outcome(math.nan)  # before the others can read it
                    return
                lap("pack")
                values = reducer.sum(chunk, values)
                lap("communicate")
                self._back(chunk, arrays, values)
                lap("unpack")
            squared = self._drift.squared(arrays)
            lap("unpack")
            self._outcome = self._measure(squared, weight, ranks, due)
            self.survivors.agree()
            lap("communicate")
            self._close(arrays, ranks, due)
        lap("unpack")

    def land(self) -> Outcome:
        """What was sent has arrived, and is in the memory."""
        return self._outcome

    # The parts of an average.

    @contextmanager
    def _undone(self, arrays: Sequence[Array]) -> Iterator[None]:
        """If a rank dies in here, everything is as it was. What stages keep they only change when all have agreed."""
        for array, kept in zip(arrays, self._kept, strict=False):
            kept[:] = array
        before = self.reducer.state() if self._kept and self.reducer is not None else {}
        try:
            yield
        except RankDied:
            self._carried = before
            for array, kept in zip(arrays, self._kept, strict=False):
                array[:] = kept
            raise

    def averaged(self, now: Now) -> list[layout.Stretch]:
        """Where it lies."""
        return self._stretches(self._due(now)) if self.reducer is not None else []

    def _stretches(self, due: Sequence[Chunk]) -> list[layout.Stretch]:
        return self._everywhere if len(due) == len(self._plan) else layout.stretches(due)

    def _due(self, now: Now) -> list[Chunk]:
        return [chunk for chunk in self._plan if chunk.part in now.parts and now.round % chunk.every == 0]

    def _prepare(self, now: Now, arrays: Sequence[Array], due: Sequence[Chunk]) -> None:
        for stage in self._stages:
            stage.prepare(now, arrays)
        self._drift.look(arrays, due)

    def _out(self, chunk: Chunk, arrays: Sequence[Array], scratch: np.ndarray, weight: float) -> Array:
        values = chunk.load(arrays, scratch)
        for stage in self._stages:
            values = stage.send(chunk, values)
        return self._weigh(chunk, values, weight)

    def _back(self, chunk: Chunk, arrays: list[Array], values: Array) -> None:
        for stage in reversed(self._stages):
            values = stage.receive(chunk, values)
        chunk.save(arrays, values)

    def _close(self, arrays: Sequence[Array], ranks: int, due: Sequence[Chunk]) -> None:
        averaged = self._stretches(due)
        if not ranks and self._anchor is not None:
            self._anchor.restore(arrays, averaged)
        for stage in reversed(self._stages if ranks else ()):
            stage.close(arrays, averaged)
            self.timings.lap(stage.part)

    def _measure(self, squared: float, weight: float, ranks: int, due: Sequence[Chunk]) -> Outcome:
        assert self.reducer is not None
        share = squared / max(ranks, 1) if weight else 0.0
        total = self.reducer.total(math.nan if self._weigh.found else share)
        drift = math.sqrt(total) if total >= 0 else math.nan
        return Outcome(drift, sum(map(self.reducer.bytes, due)), error=self.reducer.error)

    def norm(self) -> float:
        """Of this rank's change since the last sync, if a guard wants to know."""
        if self._anchor is None or self.reducer is None:
            return 0.0
        with self.memory.open() as arrays:
            return self._anchor.norm(arrays)

    def find_unfinite(self) -> str:
        """The first variable of all that is averaged in which there is NaN or infinity; empty if there is none."""
        with self.memory.open() as arrays, np.errstate(over="ignore", invalid="ignore"):
            for block, array in enumerate(map(np.asarray, arrays)):
                if not math.isfinite(np.dot(array, array)) and not (finite := np.isfinite(array)).all():
                    return self.memory.name(block, int(finite.argmin()))
        return ""

    @property
    def unfinite(self) -> str:
        """The variable in which this rank was about to send NaN or infinity; empty if it was not."""
        return self.memory.name(*self._weigh.found) if self._weigh.found else ""

    def state(self) -> State:
        """What the stages and the reducer keep from sync to sync: what is this rank's own, and what is the same on all."""
        kept = self.reducer.state() if self.reducer is not None else {}
        kept = under("own/reducer", kept)
        for stage in self._stages if self.reducer is not None else ():
            kept |= under(f"{'own' if stage.own else 'common'}/{type(stage).__name__}", stage.state())
        return kept

    def load(self, state: State) -> None:
        """The inverse, once started; what is missing stays as it is."""
        if self.reducer is None:
            return
        self.reducer.load(below("own/reducer", state))
        for stage in self._stages:
            if kept := below(f"{'own' if stage.own else 'common'}/{type(stage).__name__}", state):
                stage.load(kept)

    def finish(self) -> None:
        """Training has ended on all ranks (collective)."""
        if self.reducer is None:
            return
        if self.reducer.one_sided:
            self.send(0.0, 1, Now(0))  # adds nothing, and reads what others have added since
        self.reducer.free()
        self.timings.lap("communicate")
