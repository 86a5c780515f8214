"""``horovodrun --gloo``: the ranks meet through Horovod, and no MPI is there."""

from __future__ import annotations

from hvd_localsgd.communicators.launchers.base import Environment, Launch, number


def detect(environment: Environment) -> Launch | None:
    """None: it did not start this process."""
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in environment:
        return None
    return Launch(
        "horovodrun --gloo",
        number(environment, "HOROVOD_SIZE", default=1),
        number(environment, "HOROVOD_RANK", default=0),
        joins=False,  # Horovod asks for it, MPI does not
    )
