"""Who started this process: each launcher is a file with ``detect``, which reads what that launcher tells its processes."""

from __future__ import annotations

import os

from hvd_localsgd.communicators.launchers import (
    horovodrun,
    intel_mpi,
    lsf,
    mpich,
    open_mpi,
    other,
    pals,
    slurm,
)
from hvd_localsgd.communicators.launchers.base import Environment, Launch
from hvd_localsgd.communicators.launchers.children import is_child

# The innermost first: mpirun inside srun or jsrun inherits what those told.
_LAUNCHERS = (horovodrun, open_mpi, intel_mpi, mpich, pals, lsf, slurm, other)
NOBODY = Launch("no launcher", size=1, rank=0, joins=False)


def detect(environment: Environment | None = None) -> Launch:
    """Who started this process (NOBODY: no launcher, or a rank that is its parent), by its environment or the one given."""
    if environment is None:
        environment = {} if is_child() else os.environ
    return next((found for one in _LAUNCHERS if (found := one.detect(environment))), NOBODY)


def under_launcher() -> bool:
    """Whether this process was started by mpirun, srun, horovodrun or the like, to find others."""
    launch = detect()
    return launch.size > 1 or launch.joins
