"""Everything in the two papers beyond constant H: sets of sync times, step sizes, the average of iterates, asynchrony, unequal speeds."""

import math
import time

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd import devices
from hvd_localsgd.core import settings
from hvd_localsgd.tools import plan

from . import reference
from .helpers import Epochs, Snapshots, fit


@pytest.mark.filterwarnings("ignore:LocalSGDCallback stands behind Epochs")
@pytest.mark.parametrize("validate", [False, True])
def test_sync_steps_are_kept_exactly(lsgd, gather, validate):
    model = reference.compiled(keras.optimizers.SGD(0.05), batch_normalization=False)
    before, after, own = Snapshots(), Snapshots(), Epochs()
    x, y = reference.data(lsgd.rank(), 4)
    callback = lsgd.LocalSGDCallback(lsgd.SyncSteps([1, 3, 6, 7]))
    validation = {"validation_data": (x, y)} if validate else {}
    callbacks = [own, before, callback, after]
    history = model.fit(
        x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks, **validation
    ).history
    for key in own.seen[0]:
        expected = np.mean(gather([logs[key] for logs in own.seen]), axis=0)
        np.testing.assert_allclose(history[key], expected, rtol=1e-6, err_msg="logs are averaged all the same")
    for step in range(12):
        local = gather(before.taken[step])
        for i, mine in enumerate(after.taken[step]):
            if step + 1 in (1, 3, 6, 7):
                mean = np.mean([np.asarray(other[i], "float64") for other in local], axis=0)
                np.testing.assert_allclose(mine, mean, rtol=1e-6, atol=1e-7)
            else:
                assert mine.tobytes() == before.taken[step][i].tobytes(), f"step {step + 1} is not in I_T"
    last = gather(after.taken[-1])
    for i, weight in enumerate(model.get_weights()):
        np.testing.assert_allclose(weight, np.mean([other[i] for other in last], axis=0), rtol=1e-5, atol=1e-6)
    assert [r.last_step for r in callback.timings if r.steps] == [1, 3, 6, 7, 12]
    reference.assert_same_everywhere(gather, model)


def test_one_shot_averaging_is_the_mean_of_ranks_that_trained_alone(lsgd, gather):
    make = lambda: keras.optimizers.SGD(0.05, momentum=0.9)  # noqa: E731
    model = reference.compiled(make())
    callback = lsgd.LocalSGDCallback(lsgd.OneShot())
    losses = fit(lsgd, model, 5, callback, epochs=2).history["loss"]
    assert gather(losses) == [losses] * lsgd.size(), "logs are averaged all the same"
    models, _ = reference.local_sgd(make, 10, [5] * lsgd.size(), epochs=2, flush=False)
    reference.assert_close(model, models[0])
    assert [r.steps for r in callback.timings if r.steps] == [10]


@pytest.mark.pairs
def test_a_schedule_of_ones_own(lsgd, gather):
    class Doubling(lsgd.Schedule):
        def interval(self, now):
            return max(1, now.step)

    model = reference.compiled(keras.optimizers.SGD(0.05), batch_normalization=False)
    callback = lsgd.LocalSGDCallback(Doubling())
    fit(lsgd, model, 11, callback)
    assert [r.last_step for r in callback.timings if r.interval] == [1, 2, 4, 8, 11]
    reference.assert_same_everywhere(gather, model)


@given(st.sets(st.integers(1, 500), min_size=1, max_size=20))
def test_sync_steps_lead_from_one_to_the_next(lsgd, steps):
    schedule = lsgd.SyncSteps(sorted(steps))
    at, visited = 0, []
    while (at := at + schedule.interval(lsgd.Now(at))) <= 500:
        visited.append(at)
    assert visited == sorted(steps)
    assert schedule.gap == max(np.diff([0, *sorted(steps)]))
    assert f"gap {schedule.gap}" in repr(schedule)


@pytest.mark.parametrize("steps", [[], [3, 3], [5, 2], [0, 1], [1.5], ["2"]])
def test_sync_steps_refuse_nonsense(lsgd, steps):
    with pytest.raises(ValueError, match="steps"):
        lsgd.SyncSteps(steps)


def test_growing_rounds(lsgd):
    schedule = lsgd.Growing(scale=0.5, maximum=6)
    assert [schedule.interval(lsgd.Now(t)) for t in (0, 3, 16, 36, 100, 10**6)] == [1, 1, 2, 3, 5, 6]
    with pytest.raises(ValueError, match="scale"):
        lsgd.Growing(scale=0)
    with pytest.raises(ValueError, match="maximum must be an integer >= 1"):
        lsgd.Growing(1, 0)


def test_decaying_rates_follow_the_reference(lsgd):
    make = lambda: keras.optimizers.SGD(lsgd.InverseTimeDecay(mu=2.0, a=30.0))  # noqa: E731
    model = reference.compiled(make())
    fit(lsgd, model, 6, lsgd.LocalSGDCallback(2), epochs=2)
    models, _ = reference.local_sgd(make, 2, [6] * lsgd.size(), epochs=2)
    reference.assert_close(model, models[0])


