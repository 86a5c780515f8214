"""Communicators, the average and the header, without Keras' fit."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvd_localsgd import devices
from hvd_localsgd.backends.tensorflow import kernel, memory, together
from hvd_localsgd.communicators import base, serial
from hvd_localsgd.core import agreement, header, layout, reducers

DTYPES = ["float32", "float64", "float16", "bfloat16"]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@pytest.fixture
def communicator(lsgd):
    return devices.get()


def test_on_one_host_local_ranks_are_the_ranks(lsgd, gather):
    assert gather((lsgd.local_rank(), lsgd.local_size())) == [(rank, lsgd.size()) for rank in range(lsgd.size())]
    # tests/conftest.py has said how many threads there are, in the environment: init does not touch them.
    assert tf.config.threading.get_intra_op_parallelism_threads() == 0
    assert tf.config.threading.get_inter_op_parallelism_threads() == 0


def test_allreduce_sums_and_broadcast_copies(communicator):
    for dtype in (np.float32, np.float64):
        buffer = np.arange(1001, dtype=dtype) * (communicator.rank + 1)
        communicator.allreduce(buffer)
        size = communicator.size
        np.testing.assert_allclose(buffer, np.arange(1001) * (size * (size + 1) / 2), rtol=1e-6)
    for dtype in (np.int64, np.float16, np.uint8, np.bool_):
        array = np.full(7, communicator.rank + 1).astype(dtype)
        communicator.broadcast(array)
        np.testing.assert_array_equal(array, np.full(7, 1).astype(dtype))


@pytest.mark.parametrize("elements", [1, 5, 1000])
def test_the_ring_sums_and_gives_all_ranks_the_same_bits(communicator, gather, elements):
    if communicator.name != "mpi":
        pytest.skip("the ring is MPI's")
    own = np.random.default_rng(communicator.rank).normal(size=elements).astype(np.float32)
    everyone = gather(own.astype("float64"))
    (chunk,) = layout.plan([layout.Block(elements, own.dtype, True)], None)
    reducers.Ring(communicator, None).sum(chunk, own)
    np.testing.assert_allclose(own, np.sum(everyone, axis=0), rtol=1e-5, atol=1e-6)
    assert len(set(gather(own.tobytes()))) == 1


def test_tuning_chooses_alike_on_every_rank(communicator, gather, monkeypatch):
    monkeypatch.delenv("HVD_LOCALSGD_CHUNK_MB", raising=False)
    part = communicator.subgroup([list(range(communicator.size))])
    chosen = reducers.fastest(part, 1 << 30)
    assert len(set(gather((chosen.chunk_bytes, type(chosen).__name__)))) == 1
    buffer = np.arange(100_000, dtype=np.float32) * (communicator.rank + 1)
    (chunk,) = layout.plan([layout.Block(buffer.size, buffer.dtype, True)], None)
    total = communicator.size * (communicator.size + 1) / 2
    np.testing.assert_allclose(chosen.sum(chunk, buffer), np.arange(100_000) * total, rtol=1e-6)
    if communicator.name == "mpi":
        monkeypatch.setenv("HVD_LOCALSGD_CHUNK_MB", "3")
        assert reducers.fastest(part, 1 << 30).chunk_bytes == 3 << 20


@given(st.lists(st.binary(max_size=50), min_size=4, max_size=4))
def test_gather_keeps_order_and_content(lsgd, data):
    communicator = devices.get()
    assert communicator.gather(data[communicator.rank % 4]) == [data[k % 4] for k in range(communicator.size)]


def test_what_is_longer_than_a_call_takes_goes_in_pieces(lsgd, communicator, gather, monkeypatch):
    """MPI counts with 31 bits; here a call takes 10 numbers. One message is long, the others short or empty."""
    monkeypatch.setattr(base, "MOST", 10)
    messages = [bytes(range(97)), b"", b"x", b"y" * 10][: communicator.size]
    assert communicator.gather(messages[communicator.rank]) == messages
    array = np.arange(97) * (communicator.rank + 1)
    communicator.broadcast(array)
    assert array.tolist() == list(range(97))
    own = np.random.default_rng(communicator.rank).normal(size=97).astype("float32")
    variable, everyone = tf.Variable(own), gather(own)
    averager = lsgd.ModelAverager([own, np.zeros(3)], 1, broadcast=False)
    for each in (averager, lsgd.ModelAverager([variable], 1, broadcast=False)):
        each.step()
        each.finish()
    for averaged in (own, variable.numpy()):
        np.testing.assert_allclose(averaged, np.mean(everyone, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.alone
@pytest.mark.parametrize("megabytes", ["0", "-1", "2049", "nan"])
def test_chunks_that_mpi_cannot_count_are_refused(monkeypatch, megabytes):
    monkeypatch.setenv("HVD_LOCALSGD_CHUNK_MB", megabytes)
    with pytest.raises(ValueError, match=f"at most 2048.*Received: {megabytes}"):
        reducers.fastest(serial.SerialCommunicator(), 1)


def test_subgroups_talk_among_themselves(communicator):
    size = communicator.size
    groups = [list(range(0, size, 2)), list(range(size - 1 - size % 2, 0, -2))] if size > 1 else [[0]]
    own = next(group for group in groups if communicator.rank in group)
    part = communicator.subgroup(groups)
    own.sort()
    assert (part.rank, part.size) == (own.index(communicator.rank), len(own))
    buffer = np.array([communicator.rank, 1.0])
    part.allreduce(buffer)
    assert buffer.tolist() == [sum(own), len(own)]
    assert part.gather(str(communicator.rank).encode()) == [str(k).encode() for k in own]
    array = np.array([communicator.rank])
    part.broadcast(array)
    assert array[0] == own[0]
    communicator.gather(b"")  # nobody leaves early


def test_exchange_gives_each_ranks_row(communicator):
    rank = communicator.rank
    table = header.exchange(communicator, header.row(steps=rank, position=math.inf, stop=rank == 0, samples=0.5))
    assert table["steps"].tolist() == list(range(communicator.size))
    assert table["stop"].tolist() == [k == 0 for k in range(communicator.size)]
    assert np.isinf(table["position"]).all()
    assert (table["samples"] == 0.5).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("layout")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same for all examples
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6), st.integers(0, 2**31))
def test_the_average_is_numpys_for_any_shapes_and_dtypes(lsgd, gather, specs, seed):
    communicator = devices.get()
    random = np.random.default_rng([seed, communicator.rank])
    values = [tf.cast(random.normal(size=shape), dtype) for shape, dtype in specs]
    own = [tf.Variable(value) for value in values]
    copies = [np.array(v.numpy(), "float64") for v in own]
    averager = lsgd.ModelAverager(own, 1, broadcast=False)
    averager.step()
    everyone = gather(copies)
    for i, (variable, (_, dtype)) in enumerate(zip(own, specs, strict=True)):
        mean = np.mean([other[i] for other in everyone], axis=0)
        tolerance = {"float32": 1e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
        np.testing.assert_allclose(np.array(variable.numpy(), "float64"), mean, rtol=tolerance, atol=tolerance)
    contents = gather([v.numpy().tobytes() for v in own])
    assert all(content == contents[0] for content in contents)
    averager.finish()


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.booleans()), min_size=1, max_size=12), st.integers(1, 16)
)
def test_chunks_hold_every_element_once(specs, capacity):
    wires = [np.dtype(np.float64 if double else np.float32) for _, double, _ in specs]
    blocks = [layout.Block(size, wire, whole) for (size, _, whole), wire in zip(specs, wires, strict=True)]
    seen = [np.zeros(size, int) for size, _, _ in specs]
    for number, chunk in enumerate(layout.plan(blocks, capacity * 8)):
        assert chunk.number == number
        assert 0 < chunk.elements * chunk.dtype.itemsize <= capacity * 8
        offset = 0
        for index, start, stop, at in chunk.pieces:
            assert at == offset
            assert wires[index] == chunk.dtype
            seen[index][start:stop] += 1
            offset += stop - start
        assert offset == chunk.elements
        assert not chunk.direct or (len(chunk.pieces) == 1 and blocks[chunk.pieces[0][0]].whole)
    assert all((count == 1).all() for count in seen)


@pytest.mark.usefixtures("layout")
def test_a_model_of_many_chunks(lsgd, communicator, gather):
    random = np.random.default_rng(communicator.rank)
    shapes = [(1200, 1000), (3,), (700, 999), (), (1,)]
    own = [tf.Variable(random.normal(size=shape).astype("float32")) for shape in shapes]
    copies = [v.numpy().astype("float64") for v in own]
    averager = lsgd.ModelAverager(own, 1, broadcast=False)
    averager.step()
    everyone = gather(copies)
    for i, variable in enumerate(own):
        mean = np.mean([other[i] for other in everyone], axis=0)
        np.testing.assert_allclose(variable.numpy(), mean, rtol=1e-5, atol=1e-6)
    flat = np.array([np.concatenate([v.reshape(-1) for v in other]) for other in everyone])
    drift = np.sqrt(np.mean(np.sum((flat - flat.mean(0)) ** 2, axis=1)))
    assert averager.timings[0].drift == pytest.approx(drift, rel=0.02), "estimated from a part of every chunk"
    averager.finish()


@pytest.mark.skipif(kernel.load() is None, reason="not built: python -m hvd_localsgd.tools.build_kernel")
def test_the_kernel_refuses_what_does_not_fit():
    operations = kernel.load()
    own = [tf.Variable([1.0, 2.0]), tf.Variable([[3.0]], dtype="bfloat16")]
    handles = [v.handle for v in own]
    for size in (2, 4):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"values"):
            operations.hvd_localsgd_read_variables(handles=handles, T=tf.float32, size=size)
    with pytest.raises(tf.errors.InvalidArgumentError, match="3 values, but the array has 4"):
        operations.hvd_localsgd_write_variables(handles=handles, flat=tf.zeros(4))
    with pytest.raises(tf.errors.InvalidArgumentError, match="dtype int32"):
        operations.hvd_localsgd_read_variables(handles=[tf.Variable([1]).handle], T=tf.float32, size=1)
    operations.hvd_localsgd_write_variables(handles=handles, flat=[4.0, 5.0, 6.0])
    assert [v.numpy().tolist() for v in own] == [[4.0, 5.0], [[6.0]]]


@pytest.mark.skipif(kernel.load() is None, reason="not built: python -m hvd_localsgd.tools.build_kernel")
def test_the_kernel_spares_an_operation_for_each_variable():
    own = [tf.Variable([float(i)]) for i in range(together.MANY + 1)]
    small = memory.TensorFlowMemory(own)
    graph = tf.function(small.expose).get_concrete_function().graph
    assert len(graph.get_operations()) < 20 + len(own), "the handles, and few operations more"
    with small.open() as arrays:
        np.testing.assert_array_equal(arrays[0], np.arange(len(own)))


def test_the_start_is_rank_0s_stretch_by_stretch(communicator, monkeypatch):
    monkeypatch.setattr(agreement, "STRETCH", 4)
    rank = communicator.rank
    arrays = [np.arange(10.0) + 5 * rank * (np.arange(10) == 9), np.full((3, 3), rank), np.array(7.0 + rank)]
    own = [
        tf.Variable(array, dtype=dtype) for array, dtype in zip(arrays, ["float32", "int64", "bfloat16"], strict=True)
    ]
    held = own[0].read_value()
    start = memory.TensorFlowMemory(own[:1] + own[2:])
    start.prepare(own, lambda: None)
    assert start.broadcast(communicator) == (rank > 0)
    for variable, expected in zip(own, [np.arange(10), np.zeros((3, 3)), 7], strict=True):
        np.testing.assert_array_equal(np.array(variable.numpy(), "float64"), expected)
    np.testing.assert_array_equal(held.numpy(), arrays[0])
    assert not start.broadcast(communicator)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("difference", ["shape", "dtype", "count", "name", "settings", "interval"])
def test_different_models_are_an_error_on_every_rank(lsgd, communicator, difference):
    odd = communicator.rank == communicator.size - 1
    shape = (3, 2) if odd and difference == "shape" else (2, 3)
    dtype = "float64" if odd and difference == "dtype" else "float32"
    name = "other" if odd and difference == "name" else "kernel"
    own = [keras.Variable(np.zeros(shape), dtype=dtype, name=name)]
    if odd and difference == "count":
        own.append(keras.Variable(np.zeros(1), name="more"))
    every = 2 if odd and difference == "interval" else 1
    averager = lsgd.ModelAverager(own, every, weighting="samples" if odd and difference == "settings" else "equal")
    expected = "Settings differ" if difference in ("settings", "interval") else "Ranks hold different models"
    with pytest.raises(ValueError, match=rf"{expected}.*rank {communicator.size - 1} on "):
        averager.begin()


def test_keras_own_numbering_of_layers_is_no_difference(lsgd, communicator):
    for _ in range(communicator.rank):
        keras.layers.Dense(1)
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    averager = lsgd.ModelAverager(layer.trainable_variables, 1)
    averager.begin()
    layer.kernel.assign(np.full((3, 2), communicator.rank))
    averager.step()
    np.testing.assert_allclose(layer.kernel.numpy(), np.full((3, 2), np.mean(range(communicator.size))))
    averager.finish()


@pytest.mark.usefixtures("several_ranks")
def test_ranks_in_different_places_are_told_so(lsgd, communicator):
    averager = lsgd.ModelAverager([tf.Variable([1.0])], 1)
    averager.begin()
    with pytest.raises(header.RankFailed, match="Some ranks start to train while others"):
        averager.step() if communicator.rank == 0 else averager.begin()


def test_nothing_to_average(lsgd):
    with pytest.raises(ValueError, match="nothing to average"):
        lsgd.ModelAverager([], 1).begin()
