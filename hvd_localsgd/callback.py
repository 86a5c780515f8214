"""``LocalSGDCallback``: Local SGD for ``model.fit``."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
from keras.callbacks import Callback, CallbackList, ProgbarLogger

from hvd_localsgd import devices, frames, variables
from hvd_localsgd.asynchronous import engine_class
from hvd_localsgd.averaging import Interval, LocalSGD, Mode, OptimizerState, Settings, Weighting
from hvd_localsgd.schedules import Schedule, as_schedule
from hvd_localsgd.timing import PARTS, Round, Timings, print_table


class LocalSGDCallback(Callback):
    """Skip gradient averaging; average the weights of all ranks every H local steps.

    Stich (2018), Algorithm 1; Yu, Yang & Zhu (2018), parallel restarted SGD. Put it first in the list of callbacks:
    the epoch's logs are averaged over ranks before the callbacks behind it see them, so that EarlyStopping,
    ReduceLROnPlateau and ModelCheckpoint decide alike on every rank.

    At train begin all ranks get rank 0's weights and optimizer state. Syncs follow every H local steps (with
    ``steps_per_execution`` > 1 at the first batch end at or past that), before validation, before the epoch ends,
    and at train end. Ranks may have different numbers of batches: one that has run out stays in the syncs with
    weight zero until all are done. Rank 0 alone prints progress, and at the end a table of where the time went.

    Args:
        sync_every: H, local steps between two syncs, or a ``Schedule``.
        optimizer_state: what happens to momentum and moments at a sync: ``"keep"`` each rank's own, ``"average"``
            them like weights (more to send), or ``"reset"`` them to what the optimizer starts with.
        weighting: ranks count ``"equal"``, or by the ``"samples"`` of their round.
        mode: ``"async"`` lets no rank wait for another (Stich 2018, Algorithm 2): each adds its progress to a global
            average in one-sided MPI memory and goes on from there. Logs are then each rank's own; a rank that stops
            training stops all. Only at the end all ranks meet, and get the same model.
        interval: ``"balanced"`` gives each rank steps in proportion to its speed, H on average, so that all come to a
            sync together (Yu et al. 2018, workers of unequal speed). Fast ranks need more data for that: repeat the
            dataset, and give each rank its own ``steps_per_epoch``.
        timings: a folder for one JSON-lines file per rank, a line per round; None keeps the records in memory only.

    Attributes:
        timings: list of ``hvd_localsgd.timing.Round``, this rank's rounds, oldest first.
        totals: after ``fit``, sums over those rounds, one dict per rank; the same on every rank.

    Raises:
        ValueError: an argument is not one of the above; in ``fit``: ranks hold different models or settings.
        RankFailed: in ``fit``, on every rank, when another rank failed or its weights are not finite.
        CommunicatorError: MPI is missing, or is not the launcher's.
    """

    _engine: LocalSGD  # made when training begins

    def __init__(
        self,
        sync_every: int | Schedule = 16,
        *,
        optimizer_state: OptimizerState = "keep",
        weighting: Weighting = "equal",
        mode: Mode = "sync",
        interval: Interval = "equal",
        timings: str | Path | None = None,
    ) -> None:
        super().__init__()
        self._settings = Settings(as_schedule(sync_every), optimizer_state, weighting, mode, interval)
        self._communicator = devices.get()
        self._training = False
        self._timings = Timings(timings, self._communicator.rank)

    @property
    def timings(self) -> list[Round]:
        """This rank's rounds, oldest first."""
        return self._timings.rounds

    @property
    def totals(self) -> list[dict[str, Any]]:
        """After ``fit``: sums over the rounds, one dict per rank."""
        return self._timings.totals

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """The same model, weights and optimizer state on all ranks."""
        model, optimizer = self.model, self.model.optimizer
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"hvd_localsgd works with Keras on TensorFlow; this is Keras on {keras.backend.backend()!r}. "
                "Set KERAS_BACKEND=tensorflow."
            )
        _check_not_wrapped(optimizer)
        self._look_at_the_other_callbacks()
        _build(model)
        averaged = [*variables.of_model(model), *variables.moving_averages(optimizer)]
        state = variables.State(optimizer)
        if not hasattr(self, "_engine") or not self._engine.averages(averaged, state):
            self._engine = engine_class(self._settings)(
                self._communicator, averaged, state, self._settings, self._timings
            )
        seeds = {id(v) for v in model.variables if "seed_generator_state" in v.path}
        self._engine.begin([v for v in (*model.variables, *optimizer.variables) if id(v) not in seeds])
        self._input = _InputProbe(model)
        self._epochs_begun = 0
        self._training = True
        self._warn_about_steps_per_execution()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Two positions per epoch: 2e + 1 when its steps are done, 2e + 2 when its logs are averaged."""
        self._engine.position = self._trained = 2.0 * self._epochs_begun
        self._epochs_begun += 1
        self._batches = 0
        self._counted = self._train_samples = self._validation_samples = 0.0
        self._first_round = len(self.timings)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Whatever came before was not computing."""
        self._engine.watch.lap("input")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """One local step, or ``steps_per_execution`` of them; a sync if the round is over."""
        engine = self._engine
        engine.watch.lap("compute")
        done = min(batch + 1, self.params.get("steps") or sys.maxsize)  # the last execution may be a short one
        due = engine.local_steps(done - self._batches)
        self._batches = done
        if due:
            variables.finish_device_work()
            engine.watch.lap("compute")
            self._synchronise(engine.synchronise)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validation sees the averaged model."""
        if self._training:
            self._finish_training_steps()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """How much this rank's validation metrics weigh."""
        if self._training:
            self._validation_samples = self._samples()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Callbacks see the averaged model and the averaged logs, the same on all ranks."""
        self._finish_training_steps()
        own = {key: float(value) for key, value in (logs or {}).items() if _is_number(value)}
        message = json.dumps(
            {"logs": own, "samples": self._train_samples, "validation_samples": self._validation_samples}
        )
        messages = self._synchronise(lambda: self._engine.meet(self._trained + 2, message.encode()))
        if logs is not None:
            logs.update(_average_logs([json.loads(entry) for entry in messages if entry]))
            logs.update(self._epoch_seconds())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """All ranks end together, with the same weights; rank 0 prints the table."""
        self._training = False
        self._input.remove()
        self._engine.wants_stop |= self._stopped_early()
        self._engine.finish()
        if self._communicator.rank == 0 and self.params.get("verbose"):
            print_table(self.totals, f"Local SGD, {self._settings.schedule}, {len(self.totals)} ranks")

    # Sync, and what surrounds it.

    def _synchronise(self, sync: Callable[[], list[bytes]]) -> list[bytes]:
        engine = self._engine
        self._input.estimate(engine)
        if self._settings.weighting == "samples" and engine.steps:
            counted = self._samples()
            engine.samples, self._counted = counted - self._counted, counted
        engine.wants_stop = self._stopped_early()
        messages = sync()
        if engine.stop:
            self.model.stop_training = True
        return messages

    def _finish_training_steps(self) -> None:
        if self._engine.position == self._trained:  # on_test_begin may have been here before on_epoch_end
            self._engine.watch.lap("input")
            self._train_samples = self._samples()
            self._synchronise(lambda: self._engine.meet(self._trained + 1))

    def _stopped_early(self) -> bool:
        return bool(self.model.stop_training)

    def _samples(self) -> float:
        """Samples seen since the metrics were reset, which Keras' own loss metric counts."""
        for metric in self.model.metrics:
            if metric.name == "loss" and hasattr(metric, "count"):
                return float(keras.ops.convert_to_numpy(metric.count))
        return float(self._batches)

    def _epoch_seconds(self) -> dict[str, float]:
        rounds = self.timings[self._first_round :]
        return {f"seconds_{part}": sum(getattr(r, part) for r in rounds) for part in PARTS}

    # Checks at train begin.

    def _look_at_the_other_callbacks(self) -> None:
        """Silence all progress bars but rank 0's; say so if a callback will see logs before they are averaged."""
        for callback in (callbacks := callback_list()):
            if isinstance(callback, ProgbarLogger) and self._communicator.rank > 0:
                callback.verbose = 0
        if self in callbacks and self._communicator.rank == 0 and self._communicator.size > 1:
            early = [
                type(callback).__name__
                for callback in callbacks[: callbacks.index(self)]
                if type(callback).on_epoch_end is not Callback.on_epoch_end
            ]
            if early:
                warnings.warn(
                    f"LocalSGDCallback stands behind {', '.join(early)} in the list of callbacks: they see this rank's "
                    "own logs, not the average over ranks, and may decide differently on each rank. Put it first.",
                    stacklevel=2,
                )

    def _warn_about_steps_per_execution(self) -> None:
        steps, interval = self.model.steps_per_execution, self._engine.interval
        if steps > 1 and interval % steps and self._communicator.rank == 0:
            warnings.warn(
                f"steps_per_execution={steps} does not divide the {interval} local steps between syncs: each sync comes "
                f"at the first batch end at or past its step, here after {math.ceil(interval / steps) * steps} steps.",
                stacklevel=2,
            )


