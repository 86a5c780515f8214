"""``LocalSGDCheckpoint``: a training that is killed goes on where it was."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from keras.callbacks import Callback

from hvd_localsgd import devices
from hvd_localsgd.backends.tensorflow.variables import describe, read, write
from hvd_localsgd.core import failures
from hvd_localsgd.core.keeper import Checkpoints
from hvd_localsgd.core.state import State, below, draw_as, drawn, numbered, under, value, words
from hvd_localsgd.frontends import frames, keras_state, random_state, replay
from hvd_localsgd.frontends.callback import LocalSGDCallback, build
from hvd_localsgd.frontends.optimizer import LocalSGDOptimizer


class LocalSGDCheckpoint(Checkpoints, Callback):
    """Writes checkpoints of a training on all its ranks, and goes on from the latest when the same script is started again.

    For ``fit``: behind ``LocalSGDCallback`` in the list of callbacks, or beside a model that is compiled with a ``LocalSGDOptimizer``;
    where ``BackupAndRestore(folder)`` was, put ``LocalSGDCheckpoint(folder)``. For loops: ``ModelAverager(..., checkpoint=...)``.

    A checkpoint is each rank's weights, optimizer state, metrics and seeds, what averages keep, counters, the schedule's state and the
    position in the data. A thread writes it while training goes on. As many ranks that go on from it end in the same bits as if they
    had never stopped, where operations are deterministic and seeds are set; other numbers of ranks go on with the weights, what is
    common to all ranks and the progress, and rank 0 says what was not taken over. A training that has ended is kept too: with more
    epochs it goes on. One folder is one training.

    SIGTERM or SIGUSR1 on any rank, or a time limit, make all ranks write a checkpoint at the next sync and end with ``exit_status``.

    Args:
        folder: of this training alone; on a filesystem that all hosts share, or on each host's own.
        every_rounds: averages after which a checkpoint is written; None: only where training ends.
        keep: how many are kept.
        exit_status: of a job that is asked to end; 0 to 255.
        max_minutes: after which this process must have ended, from the moment when this is made; None: SLURM's limit, if there is one.

    Raises:
        ValueError: an argument is out of range; in ``fit``: there is nothing that averages, or it stands behind, or is asynchronous.
        CheckpointError: in ``fit``, on every rank: a checkpoint is damaged, of another training or version, or cannot be written.
        RanksDiffer: in ``fit``, on every rank: ranks would go on from different checkpoints.
        Preempted: in ``fit``, on every rank: a ``SystemExit`` with ``exit_status``.
    """

    def __init__(
        self,
        folder: Any,
        every_rounds: int | None = 100,
        *,
        keep: int = 3,
        exit_status: int = 75,
        max_minutes: float | None = None,
    ) -> None:
        Callback.__init__(self)
        self._fit: weakref.finalize[..., Any] | None = None
        super().__init__(folder, every_rounds, keep=keep, exit_status=exit_status, max_minutes=max_minutes)

    # What Keras calls.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Goes on from what there is, on all ranks from the same."""
        self._front = self._find()
        self._batch_iterator = frames.caller_local("epoch_iterator")
        self._listen_as_long_as_fit_lives(self._batch_iterator)
        self._begun = self._ended = False
        self._first_epoch: int | None = None
        self._now: dict[str, Any] = {"epoch": 0, "batches": 0, "over": False}
        self._later: State | None = None
        self.waits = isinstance(self._front, LocalSGDOptimizer)
        self._front.keeper = self
        if self.resume(devices.get(), self):
            self.model._initial_epoch = self._now["epoch"]
            self._say_if_nothing_is_left()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """The first goes on in the middle, if it was there."""
        self.model._initial_epoch = None  # or the next fit would begin there too
        if self._first_epoch is None:
            self._first_epoch = epoch
        self._now["epoch"], self._begun = epoch, True
        if self._later is not None:
            self._go_on(self._later)
            self._later = None
        else:
            self._now |= {"batches": 0, "over": False}
            self._drawn = drawn()
        self._batch_iterator = None

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """An optimizer's sync was inside the step: what it has asked for is done now."""
        if isinstance(self._front, LocalSGDOptimizer):
            self._now["batches"] = batch + 1
            if self.due:
                with failures.together(None):
                    self.take(between_steps=True)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Its data have ended."""
        self._now["over"] = True

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """What has come out is kept, to be gone on from."""
        self._front.keeper = None
        self.model._initial_epoch = None
        if self._begun:
            self._ended = True
            with failures.together(None):
                self.finish()
        self.requests.ignore()

    def _listen_as_long_as_fit_lives(self, iterator: Any) -> None:
        """No callback hears of a ``fit`` that ends by an error, but its iterator goes with it."""
        if self._fit is not None:
            self._fit.detach()
        self._fit = weakref.finalize(iterator, self.requests.ignore) if iterator is not None else None

    # What is kept.

    def facts(self) -> dict[str, Any]:
        """Settings and variables."""
        front = {"front end": type(self._front).__name__, **self._front.settings.of_results()}
        return {**front, "variables": [describe(each) for each in self._variables()]}

    def state(self) -> State:
        """Variables, where in the data this rank is, and where random numbers come from."""
        where = self._now | {"first_epoch": self._first_epoch}
        if isinstance(self._front, LocalSGDCallback):
            where |= self._front.where()
        if self._ended:
            stopped = self.params.get("epochs", 0) if self.model.stop_training else 0  # and does not go on for as many
            where |= {
                "epoch": max(where["epoch"] + 1, stopped),
                "batches": 0,
                "position": 0.0,
                "over": False,
                "stop": False,
            }
        return {
            "where": words(where),
            **numbered("variable", [read(each) for each in self._variables()]),
            **numbered("metric", [read(each) for each in self.model.metrics_variables]),
            **under("random", random_state.state()),
            **under("drawn", self._drawn if where["batches"] else drawn()),
        }

    def load(self, state: State, ranks: int) -> list[str]:
        """Variables now, the rest when the first epoch begins."""
        where, size, own = value(state["where"]), devices.size(), devices.rank() < ranks
        for number, variable in enumerate(self._variables()):
            if own or "seed_generator_state" not in getattr(variable, "path", ""):
                write(variable, state[f"variable/{number}"])
        dropped, metrics = [], True
        if where["over"]:
            dropped = ["the epoch's metrics of the other ranks"] if ranks > size else []
        elif ranks != size and where["batches"]:
            before, where["batches"] = where["batches"], self._as_far(where["batches"] * ranks / size)
            if "updates" in where:
                where["updates"] += before - where["batches"]
            metrics = False
            dropped = [
                f"which samples of the epoch were seen (it goes on at batch {where['batches']})",
                "the epoch's metrics so far",
            ]
        self._now, self._first_epoch = {name: where[name] for name in self._now}, where["first_epoch"]
        self.model.stop_training = where.get("stop", False)
        kept = {"metric": metrics, "random": own, "drawn": own}
        self._later = {name: array for name, array in state.items() if kept.get(name.split("/")[0])}
        self._front.go_on(where)
        return dropped

    def _as_far(self, batches: float) -> int:
        """Where to go on in this epoch, of other ranks' batches: the last execution is to come, or Keras would have no metrics."""
        several, known = self.model.steps_per_execution, self._batch_iterator.num_batches
        if not known:
            return 0  # nobody can say whether the data end before
        return int(min(batches, known - 1) // several * several)

    def _variables(self) -> list[Any]:
        optimizers = keras_state.optimizers(self.model)
        return [*self.model.variables, *(each for optimizer in optimizers for each in optimizer.variables)]

    # How it goes on.

    def _go_on(self, later: State) -> None:
        """In the middle of an epoch: its metrics, and its data."""
        assert self._first_epoch is not None
        seen, metrics = self._now["batches"], below("metric", later)
        if metrics and seen:
            keras_state.build_metrics(self.model, self._batch_iterator)
            variables = self.model.metrics_variables
            if [tuple(v.shape) for v in variables] == [metrics[str(n)].shape for n in range(len(metrics))]:
                for number, variable in enumerate(variables):
                    write(variable, metrics[str(number)])
            else:
                warnings.warn(
                    "The epoch's metrics cannot be told before its first step: they begin anew.", stacklevel=2
                )
        if (seen or self._now["epoch"] > self._first_epoch) and not random_state.is_seeded() and devices.rank() == 0:
            warnings.warn(
                "No seed was set: what is shuffled comes in another order than in the run that is gone on from, so that samples may be seen "
                "twice or not at all. Call keras.utils.set_random_seed first thing in the script, with another seed on each rank.",
                stacklevel=2,
            )
        self._drawn = below("drawn", later) or drawn()

        def before() -> None:
            draw_as(self._drawn)

        def after() -> None:
            if random := below("random", later):
                random_state.load(random)

        epochs = self._now["epoch"] - self._first_epoch
        replay.skip(self._batch_iterator, epochs, seen, self._now["over"], before, after)

    def _find(self) -> Any:
        """The callback in front of us, or the optimizer."""
        callbacks = frames.callback_list()
        before = callbacks[: callbacks.index(self)] if self in callbacks else callbacks
        found = [each for each in callbacks if isinstance(each, LocalSGDCallback)]
        found += [each for each in keras_state.wrapped(self.model.optimizer) if isinstance(each, LocalSGDOptimizer)]
        if not found:
            raise ValueError(
                "LocalSGDCheckpoint keeps a training that averages: put LocalSGDCallback in front of it in the list of callbacks, or compile "
                "the model with a LocalSGDOptimizer."
            )
        (front, *_) = found
        if isinstance(front, LocalSGDCallback) and front not in before:
            raise ValueError("LocalSGDCheckpoint must stand behind LocalSGDCallback in the list of callbacks.")
        if front.settings.mode == "async":
            raise ValueError(
                "mode='async' has no moment at which all ranks are between the same two syncs, and cannot be kept. Use mode='sync'."
            )
        if isinstance(front, LocalSGDOptimizer):
            build(self.model, "keep")
            if self.model.steps_per_execution > 1:
                raise ValueError(
                    "With LocalSGDOptimizer a checkpoint is taken between Keras' executions, which may be several steps and syncs: leave "
                    f"steps_per_execution at 1, or use LocalSGDCallback. Received: {self.model.steps_per_execution}"
                )
        return front

    def _say_if_nothing_is_left(self) -> None:
        epoch, epochs = self._now["epoch"], self.params.get("epochs")
        if epochs is not None and epochs <= epoch and devices.rank() == 0:
            warnings.warn(
                f"The training in {self.folder} has ended after {epoch} epochs, and fit(epochs={epochs}) has nothing left to do: the model is "
                "what it was then. Ask for more epochs, or choose another folder.",
                stacklevel=2,
            )
