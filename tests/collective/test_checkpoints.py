"""A training that ends in the middle goes on as if it had not: the same bits. Here one process ends and begins it; others do in tests/test_resuming.py."""

import gc
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.core.keeper import Checkpoints
from hvd_localsgd.errors import CheckpointError, RanksDiffer
from hvd_localsgd.frontends import replay

pytestmark = pytest.mark.pairs


@pytest.fixture
def folder(tmp_path, gather):
    """One for all ranks."""
    return gather(str(tmp_path))[0]


class Interrupt(keras.callbacks.Callback):
    """The last rank is asked to end after so many batches (``at``), or in validation."""

    def __init__(self, lsgd, at):
        super().__init__()
        self.asks, self.at, self.batches = lsgd.rank() == lsgd.size() - 1, at, 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.asks and self.batches == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_test_begin(self, logs=None):
        if self.asks and self.at == "validation":
            os.kill(os.getpid(), signal.SIGTERM)


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


def fit(lsgd, folder, front="callback", kind="arrays", at=None, more=0, **options):
    """As a process that begins: seeds, a new model, new callbacks. Everything that this rank holds at the end, and its logs."""
    keras.utils.set_random_seed(3 + lsgd.rank())
    layers = [
        keras.layers.Dense(5),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    several, optimizer = options.pop("several", 1), keras.optimizers.SGD(0.01, momentum=0.9)
    arguments = {"sync_every": 3} | {name: value() if callable(value) else value for name, value in options.items()}
    callbacks = [lsgd.LocalSGDCallback(**arguments)] if front == "callback" else []
    optimizer = optimizer if front == "callback" else lsgd.LocalSGDOptimizer(optimizer, **arguments)
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=several)
    if folder is not None:
        callbacks.append(lsgd.LocalSGDCheckpoint(folder, 2))
    validation = (np.ones((8, 6), "float32"), np.ones((8, 1), "float32"))
    history = model.fit(
        **data(kind, lsgd.rank(), 24 + more * lsgd.rank()),
        epochs=3,
        verbose=0,
        callbacks=[*callbacks, Interrupt(lsgd, at)],
        validation_data=validation if front == "callback" else None,
    )
    held = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    logs = {name: values[-1] for name, values in history.history.items()}
    return held, logs


def assert_goes_on_exactly(lsgd, folder, *, without=False, at=8, **arguments):
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
    assert last == pytest.approx(logs, nan_ok=True)


FITS = {
    "arrays": {"without": True},
    "a dataset, the optimizer": {"kind": "dataset", "front": "optimizer", "without": True},
    "repeated data, int8": {"kind": "repeated", "compression": "int8", "sync_every": 1, "variance": "pooled"},
    "a PyDataset, unequal": {"kind": "python", "optimizer_state": "average", "more": 8},
    "several steps, an optimizer outside": {
        "several": 2,
        "sync_every": 4,
        "outer": lambda: keras.optimizers.Adam(0.01),
    },
    "in validation": {"at": "validation"},
}


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("name", FITS)
def test_fit_goes_on_exactly(name, lsgd, folder):
    assert_goes_on_exactly(lsgd, folder, **FITS[name])


def model_with_momentum():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model


@pytest.mark.usefixtures("several_ranks")
def test_a_second_fit_begins_with_each_ranks_own_momentum(lsgd, gather):
    model, seen = model_with_momentum(), []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(model.optimizer.variables[2].numpy())

    x, y = arrays(lsgd.rank(), 16)
    for _ in range(2):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[lsgd.LocalSGDCallback(2), Look()])
        seen.append(model.optimizer.variables[2].numpy())
    assert (seen[4] == seen[5]).all()  # when the first ended, when the second began
    assert len({value.tobytes() for value in gather(seen[5])}) == lsgd.size()


@pytest.mark.usefixtures("several_ranks")
def test_optimizers_that_files_have_brought_to_different_steps_are_refused(lsgd):
    model = model_with_momentum()
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(44 if lsgd.rank() else 132)
    with pytest.raises(RanksDiffer, match=r"different local steps.*rank 1 on \S+: 44; rank 0 on \S+: 132"):
        model.fit(*arrays(lsgd.rank(), 16), batch_size=4, verbose=0, callbacks=[lsgd.LocalSGDCallback(2)])


