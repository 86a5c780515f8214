"""Do all ranks hold the same bits after an average, as they must?"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from hvd_localsgd.core.agreement import STRETCH, where
from hvd_localsgd.core.layout import Stretch
from hvd_localsgd.core.pipeline import Memory
from hvd_localsgd.errors import RankFailed, listed


def audit(communicator: Any, memory: Memory, averaged: list[Stretch], step: int) -> None:
    """Compares what was averaged (collective): 32 bytes a rank, and more only if they differ.

    Args:
        communicator: of all ranks.
        memory: of what was averaged.
        averaged: where it lies.
        step: the local step, for the error.

    Raises:
        RankFailed: on all ranks, with the ranks and their variables that are not as rank 0's.
    """
    with memory.open() as arrays:
        own = [np.ascontiguousarray(arrays[block][start:stop]) for block, start, stop in averaged]
        digest = hashlib.sha256()
        for values in own:
            digest.update(values.data.cast("B"))
        if len(set(communicator.gather(digest.digest()))) == 1:
            return
        found = [
            name
            for values, (block, start, _) in zip(own, averaged, strict=True)
            for name in _differs(communicator, memory, values, block, start)
        ]
        del own
    entries = communicator.gather(", ".join(dict.fromkeys(found)).encode())
    differ = [f"{where([rank], communicator.hosts)}: {names.decode()}" for rank, names in enumerate(entries) if names]
    who = listed(differ, "; ")
    raise RankFailed(
        f"After the average at local step {step} not all ranks hold the same bits. Not as on rank 0 is, on {who}. Memory or a network may "
        "be faulty; or something changes weights between syncs on some ranks only."
    )


def _differs(communicator: Any, memory: Memory, values: np.ndarray, block: int, start: int) -> list[str]:
    """The names of variables in these values that are not as rank 0's (collective)."""
    names = []
    for first in range(0, values.size, STRETCH):
        own = values[first : first + STRETCH]
        theirs = own.copy()
        communicator.broadcast(theirs)
        bits = np.dtype(f"u{own.itemsize}")
        names += [
            memory.name(block, start + first + int(at))
            for at in np.flatnonzero(own.view(bits) != theirs.view(bits))[:1000]
        ]
    return names
