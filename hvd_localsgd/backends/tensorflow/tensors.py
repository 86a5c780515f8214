"""Variables anywhere, as one flat tensor: those on a GPU, replicas of a tf.distribute strategy, scalars."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_localsgd.backends.tensorflow.variables import Part
from hvd_localsgd.core.layout import Array, Block


class Tensors:
    """All the variables, which travel as one dtype, are one block, where they lie or in the host's memory.

    Args:
        parts: the variables; replicas inside this rank count as their mean.
        on_device: hand out the tensor itself, for a communicator that takes it.
    """

    writes = True

    def __init__(self, parts: Sequence[Part], on_device: bool) -> None:
        self.parts, self._wire, self._on_device = parts, parts[0].wire, on_device
        self.blocks = [Block(sum(part.size for part in parts), self._wire, whole=True)]

    def read(self, packed: bool) -> list[tf.Tensor]:
        """One tensor. Traceable."""
        return [tf.concat([self._read_one(part) for part in self.parts], 0)]

    def _read_one(self, part: Part) -> tf.Tensor:
        reads = [tf.raw_ops.ReadVariableOp(resource=c.handle, dtype=part.dtype) for c in part.components]
        values = [tf.cast(tf.raw_ops.Reshape(tensor=value, shape=[-1]), self._wire) for value in reads]
        return values[0] if len(values) == 1 else tf.add_n(values) / len(values)

    def array(self, tensor: tf.Tensor) -> Array:
        """The tensor, or a copy in the host's memory (``_numpy`` makes one of a tensor that is not there)."""
        if self._on_device:
            return tensor
        return tensor._numpy() if "GPU" in tensor.device else tensor.numpy()

    def write(self, tensors: Sequence[tf.Tensor], packed: bool) -> None:
        """Assign the variables, every replica. Traceable."""
        (flat,) = tensors
        for part, piece in zip(self.parts, tf.split(flat, [part.size for part in self.parts]), strict=True):
            value = tf.cast(tf.raw_ops.Reshape(tensor=piece, shape=part.shape), part.dtype)
            for component in part.components:
                tf.raw_ops.AssignVariableOp(resource=component.handle, value=value)
