"""What a checkpoint keeps of a loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.core.pipeline import Memory
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.state import State, below, draw_as, drawn, numbered, under


class Loop:
    """A ``core.keeper.Source``.

    Args:
        settings: what the user chose.
        communicator: of all ranks.
        memory: what is averaged, where it is no list of variables.
        variables: numpy arrays, or variables of TensorFlow or Keras.
    """

    def __init__(
        self, settings: Settings, communicator: Communicator, memory: Memory | None, variables: Sequence[Any]
    ) -> None:
        self._settings, self._communicator = settings, communicator
        self._memory, self._variables = memory, list(variables)

    def facts(self) -> dict[str, Any]:
        """Settings, and the shapes of all that is kept."""
        described = [list(each) for each in self._memory.description()] if self._memory is not None else []
        described += [[list(each.shape), str(getattr(each.dtype, "name", each.dtype))] for each in self._variables]
        return {**self._settings.of_results(), "variables": described}

    def state(self) -> State:
        """Values, and where Python's and numpy's random numbers come from."""
        kept = numbered("variable", [_read(each) for each in self._variables]) | under("random", drawn())
        if self._memory is not None:
            with self._memory.open() as arrays:
                kept |= numbered("block", [np.array(array) for array in arrays])
        return kept

    def load(self, state: State, ranks: int) -> list[str]:
        """Into the same arrays and variables; ranks that were not there go on with random numbers of their own."""
        for number, variable in enumerate(self._variables):
            _write(variable, state[f"variable/{number}"])
        if self._memory is not None:
            with self._memory.open() as arrays:
                for number, array in enumerate(arrays):
                    array[...] = state[f"block/{number}"]
        if self._communicator.rank < ranks:
            draw_as(below("random", state))
        return []


def _read(variable: Any) -> np.ndarray:
    if isinstance(variable, np.ndarray):
        return variable
    from hvd_localsgd.backends.tensorflow.variables import read

    return read(variable)


def _write(variable: Any, value: np.ndarray) -> None:
    if isinstance(variable, np.ndarray):
        variable[...] = value
        return
    from hvd_localsgd.backends.tensorflow.variables import write

    write(variable, value)
