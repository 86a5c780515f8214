"""``srun`` of SLURM, which brings processes together only through an MPI plug-in that fits the MPI library."""

from __future__ import annotations

import os
from pathlib import Path

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number

NAME = "srun"
_FITS = "--mpi=pmix for Open MPI, --mpi=pmi2 for MPICH and Intel MPI (srun --mpi=list shows which there are)"


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process. A job's own shell (``sbatch``, ``salloc``) is not in a step."""
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    size = number(environment, "SLURM_STEP_NUM_TASKS", default=1)
    below_a_shell = environment.get("SLURM_TASK_PID") != str(os.getpid()) and "SLURM_PTY_PORT" in environment
    # One process needs nobody. MPI_Init would end it where there is no plug-in, or where another program of the same
    # shell has been in MPI before.
    return Launch(
        NAME,
        size,
        number(environment, "SLURM_PROCID", default=0),
        joins=False,
        hint=(
            "This is a shell inside srun, and what it starts is one process. To start several, leave the shell and use "
            f"srun -n N with the plug-in of your MPI: {_FITS}."
            if size == 1 and below_a_shell
            else ""
        ),
    )


def refusal(launch: Launch, environment: Environment, library: str, folder: Path | None) -> str:
    """Why MPI_Init would end this process, which ``srun`` started among others; empty: it would not, for all we know.

    Args:
        launch: who started this process.
        environment: its own.
        library: what the MPI library calls itself, MPI_Get_library_version.
        folder: where it lies.
    """
    if launch.launcher != NAME:
        return ""
    name = " ".join(library.split(",")[0].splitlines()[0].replace("Version:", " ").split())
    has = "PMIx" if "PMIX_RANK" in environment else "PMI" if "PMI_RANK" in environment else ""
    # Alone, Open MPI 5 needs nobody; Open MPI 4 gives up as soon as it sees srun.
    if library.startswith("Open MPI") and has != "PMIx" and not (launch.size == 1 and "Open MPI v5" in library):
        needed = "" if _speaks_pmi(folder) else "pmix"
    elif library.startswith("MPICH") and has == "PMIx" and "pmix" not in library:
        needed = "pmi2"
    else:
        needed = ""
    if not needed:
        return ""
    what = f"with {has}, which {name} does not know" if has else f"without an MPI plug-in, and {name} needs one"
    return (
        f"srun started {'one process' if launch.size == 1 else f'{launch.size} processes'} {what}. Use srun --mpi={needed} "
        "(srun --mpi=list shows which plug-ins there are), or mpirun inside the job."
    )


def _speaks_pmi(folder: Path | None) -> bool:
    """Whether this Open MPI was built with SLURM's own PMI, as those of clusters often are."""
    return folder is not None and any((folder / "openmpi").glob("mca_pmix_s[12].so"))


def alone(launch: Launch, library: str) -> str:
    """Why each of several processes is alone after MPI_Init."""
    return (
        f"srun started {launch.size} processes, but MPI ({library}) sees only this one: srun has no MPI plug-in, or "
        f"another than this library needs. Use {_FITS}."
    )
