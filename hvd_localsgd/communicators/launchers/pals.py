"""PALS, the ``mpiexec`` of HPE Cray machines, under PBS."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process."""
    if "PALS_RANKID" not in environment:
        return None
    return Launch(
        "mpiexec of PALS",
        number(environment, "PMI_SIZE", "PALS_SIZE", default=1),
        number(environment, "PALS_RANKID", default=0),
    )