def _build(model: keras.Model) -> None:
    """Make all weights now: Keras may leave that to the first step, too late to give all ranks the same."""
    if not all(layer.built for layer in model._flatten_layers()):
        batches = frames.caller_local("epoch_iterator")
        if batches is None:
            raise ValueError(
                "The model has no weights yet. Begin it with keras.Input, or call model.build(shape) first."
            )
        model._symbolic_build(iterator=batches)
        batches.reset()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _check_not_wrapped(optimizer: Any) -> None:
    from hvd_localsgd.optimizer import LocalSGDOptimizer

    while optimizer is not None:
        if isinstance(optimizer, LocalSGDOptimizer):
            raise ValueError("The model was compiled with a LocalSGDOptimizer: use it or the callback, not both.")
        optimizer = getattr(optimizer, "inner_optimizer", None)


def callback_list() -> list[Callback]:
    """The list that is calling us. Keras does not tell callbacks of each other; the caller's frame does."""
    owner = frames.caller_local("self", CallbackList)
    return owner.callbacks if owner is not None else []


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _average_logs(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the ranks that have it, weighted by the samples behind it."""
    averaged = {}
    for key in sorted({key for entry in entries for key in entry["logs"]}):
        weight_key = "validation_samples" if key.startswith("val_") else "samples"
        pairs = [(entry["logs"][key], entry[weight_key]) for entry in entries if key in entry["logs"]]
        weight = sum(w for _, w in pairs)
        if weight:
            averaged[key] = sum(value * w for value, w in pairs if w) / weight
        else:
            averaged[key] = sum(value for value, _ in pairs) / len(pairs)
    return averaged


class _InputProbe:
    """How long train steps wait for data.

    Keras fetches the batch inside its compiled step, where nobody can time it. So now and then one step is run
    the other way that Keras' train function knows, from a Python iterator, and the fetch is timed. Sampling at most
    every 50 ms keeps the cost low; the round's share is estimated from the latest samples.
    """

    _FIRST_SECONDS = 1.0
    _EVERY_SECONDS = 0.05

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._inner = model.train_function
        self._waited = self._ran = self._share = 0.0
        self._next = math.inf  # set by the first step, which traces and compiles
        self._warm = False
        # Before 3.9 the train function takes no Python iterator.
        self._installed = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 9)
        if self._installed:
            model.train_function = self._step

    def remove(self) -> None:
        """Give the model its own train function back."""
        if self._installed and self._model.train_function == self._step:
            self._model.train_function = self._inner

    def _step(self, iterator: Any) -> Any:
        began = time.perf_counter()
        if began < self._next:
            if self._next == math.inf:
                outputs = self._inner(iterator)
                self._next = time.perf_counter() + self._FIRST_SECONDS
                return outputs
            return self._inner(iterator)
        batches = _TimedBatches(iter(iterator))
        if batches.first is None:
            raise StopIteration
        outputs = self._inner(batches)
        now = time.perf_counter()
        if self._warm:
            self._waited += batches.waited
            self._ran += now - began
        self._warm = True  # the first time, TensorFlow prepares the function for being called this way
        self._next = now + self._EVERY_SECONDS
        return outputs

    def estimate(self, engine: LocalSGD) -> None:
        """Of the round's compute, call that share input that the samples say."""
        if self._ran:
            self._share = self._waited / self._ran
            self._waited = self._ran = 0.0
        engine.watch.move("compute", "input", self._share * engine.watch.parts["compute"])


class _TimedBatches:
    """An iterator that measures the time its source takes; the first batch is fetched at once."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self.waited = 0.0
        self.first = self._fetch()

    def _fetch(self) -> Any:
        began = time.perf_counter()
        batch = next(self._source, None)
        self.waited += time.perf_counter() - began
        return batch

    def __iter__(self) -> Iterator[Any]:
        batch = self.first
        while batch is not None:
            yield batch
            batch = self._fetch()
