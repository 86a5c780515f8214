"""Many small variables on a CPU, copied into one tensor and assigned back.

Thousands of them cost two TensorFlow operations each, read and assign, instead of the three that make a buffer exclusive;
or, with the compiled kernel, one operation for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_localsgd.backends.tensorflow import kernel
from hvd_localsgd.backends.tensorflow.variables import Part
from hvd_localsgd.core.layout import Block

SMALL_BYTES = 64 << 10  # up to here a copy costs less than the operations that avoid it ...
MANY = 64  # ... if there are so many that they make up for a second call into TensorFlow


class Together:
    """All the variables, which travel as one dtype, are one block. At least two: a concatenation of one is its memory."""

    writes = True

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self._wire = parts, parts[0].wire
        self._size = sum(part.size for part in parts)
        self.blocks = [Block(self._size, self._wire, whole=True)]
        self._kernel: Any = kernel.load() if {part.dtype for part in parts} <= set(kernel.DTYPES) else None
        self._packed = self._pack()

    @property
    def uses_kernel(self) -> bool:
        """Whether the compiled kernel reads and writes them."""
        return self._kernel is not None

    def _pack(self) -> tf.Tensor:
        """Many handles as one tensor: to pass each to a compiled function costs as much as a read or an assignment.

        For ``unstack`` each is there eight times: rows of a multiple of 64 bytes are taken out without copying them.
        """
        handles = tf.raw_ops.Pack(values=[part.handle for part in self.parts])
        return handles if self._kernel else tf.raw_ops.Pack(values=[handles] * 8, axis=1)

    def _handles(self, packed: bool) -> list[tf.Tensor]:
        """In a graph one by one, for TensorFlow orders operations by them; the kernel takes both."""
        if not packed:
            return [part.handle for part in self.parts]
        return [self._packed] if self._kernel else tf.unstack(self._packed)

    def read(self, packed: bool) -> list[tf.Tensor]:
        """A fresh tensor. Traceable.

        Args:
            packed: outside of a graph of the user's.
        """
        handles = self._handles(packed)
        if self._kernel:
            return [self._kernel.hvd_localsgd_read_variables(handles=handles, T=self._wire, size=self._size)]
        return [tf.concat([self._read_one(h, part) for h, part in zip(handles, self.parts, strict=True)], 0)]

    def _read_one(self, handle: tf.Tensor, part: Part) -> tf.Tensor:
        # As few operations as possible: there may be thousands of these.
        value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=part.dtype)
        value.set_shape(part.shape)
        return tf.cast(value if len(part.shape) == 1 else tf.reshape(value, [-1]), self._wire)

    def array(self, tensor: tf.Tensor) -> np.ndarray:
        """The tensor's memory: nobody else knows it."""
        return tensor._numpy()

    def write(self, tensors: Sequence[tf.Tensor], packed: bool) -> None:
        """Assign the variables. Traceable."""
        (flat,), handles = tensors, self._handles(packed)
        if self._kernel:
            self._kernel.hvd_localsgd_write_variables(handles=handles, flat=flat)
            return
        pieces = tf.split(flat, [part.size for part in self.parts])
        for handle, part, piece in zip(handles, self.parts, pieces, strict=True):
            value = piece if len(part.shape) == 1 else tf.reshape(piece, part.shape)
            tf.raw_ops.AssignVariableOp(resource=handle, value=tf.cast(value, part.dtype))
