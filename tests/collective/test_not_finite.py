"""NaN and infinity that a look at the smallest variable does not see: no rank's may enter an average unnoticed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd import devices
from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
from hvd_localsgd.core.reducers import Library

from . import reference

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("several_ranks")]


def large_variables():
    return [tf.Variable(tf.ones(shape), name=f"large{i}") for i, shape in enumerate([(2,), (300, 50), (700, 3)])]


WAYS = {
    "arrays": lambda: [np.ones(shape, "float32") for shape in [(2,), (300, 50), (700, 3)]],
    "halves": lambda: [np.ones(shape, "float16") for shape in [(2,), (300, 50), (700, 3)]],
    "variables": large_variables,
    "tensors": lambda: TensorFlowMemory(large_variables(), tensors=True),
    "on a device": lambda: TensorFlowMemory(large_variables(), on_device=True),
}


class TakesTensors(Library):
    """A reducer that is given whole tensors, as Horovod's is, and adds them by way of the host."""

    def __init__(self, communicator):
        super().__init__(communicator, None)

    def sum(self, chunk, values):
        assert isinstance(values, tf.Tensor)
        return tf.constant(self.communicator.allreduce(np.array(values)))


@pytest.mark.parametrize("way", WAYS)
@given(
    place=st.tuples(st.integers(1, 2), st.integers(0, 2099)),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    chunk=st.sampled_from(["0.0005", "0.01", "1"]),
    whose=st.integers(0, 3),
)
def test_it_is_an_error_on_every_rank_that_names_rank_and_variable(lsgd, way, place, value, chunk, whose):
    (number, element), whose = place, whose % lsgd.size()
    own = WAYS[way]()
    variables = own if isinstance(own, list) else own.variables
    if lsgd.rank() == whose:
        flat = np.array(variables[number]).reshape(-1)
        flat[element] = value
        odd = flat.reshape(variables[number].shape)
        if isinstance(variables[number], np.ndarray):
            variables[number][:] = odd
        else:
            variables[number].assign(odd)
    name = f"array {number}" if way in ("arrays", "halves") else rf"large{number}\S*"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVD_LOCALSGD_CHUNK_MB", chunk)
        reducer = TakesTensors if way == "on a device" else None
        averager = lsgd.ModelAverager(own, 1, broadcast=False, reducer=reducer)
        with pytest.raises(
            lsgd.RankFailed, match=rf"^NaN or infinity in {name} of rank {whose} on \S+ at local step 1;"
        ):
            averager.step()


def test_a_rank_that_takes_no_steps_may_not_spoil_the_average_either(lsgd):
    own = np.ones(5000, "float32")
    averager = lsgd.ModelAverager([np.ones(2, "float32"), own], 1, broadcast=False)
    averager.begin()
    if lsgd.rank() == 0:
        own[3000] = np.nan
    go_on = averager.finish if lsgd.rank() == 0 else averager.step
    with pytest.raises(lsgd.RankFailed, match="^NaN or infinity in array 1 of rank 0 on"):
        go_on()


def test_large_numbers_are_not_infinite(lsgd):
    own = np.full(5000, 1e30, "float32")  # whose products are
    own[:10] = lsgd.rank()
    with lsgd.ModelAverager([own], 1, broadcast=False) as averager:
        averager.step()
    np.testing.assert_allclose(own[:10], np.mean(np.arange(lsgd.size())), rtol=1e-6)
    np.testing.assert_allclose(own[10:], 1e30, rtol=1e-6)


def test_an_average_that_overflows_is_an_error(lsgd):
    own = np.full(5000, 1.0, "float32")
    own[4000] = 3e38
    with pytest.raises(lsgd.RankFailed, match="the average overflowed at local step 1"):
        lsgd.ModelAverager([own], 1, broadcast=False, weighting="samples", reducer=Doubles).step()


