"""The command itself: collect, meet, measure, judge, print."""

from __future__ import annotations

import math
import os
import socket
import sys
import time

import numpy as np

from hvd_localsgd import communicators
from hvd_localsgd.communicators import launchers, stalls
from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.errors import CommunicatorError, RankFailed
from hvd_localsgd.tools.doctor import checks, facts, measure
from hvd_localsgd.tools.doctor.watch import Watch

_ABORTED = (
    "MPI_Init has ended this process instead of returning. What it printed says why; often the launcher is not that of this "
    "MPI library, or another program of the same shell has been in MPI before."
)
# Parts of the time that is left: TensorFlow is late before a rank is, and a rank before all is ended.
_LOADING, _PATIENCE = 0.3, 0.6


def examine(as_json: bool, timeout: float) -> int:
    """Look at this process or, under a launcher, at all of them (collective); rank 0 prints. The exit status: 1 if anything is wrong.

    Raises:
        ValueError: ``timeout`` is not a number of seconds > 0.
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"--timeout must be seconds > 0. Received: {timeout}")
    launch, end = launchers.detect(), time.monotonic() + timeout
    watch = Watch(timeout, f"rank {launch.rank} of {launch.size} on {socket.gethostname()}")
    watch.stage("asking this machine (nvidia-smi, /sys)")
    probe = facts.Probe() if launch.rank == 0 else None
    rank = facts.of_this_process(launch)
    job = facts.Job([rank], facts.needs())
    try:
        stalls.change(warning=timeout, timeout=_PATIENCE * timeout)  # Horovod asks for it as it starts
        watch.stage(
            "joining the others (MPI_Init), which waits for all: ranks that say nothing here have not come", _ABORTED
        )
        communicator = communicators.choose()
        watch.stage("loading TensorFlow")
        if probe and communicator.rank == 0:
            rank.framework = probe.result(_LOADING * (end - time.monotonic()))
        _meet(communicator, rank, job, end, watch)
    except CommunicatorError as error:
        job.trouble = str(error)
        rank.framework = probe.result(_LOADING * (end - time.monotonic())) if probe else {}
        # Who is alone for MPI may still be one of many, of whom one is to speak.
        is_first = launch.rank == 0
    except RankFailed as error:
        print(f"hvd-localsgd doctor: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # MPI_Finalize would wait for the same rank
    else:
        is_first = communicator.rank == 0 if communicator.size > 1 else launch.rank == 0
    watch.stage("ending (MPI_Finalize)")
    if not is_first:
        return 0
    from hvd_localsgd.tools.doctor import report

    found = checks.findings(job)
    if as_json:
        print(report.as_json(job, found))
    else:
        report.show(job, found)
    return int(any(finding.level == "wrong" for finding in found))


def _meet(communicator: Communicator, rank: facts.Rank, job: facts.Job, end: float, watch: Watch) -> None:
    """Every rank tells its facts, and measures its links (collective)."""
    rank.rank, rank.host, rank.communicator = communicator.rank, communicator.host, communicator.name
    rank.mpi = communicator.about() if communicator.name == "mpi" else {}
    if communicator.size > 1:
        # Who does not come is named before the watch ends everything.
        stalls.change(warning=None, timeout=_PATIENCE * (end - time.monotonic()))
        watch.stage("waiting for the other ranks to say what they have")
        communicator.exchange(np.zeros(1, [("here", np.int8)]))
        job.links, job.allreduce = measure.links(communicator, rank, watch.stage)
    job.ranks = [facts.Rank.from_json(text) for text in communicator.gather(rank.to_json())]
