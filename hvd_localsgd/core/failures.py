"""A rank that fails, or leaves, must not leave the others waiting: it tells them, they raise too, the job ends non-zero.

The rank that failed shows its traceback. The others, to whom it is news, say one line; what all ranks raise alike rank 0 shows. The
job's status is that of the rank that failed: what it gave to ``sys.exit``, 130 after Ctrl-C, otherwise 1.

Every way out of a process but its death takes part in one last exchange of headers, which says "left". Where all ranks leave
that is the end; a rank that waits for one that has left raises, naming it.

What is kept here is kept for the process: whether it is in the middle of something with the other ranks, whether they know
already that the job has failed, and who the other ranks count on.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Protocol

import numpy as np

from hvd_localsgd.core import header
from hvd_localsgd.errors import CheckpointError, Preempted, RankDied, RankFailed, RanksDiffer

_ALIKE = (RankFailed, RanksDiffer, CheckpointError)  # raised on all ranks alike
TELL_SECONDS = 5.0  # how long a failing rank waits for the others to come to a sync and hear of it


class Trainer(Protocol):
    """Somebody the other ranks are counting on: an engine between its first and its last sync.

    Attributes:
        communicator: through what.
        number: of those on this communicator.
        thread: that made it.
        goes_on: without ranks that die.
        overlaps: its averages are not waited for.
        finish_at_exit: whether a process that ends in good order in between waits for the others; if not, it has left
            them in the middle of something, and the job ends with an error.
    """

    communicator: Any
    finish_at_exit: bool
    number: int
    thread: int
    goes_on: bool
    overlaps: bool

    def finish(self) -> None:
        """Wait for the slowest rank's last sync."""

    def count_pending(self) -> None:
        """The steps that its front end has not told it of yet."""

    def synchronise(self) -> object:
        """Take part in a sync that others make."""

    def survived(self, left: Sequence[int]) -> None:
        """Other ranks have died; those with these numbers are left."""


@dataclass(slots=True)
class _Process:
    busy: bool = False  # in the middle of a sync: an error now must not start another collective call
    failed: bool = False  # all ranks know that the job has failed
    threads: bool = False  # two threads have trained at once
    goes_on: bool = False  # a rank may die
    communicator: Any = None  # of the job
    raised: BaseException | None = None  # inside a graph, out of which it comes as an error of the framework's
    pid: int = 0  # who joined it: a forked child has a copy of all this, and must neither tell others nor end the job
    status: Any = 0  # what sys.exit was given
    # Not weakly: a trainer made inside a function is collected while SystemExit unwinds, and nobody would be left to tell.
    training: dict[int, Any] = field(default_factory=dict)
    trainers: weakref.WeakKeyDictionary[Any, int] = field(default_factory=weakref.WeakKeyDictionary)  # made so far


_process = _Process()


def begin(trainer: Trainer) -> None:
    """From now on the other ranks count on this one.

    Raises:
        RuntimeError: another thread is training. Other ranks may begin the same trainings in another order, and the weights of
            two models of the same shape would meet; so both of this rank's end.
    """
    if trainer.communicator.size > 1:
        _process.threads |= any(each.thread != trainer.thread for each in _in_training(trainer.communicator))
    _check_one_thread(trainer)
    _check_one_lands(trainer)
    _process.goes_on |= trainer.goes_on
    _process.training[id(trainer)] = trainer
    _process.failed, _process.status = False, 0  # who begins has caught what came before


def end(trainer: Trainer) -> None:
    """All ranks have finished, or all have failed."""
    _process.training.pop(id(trainer), None)


def end_all(status: int) -> None:
    """All ranks leave with this exit status, whatever else they were training."""
    _process.training.clear()
    _process.status = status


def may_die() -> bool:
    """Whether a training of this process was to go on without ranks that die."""
    return _process.goes_on


def number(communicator: Any) -> int:
    """The next trainer's, of those on this communicator: the same on all its ranks, which make them in the same order."""
    counts = _process.trainers
    counts[communicator] = counts.get(communicator, 0) + 1
    return counts[communicator]


def trainer(communicator: Any, number: int) -> Trainer | None:
    """The one with that number, if the others count on it."""
    return next((each for each in _in_training(communicator) if each.number == number), None)


def survived(communicator: Any, left: Sequence[int]) -> None:
    """For all trainers on this communicator, as ``Trainer.survived``."""
    for each in _in_training(communicator):
        each.survived(left)


def _in_training(communicator: Any) -> list[Trainer]:
    """Those on this communicator that the others count on."""
    return [each for each in _process.training.values() if each.communicator is communicator]


