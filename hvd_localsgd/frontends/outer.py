"""The outer steps of the core, known to Keras' serialisation."""

from __future__ import annotations

import keras

from hvd_localsgd.core.outer import OUTERS, Mean, Nesterov, SlowMo

__all__ = ["Mean", "Nesterov", "SlowMo"]

for _outer in OUTERS:
    keras.saving.register_keras_serializable("hvd_localsgd")(_outer)
