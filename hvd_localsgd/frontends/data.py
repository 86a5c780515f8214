"""``shard``: each rank's own part of a data set."""

from __future__ import annotations

from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from hvd_localsgd import devices
from hvd_localsgd.communicators.base import Communicator

Remainder = Literal["keep", "drop", "repeat"]


def shard(data: Any, *, shuffle: bool = True, seed: int = 0, remainder: Remainder = "keep") -> Any:
    """This rank's part of ``data``; the parts of all ranks are disjoint.

    Every rank must hold the same data and pass the same arguments. What is dealt out is: rows of numpy arrays (and
    of tuples, lists and dicts of arrays of one length), *elements* of a ``tf.data.Dataset`` (batches, if it is batched:
    shard first, then shuffle and batch), and batches of a ``keras.utils.PyDataset``.

    Args:
        data: see above; for arrays ``x, y = lsgd.shard((x, y))``.
        shuffle: deal from one order, shuffled with ``seed`` (the same on all ranks). A ``tf.data.Dataset`` is read only
            once, in its own order, and of each ``size`` elements in a row every rank gets one at random. False:
            contiguous parts, rank 0 the first (a Dataset must then know its cardinality). Sorted data in contiguous
            parts gives ranks that pull in different directions.
        seed: of that order.
        remainder: where n is not a multiple of the number of ranks, ``"keep"`` every sample (n % size ranks get one
            more than the others), ``"drop"`` the last n % size of the order, or ``"repeat"`` its first samples so
            that all ranks get the same number. With a Dataset of unknown cardinality only ``"keep"`` works.

    Returns:
        The same kind of data, shorter; with one rank, ``data`` itself.

    Raises:
        ValueError: fewer samples than ranks, lengths that differ, an unknown ``remainder``, unknown cardinality.
        TypeError: data of another kind.
    """
    communicator = devices.get()
    if remainder not in ("keep", "drop", "repeat"):
        raise ValueError(f"remainder must be 'keep', 'drop' or 'repeat'. Received: {remainder!r}")
    if isinstance(data, tf.data.Dataset):
        return data if communicator.size == 1 else _shard_dataset(data, communicator, shuffle, seed, remainder)
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise ValueError("A PyDataset without end cannot be sharded: num_batches is None.")
        own = _own_indices(data.num_batches, "batches", communicator, shuffle, seed, remainder)
        return data if communicator.size == 1 else _PyDatasetShard(data, own)
    arrays = keras.tree.flatten(data)
    if not arrays or not all(hasattr(a, "shape") and len(a.shape) for a in arrays):
        raise TypeError(
            "shard takes a tf.data.Dataset, a keras.utils.PyDataset, or arrays (also in a tuple, list or dict). "
            f"Received: {type(data).__name__}"
        )
    lengths = sorted({len(a) for a in arrays})
    if len(lengths) > 1:
        raise ValueError(f"Arrays must have the same number of rows. Received: {[tuple(a.shape) for a in arrays]}")
    own = _own_indices(lengths[0], "samples", communicator, shuffle, seed, remainder)
    if communicator.size == 1:
        return data
    if not shuffle and remainder != "repeat":
        return keras.tree.map_structure(lambda a: a[own[0] : own[-1] + 1], data)  # a view, no copy
    return keras.tree.map_structure(lambda a: np.asarray(a)[own], data)


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
    size, rank = communicator.size, communicator.rank
    cardinality = int(dataset.cardinality())
    if cardinality >= 0:
        count = _count(cardinality, "elements", size, remainder)
        dataset = dataset.concatenate(dataset) if count > cardinality else dataset
        dataset = dataset.take(count)
    elif remainder != "keep" or (not shuffle and cardinality != tf.data.INFINITE_CARDINALITY):
        raise ValueError(
            "The Dataset does not know its cardinality, which remainder='drop' or 'repeat' and shuffle=False need: "
            "use dataset.apply(tf.data.experimental.assert_cardinality(n))."
        )
    if not shuffle:
        if cardinality < 0:
            raise ValueError("A Dataset without end has no contiguous parts: use shuffle=True.")
        start, stop = _bounds(count, communicator)
        return dataset.skip(start).take(stop - start)

    def deal(group: Any) -> tf.Tensor:
        return tf.random.experimental.stateless_shuffle(tf.range(size), tf.stack([seed, tf.cast(group, tf.int32)]))

    def is_mine(index: tf.Tensor, _: Any) -> tf.Tensor:
        return deal(index // size)[index % size] == rank

    own = dataset.enumerate().filter(is_mine).map(lambda _, element: element)
    if cardinality >= 0:
        in_last_group = rank in deal(count // size).numpy()[: count % size]
        own = own.apply(tf.data.experimental.assert_cardinality(count // size + in_last_group))
    return own


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
