"""Whether this process has been asked to end: by a signal, or because its time is nearly up.

A handler only takes a note; what follows from it follows at the next sync, on all ranks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """Signals are looked at from ``listen`` to ``ignore``; a child that is forked in between has the handlers from before.

    Args:
        max_minutes: after which this process must have ended, counted from here; None: SLURM's limit, if it says one.
    """

    def __init__(self, max_minutes: float | None) -> None:
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = time.time() + 60 * max_minutes if max_minutes is not None else float(end) if end.isdigit() else None
        self._before: dict[int, Any] = {}
        self._pid = 0
        self.reason = ""
        os.register_at_fork(after_in_child=self.ignore)

    def listen(self) -> None:
        """From now on. Only the main thread can: in another one the time limit alone counts."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._pid, self.reason = os.getpid(), ""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def ignore(self) -> None:
        """As it was before; where somebody else has taken a signal meanwhile, as it is. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def see_time(self, seconds: float) -> None:
        """Whether so many seconds, which must not be the last, are left."""
        if self._end is not None and not self.reason and time.time() + seconds >= self._end:
            self.reason = "the time limit"

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # forked by a library, past Python
            self.ignore()
            os.kill(os.getpid(), number)
            return
        self.reason = signal.Signals(number).name
        handler: Callable[..., Any] | Any = self._before.get(number)
        if callable(handler):
            handler(number, frame)
