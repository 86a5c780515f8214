"""What is averaged is a choice; and what an average does to statistics and constraints is put right."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from . import reference
from .helpers import fit

pytestmark = pytest.mark.pairs


def values(model, *ends):
    return [v.numpy() for v in model.variables if v.path.endswith(ends)]


CHOICES = {
    "by the end of a path": ({"exclude": "moving_variance"}, ("moving_variance",)),
    "by patterns": ({"exclude": ["moving_*", "dense*/bias"]}, ("moving_variance", "moving_mean", "bias")),
    "only some": ({"include": ["kernel", "bias"]}, ("moving_variance", "moving_mean", "gamma", "beta")),
    "some of some": (
        {"include": ["kernel", "bias"], "exclude": ["bias"]},
        ("_variance", "_mean", "gamma", "beta", "bias"),
    ),
    "by a function": ({"exclude": lambda v: len(v.shape) == 2}, ("kernel",)),
}


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_chosen_is_averaged_and_nothing_else(lsgd, gather, several_ranks, choice, front_end):
    options, left_alone = CHOICES[choice]
    x, y = reference.data(lsgd.rank(), 4)
    if front_end == "callback":
        model, callbacks = reference.compiled(keras.optimizers.SGD(0.05)), [lsgd.LocalSGDCallback(4, **options)]
    else:
        model, callbacks = reference.make_model(), []
        optimizer = lsgd.LocalSGDOptimizer(
            keras.optimizers.SGD(0.05), 4, statistics=model.non_trainable_variables, **options
        )
        model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    for variable in model.variables:
        same = len({value.tobytes() for value in gather(variable.numpy())}) == 1
        assert same != variable.path.endswith(left_alone), variable.path


def test_a_choice_that_means_nothing_is_an_error(lsgd):
    model = reference.compiled("sgd")
    with pytest.raises(ValueError, match=r"exclude=\['kernels'\] means none of the variables .*: .*kernel"):
        fit(lsgd, model, 2, lsgd.LocalSGDCallback(2, exclude="kernels"))
    with pytest.raises(ValueError, match="Expected a pattern of names.* Received: 3"):
        lsgd.LocalSGDCallback(2, include=3)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_a_pooled_variance_is_that_of_all_ranks_data(lsgd, gather, offset, weighting, layout):
    """Means far from zero and far apart: in float32, squares of 300 would leave no digit of a variance of 0.01."""
    rank, size = lsgd.rank(), lsgd.size()
    random = np.random.default_rng(rank)
    samples = (offset + 0.05 * rank + 0.1 * random.normal(size=(500, 4))).astype("float64")
    mean, variance = tf.Variable(np.full(4, offset, "float32")), tf.Variable(tf.zeros(4))
    named = [keras.Variable(v, name=name) for v, name in ((mean, "moving_mean"), (variance, "moving_variance"))]
    averager = lsgd.ModelAverager(named, 1, variance="pooled", weighting=weighting, broadcast=False)
    averager.begin()
    named[0].assign(samples.mean(0))
    named[1].assign(samples.var(0))
    averager.step(samples=500)
    averager.finish()
    everyone = np.concatenate(gather(samples)) if size > 1 else samples
    np.testing.assert_allclose(named[0].numpy(), everyone.mean(0), rtol=1e-6)
    np.testing.assert_allclose(named[1].numpy(), everyone.var(0), rtol=2e-3)
    assert len({v.numpy().tobytes() for v in named}) == 2


def test_a_training_with_pooled_variances(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.0))
    x, y = reference.data(lsgd.rank(), 8)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[lsgd.LocalSGDCallback(8, variance="pooled")])
    alone = reference.compiled(keras.optimizers.SGD(0.0))
    alone.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    means, variances = (
        np.array(gather(values(alone, end)[0]), "float64") for end in ("moving_mean", "moving_variance")
    )
    np.testing.assert_allclose(values(model, "moving_mean")[0], means.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values(model, "moving_variance")[0], variances.mean(0) + means.var(0), rtol=1e-4)
    reference.assert_same_everywhere(gather, model)


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_constraints_hold_after_a_sync(lsgd, gather, front_end, layout):
    def unit():
        return keras.constraints.UnitNorm(axis=0)

    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(5, kernel_constraint=unit()), keras.layers.Dense(1, kernel_constraint=unit())]
    model = keras.Sequential([keras.Input((reference.FEATURES,)), *layers])
    inner = keras.optimizers.SGD(0.3)
    callbacks = [lsgd.LocalSGDCallback(4)] if front_end == "callback" else []
    model.compile(inner if callbacks else lsgd.LocalSGDOptimizer(inner, 4), "mse")
    x, y = reference.data(lsgd.rank(), 8)
    model.fit(x, y * (1 - 2 * (lsgd.rank() % 2)), batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    for layer in model.layers:
        np.testing.assert_allclose(np.linalg.norm(layer.kernel.numpy(), axis=0), 1.0, rtol=1e-5)
    reference.assert_same_everywhere(gather, model)


def test_statistics_estimated_anew_are_those_of_all_ranks_data(lsgd, gather):
    model = reference.compiled(keras.optimizers.SGD(0.05))
    x, y = reference.data(lsgd.rank(), 6)
    fit(lsgd, model, 6, lsgd.LocalSGDCallback(3))
    weights = [v.numpy() for v in model.trainable_variables]
    momenta = [layer.momentum for layer in model.layers if hasattr(layer, "momentum")]
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    assert lsgd.refresh_statistics(model, batches, batches=5) == 5 * lsgd.size()
    assert [layer.momentum for layer in model.layers if hasattr(layer, "momentum")] == momenta
    for variable, before in zip(model.trainable_variables, weights, strict=True):
        np.testing.assert_array_equal(variable.numpy(), before)
    kernel, bias = model.layers[0].get_weights()
    hidden = np.tanh(
        np.concatenate(gather(x[:40])).astype("float64") @ kernel + bias
    )  # batches of equal size: all alike
    np.testing.assert_allclose(values(model, "moving_mean")[0], hidden.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values(model, "moving_variance")[0], hidden.var(0), rtol=1e-4, atol=1e-5)
    reference.assert_same_everywhere(gather, model)
    with pytest.raises(ValueError, match="No rank has a batch"):
        lsgd.refresh_statistics(model, [])
