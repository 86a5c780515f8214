"""Every option, and every pair of them, against the whole protocol written a second time in numpy.

METHODS lists what there is. A pair either works, on any number of ranks and in each front end, or is refused for a reason.
"""

import itertools
import warnings

import keras
import numpy as np
import pytest

from hvd_localsgd.core import compression
from hvd_localsgd.core.settings import Settings

H, STEPS, RATE = 6, 31, 0.1
SIZE, STATISTICS = 5000, 40  # weights, in two arrays, and statistics
PLAIN = slice(SIZE, SIZE + STATISTICS)

METHODS = {
    "sync_every": ["growing"],
    "outer": ["diloco", "slowmo"],
    "compression": ["bf16", "fp16", "int8"],
    "overlap": [1],
    "fragments": [2, 3, 9],
    "groups": ["halves"],
    "clip_change": [0.15],
    "guard": ["norms"],
    "variance": ["pooled"],
}
# Why: the texts of the refusals say it, and docs/methods.
REFUSED = {
    ("sync_every", "fragments"),
    ("fragments", "guard"),
    ("fragments", "groups"),
    ("fragments", "variance"),
    ("groups", "guard"),
}
SINGLE = [{name: value} for name, values in METHODS.items() for value in values]
PAIRS = [one | other for one, other in itertools.combinations(SINGLE, 2) if set(one).isdisjoint(other)]


