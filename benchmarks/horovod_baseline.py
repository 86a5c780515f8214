"""What Horovod does today, made to work on Keras 3: gradients averaged by its core operations at every step.

Horovod's own ``DistributedOptimizer`` averages nothing on Keras 3, and says nothing. This is the baseline of the benchmarks,
and a stepping stone for those who migrate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf


def average_gradients(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The same optimizer, whose ``apply`` first averages the gradients over all ranks (parallel SGD, H = 1).

    Horovod fuses the tensors of one step. Not for XLA: compile with ``jit_compile=False``.
    """

    class HorovodOptimizer(type(optimizer)):  # type: ignore[misc]
        def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
            grads = hvd.grouped_allreduce([tf.convert_to_tensor(g) for g in grads], op=hvd.Average)
            super().apply(grads, trainable_variables)

    return HorovodOptimizer.from_config(optimizer.get_config())


class BroadcastFromRank0(keras.callbacks.Callback):
    """All ranks start with rank 0's weights and optimizer state."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """One broadcast per variable."""
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        for i, variable in enumerate([*self.model.variables, *self.model.optimizer.variables]):
            value = hvd.broadcast(tf.convert_to_tensor(np.array(variable.numpy())), 0, name=f"broadcast.{i}")
            variable.assign(value)
