"""What the core lets users choose, known to Keras' serialisation."""

from __future__ import annotations

import keras

from hvd_localsgd.core.groups import Groups
from hvd_localsgd.core.guards import Norms, Outliers
from hvd_localsgd.core.outer import OUTERS, Mean, Nesterov, SlowMo
from hvd_localsgd.core.schedules import (
    SCHEDULES,
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

__all__ = [
    "AdaComm",
    "Auto",
    "Constant",
    "Function",
    "Groups",
    "Growing",
    "Join",
    "Mean",
    "Names",
    "Nesterov",
    "Norms",
    "Now",
    "OneShot",
    "Outliers",
    "PostLocal",
    "QuadraticSync",
    "Schedule",
    "SlowMo",
    "Stagewise",
    "SyncSteps",
    "Warmup",
]

for _part in (*SCHEDULES, *OUTERS, Names, Groups, Norms, Outliers):
    keras.saving.register_keras_serializable("hvd_localsgd")(_part)