def test_inverse_time_decay(lsgd):
    schedule = lsgd.InverseTimeDecay(mu=0.01, a=100)
    for step in (0, 1, 900):
        assert float(schedule(step)) == pytest.approx(4 / (0.01 * (100 + step)))
    copy = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert float(copy(7)) == float(schedule(7))
    with pytest.raises(ValueError, match="mu and a"):
        lsgd.InverseTimeDecay(0, 1)


def test_the_papers_rules(lsgd):
    assert lsgd.convex_interval(10_000, 4, 25) == 10
    assert lsgd.convex_interval(100, 16, 16) == 1
    # sqrt(mu sigma^2 / (64 L G^2) (T + 2a) / (K b)) = sqrt(0.5 * 8 / (64 * 1 * 1) * 10200 / 4) = 12.6
    assert lsgd.convex_interval(10_000, 4, mu=0.5, smoothness=1, variance=8, gradient=1, a=100) == 12
    assert lsgd.nonconvex_interval(10**8, 8) == int(100 / 8**0.75)
    assert lsgd.nonconvex_interval(10**8, 1, variance=4, gradient=4) == 50
    with pytest.raises(ValueError, match="all of"):
        lsgd.convex_interval(10, 1, mu=1)
    with pytest.raises(ValueError, match="steps must be"):
        lsgd.nonconvex_interval(0, 1)
    assert lsgd.convex_interval(4, 1, a=1000) == 4, "at most T"
    for wrong in (lambda: lsgd.convex_interval(10, 0), lambda: lsgd.convex_interval(10, 1, 0)):
        with pytest.raises(ValueError, match=r"(ranks|batch) must be >= 1"):
            wrong()
    with pytest.raises(ValueError, match="variance and gradient"):
        lsgd.nonconvex_interval(10, 1, variance=1.0)
    with pytest.raises(ValueError, match="epsilon and rho"):
        lsgd.speed_up(2, 1, rho=-1.0)
    assert lsgd.speed_up(8, 4) == 8
    assert lsgd.speed_up(1, 16, epsilon=0.0, rho=25) == 1
    assert lsgd.speed_up(4, 2, 0.01, 25) == pytest.approx(
        4 / ((0.5 + 0.5 * math.sqrt(1 + 0.01 * (1 + 2 + 16))) * (1 + 2 * 25 * 3 / 2))
    )


class Iterates(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.taken = []

    def on_train_batch_begin(self, batch, logs=None):
        self.taken.append([w.astype("float64") for w in self.model.get_weights()])


@pytest.mark.parametrize(
    ("weights", "power", "front_end"),
    [("quadratic", 2, "callback"), ("linear", 1, "optimizer"), ("uniform", 0, "callback")],
)
def test_the_average_of_iterates_is_numpys(lsgd, gather, weights, power, front_end):
    """Of ranks with other numbers of batches too: they could not end if anything were communicated for it at each step."""
    batches = 5 if weights == "quadratic" else 5 + lsgd.rank()
    optimizer, average, iterates = keras.optimizers.SGD(0.05), lsgd.IterateAverage(weights, a=3.0), Iterates()
    callbacks = [lsgd.LocalSGDCallback(2)] if front_end == "callback" else []
    model = reference.compiled(optimizer if callbacks else lsgd.LocalSGDOptimizer(optimizer, 2), False)
    x, y = reference.data(lsgd.rank(), batches)
    callbacks += [average, iterates]
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    everyone = gather(iterates.taken)
    assert [len(own) for own in everyone][lsgd.rank()] == 2 * batches
    w = (3.0 + np.arange(2 * (5 + lsgd.size()))) ** power
    for i, mine in enumerate(average.value):
        total = sum(w[t] * own[t][i] for own in everyone for t in range(len(own)))
        mean = total / sum(w[: len(own)].sum() for own in everyone)
        np.testing.assert_allclose(mine, mean, rtol=1e-5, atol=1e-6)
    assert len({b"".join(v.tobytes() for v in other) for other in gather(average.value)}) == 1
    last, value = model.get_weights(), average.value
    average.swap()
    for mine, expected in zip(model.get_weights(), value, strict=True):
        np.testing.assert_array_equal(mine, expected)
    np.testing.assert_array_equal(average.value[0], value[0])
    average.swap()
    np.testing.assert_array_equal(model.get_weights()[0], last[0])


def test_validation_with_the_average_of_iterates(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05), batch_normalization=False)
    average = lsgd.IterateAverage("linear", a=1.0, evaluate=True)
    x, y = reference.data(0, 3, seed=9)
    history = fit(lsgd, model, 4, lsgd.LocalSGDCallback(2), epochs=3, callbacks=[average], validation_data=(x, y))
    other = reference.make_model(False)
    other.set_weights(average.value)
    loss = float(np.mean((other.predict(x, verbose=0) - y) ** 2))
    assert history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)
    reference.assert_same_everywhere(gather, model)


