"""What launchers tell the processes that they start; and who has it only because a rank started him."""

from __future__ import annotations

import multiprocessing
import os

# Each launcher tells every process how many there are; we compare that with what MPI believes.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "HOROVOD_SIZE")
_LAUNCHER_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "PALS_")
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


def launched_size() -> int:
    """How many processes the launcher says it started (1 without a launcher, and in a child process of a rank)."""
    if is_child():
        return 1
    return max([int(os.environ[v]) for v in _SIZE_VARIABLES if os.environ.get(v, "").isdigit()], default=1)


def under_launcher() -> bool:
    """Whether this process was started by mpirun, srun, horovodrun or the like."""
    return launched_size() > 1 or (not is_child() and any(name.startswith(_LAUNCHER_PREFIXES) for name in os.environ))


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
    if under_launcher():
        os.environ[_JOINED] = f"{os.getpid()},{rank},{size},{_job()}"


def starter() -> tuple[int, int] | None:
    """Rank and size of the rank that started this process; None if none did."""
    pid, rank, size, job = os.environ.get(_JOINED, f"{os.getpid()},0,1,").split(",", 3)
    return None if int(pid) == os.getpid() or job != _job() else (int(rank), int(size))


def _job() -> str:
    names = [os.environ.get(name, "") for name in _JOB_VARIABLES]
    # MPICH and Intel MPI name no job, but give each rank a process group, which what it starts shares.
    return " ".join([*names, str(os.getpgrp()) if "PMI_FD" in os.environ else ""])
