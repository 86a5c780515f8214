"""Errors out of Keras' compiled steps as they were raised: TensorFlow makes errors of its own of what a graph calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvd_localsgd.core import failures


def install() -> None:
    """For ``fit`` and ``train_on_batch`` of every model.

    An optimizer meets its model when the first step is traced, which is too late: that step may fail. So the class is changed, for
    good; a step in which nothing of ours fails does what it did.
    """
    make = keras.Model.make_train_function

    @functools.wraps(make)
    def make_train_function(model: Any, force: bool = False) -> None:
        before = model.train_function
        make(model, force)
        if model.train_function is not before:
            model.train_function = _as_raised(model.train_function)

    keras.Model.make_train_function = make_train_function


def _as_raised(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def step(iterator: Any) -> Any:
        with failures.as_raised(tf.errors.OpError):
            return function(iterator)

    return step
