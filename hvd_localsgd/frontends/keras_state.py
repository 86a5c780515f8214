"""What of a Keras model and its optimizer is averaged, and what is left alone."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_localsgd.backends.tensorflow.variables import components, floats
from hvd_localsgd.core.outer import SlowMo
from hvd_localsgd.core.selection import path_of, select
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.frontends import registration

registration.register()  # Keras may have been half imported when this package was


def of_model(model: keras.Model) -> list[keras.Variable]:
    """Trainable weights, and the float statistics that training changes (BatchNorm's moving mean and variance).

    Left alone: integers (counters, random seeds, which must differ by rank) and frozen weights, which
    nobody changes. Order: as the model lists them.
    """
    frozen = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables if not v.trainable}
    statistics = [v for v in model.non_trainable_variables if id(v) not in frozen]
    return floats([*model.trainable_variables, *statistics])


def selected(settings: Settings, variables: Sequence[Any]) -> list[Any]:
    """Those that the user wants averaged."""
    return select(variables, path_of, settings.include, settings.exclude)


class State:
    """The float state of optimizers (momentum, moments), without rates, counters and moving averages of weights.

    Args:
        optimizers: built Keras optimizers.
    """

    def __init__(self, *optimizers: Any) -> None:
        self.variables: list[Any] = []
        self._initial: dict[int, float] = {}
        for optimizer in optimizers:
            inner = innermost(optimizer)
            accumulated = getattr(inner, "_accumulated_gradients", None) or []
            others = {id(v) for v in (*moving_averages(optimizer), *accumulated)}
            self.variables += [v for v in floats(optimizer.variables) if id(v) not in others and len(v.shape) > 0]
            filled = getattr(inner, "_accumulators", [])  # Adagrad's and Ftrl's accumulators do not start at zero
            self._initial |= {id(v): inner.initial_accumulator_value for v in filled}

    def averaged(self, policy: Any) -> dict[int, int]:
        """Those that are averaged: ``id`` of each, and at every how manieth sync.

        Raises:
            ValueError: a kind is named that the optimizers do not have.
        """
        if not isinstance(policy, dict):
            return {id(v): 1 for v in self.variables} if policy == "average" else {}
        every: dict[int, int] = {}
        for kind, period in policy.items():
            own = [v for v in self.variables if v.path.endswith(f"_{kind}")]
            if not own:
                paths = ", ".join(v.path for v in self.variables[:6])
                raise ValueError(f"optimizer_state: no optimizer keeps a {kind!r}. There are: {paths or 'none'}")
            every |= {id(v): period for v in own}
        return every

    def reset(self) -> None:
        """What the optimizers start with; their iterations and learning-rate schedules go on."""
        for variable in self.variables:
            for part in components(variable):
                part.assign(tf.fill(part.shape, tf.cast(self._initial.get(id(variable), 0.0), part.dtype)))


def resets(settings: Settings, optimizer: Any) -> bool:
    """Whether the state of this optimizer is set to what it starts with at every sync: chosen, or part of SlowMo."""
    inner = innermost(optimizer)
    zeroed = isinstance(settings.outer, SlowMo) and isinstance(inner, keras.optimizers.SGD) and inner.momentum > 0
    return settings.optimizer_state == "reset" or (zeroed and settings.optimizer_state == "keep")


def say_what_is_reset(settings: Settings, optimizers: Sequence[Any]) -> None:
    """Where nobody has asked for it."""
    if settings.optimizer_state == "keep" and any(resets(settings, each) for each in optimizers):
        warnings.warn(
            f"outer={settings.outer!r} sets the momentum of SGD to zero at every sync, as published (Adam's moments it keeps). To average "
            'it instead: optimizer_state="average".',
            stacklevel=2,
        )


def optimizers(model: keras.Model) -> list[Any]:
    """Those that train the model: the one that it was compiled with, and those that a ``train_step`` of its own keeps."""
    found = [getattr(model, "optimizer", None)]
    for value in vars(model).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [each for each in several if isinstance(each, keras.optimizers.Optimizer)]
    return list({id(each): each for each in found if each is not None}.values())


def moving_averages(optimizer: Any) -> list[Any]:
    """The moving averages of the weights that ``use_ema=True`` keeps (empty without)."""
    kept = getattr(innermost(optimizer), "_model_variables_moving_average", None) or []
    return [v for v in kept if v is not None]


def innermost(optimizer: Any) -> Any:
    """The optimizer inside all wrappers (loss scaling, ours)."""
    return wrapped(optimizer)[-1]


def wrapped(optimizer: Any) -> list[Any]:
    """An optimizer and what it wraps, outermost first."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return [optimizer, *(wrapped(inner) if inner is not None else [])]


def describe_layers(model: keras.Model, adapted: bool = False) -> list[dict[str, Any]]:
    """What each layer computes: the same on two ranks only if the layers are, but for names and random seeds.

    Args:
        model: built or not.
        adapted: whether what Normalization was adapted to must be the same too.
    """
    layers = model._flatten_layers(include_self=False)
    return [describe(layer) | _vocabulary(layer) | (_adapted(layer) if adapted else {}) for layer in layers]


def _vocabulary(layer: Any) -> dict[str, str]:
    """Of a lookup layer: which rows of an embedding belong to which words."""
    try:
        words = repr(list(layer.get_vocabulary()))
    except Exception:  # no lookup layer, or one that has none yet
        return {}
    return {"vocabulary": sha256(words.encode()).hexdigest()[:12]}


def _adapted(layer: Any) -> dict[str, str]:
    """Of a layer that computes with tensors made by ``adapt``."""
    if not isinstance(layer, keras.layers.Normalization) or getattr(layer, "mean", None) is None:
        return {}
    values = b"".join(np.asarray(value).tobytes() for value in (layer.mean, layer.variance))
    return {"adapted to": sha256(values).hexdigest()[:12]}


def describe(part: Any) -> dict[str, Any]:
    """Class and configuration of a layer or an optimizer, without names, random seeds and numeric learning rates."""
    try:
        config = _plain(part.get_config())
    except Exception:  # a class of the user's may have none, or one that needs arguments we do not know
        config = {}
    return {"class": type(part).__name__, **config}


def _plain(value: Any, policy: bool = False) -> Any:
    """As JSON; what is not a plain value counts by its class."""
    if isinstance(value, dict):
        policy = policy or "DTypePolicy" in str(value.get("class_name"))  # the one whose name says what it is
        left_out = {"seed", *(() if policy else ("name",))}
        if isinstance(value.get("learning_rate"), float):  # rank 0's is everybody's
            left_out.add("learning_rate")
        return {str(key): _plain(item, policy) for key, item in value.items() if key not in left_out}
    if isinstance(value, list | tuple):
        return [_plain(item, policy) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def build_metrics(model: keras.Model, batches: Any) -> None:
    """Their variables, which Keras makes with the first batch. ``batches``: its ``epoch_iterator``, of which none is taken."""
    dataset = getattr(batches, "_distributed_dataset", None)
    if isinstance(dataset, tf.data.Dataset):
        like = keras.tree.map_structure(
            lambda spec: keras.KerasTensor(spec.shape, spec.dtype.name), dataset.element_spec
        )
        model._symbolic_build(data_batch=like)


_trained_here: weakref.WeakSet[Any] = weakref.WeakSet()


def brought(optimizer: Any, steps: int) -> int:
    """Of an optimizer that has taken ``steps``: those from before this process, which a file has brought; asked when it begins to train."""
    innermost_one = innermost(optimizer)
    known = innermost_one in _trained_here
    _trained_here.add(innermost_one)
    return 0 if known else steps


def finalize(model: keras.Model) -> None:
    """Let layers that compute with tensors made from their variables (Normalization) make them again."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.Normalization) and layer.built:
            layer.finalize_state()