class Doubles(Library):
    """So that numbers overflow that an average does not let overflow."""

    def __init__(self, communicator):
        super().__init__(communicator, 1 << 20)

    def sum(self, chunk, values):
        with np.errstate(over="ignore"):
            values *= 2 * self.communicator.size
        return values


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_in_momentum_that_is_averaged(lsgd, front_end):
    inner = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer = inner
    if front_end == "optimizer":
        optimizer = lsgd.LocalSGDOptimizer(inner, 2, optimizer_state="average")
    model = reference.compiled(optimizer, batch_normalization=False)

    class Spoil(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1 and lsgd.rank() == lsgd.size() - 1:
                momentum = max((v for v in inner.variables if "momentum" in v.path), key=lambda v: np.prod(v.shape))
                value = momentum.numpy()
                value.flat[value.size // 2] = np.nan
                momentum.assign(value)

    callbacks = [Spoil()]
    if front_end == "callback":
        callbacks.append(lsgd.LocalSGDCallback(2, optimizer_state="average"))
    x, y = reference.data(lsgd.rank(), 4)
    with pytest.raises(Exception, match=rf"NaN or infinity in \S+ of rank {lsgd.size() - 1} on"):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)


OTHERS = [{}, {"outer": "slowmo"}, {"fragments": 2}, {"overlap": 1}, {"compression": "bf16"}, {"mode": "async"}]


@pytest.mark.parametrize("others", OTHERS, ids=str)
@pytest.mark.parametrize("way", ["arrays", "tensors"])
def test_a_rank_is_left_out_and_goes_on_from_the_others_average(lsgd, way, others):
    if others.get("mode") == "async" and devices.get().name != "mpi":
        pytest.skip("one-sided memory is MPI's")
    own, bad = WAYS[way](), lsgd.size() - 1
    variables = own if way == "arrays" else own.variables
    training = lsgd.ModelAverager(own, 4, on_nonfinite="skip_rank", **others)
    training.tell(rate=1.0)
    training.begin()
    for step in range(1, 9):
        change = np.full((300, 50), float(lsgd.rank() + 1), "float32")
        if step == 2 and lsgd.rank() == bad:
            change[200, 7] = np.nan
        add(variables[1], change)
        if step == (2 if "fragments" in others else 4) and lsgd.rank() == bad:
            name = "array 1" if way == "arrays" else "large1"
            with pytest.warns(UserWarning, match=rf"NaN or infinity in {name}\S* of rank {bad} on \S+ at local step"):
                training.step()
        else:
            training.step()
    training.finish()
    assert np.isfinite(np.array(variables[1])).all()
    if not others:
        first = 1 + 4 * np.mean(np.arange(1, lsgd.size()))  # without the last rank
        expected = first + 4 * np.mean(np.arange(1, lsgd.size() + 1))
        np.testing.assert_allclose(np.array(variables[1]), expected, rtol=1e-6)
    np.testing.assert_array_equal(np.array(variables[0]), 1.0)


def add(variable, change):
    if isinstance(variable, np.ndarray):
        variable += change
    else:
        variable.assign_add(change)


def test_if_no_rank_is_finite_all_raise(lsgd):
    own = np.full(8, np.nan, "float32")
    with pytest.raises(lsgd.RankFailed, match="NaN or infinity in the weights of rank 0 on .*, rank 1 on"):
        lsgd.ModelAverager([own], 1, broadcast=False, on_nonfinite="rollback").step()


@pytest.mark.parametrize("front_end", ["callback", "optimizer"])
def test_a_rank_starts_again_with_a_new_optimizer(lsgd, front_end):
    inner = keras.optimizers.SGD(0.01, momentum=0.9)
    settings = {"sync_every": 2, "on_nonfinite": "rollback"}
    model = reference.compiled(
        lsgd.LocalSGDOptimizer(inner, **settings) if front_end == "optimizer" else inner, batch_normalization=False
    )
    seen = []

    class Spoil(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1 and lsgd.rank() == 1:
                inner.variables[2].assign(tf.fill(inner.variables[2].shape, np.nan))

        def on_train_batch_end(self, batch, logs=None):
            seen.append(all(np.isfinite(v.numpy()).all() for v in [*model.variables, *inner.variables]))

    callbacks = [lsgd.LocalSGDCallback(**settings)] if front_end == "callback" else []
    x, y = reference.data(lsgd.rank(), 4)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[*callbacks, Spoil()])
    assert seen == [True] * 4  # the sync is in the second step


class WrongOnRank1(Library):
    """A sum that is one bit off, as of a faulty memory."""

    def __init__(self, communicator):
        super().__init__(communicator, 1 << 20)
        self.sums = 0

    def sum(self, chunk, values):
        values = super().sum(chunk, values)
        self.sums += 1
        if self.communicator.rank == 1 and self.sums == 4:
            values[7] = np.nextafter(values[7], np.float32(9))
        return values


def test_an_audit_names_ranks_and_variables(lsgd):
    own = [np.ones(5, "float32"), np.ones(20, "float32")]
    training = lsgd.ModelAverager(own, 1, reducer=WrongOnRank1, audit_every=2)
    for _ in range(3):
        training.step()
    with pytest.raises(lsgd.RankFailed, match=r"local step 4 not all .* rank 0 is, on rank 1 on \S+: array 1\. Memory"):
        training.step()
