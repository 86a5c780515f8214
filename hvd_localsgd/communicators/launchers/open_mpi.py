"""``mpirun`` of Open MPI; ``horovodrun`` over MPI calls it, too."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process."""
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    return Launch(
        "mpirun of Open MPI",
        number(environment, "OMPI_COMM_WORLD_SIZE", default=1),
        number(environment, "OMPI_COMM_WORLD_RANK", default=0),
        slots=number(environment, "OMPI_UNIVERSE_SIZE", default=0) or None,
    )
