"""Variables on a CPU, averaged in their own memory: no copy of the model is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from hvd_localsgd.backends.tensorflow.variables import Part
from hvd_localsgd.core.layout import Block


class InPlace:
    """Each variable is a block.

    Safe because ``read`` first makes every buffer the variable's alone, and because no view outlives the sync.
    """

    writes = False

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.blocks = [Block(part.size, part.wire, part.dtype.as_numpy_dtype == part.wire) for part in parts]

    def read(self, packed: bool) -> list[tf.Tensor]:
        """Tensors that *are* the variables' memory. Traceable.

        An empty slice assignment makes TensorFlow copy a shared buffer (a tensor that the user holds, or another variable,
        shares it), as it does before any update in place; it also turns on copy-on-read, which is turned off again so that
        reads stay free.
        """
        tensors = []
        zero, one = tf.constant([0]), tf.constant([1])
        for part in self.parts:
            nothing = tf.constant(np.empty((0, *part.shape[1:]), part.dtype.as_numpy_dtype))
            tf.raw_ops.ResourceStridedSliceAssign(ref=part.handle, begin=zero, end=zero, strides=one, value=nothing)
            tf.raw_ops.DisableCopyOnRead(resource=part.handle)
            tensors.append(tf.raw_ops.ReadVariableOp(resource=part.handle, dtype=part.dtype))
        return tensors

    def array(self, tensor: tf.Tensor) -> np.ndarray:
        """The memory."""
        return tensor._numpy().reshape(-1)

    def write(self, tensors: Sequence[tf.Tensor], packed: bool) -> None:
        """They are there already."""
