"""Where all random numbers of a process come from, besides layers' own seeds, which are variables of a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops

from hvd_localsgd.backends.tensorflow.variables import read, write
from hvd_localsgd.core.state import State, as_tuple, below, draw_as, drawn, under, value, words


def state() -> State:
    """Of Python, numpy, TensorFlow (eager operations and the global generator) and Keras."""
    kept = under("drawn", drawn())
    eager = getattr(context.context(), "_rng", None)
    if eager is not None:  # a seed was set
        kept["tensorflow"] = words(eager.getstate())
    return kept | {f"generator/{name}": read(variable) for name, variable in _generators().items()}


def load(kept: State) -> None:
    """The inverse."""
    draw_as(below("drawn", kept))
    eager = getattr(context.context(), "_rng", None)
    if eager is not None and "tensorflow" in kept:
        eager.setstate(as_tuple(value(kept["tensorflow"])))
    found = below("generator", kept)
    for name, variable in _generators(found).items():
        if name in found:
            write(variable, found[name])


def is_seeded() -> bool:
    """Whether TensorFlow's random operations, the shuffles of its data among them, are the same in another process."""
    return context.global_seed() is not None


def _generators(wanted: Collection[str] = ()) -> dict[str, Any]:
    """Those that exist, or are wanted."""
    found: dict[str, Any] = {}
    if "tensorflow" in wanted or stateful_random_ops.global_generator is not None:
        found["tensorflow"] = tf.random.get_global_generator().state
    if "keras" in wanted or global_state.get_global_attribute(GLOBAL_SEED_GENERATOR) is not None:
        found["keras"] = global_seed_generator().state
    return found
