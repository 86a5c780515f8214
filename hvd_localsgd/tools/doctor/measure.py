"""How fast messages are: between every two ranks, and in an allreduce. A few seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.errors import CommunicatorError
from hvd_localsgd.tools.doctor.facts import Link, Rank, sent_bytes

_MEETINGS = 16  # in each of which every rank has one partner: up to so many ranks, every pair is measured
_SMALL, _LARGE = 1, 1 << 17  # numbers of 8 bytes
_REPEATS_SMALL, _REPEATS_LARGE = 20, 3
_SYS = Path("/sys/class")


def links(
    communicator: Communicator, rank: Rank, stage: Callable[[str], None]
) -> tuple[list[Link], tuple[float, float]]:
    """Measure (collective); what was sent goes into ``rank.sent`` and its networks' ``moved``.

    Args:
        communicator: of ranks that have all come.
        rank: of this process.
        stage: told what is measured next.

    Returns:
        Every rank's links; microseconds of a small allreduce, and MB/s of a large one, the vector's bytes by its time.
    """
    before = [sent_bytes(_SYS, network) for network in rank.networks]
    own: list[Link] = []
    inside, outside = 0.0, 0.0
    try:
        for meeting in range(0, communicator.size, -(-communicator.size // _MEETINGS)):
            partner = (meeting - communicator.rank) % communicator.size
            if partner == communicator.rank:
                continue
            stage(f"exchanging messages with rank {partner} on {communicator.hosts[partner]}")
            link, sent = _with(communicator, partner)
            own += [link] if communicator.rank < partner else []
            here = communicator.hosts[partner] == communicator.host
            inside, outside = inside + sent * here, outside + sent * (not here)
    except CommunicatorError:  # Horovod has no messages between two ranks
        own = []
    stage("adding numbers over all ranks")
    allreduce = _allreduce(communicator)
    communicator.gather(b"")  # nobody is sending any more
    for network, at_first in zip(rank.networks, before, strict=True):
        network.moved = sent_bytes(_SYS, network) - at_first
    rank.sent = (inside, outside)
    everybody = communicator.gather(
        json.dumps([(link.a, link.b, link.latency, link.bandwidth) for link in own]).encode()
    )
    return [Link(*values) for text in everybody for values in json.loads(text)], allreduce


def _with(communicator: Communicator, partner: int) -> tuple[Link, float]:
    seconds = []
    for count, repeats in ((_SMALL, _REPEATS_SMALL), (_LARGE, _REPEATS_LARGE)):
        values, received = np.zeros(count), np.empty(count)
        seconds.append(_best(repeats, lambda v=values, r=received: communicator.sendrecv(v, partner, r, partner)))  # type: ignore[misc]
    sent = 8.0 * _LARGE * (_REPEATS_LARGE + 1)
    return Link(communicator.rank, partner, seconds[0] * 1e6, 8 * _LARGE / seconds[1] / 1e6), sent


def _allreduce(communicator: Communicator) -> tuple[float, float]:
    small, large = np.zeros(_SMALL), np.zeros(_LARGE)
    latency = _best(_REPEATS_SMALL, lambda: communicator.allreduce(small))
    return latency * 1e6, large.nbytes / _best(_REPEATS_LARGE, lambda: communicator.allreduce(large)) / 1e6


def _best(repeats: int, call: Callable[[], object]) -> float:
    """Seconds of the fastest; the first, which sets up the connection, does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
