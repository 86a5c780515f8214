"""Control variates (VRL-SGD), against the algorithm written a second time in numpy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.backends.numpy import NumpyMemory

from . import reference
from .test_optimizer import run

pytestmark = pytest.mark.pairs

H, BATCH, BATCHES = 3, 8, 12
RATE = 0.05


def vrl(size, rates, gradient, start, interval=H):
    """Liang et al. (2019), Algorithm 1, on a list of float64 arrays: the ranks' weights, and their corrections, after every step."""
    x = [[np.array(a, "float64") for a in start] for _ in range(size)]
    deltas = [[np.zeros_like(a) for a in own] for own in x]
    passed = 0.0
    for t, rate in enumerate(rates):
        for k in range(size):
            for i, g in enumerate(gradient(k, t, x[k])):
                x[k][i] = x[k][i] - rate * (g - deltas[k][i])
        passed += rate
        if (t + 1) % interval == 0 or t + 1 == len(rates):
            means = [np.mean([own[i] for own in x], axis=0) for i in range(len(start))]
            for k in range(size):
                for i, mean in enumerate(means):
                    deltas[k][i] = deltas[k][i] + (mean - x[k][i]) / passed
                    x[k][i] = mean
            passed = 0.0
        yield x, deltas


def bowls(rank, step, x):
    """Gradients of a quadratic on each rank, each with a minimum and a curvature of its own."""
    return [(1 + 0.5 * rank) * (a - np.full(a.shape, 3.0 * rank - 1)) + 0.1 * np.sin(step) for a in x]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_averager_gives_the_corrections_of_the_algorithm(lsgd, gather, dtype):
    """With a rate that falls at every step; a large array is reduced in several chunks, where it lies."""
    own = [np.ones((300, 700), dtype), np.zeros(5, dtype), np.array(2.0, dtype)]
    statistic = np.full(3, 1.0, dtype)
    averager = lsgd.ModelAverager(own, H, statistics=[statistic], control_variates=True)
    rates = [0.2 / (1 + 0.1 * t) for t in range(4 * H)]
    averager.tell(rate=rates[0])
    with averager:
        expected = vrl(lsgd.size(), rates, bowls, own)
        for t, (x, deltas) in enumerate(expected):
            gradients = bowls(lsgd.rank(), t, own)
            for array, gradient, correction in zip(own, gradients, averager.corrections, strict=True):
                array -= (rates[t] * (gradient - correction)).astype(dtype)
            averager.tell(rate=rates[t])
            averager.step()
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-12}
            for i, array in enumerate(own):
                np.testing.assert_allclose(array, x[lsgd.rank()][i], **tolerance)
                np.testing.assert_allclose(averager.corrections[i], deltas[lsgd.rank()][i], **tolerance)
    assert [c.dtype for c in averager.corrections] == [np.dtype(dtype)] * 3
    for everyone in zip(*gather(averager.corrections), strict=True):
        np.testing.assert_allclose(np.sum(everyone, axis=0), 0, atol=1e-4 if dtype == "float32" else 1e-12)


def test_plain_local_sgd_ends_elsewhere_with_corrections_the_optimum_is_where_all_rest(lsgd):
    """Full gradients of quadratics with other minima and curvatures: a long round leads each rank far to its own."""
    ends = {}
    for control_variates in (False, True):
        x = np.zeros(2)
        averager = lsgd.ModelAverager([x], 20, control_variates=control_variates)
        averager.tell(rate=0.05)
        with averager:
            for _ in range(40 * 20):
                (correction,) = averager.corrections or [0.0]
                x -= 0.05 * ((1 + 0.5 * lsgd.rank()) * (x - 3.0 * lsgd.rank()) - correction)
                averager.step()
        ends[control_variates] = x[0]
    ranks = np.arange(lsgd.size())
    optimum = np.average(3.0 * ranks, weights=1 + 0.5 * ranks)
    np.testing.assert_allclose(ends[True], optimum, atol=1e-6)
    assert lsgd.size() == 1 or abs(ends[False] - optimum) > 0.1


