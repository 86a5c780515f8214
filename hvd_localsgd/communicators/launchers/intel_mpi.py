"""``mpirun`` of Intel MPI: a Hydra of its own."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process."""
    if "I_MPI_HYDRA_UUID" not in environment or "PMI_SIZE" not in environment:
        return None
    return Launch(
        "mpirun of Intel MPI",
        number(environment, "PMI_SIZE", default=1),
        number(environment, "PMI_RANK", default=0),
    )
