"""The outer step: each rule against the same rule in numpy, over many rounds, whatever the weights lie in."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory

from . import reference
from .helpers import fit

pytestmark = pytest.mark.pairs

ROUNDS = 20
SHAPES = [(3,), (40, 20), (7, 5)]


def rates(step):
    return 0.1 if step < 8 else 0.02


class Nesterov:
    """As DiLoCo: u <- m u + d, x <- x - rate (d + m u)."""

    def __init__(self, rate=0.7, momentum=0.9):
        self.rate, self.momentum, self.u = rate, momentum, 0.0

    def __call__(self, old, mean, gamma):
        delta = old - mean
        self.u = self.momentum * self.u + delta
        return old - self.rate * (delta + self.momentum * self.u)


class SlowMo:
    """u <- beta u + (x - mean) / gamma, x <- x - alpha gamma u."""

    def __init__(self, alpha=1.0, beta=0.5):
        self.alpha, self.beta, self.u = alpha, beta, 0.0

    def __call__(self, old, mean, gamma):
        self.u = self.beta * self.u + (old - mean) / gamma
        return old - self.alpha * gamma * self.u


class Adam:
    def __init__(self, rate):
        self.rate, self.m, self.v, self.t = rate, 0.0, 0.0, 0

    def __call__(self, old, mean, gamma):
        delta = old - mean
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * delta
        self.v = 0.999 * self.v + 0.001 * delta**2
        rate = self.rate * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        return old - rate * self.m / (np.sqrt(self.v) + 1e-7)


RULES = {
    "diloco": (lambda lsgd: "diloco", Nesterov),
    "Nesterov": (lambda lsgd: lsgd.Nesterov(0.5, 0.8), lambda: Nesterov(0.5, 0.8)),
    "slowmo": (lambda lsgd: "slowmo", SlowMo),
    "Lookahead": (lambda lsgd: lsgd.SlowMo(0.5, 0.0), lambda: SlowMo(0.5, 0.0)),
    "Keras SGD": (
        lambda lsgd: keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True),
        Nesterov,  # the same rule in other words, with a constant rate
    ),
    "Keras Adam": (lambda lsgd: keras.optimizers.Adam(0.01), lambda: Adam(0.01)),
}
MEMORIES = {
    "arrays": lambda own: [np.array(a) for a in own],
    "in place": lambda own: [tf.Variable(a) for a in own],
    "tensors": lambda own: TensorFlowMemory([tf.Variable(a) for a in own], tensors=True),
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_numpys(lsgd, gather, monkeypatch, name, memory):
    monkeypatch.setenv("HVD_LOCALSGD_CHUNK_MB", "0.001")
    outer, make = RULES[name]
    start = [np.random.default_rng(7).normal(size=shape).astype("float32") for shape in SHAPES]
    own = MEMORIES[memory](start)
    variables = own if isinstance(own, list) else own.variables
    averager = lsgd.ModelAverager(own, 1, outer=outer(lsgd), broadcast=False)
    averager.tell(rate=rates(0))
    averager.begin()
    rules, expected = [make() for _ in SHAPES], [a.astype("float64") for a in start]
    random = np.random.default_rng([1, lsgd.rank()])
    for step in range(ROUNDS):
        averager.tell(rate=rates(step))
        for variable in variables:
            change = (0.1 * random.normal(size=variable.shape)).astype("float32")
            if isinstance(variable, np.ndarray):
                variable += change
            else:
                variable.assign_add(change)
        everyone = gather([np.array(v) for v in variables])
        averager.step()
        for i, variable in enumerate(variables):
            mean = np.mean([np.asarray(each[i], "float64") for each in everyone], axis=0)
            expected[i] = rules[i](expected[i], mean, rates(step))
            # What the ranks start the next round from is float32: so does the reference.
            np.testing.assert_allclose(np.array(variable), expected[i], rtol=1e-6, atol=1e-6)
            expected[i] = np.array(variable).astype("float64")
    averager.finish()
    assert len({b"".join(np.array(v).tobytes() for v in each) for each in gather(variables)}) == 1
    assert all(r.outer > 0 for r in averager.timings if r.interval)


def local_sgd_with(rule, make_optimizer, interval, batches, size):
    """Every rank's rounds played in one process, with the outer step on trainable weights and plain means of statistics."""
    models = [reference.compiled(make_optimizer(), True) for _ in range(size)]
    parts = [reference.data(k, batches) for k in range(size)]
    rules = [rule() for _ in models[0].trainable_variables]
    old = [v.numpy().astype("float64") for v in models[0].trainable_variables]
    for start in range(0, batches, interval):
        for model, (x, y) in zip(models, parts, strict=True):
            for batch in range(start, min(batches, start + interval)):
                model.train_on_batch(x[8 * batch : 8 * batch + 8], y[8 * batch : 8 * batch + 8])
        gamma = float(keras.ops.convert_to_numpy(models[0].optimizer.learning_rate))
        reference.averaged(models)
        for i, new in enumerate(models[0].trainable_variables):
            old[i] = rules[i](old[i], new.numpy().astype("float64"), gamma)
        for model in models:
            for variable, value in zip(model.trainable_variables, old, strict=True):
                variable.assign(value.astype("float32"))
    return models[0]


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
@pytest.mark.parametrize(("outer", "rule"), [("diloco", Nesterov), ("slowmo", SlowMo)])
def test_a_training_follows_the_protocol(lsgd, gather, front_end, outer, rule):
    """BatchNorm's statistics are averaged plainly, and the moments of Adam kept."""

    def make():
        return keras.optimizers.Adam(0.01)

    if front_end == "callback":
        model = reference.compiled(make())
        fit(lsgd, model, 12, lsgd.LocalSGDCallback(3, outer=outer))
    else:
        model = reference.make_model()
        model.compile(lsgd.LocalSGDOptimizer(make(), 3, outer=outer, statistics=model.non_trainable_variables), "mse")
        x, y = reference.data(lsgd.rank(), 12)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    reference.assert_same_everywhere(gather, model)
    expected = local_sgd_with(rule, make, 3, 12, lsgd.size())
    for variable, other in zip(model.variables, expected.variables, strict=True):
        if "seed" not in variable.path:
            np.testing.assert_allclose(variable.numpy(), other.numpy(), rtol=2e-4, atol=2e-5, err_msg=variable.path)


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_slowmo_zeroes_the_momentum_of_sgd_and_no_other_state(lsgd, front_end):
    for inner, zeroed in ((keras.optimizers.SGD(0.01, momentum=0.9), True), (keras.optimizers.Adam(0.01), False)):
        callbacks = [lsgd.LocalSGDCallback(2, outer="slowmo")] if front_end == "callback" else []
        model = reference.compiled(inner if callbacks else lsgd.LocalSGDOptimizer(inner, 2, outer="slowmo"), False)
        x, y = reference.data(lsgd.rank(), 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
        assert any(slot.numpy().any() for slot in reference.slots(inner)) != zeroed
        said = any("sets the momentum of SGD to zero" in str(each.message) for each in caught)
        assert said == (zeroed and lsgd.rank() == 0)


def test_no_variance_becomes_negative(lsgd):
    """What overshoots a mean of variances can be below zero: statistics are not for the outer step."""
    model = reference.compiled(keras.optimizers.SGD(0.01))
    x, y = reference.data(lsgd.rank(), 30)
    variance = next(v for v in model.variables if "moving_variance" in v.path)
    variance.assign(np.full(variance.shape, 50.0, "float32"))  # falls fast, and momentum would carry it on
    model.fit(
        x,
        y,
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[lsgd.LocalSGDCallback(3, outer=lsgd.Nesterov(1.0, 0.9))],
    )
    assert (variance.numpy() > 0).all()


def test_statistics_beside_arrays(lsgd, gather):
    own, statistic = np.full(3, float(lsgd.rank()), "float32"), np.full(3, float(lsgd.rank()), "float32")
    averager = lsgd.ModelAverager([own], 1, statistics=[statistic], outer=lsgd.Nesterov(2.0, 0.0))
    averager.begin()
    own[:], statistic[:] = lsgd.rank() + 1, lsgd.rank() + 1
    averager.step()
    averager.finish()
    mean = np.mean(np.arange(lsgd.size()) + 1)
    assert own[0] == pytest.approx(2 * mean)
    assert statistic[0] == pytest.approx(mean)


def test_another_outer_step_on_one_rank_is_refused(lsgd, several_ranks):
    own = lsgd.Nesterov(0.7 if lsgd.rank() else 0.8)
    with pytest.raises(ValueError, match=r"Settings differ: .* has outer=Nesterov .*'learning_rate': 0.7"):
        lsgd.ModelAverager([np.zeros(2)], 1, outer=own).begin()


@pytest.mark.alone
@pytest.mark.parametrize("outer", ["diloco", "slowmo", "keras"])
def test_it_is_saved_with_a_model(lsgd, tmp_path, outer):
    outer = keras.optimizers.Adam(0.3) if outer == "keras" else outer
    model = reference.compiled(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.1), 4, outer=outer))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer.settings
    assert loaded.description() == model.optimizer.settings.description()
    assert loaded.description()["outer"].startswith(type(model.optimizer.settings.outer).__name__)


@pytest.mark.alone
def test_what_cannot_work_is_refused_or_warned_of(lsgd):
    with pytest.raises(ValueError, match="there is no moment for an outer step"):
        lsgd.LocalSGDCallback(4, mode="async", outer="diloco")
    with pytest.raises(ValueError, match=r"outer must be one of .* Received: 'fast'"):
        lsgd.LocalSGDCallback(4, outer="fast")
    with pytest.raises(ValueError, match="beta must be at least 0 and below 1. Received: 1.0"):
        lsgd.SlowMo(1.0, 1.0)
    with pytest.warns(UserWarning, match="Prefer a constant sync_every"):
        lsgd.LocalSGDCallback(lsgd.Growing(), outer="diloco")
    with pytest.raises(RuntimeError, match="call begin"):
        lsgd.ModelAverager([np.zeros(2)], outer="diloco").step()
    with pytest.raises(ValueError, match=r"needs the rate: call tell\(rate=...\) first"):
        lsgd.ModelAverager([np.zeros(2)], outer="slowmo").begin()
