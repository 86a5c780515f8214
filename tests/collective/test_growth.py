"""What a long training keeps: a window of its rounds, sums of all of them, and no number in TensorFlow's cache."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.core import timing
from hvd_localsgd.table import print_table

from . import reference
from .helpers import Epochs, fit

pytestmark = pytest.mark.pairs


def test_a_window_of_rounds_is_kept_and_all_are_in_the_sums_and_in_the_file(lsgd, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "WINDOW", 3)
    callback, epochs = lsgd.LocalSGDCallback(1, timings=tmp_path), Epochs()
    fit(lsgd, reference.compiled(keras.optimizers.SGD(0.05), False), 7, callback, epochs=2, callbacks=[epochs])
    lines = [json.loads(line) for line in (tmp_path / f"rank-{lsgd.rank()}.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(15)), "the last one is what comes after the last sync"
    assert [r.round for r in callback.timings] == [12, 13, 14]
    own = callback.totals[lsgd.rank()]
    assert (own["syncs"], own["steps"]) == (14, 14)
    for key in ("compute", "wait", "communicate", "wall", "bytes"):
        assert own[key] == pytest.approx(sum(line[key] for line in lines), rel=1e-9), key
    for epoch in range(2):
        rounds = lines[7 * epoch : 7 * epoch + 7]
        assert epochs.seen[epoch]["drift"] == pytest.approx(np.mean([line["drift"] for line in rounds]))
        seconds = callback.epochs[epoch]["seconds_compute"]
        assert seconds == pytest.approx(sum(line["compute"] for line in rounds), rel=1e-9)
    again = fit(lsgd, callback.model, 2, callback)
    assert callback.totals[lsgd.rank()]["steps"] == 2, "of the last fit alone"
    assert len(again.epoch) == len(callback.epochs) == 1


@pytest.mark.alone
def test_of_thousands_of_ranks_the_slowest_and_the_fastest_are_shown(capsys):
    order = np.random.default_rng(0).permutation(4096).tolist()
    zeros = timing.Sums().numbers
    print_table([{**zeros, "compute": order.index(rank) + 1, "rank": rank, "host": "h"} for rank in range(4096)], "")
    lines = capsys.readouterr().out.splitlines()
    shown = [int(line.split()[0]) for line in lines if line.strip().split(" ")[0].isdigit()]
    assert shown == [*order[:-5:-1], *order[3::-1]]
    (total,) = [line for line in lines if line.strip().startswith("total")]
    assert f"{4096 * 4097 / 2:.2f} s" in total
    assert len(lines) < 20


def test_no_python_number_is_given_to_tensorflow_at_every_round(lsgd, monkeypatch):
    """TensorFlow keeps each in a cache, for ever: numbers that change with the step would fill it."""
    given = []
    variable = type(tf.Variable(0.0))
    assign = variable.assign

    def assigned(self, value, *arguments, **named):
        given.append(value)
        return assign(self, value, *arguments, **named)

    monkeypatch.setattr(variable, "assign", assigned)
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), sync_every=1)
    fit(lsgd, reference.compiled(optimizer, False), 4, lsgd.IterateAverage())
    assert [r.last_step for r in optimizer.timings if r.interval] == [1, 2, 3, 4]
    assert len(given) >= 8
    assert not [value for value in given if isinstance(value, int | float)]  # np.float64 is a float, too
