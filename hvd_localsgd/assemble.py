"""Settings become parts, here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.core import guards, protocol, reducers, stages
from hvd_localsgd.core.engine import LocalSGD
from hvd_localsgd.core.outer import Mean, Outer, OuterStep
from hvd_localsgd.core.pipeline import Memory, Pipeline
from hvd_localsgd.core.reducers import Reducer
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.core.variates import Variates


def memory(
    communicator: Communicator,
    averaged: Sequence[Any],
    settings: Settings,
    plain: Sequence[Any] = (),
    every: Mapping[int, int] = MappingProxyType({}),
) -> Any:
    """The memory of the framework that these variables belong to.

    Args:
        communicator: whether it takes tensors decides how variables on a device are reached.
        averaged: numpy arrays; or TensorFlow or Keras variables.
        settings: what the user chose.
        plain: those of them that are statistics, or state of an optimizer, and no weights.
        every: by ``id``, of those that are not averaged at each sync, how rarely.

    Raises:
        TypeError: arrays and variables are mixed, or some cannot be averaged.
        ValueError: an array is not contiguous or cannot be written to.
    """
    outer = settings.measures_change
    plain = plain if outer else ()  # else all are alike, and go together
    host = outer or settings.variance == "pooled"
    arrays = [isinstance(each, np.ndarray) for each in averaged]
    if arrays and all(arrays):
        from hvd_localsgd.backends.numpy import NumpyMemory

        return NumpyMemory(averaged, plain)
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
    return TensorFlowMemory(averaged, plain, every, on_device=communicator.takes_tensors and not host)


def variates(settings: Settings) -> Variates | None:
    """What corrects gradients, if the settings say so: a stage of the engine, which a front end asks for its corrections."""
    return Variates() if settings.control_variates else None


def engine(
    settings: Settings,
    communicator: Communicator,
    memory: Memory,
    timings: Timings,
    *,
    finish_at_exit: bool,
    pairs: Sequence[tuple[Any, Any]] = (),
    variates: Variates | None = None,
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
        pairs: variables that hold means, and those that hold the variances around them.
        variates: as ``variates`` has made them.
        reducer: makes the reducer; None: the fastest is measured.
    """
    outer = _outer_steps(settings)
    if settings.variance == "pooled" and pairs:
        outer.append(stages.PooledVariance([(memory.place(mean), memory.place(variance)) for mean, variance in pairs]))
    outer += [] if variates is None else [variates]
    alone = settings.mode == "async" and communicator.size > 1

    def choose(payload: int) -> Reducer | None:
        if communicator.size == 1:
            return reducers.fastest(communicator, payload) if outer else None
        if reducer is not None:
            return reducer(communicator)
        fastest = reducers.fastest(communicator, payload)
        return reducers.OneSided(communicator, fastest.chunk_bytes) if alone else fastest

    coordination = (protocol.Alone if alone else protocol.Together)(communicator, settings)
    pipeline = Pipeline(memory, choose, outer, [stages.Progress()] if alone else [], timings)
    return LocalSGD(settings, communicator, coordination, pipeline, timings, finish_at_exit)


def _outer_steps(settings: Settings) -> list[stages.Stage]:
    """On the way back from the last to the first: the anchor, the outer step, and what the anchor moves to."""
    steps: list[stages.Stage] = []
    if isinstance(settings.outer, Outer):
        steps += [] if isinstance(settings.outer, Mean) else [OuterStep(settings.outer)]
    else:
        from hvd_localsgd.backends.tensorflow.outer import KerasOuterStep

        steps.append(KerasOuterStep(settings.outer))
    if settings.guard is None and settings.clip_change is None:
        return steps
    anchor = guards.Anchor(settings.clip_change)
    return [guards.AnchorMoves(anchor), *steps, anchor]
