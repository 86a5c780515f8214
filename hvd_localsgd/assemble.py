"""Settings become parts, here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.core import protocol, reducers, stages
from hvd_localsgd.core.engine import LocalSGD
from hvd_localsgd.core.pipeline import Memory, Pipeline
from hvd_localsgd.core.reducers import Reducer
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.timing import Timings


def memory(communicator: Communicator, averaged: Sequence[Any]) -> Any:
    """The memory of the framework that these variables belong to.

    Args:
        communicator: whether it takes tensors decides how variables on a device are reached.
        averaged: numpy arrays; or TensorFlow or Keras variables.

    Raises:
        TypeError: arrays and variables are mixed, or some cannot be averaged.
        ValueError: an array is not contiguous or cannot be written to.
    """
    arrays = [isinstance(each, np.ndarray) for each in averaged]
    if arrays and all(arrays):
        from hvd_localsgd.backends.numpy import NumpyMemory

        return NumpyMemory(averaged)
    if any(arrays):
        raise TypeError("Give numpy arrays, or variables of TensorFlow or Keras, but not both.")
    from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
    from hvd_localsgd.backends.tensorflow.variables import floats

    kept = set(map(id, floats(averaged)))
    for number, variable in enumerate(averaged):
        if id(variable) not in kept:  # its mean would be cut to an integer, in silence
            raise TypeError(
                f"Only variables of a floating dtype can be averaged. Received: variable {number} of {variable.dtype}"
            )
    return TensorFlowMemory(averaged, on_device=communicator.takes_tensors)


def engine(
    settings: Settings,
    communicator: Communicator,
    memory: Memory,
    timings: Timings,
    *,
    finish_at_exit: bool,
    reducer: Callable[[Communicator], Reducer] | None = None,
) -> LocalSGD:
    """The engine that does what the settings say.

    Args:
        settings: what the user chose.
        communicator: through what.
        memory: of what is averaged.
        timings: where the rounds are kept.
        finish_at_exit: a process that ends in good order without ``finish`` waits for the others; if False, it
            has left them in the middle of something, and the job ends with an error.
        reducer: makes the reducer; None: the fastest is measured.
    """
    alone = settings.mode == "async" and communicator.size > 1

    def choose(payload: int) -> Reducer | None:
        if communicator.size == 1:
            return None
        if reducer is not None:
            return reducer(communicator)
        fastest = reducers.fastest(communicator, payload)
        return reducers.OneSided(communicator, fastest.chunk_bytes) if alone else fastest

    coordination = (protocol.Alone if alone else protocol.Together)(communicator, settings)
    pipeline = Pipeline(memory, choose, [stages.Progress()] if alone else [], timings)
    return LocalSGD(settings, communicator, coordination, pipeline, timings, finish_at_exit)
