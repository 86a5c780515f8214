"""Several models in one process: their messages never meet, and none waits for another's end."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from . import reference


def scalar(value):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[value]])
    return model


@pytest.mark.parametrize("eager", [False, True])
def test_twins_in_one_step_are_not_mixed(lsgd, gather, eager):
    """Two critics of the same shape, each with an optimizer; their weights are far apart, and gradients are the ranks' own."""
    models = [scalar(0.0), scalar(100.0)]
    optimizers = [lsgd.LocalSGDOptimizer(keras.optimizers.SGD(1.0), 1 + i) for i in range(2)]

    def step(gradient):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.apply_gradients([(tf.reshape(gradient, (1, 1)), model.layers[0].kernel)])

    step = step if eager else tf.function(step)
    for _ in range(4):
        step(tf.constant(float(lsgd.rank())))
    mean = 4 * np.mean(range(lsgd.size()))
    for start, model, optimizer in zip((0.0, 100.0), models, optimizers, strict=True):
        optimizer.finalize_variable_values(model.trainable_variables)
        assert model.layers[0].kernel.numpy()[0, 0] == pytest.approx(start - mean)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_wide_and_deep_with_an_optimizer_each(lsgd, gather, eager, uneven):
    keras.utils.set_random_seed(7)
    wide = keras.Sequential([keras.Input((reference.FEATURES,)), keras.layers.Dense(1)])
    deep = keras.Sequential([keras.Input((reference.FEATURES,)), keras.layers.Dense(5), keras.layers.Dense(1)])
    pairs = [
        (wide, lsgd.LocalSGDOptimizer(keras.optimizers.Ftrl(0.05), 2)),
        (deep, lsgd.LocalSGDOptimizer(keras.optimizers.Adam(0.01), 3)),
    ]

    def step(x, y):
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean((wide(x) + deep(x) - y) ** 2)
        for model, optimizer in pairs:
            weights = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    step = step if eager else tf.function(step)
    batches = 7 + 4 * uneven * lsgd.rank()
    x, y = reference.data(lsgd.rank(), batches)
    for start in range(0, 8 * batches, 8):
        step(tf.constant(x[start : start + 8]), tf.constant(y[start : start + 8]))
    for model, optimizer in pairs:
        optimizer.finalize_variable_values(model.trainable_variables)
        reference.assert_same_everywhere(gather, model)
        assert sum(r.steps for r in optimizer.timings) == batches


def test_progress_before_the_end_is_not_lost_while_a_rank_waits(lsgd):
    """A rank that waits for the end of one model takes part in the other's syncs with the steps that it has taken."""
    size = lsgd.size()
    models = [scalar(0.0), scalar(0.0)]
    optimizers = [lsgd.LocalSGDOptimizer(keras.optimizers.SGD(1.0), 4) for _ in models]
    for _ in range(3 if lsgd.rank() == 0 else 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.apply_gradients([(tf.ones((1, 1)), model.layers[0].kernel)])
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.finalize_variable_values(model.trainable_variables)
        # Rank 0's three steps count beside the others' four; then the others go on for two.
        expected = -(3 + 4 * (size - 1)) / size - (2 if size > 1 else 0)
        assert model.layers[0].kernel.numpy()[0, 0] == pytest.approx(expected)


@pytest.mark.usefixtures("several_ranks")
def test_models_that_ranks_finish_in_another_order_are_an_error_on_every_rank(lsgd):
    models = [scalar(0.0), scalar(0.0)]
    averagers = [lsgd.ModelAverager(model.trainable_variables, 4) for model in models]
    for averager in averagers:
        averager.step()
    for averager in averagers if lsgd.rank() == 0 else averagers[::-1]:
        with pytest.raises(lsgd.RankFailed, match="average different models at the same moment"):
            averager.finish()


class Adversaries(keras.Model):
    """A ``train_step`` with two of our optimizers, neither of which ``fit`` knows."""

    def __init__(self, lsgd):
        super().__init__()
        keras.utils.set_random_seed(5)
        self.parts = [keras.Sequential([keras.Input((reference.FEATURES,)), keras.layers.Dense(1)]) for _ in range(2)]
        self.optimizers = [lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.01), 2) for _ in range(2)]

    def train_step(self, data):
        x, y = data
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((part(x, training=True) - y) ** 2)
            weights = part.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


def test_adversaries_in_fit(lsgd, gather):
    model = Adversaries(lsgd)
    model.compile()
    for _ in range(2):
        model.fit(*reference.data(lsgd.rank(), 5 + lsgd.rank()), batch_size=8, verbose=0)
        for part, optimizer in zip(model.parts, model.optimizers, strict=True):
            optimizer.finalize_variable_values(part.trainable_variables)
            reference.assert_same_everywhere(gather, part)
