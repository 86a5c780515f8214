"""``shard``: each rank's own part of a data set."""

from __future__ import annotations

from numbers import Integral, Number
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from hvd_localsgd import devices
from hvd_localsgd.communicators.base import Communicator

Remainder = Literal["keep", "drop", "repeat"]


def shard(data: Any, *, shuffle: bool = True, seed: int = 0, remainder: Remainder = "keep") -> Any:
    """This rank's part of ``data``; the parts of all ranks are disjoint.

    Every rank must hold the same data and pass the same arguments. What is dealt out is: rows of arrays (and of tuples,
    lists and dicts of arrays of one length, with None where there is none), *elements* of a ``tf.data.Dataset``
    (batches, if it is batched: shard first, then shuffle and batch), and batches of a ``keras.utils.PyDataset``.

    Where ranks may die (``mpirun --with-ft ulfm``) a ``tf.data.Dataset`` is dealt out anew whenever it is iterated, among those that are
    left; it then does not know its cardinality. Arrays and the batches of a PyDataset are dealt out once.

    Arrays are all that Keras takes for one: numpy's, tensors (ragged and sparse ones too), pandas' (tested where it is
    installed), scipy's sparse matrices (which come back as CSR), and whatever numpy can make an array of. A list is several arrays, as in Keras.

    Args:
        data: see above; for arrays ``x, y = lsgd.shard((x, y))``.
        shuffle: deal from one order, shuffled with ``seed`` (the same on all ranks). A ``tf.data.Dataset`` is read only
            once, in its own order, and of each ``size`` elements in a row every rank gets one at random. False:
            contiguous parts, rank 0 the first (a Dataset must then know its cardinality). Sorted data in contiguous
            parts gives ranks that pull in different directions.
        seed: of that order, an integer from 0 to 2**31 - 1.
        remainder: where n is not a multiple of the number of ranks, ``"keep"`` every sample (n % size ranks get one
            more than the others), ``"drop"`` the last n % size of the order, or ``"repeat"`` its first samples so
            that all ranks get the same number. With a Dataset of unknown cardinality only ``"keep"`` works.

    Returns:
        The same kind of data, shorter; with one rank, ``data`` itself.

    Raises:
        ValueError: fewer samples than ranks, lengths that differ, an unknown ``remainder``, unknown cardinality; on one
            rank as on several.
        TypeError: data of another kind.
    """
    communicator = devices.get()
    if remainder not in ("keep", "drop", "repeat"):
        raise ValueError(f"remainder must be 'keep', 'drop' or 'repeat'. Received: {remainder!r}")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be an integer from 0 to 2**31 - 1, the same on all ranks. Received: {seed!r}")
    if isinstance(data, tf.data.Dataset):
        own = _shard_dataset(data, communicator, shuffle, seed, remainder)
        return data if communicator.size == 1 else own
    if isinstance(data, keras.utils.PyDataset):
        batches = _own_indices(_count_batches(data), "batches", communicator, shuffle, seed, remainder)
        return data if communicator.size == 1 else _PyDatasetShard(data, batches)
    rows = _own_indices(_count_rows(data), "samples", communicator, shuffle, seed, remainder)
    if communicator.size == 1:
        return data
    contiguous = not shuffle and remainder != "repeat"
    which = slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows
    return keras.tree.map_structure(lambda array: _take(array, which), data)


def _count_batches(source: keras.utils.PyDataset) -> int:
    try:
        count = source.num_batches
    except NotImplementedError:  # for Keras it has no end then
        count = None
    if count is None:
        raise ValueError(
            f"A PyDataset without end cannot be sharded: {type(source).__name__}.num_batches is None or not there."
        )
    return count


def _count_rows(data: Any) -> int:
    arrays = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    wrong = [leaf for leaf in arrays if not _has_rows(leaf)]
    if wrong or not arrays:
        raise TypeError(
            "shard takes a tf.data.Dataset, a keras.utils.PyDataset, or arrays with at least one dimension (also in a "
            f"tuple, list or dict). Received: {_kind(data)}{_complaint(data, *wrong[:1])}"
        )
    lengths = {int(array.shape[0]) for array in arrays}
    if len(lengths) > 1:
        raise ValueError(f"Arrays must have the same number of rows. Received: {[tuple(a.shape) for a in arrays]}")
    return lengths.pop()


def _has_rows(leaf: Any) -> bool:
    is_array = tf.is_tensor(leaf) or hasattr(leaf, "__array__") or hasattr(leaf, "tocsr")
    shape: Any = getattr(leaf, "shape", ())
    return is_array and len(shape) > 0 and shape[0] is not None  # None: a keras.Input


def _kind(value: Any) -> str:
    module = type(value).__module__
    name = type(value).__qualname__ if module == "builtins" else f"{module}.{type(value).__qualname__}"
    return f"{name} of shape {tuple(value.shape)}" if hasattr(value, "shape") else name


def _complaint(data: Any, wrong: Any = None) -> str:
    """What is wrong inside ``data``, and what to do about it."""
    inside = "" if wrong is None or wrong is data else f" with {_kind(wrong)} in it"
    if isinstance(wrong, Number | str | bytes):
        return f"{inside}. A list counts as several arrays: np.array(...) makes it one."
    if hasattr(wrong, "__next__"):
        return f"{inside}. It can be read only once: give each rank its own, or make it a tf.data.Dataset."
    return inside


