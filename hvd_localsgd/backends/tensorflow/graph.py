"""A call of the engine from inside a TensorFlow graph. What it changes must be known to the graph, or TensorFlow may reorder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from hvd_localsgd.backends.tensorflow import kernel
from hvd_localsgd.backends.tensorflow.memory import TensorFlowMemory
from hvd_localsgd.backends.tensorflow.variables import components
from hvd_localsgd.core import failures


def call_if(
    due: tf.Tensor, call: Callable[[], None], touched: Sequence[Any], memory: TensorFlowMemory | None = None
) -> None:
    """Call ``call``, in Python, when the graph runs and ``due`` is true.

    Args:
        due: scalar, bool.
        call: opens ``memory``, if there is one; must not call a compiled function otherwise: it can wait for ever for a free
            thread.
        touched: every variable that it reads or writes.
        memory: is read and written by the graph, around the call.
    """
    # Each once: the rate's scalars, for one, may be averaged as well.
    parts = list({id(component): component for variable in touched for component in components(variable)}.values())
    parts.append(components(_order(parts[0].device))[0])  # under a strategy it has been made for each replica
    devices = {part.device for part in parts}
    if len(devices) > 1:
        tf.cond(due, lambda: _across_devices(call, parts, memory), lambda: None)
    elif "CPU" in devices.pop():
        _run_if(due, lambda: _on_one_device(call, parts, memory))
    else:
        tf.cond(due, lambda: _on_one_device(call, parts, memory), lambda: None)


@functools.cache
def _order(device: str) -> tf.Variable:
    """Touched by every call on this device, so that several models are averaged in the order of the program, on all ranks."""
    with tf.init_scope(), tf.device(device):
        return tf.Variable(0, dtype=tf.int64, trainable=False)


def _on_one_device(call: Callable[[], None], parts: Sequence[tf.Variable], memory: TensorFlowMemory | None) -> None:
    """With the handles as inputs, TensorFlow orders all that touches these variables around the call."""
    handles = [part.handle for part in parts]

    def lend(*inputs: tf.Tensor) -> list[tf.Tensor]:
        lent = nullcontext(list[tf.Tensor]()) if memory is None else memory.lent(inputs[len(handles) :])
        with failures.remembered(), lent as changed:
            call()
        return changed

    if memory is None:
        tf.py_function(lend, handles, Tout=[])
        return

    changed = tf.py_function(lend, [*handles, *memory.expose()], Tout=memory.changed_dtypes)
    memory.put_back(changed if memory.changed_dtypes else [])


def _across_devices(call: Callable[[], None], parts: Sequence[tf.Variable], memory: TensorFlowMemory | None) -> None:
    """Handles on several devices cannot be inputs of one op.

    The old values order it after what came before; assigning what it returns orders it before what comes next.
    """

    def lend(*_: tf.Tensor) -> list[tf.Tensor]:
        with failures.remembered(), memory.lent([]) if memory is not None else nullcontext():
            call()
        return [part.read_value() for part in parts]

    with tf.device("/CPU:0"):
        values = tf.py_function(lend, [part.read_value() for part in parts], Tout=[part.dtype for part in parts])
    for part, value in zip(parts, values, strict=True):
        value.set_shape(part.shape)
        with tf.device(part.device):
            part.assign(value)


def _run_if(condition: tf.Tensor, action: Callable[[], None]) -> None:
    """``tf.cond`` without an alternative, at a cost that does not grow with the number of variables.

    TensorFlow replaces its own by a Switch for each input, and the inputs are all variables: a microsecond for each at
    every step, sync or not. This one is a single operation, which a function that spans devices could not be: the kernel's,
    if it has been built, or the one that runs a function in either case.
    """
    then = tf.function(action, autograph=False).get_concrete_function()
    if operations := kernel.load():
        operations.hvd_localsgd_run_if(condition=condition, input=then.captured_inputs, then=then)
        return
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in then.captured_inputs]
    # TensorFlow names its inputs after the argument, and complains of names that begin with an underscore.
    nothing = tf.function(lambda *inputs: None, autograph=False).get_concrete_function(*signature)
    tf.raw_ops.If(cond=condition, input=then.captured_inputs, Tout=[], then_branch=then, else_branch=nothing)
