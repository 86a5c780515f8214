"""How far the ranks are apart, in the epoch's logs, and the hint that they come apart instead of learning."""

import math
import warnings

import keras
import numpy as np
import pytest

from hvd_localsgd.frontends import logs

from . import reference
from .helpers import Epochs, Snapshots, fit

pytestmark = pytest.mark.pairs

SPREAD = ("loss_min", "loss_max", "drift")


def test_logs_have_the_smallest_and_the_largest_loss_and_the_mean_drift_of_the_syncs(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    first, before, last = Epochs(), Snapshots(), Epochs()
    x, y = reference.data(lsgd.rank(), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two stand before it in the list
        callbacks = [first, before, lsgd.LocalSGDCallback(sync_every=3), last]
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    everyone = gather([np.concatenate([v.reshape(-1) for v in weights]) for weights in before.taken])
    weights = np.array(everyone, "float64")
    drift = np.sqrt(np.mean(np.sum((weights - weights.mean(0)) ** 2, axis=2), axis=0))
    for epoch, (own, averaged) in enumerate(zip(first.seen, last.seen, strict=True)):
        losses = gather(own["loss"])
        assert averaged["loss_min"] == pytest.approx(min(losses), rel=1e-6)
        assert averaged["loss_max"] == pytest.approx(max(losses), rel=1e-6)
        syncs = [7 * epoch + step - 1 for step in (3, 6, 7)]
        assert averaged["drift"] == pytest.approx(np.mean(drift[syncs]), rel=1e-4, abs=1e-7)
        assert all(other == averaged for other in gather(averaged))


def test_a_metric_of_that_name_is_the_users_and_a_drift_of_no_sync_is_nan(lsgd):
    model = reference.compiled(
        keras.optimizers.SGD(0.05), False, metrics=[keras.metrics.MeanAbsoluteError(name="drift"), "mae"]
    )
    (drift,), (mae,) = map(fit(lsgd, model, 2, lsgd.LocalSGDCallback(2)).history.get, ("drift", "mae"))
    assert drift == mae
    model = reference.compiled(keras.optimizers.SGD(0.05), False)
    callback = lsgd.LocalSGDCallback(lsgd.OneShot())
    (loss,) = fit(lsgd, model, 2, callback).history["loss"]
    (added,) = callback.epochs
    assert math.isnan(added["drift"])
    assert added["averaging"] == 0
    assert added["loss_min"] <= loss <= added["loss_max"]


@pytest.mark.alone
def test_only_ranks_with_samples_count_and_a_loss_that_is_no_number_is_nan():
    entries = [{"logs": {"loss": loss}, "samples": samples} for loss, samples in ((2.0, 8.0), (9.0, 0.0), (3.0, 4.0))]
    assert [logs.spread(entries, 1.0)[key] for key in SPREAD[:2]] == [2.0, 3.0]
    nothing = [{"logs": {"loss": [1.0, 2.0]}, "samples": 8.0}, {"logs": {}, "samples": 8.0}]
    assert all(math.isnan(value) for value in logs.spread(nothing, math.nan).values())


@pytest.mark.parametrize("ill", [False, True])
def test_it_is_said_once_on_rank_0_that_an_outer_rate_is_too_large(lsgd, ill):
    model = reference.compiled(keras.optimizers.Adam(0.01), False)  # whose steps are no longer where the loss is larger
    callback = lsgd.LocalSGDCallback(6, outer=lsgd.Nesterov(20.0, 0.9) if ill else "mean")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(lsgd, model, 6, callback, epochs=6)
    said = [str(w.message) for w in caught if "come apart" in str(w.message)]
    assert len(said) == (ill and lsgd.rank() == 0 and lsgd.size() > 1), said
    assert all("lower sync_every, or that rate" in words for words in said)


def spreads(*rows):
    return [dict(zip(SPREAD, row, strict=True)) for row in rows]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("rows", "when"),
    [
        ([(4, 5, 1), (1, 2, 0.5), (4, 5, 0.6), (4, 5, 0.6), (4, 5, 0.6)], [3]),
        ([(4, 5, 1), (1, 2, 0.5), (4, 4.5, 0.4), (4, 4.5, 0.4)], []),  # the spread has closed: all rise together
        ([(4, 5, 1), (1, 2, 0.5), (4, 5, 0.6), (1, 2, 0.6), (4, 5, 0.6)], []),  # not in a row
        ([(4, 5, 1), (1, 2, 0.5), (3, 9, 0.6), (3, 9, 0.6)], []),  # a rank has kept what it had
        ([(4, 5, 1), (3, 4, 9), (2, 4, 9), (1, 3, 9), (1, 3, 9)], []),  # shards that differ: wide, and it learns
        ([(0.5, 0.5, 1), (0.49, 0.5, 1), (0.6, 0.7, 2), (0.6, 0.7, 2)], []),  # noise of a trained model
        ([(-4, -3, 1), (-9, -8, 1), (-2, -1, 2), (-2, -1, 2)], [3]),  # a loss below zero
        ([(math.nan, math.nan, 1), (4, 5, 2), (9, 9, 9), (99, 99, 99)], []),
    ],
)
def test_when_the_hint_comes(rows, when):
    apart = logs.Apart()
    assert [epoch for epoch, spread in enumerate(spreads(*rows)) if apart.see(spread)] == when
