"""Schedules that look at more than the step, in real trainings: what they see, and that all ranks do the same."""

import keras
import numpy as np
import pytest

from . import reference
from .helpers import fit

pytestmark = pytest.mark.pairs


def rounds(timings):
    return [r.interval for r in timings if r.interval]


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_the_learning_rate_decides(lsgd, gather, front_end):
    """Rate 0.1 for six steps, then 0.01, as the optimizer sees it."""
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([5, 100], [0.1, 0.01, 0.01])
    schedule = lsgd.Join([lsgd.QuadraticSync(0.03, 2), lsgd.PostLocal("rate", 4)], until=[15])
    inner = keras.optimizers.SGD(rates)
    if front_end == "callback":
        model, callback = reference.compiled(inner, batch_normalization=False), lsgd.LocalSGDCallback(schedule)
        fit(lsgd, model, 23, callback)
    else:
        callback = lsgd.LocalSGDOptimizer(inner, schedule)
        model = reference.compiled(callback, batch_normalization=False)
        x, y = reference.data(lsgd.rank(), 23)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    # max(2, (0.03 / 0.01)^2) = 9 from step 6 on; then the rate has fallen before.
    assert [r.last_step for r in callback.timings if r.steps] == [2, 4, 6, 15, 19, 23]
    reference.assert_same_everywhere(gather, model)


def test_the_length_of_training_and_what_remains_decide(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.01), batch_normalization=False)
    callback = lsgd.LocalSGDCallback(lsgd.PostLocal("0.5dur", 3))
    fit(lsgd, model, 4, callback, epochs=2)
    assert [(r.last_step, r.interval) for r in callback.timings if r.steps] == [
        *((step, 1) for step in range(1, 5)),
        (7, 3),
        (8, 1),
    ]
    reference.assert_same_everywhere(gather, model)


def test_the_mean_of_the_losses_decides(lsgd, gather):
    """Each rank's loss is its own; a function that counts on it gives all the same, and sees their mean."""
    seen = []

    def rule(step, loss):
        seen.append(loss)
        return 2

    model = reference.compiled(keras.optimizers.SGD(0.0), batch_normalization=False)
    x, y = reference.data(lsgd.rank(), 4)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[lsgd.LocalSGDCallback(rule)])
    losses = ((model.predict(x, verbose=0) - y) ** 2).reshape(4, 8).mean(1)
    running = np.cumsum(losses) / np.arange(1, 5)  # what Keras shows
    expected = np.mean(gather(running), axis=0)
    assert seen[0] is None
    np.testing.assert_allclose([s for s in seen[1:] if s is not None][:2], expected[[1, 3]], rtol=1e-5)
    assert all(other == seen for other in gather(seen))


def test_auto_measures_alike_on_all_ranks(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.01), batch_normalization=False)
    callback = lsgd.LocalSGDCallback(lsgd.Auto(0.2, 2, 40))
    fit(lsgd, model, 120, callback)
    own = rounds(callback.timings)
    assert own[0] == 16
    assert all(2 <= h <= 40 for h in own)
    assert all(other == own for other in gather(own))


@pytest.mark.alone
def test_data_that_do_not_say_how_long_training_is(lsgd):
    def batches():
        yield from zip(*(a.reshape(2, 8, -1) for a in reference.data(lsgd.rank(), 2)), strict=True)

    model = reference.compiled(keras.optimizers.SGD(0.01), batch_normalization=False)
    with pytest.raises(ValueError, match="pass steps_per_epoch"):
        model.fit(batches(), verbose=0, callbacks=[lsgd.LocalSGDCallback(lsgd.PostLocal("0.5dur"))])


def test_an_averager_is_told(lsgd, gather):
    own = np.array([float(lsgd.rank())])
    averager = lsgd.ModelAverager([own], lsgd.QuadraticSync(0.2, 1), broadcast=False)
    with pytest.raises(ValueError, match=r"needs the rate: call tell\(rate=...\) first"):
        averager.begin()
    with pytest.raises(TypeError, match="temperature"):
        averager.tell(temperature=1.0)
    averager.tell(rate=0.1)
    synced = []
    for step in range(1, 12):
        averager.tell(rate=0.1 if step < 6 else 0.05)
        if averager.step():
            synced.append(step)
    averager.finish()
    assert synced == [4, 8], "then (0.2 / 0.05)^2 = 16 more"
    assert own[0] == pytest.approx(np.mean(range(lsgd.size())))
