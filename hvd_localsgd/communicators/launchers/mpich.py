"""Hydra, the ``mpirun`` of MPICH."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process."""
    # srun and PALS speak the same protocol, and what Hydra starts inside their jobs inherits their variables.
    others = {"SLURM_STEP_ID", "PALS_RANKID"} & environment.keys()
    if "PMI_SIZE" not in environment or (others and "MPI_LOCALNRANKS" not in environment):
        return None
    return Launch(
        "mpirun of MPICH (Hydra)",
        number(environment, "PMI_SIZE", default=1),
        number(environment, "PMI_RANK", default=0),
    )
