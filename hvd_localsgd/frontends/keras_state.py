"""What of a Keras model and its optimizer is averaged, and what is left alone."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from hvd_localsgd.backends.tensorflow.variables import components, floats


def of_model(model: keras.Model) -> list[keras.Variable]:
    """Trainable weights, and the float statistics that training changes (BatchNorm's moving mean and variance).

    Left alone: integers (counters, random seeds, which must differ by rank) and frozen weights, which
    nobody changes. Order: as the model lists them.
    """
    frozen = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables if not v.trainable}
    statistics = [v for v in model.non_trainable_variables if id(v) not in frozen]
    return floats([*model.trainable_variables, *statistics])


class State:
    """The optimizer's float state (momentum, moments), without rates, counters and moving averages of weights.

    Args:
        optimizer: a built Keras optimizer, or None for an empty state.
    """

    def __init__(self, optimizer: Any = None) -> None:
        inner = innermost(optimizer)
        own = optimizer.variables if optimizer is not None else []
        others = {id(v) for v in (*moving_averages(optimizer), *(getattr(inner, "_accumulated_gradients", None) or []))}
        self.variables = [v for v in floats(own) if id(v) not in others and len(v.shape) > 0]
        filled = getattr(inner, "_accumulators", [])  # Adagrad's and Ftrl's accumulators do not start at zero
        self._initial = {id(v): inner.initial_accumulator_value for v in filled}

    def reset(self) -> None:
        """What the optimizer starts with; its iterations and learning-rate schedule go on."""
        for variable in self.variables:
            for part in components(variable):
                part.assign(tf.fill(part.shape, tf.cast(self._initial.get(id(variable), 0.0), part.dtype)))


def moving_averages(optimizer: Any) -> list[Any]:
    """The moving averages of the weights that ``use_ema=True`` keeps (empty without)."""
    kept = getattr(innermost(optimizer), "_model_variables_moving_average", None) or []
    return [v for v in kept if v is not None]


def innermost(optimizer: Any) -> Any:
    """The optimizer inside all wrappers (loss scaling, ours)."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer
