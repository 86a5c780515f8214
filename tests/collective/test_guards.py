"""Guards in real averages: a poisoned rank, nobody left, a change that is too long."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory

from . import reference
from .helpers import fit

pytestmark = pytest.mark.pairs
OUTLIERS = {"threshold": 50.0, "decay": 0.1, "warm_up": 4}


def memories():
    start = [np.full((30, 4), 2.0, "float32"), np.full(5, -1.0, "float32")]
    return {
        "arrays": lambda: [a.copy() for a in start],
        "in place": lambda: [tf.Variable(a) for a in start],
        "tensors": lambda: TensorFlowMemory([tf.Variable(a) for a in start], tensors=True),
    }


def add(variable, change):
    if isinstance(variable, np.ndarray):
        variable += change
    else:
        variable.assign_add(change)


@pytest.mark.parametrize("memory", memories())
@pytest.mark.parametrize("who", ["last", "all"])
def test_a_poisoned_rank_does_not_move_the_average(lsgd, gather, several_ranks, memory, who):
    own = memories()[memory]()
    variables = own if isinstance(own, list) else own.variables
    random = np.random.default_rng(lsgd.rank())
    averager = lsgd.ModelAverager(own, 1, guard=lsgd.Outliers(**OUTLIERS))
    averager.begin()
    for sync in range(8):
        before = [np.array(v) for v in variables]
        poisoned = sync == 6 and (who == "all" or lsgd.rank() == lsgd.size() - 1)
        changes = [(0.1 * random.normal(size=v.shape)).astype("float32") for v in variables]
        for variable, change in zip(variables, changes, strict=True):
            add(variable, change * (1000 if poisoned else 1))
        if sync == 6 and lsgd.rank() == 0:
            with pytest.warns(
                UserWarning, match=rf"left out of the average at local step 7: .*rank {lsgd.size() - 1} on"
            ):
                averager.step()
        else:
            averager.step()
        everyone = gather(changes)
        counted = everyone[: len(everyone) - 1] if sync == 6 else everyone
        for i, variable in enumerate(variables):
            mean = np.mean([each[i] for each in counted], axis=0) if sync != 6 or who == "last" else 0.0
            np.testing.assert_allclose(np.array(variable), before[i] + mean, rtol=1e-5, atol=1e-5)
    averager.finish()
    assert len({b"".join(np.array(v).tobytes() for v in each) for each in gather(variables)}) == 1


@pytest.mark.parametrize("outer", ["mean", "diloco"])
def test_if_nobody_counts_the_anchor_stays_and_the_outer_step_rests(lsgd, several_ranks, outer):
    own = np.zeros(50, "float32")
    averager = lsgd.ModelAverager([own], 1, guard=lsgd.Outliers(**OUTLIERS), outer=outer)
    averager.begin()
    for _ in range(5):
        own += 0.01
        averager.step()
    before = own.copy()
    own += 1000 * (1 + lsgd.rank())
    averager.step()
    np.testing.assert_array_equal(own, before)
    averager.finish()


@pytest.mark.parametrize("outer", ["mean", "Nesterov"])
def test_a_change_that_is_too_long_is_shortened(lsgd, gather, outer):
    own, statistic = np.zeros(100, "float32"), np.zeros(2, "float32")
    rule = lsgd.Nesterov(0.5, 0.0) if outer == "Nesterov" else "mean"
    averager = lsgd.ModelAverager([own], 1, statistics=[statistic], clip_change=0.5, outer=rule)
    averager.begin()
    own += 0.01 * (1 + lsgd.rank())
    mean = 0.01 * np.mean(np.arange(lsgd.size()) + 1)
    averager.step()
    share = 0.5 if outer == "Nesterov" else 1.0
    np.testing.assert_allclose(own, share * mean, rtol=1e-5)  # norm 10 x 0.01: short enough
    here = own.copy()
    own += 1.0
    statistic += 7.0
    averager.step()
    np.testing.assert_allclose(own - here, share * 0.5 / 10, rtol=1e-4)
    np.testing.assert_allclose(statistic, 7.0)
    averager.finish()


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_a_training_whose_ranks_weigh_by_their_norms(lsgd, gather, front_end):
    """One round: weights are softmax(-norm of the change), of weights without statistics."""
    make = lambda: keras.optimizers.SGD(0.05)  # noqa: E731
    if front_end == "callback":
        model = reference.compiled(make())
        fit(lsgd, model, 3, lsgd.LocalSGDCallback(3, guard="norms"))
    else:
        model = reference.make_model()
        model.compile(lsgd.LocalSGDOptimizer(make(), 3, guard="norms", statistics=model.non_trainable_variables), "mse")
        model.fit(*reference.data(lsgd.rank(), 3), batch_size=8, shuffle=False, verbose=0)
    alone = reference.compiled(make())
    start = [v.numpy() for v in alone.trainable_variables]
    alone.fit(*reference.data(lsgd.rank(), 3), batch_size=8, shuffle=False, verbose=0)
    changes = [v.numpy() - s for v, s in zip(alone.trainable_variables, start, strict=True)]
    norms = np.array(gather(float(np.sqrt(sum((c.astype("float64") ** 2).sum() for c in changes)))))
    weights = np.exp(-norms) / np.exp(-norms).sum() if lsgd.size() > 1 else [1.0]
    for variable, own in zip(model.trainable_variables, alone.trainable_variables, strict=True):
        expected = np.average(np.array(gather(own.numpy()), "float64"), axis=0, weights=weights)
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-5)
    reference.assert_same_everywhere(gather, model)
