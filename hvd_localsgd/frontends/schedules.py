"""The schedules of the core, known to Keras' serialisation."""

from __future__ import annotations

import keras

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

__all__ = [
    "AdaComm",
    "Auto",
    "Constant",
    "Function",
    "Growing",
    "Join",
    "Now",
    "OneShot",
    "PostLocal",
    "QuadraticSync",
    "Schedule",
    "Stagewise",
    "SyncSteps",
    "Warmup",
]

for _schedule in SCHEDULES:
    keras.saving.register_keras_serializable("hvd_localsgd")(_schedule)
