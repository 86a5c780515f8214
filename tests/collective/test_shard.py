"""shard: disjoint, complete, the same on every call; for arrays, Datasets and PyDatasets."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_localsgd import devices


class Batches(keras.utils.PyDataset):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.full((2, 1), index, "float32"), np.full((2, 1), index, "float32")


def as_array(count):
    return np.arange(count)


def as_dataset(count):
    return tf.data.Dataset.range(count)


def as_pydataset(count):
    return Batches(count)


def read(data):
    if isinstance(data, keras.utils.PyDataset):
        return [int(data[i][0][0, 0]) for i in range(len(data))]
    return [int(i) for i in data]


def all_read(gather, data):
    own = read(data)
    if hasattr(data, "cardinality"):
        assert int(data.cardinality()) == len(own)
    return gather(own)


@pytest.mark.parametrize("make", [as_array, as_dataset, as_pydataset])
@settings(max_examples=6)
@given(extra=st.integers(0, 12), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_every_sample_once(lsgd, gather, make, extra, shuffle, seed):
    count, size = lsgd.size() + extra, lsgd.size()
    parts = all_read(gather, lsgd.shard(make(count), shuffle=shuffle, seed=seed))
    assert sorted(sum(parts, [])) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if not shuffle and size > 1:
        assert sum(parts, []) == list(range(count)), "contiguous, rank 0 first"
    if shuffle and make is as_dataset:
        assert all(element // size == i for part in parts for i, element in enumerate(part)), (
            "one of each size in a row"
        )
    assert all_read(gather, lsgd.shard(make(count), shuffle=shuffle, seed=seed)) == parts


@pytest.mark.parametrize("make", [as_array, as_dataset, as_pydataset])
@pytest.mark.parametrize("shuffle", [True, False])
def test_drop_and_repeat_make_equal_parts(lsgd, gather, make, shuffle):
    size = lsgd.size()
    count = 3 * size + size // 2
    dropped = all_read(gather, lsgd.shard(make(count), shuffle=shuffle, remainder="drop"))
    repeated = all_read(gather, lsgd.shard(make(count), shuffle=shuffle, remainder="repeat"))
    assert {len(part) for part in dropped} == {3}
    assert len(set(sum(dropped, []))) == 3 * size
    assert {len(part) for part in repeated} == {3 + (size // 2 > 0)}
    assert set(sum(repeated, [])) == set(range(count))


def test_structures_are_kept_and_rows_stay_together(lsgd, gather):
    x, y = np.arange(40).reshape(20, 2), np.arange(20)
    result = lsgd.shard({"x": x, "more": (y, [y])})
    np.testing.assert_array_equal(result["x"][:, 0], 2 * result["more"][0])
    np.testing.assert_array_equal(result["more"][0], result["more"][1][0])
    assert sorted(np.concatenate(gather(result["more"][0]))) == list(range(20))


def test_a_dataset_of_unknown_length_is_dealt_out(lsgd, gather):
    def dataset():
        return tf.data.Dataset.from_generator(lambda: iter(range(23)), output_signature=tf.TensorSpec((), tf.int64))

    assert sorted(sum(gather(read(lsgd.shard(dataset()))), [])) == list(range(23))
    if lsgd.size() > 1:
        for wrong in ({"shuffle": False}, {"remainder": "drop"}, {"remainder": "repeat"}):
            with pytest.raises(ValueError, match="cardinality"):
                lsgd.shard(dataset(), **wrong)


@pytest.mark.usefixtures("several_ranks")
def test_shards_differ_by_seed(lsgd, gather):
    assert gather(read(lsgd.shard(np.arange(100), seed=1))) != gather(read(lsgd.shard(np.arange(100), seed=2)))


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("make", [as_array, as_dataset, as_pydataset])
def test_an_empty_shard_is_an_error_on_every_rank(lsgd, make):
    with pytest.raises(ValueError, match=rf"{lsgd.size() - 1} .* cannot be shared by {lsgd.size()} ranks"):
        lsgd.shard(make(lsgd.size() - 1))


def test_wrong_arguments(lsgd):
    with pytest.raises(TypeError, match="Received: str"):
        lsgd.shard("data")
    with pytest.raises(ValueError, match=r"same number of rows. Received: \[\(3,\), \(4,\)\]"):
        lsgd.shard((np.zeros(3), np.zeros(4)))
    with pytest.raises(ValueError, match="remainder must be"):
        lsgd.shard(np.zeros(3), remainder="half")


@pytest.mark.pairs
@pytest.mark.parametrize("length", ["known", "unknown", "endless"])
@pytest.mark.parametrize("remainder", ["keep", "drop", "repeat"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_where_ranks_may_die_a_dataset_is_dealt_out_alike(lsgd, length, remainder, shuffle, monkeypatch):
    dataset = tf.data.Dataset.range(11)
    if length == "unknown":
        dataset = dataset.filter(lambda _: True)
    elif length == "endless":
        dataset = dataset.repeat()
    if length != "known" and (remainder != "keep" or not shuffle):
        pytest.skip("refused")
    expected = [int(each) for each in lsgd.shard(dataset, shuffle=shuffle, remainder=remainder).take(30)]
    monkeypatch.setattr(devices.get(), "resilient", True)
    own = lsgd.shard(dataset, shuffle=shuffle, remainder=remainder)
    for _ in range(2):
        assert [int(each) for each in own.take(30)] == expected