def dense_gradients(rank, step, weights):
    """Of ``reference.make_model(batch_normalization=False)``, by hand."""
    x, y = (part[step * BATCH : (step + 1) * BATCH].astype("float64") for part in reference.data(rank, BATCHES, BATCH))
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    error = 2 * (hidden @ w2 + b2 - y) / BATCH
    back = (error @ w2.T) * (1 - hidden**2)
    return [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]


INNER = {
    "constant": (lambda: keras.optimizers.SGD(RATE), lambda t: RATE),
    "schedule": (
        lambda: keras.optimizers.SGD(keras.optimizers.schedules.InverseTimeDecay(RATE, 1, 0.1)),
        lambda t: RATE / (1 + 0.1 * t),
    ),
    "loss scale": (lambda: keras.optimizers.SGD(RATE, loss_scale_factor=64.0), lambda t: RATE),
    "loss scaling inside": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=16.0),
        lambda t: RATE,
    ),
}


def assert_follows(lsgd, gather, optimizer, model, rates, interval=H):
    start = [w.astype("float64") for w in reference.make_model(False).get_weights()]
    *_, (x, deltas) = vrl(lsgd.size(), rates, dense_gradients, start, interval)
    corrections = [np.array(correction) for correction in optimizer.corrections]
    for weight, correction, mine, delta in zip(
        model.get_weights(), corrections, x[lsgd.rank()], deltas[lsgd.rank()], strict=True
    ):
        np.testing.assert_allclose(weight, mine, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(correction, delta, rtol=2e-3, atol=2e-4)
    for everyone in zip(*gather(corrections), strict=True):
        np.testing.assert_allclose(np.sum(everyone, axis=0), 0, atol=1e-5)
    reference.assert_same_everywhere(gather, model)


@pytest.mark.usefixtures("layout")
def test_the_optimizer_follows_the_algorithm_wherever_weights_lie(lsgd, gather):
    assert_trains_as_the_algorithm(lsgd, gather, "fit")


@pytest.mark.parametrize("how", ["run_eagerly", "tape", "tf_function"])
def test_the_optimizer_follows_the_algorithm_in_loops_and_eagerly(lsgd, gather, how):
    assert_trains_as_the_algorithm(lsgd, gather, how)


def assert_trains_as_the_algorithm(lsgd, gather, how):
    """10 steps: three rounds, and a shorter one at the end."""
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(RATE), H, control_variates=True)
    model = reference.compiled(optimizer, False, run_eagerly=how == "run_eagerly")
    x, y = reference.data(lsgd.rank(), BATCHES, BATCH)
    run(how, model, x[: 10 * BATCH], y[: 10 * BATCH])
    assert_follows(lsgd, gather, optimizer, model, [RATE] * 10)


@pytest.mark.parametrize("inner", sorted(INNER))
def test_whatever_scales_the_loss_or_changes_the_rate(lsgd, gather, inner):
    make, rate = INNER[inner]
    optimizer = lsgd.LocalSGDOptimizer(make(), H, control_variates=True)
    model = reference.compiled(optimizer, False)
    run("fit", model, *reference.data(lsgd.rank(), BATCHES, BATCH))
    assert_follows(lsgd, gather, optimizer, model, [rate(t) for t in range(BATCHES)])


def test_loss_scaling_around_it_as_keras_puts_it_under_mixed_precision(lsgd, gather):
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(RATE), H, control_variates=True)
    model = reference.compiled(keras.optimizers.LossScaleOptimizer(optimizer), False)
    run("fit", model, *reference.data(lsgd.rank(), BATCHES, BATCH))
    assert_follows(lsgd, gather, optimizer, model, [RATE] * BATCHES)


