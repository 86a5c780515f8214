"""``ModelAverager``: loops without Keras, and the parts that it lets one exchange."""

import json
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from hvd_localsgd import devices
from hvd_localsgd.backends.tensorflow import together
from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
from hvd_localsgd.core import reducers

from . import reference


def arrays(rank):
    random = np.random.default_rng(rank)
    shapes = [((7, 5), "float32"), ((3,), "float64"), ((), "float32"), ((40,), "float16"), ((0, 2), "float32")]
    return [random.normal(size=shape).astype(dtype) for shape, dtype in shapes]


def test_arrays_become_numpys_mean_every_h_steps(lsgd, gather):
    own = arrays(lsgd.rank())
    with lsgd.ModelAverager(own, sync_every=3) as averager:
        for array, first in zip(own, arrays(0), strict=True):
            np.testing.assert_array_equal(array, first, err_msg="all ranks begin with rank 0's")
        for step in range(1, 8):
            for array in own:
                array += 0.25 * (1 + lsgd.rank())
            expected = [np.mean([other[i].astype("float64") for other in gather(own)], axis=0) for i in range(len(own))]
            averaged = averager.step()
            assert averaged == (step % 3 == 0)
            if averaged:
                for array, mean in zip(own, expected, strict=True):
                    tolerance = {"float16": 1e-3, "float32": 1e-6, "float64": 1e-14}[array.dtype.name]
                    np.testing.assert_allclose(array, mean, rtol=tolerance, atol=tolerance)
    assert [r.last_step for r in averager.timings if r.interval] == [3, 6, 7], "what remained is averaged at the end"
    assert len({b"".join(a.tobytes() for a in other) for other in gather(own)}) == 1
    assert [total["steps"] for total in averager.totals] == [7] * lsgd.size()


def test_weights_by_samples_over_rounds_of_different_lengths(lsgd, gather):
    rank, size = lsgd.rank(), lsgd.size()
    own = np.array([float(rank)])
    averager = lsgd.ModelAverager([own], 1, weighting="samples", broadcast=False)
    averager.step(samples=10.0 * (rank + 1))
    assert own[0] == pytest.approx(np.average(np.arange(size), weights=np.arange(size) + 1))
    averager.finish()


def test_ranks_with_other_numbers_of_steps_wait_with_weight_zero(lsgd):
    rank, size = lsgd.rank(), lsgd.size()
    own, left = np.zeros(2), [5 + 4 * k for k in range(size)]
    expected = np.zeros(size)  # every rank's value, by hand
    with lsgd.ModelAverager([own], 4) as averager:
        for _ in range(left[rank]):
            own += rank + 1.0
            averager.step()
    while any(left):
        steps = [min(4, each) for each in left]
        expected += np.multiply(steps, np.arange(size) + 1.0)
        expected[:] = np.average(expected, weights=np.sign(steps))
        left = [each - taken for each, taken in zip(left, steps, strict=True)]
    np.testing.assert_allclose(own, expected[rank])


@pytest.mark.usefixtures("several_ranks")
def test_a_rank_that_waits_leaves_its_core_to_others(lsgd):
    averager = lsgd.ModelAverager([np.zeros(2)], 1)
    averager.begin()
    before = time.thread_time()
    if lsgd.rank() == lsgd.size() - 1:
        time.sleep(0.6)
    averager.step()
    spent = time.thread_time() - before
    averager.finish()
    if lsgd.rank() < lsgd.size() - 1:
        waited = averager.timings[0].wait
        assert waited > 0.3
        assert spent < 0.25 * waited


