"""``ModelAverager``: Local SGD for loops of one's own, without Keras."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hvd_localsgd import assemble, devices
from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.core import failures, settings
from hvd_localsgd.core.agreement import Context
from hvd_localsgd.core.engine import LocalSGD
from hvd_localsgd.core.keeper import Checkpoints
from hvd_localsgd.core.pipeline import Memory
from hvd_localsgd.core.reducers import Reducer
from hvd_localsgd.core.schedules import Schedule
from hvd_localsgd.core.selection import means_and_variances, path_of, select
from hvd_localsgd.core.timing import Recorded, Timings
from hvd_localsgd.kept import Loop


@settings.shown
class ModelAverager(Recorded):
    """Averages variables over ranks every H calls of ``step``.

    Stich (2018), Algorithm 1. ``with ModelAverager(...) as averager:`` begins and finishes; without ``with``, the first
    ``step`` begins, and a script that does not call ``finish`` does so at its end.

    Args:
        variables: numpy arrays (contiguous, changed in place), or TensorFlow or Keras variables, of floating dtype, the same
            list on every rank; or a ``core.pipeline.Memory`` of another framework's.
        {options}
        statistics: further arrays or variables, which are averaged and no more, whatever ``outer`` is.
        timings: a folder for one JSON-lines file per rank, a line per round; None keeps the latest records in memory only.
        broadcast: all ranks begin with rank 0's values; otherwise each with its own.
        communicator: through what; None: that of this process, which ``lsgd.init`` chose.
        reducer: makes another reducer than the fastest.
        checkpoint: a ``LocalSGDCheckpoint``, or its ``core.keeper.Checkpoints`` where Keras is not wanted. ``begin`` goes on from what
            there is, and the loop with ``averager.steps``. ``step`` then stands behind all else that a local step changes.
        state: of the loop itself, further arrays or variables of any dtype that a checkpoint keeps, each rank's own: an optimizer's.

    Attributes:
        corrections: with ``control_variates``, from ``begin`` on, an array for each variable: the loop subtracts it from each
            gradient, ``x -= rate * (gradient - correction)``, having told the rate. Zero at first; every sync changes them in place.

    Raises:
        ValueError: an option is not one of the above, or there is nothing to average; in ``begin``: ranks hold different
            variables or settings.
        TypeError: there is no such option, or a variable cannot be averaged.
        RankFailed: on every rank, when another rank failed or its values are not finite.
    """

    _engine: LocalSGD | None = None

    def __init__(
        self,
        variables: Sequence[Any] | Memory,
        sync_every: int | str | Schedule | Callable[..., int] = 16,
        *,
        statistics: Sequence[Any] = (),
        timings: str | Path | None = None,
        broadcast: bool = True,
        communicator: Communicator | None = None,
        reducer: Callable[[Communicator], Reducer] | None = None,
        checkpoint: Checkpoints | None = None,
        state: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        self.settings = settings.choose(sync_every, options)
        if self.settings.optimizer_state != "keep":
            raise ValueError("ModelAverager knows no optimizer: to average its state, pass it among the variables.")
        self._variables: Any = variables
        self._statistics, self._broadcast = list(statistics), broadcast
        self._communicator, self._reducer = communicator, reducer
        self._checkpoint, self._state = checkpoint, list(state)
        if checkpoint is not None and self.settings.mode == "async":
            raise ValueError(
                "mode='async' has no moment at which all ranks are between the same two syncs, and cannot be kept."
            )
        self._timings = Timings(timings)
        self._training = False
        self._told: dict[str, float] = {}
        self._variates = assemble.variates(self.settings)
        self.corrections: list[np.ndarray] = []

    def begin(self) -> None:
        """All ranks agree on what is averaged, and get rank 0's values."""
        if self._engine is None:
            self._engine = self._make_engine()
        if self._checkpoint is not None:
            self._checkpoint.resume(self._engine.communicator, self._kept())
        self._check_told(self.settings.needs - {"loss"})
        self._engine.tell(**self._told)
        self._engine.begin(context=Context({"front end": type(self).__name__}), keeper=self._checkpoint)
        if self._variates is not None:
            self.corrections = [self._correction(variable) for variable in self._variables]
        self._training = True

    def step(self, steps: int = 1, samples: float = 0.0) -> bool:
        """So many local steps were taken, on so many samples; averages if the round is over; whether the variables may have changed."""
        if not self._training:
            if self.settings.measures_change:
                raise RuntimeError(
                    "Changes are measured from the weights before the first local step: call begin() first, or use with."
                )
            self.begin()
        assert self._engine is not None
        if self._variates is not None:
            self._variates.count(steps * self._told["rate"])
        due = self._engine.step(steps, samples)
        if due:
            self._timings.lap("compute")
            self._check_told(self.settings.needs)
            self._engine.tell(**self._told)
            self._engine.proceed()
        return due

    def tell(self, **known: float) -> None:
        """What is needed of ``rate``, ``loss`` and ``remaining`` (local steps), by the schedule or another option.

        Before ``begin``, and again when it changes: the rate before the ``step`` that was taken with it.
        The loss is only known after steps: before the first sync. With ``timings`` it is in the record of the round in which it is told.
        """
        if unknown := set(known) - {"rate", "loss", "remaining"}:
            raise TypeError(f"tell() takes rate, loss and remaining. Received: {sorted(unknown)}")
        self._told |= {name: float(value) for name, value in known.items()}
        if "loss" in known:
            self._timings.loss = self._told["loss"]

    def _correction(self, variable: Any) -> np.ndarray:
        """In the variable's shape; of what is not averaged it stays zero."""
        shape = tuple(variable.shape)
        if id(variable) not in self._averaged:
            return np.zeros(shape)
        assert self._variates is not None
        return self._variates.correction(self._memory.place(variable)).reshape(shape)

    def _check_told(self, needs: Collection[str]) -> None:
        if missing := sorted(set(needs) - set(self._told)):
            raise ValueError(f"What was chosen needs the {missing[0]}: call tell({missing[0]}=...) first.")

    def finish(self) -> None:
        """Wait for the slowest rank, and average once more: all ranks end with the same values."""
        if self._training:
            assert self._engine is not None
            self._timings.lap("compute")
            self._engine.finish()
            if self._checkpoint is not None:
                with failures.together(None):
                    self._checkpoint.finish()
            self._training = False

    @property
    def steps(self) -> int:
        """Local steps that this rank has taken, in the life before this one too: where a loop goes on."""
        return 0 if self._engine is None else self._engine.progress.total + self._engine.progress.steps

    def _kept(self) -> Loop:
        assert self._engine is not None
        is_memory = hasattr(self._variables, "blocks")
        listed = [*([] if is_memory else self._variables), *self._statistics, *self._state]
        return Loop(self.settings, self._engine.communicator, self._variables if is_memory else None, listed)

    def __enter__(self) -> ModelAverager:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._checkpoint is not None:
            self._checkpoint.requests.ignore()

    def _make_engine(self) -> LocalSGD:
        communicator = self._communicator or devices.get()
        memory = self._variables
        pairs: list[tuple[Any, Any]] = []
        if not hasattr(memory, "blocks"):
            if not (averaged := [*memory, *self._statistics]):
                raise ValueError("The list of variables is empty: there is nothing to average.")
            everything, averaged = averaged, select(averaged, path_of, self.settings.include, self.settings.exclude)
            self._averaged = set(map(id, averaged))
            pairs = means_and_variances(averaged)
            memory = assemble.memory(communicator, averaged, self.settings, self._statistics)
            memory.prepare(everything if self._broadcast else (), lambda: None)
        elif self.settings.include or self.settings.exclude or self._statistics or self._variates:
            raise ValueError(
                "A Memory says itself what it has: include, exclude, statistics and control_variates are for lists of variables."
            )
        self._memory = memory
        return assemble.engine(
            self.settings,
            communicator,
            memory,
            self._timings,
            finish_at_exit=True,
            pairs=pairs,
            variates=self._variates,
            reducer=self._reducer,
        )