def _take(array: Any, rows: slice | np.ndarray) -> Any:
    """These rows of anything that Keras takes for an array; a slice gives a view where there can be one."""
    if array is None:
        return None
    if hasattr(array, "tocsr"):  # of scipy's formats the one that has rows
        return array.tocsr()[rows]
    if hasattr(array, "iloc"):  # pandas: by place, not by label
        return array.iloc[rows]
    if isinstance(array, tf.SparseTensor):
        return _take_sparse(array, rows)
    if isinstance(rows, slice) and hasattr(array, "__getitem__"):
        return array[rows]
    return tf.gather(array, rows) if tf.is_tensor(array) else np.asanyarray(array)[rows]


def _take_sparse(array: tf.SparseTensor, rows: slice | np.ndarray) -> tf.SparseTensor:
    """TensorFlow has no such function."""
    own = np.arange(array.shape[0])[rows]
    place = np.full(array.shape[0], -1)  # of each row among ours; -1: it is another rank's
    place[own] = np.arange(len(own))
    indices = array.indices.numpy()
    indices[:, 0] = place[indices[:, 0]]
    mine = indices[:, 0] >= 0
    taken = tf.SparseTensor(indices[mine], tf.boolean_mask(array.values, mine), (len(own), *array.shape[1:]))
    return tf.sparse.reorder(taken)


def _bounds(count: int, communicator: Communicator) -> tuple[int, int]:
    """Contiguous parts whose sizes differ by at most one."""
    return count * communicator.rank // communicator.size, count * (communicator.rank + 1) // communicator.size


def _count(count: int, what: str, size: int, remainder: Remainder) -> int:
    if count < size:
        raise ValueError(f"{count} {what} cannot be shared by {size} ranks: at least one rank would get none.")
    return {"keep": count, "drop": count - count % size, "repeat": count + -count % size}[remainder]


def _own_indices(
    count: int, what: str, communicator: Communicator, shuffle: bool, seed: int, remainder: Remainder
) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(count) if shuffle else np.arange(count)
    start, stop = _bounds(_count(count, what, communicator.size, remainder), communicator)
    return order[np.arange(start, stop) % count]


def _shard_dataset(
    dataset: tf.data.Dataset, communicator: Communicator, shuffle: bool, seed: int, remainder: Remainder
) -> tf.data.Dataset:
    cardinality = int(dataset.cardinality())
    if cardinality < 0 and (remainder != "keep" or (not shuffle and cardinality != tf.data.INFINITE_CARDINALITY)):
        raise ValueError(
            "The Dataset does not know its cardinality, which remainder='drop' or 'repeat' and shuffle=False need: "
            "use dataset.apply(tf.data.experimental.assert_cardinality(n))."
        )
    if not shuffle and cardinality < 0:
        raise ValueError("A Dataset without end has no contiguous parts: use shuffle=True.")

    if remainder == "repeat":
        dataset = dataset.concatenate(dataset)

    def place() -> list[int]:
        """Rank and size as they are now, how many elements are dealt, and where this rank's begin and end if they are contiguous."""
        rank, size = communicator.rank, communicator.size
        if cardinality < 0:
            return [rank, size, -1, 0, 0]
        count = _count(cardinality, "elements", size, remainder)
        return [rank, size, count, *_bounds(count, communicator)]

    rank, size, count, start, stop = place()
    if communicator.resilient:  # dealt out anew whenever it is iterated, for some may have died
        places = tf.data.Dataset.from_tensors(0).map(lambda _: tf.numpy_function(place, [], [tf.int64] * 5))

        def deal(rank: Any, size: Any, count: Any, start: Any, stop: Any) -> tf.data.Dataset:
            return _deal(dataset, rank, size, count, start, stop, shuffle, seed)

        return places.map(lambda *now: tuple(tf.ensure_shape(each, ()) for each in now)).flat_map(deal)
    own = _deal(dataset, rank, size, count, start, stop, shuffle, seed)
    if shuffle and cardinality >= 0:
        in_last_group = rank in _order(count // size, size, seed).numpy()[: count % size]
        own = own.apply(tf.data.experimental.assert_cardinality(count // size + in_last_group))
    return own


def _deal(
    dataset: tf.data.Dataset, rank: Any, size: Any, count: Any, start: Any, stop: Any, shuffle: bool, seed: int
) -> tf.data.Dataset:
    """A rank's part; numbers may be tensors. ``count`` -1: of all that there is."""
    if not shuffle:
        return dataset.skip(start).take(stop - start)
    size64 = tf.cast(size, tf.int64)

    def is_mine(index: tf.Tensor, _: Any) -> tf.Tensor:
        return _order(index // size64, size, seed)[index % size64] == tf.cast(rank, tf.int32)

    return dataset.take(count).enumerate().filter(is_mine).map(lambda _, element: element)


def _order(group: Any, size: Any, seed: int) -> tf.Tensor:
    """In which each group of elements is dealt out."""
    ranks = tf.range(tf.cast(size, tf.int32))
    return tf.random.experimental.stateless_shuffle(ranks, tf.stack([int(seed), tf.cast(group, tf.int32)]))


class _PyDatasetShard(keras.utils.PyDataset):
    """Some of the batches of another PyDataset."""

    def __init__(self, source: keras.utils.PyDataset, own: np.ndarray) -> None:
        super().__init__(source.workers, source.use_multiprocessing, source.max_queue_size)
        self._source = source
        self._own = own

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, index: int) -> Any:
        return self._source[int(self._own[index])]

    def on_epoch_begin(self) -> None:
        self._source.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._source.on_epoch_end()
