"""The optimizer in fits and custom loops, on any number of ranks."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from . import reference

pytestmark = pytest.mark.pairs

INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.02),
    "adamw": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}


def wrapped(lsgd, model_name_to_inner, interval, **arguments):
    return lsgd.LocalSGDOptimizer(INNER[model_name_to_inner](), sync_every=interval, **arguments)


def training_step(model, count_samples=False):
    """A step of a loop of one's own, which is not Keras' ``train_step(data)``."""

    def step(xs, ys):
        if count_samples:
            model.optimizer.count_samples(tf.shape(xs)[0])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(xs, training=True) - ys) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    return step


def run(how, model, x, y, batch=8):
    """One epoch in order, five ways."""
    if how in ("fit", "steps_per_execution", "run_eagerly"):
        model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
        return
    step = training_step(model)
    if how == "tf_function":
        step = tf.function(step)
    for start in range(0, len(x), batch):
        step(tf.constant(x[start : start + batch]), tf.constant(y[start : start + batch]))
    model.optimizer.finalize_variable_values(model.trainable_variables)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("how", ["fit", "steps_per_execution", "run_eagerly", "tape", "tf_function"])
def test_follows_algorithm_1(lsgd, gather, how):
    extra = {"steps_per_execution": {"steps_per_execution": 3}, "run_eagerly": {"run_eagerly": True}}.get(how, {})
    model = reference.make_model()
    counter = tf.Variable(lsgd.rank())
    optimizer = wrapped(lsgd, "momentum", 3, statistics=[*model.non_trainable_variables, counter])
    model.compile(optimizer, "mse", **extra)
    run(how, model, *reference.data(lsgd.rank(), 8))
    models, _ = reference.local_sgd(INNER["momentum"], 3, [8] * lsgd.size())
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)
    assert int(counter.numpy()) == lsgd.rank(), "an integer is each rank's own"
    assert [r.last_step for r in optimizer.timings if r.interval] == [3, 6, 8]
    assert all(r.input == 0 for r in optimizer.timings)
    assert [t["rank"] for t in optimizer.totals] == list(range(lsgd.size()))


@pytest.mark.parametrize("name", sorted(INNER))
def test_works_with_what_keras_optimizers_can_do(lsgd, gather, name):
    model = reference.compiled(wrapped(lsgd, name, 2), batch_normalization=False)
    run("fit", model, *reference.data(lsgd.rank(), 5))
    models, _ = reference.local_sgd(INNER[name], 2, [5] * lsgd.size(), norm=False)
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("state", ["average", "reset"])
def test_optimizer_state_policies(lsgd, state):
    model = reference.compiled(wrapped(lsgd, "momentum", 3, optimizer_state=state), batch_normalization=False)
    run("fit", model, *reference.data(lsgd.rank(), 7))
    models, optimizers = reference.local_sgd(INNER["momentum"], 3, [7] * lsgd.size(), norm=False, state=state)
    reference.assert_close(model, models[0])
    theirs = reference.slots(optimizers[lsgd.rank()])
    for mine, expected in zip(reference.slots(model.optimizer.inner_optimizer), theirs, strict=True):
        np.testing.assert_allclose(mine.numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)


def test_reset_gives_adagrad_its_initial_accumulators_back(lsgd):
    inner = keras.optimizers.Adagrad(0.05, initial_accumulator_value=0.3)
    model = reference.compiled(lsgd.LocalSGDOptimizer(inner, sync_every=2, optimizer_state="reset"), False)
    run("fit", model, *reference.data(lsgd.rank(), 4))
    for slot in reference.slots(inner):
        np.testing.assert_array_equal(slot.numpy(), np.full(slot.shape, 0.3, "float32"))


def test_gradient_accumulation_counts_updates_not_batches(lsgd, gather):
    def make():
        return keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2)

    optimizer = lsgd.LocalSGDOptimizer(make(), sync_every=3)
    model = reference.compiled(optimizer, batch_normalization=False)
    run("fit", model, *reference.data(lsgd.rank(), 12))
    assert [r.last_step for r in optimizer.timings if r.interval] == [3, 6]
    models, _ = reference.local_sgd(make, 6, [12] * lsgd.size(), norm=False)
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)


def test_exponential_moving_averages_end_equal(lsgd, gather):
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5), sync_every=3)
    model = reference.compiled(optimizer, batch_normalization=False)
    run("fit", model, *reference.data(lsgd.rank(), 7))
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_ranks_with_fewer_batches_wait_for_the_others(lsgd, gather, weighting):
    batches = [5 + 4 * k for k in range(lsgd.size())]
    model = reference.compiled(wrapped(lsgd, "sgd", 4, weighting=weighting), batch_normalization=False)
    x, y = reference.data(lsgd.rank(), batches[lsgd.rank()])
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    models, _ = reference.local_sgd(INNER["sgd"], 4, batches, epochs=2, weighting=weighting, norm=False, flush=False)
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("eager", [True, False])
def test_a_custom_loop_counts_its_samples(lsgd, gather, eager):
    """Ranks with batches of different sizes, and different numbers of them."""
    rank, size = lsgd.rank(), lsgd.size()
    sizes, batches = [4 * (k + 1) for k in range(size)], [5 + 4 * (size - 1 - k) for k in range(size)]
    model = reference.compiled(wrapped(lsgd, "sgd", 4, weighting="samples"), batch_normalization=False)
    model.optimizer.build(model.trainable_variables)
    step = training_step(model, count_samples=True)
    step = step if eager else tf.function(step)
    x, y = reference.data(rank, batches[rank], sizes[rank])
    for start in range(0, len(x), sizes[rank]):
        step(tf.constant(x[start : start + sizes[rank]]), tf.constant(y[start : start + sizes[rank]]))
    model.optimizer.finalize_variable_values(model.trainable_variables)
    models, _ = reference.local_sgd(INNER["sgd"], 4, batches, batch=sizes, weighting="samples", norm=False)
    reference.assert_close(model, models[0])
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("eager", [True, False])
def test_a_custom_loop_that_does_not_count_its_samples_is_an_error(lsgd, eager):
    model = reference.compiled(wrapped(lsgd, "sgd", 4, weighting="samples"), batch_normalization=False)
    step = training_step(model)
    with pytest.raises(RuntimeError, match="count_samples"):
        (step if eager else tf.function(step))(*map(tf.constant, reference.data(lsgd.rank(), 1)))


def test_counting_samples_before_the_optimizer_is_built_is_an_error(lsgd):
    with pytest.raises(RuntimeError, match=r"optimizer\.build"):
        wrapped(lsgd, "sgd", 4, weighting="samples").count_samples(8)


@pytest.mark.parametrize("order", ["LossScale(LocalSGD)", "LocalSGD(LossScale)", "mixed_float16"])
def test_a_step_that_loss_scaling_skips_counts_on_every_rank(lsgd, gather, order):
    """One rank's gradients overflow in one step: it must not fall behind the others."""
    scale, ours = keras.optimizers.LossScaleOptimizer, lsgd.LocalSGDOptimizer
    if order == "LocalSGD(LossScale)":
        optimizer = local = ours(scale(keras.optimizers.SGD(0.01), initial_scale=4.0), sync_every=2)
    else:
        local = ours(keras.optimizers.SGD(0.01), sync_every=2)
        optimizer = scale(local, initial_scale=4.0) if order == "LossScale(LocalSGD)" else local
    keras.utils.set_random_seed(3)
    dtype = "mixed_float16" if order == "mixed_float16" else None
    model = keras.Sequential([keras.Input((reference.FEATURES,)), keras.layers.Dense(1, dtype=dtype)])
    if order == "mixed_float16":
        model.dtype_policy = keras.DTypePolicy("mixed_float16")
    model.compile(optimizer, "mse", auto_scale_loss=order == "mixed_float16")
    if order == "mixed_float16":
        assert isinstance(model.optimizer, scale), "Keras wraps the optimizer by itself"
    x, y = reference.data(lsgd.rank(), 6)
    if lsgd.rank() == 0:
        x[24:32] = np.inf  # the step that a sync should follow
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert (
        gather([(r.first_step, r.last_step) for r in local.timings if r.interval])
        == [[(1, 2), (3, 4), (5, 6)]] * lsgd.size()
    )
    assert all(np.isfinite(w).all() for w in model.get_weights())
    reference.assert_same_everywhere(gather, model)
    skipped = gather(int(local.iterations.numpy()))
    assert skipped[0] < 6
    assert order == "mixed_float16" or all(n == 6 for n in skipped[1:])


