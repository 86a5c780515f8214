"""The choice of who carries the messages."""

from __future__ import annotations

import os
import sys
from typing import Any

from hvd_localsgd.communicators import launchers
from hvd_localsgd.communicators.base import Communicator
from hvd_localsgd.communicators.launchers import children

_current: Communicator | None = None
_chosen_by = 0  # which process: a forked child inherits the choice


def choose(name: str = "auto") -> Communicator:
    """The communicator of this process, made on the first call and kept.

    Args:
        name: ``"mpi"``, ``"horovod"`` or ``"serial"`` force one. ``"auto"`` takes what the environment variable
            HVD_LOCALSGD_COMMUNICATOR says, else Horovod if ``horovod.tensorflow`` is initialised or its launcher
            uses no MPI, else MPI under a launcher, else one process. A child process of a rank, such as a data
            worker, is alone whatever the name: it cannot join.

    Raises:
        CommunicatorError: it is not installed, or MPI and the launcher do not belong together.
        ValueError: unknown name, or another communicator was chosen before.
    """
    global _current, _chosen_by
    makers: dict[str, Any] = {"mpi": _mpi, "horovod": _horovod, "serial": _serial}
    forked = _current is not None and _chosen_by != os.getpid()
    if name == "auto":
        name = os.environ.get("HVD_LOCALSGD_COMMUNICATOR", "auto")
    if name != "auto" and name not in makers:
        raise ValueError(f"communicator must be 'auto', 'mpi', 'horovod' or 'serial'. Received: {name!r}")
    if forked or children.is_child():
        name = "serial"
    if _current is None or forked:
        _current, _chosen_by = makers[_automatic() if name == "auto" else name](), os.getpid()
        if _current.name != "serial" and launchers.under_launcher():
            children.joined(_current.rank, _current.size)
    elif name not in ("auto", _current.name):
        raise ValueError(
            f"communicator={name!r} was asked for, but {_current.name!r} is in use already: call "
            f"lsgd.init(communicator={name!r}) first thing in the script."
        )
    return _current


def _automatic() -> str:
    if _horovod_is_initialized() or "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        return "horovod"
    return "mpi" if launchers.under_launcher() or "mpi4py.MPI" in sys.modules else "serial"


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
