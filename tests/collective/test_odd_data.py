"""Data that is no numpy array, metrics that are no number: dealt out, averaged, or refused in words, on every rank."""

import copy

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from . import reference

pytestmark = pytest.mark.pairs

ROWS = 13
ZEROS = np.float32([0, 1, 1, 0])
TABLE = np.arange(1, 4 * ROWS + 1, dtype="float32").reshape(ROWS, 4) * ZEROS  # no row twice


def pandas(kind):
    def make():
        made = getattr(pytest.importorskip("pandas"), kind)(TABLE if kind == "DataFrame" else TABLE[:, 1])
        made.index = 100 - np.arange(ROWS)  # labels that are no places
        return made

    return make


class Anything:
    """What numpy can make an array of, and no more."""

    shape = TABLE.shape

    def __array__(self, dtype=None, copy=None):
        return np.array(TABLE, dtype)


# How to make TABLE, or its second column, of some kind; and how to make of a part of it a numpy array again.
ARRAYS = {
    "numpy": (lambda: TABLE, np.asarray),
    "tensor": (lambda: tf.constant(TABLE), np.asarray),
    "variable": (lambda: tf.Variable(TABLE), np.asarray),
    "keras variable": (lambda: keras.Variable(TABLE), np.asarray),
    "words": (lambda: tf.constant([str(x) for x in TABLE[:, 1]]), lambda part: part.numpy().astype("float32")),
    "masked": (lambda: np.ma.array(TABLE, mask=TABLE == 0), lambda part: part.filled(0)),
    "csr": (lambda: scipy.sparse.csr_matrix(TABLE), lambda part: part.toarray()),
    "csc": (lambda: scipy.sparse.csc_array(TABLE), lambda part: part.toarray()),
    "coo": (lambda: scipy.sparse.coo_matrix(TABLE), lambda part: part.toarray()),
    "lil": (lambda: scipy.sparse.lil_array(TABLE), lambda part: part.toarray()),
    "ragged": (
        lambda: tf.ragged.constant([[x] * (i % 3 + 1) for i, x in enumerate(TABLE[:, 1])]),
        lambda part: np.array([set(row.numpy()).pop() for row in part]),
    ),
    "sparse": (lambda: tf.sparse.from_dense(TABLE), lambda part: tf.sparse.to_dense(part).numpy()),
    "sparse cube": (
        lambda: tf.sparse.from_dense(TABLE.reshape(ROWS, 2, 2)),
        lambda part: tf.sparse.to_dense(part).numpy().reshape(-1, 4),
    ),
    "data frame": (pandas("DataFrame"), np.asarray),
    "series": (pandas("Series"), np.asarray),
    "anything": (Anything, np.asarray),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("remainder", ["keep", "drop", "repeat"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_of_everything_that_keras_takes_for_an_array(lsgd, gather, kind, remainder, shuffle):
    make, dense = ARRAYS[kind]
    whole, size = make(), lsgd.size()
    numbers, nothing, part = lsgd.shard((np.arange(ROWS), None, whole), shuffle=shuffle, remainder=remainder)
    assert nothing is None
    own = np.asarray(dense(part) if size > 1 else dense(whole))
    np.testing.assert_array_equal(own, (TABLE if own.ndim == 2 else TABLE[:, 1])[numbers], "rows stay together")
    if size == 1:
        assert part is whole
    elif kind not in ("anything", "variable", "keras variable", "csc", "coo", "lil"):
        assert type(part) is type(whole)
    elif kind in ("csc", "coo", "lil"):
        assert part.format == "csr"
    counts = np.bincount(np.concatenate(gather(numbers)), minlength=ROWS)
    assert counts.sum() == {"keep": ROWS, "drop": ROWS - ROWS % size, "repeat": ROWS + -ROWS % size}[remainder]
    assert counts.max() <= 1 + (remainder == "repeat")


def mean_of_ranks(gather, x, y, kernel, rate):
    """Plain numpy: one SGD step on each rank's rows, then the average."""
    steps = [k - rate * 2 / len(a) * a.T @ (a @ k - b) for a, b, k in gather((x, y, kernel))]
    return np.mean(steps, axis=0)


@pytest.mark.parametrize("kind", ["tensor", "csr", "coo", "sparse", "data frame"])
def test_a_fit_with_such_a_part(lsgd, gather, kind):
    make, dense = ARRAYS[kind]
    x, y = lsgd.shard((make(), TABLE @ np.float32([[1], [2], [3], [4]])))
    inputs = keras.Input((4,), sparse=kind in ("csr", "coo", "sparse"))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    kernel = np.float32([[0.1], [0.2], [0.3], [0.4]])
    model.set_weights([kernel])
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    model.fit(x, y, batch_size=ROWS, verbose=0, callbacks=[lsgd.LocalSGDCallback(1)])
    expected = mean_of_ranks(gather, np.asarray(dense(x), "float64"), np.asarray(y, "float64"), kernel, 1e-4)
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-4)


def test_a_fit_with_ragged_rows_and_no_sample_weights(lsgd, gather):
    lengths = np.arange(ROWS) % 3 + 1
    x, y, weights = lsgd.shard((tf.ragged.constant([[float(n)] * n for n in lengths]), lengths[:, None] * 2.0, None))
    inputs = keras.Input((None,), ragged=True)
    sums = keras.layers.Lambda(lambda rows: tf.reshape(tf.reduce_sum(rows, axis=1), (-1, 1)), output_shape=(1,))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(sums(inputs)))
    model.set_weights([np.float32([[0.5]])])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(x, y, sample_weight=weights, batch_size=ROWS, verbose=0, callbacks=[lsgd.LocalSGDCallback(1)])
    own = (y / 2) ** 2  # n times n
    expected = mean_of_ranks(gather, own, np.asarray(y), np.array([[0.5]]), 1e-3)
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-4)


