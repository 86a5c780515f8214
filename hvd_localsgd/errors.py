"""What this package raises, beside plain ValueError and TypeError for wrong arguments."""

from __future__ import annotations


class LocalSGDError(RuntimeError):
    """Everything below: something that is not a wrong argument went wrong."""


class RankFailed(LocalSGDError):
    """Another rank raised an error, or holds weights that are not finite; the message names it."""


class CommunicatorError(LocalSGDError):
    """The communicator that was asked for cannot be used here; the message says what to install or change."""


class BuildError(LocalSGDError):
    """Horovod or the kernel could not be built, or does not work once it is."""


class RanksDiffer(ValueError):
    """Models or settings are not the same on all ranks; raised on all of them, naming the first difference."""


class CheckpointError(LocalSGDError):
    """A checkpoint cannot be resumed from, or written; the message names the file and says what to do. Nothing has changed."""


class Preempted(SystemExit):
    """This process was asked to end, or its time is up: all ranks have written a checkpoint, and end with this exit status."""
