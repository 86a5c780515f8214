"""The callback in real fits, on any number of ranks: pytest, or mpirun -np N python -m pytest tests/collective."""

import json
import socket
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from . import reference
from .helpers import Epochs, Snapshots, fit


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("interval", [1, 3])
def test_after_a_sync_every_rank_holds_numpys_mean_of_all_ranks(lsgd, gather, interval):
    model = reference.compiled(keras.optimizers.SGD(0.05, momentum=0.9))
    before, after = Snapshots(), Snapshots()
    x, y = reference.data(lsgd.rank(), 7)
    callback = lsgd.LocalSGDCallback(sync_every=interval)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[before, callback, after])
    synced = [step for step in range(7) if (step + 1) % interval == 0]
    for step in range(7):
        local, result = gather(before.taken[step]), gather(after.taken[step])
        for i, (mine, own) in enumerate(zip(after.taken[step], before.taken[step], strict=True)):
            if step in synced:
                mean = np.mean([np.asarray(other[i], "float64") for other in local], axis=0)
                np.testing.assert_allclose(mine, mean, rtol=1e-6, atol=1e-7)
                assert all(other[i].tobytes() == mine.tobytes() for other in result)
            else:
                assert mine.tobytes() == own.tobytes(), "a local step must not touch the weights"
    if lsgd.size() > 1:
        assert any(a.tobytes() != b.tobytes() for a, b in zip(*gather(before.taken[synced[0]])[:2], strict=True))
    reference.assert_same_everywhere(gather, model)


