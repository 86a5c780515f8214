"""``LocalSGDOptimizer``: Local SGD wrapped around any Keras optimizer."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from hvd_localsgd import assemble, devices
from hvd_localsgd.backends.tensorflow import graph
from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
from hvd_localsgd.backends.tensorflow.variables import components, floats
from hvd_localsgd.core import settings
from hvd_localsgd.core.agreement import Context
from hvd_localsgd.core.engine import LocalSGD
from hvd_localsgd.core.keeper import Keeper
from hvd_localsgd.core.schedules import Schedule
from hvd_localsgd.core.selection import means_and_variances
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.frontends import as_raised, callback_list, frames, keras_state
from hvd_localsgd.frontends.table import Tabled

as_raised.install()
callback_list.install()
_maybe_merge_call = tf.__internal__.distribute.interim.maybe_merge_call


@settings.shown
@keras.saving.register_keras_serializable("hvd_localsgd")
class LocalSGDOptimizer(Tabled, keras.optimizers.Optimizer):
    """An optimizer that averages the weights of all ranks every H of its updates.

    Stich (2018), Algorithm 1. For ``compile``, for custom loops (eager or in ``tf.function``) and under
    ``tf.distribute.MirroredStrategy``: gradients are then averaged inside the process at every step, weights
    across processes every H. When training ends, ``finalize_variable_values`` waits for the slowest rank and averages
    once more; ``fit`` calls it, a custom loop should (Keras wants that for ``use_ema`` anyway).

    The optimizer sees no epochs, no logs and no BatchNorm statistics: prefer ``LocalSGDCallback`` where you use
    ``fit``, or pass ``statistics=model.non_trainable_variables``. With ``weighting="samples"`` it finds the batch in Keras'
    ``train_step(data)``; a loop of your own calls ``count_samples`` in each step.

    Args:
        inner_optimizer: the Keras optimizer that takes the local steps. Momentum, Adam, weight decay, clipping, rate
            schedules, ``use_ema`` and loss scaling go on working (these are tested);
            with ``gradient_accumulation_steps`` its updates are counted, not the batches, and a step that
            ``LossScaleOptimizer`` skips counts too, so that ranks stay in step.
        {options}
        statistics: further variables to average, such as ``model.non_trainable_variables``; integers among them are
            not averaged.
        timings: a folder for one JSON-lines file per rank, a line per round; None keeps the latest records in memory only.
        name: as for every Keras optimizer.

    Attributes:
        settings: what was chosen, a ``hvd_localsgd.core.settings.Settings``.
        timings: list of ``hvd_localsgd.core.timing.Round``, this rank's latest thousand rounds, oldest first. What is not a
            sync is ``compute``: the optimizer cannot tell input from computing.
        totals: after the end of training, sums over those rounds, one dict per rank. Nothing is printed; ``print_table()`` shows them.
        corrections: with ``control_variates``, once built, a variable for each trainable one: what is subtracted from its gradients. Zero
            at first; every sync changes them.

    Raises:
        ValueError: an argument is not one of the above; in the first step: ranks hold different models or settings.
        RuntimeError: inside XLA (``jit_compile=True``), which cannot call MPI.
        RankFailed: on every rank, when another rank failed or its weights are not finite. Out of a ``tf.function`` of your own
            this and the ValueError of the first step come as a ``tf.errors.OpError``; not out of Keras'.
    """

    _engine: LocalSGD  # made before the first step
    keeper: Keeper | None = None  # of checkpoints
    _memory: TensorFlowMemory
    _state: keras_state.State
    _model: Callable[[], keras.Model | None]  # the one that was compiled with this, where that is known
    _take_back: list[np.ndarray] | None = None
    _counted: float = 0

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        sync_every: int | str | Schedule | Callable[..., int] = 16,
        *,
        statistics: Sequence[Any] = (),
        timings: str | Path | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise ValueError(f"inner_optimizer must be a keras.optimizers.Optimizer. Received: {inner_optimizer!r}")
        if isinstance(inner_optimizer, LocalSGDOptimizer):
            raise ValueError("inner_optimizer is a LocalSGDOptimizer already: weights need averaging once.")
        self.settings = settings.choose(sync_every, options)
        settings.check_needs(self.settings, {"rate"}, type(self).__name__)
        self.inner_optimizer = inner_optimizer
        self._variates = assemble.variates(self.settings)
        if self._variates is not None:
            _check_takes_plain_steps(keras_state.innermost(inner_optimizer))
        self._statistics = tuple(statistics)
        self._timings = Timings(timings)
        self._in_training = False
        self._counts_itself = True

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
            # After so many the next one is its round's last; -1: nobody has begun.
            self._before_sync = self.add_variable((), "zeros", "int64", "only_first_replica", name="before_sync")
            _assign(self._before_sync, -1)
            if self.settings.weighting == "samples":
                self._samples = self.add_variable((), "zeros", "int64", "sum", name="samples")
            if self._variates is not None:  # not saved with a model: a training begins with zeros
                self._rates = _zeros((), tf.float32)
                self.corrections = [_zeros(v.shape, v.dtype) for v in self._trainable_variables]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """The inner optimizer's step; a sync with the other ranks if the round is over."""
        _refuse_xla()
        if not self.built:
            self.build(list(trainable_variables or []))
        gradient = next((g for g in reversed(grads) if g is not None), ())  # none: the inner optimizer says so
        dropped, due = _maybe_merge_call(self._begin_if_due, tf.distribute.get_strategy(), gradient)
        if self.settings.weighting == "samples":
            self._count_batch()
        rate = self._rate()  # of this step; afterwards a schedule gives the next one's
        if not dropped:
            self.inner_optimizer.apply(self._corrected(grads, trainable_variables), trainable_variables)
        _maybe_merge_call(self._count_step, tf.distribute.get_strategy(), due, gradient, rate)

    def _corrected(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None) -> Sequence[Any]:
        """With ``control_variates``, gradient - correction, dense, since a correction is.

        On the scale of the gradients: that of the loss, and a share of it on each replica of a strategy, which are summed.
        """
        if self._variates is None:
            return grads
        share = 1 / tf.distribute.get_strategy().num_replicas_in_sync
        corrected = []
        for gradient, variable in zip(grads, trainable_variables or self._trainable_variables, strict=True):
            if gradient is not None:
                correction = self.corrections[self._get_variable_index(variable)] * share
                gradient = tf.convert_to_tensor(gradient) - self.scale_loss(correction)
            corrected.append(gradient)
        return corrected

    def _rate(self) -> Any:
        return keras.ops.convert_to_tensor(self.learning_rate, "float32") if self._variates is not None else ()

    def count_samples(self, samples: Any) -> None:
        """For ``weighting="samples"`` in a loop of your own: the step that comes next is on so many (an integer, scalar)."""
        if not hasattr(self, "_samples"):
            raise RuntimeError(
                "count_samples needs weighting='samples' and, before the first step, optimizer.build(variables)."
            )
        self._counts_itself = False
        self._samples.value.assign_add(tf.cast(samples, tf.int64))

    def _count_batch(self) -> None:
        """The batch of the ``train_step(data)`` that is calling us."""
        if not self._counts_itself:
            return
        data = frames.caller_argument("train_step", "data")
        if data is None:
            raise RuntimeError(
                "weighting='samples' needs to know the size of each batch, and there is no train_step(data) to ask: call "
                "optimizer.count_samples(batch_size) in each step, before the gradients are applied."
            )
        self._samples.value.assign_add(tf.shape(keras.tree.flatten(data)[0], out_type=tf.int64)[0])

    def _count_step(self, strategy: Any, due: Any, gradient: Any, rate: Any) -> None:
        """In cross-replica context, once per step in which every replica has taken part; ``due`` as ``_begin_if_due`` gave it.

        A graph must not count before there is a gradient: where data end it is run once more, and stops when it asks for a batch.
        """
        with _after(strategy, gradient):
            self._steps.value.assign_add(1)
            if self._variates is not None:
                self._rates.assign_add(strategy.experimental_local_results(rate)[0])
        if tf.executing_eagerly():
            self._end_of_round()
        else:
            graph.call_if(
                strategy.experimental_local_results(due)[0], self._end_of_round, self._touched(), self._memory
            )

    def _end_of_round(self) -> None:
        """A sync, if the round is over; unless this is only the step that a rank takes back with which it began at weights of its own."""
        if _number(self._steps) <= _number(self._before_sync):
            return
        if self._take_back is not None:
            self._memory.restore(self._take_back)
            self._take_back = None
            if self._updates() < self._engine.progress.total + self._engine.progress.next_step:
                self._set_next_sync()
                return
        self._take_steps()
        self._tell()
        self._engine.proceed()
        self._set_next_sync()

    def _tell(self) -> None:
        if self.settings.needs:
            self._engine.tell(rate=float(np.asarray(self.learning_rate)))

    def _take_steps(self) -> None:
        samples, known = self._samples_so_far(), self._engine.progress
        self._engine.step(self._updates() - known.total - known.steps, samples - self._counted)
        self._counted = samples
        if self._variates is not None:
            self._variates.count(float(components(self._rates)[0].numpy()) / self._steps_per_update)
            _assign(self._rates, 0.0)
        self._timings.lap("compute")

    def _settle(self) -> None:
        """After each average: optimizer state as the policy says, and the corrections."""
        if self._resets:
            self._state.reset()
        self._put_corrections()

    def _put_corrections(self) -> None:
        if self._variates is not None:
            for place, correction in self._places:
                _assign(correction, self._variates.correction(place).reshape(tuple(correction.shape)))

    def _samples_so_far(self) -> int:
        return sum(map(_number, self._counters()[2:]))

    def _counters(self) -> list[Any]:
        return [self._steps, self._before_sync, *([self._samples] if hasattr(self, "_samples") else [])]

    def _touched(self) -> list[Any]:
        """Every variable that a sync reads or writes."""
        resets = self._resets or self.settings.on_nonfinite == "rollback"
        state = self._state.variables if resets else []
        variates = [self._rates, *self.corrections] if self._variates is not None else []
        # Of the rate, which may be a schedule's: what counts its steps.
        rate = [v for v in self.inner_optimizer.variables if not len(v.shape)] if self.settings.needs else []
        return [*self._memory.variables, *state, *self._counters(), *variates, *rate]

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
            strategy = tf.distribute.get_strategy()
            _, due = self._begin_if_due(strategy, ())
            self._count_step(strategy, due, (), self._rate())

        wrapper._stateful_handle_non_finite_grads = skip_and_count

    # Training as a whole.

    def _begin_if_due(self, strategy: Any, gradient: Any) -> tuple[bool, Any]:
        """In cross-replica context, before a step: begin a training if none is going on.

        When the step runs, not when it is traced: a function is traced once, and runs in any number of trainings. There is a
        gradient by then, for where no batch comes no training begins. A rank that had rank 0's weights goes on with it, and with
        the statistics that the forward pass has updated, its own; one that had not takes both from rank 0, and its gradient,
        taken elsewhere, is lost.

        Returns:
            Whether that gradient is to be dropped here; in a graph the step is taken back when it is over. And, in a graph, whether
            the step ends a round or begins a training, which is found out beside what makes the gradient: it need not wait.
        """
        if not tf.executing_eagerly():
            with tf.init_scope():
                self._make_engine()
            touched = [*self._start(), *self._statistics, *self._touched()]
            before_sync = tf.convert_to_tensor(self._before_sync.value)
            due, nobody_has_begun = self._steps.value >= before_sync, before_sync < 0
            with _after(strategy, gradient):
                graph.call_if(nobody_has_begun, self._begin_in_graph, touched)
            return False, due
        if self._in_training:
            return False, ()
        self._make_engine()
        return self._begin(), ()

    def _begin_in_graph(self) -> None:
        with self._memory.lent([]):
            moved = self._begin()
            if moved:
                self._take_back = self._memory.copy()
                self._set_next_sync(self._updates() + 1)

    def _begin(self) -> bool:
        """Whether that changed this rank's weights."""
        model = self._model()
        # Traced graphs have the tensors inside that adapt has made: they must be the same, to broadcast them is not enough.
        layers = [] if model is None else keras_state.describe_layers(model, adapted=True)
        parts = [*layers, keras_state.describe(self.inner_optimizer)]
        steps = self._updates()  # more than zero after loading from a file
        context = Context({"front end": type(self).__name__}, parts, keras_state.brought(self, steps))
        self._tell()
        moved = self._engine.begin(steps, context, self.keeper)
        self._in_training, self._take_back = True, None
        if self._variates is not None:
            _assign(self._rates, 0.0)
            self._put_corrections()
        taken = self._engine.progress.total + self._engine.progress.steps
        if taken != self._updates():  # rank 0 has taken others
            _assign(self._steps, taken * self._steps_per_update)
        self._counted = self._samples_so_far()
        self._set_next_sync()
        if devices.rank() == 0:
            keras_state.say_what_is_reset(self.settings, [self.inner_optimizer])
        return moved

    def _start(self) -> list[Any]:
        """What all ranks get from rank 0."""
        return [*self._trainable_variables, *self.inner_optimizer.variables]

    def _make_engine(self) -> None:
        """Unless there is one for these variables."""
        self._state = keras_state.State(self.inner_optimizer)
        chosen = floats([*self._trainable_variables, *self._statistics])
        averaged = keras_state.selected(self.settings, chosen)
        averaged += floats(keras_state.moving_averages(self.inner_optimizer))
        every = self._state.averaged(self.settings.optimizer_state)
        averaged += [v for v in self._state.variables if id(v) in every]
        weights = set(map(id, self._trainable_variables))
        plain = [v for v in averaged if id(v) not in weights]
        if not hasattr(self, "_memory") or not self._memory.holds(averaged):
            communicator = devices.get()
            self._memory = assemble.memory(communicator, averaged, self.settings, plain, every)
            # Who leaves a fit has left it in the middle; a loop of the user's may end without a word, and fit finalizes only
            # the optimizer that the model was compiled with.
            model = frames.caller_argument("fit", "self")
            compiled = model is not None and self in keras_state.wrapped(model.optimizer)
            self._model = weakref.ref(model) if compiled else lambda: None
            self._engine = assemble.engine(
                self.settings,
                communicator,
                self._memory,
                self._timings,
                finish_at_exit=not compiled,
                pairs=means_and_variances(averaged),
                variates=self._variates,
                count_pending=self._take_steps,
            )
            if self._variates is not None:
                sent, pairs = set(map(id, averaged)), zip(self._trainable_variables, self.corrections, strict=True)
                self._places = [(self._memory.place(v), correction) for v, correction in pairs if id(v) in sent]
        own = [] if self._resets else [v for v in self._state.variables if id(v) not in every]
        self._memory.prepare(self._start(), self._settle, self._statistics, self._state.reset, own)

    @property
    def _resets(self) -> bool:
        return keras_state.resets(self.settings, self.inner_optimizer)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """The end of training: wait for the slowest rank, average once more."""
        if self._in_training:
            self._take_steps()
            self._engine.keeper.waits = False  # no step is under way
            self._engine.finish()
            self._in_training = False
            _assign(self._before_sync, -1)  # the next step, whenever it comes, begins
        self.inner_optimizer.finalize_variable_values(var_list)

    def go_on(self, where: dict[str, Any]) -> None:
        """A checkpoint has been loaded: the next step begins a training, from there."""
        self._in_training = False
        _assign(self._before_sync, -1)

    def _updates(self) -> int:
        return _number(self._steps) // self._steps_per_update

    @property
    def _steps_per_update(self) -> int:
        return keras_state.innermost(self).gradient_accumulation_steps or 1

    def _set_next_sync(self, updates: int | None = None) -> None:
        if updates is None:
            updates = self._engine.progress.total + self._engine.progress.next_step
        _assign(self._before_sync, min(updates * self._steps_per_update, sys.maxsize) - 1)

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
        """Our counters, by name; Keras saves the inner optimizer by itself."""
        for variable in self._variables:
            store[variable.name] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Our counters, those that the file has: before training there are none, and another optimizer has others.

        A training that is going on, here or in the file, does not go on from there: the next step begins one.
        """
        saved = set(store.keys())
        for variable in self._variables:
            if variable.name in saved:
                variable.assign(store[variable.name])
        self._in_training = False
        if self.built:
            _assign(self._before_sync, -1)  # which a LossScaleOptimizer around this one has loaded too
        elif left := saved - {variable.name for variable in self._variables}:
            warnings.warn(
                f"The file has more of {self.name!r} than is loaded ({', '.join(sorted(left))}), because the optimizer is "
                "not built yet. Before loading call optimizer.build(model.trainable_variables).",
                stacklevel=2,
            )

    def get_config(self) -> dict[str, Any]:
        """Without ``statistics``, which are variables of a model: pass them again to a model loaded from a file."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            **{key: keras.saving.serialize_keras_object(value) for key, value in self.settings.get_config().items()},
            "timings": None if self._timings.folder is None else str(self._timings.folder),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> LocalSGDOptimizer:
        """The inverse of ``get_config``."""
        made = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects) for key in config
        }
        return cls(**made)


