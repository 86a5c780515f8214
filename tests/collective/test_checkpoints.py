"""A training that ends in the middle goes on as if it had not: the same bits. Here one process ends and begins it; others do in tests/test_resuming.py."""

import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.core.keeper import Checkpoints
from hvd_localsgd.errors import CheckpointError, RanksDiffer


@pytest.fixture
def folder(tmp_path, gather):
    """One for all ranks."""
    return gather(str(tmp_path))[0]


class Interrupt(keras.callbacks.Callback):
    """The last rank is asked to end after so many batches (``at``), or in validation."""

    def __init__(self, lsgd, at=None, by=signal.SIGTERM):
        super().__init__()
        self.asks, self.at, self.by, self.batches = lsgd.rank() == lsgd.size() - 1, at, by, 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.asks and self.batches == self.at:
            os.kill(os.getpid(), self.by)

    def on_test_begin(self, logs=None):
        if self.asks and self.at == "validation":
            os.kill(os.getpid(), self.by)


def arrays(rank, samples):
    generator = np.random.default_rng(7 + rank)
    x = generator.normal(size=(samples, 6)).astype("float32")
    return x, (x @ np.arange(6) + generator.normal(size=samples)).astype("float32")[:, None]


class Data(keras.utils.PyDataset):
    """Shuffles itself where an epoch ends, by numpy's random numbers."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.order = x, y, np.arange(len(x))

    def __len__(self):
        return len(self.x) // 4

    def __getitem__(self, index):
        own = self.order[4 * index : 4 * index + 4]
        return self.x[own], self.y[own]

    def on_epoch_end(self):
        np.random.shuffle(self.order)


def data(kind, rank, samples):
    x, y = arrays(rank, samples)
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 4}
    if kind == "python":
        return {"x": Data(x, y)}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(samples)
    if kind == "dataset":
        return {"x": dataset.batch(4)}
    if kind == "unknown":
        return {"x": dataset.batch(4).filter(lambda x, y: True)}
    return {"x": dataset.repeat().batch(4), "steps_per_epoch": samples // 4 - 1}


def fit(lsgd, folder, front="callback", kind="arrays", at=None, by=signal.SIGTERM, samples=24, more=0, epochs=3, **options):
    """As a process that begins: seeds, a new model, new callbacks. Everything that this rank holds at the end, and its logs."""
    keras.utils.set_random_seed(3 + lsgd.rank())
    layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    several = options.pop("several", 1)
    plain = options.get("control_variates")
    inner = keras.optimizers.SGD(0.01) if plain else options.pop("inner", lambda: keras.optimizers.SGD(0.01, momentum=0.9))()
    arguments = {"sync_every": 3} | {k: v() if callable(v) else v for k, v in options.items() if k not in ("rounds",)}
    callbacks = [lsgd.LocalSGDCallback(**arguments)] if front == "callback" else []
    optimizer = inner if front == "callback" else lsgd.LocalSGDOptimizer(inner, **arguments)
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=several)
    if folder is not None:
        callbacks.append(lsgd.LocalSGDCheckpoint(folder, options.get("rounds", 2)))
    validation = (np.ones((8, 6), "float32"), np.ones((8, 1), "float32"))
    history = model.fit(
        **data(kind, lsgd.rank(), samples + more * lsgd.rank()),
        epochs=epochs,
        verbose=0,
        callbacks=[*callbacks, Interrupt(lsgd, at, by)],
        validation_data=validation if front == "callback" else None,
    )
    held = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    logs = {name: values[-1] for name, values in history.history.items() if "seconds" not in name}
    return held, logs


def assert_goes_on_exactly(lsgd, folder, *, without=True, at=8, **arguments):
    """Never stopped, and stopped: the same; ``without`` also as without checkpoints."""
    whole, logs = fit(lsgd, f"{folder}/whole", **arguments)
    if without:
        expected, _ = fit(lsgd, None, **arguments)
        assert all((a == b).all() for a, b in zip(expected, whole, strict=True))
    with pytest.raises(lsgd.Preempted) as error:
        fit(lsgd, f"{folder}/stopped", at=at, **arguments)
    assert error.value.code == 75
    held, last = fit(lsgd, f"{folder}/stopped", **arguments)
    different = [n for n, (a, b) in enumerate(zip(whole, held, strict=True)) if (a != b).any()]
    assert not different, different
    drop = {"drift"} if arguments.get("overlap") else set()
    assert {k: v for k, v in last.items() if k not in drop} == pytest.approx({k: v for k, v in logs.items() if k not in drop}, nan_ok=True)


@pytest.mark.parametrize("kind", ["arrays", "dataset", "repeated", "python"])
def test_data_go_on_where_they_were(kind, lsgd, folder):
    assert_goes_on_exactly(lsgd, folder, kind=kind, without=False)


OPTIONS = {
    "growing": {"sync_every": lambda: __import__("hvd_localsgd").Growing()},
    "slowmo": {"outer": "slowmo"},
    "diloco": {"outer": "diloco", "clip_change": 0.5, "guard": "outliers", "inner": lambda: keras.optimizers.Adam(0.01)},
    "a Keras optimizer outside": {"outer": lambda: keras.optimizers.Adam(0.01)},
    "int8": {"compression": "int8", "sync_every": 1, "variance": "pooled"},
    "overlap": {"overlap": 1},
    "fragments": {"fragments": 3},
    "several steps at once": {"several": 2, "sync_every": 4},
    "average": {"optimizer_state": "average", "more": 8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_averages_keep_goes_on(name, lsgd, folder):
    assert_goes_on_exactly(lsgd, folder, without=name in ("growing", "overlap"), **OPTIONS[name])
