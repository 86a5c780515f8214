"""Start ranks with whatever mpirun belongs to this Python, with the flags that it needs here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvd_localsgd.errors import INSTALL_MPI, CommunicatorError

# As root Open MPI wants to be asked twice. On fewer cores than ranks, a rank that waits must give way.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def find_mpirun() -> str:
    """The mpirun beside this Python, else the one on PATH.

    Raises:
        CommunicatorError: there is none.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise CommunicatorError(f"mpirun was not found, neither beside this Python nor on PATH. {INSTALL_MPI}")
    return found


def command(ranks: int, program: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What starts ``program`` on ``ranks`` processes of this machine: the command line and its environment.

    Raises:
        CommunicatorError: there is no mpirun, or it does not run.
        ValueError: ``ranks`` is below 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be >= 1. Received: {ranks}")
    mpirun = find_mpirun()
    try:
        version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, env=_environment())
    except OSError as error:
        raise CommunicatorError(f"{mpirun} does not run: {error}") from error
    flags: list[str] = []
    if "Open MPI" in version.stdout or "Open MPI" in version.stderr:
        flags = ["--oversubscribe", "--bind-to", "none"]
    return [mpirun, *flags, "-np", str(ranks), *program], _environment()


def _environment() -> dict[str, str]:
    return {**os.environ, **{key: os.environ.get(key, value) for key, value in _OPEN_MPI.items()}}


def run(ranks: int, program: Sequence[str]) -> int:
    """Run ``program`` (a command line) on ``ranks`` processes; its exit status."""
    line, environment = command(ranks, program)
    return subprocess.run(line, env=environment).returncode