def test_arrays_that_cannot_be_averaged_are_refused(lsgd):
    with pytest.raises(TypeError, match="Received: array 1 of int64"):
        lsgd.ModelAverager([np.zeros(2), np.zeros(2, np.int64)]).begin()
    with pytest.raises(TypeError, match="floating dtype can be averaged. Received: variable 1 of .*int32"):
        lsgd.ModelAverager([tf.Variable([1.0]), tf.Variable([1])]).begin()
    with pytest.raises(ValueError, match=r"array 0, of shape \(2, 3\), must be contiguous and writable"):
        lsgd.ModelAverager([np.zeros((3, 2)).T]).begin()
    with pytest.raises(TypeError, match="not both"):
        lsgd.ModelAverager([np.zeros(2), tf.Variable([1.0])]).begin()
    with pytest.raises(ValueError, match="knows no optimizer"):
        lsgd.ModelAverager([np.zeros(2)], optimizer_state="reset")


@given(
    st.lists(st.sampled_from(["float32", "float64", "float16", "bfloat16"]), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_variables_anywhere_go_as_one_tensor_per_dtype(lsgd, gather, dtypes, seed):
    """As those on a GPU do, which this machine may not have: to the host, and back."""
    random = np.random.default_rng([seed, lsgd.rank()])
    own = [tf.Variable(tf.cast(random.normal(size=(i + 1, 3)[: 1 + i % 2]), dtype)) for i, dtype in enumerate(dtypes)]
    own.append(tf.Variable(tf.cast(random.normal(), "float32")))
    copies = gather([np.array(v.numpy(), "float64") for v in own])
    memory = TensorFlowMemory(own, tensors=True)
    assert len(memory.blocks) == len({"float64" if dtype == "float64" else "float32" for dtype in [*dtypes, "float32"]})
    averager = lsgd.ModelAverager(memory, 1)
    averager.step()
    averager.finish()
    for i, variable in enumerate(own):
        mean = np.mean([other[i] for other in copies], axis=0)
        tolerance = {"float32": 1e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 1e-2}[variable.dtype.name]
        np.testing.assert_allclose(np.array(variable.numpy(), "float64"), mean, rtol=tolerance, atol=tolerance)


def test_tensors_in_chunks_do_not_change_a_tensor_that_the_user_holds(lsgd, gather, monkeypatch):
    monkeypatch.setenv("HVD_LOCALSGD_CHUNK_MB", "0.001")
    own = [tf.Variable(np.random.default_rng(lsgd.rank()).normal(size=2000).astype("float32"))]
    held = own[0].read_value()
    before = np.array(held.numpy())
    averager = lsgd.ModelAverager(TensorFlowMemory(own, tensors=True), 1)
    averager.step()
    np.testing.assert_allclose(own[0].numpy(), np.mean(gather(before), axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(held.numpy(), before)
    averager.finish()


WAYS = {
    "arrays": lambda variables, values: values,
    "in place": lambda variables, values: variables,
    "together": lambda variables, values: variables,
    "tensors": lambda variables, values: TensorFlowMemory(variables, tensors=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [reducers.Library, reducers.Ring])
def test_any_reducer_gives_the_mean_and_the_same_bits(lsgd, gather, kind, way, monkeypatch):
    if devices.get().name != "mpi" and kind is reducers.Ring:
        pytest.skip("the ring is MPI's")
    monkeypatch.setattr(together, "MANY", 1 if way == "together" else 100)
    random = np.random.default_rng(lsgd.rank())
    values = [random.normal(size=size).astype("float32") for size in (1001, 3, 500)]
    everyone = gather([value.astype("float64") for value in values])
    variables = [tf.Variable(value) for value in values]
    averaged = WAYS[way](variables, values)
    averager = lsgd.ModelAverager(averaged, 1, broadcast=False, reducer=lambda communicator: kind(communicator, 512))
    averager.step()
    averager.finish()
    own = values if way == "arrays" else [variable.numpy() for variable in variables]
    for i, value in enumerate(own):
        np.testing.assert_allclose(value, np.mean([other[i] for other in everyone], axis=0), rtol=1e-5, atol=1e-6)
    assert len(set(gather(b"".join(value.tobytes() for value in own)))) == 1


def test_asynchronously_staleness_counts_the_syncs_of_others_in_between(lsgd, gather):
    """The ranks take turns; and each finds what those before it have added."""
    rank, size = lsgd.rank(), lsgd.size()
    own = np.zeros(2)
    averager = lsgd.ModelAverager([own], 1, mode="async")
    averager.begin()
    total = 0.0
    for _ in range(3):
        for turn in range(size):
            total += (turn + 1) / size
            if turn == rank:
                own += rank + 1.0
                averager.step()
                np.testing.assert_allclose(own, total)
            gather(None)
    averager.finish()
    np.testing.assert_allclose(own, total)
    assert [r.staleness for r in averager.timings if r.interval] == [rank, size - 1, size - 1]


def test_everything_follows_a_communicator_that_shrinks(lsgd, gather):
    """The last rank is left behind between two syncs: averages, errors and timings are those of the ranks that remain."""
    size = lsgd.size()
    if size == 1:
        pytest.skip("nobody to leave behind")
    part = devices.get().subgroup([range(size)])
    own = np.array([float(lsgd.rank())])
    averager = lsgd.ModelAverager([own], 1, broadcast=False, communicator=part)
    averager.step()
    assert own[0] == pytest.approx(np.mean(range(size)))
    groups = [list(range(size - 1)), [size - 1]]
    part.restrict(groups)
    remaining = next(group for group in groups if lsgd.rank() in group)
    own[0] = lsgd.rank()
    averager.step()
    assert own[0] == pytest.approx(np.mean(remaining))
    assert [r.size for r in averager.timings] == [size, len(remaining)]
    assert averager.timings[1].rank == remaining.index(lsgd.rank())
    own[0] = np.nan if lsgd.rank() in (0, size - 1) else 1.0  # the first of each group
    with pytest.raises(lsgd.RankFailed, match=r"NaN or infinity in the weights of rank 0 on \S+ at"):
        averager.step()
    gather(None)


def test_no_constructor_opens_a_file_and_another_training_appends(lsgd, tmp_path):
    path = tmp_path / f"rank-{lsgd.rank()}.jsonl"
    path.write_text('{"round": 0}\n{"rou')  # a run that was killed as it wrote
    before = path.read_text()
    averager = lsgd.ModelAverager([np.zeros(3)], 2, timings=tmp_path)
    lsgd.LocalSGDCallback(timings=tmp_path)
    reference.compiled(lsgd.LocalSGDOptimizer(keras.optimizers.SGD(), timings=tmp_path))
    assert path.read_text() == before
    for _ in range(2):
        averager.begin()
        averager.step(2)
        averager.finish()
    lines = path.read_text().splitlines()
    assert "\n".join(lines[:2]) == before
    assert [json.loads(line)["last_step"] for line in lines[2:]] == [2, 2, 4, 4]


def test_the_loss_that_a_loop_tells_is_in_the_record_of_its_round(lsgd):
    with lsgd.ModelAverager([np.zeros(3)], 2) as averager:
        for step in range(6):
            if step != 2 and step != 3:
                averager.tell(loss=10.0 * lsgd.rank() + step)
            averager.step()
    assert [r.loss for r in averager.timings] == [10.0 * lsgd.rank() + 1, None, 10.0 * lsgd.rank() + 5, None]


def test_loading_a_model_does_not_touch_the_record_of_its_training(lsgd, tmp_path):
    folder = tmp_path / "timings"
    optimizer = lsgd.LocalSGDOptimizer(keras.optimizers.SGD(0.05), sync_every=2, timings=folder)
    model = reference.compiled(optimizer, batch_normalization=False)
    x, y = reference.data(lsgd.rank(), 4)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    record = (folder / f"rank-{lsgd.rank()}.jsonl").read_text()
    assert len(record.splitlines()) == 3
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")
    assert (folder / f"rank-{lsgd.rank()}.jsonl").read_text() == record
