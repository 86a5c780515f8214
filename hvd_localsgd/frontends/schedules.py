"""The schedules of the core, known to Keras' serialisation."""

from __future__ import annotations

import keras

from hvd_localsgd.core.schedules import SCHEDULES, Constant, Growing, OneShot, Schedule, SyncSteps

__all__ = ["Constant", "Growing", "OneShot", "Schedule", "SyncSteps"]

for _schedule in SCHEDULES:
    keras.saving.register_keras_serializable("hvd_localsgd")(_schedule)
