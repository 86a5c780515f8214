"""What is kept of a training: arrays by name. Names of parts are put before those of what they keep, with a slash."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

State = dict[str, np.ndarray]


def under(name: str, state: Mapping[str, np.ndarray]) -> State:
    """As a part of something larger."""
    return {f"{name}/{key}": array for key, array in state.items()}


def below(name: str, state: Mapping[str, np.ndarray]) -> State:
    """The inverse: what this part has kept; nothing, if it has not."""
    start = name + "/"
    return {key.removeprefix(start): array for key, array in state.items() if key.startswith(start)}


def numbered(name: str, arrays: Sequence[np.ndarray]) -> State:
    """A list of arrays."""
    return {f"{name}/{number}": array for number, array in enumerate(arrays)}


def put_back(name: str, state: Mapping[str, np.ndarray], arrays: Sequence[np.ndarray]) -> None:
    """The inverse, into arrays of the same shapes."""
    for number, array in enumerate(arrays):
        array[...] = state[f"{name}/{number}"]


def words(value: Any) -> np.ndarray:
    """What JSON takes, as an array of bytes; floats come back to the bit."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def value(array: np.ndarray) -> Any:
    """The inverse."""
    return json.loads(array.tobytes())


def drawn() -> State:
    """Where the random numbers of Python and numpy come from next."""
    state: Any = np.random.get_state(legacy=True)
    return {"python": words(random.getstate()), "numpy": words([state[0], state[1].tolist(), *state[2:]])}


def draw_as(state: Mapping[str, np.ndarray]) -> None:
    """The inverse."""
    random.setstate(as_tuple(value(state["python"])))
    np.random.set_state(tuple(value(state["numpy"])))


def as_tuple(value: Any) -> Any:
    """Lists, which JSON knows, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value
