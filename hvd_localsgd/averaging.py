"""Local SGD: the engine behind the callback and the optimizer.

Stich (2018), Algorithm 1; Yu, Yang & Zhu (2018), parallel restarted SGD. Every rank k of K keeps its own weights:

    local step      x_k <- x_k - eta_t grad f_i(x_k)                    (the Keras optimizer's business)
    t + 1 in I_T    x_k <- 1/K sum_j x_j                                (``synchronise``)

What surrounds the average in ``synchronise`` keeps ranks together that have different amounts of data: each rank
has a *position*, which only grows. ``meet`` takes part in everybody's syncs, with weight zero where it took no
steps, until all ranks are as far as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hvd_localsgd import failures, header, memory, variables
from hvd_localsgd.communicators import Communicator
from hvd_localsgd.schedules import Schedule
from hvd_localsgd.timing import Round, Stopwatch, Timings

Weighting = Literal["equal", "samples"]
OptimizerState = Literal["keep", "average", "reset"]
Mode = Literal["sync", "async"]
Interval = Literal["equal", "balanced"]

FINISHED = math.inf
_BEGIN = -1.0
DRIFT_SAMPLE = 1 << 18  # elements; the drift of larger models is estimated from the beginning of every chunk


@dataclass(frozen=True, slots=True)
class Settings:
    """What both front ends let the user choose, validated.

    Raises:
        ValueError: an unknown choice.
    """

    schedule: Schedule
    optimizer_state: OptimizerState = "keep"
    weighting: Weighting = "equal"
    mode: Mode = "sync"
    interval: Interval = "equal"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer_state", ("keep", "average", "reset")),
            ("weighting", ("equal", "samples")),
            ("mode", ("sync", "async")),
            ("interval", ("equal", "balanced")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}. Received: {getattr(self, name)!r}")
        if self.mode == "async" and (self.weighting, self.interval) != ("equal", "equal"):
            raise ValueError(
                "mode='async' gives every rank weight 1/K and lets each go at its own pace. "
                f"Received: weighting={self.weighting!r}, interval={self.interval!r}"
            )
        if self.interval == "balanced" and self.schedule.exact:
            raise ValueError(f"interval='balanced' gives each rank its own steps, {self.schedule} the same to all.")


class LocalSGD:
    """One model on many ranks: counts local steps, and averages when a round is over.

    Args:
        communicator: through what.
        averaged: variables to average, floating dtypes, the same list on every rank.
        state: the optimizer's float state, averaged or reset as ``settings`` say.
        settings: when, and how.
        timings: where the rounds are kept.
        finish_at_exit: a process that ends in good order without ``finish`` waits for the others; if False, it
            has left them in the middle of something, and the job ends with an error.

    Raises:
        ValueError: there is nothing to average.
    """

    def __init__(
        self,
        communicator: Communicator,
        averaged: Sequence[Any],
        state: variables.State,
        settings: Settings,
        timings: Timings,
        finish_at_exit: bool = False,
    ) -> None:
        if not averaged:
            raise ValueError("The model has no trainable weights and no float statistics: there is nothing to average.")
        self.communicator = communicator
        self.settings = settings
        self._finish_at_exit = finish_at_exit
        self.state = state
        extra = state.variables if settings.optimizer_state == "average" else []
        self.variables = variables.VariableSet([*averaged, *extra], as_memory=not communicator.takes_tensors)
        self.timings = timings
        self.watch = Stopwatch()
        self.total_steps = 0
        self.wants_stop = False
        self.position = 0.0
        self._reached = FINISHED
        self._payload = sum(block.size * block.wire.itemsize for block in self.variables.blocks)
        self._pace = 0.0
        self._probe = self.variables.smallest(len(averaged))
        self._model = self._fingerprint()

    def averages(self, averaged: Sequence[Any], state: variables.State) -> bool:
        """Whether these are the variables that this engine was made for."""
        extra = state.variables if self.settings.optimizer_state == "average" else []
        return list(map(id, [*averaged, *extra])) == list(map(id, self.variables.variables))

    def begin(self, weights: Sequence[Any], others: Sequence[Any] = ()) -> bool:
        """The same start everywhere: check that all ranks hold the same model, then copy rank 0's values.

        Returns:
            Whether that changed any of ``weights`` on this rank.

        Raises:
            ValueError: the models or settings differ; on every rank, naming the first difference.
        """
        communicator = self.communicator
        failures.begin(self)
        communicator.busy, communicator.failed = True, False
        table = header.exchange(communicator, header.row(model=self._model, position=_BEGIN, total=self.total_steps))
        self._check_same_place(table, beginning=True)
        if (table["model"] != table["model"][0]).any():
            message = self._explain_difference()
            failures.end(self)
            communicator.busy = False
            raise ValueError(message)
        moved = False
        if communicator.size > 1:
            moved = variables.broadcast(weights, communicator)
            variables.broadcast(others, communicator)
            if not communicator.takes_tensors:
                self._prepare_memory()
        self.position, self._reached = 0.0, 0.0
        self.wants_stop = self.stop = False
        self._pace = 0.0
        self.interval = self._next_interval(table)
        self._start_round()
        communicator.busy = False
        return moved

    def _prepare_memory(self) -> None:
        self.communicator.tune(self._payload)
        self._plan = list(_chunks(self.variables.blocks, self.communicator.chunk_bytes))
        self._scratch = np.zeros(
            max((c.elements * c.dtype.itemsize for c in self._plan if not c.direct), default=0), np.uint8
        )
        memory.use_huge_pages(self._scratch)
        with self.variables.open() as arrays:
            for index in {chunk.pieces[0][0] for chunk in self._plan if chunk.direct}:
                memory.use_huge_pages(arrays[index][0])

    def local_steps(self, steps: int = 1) -> bool:
        """``steps`` more local steps were taken; whether the round is over."""
        self.steps += steps
        return self.steps >= self.interval

    def synchronise(self, message: bytes = b"", exposed: Sequence[Any] | None = None, due: bool = True) -> list[bytes]:
        """One sync: header, average, outer step. Every rank must call it.

        Args:
            message: for the other ranks, at the moment when all have come to this rank's position.
            exposed: from inside a TensorFlow graph, what ``variables.expose`` gave there.
            due: whether this rank's round ends here; if no rank's does, nothing is averaged.

        Returns:
            Every rank's ``message``, where this sync found that all ranks have come further; else an empty list.

        Raises:
            RankFailed: on all ranks alike, if one of them has failed or holds weights that are not finite.
        """
        communicator, watch = self.communicator, self.watch
        communicator.busy = True
        self._measure_pace()
        table = header.exchange(
            communicator,
            header.row(
                model=self._model,
                position=self.position,
                steps=self.steps,
                total=self.total_steps + self.steps,
                samples=self.samples,
                due=due,
                pace=self._pace,
                finite=self._is_finite(),
                stop=self.wants_stop,
            ),
        )
        watch.lap("wait")
        self._check_same_place(table, beginning=False)
        self.stop = bool(table["stop"].any())
        if table["due"].any() and table["steps"].any():
            if self._all_finite(table):
                weights = self._weights(table)
                drift = self._average(weights[communicator.rank], int(np.count_nonzero(weights)), exposed)
                if self.settings.optimizer_state == "reset":
                    self.state.reset()
                watch.lap("outer")
            else:
                drift = math.nan
            self._end_round(table, drift)
        messages = self._exchange_messages(table, message)
        communicator.busy = False
        return messages

    def meet(self, position: float, message: bytes = b"") -> list[bytes]:
        """Take part in syncs until every rank has come to ``position``; then exchange messages."""
        self.position = position
        messages: list[bytes] = []
        while self._reached < position:
            messages = self.synchronise(message, due=position == FINISHED or not self.settings.schedule.exact)
        return messages

    def finish(self) -> None:
        """Wait for the slowest rank's last sync; then every rank knows ``timings.totals``."""
        self.meet(FINISHED)
        self._conclude()

    def _conclude(self) -> None:
        self.communicator.busy = True
        self.watch.lap("wait")
        self._record(interval=0, payload=0, drift=0.0)
        entries = self.communicator.gather(json.dumps(self.timings.sums()).encode())
        self.timings.totals = [json.loads(entry) for entry in entries]
        self.communicator.busy = False
        failures.end(self)

    def _fail_together(self) -> None:
        """Every rank is about to raise the same error: nobody waits for anybody any more."""
        failures.end(self)
        self.communicator.failed = True

    def leave(self) -> None:
        """The process ends in good order, but without having finished."""
        if self._finish_at_exit:
            self.finish()
        else:
            failures.end_job(self.communicator, RuntimeError("the process ended in the middle of training"))

    # The parts of a sync, in the order in which they come.

    def _check_same_place(self, table: np.ndarray, beginning: bool) -> None:
        """All ranks are between the same two calls, or none goes on: the alternative is a hang or a wrong sum."""
        if ((table["position"] == _BEGIN) != beginning).any():
            self._fail_together()
            raise header.RankFailed(
                f"Some ranks start to train while others are in the middle of it (seen on rank {self.communicator.rank} "
                f"on {self.communicator.host}). Call fit equally often on every rank, and let no rank leave it early."
            )

    def _is_finite(self) -> bool:
        # One small variable is enough: a NaN in the loss is in every gradient, and so in every weight.
        return self._probe is None or bool(np.isfinite(self._probe.numpy().astype(np.float32)).all())

    def _all_finite(self, table: np.ndarray) -> bool:
        if table["finite"].all():
            return True
        ranks = header.name_ranks(self.communicator, np.flatnonzero(~table["finite"]))
        text = f"NaN or infinity in the weights of {ranks} at local step {table['total'].max()}; nothing was averaged."
        if self.stop:  # somebody, TerminateOnNaN perhaps, has seen it and ends training in good order
            warnings.warn(text, stacklevel=2)
            return False
        self._fail_together()
        raise header.RankFailed(f"{text} Lower the learning rate, or clip the gradients (clipnorm=).")

    def _weights(self, table: np.ndarray) -> np.ndarray:
        share = (table["steps"] > 0).astype(float)
        if self.settings.weighting == "samples" and (share * table["samples"]).any():
            share *= table["samples"]
        return share / share.sum()

    def _average(self, weight: float, ranks: int, exposed: Sequence[Any] | None) -> float:
        """x_k <- sum_j w_j x_j; returns the drift, sqrt(1/K sum_k |x_k - average|^2), over ranks of weight > 0."""
        communicator = self.communicator
        if communicator.size == 1:
            return 0.0
        distance = (
            self._average_tensors(weight, exposed)
            if communicator.takes_tensors
            else self._average_memory(weight, exposed)
        )
        share = np.array([distance / ranks if weight else 0.0])
        communicator.allreduce(share)
        self.watch.lap("communicate")
        if not np.isfinite(share[0]):
            self._fail_together()
            raise header.RankFailed(
                f"the average after local step {self.total_steps + self.steps} is not finite on any rank (seen on "
                f"rank {communicator.rank} on {communicator.host}): lower the learning rate, or clip the gradients."
            )
        return math.sqrt(share[0])

    def _average_memory(self, weight: float, exposed: Sequence[Any] | None) -> float:
        """Chunk by chunk, each small enough to stay in cache. Returns this rank's squared distance, estimated."""
        watch = self.watch
        distance, sampled = 0.0, 0
        with self.variables.open(exposed) as arrays:
            for chunk in self._plan:
                before = chunk.beginning(arrays, self._to_sample(chunk))
                if chunk.direct:
                    buffer = chunk.scale(arrays, weight)
                else:
                    buffer = self._scratch[: chunk.elements * chunk.dtype.itemsize].view(chunk.dtype)
                    chunk.pack(arrays, buffer, weight)
                watch.lap("pack")
                self.communicator.allreduce(buffer)
                watch.lap("communicate")
                before -= buffer[: before.size]
                distance += float(np.dot(before, before))
                sampled += before.size
                if not chunk.direct:
                    chunk.unpack(arrays, buffer)
                watch.lap("unpack")
        watch.lap("unpack")
        return distance * self.variables.elements / max(sampled, 1)

    def _to_sample(self, chunk: Chunk) -> int:
        """From how many elements of a chunk the drift is estimated."""
        return math.ceil(chunk.elements * min(1.0, DRIFT_SAMPLE / self.variables.elements))

    def _average_tensors(self, weight: float, exposed: Sequence[Any] | None) -> float:
        """One flat tensor per dtype, on the device where the variables are. Returns this rank's squared distance."""
        watch, compiled = self.watch, exposed is None
        flats = self.variables.flat(compiled)
        variables.finish_device_work()
        watch.lap("pack")
        averages = [self.communicator.allreduce_tensor(flat, weight) for flat in flats]
        variables.finish_device_work()
        watch.lap("communicate")
        distance = float(self.variables.assign(averages, compiled))
        watch.lap("unpack")
        return distance

    def _end_round(self, table: np.ndarray, drift: float) -> None:
        self._record(self.interval, self._payload if len(table) > 1 else 0, drift)
        self.interval = self._next_interval(table)

    def _measure_pace(self) -> None:
        if self.steps and self.timings.rounds:  # the first round traces and compiles
            latest = (self.watch.parts["compute"] + self.watch.parts["input"]) / self.steps
            self._pace = (self._pace + latest) / 2 if self._pace else latest

    def _next_interval(self, table: np.ndarray) -> int:
        """H of the next round; balanced, each rank's own, so that all take equally long (PR-SGD, unequal workers)."""
        interval = self.settings.schedule.interval(int(table["total"].max()))
        pace = table["pace"]
        if self.settings.interval == "equal" or not pace.all():
            return interval
        seconds = interval / (1 / pace).mean()  # in which the ranks take H steps on average
        whole = max(1, round(seconds / pace.max())) * pace.max()  # the slowest has the fewest, and so the coarsest
        return max(1, round(whole / pace[self.communicator.rank]))

    def _record(self, interval: int, payload: int, drift: float, staleness: int = 0) -> None:
        parts, wall = self.watch.parts, self.watch.wall()
        self.timings.add(
            Round(
                round=len(self.timings.rounds),
                first_step=self.total_steps + 1,
                last_step=self.total_steps + self.steps,
                interval=interval,
                steps=self.steps,
                start=self.watch.start,
                wall=wall,
                **parts,
                residual=wall - sum(parts.values()),
                bytes=payload,
                drift=drift,
                staleness=staleness,
                rank=self.communicator.rank,
                size=self.communicator.size,
                host=self.communicator.host,
            )
        )
        self.total_steps += self.steps
        self._start_round()

    def _start_round(self) -> None:
        self.steps, self.samples = 0, 0.0
        self.watch.restart()

    def _exchange_messages(self, table: np.ndarray, message: bytes) -> list[bytes]:
        reached = float(table["position"].min())
        if reached <= self._reached:
            return []
        self._reached = reached
        messages = self.communicator.gather(message if reached == self.position else b"")
        self.watch.lap("communicate")
        return messages

    # Before the first average: is it the same model everywhere?

    def _description(self) -> str:
        chosen = self.settings
        schedule = f"{type(chosen.schedule).__name__} {chosen.schedule.get_config()}"
        settings = [schedule, chosen.optimizer_state, chosen.weighting, chosen.mode, chosen.interval]
        return json.dumps([settings, *self.variables.description()])

    def _fingerprint(self) -> int:
        return int.from_bytes(hashlib.sha256(self._description().encode()).digest()[:8], "little")

    def _explain_difference(self) -> str:
        entries = [json.loads(entry) for entry in self.communicator.gather(self._description().encode())]
        names = header.hosts(self.communicator)
        first = entries[0]
        for rank, other in enumerate(entries):
            who = f"rank {rank} on {names[rank]}", f"rank 0 on {names[0]}"
            if other[0] != first[0]:
                return f"Settings differ: {who[0]} has {other[0]}, {who[1]} has {first[0]} (schedule, state, weighting, mode, interval)."
            for index, (theirs, ours) in enumerate(zip(other[1:], first[1:], strict=False)):
                if theirs != ours:
                    return (
                        f"Ranks hold different models: variable {index} is {theirs} on {who[0]}, but {ours} on "
                        f"{who[1]} (name, shape, dtype). Build the same model on every rank."
                    )
            if len(other) != len(first):
                return (
                    f"Ranks hold different models: {len(other) - 1} averaged variables on {who[0]}, "
                    f"{len(first) - 1} on {who[1]}. Build the same model on every rank."
                )
        return "Ranks hold different models."  # not reached: a different fingerprint has a different description


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of the variables, laid end to end, small enough to stay in cache."""

    dtype: np.dtype
    elements: int
    pieces: list[tuple[int, int, int, int]]  # block, start, stop, offset in the chunk
    direct: bool  # one piece of one block that can be averaged where it is

    def scale(self, arrays: list[list[np.ndarray]], weight: float) -> np.ndarray:
        """variable <- weight * variable, in its own memory; a direct chunk only."""
        index, start, stop, _ = self.pieces[0]
        own = arrays[index][0][start:stop]
        np.multiply(own, own.dtype.type(weight), out=own)
        return own

    def pack(self, arrays: list[list[np.ndarray]], buffer: np.ndarray, weight: float) -> None:
        """buffer <- weight * variables; replicas inside this rank (tf.distribute) count as their mean."""
        for index, start, stop, offset in self.pieces:
            target = buffer[offset : offset + stop - start]
            first, *others = arrays[index]
            scale = buffer.dtype.type(weight / (1 + len(others)))
            np.multiply(first[start:stop], scale, out=target)
            for other in others:
                target += other[start:stop] * scale

    def beginning(self, arrays: list[list[np.ndarray]], elements: int) -> np.ndarray:
        """A copy of the first so many elements."""
        copy = np.empty(elements, self.dtype)
        for index, start, stop, offset in self.pieces:
            end = min(elements, offset + stop - start)
            if offset >= end:
                break
            copy[offset:end] = arrays[index][0][start : start + end - offset]
        return copy

    def unpack(self, arrays: list[list[np.ndarray]], buffer: np.ndarray) -> None:
        """variables <- buffer, on every replica."""
        for index, start, stop, offset in self.pieces:
            for array in arrays[index]:
                array[start:stop] = buffer[offset : offset + stop - start]


def _chunks(blocks: Sequence[variables.Block], chunk_bytes: int) -> Iterator[Chunk]:
    """Every element of every block in exactly one chunk.

    A block of at least a sixteenth of a chunk has chunks of its own, which are averaged where they lie; smaller ones
    are laid end to end. Chunks of float64 are apart from the others, which travel as float32.
    """
    for wire in (np.dtype(np.float32), np.dtype(np.float64)):
        capacity = max(1, chunk_bytes // wire.itemsize)
        pieces: list[tuple[int, int, int, int]] = []
        used = 0
        for index, block in enumerate(blocks):
            if block.wire != wire:
                continue
            size = block.size
            if block.whole and size >= capacity / 16:
                for start in range(0, size, capacity):
                    stop = min(size, start + capacity)
                    yield Chunk(wire, stop - start, [(index, start, stop, 0)], direct=True)
                continue
            start = 0
            while start < size:
                stop = min(size, start + capacity - used)
                pieces.append((index, start, stop, used))
                used += stop - start
                start = stop
                if used == capacity:
                    yield Chunk(wire, used, pieces, direct=False)
                    pieces, used = [], 0
        if used:
            yield Chunk(wire, used, pieces, direct=False)
