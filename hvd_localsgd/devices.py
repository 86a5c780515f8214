"""Who this process is, and which GPU or cores are its own."""

from __future__ import annotations

import os
import threading
import warnings

from hvd_localsgd.communicators import choose, stalls
from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.communicators.launchers import children, detect
from hvd_localsgd.core import failures

_ready: Communicator | None = None
_joining = threading.RLock()  # several threads may ask at once, and MPI is initialised once


def init(communicator: str = "auto", stall_warning: float | None = None, stall_timeout: float | None = None) -> None:
    """Join the other ranks; pin this rank's GPU, or its fair share of the cores. Idempotent.

    Optional, because everything else calls it, but best called first thing in the script: TensorFlow fixes its
    devices and threads when it is first used. In a process that a rank starts or forks, such as a data worker that
    imports the script again, it joins nobody: there ``size()`` is 1.

    Args:
        communicator: ``"auto"`` (Horovod if it is initialised, else MPI under a launcher, else one process; or what
            the environment variable HVD_LOCALSGD_COMMUNICATOR says), ``"mpi"``, ``"horovod"`` or ``"serial"``.
        stall_warning: seconds that ranks wait for one that does not come until they say so, and say so again; None: as it is, 60 or
            HVD_LOCALSGD_STALL_WARNING.
        stall_timeout: seconds until they wait no longer: the job ends; or, where ranks may die (``on_failure``), that one is killed.
            None: as it is, never or HVD_LOCALSGD_STALL_TIMEOUT.

    Raises:
        CommunicatorError: the communicator cannot be used here.
        ValueError: unknown name, or another communicator is in use; seconds that are not > 0.
    """
    stalls.change(stall_warning, stall_timeout)
    get(communicator)


def get(communicator: str = "auto") -> Communicator:
    """``init``, and the communicator itself."""
    global _ready
    with _joining:
        chosen = choose(communicator)
        if _ready is not chosen:
            _ready = chosen
            failures.install(chosen)
            if chosen.size > 1:
                _take_own_devices(chosen)
            elif hint := detect().hint:
                warnings.warn(hint, stacklevel=3)
    return chosen


def rank() -> int:
    """This process' number, 0 <= rank < size, as in MPI."""
    return _asked().rank


def size() -> int:
    """The number of ranks."""
    return _asked().size


def local_rank() -> int:
    """This process' number among those on the same host."""
    return _asked().local_rank


def local_size() -> int:
    """The number of ranks on this host."""
    return _asked().local_size


def _asked() -> Communicator:
    """``get``, for somebody who may deal out data by what it says."""
    communicator, starter = get(), children.starter()
    # A worker that imports the script again asks because the script does; what it says is of no consequence.
    if starter and starter[1] > 1 and not children.importing_main_again():
        warnings.warn(
            f"A process that was started by rank {starter[0]} of {starter[1]} is no rank itself: rank() is 0 and size() is 1 "
            "here. If its data depend on them, ask in the rank and hand them over, for example as an attribute of the "
            "PyDataset.",
            stacklevel=3,
        )
    return communicator


def _take_own_devices(communicator: Communicator) -> None:
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        return  # there is more to average than TensorFlow's variables

    affinities = _affinities_on_this_host(communicator)
    own = os.sched_getaffinity(0)
    share = max(1, int(sum(1 / sum(core in other for other in affinities) for core in own)))
    threading = tf.config.threading
    try:
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            gpu = gpus[communicator.local_rank % len(gpus)]
            tf.config.set_visible_devices(gpu, "GPU")
            tf.config.experimental.set_memory_growth(gpu, True)
        elif not any(os.environ.get(v) for v in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")):
            if threading.get_intra_op_parallelism_threads() == 0:
                threading.set_intra_op_parallelism_threads(share)
            if threading.get_inter_op_parallelism_threads() == 0 and not os.environ.get("TF_NUM_INTEROP_THREADS"):
                threading.set_inter_op_parallelism_threads(share)
    except RuntimeError:  # TensorFlow is running already and cannot change its mind
        if communicator.rank == 0:
            warnings.warn(
                f"TensorFlow was used before lsgd.init(), so GPUs are not pinned and the {communicator.local_size} "
                "ranks of a host share its cores without limits. Call lsgd.init() before the model is built.",
                stacklevel=3,
            )


def _affinities_on_this_host(communicator: Communicator) -> list[set[int]]:
    mine = f"{communicator.host} " + " ".join(map(str, os.sched_getaffinity(0)))
    hosts = [entry.decode().split() for entry in communicator.gather(mine.encode())]
    return [set(map(int, cores)) for host, *cores in hosts if host == communicator.host]