@pytest.mark.alone
@pytest.mark.parametrize("epochs", [0, 1, 3])
@pytest.mark.parametrize("kind", ["dataset", "unknown", "repeated", "python"])
def test_data_are_gone_through_again(kind, epochs):
    from keras.src.backend.tensorflow.trainer import TFEpochIterator

    def made():
        keras.utils.set_random_seed(5)
        batches = TFEpochIterator(tf.distribute.get_strategy(), **data(kind, 0, 16))
        batches.reset()
        return batches

    def run(batches, times):
        seen = []
        for _ in range(times):
            seen.append([])
            with batches.catch_stop_iteration():
                for entry in batches:
                    seen[-1].append(next(entry[-1])[0].numpy().tobytes())
        return seen

    expected, begun = run(made(), 5), made()
    replay.skip(begun, epochs, 2, False, lambda: None, lambda: None)
    assert run(begun, 5 - epochs) == [expected[epochs][2:], *expected[epochs + 1 :]]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("wrong", "words"),
    [("alone", "keeps a training that averages"), ("in front", "must stand behind"), ("async", "cannot be kept")],
)
def test_what_cannot_be_kept_is_refused(wrong, words, lsgd, folder):
    model, checkpoint = model_with_momentum(), lsgd.LocalSGDCheckpoint(folder)
    callback = lsgd.LocalSGDCallback(2, mode="async" if wrong == "async" else "sync")
    callbacks = {"alone": [checkpoint], "in front": [checkpoint, callback]}.get(wrong, [callback, checkpoint])
    with pytest.raises(ValueError, match=words):
        model.fit(*arrays(0, 16), verbose=0, callbacks=callbacks)
    assert not os.listdir(folder)


# Loops


class Loop:
    """SGD with momentum on noise, of which a rank's share is its own; what it holds when it ends."""

    def __init__(
        self, lsgd, folder, *, at=None, steps=30, rounds=2, shapes=((700,), (3, 4), (5,)), communicator=None, **options
    ):
        np.random.seed(3 + lsgd.rank())
        self.x = [np.zeros(shape, np.float32) for shape in shapes]
        self.moments = [np.zeros_like(x) for x in self.x]
        targets = np.random.default_rng(9 + lsgd.rank()).normal(size=steps)
        self.keeper = None if folder is None else Checkpoints(folder, rounds)
        averager = lsgd.ModelAverager(
            self.x,
            **({"sync_every": 3} | options),
            checkpoint=self.keeper,
            state=self.moments,
            communicator=communicator,
        )
        averager.tell(rate=0.05)
        averager.begin()
        self.began = averager.steps
        for step in range(averager.steps, steps):
            momentum = 0.0 if options.get("control_variates") else 0.9
            for number, (x, moment) in enumerate(zip(self.x, self.moments, strict=True)):
                corrected = averager.corrections[number] if averager.corrections else 0.0
                moment[:] = momentum * moment + x - targets[step] + np.random.normal(size=x.shape) - corrected
                x -= np.float32(0.05) * moment
            averager.step()
            if step == at and lsgd.rank() == lsgd.size() - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        averager.finish()

    def holds(self):
        return [array.tobytes() for array in (*self.x, *self.moments)]


LOOPS = {
    "plain": {},
    "slowmo": {"outer": "slowmo"},
    "diloco": {"outer": "diloco", "clip_change": 0.5},
    "guard": {"guard": "outliers"},
    "int8": {"compression": "int8", "sync_every": 1},
    "overlap": {"overlap": 1},
    "overlap and int8": {"overlap": 1, "compression": "int8", "sync_every": 2},
    "fragments": {"fragments": 3},
    "fragments and an outer step": {"fragments": 3, "outer": "diloco"},
    "variates": {"control_variates": True},
    "groups": {"groups": "halves"},
}


def chosen(lsgd, name):
    options = dict(LOOPS[name])
    if "groups" in options:
        options["groups"] = lsgd.Groups([[rank] for rank in range(lsgd.size())], every=3)
    return options


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_goes_on_exactly(name, lsgd, folder):
    options = chosen(lsgd, name)
    expected = Loop(lsgd, None, **options).holds()
    assert Loop(lsgd, f"{folder}/whole", **options).holds() == expected
    with pytest.raises(lsgd.Preempted):
        Loop(lsgd, f"{folder}/stopped", at=13, **options)
    loop = Loop(lsgd, f"{folder}/stopped", **options)
    assert 13 < loop.began < 30
    assert loop.holds() == expected


def test_a_training_that_has_ended_goes_on_with_more(lsgd, folder):
    Loop(lsgd, folder, steps=30)
    assert Loop(lsgd, folder, steps=30).began == 30
    assert Loop(lsgd, folder, steps=40).began == 30