def _zeros(shape: Sequence[int], dtype: Any) -> tf.Variable:
    """Under a strategy one on each replica, all of the same value."""
    zeros = tf.zeros(tuple(shape), dtype)
    return tf.Variable(zeros, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


def _after(strategy: Any, gradient: Any) -> AbstractContextManager[Any]:
    """What a graph makes in here waits until every replica has this gradient."""
    parts = strategy.experimental_local_results(gradient)
    return tf.control_dependencies(tf.nest.flatten(parts, expand_composites=True))


def _number(variable: Any) -> int:
    return int(components(variable)[0].numpy())


def _assign(variable: Any, value: Any) -> None:
    """As an array: TensorFlow keeps every Python number that it is given, for ever."""
    for part in components(variable):
        part.assign(np.asarray(value, part.dtype.as_numpy_dtype))


def _check_takes_plain_steps(optimizer: keras.optimizers.Optimizer) -> None:
    others = ("momentum", "clipnorm", "clipvalue", "global_clipnorm", "ema_overwrite_frequency")
    found = [f"{name}={value}" for name in others if (value := getattr(optimizer, name, None))]
    if not isinstance(optimizer, keras.optimizers.SGD) or found:
        has = f" with {', '.join(found)}" if found else ""
        raise ValueError(
            "control_variates take a rank's way since the last sync for the sum of its gradients times the rate, which it is with plain "
            f"SGD: use keras.optimizers.SGD without momentum and clipping. Received: {type(optimizer).__name__}{has}"
        )


def _refuse_xla() -> None:
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise RuntimeError(
            "LocalSGDOptimizer cannot call MPI from inside XLA. Compile the model with "
            "compile(..., jit_compile=False), or use LocalSGDCallback, which works with jit_compile=True."
        )
