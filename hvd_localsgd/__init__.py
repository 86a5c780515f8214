"""Local SGD for Keras 3 on MPI clusters.

Every rank takes H optimizer steps on its own data, then one allreduce averages the weights. See README.md.
Names are imported on first use, so that ``import hvd_localsgd`` loads neither TensorFlow nor MPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hvd_localsgd.version import __version__

if TYPE_CHECKING:
    from hvd_localsgd.callback import LocalSGDCallback
    from hvd_localsgd.data import shard
    from hvd_localsgd.devices import init, local_rank, local_size, rank, size
    from hvd_localsgd.header import RankFailed
    from hvd_localsgd.iterates import IterateAverage
    from hvd_localsgd.optimizer import LocalSGDOptimizer
    from hvd_localsgd.schedules import Constant, Growing, OneShot, Schedule, SyncSteps
    from hvd_localsgd.theory import InverseTimeDecay, convex_interval, nonconvex_interval, speed_up

_HOME = {
    "LocalSGDCallback": "callback",
    "LocalSGDOptimizer": "optimizer",
    "shard": "data",
    "init": "devices",
    "rank": "devices",
    "size": "devices",
    "local_rank": "devices",
    "local_size": "devices",
    "RankFailed": "header",
    "Schedule": "schedules",
    "Constant": "schedules",
    "OneShot": "schedules",
    "SyncSteps": "schedules",
    "Growing": "schedules",
    "IterateAverage": "iterates",
    "InverseTimeDecay": "theory",
    "convex_interval": "theory",
    "nonconvex_interval": "theory",
    "speed_up": "theory",
}

__all__ = [
    "Constant",
    "Growing",
    "InverseTimeDecay",
    "IterateAverage",
    "LocalSGDCallback",
    "LocalSGDOptimizer",
    "OneShot",
    "RankFailed",
    "Schedule",
    "SyncSteps",
    "__version__",
    "convex_interval",
    "init",
    "local_rank",
    "local_size",
    "nonconvex_interval",
    "rank",
    "shard",
    "size",
    "speed_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hvd_localsgd' has no attribute {name!r}")
    value = getattr(import_module(f"hvd_localsgd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
