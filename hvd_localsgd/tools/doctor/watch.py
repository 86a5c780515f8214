"""Ends a process that does not come to its end in time, and says at what it was.

A process of its own, because MPI_Init holds Python's lock while it waits: no thread and no signal handler would run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

_GRACE = 2.0  # seconds in which every rank can say where it is, before the launcher ends them all


class Watch:
    """Of this process.

    Args:
        seconds: after which it is ended.
        who: the name of this process in what is said then.
    """

    def __init__(self, seconds: float, who: str) -> None:
        line = [sys.executable, "-S", __file__, str(os.getpid()), str(seconds), who]
        # A bare pipe: Python would close a file of its own before MPI_Finalize, which comes last and may wait, too.
        reading, self._pipe = os.pipe()
        self._process = subprocess.Popen(line, stdin=reading, stdout=subprocess.DEVNULL)
        os.close(reading)

    def stage(self, doing: str, if_it_ends: str = "") -> None:
        """From now on this process does that; what is to be said if it does not come back from it but is gone."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, json.dumps([doing, if_it_ends]).encode() + b"\n")


def _watch(process: int, seconds: float, who: str) -> None:
    end, doing, if_it_ends = time.monotonic() + seconds, "starting", ""
    while select.select([0], [], [], max(0.0, end - time.monotonic()))[0]:
        received = os.read(0, 1 << 16)
        if not received:  # it has ended
            if if_it_ends:
                print(f"hvd-localsgd doctor: {who}: {if_it_ends}", file=sys.stderr)
            return
        doing, if_it_ends = json.loads(received.splitlines()[-1])
    print(f"hvd-localsgd doctor: {who} is not through after {seconds:g} s. It is {doing}.", file=sys.stderr, flush=True)
    time.sleep(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
