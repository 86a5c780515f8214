"""Who is calling us: where Keras tells its parts nothing of each other, the caller's frame does."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def caller_local(name: str, kind: type = object) -> Any:
    """The nearest local variable of that name and class in the functions that are calling us; None without."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if name in frame.f_locals and isinstance(frame.f_locals[name], kind):
            return frame.f_locals[name]
        frame = frame.f_back
    return None
