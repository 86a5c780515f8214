"""Who has a launcher's environment only because a rank started him."""

from __future__ import annotations

import multiprocessing
import os

# What changes if a rank starts a launcher, whose ranks inherit everything else.
_JOB_VARIABLES = (
    "PMIX_NAMESPACE",
    "PMI_JOBID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "PALS_APID",
    "HOROVOD_GLOO_RENDEZVOUS_PORT",
)
_JOINED = "HVD_LOCALSGD_JOINED"


def is_child() -> bool:
    """Whether this process cannot be a rank, whatever its environment says.

    True for workers of ``multiprocessing``, and for whatever a process that has joined the others starts or forks.
    """
    return importing_main_again() or multiprocessing.parent_process() is not None or starter() is not None


def importing_main_again() -> bool:
    """Whether this worker of ``multiprocessing`` is still importing the script of the process that started it."""
    # The same attribute keeps such a worker from starting others; parent_process() is not known yet at that time.
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def joined(rank: int, size: int) -> None:
    """This process has taken its place in the launcher's job: what it starts from now on cannot take it again."""
    os.environ[_JOINED] = f"{os.getpid()},{rank},{size},{_job()}"


def starter() -> tuple[int, int] | None:
    """Rank and size of the rank that started this process; None if none did."""
    pid, rank, size, job = os.environ.get(_JOINED, f"{os.getpid()},0,1,").split(",", 3)
    return None if int(pid) == os.getpid() or job != _job() else (int(rank), int(size))


def _job() -> str:
    names = [os.environ.get(name, "") for name in _JOB_VARIABLES]
    # MPICH and Intel MPI name no job, but give each rank a process group, which what it starts shares.
    return " ".join([*names, str(os.getpgrp()) if "PMI_FD" in os.environ else ""])
