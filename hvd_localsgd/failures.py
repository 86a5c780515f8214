"""A rank that fails must not leave the others waiting: it tells them, they raise too, the job ends non-zero."""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
import weakref
from types import TracebackType
from typing import Protocol

import numpy as np

from hvd_localsgd import header
from hvd_localsgd.communicators import Communicator

TELL_SECONDS = 5.0  # how long a failing rank waits for the others to come to a sync and hear of it


class Trainer(Protocol):
    """Somebody the other ranks are counting on: an engine between its first and its last sync."""

    def leave(self) -> None:
        """The process is about to end without an error."""


_training: weakref.WeakSet[Trainer] = weakref.WeakSet()
_communicator: Communicator | None = None


def begin(trainer: Trainer) -> None:
    """From now on the other ranks count on this one."""
    _training.add(trainer)


def end(trainer: Trainer) -> None:
    """All ranks have finished, or all have failed."""
    _training.discard(trainer)


def install(communicator: Communicator) -> None:
    """Make an uncaught error end the whole job. Called by ``init``."""
    global _communicator
    if _communicator is not None or communicator.size == 1:
        return
    _communicator = communicator
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        end_job(communicator, error)

    sys.excepthook = excepthook
    atexit.register(_leave_all)


def end_job(communicator: Communicator, error: BaseException) -> None:
    """Tell the other ranks, let every rank print its own error, then stop the launcher and all it started."""
    name = f"rank {communicator.rank} on {communicator.host}"
    print(f"hvd_localsgd: {name} ends the job ({type(error).__name__})", file=sys.stderr, flush=True)
    heard = communicator.failed
    with contextlib.suppress(Exception):  # whatever goes wrong here, abort is what remains
        if not heard and not communicator.busy:
            heard = header.tell_failure(communicator, error, TELL_SECONDS)
        if heard:
            communicator.exchange(np.zeros((), np.uint8), timeout=TELL_SECONDS)
            time.sleep(0.2)
    sys.stdout.flush()
    sys.stderr.flush()
    communicator.abort()


def _leave_all() -> None:
    for trainer in list(_training):
        trainer.leave()