def test_only_so_many_are_kept_and_the_last_is_complete(lsgd, folder, gather):
    for steps in (10, 20, 30, 40):  # each life ends with one
        Loop(lsgd, folder, steps=steps, rounds=1)
    gather(0)
    kept = sorted(name for name in os.listdir(folder) if name.startswith("round"))
    assert len(kept) == 3
    assert sorted(os.listdir(f"{folder}/{kept[-1]}")) == [
        "manifest.json",
        *(f"rank-{k}.npz" for k in range(lsgd.size())),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sync_every": 4}, "is of another training: sync_every was Constant .*3.*, and is Constant .*4"),
        ({"outer": "slowmo"}, "is of another training: outer was"),
        ({"shapes": ((700,), (3, 5), (5,))}, r"variables was \[\[3, 4\], 'float32'\], and is \[\[3, 5\], 'float32'\]"),
        ({"shapes": ((700,), (3, 4), (5,), (1,))}, "variables was "),
    ],
)
def test_another_training_is_refused(change, words, lsgd, folder):
    Loop(lsgd, folder)
    with pytest.raises(CheckpointError, match=words):
        Loop(lsgd, folder, **change)
    assert Loop(lsgd, folder).began == 30


def test_what_one_rank_finds_damaged_all_refuse(lsgd, folder, gather):
    Loop(lsgd, folder)
    last = lsgd.size() - 1
    if lsgd.rank() == 0:
        newest = max(name for name in os.listdir(folder) if name.startswith("round"))
        os.truncate(f"{folder}/{newest}/rank-{last}.npz", 64)
    gather(0)
    with pytest.raises(CheckpointError, match=f"rank {last} on .*rank-{last}.npz has 64 bytes, and had "):
        Loop(lsgd, folder)


@pytest.mark.usefixtures("several_ranks")
def test_ranks_that_would_go_on_from_different_steps_are_named(lsgd, folder):
    own = f"{folder}/{lsgd.rank()}"
    alone = lsgd.devices.get().subgroup([[rank] for rank in range(lsgd.size())])
    Loop(lsgd, own, communicator=alone, steps=12 if lsgd.rank() else 30)
    with pytest.raises(
        RanksDiffer, match=r"rank 0 on \S+ has round \d+ of training \w+, rank 1 on \S+ has round \d+ of"
    ):
        Loop(lsgd, own)


@pytest.mark.usefixtures("several_ranks")
def test_a_rank_without_the_files_says_so(lsgd, folder):
    Loop(lsgd, f"{folder}/{lsgd.rank()}")  # of a host only one rank writes manifests
    with pytest.raises(RanksDiffer, match=r"rank 0 on \S+ has round \d+ of training \w+, rank 1 on \S+ has none"):
        Loop(lsgd, f"{folder}/{lsgd.rank()}")


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("name", ["diloco", "int8", "variates"])
def test_fewer_ranks_go_on_with_what_was_common(name, lsgd, folder, capfd, gather):
    options = chosen(lsgd, name)
    with pytest.raises(lsgd.Preempted):
        Loop(lsgd, folder, at=10, **options)
    gather(0)
    alone = lsgd.devices.get().subgroup([[rank] for rank in range(lsgd.size())])
    capfd.readouterr()
    if lsgd.rank() == 0:
        loop = Loop(lsgd, folder, communicator=alone, **options)
        assert loop.began > 10
        words = capfd.readouterr().err
        assert f"which {lsgd.size()} ranks have written; not taken over: what each rank alone kept" in words
    gather(0)


def test_async_cannot_be_kept(lsgd, folder):
    with pytest.raises(ValueError, match="cannot be kept"):
        Loop(lsgd, folder, mode="async")


@pytest.mark.parametrize("wrong", [{"every_rounds": 0}, {"keep": 0}, {"exit_status": 256}, {"max_minutes": 0}])
def test_what_is_out_of_range_is_echoed(wrong, folder):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be .*Received: {next(iter(wrong.values()))}"):
        Checkpoints(folder, **wrong)


@pytest.mark.alone
def test_a_fit_that_fails_leaves_signals_as_they_were(lsgd, folder):
    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert signal.getsignal(signal.SIGTERM) is not before
            raise ValueError("mine")

    before = signal.getsignal(signal.SIGTERM)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callbacks = [lsgd.LocalSGDCallback(sync_every=4), lsgd.LocalSGDCheckpoint(folder), Fail()]
    with pytest.raises(ValueError, match="mine"):
        model.fit(*arrays(0, 32), batch_size=4, verbose=0, callbacks=callbacks)
    gc.collect()  # the error has held fit's frame
    assert signal.getsignal(signal.SIGTERM) is before
