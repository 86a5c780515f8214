"""Any number of trainings with one optimizer, one callback, one model: each begins and ends, whatever was traced before."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from . import reference
from .helpers import Snapshots

pytestmark = pytest.mark.pairs


def make():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compiled(lsgd, how, **options):
    model = reference.make_model(batch_normalization=False)
    model.compile(lsgd.LocalSGDOptimizer(make(), sync_every=3, **options), "mse", run_eagerly=how == "run_eagerly")
    return model


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("how", ["fit", "run_eagerly"])
def test_every_fit_with_the_optimizer_begins_and_ends(lsgd, gather, how, uneven):
    batches = [7 + 2 * uneven * k for k in range(lsgd.size())]
    model = compiled(lsgd, how)
    x, y = reference.data(lsgd.rank(), batches[lsgd.rank()])
    for fits in (1, 2, 3):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        reference.assert_same_everywhere(gather, model)
        # Momentum is each rank's own, and begin gives all ranks rank 0's: only plain SGD would be one long training.
        assert sum(r.steps for r in model.optimizer.timings) == fits * batches[lsgd.rank()]
    last = [r.last_step for r in model.optimizer.timings if r.interval]
    if not uneven:
        assert last == [3, 6, 7, 10, 13, 14, 17, 20, 21]


def test_fits_one_after_another_are_algorithm_1(lsgd, gather):
    """With plain SGD, three fits of an epoch are an epoch three times over."""
    model = reference.make_model(batch_normalization=False)
    model.compile(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), sync_every=3), "mse")
    x, y = reference.data(lsgd.rank(), 7)
    for _ in range(3):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    models, _ = reference.local_sgd(lambda: keras.optimizers.SGD(0.05), 3, [7] * lsgd.size(), epochs=3, norm=False)
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("eager", [False, True])
def test_a_step_function_traced_once_runs_in_many_trainings(lsgd, gather, eager, mode):
    from hvd_localsgd import devices

    if mode == "async" and lsgd.size() > 1 and devices.get().name != "mpi":
        pytest.skip("asynchronous Local SGD is MPI's")
    model = reference.make_model(batch_normalization=False)
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), sync_every=2, mode=mode)

    def step(xs, ys):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(xs, training=True) - ys) ** 2)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    step = step if eager else tf.function(step)
    x, y = reference.data(lsgd.rank(), 5)
    for _ in range(3):
        for start in range(0, 40, 8):
            step(tf.constant(x[start : start + 8]), tf.constant(y[start : start + 8]))
        optimizer.finalize_variable_values(model.trainable_variables)
        reference.assert_same_everywhere(gather, model)
    assert sum(r.steps for r in optimizer.timings) == 15


@pytest.mark.parametrize("layout", ["input", "no input", "subclass"])
def test_models_that_are_built_by_their_first_step(lsgd, gather, layout):
    """Their weights do not exist before, and differ by rank when they do."""
    keras.utils.set_random_seed(10 + lsgd.rank())
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = layers

        def call(self, x):
            for layer in self.parts:
                x = layer(x)
            return x

    first = [keras.Input((reference.FEATURES,))] if layout == "input" else []
    model = Model() if layout == "subclass" else keras.Sequential([*first, *layers])
    model.compile(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), sync_every=2), "mse")
    model.fit(*reference.data(lsgd.rank(), 5), batch_size=8, shuffle=False, verbose=0)
    reference.assert_same_everywhere(gather, model)
    assert [r.last_step for r in model.optimizer.timings if r.interval] == [2, 4, 5]


def test_one_that_was_saved_in_the_middle_begins_again(lsgd, gather, tmp_path):
    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                self.model.save(tmp_path / "middle.keras")

    model = compiled(lsgd, "fit")
    x, y = reference.data(lsgd.rank(), 6)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[Save()])
    loaded = keras.models.load_model(tmp_path / "middle.keras")
    loaded.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    reference.assert_same_everywhere(gather, loaded)
    assert [r.last_step for r in loaded.optimizer.timings if r.interval] == [7, 10]


def test_a_rank_that_begins_elsewhere_takes_its_first_step_back(lsgd):
    rank, size = lsgd.rank(), lsgd.size()
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    kernel = model.layers[0].kernel
    kernel.assign([[1.0 + rank]])
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.5), sync_every=2)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones((1, 1))))
        optimizer.apply_gradients(zip(tape.gradient(loss, [kernel.value]), [kernel], strict=True))

    step()
    assert kernel.numpy()[0, 0] == (0.5 if rank == 0 else 1.0)
    step()  # all from there: 0.0 on rank 0, 0.5 on the others
    assert kernel.numpy()[0, 0] == pytest.approx(0.5 * (size - 1) / size)
    optimizer.finalize_variable_values([kernel])
    assert np.isfinite(kernel.numpy()).all()


@pytest.mark.parametrize("habit", ["evaluate", "reset_metrics"])
def test_samples_are_counted_whatever_happens_to_the_metrics(lsgd, gather, habit):
    x, y = reference.data(lsgd.rank(), 6, 4 * (lsgd.rank() + 1))

    class Habit(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if habit == "evaluate":
                self.model.evaluate(x[:2], y[:2], verbose=0)
            else:
                self.model.reset_metrics()

    before = Snapshots()
    model = reference.compiled(keras.optimizers.SGD(0.05), batch_normalization=False)
    callback = lsgd.LocalSGDCallback(3, weighting="samples")
    callbacks = [before, callback, Habit()]
    model.fit(x, y, batch_size=4 * (lsgd.rank() + 1), shuffle=False, verbose=0, callbacks=callbacks)
    weights = np.arange(lsgd.size()) + 1.0
    for i, variable in enumerate(model.variables):
        mean = np.average([own[-1][i].astype("float64") for own in gather(before.taken)], axis=0, weights=weights)
        np.testing.assert_allclose(variable.numpy(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_data_that_does_not_know_its_length(lsgd, gather, front_end, steps_per_execution):
    x, y = reference.data(lsgd.rank(), 7)
    signature = tuple(tf.TensorSpec((8, n), tf.float32) for n in (reference.FEATURES, 1))

    def batches():
        for i in range(0, 56, 8):
            yield x[i : i + 8], y[i : i + 8]

    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    optimizer, callbacks = keras.optimizers.SGD(0.05), []
    if front_end == "callback":
        trainer = lsgd.LocalSGDCallback(3)
        callbacks.append(trainer)
    else:
        trainer = optimizer = lsgd.LocalSGDOptimizer(optimizer, 3)
    model = reference.compiled(optimizer, batch_normalization=False, steps_per_execution=steps_per_execution)
    model.fit(dataset, epochs=4, verbose=0, callbacks=callbacks)
    reference.assert_same_everywhere(gather, model)
    assert sum(r.steps for r in trainer.timings) == 28, "Keras' own iterations say 32"
