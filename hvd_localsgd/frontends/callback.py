"""``LocalSGDCallback``: Local SGD for ``model.fit``."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import keras
from keras.callbacks import Callback

from hvd_localsgd import assemble, devices
from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
from hvd_localsgd.backends.tensorflow.variables import finish_device_work
from hvd_localsgd.core import failures, settings
from hvd_localsgd.core.agreement import Context
from hvd_localsgd.core.engine import LocalSGD
from hvd_localsgd.core.keeper import Keeper
from hvd_localsgd.core.schedules import Schedule
from hvd_localsgd.core.selection import means_and_variances
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.frontends import callback_list, frames, keras_state
from hvd_localsgd.frontends import logs as epoch_logs
from hvd_localsgd.frontends.input_probe import InputProbe
from hvd_localsgd.frontends.table import Tabled

callback_list.install()


@settings.shown
class LocalSGDCallback(Tabled, Callback):
    """Skip gradient averaging; average the weights of all ranks every H local steps.

    Stich (2018), Algorithm 1; Yu, Yang & Zhu (2018), parallel restarted SGD. Put it first in the list of callbacks:
    the epoch's logs are averaged over ranks before the callbacks behind it see them, so that EarlyStopping,
    ReduceLROnPlateau and ModelCheckpoint decide alike on every rank.

    When the first epoch begins all ranks get rank 0's weights and optimizer state. Syncs follow every H local steps (with
    ``steps_per_execution`` > 1 at the first batch end at or past that), before validation, before the epoch ends,
    and at train end. Ranks may have different numbers of batches: one that has run out stays in the syncs with
    weight zero until all are done. Rank 0 alone prints progress, and at the end a table of where the time went; callbacks that write
    files (ModelCheckpoint, CSVLogger, TensorBoard and others: ``every_rank`` lists them) act there alone.

    Callbacks behind this one see what it adds to an epoch's logs (``epochs``); ``History`` does not, and the progress bar shows
    ``averaging`` alone.

    Args:
        {options}
        timings: a folder for one JSON-lines file per rank, a line per round; None keeps the latest records in memory only.

    Attributes:
        settings: what was chosen, a ``hvd_localsgd.core.settings.Settings``.
        timings: list of ``hvd_localsgd.core.timing.Round``, this rank's latest thousand rounds, oldest first.
        totals: after ``fit``, sums over its rounds, one dict per rank; the same on every rank.
        epochs: of the latest fit, a dict per epoch of what was added to its logs: ``loss_min``, ``loss_max``, ``drift``; ``averaging``, the
            share of this rank's time, 0 to 1; ``seconds_compute`` and so on, of this rank.

    Raises:
        ValueError: an argument is not one of the above; in ``fit``: ranks hold different models or settings.
        RankFailed: in ``fit``, on every rank, when another rank failed or its weights are not finite.
        CommunicatorError: MPI is missing, or is not the launcher's.
    """

    _engine: LocalSGD  # made when training begins
    keeper: Keeper | None = None  # of checkpoints
    _memory: TensorFlowMemory | None = None
    _counted_for: Any = None

    def __init__(
        self,
        sync_every: int | str | Schedule | Callable[..., int] = 16,
        *,
        timings: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.settings = settings.choose(sync_every, options)
        if self.settings.control_variates:
            raise ValueError(
                "control_variates correct each gradient, and a callback sees none: compile the model with "
                "LocalSGDOptimizer(optimizer, control_variates=True) instead."
            )
        self._training = False
        self._timings = Timings(timings)
        self.epochs: list[dict[str, float]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and ``copy.deepcopy``: the options alone. A copy starts afresh, with no model and no open file.

        A subclass adds what its own constructor keeps.
        """
        return LocalSGDCallback(timings=self._timings.folder, **self.settings.get_config()).__dict__

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras before everything else."""
        check_is_keras_3(model)
        super().set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """What needs no other rank: checks, and all weights made."""
        model = self.model
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"hvd_localsgd works with Keras on TensorFlow; this is Keras on {keras.backend.backend()!r}. "
                "Set KERAS_BACKEND=tensorflow."
            )
        for optimizer in keras_state.optimizers(model):
            _check_not_wrapped(optimizer)
        self._look_at_the_other_callbacks()
        build(model, self.settings.optimizer_state)
        self._input = InputProbe(model)
        self._epochs_begun, self._begun = 0, False
        self._goes_on: dict[str, Any] = {}  # from a checkpoint, where the first epoch does
        self._logs_before: dict[str, Any] = {}
        self.keeper = None
        self._generation = 0
        self._apart = epoch_logs.Apart()
        self.epochs = []
        self._training = True

    def _begin(self, epoch: int) -> None:
        """When the first epoch begins: callbacks behind this one have had their turn, and may have restored something."""
        model, optimizers = self.model, keras_state.optimizers(self.model)
        state = keras_state.State(*optimizers)
        averaged = self._averaged()
        every = state.averaged(self.settings.optimizer_state)
        averaged += [v for v in state.variables if id(v) in every]
        weights = set(map(id, model.trainable_variables))
        # What an engine has compiled is kept from fit to fit.
        if self._memory is None or not self._memory.holds(averaged):
            communicator = devices.get()
            self._memory = assemble.memory(
                communicator, averaged, self.settings, [v for v in averaged if id(v) not in weights], every
            )
            self._engine = assemble.engine(
                self.settings,
                communicator,
                self._memory,
                self._timings,
                finish_at_exit=False,
                pairs=means_and_variances(averaged),
            )
        seeds = {id(v) for v in model.variables if "seed_generator_state" in v.path}
        start = {id(v): v for v in (*model.variables, *(v for each in optimizers for v in each.variables))}
        reset = keras_state.State(*(each for each in optimizers if keras_state.resets(self.settings, each))).reset
        self._memory.prepare(
            [v for v in start.values() if id(v) not in seeds], reset, own=self._own(state, every), restart=state.reset
        )
        facts = {"front end": type(self).__name__, "first epoch": str(epoch)}
        parts = [*keras_state.describe_layers(model), *map(keras_state.describe, optimizers)]
        steps = self._steps_before()
        brought = 0 if steps is None else keras_state.brought(model.optimizer, steps)
        self._tell()
        updates = 0 if model.optimizer is None else self._updates_done()
        self._engine.begin(steps, Context(facts, parts, brought, updates), self.keeper)
        keras_state.finalize(model)
        self._warn_about_steps_per_execution()
        if devices.rank() == 0:
            keras_state.say_what_is_reset(self.settings, optimizers)

    def _averaged(self) -> list[Any]:
        averages = [v for each in keras_state.optimizers(self.model) for v in keras_state.moving_averages(each)]
        return [*keras_state.selected(self.settings, keras_state.of_model(self.model)), *averages]

    def _own(self, state: keras_state.State, averaged: Collection[int]) -> list[Any]:
        """Optimizer state that each rank keeps for itself."""
        keeps = self.settings.optimizer_state != "reset"
        return [v for v in state.variables if keeps and id(v) not in averaged]

    def _steps_before(self) -> int | None:
        """Steps in an earlier life, which the optimizer of a model from a file knows; None: the engine has counted."""
        optimizer = self.model.optimizer
        if optimizer is None or optimizer is self._counted_for:
            return None
        self._counted_for = optimizer
        return self._updates_done()

    def _check_still_the_same(self) -> None:
        assert self._memory is not None
        known = set(map(id, self._memory.variables))
        if new := [v.path for v in self._averaged() if id(v) not in known]:
            raise ValueError(
                f"{', '.join(new[:4])} became trainable during fit, and would be each rank's own: what is averaged is fixed when "
                "fit begins. End this fit, compile, and fit again."
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Two positions per epoch: 2e + 1 when its steps are done, 2e + 2 when its logs are averaged."""
        self._epoch, self._position = epoch, 2.0 * self._epochs_begun
        self._batches = self._goes_on.get("batches", 0)
        if not self._begun:
            self._begun, self._loss = True, self._goes_on.get("loss", math.nan)
            self._begin(epoch)
        elif self._generation != self._engine.communicator.generation:
            frames.forget_number_of_batches()  # a Dataset is dealt out anew among those that are left
        self._generation = self._engine.communicator.generation
        self._take_checkpoint()
        self._epochs_begun += 1
        self._steps_done = False
        # What each batch asks for is kept at hand: between steps nothing of ours is in the processor's caches.
        self._planned, self._several = self.params.get("steps") or sys.maxsize, self.model.steps_per_execution
        self._counts_batches = self._planned < sys.maxsize or self._several == 1 or self.model.optimizer is None
        self._updates_before = 0 if self._counts_batches else self._goes_on.get("updates", self._updates_done())
        self._over, self._logs_before = self._goes_on.get("over", False), {}
        self._batch_logs: dict[str, Any] = {}
        self._goes_on = {}
        self._by_samples, self._watches_loss = self.settings.weighting == "samples", "loss" in self.settings.needs
        self._train_samples = self._validation_samples = 0.0
        self._timings.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Whatever came before was not computing."""
        self._timings.lap("input")
        self._first_batch = batch
        if self._by_samples:
            self._seen_before = self._samples()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """One local step, or ``steps_per_execution`` of them; a sync if the round is over."""
        engine = self._engine
        self._timings.lap("compute")
        self._batch_logs = logs or {}
        if self._watches_loss:
            self._loss = float(self._batch_logs.get("loss", math.nan))
        # The last execution of several may be a short one, and Keras does not say so.
        done = (
            min(self._first_batch + self._several, self._planned)
            if self._counts_batches
            else self._updates_this_epoch()
        )
        steps = done - self._batches
        due = engine.step(steps, self._step_samples(steps) if self._by_samples else 0.0)
        if not self._batches:
            self._check_still_the_same()
        self._batches = done
        if due:
            finish_device_work()
            self._timings.lap("compute")
            self._synchronise(engine.proceed, engine.progress.steps >= engine.progress.interval)

    def _updates_this_epoch(self) -> int:
        return self._updates_done() - self._updates_before

    def _updates_done(self) -> int:
        """Steps that the optimizer has taken in its life; with gradient accumulation, to a multiple."""
        optimizer = self.model.optimizer
        accumulated = keras_state.innermost(optimizer).gradient_accumulation_steps or 1
        return int(keras.ops.convert_to_numpy(optimizer.iterations)) * accumulated

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
        if logs is not None:
            logs.update(self._logs_before | logs)
        own = {
            key: numbers for key, value in (logs or {}).items() if (numbers := epoch_logs.numbers(value)) is not None
        }
        message = json.dumps(
            {"logs": own, "samples": self._train_samples, "validation_samples": self._validation_samples}
        )
        self._engine.keeper.waits = True  # until this epoch is over for the other callbacks too
        messages = self._synchronise(lambda: self._engine.meet(self._position + 2, message.encode()))
        if logs is not None:
            entries, sums = [json.loads(entry) for entry in messages if entry], self._timings.epoch
            spread = epoch_logs.spread(entries, sums.drift)
            averaged = epoch_logs.average(entries)
            added = spread | epoch_logs.times(sums.numbers)
            self.epochs.append({name: value for name, value in added.items() if name not in logs | averaged})
            logs.update(self.epochs[-1] | averaged)
            if (hint := self._apart.see(spread)) and devices.rank() == 0:
                warnings.warn(hint, stacklevel=2)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """All ranks end together, with the same weights; rank 0 prints the table."""
        self._training = False
        self._input.remove()
        if not self._begun:
            return
        if self.model.stop_training:
            self._engine.request_stop()
        self._engine.finish()
        if devices.rank() == 0 and self.params.get("verbose"):
            self.print_table()

    # Checkpoints.

    def where(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, as JSON takes it."""
        updates = self._updates_before if self._batches else self._updates_done()
        stop = self.model.stop_training or self._engine.progress.stopping
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "position": self._position,
            "updates": updates,
            "over": self._batches > 0 and (self._steps_done or stop),
            "stop": stop,
            "loss": self._loss,
            "apart": vars(self._apart),
        }

    def go_on(self, where: dict[str, Any]) -> None:
        """The inverse, before the first epoch."""
        self._goes_on, self._epochs_begun = where, int(where["position"]) // 2
        vars(self._apart).update(where["apart"])

    def _take_checkpoint(self) -> None:
        keeper = self._engine.keeper
        if keeper.due:
            with failures.together(self._engine):
                keeper.take(between_steps=True)
        keeper.waits = False

    # Sync, and what surrounds it.

    def _synchronise(self, sync: Callable[[], list[bytes]], ends_round: bool = True) -> list[bytes]:
        engine = self._engine
        if ends_round:
            self._input.estimate(self._timings)
            if self._batch_logs:  # steps were taken since it was last said
                loss = epoch_logs.numbers(self._batch_logs.get("loss"))
                self._timings.loss = loss if isinstance(loss, float) else None
                self._batch_logs = {}
        self._tell()
        if self.model.stop_training:
            engine.request_stop()
        messages = sync()
        if engine.progress.stopping:
            self.model.stop_training = True
        return messages

    def _tell(self) -> None:
        """What the schedule needs to know, and nothing else: to ask takes time."""
        needs, planned = self.settings.needs, self.params.get("steps")
        if "rate" in needs:
            (optimizer, *_) = keras_state.optimizers(self.model)
            self._engine.tell(rate=float(keras.ops.convert_to_numpy(optimizer.learning_rate)))
        if "loss" in needs:
            self._engine.tell(loss=self._loss)
        if "remaining" in needs:
            if not planned:
                raise ValueError(
                    f"{self.settings.schedule} needs to know how long training is, and the data do not say: pass steps_per_epoch."
                )
            self._engine.tell(remaining=(self.params["epochs"] - self._epoch) * planned - self._batches)

    def _finish_training_steps(self) -> None:
        if not self._steps_done:  # on_test_begin may have been here before on_epoch_end
            self._steps_done = True
            self._check_still_the_same()
            self._timings.lap("input")
            self._train_samples = self._samples()
            if self._over:  # Keras has seen no batch of this epoch, and validation sets its metrics to zero
                self._logs_before = dict(self.model.get_metrics_result())
            self._synchronise(lambda: self._engine.meet(self._position + 1))

    def _step_samples(self, steps: int) -> float:
        """Of the steps just taken: what they added to the count, which others may reset or add to between steps."""
        return self._samples() - self._seen_before or float(
            steps
        )  # a train_step of its own may not count: then by steps

    def _samples(self) -> float:
        """Samples seen since the metrics were reset, which Keras' own loss metric counts."""
        for metric in self.model.metrics:
            if metric.name == "loss" and hasattr(metric, "count"):
                return float(keras.ops.convert_to_numpy(metric.count))
        return float(self._batches)

    # Checks at train begin.

    def _look_at_the_other_callbacks(self) -> None:
        """Say so if a callback will see logs before they are averaged."""
        callbacks = frames.callback_list()
        if (ours := sum(isinstance(callback, LocalSGDCallback) for callback in callbacks)) > 1:
            raise ValueError(f"fit needs one LocalSGDCallback: weights need averaging once. Received: {ours} of them.")
        if self in callbacks and devices.rank() == 0 and devices.size() > 1:
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
        steps, interval = self.model.steps_per_execution, self._engine.progress.interval
        if steps > 1 and interval % steps and devices.rank() == 0:
            warnings.warn(
                f"steps_per_execution={steps} does not divide the {interval} local steps between syncs: each sync comes "
                f"at the first batch end at or past its step, here after {math.ceil(interval / steps) * steps} steps.",
                stacklevel=2,
            )


