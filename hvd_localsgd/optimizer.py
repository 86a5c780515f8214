"""``LocalSGDOptimizer``: Local SGD wrapped around any Keras optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from hvd_localsgd import devices, frames, variables
from hvd_localsgd.asynchronous import engine_class
from hvd_localsgd.averaging import Interval, LocalSGD, Mode, OptimizerState, Settings
from hvd_localsgd.schedules import Schedule, as_schedule
from hvd_localsgd.timing import Round, Timings, print_table

_maybe_merge_call = tf.__internal__.distribute.interim.maybe_merge_call


@keras.saving.register_keras_serializable("hvd_localsgd")
class LocalSGDOptimizer(keras.optimizers.Optimizer):
    """An optimizer that averages the weights of all ranks every H of its updates.

    Stich (2018), Algorithm 1. For ``compile``, for custom loops (eager or in ``tf.function``) and under
    ``tf.distribute.MirroredStrategy``: gradients are then averaged inside the process at every step, weights
    across processes every H. When training ends, ``finalize_variable_values`` waits for the slowest rank and averages
    once more; ``fit`` calls it, a custom loop should (Keras wants that for ``use_ema`` anyway).

    The optimizer sees no epochs, no logs and no BatchNorm statistics: prefer ``LocalSGDCallback`` where you use
    ``fit``, or pass ``statistics=model.non_trainable_variables``.

    Args:
        inner_optimizer: the Keras optimizer that takes the local steps. Everything it can do goes on working;
            with ``gradient_accumulation_steps`` its updates are counted, not the batches, and a step that
            ``LossScaleOptimizer`` skips counts too, so that ranks stay in step.
        sync_every: H, updates between two syncs, or a ``Schedule``.
        optimizer_state: ``"keep"``, ``"average"`` or ``"reset"`` momentum and moments at a sync.
        mode: ``"async"``: no rank waits for another until training ends, as for the callback.
        interval: ``"balanced"``: each rank steps in proportion to its speed, as for the callback.
        statistics: further variables to average, such as ``model.non_trainable_variables``; integers among them are
            left alone.
        timings: a folder for one JSON-lines file per rank, a line per round; None keeps the records in memory only.
        name: as for every Keras optimizer.

    Attributes:
        timings: list of ``hvd_localsgd.timing.Round``, this rank's rounds, oldest first. What is not a sync is
            ``compute``: the optimizer cannot tell input from computing.
        totals: after the end of training, sums over those rounds, one dict per rank.

    Raises:
        ValueError: an argument is not one of the above; when built: ranks hold different models or settings.
        RuntimeError: inside XLA (``jit_compile=True``), which cannot call MPI.
        RankFailed: on every rank, when another rank failed or its weights are not finite.
    """

    _engine: LocalSGD  # made when training begins

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        sync_every: int | Schedule = 16,
        *,
        optimizer_state: OptimizerState = "keep",
        mode: Mode = "sync",
        interval: Interval = "equal",
        statistics: Sequence[Any] = (),
        timings: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise ValueError(f"inner_optimizer must be a keras.optimizers.Optimizer. Received: {inner_optimizer!r}")
        if isinstance(inner_optimizer, LocalSGDOptimizer):
            raise ValueError("inner_optimizer is a LocalSGDOptimizer already: weights need averaging once.")
        self._settings = Settings(as_schedule(sync_every), optimizer_state, mode=mode, interval=interval)
        self.inner_optimizer = inner_optimizer
        self._statistics = tuple(statistics)
        self._timings_folder = timings
        self._communicator = devices.get()
        self._timings = Timings(timings, self._communicator.rank)
        self._in_training = False

    @property
    def timings(self) -> list[Round]:
        """This rank's rounds, oldest first."""
        return self._timings.rounds

    @property
    def totals(self) -> list[dict[str, Any]]:
        """After training: sums over the rounds, one dict per rank."""
        return self._timings.totals

    # Local steps.

    def build(self, variables: Sequence[Any]) -> None:
        """Inner state, and our counters of steps."""
        self._notice_loss_scaling()
        if self.built:
            return
        with tf.init_scope():  # Keras builds some optimizers while it traces: variables would not exist until it has
            if not self.inner_optimizer.built:
                self.inner_optimizer.build(variables)
            super().build(variables)
            # Counted here, not read from the inner optimizer, whose iterations stand still when a step is skipped.
            self._steps = self.add_variable((), "zeros", "int64", "only_first_replica", name="local_steps")
            self._next_sync = self.add_variable((), "zeros", "int64", "only_first_replica", name="next_sync")

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """The inner optimizer's step; a sync with the other ranks if the round is over."""
        _refuse_xla()
        if not self.built:
            self.build(list(trainable_variables or []))
        moved = self._begin_training()
        if not (moved and tf.executing_eagerly()):  # else these are gradients at weights that are no more
            self.inner_optimizer.apply(grads, trainable_variables)
        _maybe_merge_call(lambda strategy: self._count_step(), tf.distribute.get_strategy())

    def _count_step(self) -> None:
        """In cross-replica context, once per step in which every replica has taken part."""
        self._steps.value.assign_add(1)
        due = self._steps.value >= self._next_sync.value
        if tf.executing_eagerly():
            if due:
                self._sync_eagerly()
        else:
            parts = [component for v in self._touched() for component in variables.components(v)]
            devices_used = {component.device for component in parts}
            if len(devices_used) > 1:
                tf.cond(due, lambda: self._sync_devices(parts), lambda: None)
            elif "CPU" in devices_used.pop():
                _run_if(due, lambda: self._sync_in_place(parts))
            else:
                tf.cond(due, lambda: self._sync_in_place(parts), lambda: None)

    def _sync_eagerly(self, exposed: Sequence[tf.Tensor] | None = None) -> None:
        self._engine.local_steps(self._updates() - self._engine.total_steps)
        self._engine.watch.lap("compute")
        self._engine.synchronise(exposed=exposed)
        self._set_next_sync()

    # The eager sync from inside a graph. What it changes must be known to the graph, or TensorFlow may reorder.

    def _sync_in_place(self, parts: Sequence[tf.Variable]) -> None:
        """With the handles as inputs, TensorFlow orders all that touches these variables around the call.

        Buffers are exposed out here: a call to a compiled function in there can wait for ever for a free thread.
        """
        averaged, handles = self._engine.variables, [part.handle for part in parts]
        small = averaged.small_dtypes

        def average(*inputs: tf.Tensor) -> list[tf.Tensor]:
            exposed = inputs[len(handles) :]
            self._sync_eagerly(exposed)
            return list(exposed[: len(small)])

        averages = tf.py_function(average, [*handles, *averaged.expose()], Tout=small)
        averaged.put_back(averages if small else [])

    def _sync_devices(self, parts: Sequence[tf.Variable]) -> None:
        """Handles on several devices cannot be inputs of one op.

        The old values order it after what came before; assigning what it returns orders it before what comes next.
        """

        def sync(*_: tf.Tensor) -> list[tf.Tensor]:
            self._sync_eagerly(exposed=[])  # nothing is in place where devices differ
            return [part.read_value() for part in parts]

        with tf.device("/CPU:0"):
            values = tf.py_function(sync, [part.read_value() for part in parts], Tout=[part.dtype for part in parts])
        for part, value in zip(parts, values, strict=True):
            value.set_shape(part.shape)
            with tf.device(part.device):
                part.assign(value)

    def _touched(self) -> list[Any]:
        """Every variable that a sync reads or writes."""
        state = self._engine.state.variables if self._settings.optimizer_state == "reset" else []
        return [*self._engine.variables.variables, *state, self._steps, self._next_sync]

    def _notice_loss_scaling(self) -> None:
        """Under mixed_float16 Keras puts the optimizer that it is given into a LossScaleOptimizer.

        That one skips ``apply`` on a rank whose gradients overflow, and tells nobody: the rank would fall behind the
        others. So when it builds us, ask it to tell us.
        """
        wrapper = frames.caller_local("self", keras.optimizers.LossScaleOptimizer)
        if wrapper is None or wrapper is self.inner_optimizer:
            return
        skip = wrapper._stateful_handle_non_finite_grads
        if getattr(skip, "__name__", "") == "skip_and_count":
            return
        self.inner_optimizer.loss_scale_factor = None  # as it did with ours: one scale is enough

        def skip_and_count() -> None:
            skip()
            self._begin_training()
            self._count_step()

        wrapper._stateful_handle_non_finite_grads = skip_and_count

    # Training as a whole.

    def _begin_training(self) -> bool:
        """Once, before the first step: the same start everywhere. Whether that changed this rank's weights.

        In a graph this happens while it is traced, before anything runs. Eagerly the first step has begun: its forward
        pass has updated the statistics, each rank's its own, which the next sync averages.
        """
        if self._in_training:
            return False
        self._in_training = True
        statistics = [] if tf.executing_eagerly() else self._statistics
        with tf.init_scope():
            if not all(variables.exists(v) for v in self._trainable_variables):
                raise RuntimeError(
                    "The model is built while its first step is traced, too late to give all ranks the same weights. "
                    "Build it before: begin with keras.Input, or call model.build(shape)."
                )
            if not hasattr(self, "_engine"):
                self._engine = self._make_engine()
            self._engine.total_steps = self._updates()  # more than zero after loading from a file
            moved = self._engine.begin(self._trainable_variables, [*statistics, *self.inner_optimizer.variables])
            self._set_next_sync()
        return moved

    def _make_engine(self) -> LocalSGD:
        averaged = variables.floats(
            [*self._trainable_variables, *self._statistics, *variables.moving_averages(self.inner_optimizer)]
        )
        return engine_class(self._settings)(
            self._communicator,
            averaged,
            variables.State(self.inner_optimizer),
            self._settings,
            self._timings,
            finish_at_exit=True,
        )

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """The end of training: wait for the slowest rank, average once more, print the table on rank 0."""
        if self._in_training:
            engine = self._engine
            engine.local_steps(self._updates() - engine.total_steps)
            engine.watch.lap("compute")
            engine.finish()
            self._in_training = False
            if self._communicator.rank == 0:
                print_table(self.totals, f"Local SGD, {self._settings.schedule}, {len(self.totals)} ranks")
        self.inner_optimizer.finalize_variable_values(var_list)

    def _updates(self) -> int:
        return int(variables.components(self._steps)[0].numpy()) // self._steps_per_update

    @property
    def _steps_per_update(self) -> int:
        return variables.innermost(self).gradient_accumulation_steps or 1

    def _set_next_sync(self) -> None:
        updates = min(self._engine.total_steps + self._engine.interval, sys.maxsize // self._steps_per_update)
        for part in variables.components(self._next_sync):
            part.assign(updates * self._steps_per_update)

    # Everything else is the inner optimizer's.

    @property
    def variables(self) -> list[Any]:
        """Ours, then the inner optimizer's."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's iterations."""
        return self.inner_optimizer.iterations

    def scale_loss(self, loss: Any) -> Any:
        """The inner optimizer's scaling of the loss."""
        return self.inner_optimizer.scale_loss(loss)

    def save_own_variables(self, store: Any) -> None:
        """Our counters; Keras saves the inner optimizer by itself."""
        for i, variable in enumerate(self._variables):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Our counters."""
        for i, variable in enumerate(self._variables):
            variable.assign(store[str(i)])

    def get_config(self) -> dict[str, Any]:
        """Without ``statistics``, which are variables of a model: pass them again to a model loaded from a file."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "sync_every": keras.saving.serialize_keras_object(self._settings.schedule),
            "optimizer_state": self._settings.optimizer_state,
            "mode": self._settings.mode,
            "interval": self._settings.interval,
            "timings": None if self._timings_folder is None else str(self._timings_folder),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> LocalSGDOptimizer:
        """The inverse of ``get_config``."""
        config = dict(config)
        for key in ("inner_optimizer", "sync_every"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)


def _run_if(condition: tf.Tensor, action: Callable[[], None]) -> None:
    """``tf.cond`` without an alternative, at a cost that does not grow with the number of variables.

    TensorFlow replaces its own by a Switch for each input, and the inputs are all variables: a microsecond for each at
    every step, sync or not. This one is a single operation, which a function that spans devices could not be.
    """
    then = tf.function(action, autograph=False).get_concrete_function()
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in then.captured_inputs]
    nothing = tf.function(lambda *_: None, autograph=False).get_concrete_function(*signature)
    tf.raw_ops.If(cond=condition, input=then.captured_inputs, Tout=[], then_branch=then, else_branch=nothing)


def _refuse_xla() -> None:
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise RuntimeError(
            "LocalSGDOptimizer cannot call MPI from inside XLA. Compile the model with "
            "compile(..., jit_compile=False), or use LocalSGDCallback, which works with jit_compile=True."
        )
