"""The other callbacks of a training that averages.

Who only writes does so on rank 0 alone: all ranks with the same path would write into each other's files. What ``BackupAndRestore`` has
found on rank 0 all ranks get. ``History`` and the progress bar are shown the user's metrics, and not all that is measured beside them.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from keras.callbacks import BackupAndRestore, Callback, CallbackList, History, ProgbarLogger

from hvd_localsgd import devices
from hvd_localsgd.backends.tensorflow.variables import describe, read, write
from hvd_localsgd.core import agreement, failures, header, protocol
from hvd_localsgd.core.progress import BEGIN
from hvd_localsgd.core.timing import Recorded
from hvd_localsgd.frontends import keras_state
from hvd_localsgd.frontends.logs import SHOWN

_NAMES = ("CSVLogger", "ModelCheckpoint", "OrbaxCheckpoint", "RemoteMonitor", "TensorBoard")
WRITERS = tuple(getattr(keras.callbacks, name) for name in _NAMES if hasattr(keras.callbacks, name))
_Callback = TypeVar("_Callback", bound=Callback)


def every_rank(callback: _Callback) -> _Callback:
    """Marks a callback that writes files, and hands it back: it acts on every rank. Give it another path on each.

    Without it ``ModelCheckpoint``, ``CSVLogger``, ``TensorBoard``, ``RemoteMonitor`` and ``OrbaxCheckpoint``, and what is derived from
    them, act on rank 0 alone; ``BackupAndRestore`` writes and reads there, and all ranks get what it has read.

    Raises:
        TypeError: it is no Keras callback.
    """
    if not isinstance(callback, Callback):
        raise TypeError(f"every_rank takes a keras.callbacks.Callback. Received: {callback!r}")
    callback.acts_on_every_rank = True
    return callback


@functools.cache
def install() -> None:
    """For every list of callbacks: Keras tells callbacks nothing of each other, and a TensorBoard writes before training begins.

    So the class is changed, for good; a list in which nothing of ours trains stays what it was.
    """
    set_model = CallbackList.set_model

    @functools.wraps(set_model)
    def arrange_and_set_model(self: Any, model: Any) -> None:
        if model is not None and (front := _front_end(self.callbacks, model)) is not None:
            self.callbacks = _arranged(self.callbacks, front)
        set_model(self, model)

    CallbackList.set_model = arrange_and_set_model


def _front_end(callbacks: Sequence[Callback], model: Any) -> Recorded | None:
    """The callback or the optimizer that averages, in ``fit``."""
    found = [each for each in callbacks if isinstance(each, Recorded)]
    if any(isinstance(each, History) for each in callbacks):  # which evaluate and predict do not have
        optimizers = [each for outer in keras_state.optimizers(model) for each in keras_state.wrapped(outer)]
        found += [each for each in optimizers if isinstance(each, Recorded)]
    return found[0] if found else None


def _arranged(callbacks: Sequence[Callback], front: Any) -> list[Callback]:
    """The list as this rank is to call it."""
    arranged: list[Callback] = []
    silent: list[Callback] = []
    on_rank_0 = devices.get().rank == 0
    for callback in callbacks:
        marked = hasattr(callback, "acts_on_every_rank")
        restores = isinstance(callback, BackupAndRestore) and not marked
        writes = isinstance(callback, (*WRITERS, ProgbarLogger)) and not marked
        if (writes or restores) and not on_rank_0:
            silent.append(callback)
        elif isinstance(callback, History | ProgbarLogger) and front in arranged and not isinstance(callback, _Without):
            arranged.append(_without(callback, front, SHOWN if isinstance(callback, ProgbarLogger) else ()))
        else:
            arranged.append(callback)
        if restores:
            arranged.append(_FromRank0(callback, front))
    return [*arranged, _Silent(silent)] if silent else arranged


class _Without:
    """In front of a callback's own class: it is not shown what a ``LocalSGDCallback`` has added to an epoch's logs; those behind it are."""

    _front: Any
    _shown: Sequence[str]
    # The callback's own method: it, and not what stands for it, is what History leaves as model.history.
    _see: Callable[..., None]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs if logs is not None else {}
        added = self._front.epochs[-1] if self._front.epochs else {}
        taken = {name: logs.pop(name) for name in added if name in logs and name not in self._shown}
        self._see(epoch, logs)
        logs.update(taken)


def _without(callback: Callback, front: Any, shown: Sequence[str]) -> Callback:
    """The same callback, seen by Keras through a class of ours: one call more at an epoch's end, and none at a step."""
    own = type(callback)
    facts = {"_front": front, "_shown": shown, "_see": callback.on_epoch_end}
    stand_in: Callback = object.__new__(type(own.__name__, (_Without, own), facts))
    stand_in.__dict__ = callback.__dict__
    return stand_in


class _Silent(Callback):
    """Stands for the callbacks that act on rank 0 alone, on another rank."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        super().__init__()
        self._names = sorted({type(each).__name__ for each in callbacks if not isinstance(each, ProgbarLogger)})

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ranks are counted anew when one has died."""
        if self._names and devices.get().rank == 0:
            warnings.warn(
                f"Rank 0 has died, and what it alone wrote nobody writes any more: {', '.join(self._names)}.",
                stacklevel=2,
            )
            self._names = []


class _FromRank0(Callback):
    """Behind a ``BackupAndRestore``, on every rank: all get what it has restored on rank 0, and begin with the same epoch.

    Of random seeds each rank keeps its own: with rank 0's all would draw the same dropout masks.
    """

    def __init__(self, backup: Any, front: Any) -> None:
        super().__init__()
        self._folder, self._front = str(backup.backup_dir), front

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        communicator, model = devices.get(), self.model
        if communicator.size == 1:
            return
        if model.built and model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)  # as BackupAndRestore does
        optimizers = keras_state.optimizers(model)
        variables = [*model.variables, *(v for each in optimizers for v in each.variables)]
        variables = [v for v in variables if "seed_generator_state" not in getattr(v, "path", "")]
        description = json.dumps([{"callback": "BackupAndRestore"}, [], [describe(each) for each in variables]])
        with failures.together(None):
            own = header.row(model=agreement.fingerprint(description), position=BEGIN)
            protocol.agree(communicator, own, description)
            found = json.dumps([tf.io.gfile.exists(self._folder), model._initial_epoch])
            restored, model._initial_epoch = json.loads(communicator.gather(found.encode())[0])
            if not restored:
                return
            for variable in variables:
                value = read(variable)
                same = agreement.from_rank_0(value.reshape(-1).view(np.uint8), communicator)
                if same is not None:
                    write(variable, same.view(value.dtype).reshape(value.shape))
        if not isinstance(self._front, Callback):  # a loaded optimizer of ours begins a training with its next step
            self._front.go_on({})
