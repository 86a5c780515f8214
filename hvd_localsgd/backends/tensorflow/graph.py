"""A sync from inside a TensorFlow graph. What it changes must be known to the graph, or TensorFlow may reorder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
from hvd_localsgd.backends.tensorflow.variables import components


def sync_if(due: tf.Tensor, sync: Callable[[], None], memory: TensorFlowMemory, touched: Sequence[Any]) -> None:
    """Call ``sync`` when the graph runs and ``due`` is true.

    Args:
        due: scalar, bool.
        sync: called in Python; opens ``memory``.
        memory: of what is averaged.
        touched: every variable that it reads or writes.
    """
    parts = [component for variable in touched for component in components(variable)]
    devices = {part.device for part in parts}
    if len(devices) > 1:
        tf.cond(due, lambda: _across_devices(sync, memory, parts), lambda: None)
    elif "CPU" in devices.pop():
        _run_if(due, lambda: _on_one_device(sync, memory, parts))
    else:
        tf.cond(due, lambda: _on_one_device(sync, memory, parts), lambda: None)


def _on_one_device(sync: Callable[[], None], memory: TensorFlowMemory, parts: Sequence[tf.Variable]) -> None:
    """With the handles as inputs, TensorFlow orders all that touches these variables around the call.

    The memory is exposed out here: a call to a compiled function in there can wait for ever for a free thread.
    """
    handles = [part.handle for part in parts]

    def average(*inputs: tf.Tensor) -> list[tf.Tensor]:
        with memory.lent(inputs[len(handles) :]) as changed:
            sync()
        return changed

    changed = tf.py_function(average, [*handles, *memory.expose()], Tout=memory.changed_dtypes)
    memory.put_back(changed if memory.changed_dtypes else [])


def _across_devices(sync: Callable[[], None], memory: TensorFlowMemory, parts: Sequence[tf.Variable]) -> None:
    """Handles on several devices cannot be inputs of one op.

    The old values order it after what came before; assigning what it returns orders it before what comes next.
    """

    def average(*_: tf.Tensor) -> list[tf.Tensor]:
        with memory.lent([]):
            sync()
        return [part.read_value() for part in parts]

    with tf.device("/CPU:0"):
        values = tf.py_function(average, [part.read_value() for part in parts], Tout=[part.dtype for part in parts])
    for part, value in zip(parts, values, strict=True):
        value.set_shape(part.shape)
        with tf.device(part.device):
            part.assign(value)


def _run_if(condition: tf.Tensor, action: Callable[[], None]) -> None:
    """``tf.cond`` without an alternative, at a cost that does not grow with the number of variables.

    TensorFlow replaces its own by a Switch for each input, and the inputs are all variables: a microsecond for each at
    every step, sync or not. This one is a single operation, which a function that spans devices could not be.
    """
    then = tf.function(action, autograph=False).get_concrete_function()
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in then.captured_inputs]
    nothing = tf.function(lambda *_: None, autograph=False).get_concrete_function(*signature)
    tf.raw_ops.If(cond=condition, input=then.captured_inputs, Tout=[], then_branch=then, else_branch=nothing)