@pytest.mark.pairs
@pytest.mark.parametrize("state", ["keep", "average", "reset"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_fit_follows_algorithm_1_with_each_optimizer_state_policy(lsgd, gather, optimizer, state):
    make = {
        "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(0.02),
    }[optimizer]
    model = reference.compiled(make())
    fit(lsgd, model, 7, lsgd.LocalSGDCallback(sync_every=3, optimizer_state=state), epochs=2)
    models, optimizers = reference.local_sgd(make, 3, [7] * lsgd.size(), epochs=2, state=state)
    reference.assert_close(model, models[0])
    for mine, expected in zip(reference.slots(model.optimizer), reference.slots(optimizers[lsgd.rank()]), strict=True):
        np.testing.assert_allclose(mine.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5, err_msg=mine.path)
    reference.assert_same_everywhere(gather, model)


def test_one_step_per_round_is_parallel_minibatch_sgd(lsgd):
    size = lsgd.size()
    model = reference.compiled(keras.optimizers.SGD(0.1), batch_normalization=False)
    fit(lsgd, model, 6, lsgd.LocalSGDCallback(sync_every=1))
    big = reference.compiled(keras.optimizers.SGD(0.1), batch_normalization=False)
    parts = [reference.data(k, 6) for k in range(size)]
    for start in range(0, 48, 8):
        big.train_on_batch(*(np.concatenate([p[i][start : start + 8] for p in parts]) for i in (0, 1)))
    reference.assert_close(model, big)


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_ranks_with_fewer_batches_stay_with_weight_zero(lsgd, gather, weighting):
    batches = [5 + 4 * k for k in range(lsgd.size())]
    model = reference.compiled(keras.optimizers.SGD(0.05))
    callback = lsgd.LocalSGDCallback(sync_every=4, weighting=weighting)
    fit(lsgd, model, batches[lsgd.rank()], callback, epochs=2)
    models, _ = reference.local_sgd(lambda: keras.optimizers.SGD(0.05), 4, batches, epochs=2, weighting=weighting)
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)
    assert len(set(gather(len(callback.timings)))) == 1
    assert sum(r.steps for r in callback.timings) == 2 * batches[lsgd.rank()]


def test_weighting_by_samples(lsgd, gather):
    rank, size = lsgd.rank(), lsgd.size()
    samples = [8 * (k + 1) for k in range(size)]
    model = reference.compiled(keras.optimizers.SGD(0.05), batch_normalization=False)
    x, y = reference.data(rank, 1, samples[rank])
    before = Snapshots()
    callback = lsgd.LocalSGDCallback(sync_every=1, weighting="samples")
    model.fit(x, y, batch_size=len(x), verbose=0, callbacks=[before, callback])
    local = gather(before.taken[0])
    for i, variable in enumerate(model.variables):
        mean = np.average([np.asarray(own[i], "float64") for own in local], axis=0, weights=samples)
        np.testing.assert_allclose(variable.numpy(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("interval", [4, 6])
def test_steps_per_execution_syncs_at_the_first_batch_end_at_or_past_the_due_step(lsgd, gather, interval):
    model = reference.compiled(keras.optimizers.SGD(0.05), steps_per_execution=4)
    callback = lsgd.LocalSGDCallback(sync_every=interval)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(lsgd, model, 18, callback)
    said = any("steps_per_execution=4" in str(w.message) for w in caught)
    assert said == (interval == 6 and lsgd.rank() == 0)
    expected = [4, 8, 12, 16, 18] if interval == 4 else [8, 16, 18]
    assert [r.last_step for r in callback.timings if r.interval] == expected
    reference.assert_same_everywhere(gather, model)


def test_all_ranks_start_from_rank_0(lsgd):
    optimizer = keras.optimizers.SGD(0.0, momentum=0.9)
    model = reference.compiled(optimizer)
    optimizer.build(model.trainable_variables)
    for i, variable in enumerate([*model.variables, *reference.slots(optimizer)]):
        if "seed" not in variable.path:
            variable.assign(np.full(variable.shape, 10.0 * lsgd.rank() + i, "float32"))
    optimizer.iterations.assign(0 if lsgd.rank() else 100)  # the others have loaded nothing

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.weights = [float(np.mean(v.numpy())) for v in self.model.variables if "seed" not in v.path]
            self.state = [float(np.mean(v.numpy())) for v in reference.slots(self.model.optimizer)]
            self.iterations = int(self.model.optimizer.iterations.numpy())

    look = Look()
    callback = lsgd.LocalSGDCallback(sync_every=1)
    fit(lsgd, model, 1, callback, callbacks=[look])
    assert look.weights == [float(i) for i in range(len(look.weights))]
    assert look.state == [float(len(look.weights) + i) for i in range(len(look.state))]
    assert look.iterations == 100
    assert callback.timings[0].last_step == 101, "steps are counted on from rank 0's iterations"


def test_logs_are_averaged_by_samples_before_later_callbacks_see_them(lsgd, gather):
    rank, size = lsgd.rank(), lsgd.size()
    first, last = Epochs(), Epochs()
    model = reference.compiled(keras.optimizers.SGD(0.05), metrics=["mae"])
    x, y = reference.data(rank, 2 + rank)
    held_x, held_y = reference.data(50 + rank, 1 + rank)
    callback = lsgd.LocalSGDCallback(sync_every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            x, y, batch_size=8, verbose=0, validation_data=(held_x, held_y), callbacks=[first, callback, last], epochs=2
        )
    said = [str(w.message) for w in caught if "stands behind Epochs" in str(w.message)]
    assert bool(said) == (rank == 0 and size > 1)
    for own, averaged in zip(first.seen, last.seen, strict=True):
        everyone = gather(own)
        for key in own:
            weights = [1 + k if key.startswith("val_") else 2 + k for k in range(size)]
            expected = np.average([logs[key] for logs in everyone], weights=weights)
            assert averaged[key] == pytest.approx(expected, rel=1e-6)
        assert all(logs == averaged for logs in gather(averaged))


def test_early_stopping_and_validation_on_rank_0_alone(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.0), batch_normalization=False)  # learns nothing
    stopping = keras.callbacks.EarlyStopping(monitor="val_loss", patience=1)
    validation = reference.data(9, 2) if lsgd.rank() == 0 else None
    history = fit(
        lsgd,
        model,
        3,
        lsgd.LocalSGDCallback(sync_every=2),
        epochs=9,
        callbacks=[stopping],
        validation_data=validation,
    )
    assert len(history.history["val_loss"]) == 2
    assert gather(history.history["val_loss"]) == [history.history["val_loss"]] * lsgd.size()


def test_a_rank_that_stops_alone_stops_all(lsgd, gather):
    class StopInTheMiddle(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if lsgd.rank() == lsgd.size() - 1 and batch == 4:
                self.model.stop_training = True

    model = reference.compiled(keras.optimizers.SGD(0.05))
    callback = lsgd.LocalSGDCallback(sync_every=4)
    fit(lsgd, model, 40, callback, epochs=3, callbacks=[StopInTheMiddle()])
    steps = gather(sum(r.steps for r in callback.timings))
    assert steps[-1] == 5
    assert all(5 <= s <= 9 for s in steps), steps
    reference.assert_same_everywhere(gather, model)


def test_a_rank_that_stops_at_the_epochs_end_stops_all(lsgd, gather):
    class StopAlone(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if lsgd.rank() == 0:
                self.model.stop_training = True

    model = reference.compiled(keras.optimizers.SGD(0.05))
    history = fit(lsgd, model, 6, lsgd.LocalSGDCallback(sync_every=4), epochs=5, callbacks=[StopAlone()])
    assert all(epochs <= 2 for epochs in gather(len(history.history["loss"])))
    reference.assert_same_everywhere(gather, model)


def test_terminate_on_nan_ends_all_ranks_in_good_order(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    x, y = reference.data(lsgd.rank(), 12)
    if lsgd.rank() == 0:
        x[24:32] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = model.fit(
            x,
            y,
            batch_size=8,
            shuffle=False,
            verbose=0,
            epochs=3,
            callbacks=[lsgd.LocalSGDCallback(sync_every=8), keras.callbacks.TerminateOnNaN()],
        )
    assert all(epochs == 1 for epochs in gather(len(history.history["loss"])))


def test_nan_weights_are_an_error_on_every_rank_that_names_the_rank(lsgd):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    x, y = reference.data(lsgd.rank(), 4)
    if lsgd.rank() == lsgd.size() - 1:
        x[:8] = np.nan
    with pytest.raises(lsgd.RankFailed, match=rf"NaN or infinity in the weights of rank {lsgd.size() - 1} on "):
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[lsgd.LocalSGDCallback(sync_every=2)])


def test_what_is_averaged_and_what_is_left_alone(lsgd, gather):
    class Counting(keras.layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1)
            return x

    keras.utils.set_random_seed(1)
    frozen = keras.layers.Dense(4, trainable=False, name="frozen")
    counting, dropout = Counting(), keras.layers.Dropout(0.5, seed=5 + lsgd.rank())
    model = keras.Sequential([keras.Input((reference.FEATURES,)), frozen, counting, dropout, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    callback = lsgd.LocalSGDCallback(sync_every=2)
    frozen_before = frozen.kernel.numpy()
    fit(lsgd, model, 4 + lsgd.rank(), callback)
    assert int(counting.calls.numpy()) == 4 + lsgd.rank(), "counters are each rank's own"
    seeds = gather(dropout.seed_generator.state.numpy().tolist())
    assert len(set(map(tuple, seeds))) == lsgd.size(), "random seeds differ by rank"
    np.testing.assert_array_equal(frozen.kernel.numpy(), gather(frozen_before)[0])
    sent = 0 if lsgd.size() == 1 else 4 * (4 + 1)
    assert {r.bytes for r in callback.timings if r.interval} == {sent}, "frozen weights need not travel"


@pytest.mark.usefixtures("layout")
def test_a_tensor_or_a_variable_that_shares_memory_keeps_its_value(lsgd):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    other = [tf.Variable(tf.zeros(v.shape)) for v in model.variables]

    class Hold(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:  # the sync comes right after
                self.tensors = [v.value.read_value() for v in self.model.variables]
                for copy, variable in zip(other, self.model.variables, strict=True):
                    copy.assign(variable.value)
                self.values = [np.array(t.numpy()) for t in self.tensors]

    hold = Hold()
    x, y = reference.data(lsgd.rank(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[hold, lsgd.LocalSGDCallback(sync_every=3)])
    for value, tensor, copy in zip(hold.values, hold.tensors, other, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), value)
        np.testing.assert_array_equal(copy.numpy(), value)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64", "bfloat16"])
def test_dtypes(lsgd, gather, policy):
    keras.utils.set_random_seed(2)
    layer = {"dtype": policy}
    model = keras.Sequential(
        [keras.Input((reference.FEATURES,)), keras.layers.Dense(5, **layer), keras.layers.Dense(1, **layer)]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    before = Snapshots()
    x, y = reference.data(lsgd.rank(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[before, lsgd.LocalSGDCallback(sync_every=2)])
    tolerance = {"float64": 1e-15, "bfloat16": 2**-7}.get(policy, 1e-6)
    local = gather([v.astype("float64") for v in before.taken[-1]])
    for i, variable in enumerate(model.variables):
        mean = np.mean([own[i] for own in local], axis=0)
        np.testing.assert_allclose(variable.numpy().astype("float64"), mean, rtol=tolerance, atol=tolerance)
    reference.assert_same_everywhere(gather, model)


def test_a_model_that_has_no_weights_before_its_first_batch(lsgd, gather):
    keras.utils.set_random_seed(lsgd.rank())
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    fit(lsgd, model, 5, lsgd.LocalSGDCallback(sync_every=2))
    reference.assert_same_everywhere(gather, model)


def test_exponential_moving_averages_end_equal(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5))
    fit(lsgd, model, 5, lsgd.LocalSGDCallback(sync_every=2))
    reference.assert_same_everywhere(gather, model)


@pytest.mark.pairs
@pytest.mark.parametrize("arguments", [{"jit_compile": True}, {"run_eagerly": True}])
def test_compiled_by_xla_and_eager(lsgd, arguments):
    model = reference.compiled(keras.optimizers.SGD(0.05), **arguments)
    fit(lsgd, model, 5, lsgd.LocalSGDCallback(sync_every=2))
    models, _ = reference.local_sgd(lambda: keras.optimizers.SGD(0.05), 2, [5] * lsgd.size())
    reference.assert_close(model, models[0], 1e-4)


@pytest.mark.pairs
def test_with_gradient_accumulation_a_local_step_is_a_batch(lsgd, gather):
    def make():
        return keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2)

    model = reference.compiled(make())
    callback = lsgd.LocalSGDCallback(sync_every=3)
    fit(lsgd, model, 8, callback)
    assert [r.last_step for r in callback.timings if r.interval] == [3, 6, 8]
    models, _ = reference.local_sgd(make, 3, [8] * lsgd.size())
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)


def test_timings_add_up_and_are_written(lsgd, gather, tmp_path):
    folder = gather(str(tmp_path))[0]
    model = reference.compiled(keras.optimizers.SGD(0.05))
    callback = lsgd.LocalSGDCallback(sync_every=3, timings=folder)
    losses = []  # as another callback sees them
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    before = time.time()
    fit(lsgd, model, 8, callback, epochs=2, callbacks=[watch])
    after = time.time()
    lines = [json.loads(line) for line in Path(f"{folder}/rank-{lsgd.rank()}.jsonl").read_text().splitlines()]
    parts = ("compute", "input", "wait", "pack", "communicate", "unpack", "outer")
    assert [(r["first_step"], r["last_step"]) for r in lines if r["interval"]] == [
        (1, 3), (4, 6), (7, 8), (9, 11), (12, 14), (15, 16)
    ]  # fmt: skip
    for line, record in zip(lines, callback.timings, strict=True):
        assert line["round"] == record.round
        assert sum(line[p] for p in parts) + line["residual"] == pytest.approx(line["wall"], abs=1e-9)
        assert all(line[p] >= 0 for p in parts)
        assert (line["rank"], line["size"], line["host"]) == (lsgd.rank(), lsgd.size(), socket.gethostname())
        assert before <= line["start"] <= line["start"] + line["wall"] <= after + 0.01
    wall = sum(line["wall"] for line in lines)
    assert sum(abs(line["residual"]) for line in lines) < 0.01 * wall
    assert [line["loss"] for line in lines] == [
        losses[line["last_step"] - 1] if line["steps"] else None for line in lines
    ]
    assert [t["rank"] for t in callback.totals] == list(range(lsgd.size()))
    mine = callback.totals[lsgd.rank()]
    assert mine["syncs"] == 6
    assert mine["wall"] == pytest.approx(wall)
    in_logs = sum(epoch["seconds_compute"] for epoch in callback.epochs)
    assert 0 < in_logs <= mine["compute"] * 1.0001


def test_time_goes_where_it_was_spent(lsgd):
    slow = lsgd.size() - 1

    class Nap(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):  # after our own: inside the step
            time.sleep(0.02 if lsgd.rank() == slow else 0)

        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.01)

    model = reference.compiled(keras.optimizers.SGD(0.05))
    callback = lsgd.LocalSGDCallback(sync_every=10)
    fit(lsgd, model, 40, callback, callbacks=[Nap()])
    rounds = callback.timings[1:-1]  # the first compiles
    assert sum(r.input for r in rounds) > 0.8 * 30 * 0.01
    if lsgd.rank() == slow:
        assert sum(r.compute for r in rounds) > 0.7 * 30 * 0.02
    else:
        assert sum(r.wait for r in rounds) > 0.5 * 30 * 0.02


@pytest.mark.pairs
def test_waiting_for_data_inside_keras_step_is_input(lsgd):
    x, y = reference.data(0, 100)

    def batches():
        for i in range(0, 800, 8):
            time.sleep(0.04)
            yield x[i : i + 8], y[i : i + 8]

    signature = tuple(tf.TensorSpec((8, n), tf.float32) for n in (reference.FEATURES, 1))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    model = reference.compiled(keras.optimizers.SGD(0.05))
    callback = lsgd.LocalSGDCallback(sync_every=50)
    model.fit(dataset, verbose=0, callbacks=[callback])
    late = callback.timings[1]
    assert late.input > 0.6 * 50 * 0.04
    assert late.compute < late.input


def test_drift_is_the_root_mean_square_distance_from_the_average(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    before = Snapshots()
    x, y = reference.data(lsgd.rank(), 4)
    callback = lsgd.LocalSGDCallback(sync_every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[before, callback])
    flat = np.array([np.concatenate([v.reshape(-1) for v in own]) for own in gather(before.taken[-1])], "float64")
    expected = np.sqrt(np.mean(np.sum((flat - flat.mean(0)) ** 2, axis=1)))
    assert callback.timings[0].drift == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_fit_again_goes_on_where_the_last_one_ended(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    callback = lsgd.LocalSGDCallback(sync_every=3)
    for _ in range(2):
        fit(lsgd, model, 4, callback)
    assert [r.last_step for r in callback.timings if r.interval] == [3, 4, 7, 8]
    reference.assert_same_everywhere(gather, model)


def test_with_the_optimizer_as_well_is_an_error(lsgd):
    model = reference.compiled(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05)))
    with pytest.raises(ValueError, match="not both"):
        fit(lsgd, model, 2, lsgd.LocalSGDCallback())


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "x", True, None])
def test_sync_every_must_be_a_positive_integer(lsgd, wrong):
    with pytest.raises(ValueError, match=r"sync_every must be an integer >= 1 .* Received: "):
        lsgd.LocalSGDCallback(sync_every=wrong)
    with pytest.raises(ValueError, match=r"sync_every must be an integer >= 1 .* Received: "):
        lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), sync_every=wrong)


def test_unknown_choices(lsgd):
    with pytest.raises(ValueError, match="optimizer_state must be one of .* Received: 'forget'"):
        lsgd.LocalSGDCallback(optimizer_state="forget")
    with pytest.raises(ValueError, match="weighting must be one of .* Received: 'heavy'"):
        lsgd.LocalSGDCallback(weighting="heavy")
