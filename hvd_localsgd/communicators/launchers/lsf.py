"""``jsrun`` of LSF; LSF's other jobs start Open MPI's or Intel's ``mpirun``."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process."""
    if "JSM_NAMESPACE_SIZE" not in environment:
        return None
    return Launch(
        "jsrun of LSF",
        number(environment, "JSM_NAMESPACE_SIZE", default=1),
        number(environment, "JSM_NAMESPACE_RANK", default=0),
    )
