"""The other callbacks of a fit: who writes files, what all ranks resume from, what the line of an epoch shows."""

import csv
import logging
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.backends.tensorflow import kernel
from hvd_localsgd.core.timing import PARTS

from . import reference
from .helpers import fit

pytestmark = pytest.mark.pairs

OURS = {"loss_min", "loss_max", "drift", "averaging", *(f"seconds_{part}" for part in PARTS)}
USERS = {"loss", "mae", "val_loss", "val_mae"}


class Seen(keras.callbacks.Callback):
    """The logs and the averaged weights at each epoch's end, as this place in the list sees them."""

    def __init__(self):
        super().__init__()
        self.logs, self.weights = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))
        self.weights.append(self.model.get_weights())


@pytest.fixture
def shared(tmp_path, gather):
    """One folder for all ranks."""
    return Path(gather(str(tmp_path))[0])


def events(folder, tag_prefix="epoch_"):
    """Of the only event file of a run: ``{tag: {step: value}}``, read by TensorBoard."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert len(list(folder.iterdir())) == 1, "rank 0 alone writes"
    run = accumulators.EventAccumulator(str(folder))
    run.Reload()
    tags = [tag for tag in run.Tags()["tensors"] if tag.startswith(tag_prefix)]
    return {tag: {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in run.Tensors(tag)} for tag in tags}


IN_FRONT = pytest.mark.filterwarnings("ignore:LocalSGDCallback stands behind Seen")  # to see each rank's own logs


def test_a_history_of_the_users_own_class_is_still_theirs(lsgd):
    class Counting(keras.callbacks.History):
        batches = 0

        def on_train_batch_end(self, batch, logs=None):
            self.batches += 1

        def on_epoch_end(self, epoch, logs=None):
            self.saw = set(logs)
            super().on_epoch_end(epoch, logs)

    model, history = reference.compiled("sgd", metrics=["mae"]), Counting()
    for fits in (1, 2):
        model.fit(
            *reference.data(lsgd.rank(), 5),
            batch_size=8,
            verbose=0,
            validation_data=reference.data(9, 1),
            callbacks=[lsgd.LocalSGDCallback(2), history],
        )
        assert history.saw == set(history.history) == USERS
        assert history.batches == 5 * fits
        assert model.history is history
        assert history.model is model


@IN_FRONT
def test_all_ranks_give_the_same_paths_and_rank_0_writes(lsgd, gather, shared):
    """5 batches, H = 2: three rounds an epoch, the last of one step."""
    model, callback = reference.compiled(keras.optimizers.SGD(0.05), metrics=["mae"]), lsgd.LocalSGDCallback(2)
    own, seen, history = Seen(), Seen(), keras.callbacks.History()
    callbacks = [
        history,  # not at its usual place: those behind see everything all the same
        keras.callbacks.ModelCheckpoint(shared / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(shared / "best.weights.h5", save_weights_only=True, save_best_only=True),
        keras.callbacks.CSVLogger(shared / "log.csv"),
        keras.callbacks.TensorBoard(shared / "events"),
        seen,
    ]
    model.fit(
        *reference.data(lsgd.rank(), 5),
        batch_size=8,
        epochs=3,
        verbose=0,
        validation_data=reference.data(50 + lsgd.rank(), 1 + lsgd.rank()),
        callbacks=[own, callback, *callbacks],
    )
    assert set(history.history) == USERS == set(own.logs[0])
    assert set(seen.logs[0]) == USERS | OURS
    everyones = gather(seen.weights)
    for epoch in range(3):
        loaded = keras.models.load_model(shared / f"{epoch + 1}.keras").get_weights()
        for rank in range(lsgd.size()):
            for mine, file in zip(everyones[rank][epoch], loaded, strict=True):
                assert mine.tobytes() == file.tobytes()
    best = reference.compiled("sgd")
    best.load_weights(shared / "best.weights.h5")
    lowest = int(np.argmin([logs["val_loss"] for logs in seen.logs]))
    for one, other in zip(best.get_weights(), seen.weights[lowest], strict=True):
        assert one.tobytes() == other.tobytes()

    with (shared / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert set(rows[0]) == {"epoch"} | USERS | OURS
    writer = gather(seen.logs)[0]
    for epoch, row in enumerate(rows):
        for name in USERS:
            weights = [1 + k if name.startswith("val_") else 1 for k in range(lsgd.size())]
            mean = np.average([logs[epoch][name] for logs in gather(own.logs)], weights=weights)
            assert float(row[name]) == pytest.approx(mean, rel=1e-6), name
        for name in OURS:
            assert float(row[name]) == writer[epoch][name], name

    gather(None)  # rank 0 closes its events when fit ends, and may be later
    train, validation = events(shared / "events" / "train"), events(shared / "events" / "validation")
    assert set(train) == {f"epoch_{name}" for name in {"loss", "mae", "learning_rate"} | OURS}
    assert set(validation) == {"epoch_loss", "epoch_mae"}
    for epoch, row in enumerate(rows):
        for name in {"loss", "mae"} | OURS:
            assert train[f"epoch_{name}"][epoch] == pytest.approx(float(row[name]), rel=1e-6), name
        assert validation["epoch_loss"][epoch] == pytest.approx(float(row["val_loss"]), rel=1e-6)
    assert all(list(steps) == [0, 1, 2] for steps in (*train.values(), *validation.values()))

    for epoch, added in enumerate(callback.epochs):
        rounds = callback.timings[3 * epoch : 3 * epoch + 3]
        assert added == {name: seen.logs[epoch][name] for name in OURS}
        for part in PARTS:
            assert added[f"seconds_{part}"] == pytest.approx(sum(getattr(r, part) for r in rounds))
        spent = sum(r.pack + r.communicate + r.unpack + r.outer for r in rounds)
        assert added["averaging"] == pytest.approx(spent / sum(r.wall for r in rounds))


class Start(keras.callbacks.Callback):
    """What this rank holds when its first epoch begins."""

    def __init__(self):
        super().__init__()
        self.held = None

    def on_epoch_begin(self, epoch, logs=None):
        if self.held is None:
            variables = [*self.model.variables, *self.model.optimizer.variables]
            self.held = [v.numpy() for v in variables if "seed" not in v.path and "before_sync" not in v.path]
            self.seed = next(v.numpy() for v in self.model.variables if "seed" in v.path)


@pytest.mark.parametrize("front", ["callback", "optimizer"])
def test_all_ranks_go_on_from_what_rank_0_has_backed_up(lsgd, gather, shared, front):
    """Momentum is each rank's own, and the optimizer is not told of BatchNormalization's statistics: all come from the file."""

    def train(epochs, **arguments):
        keras.utils.set_random_seed(100 * epochs + lsgd.rank())  # another start on every rank, and another seed
        layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
        model = keras.Sequential([keras.Input((reference.FEATURES,)), *layers, keras.layers.Dense(1)])
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        callbacks = [lsgd.LocalSGDCallback(2)] if front == "callback" else []
        model.compile(lsgd.LocalSGDOptimizer(optimizer, 2) if front == "optimizer" else optimizer, "mse")
        start, seed = Start(), next(v.numpy() for v in model.variables if "seed" in v.path)
        callbacks += [keras.callbacks.BackupAndRestore(shared / "backup", **arguments), start]
        x, y = reference.data(lsgd.rank(), 4)
        history = model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=callbacks)
        return model, history.epoch, start, seed

    first, epochs, start, _ = train(1, delete_checkpoint=False)
    assert epochs == [0]
    end = [v.numpy() for v in (*first.variables, *first.optimizer.variables)]
    again, epochs, start, seed = train(2)
    assert epochs == [1]
    file = reference_of(first, gather(end)[0])
    for held in gather(start.held):
        for one, other in zip(held, file, strict=True):
            np.testing.assert_array_equal(one, other)
    assert start.seed.tobytes() == seed.tobytes(), "each rank draws its own masks"
    assert again.optimizer.iterations.numpy() == 8
    _, epochs, _, _ = train(3)  # at once: the backup of a training that has ended is gone, on every rank
    assert epochs == [0, 1, 2]


def reference_of(model, values):
    """What a backup has of them; the optimizer's last sync came before it (H = 2, 4 batches)."""
    variables = [*model.variables, *model.optimizer.variables]
    return [
        value
        for v, value in zip(variables, values, strict=True)
        if "seed" not in v.path and "before_sync" not in v.path
    ]


