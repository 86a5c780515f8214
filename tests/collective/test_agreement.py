"""All ranks agree on what they are about to do, or each says what differs; nobody hangs, and nothing differs in silence."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from . import reference
from .helpers import fit

pytestmark = pytest.mark.pairs
DENSE = keras.layers.Dense


def odd(lsgd):
    return lsgd.rank() == lsgd.size() - 1 and lsgd.size() > 1


def model_of(*layers):
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((reference.FEATURES,)), *layers, DENSE(1)])


def frozen(units):
    return DENSE(units, trainable=False)


ODD_MODELS = {
    "activation": (
        lambda: model_of(DENSE(4, "relu")),
        lambda: model_of(DENSE(4, "tanh")),
        "part 1 is {'class': 'Dense', 'activation': 'tanh'}",
    ),
    "dropout rate": (
        lambda: model_of(keras.layers.Dropout(0.1)),
        lambda: model_of(keras.layers.Dropout(0.2)),
        "part 1 is {'class': 'Dropout', 'rate': 0.2}",
    ),
    "frozen shape": (lambda: model_of(frozen(4), DENSE(2)), lambda: model_of(frozen(3), DENSE(2)), "variable"),
    "one layer more": (lambda: model_of(), lambda: model_of(keras.layers.ReLU()), "part 1 is"),
}


FRONT_ENDS = pytest.mark.parametrize("front_end", ["callback", "optimizer"])


def compiled_for(lsgd, front_end, model):
    """The callbacks for fit. With the optimizer an error comes out of a graph, and TensorFlow wraps it."""
    if front_end == "callback":
        model.compile("sgd", "mse")
        return [lsgd.LocalSGDCallback(2)]
    model.compile(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), 2), "mse")
    return []


@FRONT_ENDS
@pytest.mark.parametrize("difference", ODD_MODELS)
def test_models_that_compute_something_else(lsgd, several_ranks, front_end, difference):
    usual, other, words = ODD_MODELS[difference]
    model = (other if odd(lsgd) else usual)()
    callbacks = compiled_for(lsgd, front_end, model)
    x, y = reference.data(lsgd.rank(), 2)
    with pytest.raises(Exception, match=rf"Ranks hold different models: .*{words}.*rank {lsgd.size() - 1} on "):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)


@FRONT_ENDS
def test_words_that_mean_other_rows(lsgd, several_ranks, front_end):
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"] if not odd(lsgd) else ["b", "a"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Embedding(4, 2), DENSE(1)])
    callbacks = compiled_for(lsgd, front_end, model)
    x = tf.constant([["a"], ["b"]])
    with pytest.raises(Exception, match="'class': 'StringLookup', 'vocabulary': "):
        model.fit(x, np.zeros((2, 1)), verbose=0, callbacks=callbacks)


ODD_OPTIMIZERS = {
    "class": (keras.optimizers.SGD, keras.optimizers.Adam),
    "momentum": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), lambda: keras.optimizers.SGD(0.1)),
    "accumulation": (keras.optimizers.SGD, lambda: keras.optimizers.SGD(gradient_accumulation_steps=2)),
    "schedule": (
        keras.optimizers.SGD,
        lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    ),
    "clipping": (keras.optimizers.SGD, lambda: keras.optimizers.SGD(clipnorm=1.0)),
}


@FRONT_ENDS
@pytest.mark.parametrize("difference", ODD_OPTIMIZERS)
def test_optimizers_that_do_something_else(lsgd, several_ranks, front_end, difference):
    optimizer = ODD_OPTIMIZERS[difference][odd(lsgd)]()
    callbacks = [lsgd.LocalSGDCallback(2)] if front_end == "callback" else []
    model = reference.compiled(optimizer if callbacks else lsgd.LocalSGDOptimizer(optimizer, 2), False)
    expected = (ValueError, Exception)[front_end == "optimizer"]  # TensorFlow wraps it, in a graph
    with pytest.raises(expected, match="Ranks hold different models"):
        model.fit(*reference.data(lsgd.rank(), 2), batch_size=8, verbose=0, callbacks=callbacks)


def test_another_front_end(lsgd, several_ranks):
    own = odd(lsgd)
    model = reference.compiled(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), 2) if own else "sgd", False)
    with pytest.raises(Exception, match="has front end="):
        model.fit(
            *reference.data(lsgd.rank(), 2),
            batch_size=8,
            verbose=0,
            callbacks=[] if own else [lsgd.LocalSGDCallback(2)],
        )


def test_another_first_epoch(lsgd, several_ranks):
    model = reference.compiled("sgd")
    with pytest.raises(ValueError, match="has first epoch=2, rank 0 on .* has first epoch=0"):
        fit(lsgd, model, 2, lsgd.LocalSGDCallback(2), epochs=4, initial_epoch=2 * odd(lsgd))


@pytest.mark.parametrize("who", ["first", "last"])
def test_weights_that_a_rank_loads_when_training_begins(lsgd, gather, who):
    """Callbacks behind ours have had their turn: what counts is what rank 0 holds then."""
    loads = lsgd.rank() == (0 if who == "first" else lsgd.size() - 1)

    class Load(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            if loads:
                self.model.set_weights([np.full_like(w, 0.5) for w in self.model.get_weights()])

    model = reference.compiled(keras.optimizers.SGD(0.0), batch_normalization=False)
    fit(lsgd, model, 2, lsgd.LocalSGDCallback(2), callbacks=[Load()])
    reference.assert_same_everywhere(gather, model)
    loaded_by_rank_0 = who == "first" or lsgd.size() == 1
    assert all((w == 0.5).all() for w in model.get_weights()) == loaded_by_rank_0


def test_a_layer_that_is_adapted_to_each_ranks_own_data(lsgd, gather):
    normalization = keras.layers.Normalization()
    normalization.adapt(reference.data(lsgd.rank(), 4)[0] * (1 + lsgd.rank()))
    model = model_of(normalization)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    fit(lsgd, model, 4, lsgd.LocalSGDCallback(2))
    predictions = gather(model.predict(reference.data(99, 1)[0], verbose=0).tobytes())
    assert all(other == predictions[0] for other in predictions)


@pytest.mark.parametrize("same", [True, False])
def test_the_optimizer_cannot_adapt_a_layer_anew_and_says_so(lsgd, gather, several_ranks, same):
    """What a layer was adapted to is inside the graph by then. The same on every rank is no problem."""
    normalization = keras.layers.Normalization()
    normalization.adapt(reference.data(0 if same else lsgd.rank(), 4)[0])
    model = model_of(normalization)
    compiled_for(lsgd, "optimizer", model)
    x, y = reference.data(lsgd.rank(), 2)
    if same:
        model.fit(x, y, batch_size=8, verbose=0)
        reference.assert_same_everywhere(gather, model)
    else:
        with pytest.raises(Exception, match="part 1 is {'class': 'Normalization', 'adapted to': "):
            model.fit(x, y, batch_size=8, verbose=0)


@pytest.mark.alone  # on several ranks, a fit that ends in the middle ends the job
def test_a_layer_that_becomes_trainable_during_fit_is_named(lsgd):
    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.layers[0].trainable = epoch > 0

    model = model_of(DENSE(3, name="late"))
    model.layers[0].trainable = False
    model.compile(keras.optimizers.SGD(0.01), "mse")
    with pytest.raises(ValueError, match=r"late/kernel.* became trainable during fit"):
        fit(lsgd, model, 3, lsgd.LocalSGDCallback(2), epochs=3, callbacks=[Unfreeze()])


def test_a_model_with_nothing_to_average(lsgd):
    model = keras.Sequential([keras.Input((reference.FEATURES,)), keras.layers.Rescaling(2.0), DENSE(1)])
    model.trainable = False
    model.compile("sgd", "mse")
    callback = lsgd.LocalSGDCallback(2)
    fit(lsgd, model, 4, callback)
    assert [r.last_step for r in callback.timings if r.interval] == [2, 4]


class TwoParts(keras.Model):
    """As in Keras' examples of adversarial networks: no ``call``, two optimizers, a ``train_step`` of its own."""

    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(5)
        self.first = keras.Sequential([keras.Input((reference.FEATURES,)), DENSE(3), DENSE(1)])
        self.second = keras.Sequential([keras.Input((reference.FEATURES,)), DENSE(1)])

    def compile(self, first, second, **arguments):
        super().compile(**arguments)
        self.first_optimizer, self.second_optimizer = first, second

    def train_step(self, data):
        x, y = data
        for part, optimizer in ((self.first, self.first_optimizer), (self.second, self.second_optimizer)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((part(x, training=True) - y) ** 2)
            weights = part.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


class Siamese(keras.Model):
    """As in Keras' example: batches of three inputs and no target, which its ``train_step`` takes apart itself."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.network(inputs)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            near, far = self.network(data)
            loss = tf.reduce_mean(tf.maximum(near - far + 0.5, 0.0))
        weights = self.network.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    @property
    def metrics(self):
        return [self.tracker]


@FRONT_ENDS
def test_a_model_that_takes_its_batches_apart_itself(lsgd, gather, front_end):
    keras.utils.set_random_seed(5)
    tower = keras.Sequential([keras.Input((reference.FEATURES,)), DENSE(4, "tanh"), DENSE(2)])
    inputs = [keras.Input((reference.FEATURES,)) for _ in range(3)]
    anchor, positive, negative = map(tower, inputs)

    def distance(pair):
        return keras.ops.sum(keras.ops.square(pair[0] - pair[1]), axis=-1)

    near, far = (keras.layers.Lambda(distance)([anchor, other]) for other in (positive, negative))
    model = Siamese(keras.Model(inputs, [near, far]))
    before = [w.copy() for w in tower.get_weights()]
    callbacks = compiled_for(lsgd, front_end, model)
    data = [reference.data(lsgd.rank(), 3, seed=seed)[0] for seed in range(3)]
    batches = tf.data.Dataset.from_tensor_slices(tuple(data)).batch(8)
    history = model.fit(batches, epochs=2, verbose=0, callbacks=callbacks)
    assert np.isfinite(history.history["loss"]).all()
    assert any((old != new).any() for old, new in zip(before, tower.get_weights(), strict=True))
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("state", ["keep", "average", "reset"])
def test_optimizers_that_a_train_step_keeps_for_itself(lsgd, gather, state):
    def make():
        return keras.optimizers.SGD(0.01, momentum=0.9)

    model = TwoParts()
    model.compile(make(), make())
    if state != "keep":
        with pytest.raises(ValueError, match="needs the state of SGD, SGD, which the model's train_step builds later"):
            fit(lsgd, model, 2, lsgd.LocalSGDCallback(2, optimizer_state=state))
        model.first_optimizer.build(model.first.trainable_variables)
        model.second_optimizer.build(model.second.trainable_variables)
    fit(lsgd, model, 4, lsgd.LocalSGDCallback(2, optimizer_state=state))
    reference.assert_same_everywhere(gather, model)
    for optimizer in (model.first_optimizer, model.second_optimizer):
        slots = [v.numpy() for v in reference.slots(optimizer)]
        if state == "reset":
            assert not any(slot.any() for slot in slots)
        if state == "average":
            assert len({b"".join(s.tobytes() for s in other) for other in gather(slots)}) == 1


def test_steps_of_several_batches_without_an_optimizer_that_counts_them(lsgd, gather):
    model = TwoParts()
    model.compile(keras.optimizers.SGD(0.01), keras.optimizers.SGD(0.01), steps_per_execution=2)
    callback = lsgd.LocalSGDCallback(2)
    fit(lsgd, model, 5, callback)
    assert [r.last_step for r in callback.timings if r.steps] == [2, 4, 5]
    reference.assert_same_everywhere(gather, model)


def test_a_recompiled_model_has_another_optimizer(lsgd):
    callback = lsgd.LocalSGDCallback(3, optimizer_state="reset")
    model = reference.compiled(keras.optimizers.SGD(0.05, momentum=0.9), batch_normalization=False)
    fit(lsgd, model, 3, callback)
    first = model.optimizer
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    for slot in reference.slots(first):
        slot.assign(np.ones(slot.shape))
    fit(lsgd, model, 3, callback)
    assert all((slot.numpy() == 1).all() for slot in reference.slots(first)), "not the business of this fit"
    assert not any(slot.numpy().any() for slot in reference.slots(model.optimizer))
    assert [total["steps"] for total in callback.totals] == [3] * lsgd.size(), "totals are of the last fit"


def test_schedules_go_on_with_a_model_from_a_file(lsgd, gather, tmp_path):
    model = reference.compiled(keras.optimizers.SGD(0.05), batch_normalization=False)
    fit(lsgd, model, 5, lsgd.LocalSGDCallback(lsgd.SyncSteps([2, 7, 9])))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    callback = lsgd.LocalSGDCallback(lsgd.SyncSteps([2, 7, 9]))
    fit(lsgd, loaded, 5, callback)
    assert [r.last_step for r in callback.timings if r.steps] == [7, 9, 10]
    reference.assert_same_everywhere(gather, loaded)