def test_all_ranks_start_from_rank_0(lsgd, gather):
    model = reference.compiled(wrapped(lsgd, "momentum", 1), batch_normalization=False)
    model.optimizer.inner_optimizer.learning_rate = 0.0
    for i, variable in enumerate(model.variables):
        variable.assign(np.full(variable.shape, 5.0 * lsgd.rank() + i, "float32"))
    run("fit", model, *reference.data(lsgd.rank(), 1))
    assert [float(np.mean(w)) for w in model.get_weights()] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("eager", [True, False])
def test_a_first_gradient_taken_at_other_weights_is_dropped(lsgd, gather, eager):
    """Ranks that were initialised differently: only rank 0's first gradient was taken where all ranks now are."""
    rank, size = lsgd.rank(), lsgd.size()
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    kernel = model.layers[0].kernel
    kernel.assign([[1.0 + rank]])
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.5), sync_every=1)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones((1, 1))) * kernel.value)  # kernel^2
        optimizer.apply_gradients(zip(tape.gradient(loss, [kernel.value]), [kernel], strict=True))

    (step if eager else tf.function(step))()
    # From 1, a step is 1 - 0.5 * 2 = 0. The others stay at 1.
    assert kernel.numpy()[0, 0] == pytest.approx((size - 1) / size)
    optimizer.finalize_variable_values([kernel])


