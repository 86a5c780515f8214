"""A launcher that is not known here, but speaks PMIx or PMI: Flux, ``prterun``, ``mpiexec`` of another kind."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: nothing did."""
    if not {"PMIX_RANK", "PMI_RANK"} & environment.keys():
        return None
    return Launch("a launcher that is not known here", 1, number(environment, "PMIX_RANK", "PMI_RANK", default=0))