def endless():
    return tf.data.Dataset.range(3).repeat()


def unknown():
    return tf.data.Dataset.range(9).filter(lambda x: x > 1)


class Endless(keras.utils.PyDataset):
    num_batches = None


class Unmeasured(keras.utils.PyDataset):
    def __getitem__(self, index):
        return np.zeros((2, 1))


REFUSED = {
    "numbers": (lambda: [1, 2, 3], TypeError, r"Received: list with int in it. A list counts.*np\.array"),
    "nested numbers": (lambda: [[1.0, 2.0], [3.0, 4.0]], TypeError, "list with float in it. A list counts"),
    "words": (lambda: (np.zeros(4), ["a", "b"]), TypeError, "tuple with str in it. A list counts as several"),
    "numpy numbers": (lambda: [np.float32(1), np.float32(2)], TypeError, r"numpy\.float32 of shape \(\) in it. A li"),
    "a number": (lambda: 7, TypeError, "Received: int"),
    "no dimension": (lambda: np.array(3), TypeError, r"Received: numpy\.ndarray of shape \(\)"),
    "no dimension inside": (lambda: (np.zeros(3), tf.constant(3)), TypeError, r"with .*EagerTensor of shape \(\)"),
    "nothing": (lambda: (None, None), TypeError, "Received: tuple"),
    "no array": (lambda: {}, TypeError, "Received: dict"),
    "generator": (lambda: (x for x in range(3)), TypeError, "Received: generator.*tf.data.Dataset"),
    "iterator": (lambda: iter(tf.data.Dataset.range(9)), TypeError, "OwnedIterator.*give each rank its own"),
    "set": (lambda: {1, 2, 3}, TypeError, "Received: set"),
    "symbolic": (lambda: keras.Input((3,)), TypeError, "KerasTensor"),
    "dataset inside": (lambda: (tf.data.Dataset.range(9), np.zeros(9)), TypeError, "tuple with tensorflow.*Dataset in"),
    "empty": (lambda: np.zeros((0, 3)), ValueError, "0 samples cannot be shared by"),
    "empty sparse": (lambda: scipy.sparse.csr_matrix((0, 3)), ValueError, "0 samples cannot be shared by"),
    "empty dataset": (lambda: tf.data.Dataset.range(0), ValueError, "0 elements cannot be shared by"),
    "lengths": (lambda: (scipy.sparse.eye(4), np.zeros(5)), ValueError, r"same number of rows.*\[\(4, 4\), \(5,\)\]"),
    "ragged lengths": (lambda: (tf.ragged.constant([[1], [2, 3]]), np.zeros(3)), ValueError, "same number of rows"),
    "without end": (lambda: Endless(), ValueError, "PyDataset without end.*Endless.num_batches"),
    "unmeasured": (lambda: Unmeasured(), ValueError, "PyDataset without end.*Unmeasured.num_batches"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_dealt_out_is_refused_in_words_on_every_rank(lsgd, what):
    make, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        lsgd.shard(make())


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (unknown, {"shuffle": False}, "does not know its cardinality"),
        (unknown, {"remainder": "drop"}, "does not know its cardinality"),
        (unknown, {"remainder": "repeat"}, "does not know its cardinality"),
        (endless, {"remainder": "drop"}, "does not know its cardinality"),
        (endless, {"shuffle": False}, "without end has no contiguous parts"),
        (lambda: TABLE, {"seed": None}, "seed must be an integer.*Received: None"),
        (lambda: TABLE, {"seed": -1}, "seed must be an integer.*Received: -1"),
        (lambda: tf.data.Dataset.range(9), {"seed": 2**40}, "seed must be an integer"),
        (lambda: tf.data.Dataset.range(9), {"seed": 0.5}, "seed must be an integer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_on_every_rank(lsgd, make, arguments, words):
    with pytest.raises(ValueError, match=words):
        lsgd.shard(make(), **arguments)


def test_a_seed_may_be_numpys(lsgd, gather):
    own = [int(x) for x in lsgd.shard(tf.data.Dataset.range(ROWS), seed=np.int64(5))]
    assert sorted(sum(gather(own), [])) == list(range(ROWS))


# Logs.


class Note(keras.callbacks.Callback):
    """Puts something into the logs of an epoch, before they are averaged."""

    def __init__(self, **own):
        super().__init__()
        self.own = own

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self.own)


class Look(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.logs, self.weights = dict(logs), self.model.get_weights()


def f1_per_class(labels, scores):
    chosen = np.eye(3)[np.argmax(scores, axis=1)]
    both, either = (labels * chosen).sum(0), labels.sum(0) + chosen.sum(0)
    return 2 * both / np.maximum(either, 1e-9)


def classification(rank, rows):
    random = np.random.default_rng([9, rank])
    return random.normal(size=(rows, 4)).astype("float32"), np.eye(3, dtype="float32")[random.integers(0, 3, rows)]


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_metric_for_each_class_is_averaged_element_by_element(lsgd, gather, verbose, tmp_path, capsys):
    """By the validation samples of each rank, as other metrics; against numpy's F1 of the model that fit leaves."""
    rank = lsgd.rank()
    x, y = classification(rank, 40)
    validation = classification(100 + rank, 24 + 8 * rank)
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy", metrics=[keras.metrics.F1Score(name="f1")])
    look = Look()
    more = [look, keras.callbacks.CSVLogger(tmp_path / "log.csv"), keras.callbacks.EarlyStopping("val_loss")]
    if rank == 0:
        more.append(keras.callbacks.ModelCheckpoint(tmp_path / "model.keras"))
    callbacks = [lsgd.LocalSGDCallback(2), *more]
    history = model.fit(x, y, batch_size=8, validation_data=validation, verbose=verbose, callbacks=callbacks).history
    printed = capsys.readouterr().out
    assert ("val_loss: " in printed, "Local SGD, Constant" in printed) == (verbose > 0 and rank == 0,) * 2, (
        "rank 0 alone"
    )
    # What callbacks see at the epoch's end, and write, is the average: the five batches are no multiple of two.
    written = keras.models.load_model(tmp_path / "model.keras").get_weights() if rank == 0 else look.weights
    for seen, file, left, others in zip(
        look.weights, written, model.get_weights(), gather(look.weights)[0], strict=True
    ):
        assert seen.tobytes() == file.tobytes() == left.tobytes() == others.tobytes()
    scores = model.predict(validation[0], verbose=0)
    own = f1_per_class(validation[1], scores)
    assert isinstance(look.logs["val_f1"], np.ndarray)
    samples = [24 + 8 * k for k in range(lsgd.size())]
    np.testing.assert_allclose(look.logs["val_f1"], np.average(gather(own), axis=0, weights=samples), rtol=1e-5)
    own_loss = -np.mean(np.log(scores[validation[1] > 0].astype("float64")))
    assert look.logs["val_loss"] == pytest.approx(np.average(gather(own_loss), weights=samples), rel=1e-5)
    for seen in gather((look.logs["f1"], look.logs["val_f1"], history["val_f1"][0])):
        for one, other in zip(seen, (look.logs["f1"], look.logs["val_f1"], look.logs["val_f1"]), strict=True):
            assert np.shape(one) == (3,)
            np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:LocalSGDCallback stands behind")
def test_numbers_of_any_shape_are_averaged_and_everything_else_stays(lsgd, gather):
    rank, size = lsgd.rank(), lsgd.size()
    note = Note(
        scalar=np.float32(rank),
        table=tf.constant([[rank, 1.0], [2.0, rank]]),
        row=[1, rank],
        word="3",
        words=["a", "b"],
        missing=None,
        uneven=np.arange(rank + 1.0),
        ill=float("nan") if rank == size - 1 else 1.0,
        huge=np.array([float("inf"), -float("inf"), float("nan"), rank]),
    )
    look = Look()
    model = reference.compiled(keras.optimizers.SGD(0.01))
    x, y = reference.data(rank, 3 + rank)
    callbacks = [note, lsgd.LocalSGDCallback(2), look]
    model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    samples = [8 * (3 + k) for k in range(size)]
    mean = np.average(range(size), weights=samples)
    logs = look.logs
    assert logs["scalar"] == pytest.approx(mean)
    assert type(logs["scalar"]) is float
    np.testing.assert_allclose(logs["table"], [[mean, 1], [2, mean]])
    np.testing.assert_allclose(logs["row"], [1, mean])
    assert (logs["word"], logs["words"], logs["missing"]) == ("3", ["a", "b"], None)
    np.testing.assert_array_equal(logs["uneven"], np.arange(rank + 1.0))
    assert np.isnan(logs["ill"])
    np.testing.assert_allclose(logs["huge"], [np.inf, -np.inf, np.nan, mean])
    assert gather(logs["loss"]) == [logs["loss"]] * size


def test_two_callbacks_in_one_fit_are_refused_on_every_rank(lsgd):
    callback = lsgd.LocalSGDCallback(2)
    for other in (callback, copy.deepcopy(callback)):
        with pytest.raises(ValueError, match="one LocalSGDCallback.*Received: 2"):
            reference.compiled("sgd").fit(*reference.data(0, 1), verbose=0, callbacks=[callback, other])
    model = reference.compiled("sgd")
    model.fit(*reference.data(0, 1), verbose=0, callbacks=[callback])
    assert sum(r.steps for r in callback.timings) == 1


@pytest.mark.parametrize("kind", ["LocalSGDCallback", "IterateAverage"])
def test_a_model_of_keras_2_is_refused_in_words(lsgd, kind):
    """tf_keras gives a callback its model before it asks for anything else."""
    old = type("Sequential", (), {"__module__": "tf_keras.src.engine.sequential"})()
    words = "models of Keras 3.*Received: a Sequential of tf_keras.*unset TF_USE_LEGACY_KERAS"
    with pytest.raises(TypeError, match=words):
        getattr(lsgd, kind)().set_model(old)
