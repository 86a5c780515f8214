"""Any Keras optimizer as the outer one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_localsgd.backends.tensorflow.variables import read, write
from hvd_localsgd.core.layout import Array, Block, Stretch
from hvd_localsgd.core.schedules import Now
from hvd_localsgd.core.stages import Stage
from hvd_localsgd.core.state import State, numbered


class KerasOuterStep(Stage):
    """x_old as variables of its own, which the optimizer moves by Delta when the whole average is there."""

    part = "outer"

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._old: list[tf.Variable] | None = None

    def start(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> None:
        """x_old is the common start; the optimizer's state goes on from training to training."""
        self._weights = [index for index, block in enumerate(blocks) if not block.kind.plain]
        values = [tf.constant(np.array(arrays[index], blocks[index].wire)) for index in self._weights]
        if self._old is None:
            self._old = [tf.Variable(value, name=f"weights_{number}") for number, value in enumerate(values)]
            self._optimizer.build(self._old)
        for old, value in zip(self._old, values, strict=True):
            old.assign(value)

    def prepare(self, now: Now, arrays: Sequence[Array]) -> None:
        """An average inside a group is no more than that."""
        self._rests = not now.world

    def close(self, arrays: Sequence[Array], averaged: Sequence[Stretch]) -> None:
        """The outer step."""
        if self._rests:
            return
        assert self._old is not None
        averages = [
            np.asarray(arrays[index], old.dtype.as_numpy_dtype)
            for index, old in zip(self._weights, self._old, strict=True)
        ]
        deltas = [old - tf.constant(average) for old, average in zip(self._old, averages, strict=True)]
        self._optimizer.apply_gradients(list(zip(deltas, self._old, strict=True)))
        for index, old in zip(self._weights, self._old, strict=True):
            arrays[index][:] = old.numpy()

    def state(self) -> State:
        """x_old and the optimizer's variables."""
        return numbered("variable", [read(variable) for variable in self._kept()])

    def load(self, state: State) -> None:
        """The inverse."""
        for number, variable in enumerate(self._kept()):
            write(variable, state[f"variable/{number}"])

    def _kept(self) -> list[Any]:
        return [*(self._old or []), *self._optimizer.variables]
