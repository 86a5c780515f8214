"""What there is to know about a TensorFlow or Keras variable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def components(variable: Any) -> list[tf.Variable]:
    """The TensorFlow variables behind a variable: one, or one per replica under a tf.distribute strategy."""
    inner = variable.value if isinstance(variable, keras.Variable) else variable
    values = getattr(inner, "values", None)
    return list(values) if isinstance(values, tuple | list) else [inner]


def floats(variables: Sequence[Any]) -> list[Any]:
    """Those of a floating dtype (bfloat16 included), each once, in order."""
    unique = {id(v): v for v in variables}
    return [v for v in unique.values() if tf.as_dtype(v.dtype).is_floating]


def describe(variable: Any) -> list[Any]:
    """``[name, shape, dtype]``, the same on two ranks that built the same model.

    Names are without the numbers that Keras adds ("dense_3"): they count layers made, not layers used.
    """
    name = re.sub(r"_\d+(?=[_/:]|$)", "", getattr(variable, "path", variable.name))
    return [name, list(variable.shape), tf.as_dtype(variable.dtype).name]


def read(variable: Any) -> np.ndarray:
    """Its value, of any dtype; of a strategy's replicas the first's."""
    return np.asarray(components(variable)[0].numpy())


def write(variable: Any, value: np.ndarray) -> None:
    """Into all replicas. ``value``: as ``read`` gave it; from a file bfloat16 and the like come as bytes of no known dtype."""
    for part in components(variable):
        dtype = part.dtype.base_dtype.as_numpy_dtype
        part.assign(value.view(dtype) if value.dtype.kind == "V" else value)


def finish_device_work() -> None:
    """Wait until GPUs have done what they were given, so that the time that follows is counted to the next part."""
    if tf.config.list_logical_devices("GPU"):
        tf.test.experimental.sync_devices()


class Part:
    """A TensorFlow variable that is averaged, with what is asked about it at every sync kept at hand."""

    def __init__(self, variable: Any) -> None:
        self.variable, self.components = variable, components(variable)
        first = self.components[0]
        self.name: str = getattr(variable, "path", variable.name)
        self.shape = tuple(first.shape)
        self.size = int(np.prod(self.shape))
        self.dtype = first.dtype.base_dtype
        self.wire = np.dtype(np.float64 if self.dtype == tf.float64 else np.float32)

    @property
    def handle(self) -> tf.Tensor:
        """Of the only component."""
        return self.components[0].handle
