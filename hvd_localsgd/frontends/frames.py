"""Who is calling us: where Keras tells its parts nothing of each other, the caller's frame does."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from keras.callbacks import Callback, CallbackList


def caller_local(name: str, kind: type = object) -> Any:
    """The nearest local variable of that name and class in the functions that are calling us; None without."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if name in frame.f_locals and isinstance(frame.f_locals[name], kind):
            return frame.f_locals[name]
        frame = frame.f_back
    return None


def caller_argument(function: str, name: str) -> Any:
    """A local variable of the nearest of the functions that are calling us which has that name; None without."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == function and name in frame.f_locals:
            return frame.f_locals[name]
        frame = frame.f_back
    return None


def forget_number_of_batches() -> None:
    """``fit`` then finds out once more how long an epoch is, as it did in the first."""
    batches = caller_local("epoch_iterator")
    if batches is not None and not getattr(batches, "steps_per_epoch", None):
        batches._num_batches = None


def callback_list() -> list[Callback]:
    """The list that is calling us. Keras does not tell callbacks of each other; the caller's frame does."""
    owner = caller_local("self", CallbackList)
    return owner.callbacks if owner is not None else []
