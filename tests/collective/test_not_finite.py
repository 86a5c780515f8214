"""NaN and infinity that a look at the smallest variable does not see: no rank's may enter an average unnoticed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

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
