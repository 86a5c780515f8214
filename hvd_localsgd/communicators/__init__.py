"""Through what the ranks talk: one small interface, and the choice of who implements it."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

# Each launcher tells every process how many there are; we compare that with what MPI believes.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "HOROVOD_SIZE")
_LAUNCHER_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "PALS_")


class CommunicatorError(RuntimeError):
    """The communicator that was asked for cannot be used here; the message says what to install or change."""


class SharedVector(ABC):
    """A vector that every rank can read and add to at any time, without the others taking part."""

    @abstractmethod
    def add(self, values: np.ndarray, at: int, before: np.ndarray) -> None:
        """From element ``at``: put what is there into ``before`` and add ``values``, atomically for each element."""

    @abstractmethod
    def read(self, values: np.ndarray, at: int) -> None:
        """Fill ``values`` with what is there from element ``at``."""

    @abstractmethod
    def free(self) -> None:
        """Collective."""


class Communicator(ABC):
    """What the engine needs from MPI, Horovod or a single process.

    Every method is collective unless it says otherwise: all ranks call it, in the same order.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    chunk_bytes = 2 << 20  # what ``allreduce`` is best given at a time
    takes_tensors = False  # whether it would rather have tensors, which may be on a GPU, than host memory
    busy = False  # in the middle of a sync: an error now must not start another collective call
    failed = False  # some rank has failed, and all ranks know it

    @abstractmethod
    def exchange(self, row: np.ndarray, timeout: float | None = None) -> np.ndarray:
        """Allgather of one row of a structured dtype per rank: shape ``(size,)``, rank k's row at index k.

        Waiting for slower ranks happens here, gently (the core is given to others).
        Raises TimeoutError if ``timeout`` seconds were not enough.
        """

    @abstractmethod
    def tune(self, payload: int) -> None:
        """Choose ``chunk_bytes`` and how ``allreduce`` works, for ``payload`` bytes a sync. Cheap; done once."""

    @abstractmethod
    def allreduce(self, buffer: np.ndarray) -> None:
        """Sum over ranks in place; 1-D, contiguous, float32 or float64."""

    @abstractmethod
    def broadcast(self, array: np.ndarray) -> None:
        """Rank 0's content to all, in place; contiguous, any dtype."""

    @abstractmethod
    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in order of rank, on every rank."""

    @abstractmethod
    def subgroup(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """A communicator for each group of ranks; returns the one of this rank's group.

        Args:
            groups: disjoint; together all ranks; the same on every rank. Ranks keep their order inside a group.
        """

    def share(self, values: np.ndarray) -> SharedVector:
        """One-sided memory with ``values`` in it, the same on every rank; a stretch lies on each."""
        raise CommunicatorError(f"mode='async' needs one-sided MPI; communicator {self.name!r} has none. Use 'mpi'.")

    def allreduce_tensor(self, tensor: Any, weight: float) -> Any:
        """Sum over ranks of ``weight`` * a TensorFlow tensor, on its device. Only where ``takes_tensors``."""
        raise NotImplementedError(f"{self.name} takes numpy arrays")

    @abstractmethod
    def abort(self) -> None:
        """End the whole job with a non-zero status. Not collective; does not return where size > 1."""


_current: Communicator | None = None


def launched_size() -> int:
    """How many processes the launcher says it started (1 without a launcher)."""
    return max([int(os.environ[v]) for v in _SIZE_VARIABLES if os.environ.get(v, "").isdigit()], default=1)


def under_launcher() -> bool:
    """Whether this process was started by mpirun, srun, horovodrun or the like."""
    return launched_size() > 1 or any(name.startswith(_LAUNCHER_PREFIXES) for name in os.environ)


def choose(name: str = "auto") -> Communicator:
    """The communicator of this process, made on the first call and kept.

    Args:
        name: ``"mpi"``, ``"horovod"`` or ``"serial"`` force one. ``"auto"`` takes what the environment variable
            HVD_LOCALSGD_COMMUNICATOR says, else Horovod if ``horovod.tensorflow`` is initialised or its launcher
            uses no MPI, else MPI under a launcher, else one process.

    Raises:
        CommunicatorError: it is not installed, or MPI and the launcher do not belong together.
        ValueError: unknown name, or another communicator was chosen before.
    """
    global _current
    makers: dict[str, Any] = {"mpi": _mpi, "horovod": _horovod, "serial": _serial}
    if name == "auto":
        name = os.environ.get("HVD_LOCALSGD_COMMUNICATOR", "auto")
    if name != "auto" and name not in makers:
        raise ValueError(f"communicator must be 'auto', 'mpi', 'horovod' or 'serial'. Received: {name!r}")
    if _current is not None:
        if name not in ("auto", _current.name):
            raise ValueError(
                f"communicator={name!r} was asked for, but {_current.name!r} is in use already: call "
                f"lsgd.init(communicator={name!r}) first thing in the script."
            )
        return _current
    if name == "auto":
        if _horovod_is_initialized() or "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
            name = "horovod"
        else:
            name = "mpi" if under_launcher() or "mpi4py.MPI" in sys.modules else "serial"
    _current = makers[name]()
    return _current


def _mpi() -> Communicator:
    from hvd_localsgd.communicators.mpi import MPICommunicator

    return MPICommunicator()


def _horovod() -> Communicator:
    from hvd_localsgd.communicators.horovod import HorovodCommunicator

    return HorovodCommunicator()


def _serial() -> Communicator:
    from hvd_localsgd.communicators.serial import SerialCommunicator

    return SerialCommunicator()


def _horovod_is_initialized() -> bool:
    module = sys.modules.get("horovod.tensorflow")
    return module is not None and bool(module.is_initialized())


def where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``rank 2 on node7``: how errors name the ranks they are about."""
    named = [f"rank {rank} on {hosts[rank]}" for rank in ranks]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
