"""``IterateAverage``: the average of all iterates that Stich (2018), Theorem 2.2, is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from hvd_localsgd import devices
from hvd_localsgd.averager import ModelAverager
from hvd_localsgd.core import failures
from hvd_localsgd.core.survivors import Survivors
from hvd_localsgd.frontends.callback import LocalSGDCallback, check_is_keras_3
from hvd_localsgd.frontends.frames import callback_list

_POWERS = {"uniform": 0, "linear": 1, "quadratic": 2}


class IterateAverage(keras.callbacks.Callback):
    """x_hat = 1/(K S_T) sum_k sum_t w_t x_k^t, the output of Theorem 2.2: w_t = (a + t)^2, S_T = sum_t w_t.

    Computed online: before every step t each rank adds its own trainable weights x_k^t to a running average. Ranks meet
    once, when training ends (and with ``evaluate`` at each validation). Put it behind ``LocalSGDCallback``; with
    ``LocalSGDOptimizer`` anywhere. While it holds the average, ``swap`` exchanges it with the model's weights.

    Args:
        weights: ``"quadratic"``, w_t = (a + t)^2; ``"linear"``, a + t; or ``"uniform"``, 1.
        a: the shift of the step sizes (``InverseTimeDecay``), >= 0. Unused by ``"uniform"``.
        evaluate: validation sees the average, as with Keras' ``SwapEMAWeights``. All ranks must then validate.

    Raises:
        ValueError: unknown weights, a negative, ``steps_per_execution`` > 1 (which hides iterates), or not behind
            ``LocalSGDCallback``.
    """

    def __init__(
        self,
        weights: Literal["quadratic", "linear", "uniform"] = "quadratic",
        a: float = 1.0,
        *,
        evaluate: bool = False,
    ) -> None:
        super().__init__()
        if weights not in _POWERS:
            raise ValueError(f"weights must be one of {tuple(_POWERS)}. Received: {weights!r}")
        if a < 0:
            raise ValueError(f"a must be >= 0. Received: {a!r}")
        self._power, self._a, self._evaluate = _POWERS[weights], float(a), evaluate
        self._swapped = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and ``copy.deepcopy``: the options alone, as with ``LocalSGDCallback``."""
        return {**IterateAverage(a=self._a, evaluate=self._evaluate).__dict__, "_power": self._power}

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras before everything else."""
        check_is_keras_3(model)
        super().set_model(model)

    @property
    def value(self) -> list[np.ndarray]:
        """The average, an array for each of the model's trainable weights; after training the same on all ranks."""
        return [np.array(v.numpy()) for v in self._own()]

    def swap(self) -> None:
        """Exchange the average and the model's weights; again, and they are back."""
        for average, weight in zip(self._averages, self._weights(), strict=True):
            kept = tf.identity(weight.value)
            weight.assign(average)
            average.assign(kept)
        self._swapped = not self._swapped

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """A new average, of the iterates from here on."""
        if self.model.steps_per_execution > 1:
            raise ValueError(f"IterateAverage needs steps_per_execution=1. Received: {self.model.steps_per_execution}")
        callbacks = callback_list()
        behind = callbacks[callbacks.index(self) :] if self in callbacks else []
        if any(isinstance(callback, LocalSGDCallback) for callback in behind):
            raise ValueError("IterateAverage must stand behind LocalSGDCallback in the list of callbacks.")
        self._averages = [tf.Variable(tf.zeros(w.shape, w.dtype)) for w in self._weights()]
        self._step, self._sum = 0, 0.0
        self._share = tf.Variable(0.0, dtype=tf.float64)
        self._update = tf.function(self._add_iterate, autograph=False)
        self._swapped = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """x^t, with what it weighs among all so far."""
        weight = (self._a + self._step) ** self._power
        self._step += 1
        self._sum += weight
        if weight:
            self._share.assign(np.asarray(weight / self._sum))  # TensorFlow keeps every Python number, for ever
            self._update()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validation with the average."""
        if self._evaluate and self._step:
            self._average_over_ranks()
            self.swap()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Training goes on with the weights."""
        if self._evaluate and self._step:
            self.swap()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """The average over ranks, by the sums of weights behind each."""
        self._average_over_ranks()

    def _own(self) -> Sequence[tf.Variable]:
        return [w.value for w in self._weights()] if self._swapped else self._averages

    def _weights(self) -> list[Any]:
        return self.model.trainable_variables

    def _add_iterate(self) -> None:
        for average, weight in zip(self._averages, self._weights(), strict=True):
            average.assign_add(tf.cast(self._share, average.dtype) * (weight.value - average))

    def _average_over_ranks(self) -> None:
        communicator = devices.get()
        if communicator.size == 1 or not self._averages:
            return
        on_failure = "continue" if failures.may_die() else "abort"
        averager = ModelAverager(self._averages, 1, weighting="samples", broadcast=False, on_failure=on_failure)
        averager.step(samples=self._sum)
        averager.finish()
        # In the sum over ranks every rank's part is now the same, so that it can go on.
        sums = Survivors(communicator, failures.may_die()).gather(repr(self._sum).encode())
        self._sum = float(np.mean([float(entry) for entry in sums]))
