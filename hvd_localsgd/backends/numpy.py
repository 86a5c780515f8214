"""Numpy arrays, changed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from hvd_localsgd.core import agreement
from hvd_localsgd.core.layout import Block, Kind


class NumpyMemory:
    """A ``core.pipeline.Memory`` of arrays.

    Args:
        arrays: what is averaged: contiguous, writable, of a floating dtype; float16 travels as float32.
        kinds: by ``id``, of those that are not ordinary weights, what they are.

    Raises:
        ValueError: an array is not contiguous or cannot be written to.
        TypeError: an array is not of a floating dtype.
    """

    def __init__(self, arrays: Sequence[np.ndarray], kinds: Mapping[int, Kind] = MappingProxyType({})) -> None:
        for number, array in enumerate(arrays):
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError(
                    f"array {number}, of shape {array.shape}, must be contiguous and writable: pass a copy."
                )
            if array.dtype not in (np.float16, np.float32, np.float64):
                raise TypeError(
                    f"Only float16, float32 and float64 can be averaged. Received: array {number} of {array.dtype}"
                )
        self._arrays = list(arrays)
        self.prepare((), lambda: None)
        wires = [np.dtype(np.float64 if array.dtype == np.float64 else np.float32) for array in arrays]
        self.blocks = [
            Block(a.size, wire, a.dtype == wire, kinds.get(id(a), Kind()))
            for a, wire in zip(arrays, wires, strict=True)
        ]

    def prepare(self, start: Sequence[np.ndarray], reset_state: Callable[[], None]) -> None:
        """As ``TensorFlowMemory.prepare``."""
        self._start, self._reset_state = list(start), reset_state

    def clear(self, arrays: list[np.ndarray]) -> None:
        """In place."""
        for array in arrays:
            array[:] = 0

    def restart(self) -> None:
        """The optimizer is the loop's own."""

    def settle(self, world: bool) -> None:
        """As it was prepared."""
        if world:
            self._reset_state()

    def description(self) -> list[list[Any]]:
        """Arrays have no names."""
        return [["", list(array.shape), array.dtype.name] for array in [*self._arrays, *self._start]]

    def place(self, variable: np.ndarray) -> tuple[int, int, int]:
        """A block is an array."""
        (number,) = (number for number, array in enumerate(self._arrays) if array is variable)
        return number, 0, variable.size

    def name(self, block: int, element: int) -> str:
        """Arrays have none: its number."""
        return f"array {block}"

    def broadcast(self, communicator: Any, as_far: bool = False) -> bool:
        """Into the arrays."""
        received = [(array, agreement.from_rank_0(array.reshape(-1), communicator)) for array in self._start]
        changed = {id(array) for array, value in received if value is not None}
        for array, value in received:
            if value is not None:
                array.reshape(-1)[:] = value
        return any(id(array) in changed for array in self._arrays)

    def is_finite(self) -> bool:
        """The smallest."""
        sized = [array for array in self._arrays if array.size]
        return not sized or bool(np.isfinite(min(sized, key=lambda array: array.size)).all())

    @contextmanager
    def open(self) -> Iterator[list[np.ndarray]]:
        """The arrays themselves."""
        yield [array.reshape(-1) for array in self._arrays]
