"""Local SGD for Keras 3 on MPI clusters.

Every rank takes H optimizer steps on its own data, then one allreduce averages the weights. See README.md.
Names are imported on first use, so that ``import hvd_localsgd`` loads neither TensorFlow nor MPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hvd_localsgd.frontends import registration
from hvd_localsgd.version import __version__

if TYPE_CHECKING:
    from hvd_localsgd.averager import ModelAverager
    from hvd_localsgd.core.groups import Groups
    from hvd_localsgd.core.guards import Norms, Outliers
    from hvd_localsgd.core.outer import Mean, Nesterov, SlowMo
    from hvd_localsgd.core.schedules import (
        AdaComm,
        Auto,
        Constant,
        Function,
        Growing,
        Join,
        Now,
        OneShot,
        PostLocal,
        QuadraticSync,
        Schedule,
        Stagewise,
        SyncSteps,
        Warmup,
    )
    from hvd_localsgd.core.selection import Names
    from hvd_localsgd.core.theory import convex_interval, nonconvex_interval, speed_up
    from hvd_localsgd.devices import init, local_rank, local_size, rank, size
    from hvd_localsgd.errors import CheckpointError, CommunicatorError, LocalSGDError, Preempted, RankFailed
    from hvd_localsgd.frontends.callback import LocalSGDCallback
    from hvd_localsgd.frontends.callback_list import every_rank
    from hvd_localsgd.frontends.checkpoint import LocalSGDCheckpoint
    from hvd_localsgd.frontends.data import shard
    from hvd_localsgd.frontends.iterates import IterateAverage
    from hvd_localsgd.frontends.optimizer import LocalSGDOptimizer
    from hvd_localsgd.frontends.rates import InverseTimeDecay
    from hvd_localsgd.frontends.statistics import refresh_statistics

_HOME = {
    "AdaComm": "core.schedules",
    "Auto": "core.schedules",
    "CheckpointError": "errors",
    "CommunicatorError": "errors",
    "Constant": "core.schedules",
    "Function": "core.schedules",
    "Groups": "core.groups",
    "Growing": "core.schedules",
    "InverseTimeDecay": "frontends.rates",
    "IterateAverage": "frontends.iterates",
    "Join": "core.schedules",
    "LocalSGDCallback": "frontends.callback",
    "LocalSGDCheckpoint": "frontends.checkpoint",
    "LocalSGDError": "errors",
    "LocalSGDOptimizer": "frontends.optimizer",
    "Mean": "core.outer",
    "ModelAverager": "averager",
    "Names": "core.selection",
    "Nesterov": "core.outer",
    "Norms": "core.guards",
    "Now": "core.schedules",
    "OneShot": "core.schedules",
    "Outliers": "core.guards",
    "PostLocal": "core.schedules",
    "Preempted": "errors",
    "QuadraticSync": "core.schedules",
    "RankFailed": "errors",
    "Schedule": "core.schedules",
    "SlowMo": "core.outer",
    "Stagewise": "core.schedules",
    "SyncSteps": "core.schedules",
    "Warmup": "core.schedules",
    "convex_interval": "core.theory",
    "every_rank": "frontends.callback_list",
    "init": "devices",
    "local_rank": "devices",
    "local_size": "devices",
    "nonconvex_interval": "core.theory",
    "rank": "devices",
    "refresh_statistics": "frontends.statistics",
    "shard": "frontends.data",
    "size": "devices",
    "speed_up": "core.theory",
}

__all__ = [
    "AdaComm",
    "Auto",
    "CheckpointError",
    "CommunicatorError",
    "Constant",
    "Function",
    "Groups",
    "Growing",
    "InverseTimeDecay",
    "IterateAverage",
    "Join",
    "LocalSGDCallback",
    "LocalSGDCheckpoint",
    "LocalSGDError",
    "LocalSGDOptimizer",
    "Mean",
    "ModelAverager",
    "Names",
    "Nesterov",
    "Norms",
    "Now",
    "OneShot",
    "Outliers",
    "PostLocal",
    "Preempted",
    "QuadraticSync",
    "RankFailed",
    "Schedule",
    "SlowMo",
    "Stagewise",
    "SyncSteps",
    "Warmup",
    "__version__",
    "convex_interval",
    "every_rank",
    "init",
    "local_rank",
    "local_size",
    "nonconvex_interval",
    "rank",
    "refresh_statistics",
    "shard",
    "size",
    "speed_up",
]


registration.when_keras_is_there()  # so that a saved model is loaded where only this line was run: import hvd_localsgd


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hvd_localsgd' has no attribute {name!r}")
    value = getattr(import_module(f"hvd_localsgd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
