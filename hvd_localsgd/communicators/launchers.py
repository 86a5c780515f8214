"""What launchers tell the processes that they start."""

from __future__ import annotations

import os

# Each launcher tells every process how many there are; we compare that with what MPI believes.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "HOROVOD_SIZE")
_LAUNCHER_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "PALS_")


def launched_size() -> int:
    """How many processes the launcher says it started (1 without a launcher)."""
    return max([int(os.environ[v]) for v in _SIZE_VARIABLES if os.environ.get(v, "").isdigit()], default=1)


def under_launcher() -> bool:
    """Whether this process was started by mpirun, srun, horovodrun or the like."""
    return launched_size() > 1 or any(name.startswith(_LAUNCHER_PREFIXES) for name in os.environ)