def build(model: keras.Model, optimizer_state: Any) -> None:
    """Make all weights now: Keras may leave that to the first step, too late to give all ranks the same.

    Built is what has its variables: a model whose ``train_step`` calls built parts needs no ``call``.
    """
    if not all(layer.built for layer in model._flatten_layers(include_self=False)) or not model.layers:
        batches = frames.caller_local("epoch_iterator")
        if batches is None:
            raise ValueError(
                "The model has no weights yet. Begin it with keras.Input, or call model.build(shape) first."
            )
        model._symbolic_build(iterator=batches)
        batches.reset()
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    late = [type(each).__name__ for each in keras_state.optimizers(model) if not each.built]
    if late and optimizer_state != "keep":
        raise ValueError(
            f"optimizer_state={optimizer_state!r} needs the state of {', '.join(late)}, which the model's train_step builds "
            "later: call optimizer.build(variables) before fit."
        )


def _check_not_wrapped(optimizer: Any) -> None:
    from hvd_localsgd.frontends.optimizer import LocalSGDOptimizer

    while optimizer is not None:
        if isinstance(optimizer, LocalSGDOptimizer):
            raise ValueError("The model was compiled with a LocalSGDOptimizer: use it or the callback, not both.")
        optimizer = getattr(optimizer, "inner_optimizer", None)


def check_is_keras_3(model: Any) -> None:
    """With TF_USE_LEGACY_KERAS ``tf.keras`` is Keras 2, whose models call our callbacks and have other insides."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"hvd_localsgd works with models of Keras 3, here {keras.__version__}. Received: a {type(model).__name__} of "
            f"{type(model).__module__}. Take everything from `import keras`, or unset TF_USE_LEGACY_KERAS, which makes "
            "tf.keras Keras 2."
        )
