"""Settings become parts, here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from hvd_localsgd.backends import native
from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.core import compression, guards, protocol, reducers, stages
from hvd_localsgd.core.averages import Averages
from hvd_localsgd.core.compression import Encoded
from hvd_localsgd.core.engine import LocalSGD
from hvd_localsgd.core.groups import Grouped
from hvd_localsgd.core.layout import Kind
from hvd_localsgd.core.outer import Mean, Outer, OuterStep
from hvd_localsgd.core.overlap import Overlapped
from hvd_localsgd.core.pipeline import Memory, Pipeline
from hvd_localsgd.core.reducers import Library, Reducer, Ring
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.survivors import Survivors
from hvd_localsgd.core.timing import Timings
from hvd_localsgd.core.variates import Variates
from hvd_localsgd.errors import CommunicatorError


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
    kinds = _kinds(averaged, settings, plain, every)
    arrays = [isinstance(each, np.ndarray) for each in averaged]
    if arrays and all(arrays):
        from hvd_localsgd.backends.numpy import NumpyMemory

        return NumpyMemory(averaged, kinds)
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
    return TensorFlowMemory(averaged, kinds, on_device=communicator.takes_tensors and not settings.parts_weights)


def _kinds(
    averaged: Sequence[Any], settings: Settings, plain: Sequence[Any], every: Mapping[int, int]
) -> dict[int, Kind]:
    """By ``id``; all alike, and together, if nothing is made of the difference."""
    apart = set(map(id, plain)) if settings.parts_weights else set()
    kinds = {}
    for variable in averaged:
        own = id(variable)
        size = int(np.prod(variable.shape))
        exact = settings.compression is not None and (own in apart or size < compression.SMALL)
        kinds[own] = Kind(own in apart, exact, every.get(own, 1))
    return kinds


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
    count_pending: Callable[[], None] = lambda: None,
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
        count_pending: tells the engine of steps that it has not been told of yet.

    Raises:
        CommunicatorError: overlap needs a second thread, which may not call this MPI library.
    """
    if reducer is not None and (settings.groups is not None or settings.compression is not None):
        raise ValueError("groups and compression are reducers themselves: leave reducer as it is.")
    outer = _outer_steps(settings)
    if settings.variance == "pooled" and pairs:
        outer.append(stages.PooledVariance([(memory.place(mean), memory.place(variance)) for mean, variance in pairs]))
    outer += [] if variates is None else [variates]
    alone = settings.mode == "async" and communicator.size > 1
    through = _Channels(communicator, settings)

    def choose(payload: int) -> Reducer | None:
        if communicator.size == 1:
            return reducers.fastest(through.all(), payload) if outer else None
        if reducer is not None:
            return reducer(through.all())
        fastest = reducers.fastest(communicator, payload)
        if alone:
            return reducers.OneSided(communicator, fastest.chunk_bytes)
        return through.reducer(fastest)

    coordination = (protocol.Alone if alone else protocol.Together)(communicator, settings)
    more: list[stages.Stage] = [stages.Progress()] if alone else []
    if settings.compression is not None and communicator.size > 1:
        anchor = next(stage for stage in outer if isinstance(stage, guards.Anchor))
        more.append(guards.Change(anchor))
    survivors = Survivors(communicator, settings.on_failure == "continue")
    kind = Overlapped if settings.overlap else Pipeline
    pipeline = kind(memory, choose, outer, more, timings, survivors, native.scale, settings.fragments)
    averages = Averages(settings, coordination, pipeline, timings, survivors)
    return LocalSGD(settings, communicator, coordination, averages, finish_at_exit, count_pending)


# Made once: MPI has room for some thousands. Averages go one after another, so that several models can use the same.
_subgroups: WeakKeyDictionary[Communicator, dict[Any, Communicator]] = WeakKeyDictionary()


class _Channels:
    """The reducer that the settings ask for, and the communicators that it needs, which are made once for each set of ranks."""

    def __init__(self, communicator: Communicator, settings: Settings) -> None:
        if settings.overlap and not communicator.threads:
            raise CommunicatorError(
                f"overlap={settings.overlap} averages in a second thread, and MPI was initialised without MPI_THREAD_MULTIPLE. Leave "
                "mpi4py.rc.thread_level at its default ('multiple'); if it is, this MPI library has no support for threads: use another, "
                "or overlap=0."
            )
        self._communicator, self._settings = communicator, settings
        self._made = _subgroups.setdefault(communicator, {})

    def reducer(self, fastest: Library) -> Reducer:
        """Around the kind that was measured to be the fastest (collective)."""
        settings, communicator = self._settings, self.all()
        gentle = settings.overlap > 0 and not communicator.takes_tensors  # of a ring's messages each can be waited for
        kind = Ring if gentle else type(fastest)
        plain = kind(communicator, fastest.chunk_bytes)
        if settings.groups is None:
            return self._encoded(communicator, plain)
        groups = settings.groups.of_ranks(self._communicator)
        first = [group[0] for group in groups]
        inside = self._part(groups)
        across = self._part([first, *([rank] for rank in range(communicator.size) if rank not in first)])
        leaders = self._encoded(across, kind(across, fastest.chunk_bytes))
        near = (Ring if gentle else Library)(inside, fastest.chunk_bytes)
        return Grouped(communicator, near, leaders, communicator.rank in first)

    def all(self) -> Communicator:
        """Of all ranks; with overlap not the one that the training thread uses (then collective)."""
        return self._part([range(self._communicator.size)]) if self._settings.overlap else self._communicator

    def _encoded(self, communicator: Communicator, plain: Library) -> Reducer:
        if self._settings.compression is None or communicator.size == 1:  # who is alone sends nothing
            return plain
        return Encoded(communicator, native.codec(self._settings.compression), plain)

    def _part(self, groups: Sequence[Sequence[int]]) -> Communicator:
        key = (
            self._communicator.generation,
            self._communicator.size,
            self._settings.overlap > 0,
            tuple(map(tuple, groups)),
        )
        if key not in self._made:
            self._made[key] = self._communicator.subgroup(groups)
            self._made[key].beside = self._settings.overlap > 0
        return self._made[key]


def _outer_steps(settings: Settings) -> list[stages.Stage]:
    """On the way back from the last to the first: the anchor, the outer step, and what the anchor moves to."""
    steps: list[stages.Stage] = []
    if isinstance(settings.outer, Outer):
        steps += [] if isinstance(settings.outer, Mean) else [OuterStep(settings.outer)]
    else:
        from hvd_localsgd.backends.tensorflow.outer import KerasOuterStep

        steps.append(KerasOuterStep(settings.outer))
    if not settings.has_anchor:
        return steps
    anchor = guards.Anchor(settings.clip_change)
    return [guards.AnchorMoves(anchor), *steps, anchor]
