"""The header: the few numbers that all ranks exchange before anything else."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvd_localsgd.errors import RankDied, RankFailed, listed

HEADER = np.dtype(
    [
        ("engine", np.int64),  # which of the engines on this communicator, in the order in which they were made
        ("model", np.uint64),  # fingerprint of what is averaged and how
        ("position", np.float64),  # how far this rank is (progress.py); inf: it has finished
        ("group", np.int64),  # which of the groups of ranks this one belongs to
        ("steps", np.int64),  # local steps since the last sync
        ("total", np.int64),  # local steps since training began
        ("brought", np.int64),  # when training begins: steps that the optimizer has taken in another process
        ("samples", np.float64),  # samples those steps saw
        ("recent", np.int64),  # local steps not yet in all of the model's averages: more, with fragments or groups
        ("recent_samples", np.float64),  # likewise
        ("updates", np.int64),  # steps that the optimizer has taken in its life, when training begins; 0: nobody asked
        ("due", np.bool_),  # this rank's round is over, or has to end here
        ("pace", np.float64),  # seconds of a local step, lately; 0: not known yet
        ("sync", np.float64),  # seconds of a sync, lately, without waiting; 0: not known yet
        ("clock", np.float64),  # seconds since training began here
        ("rate", np.float64),  # the learning rate; NaN: nobody asked, as the next two
        ("loss", np.float64),  # the training loss
        ("remaining", np.float64),  # local steps until the planned end
        ("norm", np.float64),  # of this rank's change since the last sync; 0: nobody asked
        ("finite", np.bool_),  # no NaN or infinity in this rank's weights
        ("stop", np.bool_),  # this rank wants training to stop
        ("asked", np.bool_),  # this rank has been asked to end: all are to write a checkpoint and leave
        ("written", np.bool_),  # the last checkpoint's file of this rank is on the disk
        ("failed", np.bool_),  # this rank has raised an error and is about to end
        ("left", np.bool_),  # this rank has ended in good order, and takes part in nothing more
    ]
)


def row(**fields: Any) -> np.ndarray:
    """This rank's header; fields that are not given are zero."""
    header = np.zeros((), HEADER)
    for name, value in fields.items():
        header[name] = value
    return header


def seen(row: np.ndarray) -> str:
    """Where that rank was, in words."""
    return f" (last seen at local step {row['total']})"


def exchange(communicator: Any, own: np.ndarray) -> np.ndarray:
    """All ranks' headers, by rank (collective).

    Raises:
        RankFailed: a rank says that it has failed, or has left; on every rank, with that rank's own words.
    """
    table = communicator.exchange(own)
    gone = np.flatnonzero(table["failed"] | table["left"])
    if gone.size:
        words = communicator.gather(b"")
        error = RankFailed(listed([words[rank].decode() for rank in gone], "; "))
        error.elsewhere = bool(table["failed"].any())
        raise error
    return table


def leave(communicator: Any, words: str) -> bool:
    """The last exchange: this rank takes part in nothing more; whether all ranks have left (collective).

    Args:
        words: how it left, for those that were counting on it.
    """
    table = communicator.exchange(row(left=True))
    if not table["left"].all():
        communicator.gather(f"rank {communicator.rank} on {communicator.host} {words}".encode())
        return False
    if not communicator.agree(True):
        raise RankDied("a rank has died", all_know=True)
    return True


def tell_failure(communicator: Any, error: BaseException, timeout: float) -> bool:
    """Instead of the next header, tell the others what went wrong here; whether they heard it in time."""
    try:
        communicator.exchange(row(failed=True), timeout=timeout)
    except TimeoutError:
        return False
    name = f"rank {communicator.rank} on {communicator.host}"
    communicator.gather(f"{name} failed: {_in_a_line(error)}".encode())
    return True


def _in_a_line(error: BaseException) -> str:
    """Its kind, and what it says: of a framework's error, which has the traceback of another inside, what that one says."""
    words, inside, _ = str(error).partition("\nTraceback (most recent call last)")
    line = " ".join((words.splitlines()[-1] if inside and words else words).split())
    return ": ".join(filter(None, (type(error).__name__, line)))
