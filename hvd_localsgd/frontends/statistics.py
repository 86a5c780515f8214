"""BatchNorm's statistics estimated anew, for the weights as they are now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_localsgd import devices


def refresh_statistics(model: keras.Model, data: Iterable[Any], batches: int = 128) -> int:
    """Estimate the moving means and variances of all BatchNorm layers from data of all ranks (collective).

    The statistics that training leaves are those of weights that have moved on, and of each rank's own before they were averaged.
    Gu et al. (2024, arXiv 2310.14423) take 128 batches before each evaluation.

    Args:
        model: built; its weights, and every other variable but random seeds, stay as they are.
        data: batches of this rank's inputs, or tuples that begin with them, as ``fit`` takes.
        batches: how many of them to take; fewer where data end.

    Returns:
        How many batches all ranks have taken together.

    Raises:
        ValueError: no rank has a batch.
    """
    layers = [each for each in model._flatten_layers() if isinstance(each, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0  # the moving values are then those of the last batch
    forward = tf.function(lambda x: model(x, training=True), reduce_retracing=True)
    sums = np.zeros(1 + 2 * sum(int(np.prod(layer.moving_mean.shape)) for layer in layers))  # batches, m, v + m^2
    before = [(v, v.numpy()) for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    try:
        for number, batch in enumerate(data):
            if number == batches:
                break
            forward(batch[0] if isinstance(batch, tuple | list) else batch)
            means = np.concatenate([[1.0], *(layer.moving_mean.numpy() for layer in layers)])
            variances = np.concatenate([[0.0], *(layer.moving_variance.numpy() for layer in layers)])[1:]
            sums += np.concatenate([means, variances + means[1:].astype(np.float64) ** 2])
        devices.get().allreduce(sums)
        if not sums[0]:
            raise ValueError("No rank has a batch to estimate statistics from.")
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    total, (means, seconds) = sums[0], np.split(sums[1:], 2)
    place = 0
    for layer in layers:
        own = slice(place, place := place + int(np.prod(layer.moving_mean.shape)))
        mean = means[own] / total
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(np.maximum(seconds[own] / total - mean**2, 0.0))
    return int(total)