@contextlib.contextmanager
def together(trainer: Trainer | None) -> Iterator[None]:
    """All ranks make the calls in here, for a trainer or before there is one. After an error in here nobody may start another."""
    if trainer is not None:
        _check_one_thread(trainer)
    before, _process.busy = _process.busy, True
    try:
        yield
    except _ALIKE:  # nobody waits for anybody any more
        _process.failed, _process.busy = True, False
        _process.training.pop(id(trainer), None)
        raise
    except Preempted:  # likewise, and nothing has failed
        _process.busy = False
        raise
    _process.busy = before  # a rank that waits for the end of one model may take part in a sync of another


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Around what a graph calls. A framework makes an error of its own of what is raised in here; ``cause`` finds it again."""
    _process.raised = None  # its frames hold views of weights
    try:
        yield
    except BaseException as error:
        _process.raised = error
        raise


@contextlib.contextmanager
def as_raised(kinds: type[Exception]) -> Iterator[None]:
    """Around a graph: what was raised inside comes out of it as it was raised.

    Whatever the framework raises instead: an error stops all that the graph does at that moment, and what was reading data may be
    the first to say so, that it was cancelled, or even that data have ended, which for a loop over data is no error.

    Args:
        kinds: the framework's errors.
    """
    _process.raised = None
    try:
        yield
    except kinds:
        if _process.raised is None:
            raise
        raise _process.raised from None


def cause(error: BaseException) -> BaseException:
    """What was raised inside a graph, if this error has its words; otherwise this error."""
    raised = _process.raised
    return raised if raised is not None and f"{type(raised).__name__}: {raised}" in str(error) else error


def _check_one_thread(trainer: Trainer) -> None:
    if _process.threads:
        raise RuntimeError(
            f"Two threads train at the same time (rank {trainer.communicator.rank} on {trainer.communicator.host}): ranks cannot tell "
            "whose turn it is. Train one model after another, or all in one thread."
        )


def _check_one_lands(trainer: Trainer) -> None:
    """Ranks wait for each other as an average lands, where some may die: not while others wait for them in another model's sync."""
    others = [each for each in _in_training(trainer.communicator) if each is not trainer]
    if others and any(each.goes_on and each.overlaps for each in (trainer, *others)):
        raise RuntimeError(
            "overlap with on_failure='continue' is for one model at a time, where ranks may die (mpirun --with-ft ulfm): let one training end "
            "before the next begins, or use overlap=0."
        )


def install(communicator: Any) -> None:
    """Make an uncaught error end the whole job. Called by ``init``."""
    if _process.communicator is not None or communicator.size == 1:
        return
    _process.communicator, _process.pid = communicator, os.getpid()
    show, show_in_thread, leave = sys.excepthook, threading.excepthook, sys.exit

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error = cause(error)
        if not _is_news(communicator, error):
            show(type(error), error.with_traceback(trace), trace)
        if os.getpid() == _process.pid:
            end_job(communicator, error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        """Of the thread that trains, as if it were the main one. The end of another is not the process'."""
        error = cause(args.exc_value or args.exc_type())
        trains = any(trainer.thread == threading.get_ident() for trainer in _process.training.values())
        ends = (trains or isinstance(error, _ALIKE)) and not isinstance(error, SystemExit)
        if ends and os.getpid() == _process.pid:
            excepthook(type(error), error, args.exc_traceback)
        else:
            show_in_thread(args)

    def exit_with(status: Any = None, /) -> NoReturn:
        _process.status = status or 0
        leave(status)

    sys.excepthook, threading.excepthook, sys.exit = excepthook, in_thread, exit_with
    atexit.register(_leave)


def end_job(communicator: Any, error: BaseException) -> None:
    """Tell the other ranks, let every rank print its own error, then stop the launcher and all it started."""
    name = f"rank {communicator.rank} on {communicator.host}"
    news = _is_news(communicator, error)
    words = f"ends: {error}" if news else f"ends the job ({type(error).__name__})"
    print(f"hvd_localsgd: {name} {words}", file=sys.stderr, flush=True)
    heard, status = _process.failed, 0 if news else _status(error)
    with contextlib.suppress(Exception):  # whatever goes wrong here, abort is what remains
        if not heard and not _process.busy:
            heard = header.tell_failure(communicator, error, TELL_SECONDS)
        if heard:
            status = _agree_on_status(communicator, status)
    sys.stdout.flush()
    sys.stderr.flush()
    communicator.abort(status or 1)


def _is_news(communicator: Any, error: BaseException) -> bool:
    """Whether another rank shows it."""
    return isinstance(error, _ALIKE) and (communicator.rank > 0 or getattr(error, "elsewhere", False))


def _status(error: BaseException | None = None) -> int:
    """That with which this process ends by itself."""
    given = _process.status & 255 if isinstance(_process.status, int) else 1
    return given or (130 if isinstance(error, KeyboardInterrupt) else 1)


def _agree_on_status(communicator: Any, status: int) -> int:
    """The most of all ranks', once all have shown their errors (collective)."""
    statuses = communicator.exchange(np.array(status, np.uint8), timeout=TELL_SECONDS)
    time.sleep(0.2)
    return int(statuses.max())


def _leave() -> None:
    """The process ends, and not by our excepthook."""
    communicator = _process.communicator
    if os.getpid() != _process.pid:
        return
    if (error := getattr(sys, "last_value", None)) is not None and not _process.failed:
        end_job(communicator, error)  # somebody else's excepthook has shown it
    for trainer in list(_process.training.values()):
        if not trainer.finish_at_exit or _process.status:
            end_job(trainer.communicator, RuntimeError(f"the process ended in the middle of training{_with_status()}"))
        try:
            trainer.count_pending()
            trainer.finish()
        except BaseException as failure:  # from here nobody else would end the job
            sys.__excepthook__(type(failure), failure, failure.__traceback__)
            end_job(communicator, failure)
    if _process.busy:
        end_job(communicator, RuntimeError("the process ended in the middle of a sync"))
    if _all_leave(communicator):
        if communicator.generation:  # MPI_Finalize may wait for the dead for ever (Open MPI 5.0.11)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_status() if _process.status else 0)
        return
    status = _status()
    with contextlib.suppress(Exception):
        status = _agree_on_status(communicator, status)
    communicator.abort(status)


def _all_leave(communicator: Any) -> bool:
    """Whether all ranks have left that are left."""
    while True:
        try:
            return header.leave(communicator, f"has ended{_with_status()}, and others wait for it")
        except RankDied as death:  # when the others had all they wanted of it
            if not _process.goes_on:
                end_job(communicator, death)
            if not death.all_know:
                communicator.agree(False)
            communicator.shrink()


def _with_status() -> str:
    return f" (exit status {_process.status!r})" if _process.status else ""