def test_with_accumulated_gradients_an_update_is_a_step(lsgd, gather):
    """Two batches of 8 are one of 16."""
    inner = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    optimizer = lsgd.LocalSGDOptimizer(inner, H, control_variates=True)
    model = reference.compiled(optimizer, False)
    run("fit", model, *reference.data(lsgd.rank(), BATCHES, BATCH))

    def gradient(rank, step, weights):
        pairs = zip(*(dense_gradients(rank, 2 * step + half, weights) for half in (0, 1)), strict=True)
        return [np.mean(pair, axis=0) for pair in pairs]

    start = [w.astype("float64") for w in reference.make_model(False).get_weights()]
    *_, (x, _) = vrl(lsgd.size(), [RATE] * (BATCHES // 2), gradient, start)
    for weight, mine in zip(model.get_weights(), x[0], strict=True):
        np.testing.assert_allclose(weight, mine, rtol=2e-4, atol=2e-5)


def test_a_new_training_begins_with_zeros_and_no_file_has_them(lsgd, gather, tmp_path):
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(RATE), H, control_variates=True)
    model = reference.compiled(optimizer, False)
    x, y = reference.data(lsgd.rank(), BATCHES, BATCH)
    run("fit", model, x[: 5 * BATCH], y[: 5 * BATCH])
    assert lsgd.size() == 1 or any(np.any(c) for c in optimizer.corrections)
    model.save(tmp_path / f"{lsgd.rank()}.keras")
    loaded = keras.models.load_model(tmp_path / f"{lsgd.rank()}.keras")
    assert loaded.optimizer.settings.control_variates
    assert [v.path for v in loaded.optimizer.variables] == [v.path for v in optimizer.variables]
    for each in (model, loaded):
        start = each.get_weights()
        run("fit", each, x, y)
        *_, (ends, _) = vrl(lsgd.size(), [RATE] * BATCHES, dense_gradients, start)
        for weight, mine in zip(each.get_weights(), ends[0], strict=True):
            np.testing.assert_allclose(weight, mine, rtol=2e-4, atol=2e-5)


def test_sparse_gradients_and_missing_ones(lsgd, gather):
    """A row of an embedding moves by its correction in steps that do not see it; what has no gradient stays."""
    table, unused = keras.Variable(np.ones((4, 2), "float32")), keras.Variable(np.ones(3, "float32"))
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(RATE), H, control_variates=True)
    optimizer.build([table, unused])

    def rows(rank, step):
        return [(rank + step) % 4, 3]

    @tf.function(autograph=False)
    def step(chosen, target):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((tf.gather(table.value, chosen) - target) ** 2)
        gradient = tape.gradient(loss, [table.value])
        assert isinstance(gradient[0], tf.IndexedSlices)
        optimizer.apply([gradient[0], None], [table, unused])

    def gradient(rank, t, x):
        g = np.zeros_like(x[0])
        np.add.at(g, rows(rank, t), 2 * (x[0][rows(rank, t)] - rank))
        return [g]

    for t in range(3 * H):
        step(tf.constant(rows(lsgd.rank(), t)), tf.constant(float(lsgd.rank())))
    optimizer.finalize_variable_values([table, unused])
    *_, (x, _) = vrl(lsgd.size(), [RATE] * 3 * H, gradient, [np.ones((4, 2))])
    np.testing.assert_allclose(table.numpy(), x[0][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(unused.numpy(), np.ones(3))


def test_what_is_not_averaged_is_not_corrected_nor_are_statistics(lsgd, gather):
    model = reference.make_model()
    optimizer = lsgd.LocalSGDOptimizer(
        keras.optimizers.SGD(RATE), H, control_variates=True, exclude="*bias", statistics=model.non_trainable_variables
    )
    model.compile(optimizer, "mse")
    run("fit", model, *reference.data(lsgd.rank(), 7))
    for variable, correction in zip(model.trainable_variables, optimizer.corrections, strict=True):
        corrected = lsgd.size() > 1 and "bias" not in variable.path
        assert np.any(correction) == corrected, variable.path
    for variable in model.non_trainable_variables:
        assert len({each.tobytes() for each in gather(variable.numpy())}) == 1, variable.path


def test_a_rank_whose_data_end_keeps_its_correction_and_the_others_sum_goes_on(lsgd, gather, several_ranks):
    x = np.zeros(4)
    averager = lsgd.ModelAverager([x], H, control_variates=True)
    averager.tell(rate=0.1)
    averager.begin()
    rounds = 4 if lsgd.rank() else 2
    for t in range(rounds * H):
        x -= 0.1 * (bowls(lsgd.rank(), t, [x])[0] - averager.corrections[0])
        averager.step()
    kept = averager.corrections[0].copy()
    averager.finish()
    if lsgd.rank() == 0:
        np.testing.assert_array_equal(averager.corrections[0], kept)
    np.testing.assert_allclose(np.sum(gather(averager.corrections[0]), axis=0), 0, atol=1e-12)


def test_corrections_are_of_the_average_before_its_change_is_shortened(lsgd):
    corrections = []
    for clip in (None, 1e-3):
        x = np.zeros(3)
        averager = lsgd.ModelAverager([x], H, control_variates=True, clip_change=clip)
        averager.tell(rate=0.1)
        averager.begin()
        x -= 0.1 * H * bowls(lsgd.rank(), 0, [x])[0]
        averager.step(H)
        corrections.append(averager.corrections[0].copy())
        averager.finish()
    np.testing.assert_allclose(corrections[1], corrections[0], rtol=1e-12)
    assert lsgd.size() == 1 or np.all(corrections[0])


def test_an_averager_wants_to_know_the_rate_and_the_beginning(lsgd):
    averager = lsgd.ModelAverager([np.zeros(2)], control_variates=True)
    with pytest.raises(RuntimeError, match=r"call begin\(\) first"):
        averager.step()
    with pytest.raises(ValueError, match=r"needs the rate: call tell\(rate=...\) first"):
        averager.begin()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "async"}, "leave mode, weighting.*mode='async'"),
        ({"weighting": "samples"}, "weighting='samples'"),
        ({"interval": "balanced"}, "interval='balanced'"),
        ({"guard": "norms"}, r"guard=Norms\(\)"),
        ({"outer": "slowmo"}, r"the average of all, as it is.*Received: outer=SlowMo\(alpha=1.0, beta=0.5\)"),
        ({"overlap": 2}, "Received: overlap=2"),
        ({"fragments": 2}, "Received: fragments=2"),
        ({"compression": "bf16"}, "Received: compression='bf16'"),
        ({"groups": "node"}, r"Received: groups=Groups\('node', every=4\)"),
    ],
)
def test_what_it_does_not_go_with_is_refused(lsgd, options, words):
    with pytest.raises(ValueError, match=f"^control_variates .*{words}"):
        lsgd.ModelAverager([np.zeros(2)], control_variates=True, **options)


def test_front_ends_and_optimizers_that_cannot_are_refused(lsgd):
    with pytest.raises(ValueError, match="a callback sees none: compile the model with LocalSGDOptimizer"):
        lsgd.LocalSGDCallback(control_variates=True)
    for inner, received in [
        (keras.optimizers.Adam(), "Adam"),
        (keras.optimizers.SGD(0.1, momentum=0.9), "SGD with momentum=0.9"),
        (keras.optimizers.SGD(0.1, clipnorm=1.0), "SGD with clipnorm=1.0"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "Adam"),
    ]:
        with pytest.raises(ValueError, match=f"SGD without momentum and clipping. Received: {received}$"):
            lsgd.LocalSGDOptimizer(inner, control_variates=True)
    averager = lsgd.ModelAverager(NumpyMemory([np.zeros(2)]), control_variates=True)
    with pytest.raises(ValueError, match="statistics and control_variates are for lists"):
        averager.begin()


def test_it_is_saved_with_an_optimizer(lsgd):
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), control_variates=True)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.settings.control_variates
    assert copy.get_config() == optimizer.get_config()