def is_refused(options):
    steps_between = max(1, H // options.get("fragments", 1))
    return tuple(options) in REFUSED or steps_between <= options.get("overlap", 0)


def halves(size):
    return [list(range(size // 2)), list(range(size // 2, size))] if size > 1 else [[0]]


def arguments(lsgd, options):
    chosen = {"sync_every": H, **options}
    if chosen["sync_every"] == "growing":
        chosen["sync_every"] = lsgd.SyncSteps([4, 11, 19])
    if "groups" in chosen:
        chosen["groups"] = lsgd.Groups(halves(lsgd.size()), every=2)
    return chosen


def gradients(rank, step, x):
    """Pulls each rank to a place of its own, with noise."""
    random = np.random.default_rng([rank, step])
    pull = x - np.linspace(-1, 1, x.size, dtype=x.dtype) * (rank + 1)
    return (pull + 0.3 * random.normal(size=x.size)).astype(x.dtype)


# The protocol, once more.


class Reference:
    """All ranks in one process, in float64. ``x`` of shape (ranks, elements): weights, then statistics."""

    def __init__(self, start, size, options):
        self.x = np.repeat(start[None].astype("float64"), size, axis=0)
        self.size, self.options, self.flight = size, options, None
        self.old, self.u = self.x[0].copy(), np.zeros(start.size)
        self.syncs = 0
        self.fragments = options.get("fragments", 1)
        self.resets = options.get("optimizer_state") == "reset"
        n = SIZE if self.resets else start.size
        parts = [np.full(n * (p + 1) // self.fragments - n * p // self.fragments, p) for p in range(self.fragments)]
        self.owner = np.concatenate([*parts, np.full(start.size - n, -1)])  # -1: not averaged
        self.last_sync, self.is_open = 0, False

    def is_due(self, step):
        """The fragments whose turn has come at this step; or everything, or nothing."""
        if self.options.get("sync_every") == "growing":
            return [0] if step in (4, 11, 19) else []
        if self.fragments == 1:
            return [0] if step - self.last_sync == H else []
        turns = range((step - 1) * self.fragments // H, step * self.fragments // H)
        return [turn % self.fragments for turn in turns]

    def after_step(self, step):
        self.is_open = True
        if self.flight is not None and (step == self.flight[0] or self.is_due(step)):
            self.land()
        if due := self.is_due(step):
            self.sync(step, np.isin(self.owner, due), at_end=False)

    def finish(self, step):
        self.land()
        if self.is_open:  # not all of the model has been averaged over all ranks since the last step
            self.sync(step, self.owner >= 0, at_end=True)

    def land(self):
        if self.flight is not None:
            _, due, started, new, world = self.flight
            moved = self.x - started
            if self.size > 1 or set(self.options) & {"outer", "compression", "clip_change", "guard", "variance"}:
                moved[:, PLAIN] = (
                    0  # statistics are as they come; one rank alone, with nothing to do, waits for nothing
                )
            self.x = np.where(due, new + moved, self.x)
            if self.resets and world:
                self.x[:, PLAIN] = 0
            self.flight = None

    def sync(self, step, due, at_end):
        self.syncs += 1
        groups = halves(self.size)
        world = "groups" not in self.options or self.syncs % 2 == 0 or at_end
        self.last_sync, self.is_open = step, not (world and due[self.owner >= 0].all())
        new = self.x.copy()
        for ranks in [list(range(self.size))] if world else groups:
            new[ranks] = self.outer_step(self.average(self.x[ranks]), due) if world else self.average(self.x[ranks])
        if world:
            self.old = np.where(due, new[0], self.old)
        self.flight = step + self.options.get("overlap", 0), due, self.x.copy(), new, world
        if at_end or not self.options.get("overlap"):
            self.land()

    def average(self, x):
        weights = np.full(len(x), 1 / len(x))
        if self.options.get("guard") == "norms":
            norms = np.array([np.linalg.norm((own - self.old)[:SIZE]) for own in x])
            weights = np.exp(-norms) / np.exp(-norms).sum()
        mean = weights @ x
        if self.options.get("variance") == "pooled":
            mean[SIZE + 20 :] += weights @ x[:, SIZE : SIZE + 20] ** 2 - mean[SIZE : SIZE + 20] ** 2
        return mean

    def outer_step(self, mean, due):
        """On the weights that are due; statistics are averaged and no more."""
        new, own = mean.copy(), due.copy()
        own[PLAIN] = False
        if limit := self.options.get("clip_change"):
            norm = np.linalg.norm((mean - self.old)[own])
            new[own] = self.old[own] + (mean - self.old)[own] * min(1, limit / norm)
        delta = (self.old - new)[own]
        if self.options.get("outer") == "diloco":
            self.u[own] = 0.9 * self.u[own] + delta
            new[own] = self.old[own] - 0.7 * (delta + 0.9 * self.u[own])
        elif self.options.get("outer") == "slowmo":
            self.u[own] = 0.5 * self.u[own] + delta / RATE
            new[own] = self.old[own] - RATE * self.u[own]
        return new


def expected_of(size, options, start, step_of, epochs=1):
    reference = Reference(start, size, options)
    for step in range(1, epochs * STEPS + 1):
        for rank in range(size):
            reference.x[rank] = step_of(rank, step, reference.x[rank])
        reference.after_step(step)
        if step == epochs * STEPS or (step % STEPS == 0 and "sync_every" not in options):  # which keeps its steps
            reference.finish(step)
    return reference.x


def tolerance(options):
    """Encoding loses a part of every change, and makes up for it a round later."""
    return {None: 2e-5, "bf16": 0.01, "fp16": 0.002, "int8": 0.02}[options.get("compression")]


def local_step(rank, step, x):
    changed = x.copy()
    changed[:SIZE] -= RATE * gradients(rank, step, x)[:SIZE]
    statistics = np.abs(np.random.default_rng([7, rank, step]).normal(size=STATISTICS)).astype(x.dtype)
    changed[PLAIN] = 0.9 * x[PLAIN] + 0.1 * statistics
    return changed


@pytest.fixture(autouse=True)
def small_variables_are_worth_it(monkeypatch):
    monkeypatch.setattr(compression, "SMALL", 1)
    monkeypatch.setenv("HVD_LOCALSGD_CHUNK_MB", "0.01")


def words(options):
    return ", ".join(f"{name}={value}" for name, value in options.items())


# More than two ranks show more of a pair only if there are groups in it.
ON_ANY_RANKS = [{}, *SINGLE, *(pair for pair in PAIRS if "groups" in pair)]
ON_TWO = [pytest.param(pair, marks=pytest.mark.pairs) for pair in PAIRS if "groups" not in pair]


@pytest.mark.parametrize("options", [*ON_ANY_RANKS, *ON_TWO], ids=words)
def test_each_method_and_each_pair_is_numpys(lsgd, gather, options):
    chosen = arguments(lsgd, options)
    if is_refused(options):
        with pytest.raises(ValueError, match=r"fragments|overlap|groups|guard"):
            Settings(**chosen)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an outer step with rounds of different lengths, ranks left out
        run(lsgd, gather, options, chosen)


def run(lsgd, gather, options, chosen):
    start = np.random.default_rng(5).uniform(0.1, 1, SIZE + STATISTICS).astype("float32")
    own = [start[:4800].reshape(60, 80).copy(), start[4800:SIZE].copy()]
    statistics = [Named(start[SIZE : SIZE + 20], "a/moving_mean"), Named(start[SIZE + 20 :], "a/moving_variance")]
    pieces = [*own, *statistics]
    averager = lsgd.ModelAverager(own, statistics=statistics, **chosen)
    averager.tell(rate=RATE)
    with averager:
        for step in range(1, STEPS + 1):
            x = local_step(lsgd.rank(), step, np.concatenate([piece.reshape(-1) for piece in pieces]))
            for piece, stop in zip(pieces, np.cumsum([piece.size for piece in pieces]), strict=True):
                piece[...] = x[stop - piece.size : stop].reshape(piece.shape)
            averager.step()
    result = np.concatenate([np.asarray(piece).reshape(-1) for piece in pieces])
    assert len({each.tobytes() for each in gather(result)}) == 1, "all ranks end with the same bits"
    assert all(piece.dtype == np.float32 for piece in pieces)
    assert (result[SIZE + 20 :] > 0).all(), "a variance is positive"
    expected = expected_of(lsgd.size(), options, start, local_step)
    bound = tolerance(options)
    np.testing.assert_allclose(result, expected[lsgd.rank()], rtol=bound, atol=bound * np.abs(expected).max())


class Named(np.ndarray):
    """An array with a name, which tells means and variances."""

    def __new__(cls, values, path):
        self = np.array(values).view(cls)
        self.path = path
        return self


# The same in fit.


def linear_step(data, momentum=None):
    def step_of(rank, step, x):
        inputs, targets = data(rank)
        batch = slice(8 * ((step - 1) % STEPS), 8 * ((step - 1) % STEPS + 1))
        a, y = inputs[batch], targets[batch]
        error = a @ x[:4, None] + x[4] - y
        change = -RATE * 2 * np.append((a * error).mean(0), error.mean())
        if momentum is None:
            return x + change
        velocity = momentum * x[5:] + change
        return np.concatenate([x[:5] + velocity, velocity])

    return step_of


def data(rank):
    random = np.random.default_rng([11, rank])
    inputs = random.normal(size=(8 * STEPS, 4)).astype("float32")
    return inputs, (inputs.sum(1, keepdims=True) + 0.3 * rank).astype("float32")


IN_FIT = [one for one in [{}, *SINGLE] if "guard" not in one and "variance" not in one]


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
@pytest.mark.parametrize("options", [*IN_FIT, {"overlap": 1, "outer": "diloco", "fragments": 2}], ids=words)
def test_each_method_in_fit(lsgd, gather, monkeypatch, options, front_end):
    check_fit(lsgd, gather, monkeypatch, options, front_end, momentum=None)


@pytest.mark.pairs
@pytest.mark.parametrize("front_end_and_state", ["callback, reset", "optimizer, average"])
@pytest.mark.parametrize("options", IN_FIT, ids=words)
def test_each_method_with_optimizer_state(lsgd, gather, monkeypatch, options, front_end_and_state):
    front_end, state = front_end_and_state.split(", ")
    check_fit(lsgd, gather, monkeypatch, {**options, "optimizer_state": state}, front_end, momentum=0.5)


def check_fit(lsgd, gather, monkeypatch, options, front_end, momentum):
    size = 5 if momentum is None else 10
    monkeypatch.setattr("tests.collective.test_methods.SIZE", 5)
    monkeypatch.setattr("tests.collective.test_methods.PLAIN", slice(5, size))
    chosen = arguments(lsgd, options)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.set_weights([np.full((4, 1), 0.2, "float32"), np.zeros(1, "float32")])
    inner = keras.optimizers.SGD(RATE, momentum=momentum or 0.0)
    callbacks = [lsgd.LocalSGDCallback(**chosen)] if front_end == "callback" else []
    model.compile(inner if callbacks else lsgd.LocalSGDOptimizer(inner, **chosen), "mse")
    epochs = 2 if callbacks else 1  # the optimizer knows none
    model.fit(*data(lsgd.rank()), batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    state = [variable.numpy() for variable in inner.variables if len(variable.shape)]
    assert len(state) == (0 if momentum is None else 2)
    result = np.concatenate([array.reshape(-1) for array in [*model.get_weights(), *state]])
    assert len({each.tobytes() for each in gather(result)}) == 1
    start = np.where(np.arange(size) < 4, 0.2, 0.0)
    expected = expected_of(lsgd.size(), options, start, linear_step(data, momentum), epochs)
    np.testing.assert_allclose(result, expected[lsgd.rank()], rtol=tolerance(options), atol=tolerance(options))


@pytest.mark.alone
@pytest.mark.parametrize("options", [{"groups": "node"}, {"compression": "bf16"}], ids=words)
def test_a_reducer_of_ones_own_is_refused_beside_ours(lsgd, options):
    averager = lsgd.ModelAverager([np.zeros(3)], 1, reducer=lambda communicator: None, **options)
    with pytest.raises(ValueError, match="are reducers themselves: leave reducer as it is"):
        averager.begin()


def test_two_models_whose_averages_are_on_their_way_at_once(lsgd):
    both = [np.full(20_000, start, "float32") for start in (1, 2)]
    averagers = [lsgd.ModelAverager([x], 4, overlap=2, compression="bf16") for x in both]
    for averager in averagers:
        averager.begin()
    for _ in range(20):
        for x, averager in zip(both, averagers, strict=True):
            x *= 1 + 0.01 * lsgd.rank()
            averager.step()
    for averager in averagers:
        averager.finish()
    assert both[0].min() > 1 or lsgd.size() == 1
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=0.01)


@pytest.mark.alone
@pytest.mark.parametrize("options", SINGLE, ids=words)
def test_each_method_is_saved(lsgd, options):
    chosen = arguments(lsgd, options)
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(RATE), **chosen)
    config = keras.saving.serialize_keras_object(optimizer)
    other = keras.saving.deserialize_keras_object(config)
    assert other.settings.description() == optimizer.settings.description()
    assert lsgd.LocalSGDCallback(**chosen).settings.description() == optimizer.settings.description()