def test_saves_and_loads(lsgd, gather, tmp_path):
    model = reference.compiled(wrapped(lsgd, "adam", 4, optimizer_state="average"), batch_normalization=False)
    x, y = reference.data(lsgd.rank(), 6)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    optimizer = loaded.optimizer
    assert isinstance(optimizer, lsgd.LocalSGDOptimizer)
    assert optimizer.get_config() == model.optimizer.get_config()
    for mine, saved in zip(optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine.numpy(), saved.numpy(), err_msg=mine.path)
    loaded.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    reference.assert_same_everywhere(gather, loaded)
    assert [r.last_step for r in optimizer.timings if r.interval] == [10, 12], "the count of steps goes on"


@pytest.mark.pairs
def test_statistics_are_not_saved(lsgd):
    """They are variables of a model: an optimizer from a file has none."""
    statistic, weight = tf.Variable([float(lsgd.rank())]), keras.Variable([0.0])
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(1.0), 1, statistics=[statistic])
    loaded = lsgd.LocalSGDOptimizer.from_config(optimizer.get_config())
    loaded.apply_gradients([(tf.constant([1.0 + lsgd.rank()]), weight)])
    loaded.finalize_variable_values([weight])
    np.testing.assert_allclose(weight.numpy(), [-np.mean(np.arange(lsgd.size()) + 1)])
    np.testing.assert_array_equal(statistic.numpy(), [lsgd.rank()])


def test_inside_xla_it_names_the_way_out(lsgd):
    model = reference.compiled(wrapped(lsgd, "sgd", 2), jit_compile=True)
    with pytest.raises(RuntimeError, match=r"jit_compile=False.*LocalSGDCallback"):
        run("fit", model, *reference.data(lsgd.rank(), 2))


def test_learning_rate_iterations_and_loss_scale_are_the_inner_optimizers(lsgd):
    inner = keras.optimizers.SGD(0.5, loss_scale_factor=8.0)
    optimizer = lsgd.LocalSGDOptimizer(inner)
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate.numpy()) == 0.25
    assert optimizer.iterations is inner.iterations
    assert float(optimizer.scale_loss(2.0)) == 16.0


def test_only_a_keras_optimizer_once(lsgd):
    with pytest.raises(ValueError, match="must be a keras.optimizers.Optimizer. Received: 'sgd'"):
        lsgd.LocalSGDOptimizer("sgd")
    with pytest.raises(ValueError, match="averaging once"):
        lsgd.LocalSGDOptimizer(lsgd.LocalSGDOptimizer(keras.optimizers.SGD()))


@pytest.mark.usefixtures("layout")
def test_a_tensor_that_shares_memory_keeps_its_value(lsgd):
    """In a graph: a tensor read before the sync and used after it."""
    model = reference.compiled(wrapped(lsgd, "sgd", 1), batch_normalization=False)
    optimizer, kernel = model.optimizer, model.layers[0].kernel

    @tf.function
    def step(xs, ys):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(xs) - ys) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        before = kernel.value.read_value()
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return before, before + 0.0

    x, y = reference.data(lsgd.rank(), 3)
    for start in range(0, 24, 8):
        value = kernel.numpy()
        held, copied = step(tf.constant(x[start : start + 8]), tf.constant(y[start : start + 8]))
        if start:
            np.testing.assert_array_equal(held.numpy(), value)
            np.testing.assert_array_equal(copied.numpy(), value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.finalize_variable_values(model.trainable_variables)
