"""What is raised inside a graph comes out of it, whatever else the graph was doing; and is not taken for the end of data."""

import contextlib
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.trainers.data_adapters import array_data_adapter

from hvd_localsgd.backends.tensorflow import graph, kernel
from hvd_localsgd.core import failures

from . import reference

pytestmark = pytest.mark.alone
TRIES = 20  # two threads have to meet


def slow_batches(seconds, batches):
    """A dataset of batches that take so long each, read ahead."""

    def make():
        for _ in range(batches):
            time.sleep(seconds)
            yield np.ones((8, reference.FEATURES), np.float32), np.ones((8, 1), np.float32)

    signature = tf.TensorSpec((None, reference.FEATURES)), tf.TensorSpec((None, 1))
    return tf.data.Dataset.from_generator(make, output_signature=signature).prefetch(1)


def dense():
    return keras.Sequential([keras.Input((reference.FEATURES,)), keras.layers.Dense(1)])


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_schedule_that_raises(lsgd, call, steps_per_execution):
    """In the first step, which begins, and in a sync. Arrays are read by threads of tf.data."""
    calls = []

    def schedule(step):
        calls.append(step)
        if len(calls) == call:
            raise ZeroDivisionError(f"in call {call}")
        return 1

    model = dense()
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.0), schedule)
    model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
    x, y = reference.data(0, 8)
    for _ in range(TRIES):
        calls.clear()
        with pytest.raises(ZeroDivisionError, match=f"in call {call}"):
            model.fit(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_loss_without_gradients_is_keras_error(lsgd, run_eagerly):
    model = dense()
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), 2)
    model.compile(optimizer, loss=lambda wanted, given: tf.reduce_mean(wanted), run_eagerly=run_eagerly)
    x, y = reference.data(0, 2)
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        model.fit(x, y, batch_size=8, verbose=0)


def test_where_no_batch_comes_no_training_begins(lsgd):
    asked = []

    def schedule(step):
        asked.append(step)
        return 1

    model = dense()
    model.compile(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), schedule), "mse")
    model.fit(slow_batches(0.0, 1), verbose=0)
    assert asked, "the step is traced, and a batch begins"
    asked.clear()
    nothing = slow_batches(0.3, 1).filter(lambda x, y: False)
    with contextlib.suppress(ValueError):  # Keras has no logs to give
        model.fit(nothing, verbose=0)
    assert asked == []


def test_the_kernel_says_what_was_raised_before_what_it_stops_does():
    """In a graph that reads data meanwhile, and around which nobody looks for what was raised."""
    if kernel.load() is None:
        pytest.skip("the kernel is not built: python -m hvd_localsgd.tools.build_kernel")

    def call():
        raise ZeroDivisionError("in a sync")

    class Raising(keras.Sequential):
        def train_step(self, data):
            graph.call_if(variable >= 0, call, [variable])
            return super().train_step(data)

    variable = tf.Variable(0.0)
    model = Raising([keras.Input((reference.FEATURES,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=4)
    model.make_train_function()
    as_keras_made_it = model.train_function.__wrapped__
    x, y = reference.data(0, 8)
    for _ in range(5 * TRIES):
        data = array_data_adapter.ArrayDataAdapter(x, y, batch_size=8, shuffle=True).get_tf_dataset()
        with pytest.raises(tf.errors.OpError, match="ZeroDivisionError: in a sync"):
            as_keras_made_it(iter(data))


def test_the_end_of_data_is_not_what_was_raised():
    """A loop over data takes that for no error at all."""

    def step(of_ours):
        with failures.as_raised(tf.errors.OpError):
            with contextlib.suppress(ZeroDivisionError), failures.remembered():
                1 / of_ours
            raise tf.errors.OutOfRangeError(None, None, "End of sequence")

    with pytest.raises(ZeroDivisionError):
        step(0)
    with pytest.raises(tf.errors.OutOfRangeError):  # the error of another step is none of this one's
        step(1)