def test_a_callback_may_write_on_every_rank(lsgd, gather, shared):
    class Named(keras.callbacks.CSVLogger):  # what is derived from a writer is one
        pass

    marked = [
        lsgd.every_rank(keras.callbacks.CSVLogger(shared / f"{lsgd.rank()}.csv")),
        lsgd.every_rank(keras.callbacks.BackupAndRestore(shared / f"{lsgd.rank()}", delete_checkpoint=False)),
    ]
    plain = [Named(shared / f"derived-{lsgd.rank()}.csv")]
    fit(lsgd, reference.compiled("sgd"), 2, lsgd.LocalSGDCallback(2), callbacks=[*marked, *plain])
    gather(None)
    ranks = range(lsgd.size())
    wanted = {"derived-0.csv", *(f"{rank}.csv" for rank in ranks), *(str(rank) for rank in ranks)}
    assert {path.name for path in shared.iterdir()} == wanted
    assert all((shared / str(rank) / "latest.weights.h5").exists() for rank in ranks)
    with pytest.raises(TypeError, match=r"a keras\.callbacks\.Callback\. Received: 3"):
        lsgd.every_rank(3)


@IN_FRONT
@pytest.mark.usefixtures("several_ranks")
def test_plateaus_and_early_stopping_are_those_of_the_mean_of_all_ranks(lsgd, gather):
    """The last rank validates on the negative of what is learned, and would stop; it has a fifth of the samples."""
    last = lsgd.rank() == lsgd.size() - 1
    x, y = reference.data(0, 1 if last else 4, seed=5)
    own, seen = Seen(), Seen()
    more = [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1),
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        seen,
    ]
    model = reference.compiled(keras.optimizers.SGD(0.005), False)
    history = model.fit(
        *reference.data(0, 5),
        batch_size=8,
        epochs=5,
        verbose=0,
        validation_data=(x, -y if last else y),
        callbacks=[own, lsgd.LocalSGDCallback(2), *more],
    )
    losses = gather([logs["val_loss"] for logs in own.logs])
    assert (np.diff(losses[-1]) > 0).all(), "alone it would have stopped"
    assert (np.diff(history.history["val_loss"]) < 0).all()
    assert history.epoch == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(history.history["learning_rate"], 0.005)
    for weight, best in zip(model.get_weights(), seen.weights[-1], strict=True):
        assert weight.tobytes() == best.tobytes()
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_line_of_an_epoch_has_the_users_metrics_and_one_number_of_ours(lsgd, verbose, capsys):
    x, y = reference.data(lsgd.rank(), 3)
    model = reference.compiled("sgd", metrics=["mae"])
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=verbose, callbacks=[lsgd.LocalSGDCallback(2)]).history
    assert list(history) == ["loss", "mae"]
    printed = capsys.readouterr().out
    line = next((text for text in printed.splitlines() if "averaging" in text), "").replace("\b", "")
    assert (lsgd.rank() == 0) == bool(line) == bool(printed)
    if line:
        assert [word.rstrip(":") for word in line.split(" - ")[-3:] for word in word.split()[:1]] == [
            "loss",
            "mae",
            "averaging",
        ]


def test_the_optimizer_prints_nothing_unless_it_is_asked(lsgd, capfd):
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), 2)
    with pytest.raises(RuntimeError, match="no training has ended"):
        optimizer.print_table()
    model, (x, y) = reference.compiled(optimizer), reference.data(lsgd.rank(), 3)
    for verbose in (0, 2):
        capfd.readouterr()
        model.fit(x, y, batch_size=8, verbose=verbose)
        said = "".join(capfd.readouterr())
        assert bool(said) == (verbose > 0 and lsgd.rank() == 0), said
        assert "Local SGD" not in said
    optimizer.print_table()
    printed = capfd.readouterr().out
    assert ("Local SGD, Constant(sync_every=2), " in printed) == (lsgd.rank() == 0)
    assert bool(printed) == (lsgd.rank() == 0)


@pytest.mark.alone
def test_tensorflow_has_nothing_to_say_of_the_names_in_our_graphs(lsgd, monkeypatch):
    """Without our kernel, whose operation needs no other branch."""
    monkeypatch.setattr(kernel, "load", lambda: None)
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    tf.get_logger().addHandler(handler)
    try:
        fit(lsgd, reference.compiled(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), 2)), 3, Seen())
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [record.getMessage() for record in heard if "name" in record.getMessage()]