def test_the_average_of_iterates_wants_its_place(lsgd):
    model = reference.compiled("sgd")
    x, y = reference.data(0, 1)
    with pytest.raises(ValueError, match="behind LocalSGDCallback"):
        model.fit(x, y, verbose=0, callbacks=[lsgd.IterateAverage(), lsgd.LocalSGDCallback(2)])
    model.compile("sgd", "mse", steps_per_execution=2)
    with pytest.raises(ValueError, match="needs steps_per_execution=1"):
        model.fit(x, y, verbose=0, callbacks=[lsgd.LocalSGDCallback(2), lsgd.IterateAverage()])
    with pytest.raises(ValueError, match="weights must be"):
        lsgd.IterateAverage("cubic")
    with pytest.raises(ValueError, match="a must be >= 0"):
        lsgd.IterateAverage(a=-1.0)


def drifting(optimizer):
    """A model whose gradient is the mean of the inputs wherever it is: progress does not depend on who came first."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(optimizer, loss=lambda y, p: p)
    return model


def need_one_sided(communicator):
    if communicator.size > 1 and communicator.name != "mpi":
        pytest.skip("asynchronous Local SGD is MPI's")


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_asynchronously_no_progress_is_lost(lsgd, gather, front_end):
    communicator = devices.get()
    need_one_sided(communicator)
    batches = 5 + 3 * communicator.rank
    x = np.random.default_rng(communicator.rank).normal(size=(8 * batches, 4)).astype("float32")
    if front_end == "callback":
        callback = lsgd.LocalSGDCallback(2, mode="async")
        model, callbacks = drifting(keras.optimizers.SGD(0.1)), [callback]
    else:
        callback = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.1), 2, mode="async")
        model, callbacks = drifting(callback), []
    losses = model.fit(x, x[:, :1], batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks).history[
        "loss"
    ]
    assert len(set(map(tuple, gather(losses)))) == communicator.size, "logs are each rank's own"
    progress = gather(-0.1 * 2 * x.reshape(batches, 8, 4).mean(1).sum(0))
    np.testing.assert_allclose(model.get_weights()[0][:, 0], np.mean(progress, axis=0), rtol=1e-4, atol=1e-5)
    reference.assert_same_everywhere(gather, model)
    assert sum(r.steps for r in callback.timings) == 2 * batches
    syncs = sum(r.interval > 0 for r in callback.timings)
    assert all(r.staleness >= 0 for r in callback.timings)
    others = sum(gather(syncs)) - syncs
    assert sum(r.staleness for r in callback.timings) <= others
    assert [t["syncs"] for t in callback.totals] == gather(syncs)


def test_asynchronously_one_rank_stops_all(lsgd, gather):
    communicator = devices.get()
    need_one_sided(communicator)

    class StopSoon(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.002)
            if communicator.rank == 0 and batch == 3:
                self.model.stop_training = True

    x = np.ones((8 * 4000, 4), "float32")
    model = drifting(keras.optimizers.SGD(0.1))
    callback = lsgd.LocalSGDCallback(2, mode="async")
    model.fit(x, x[:, :1], batch_size=8, epochs=1, verbose=0, callbacks=[callback, StopSoon()])
    assert sum(r.steps for r in callback.timings) < 4000
    reference.assert_same_everywhere(gather, model)


def test_balanced_rounds_give_fast_ranks_more_steps(lsgd, gather):
    communicator = devices.get()

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.03 if communicator.rank == 0 else 0.01)

    model = reference.compiled(keras.optimizers.SGD(0.01), batch_normalization=False)
    callback = lsgd.LocalSGDCallback(6, interval="balanced")
    steps = 24 if communicator.rank == 0 and communicator.size > 1 else 72
    fit(lsgd, model, steps, callback, callbacks=[Slow()])
    intervals = gather([r.interval for r in callback.timings if r.steps])
    full = min(map(len, intervals)) - 1
    assert full >= 4
    for number in range(full):
        mean = np.mean([own[number] for own in intervals])
        assert mean == pytest.approx(6, abs=2.5), "H on average, as far as whole steps allow"
    if communicator.size > 1:
        assert intervals[0][full - 1] < intervals[1][full - 1]
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "later"}, "mode must be"),
        ({"interval": "unequal"}, "interval must be"),
        ({"mode": "async", "weighting": "samples"}, "weight 1/K"),
    ],
)
def test_unknown_choices(lsgd, arguments, words):
    with pytest.raises(ValueError, match=words):
        lsgd.LocalSGDCallback(4, **arguments)
    with pytest.raises(ValueError, match="balanced"):
        settings.Settings(lsgd.OneShot(), interval="balanced")


def test_plan_adds_up(lsgd):
    job = plan.Job(samples=1000, epochs=4, ranks=4, batch=10, compute=0.5, model_bytes=8e6, bandwidth=1e6, latency=0.25)
    assert job.steps == 100
    assert job.sync == pytest.approx(2 * 2 * 0.25 + 2 * 3 / 4 * 8)
    assert job.seconds(10) == pytest.approx(100 * 0.5 + 10 * 13)
    listed = plan.choices(job, dict.fromkeys(("mu", "smoothness", "variance", "gradient")))
    assert [h for h, _, _ in listed] == [1, 1, 1, 16, 100]
