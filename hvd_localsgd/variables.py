"""What is averaged: a fixed list of variables in a fixed order, and their memory.

The memory of CPU variables is read and written in place, without a copy of the model. That is safe because
``open`` first makes every buffer exclusive (TensorFlow copies it if a tensor that the user holds, or another
variable, shares it) and because no view outlives the ``with`` block. docs/performance.md tells the story.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_localsgd import build_kernel
from hvd_localsgd.communicators import Communicator

_PIECE = 1 << 20  # elements broadcast at a time
SMALL_BYTES = 64 << 10  # up to here a copy costs less than the operations that avoid it ...
MANY = 64  # ... if there are so many that they make up for a second call into TensorFlow


def of_model(model: keras.Model) -> list[keras.Variable]:
    """Trainable weights, and the float statistics that training changes (BatchNorm's moving mean and variance).

    Left alone: integers (counters, random seeds, which must differ by rank) and frozen weights, which
    nobody changes. Order: as the model lists them.
    """
    frozen = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables if not v.trainable}
    statistics = [v for v in model.non_trainable_variables if id(v) not in frozen]
    return floats([*model.trainable_variables, *statistics])


class State:
    """The optimizer's float state (momentum, moments), without rates, counters and moving averages of weights.

    Args:
        optimizer: a built Keras optimizer, or None for an empty state.
    """

    def __init__(self, optimizer: Any = None) -> None:
        inner = innermost(optimizer)
        own = optimizer.variables if optimizer is not None else []
        others = {id(v) for v in (*moving_averages(optimizer), *(getattr(inner, "_accumulated_gradients", None) or []))}
        self.variables = [v for v in floats(own) if id(v) not in others and len(v.shape) > 0]
        filled = getattr(inner, "_accumulators", [])  # Adagrad's and Ftrl's accumulators do not start at zero
        self._initial = {id(v): inner.initial_accumulator_value for v in filled}

    def reset(self) -> None:
        """What the optimizer starts with; its iterations and learning-rate schedule go on."""
        for variable in self.variables:
            for part in components(variable):
                part.assign(tf.fill(part.shape, tf.cast(self._initial.get(id(variable), 0.0), part.dtype)))


def moving_averages(optimizer: Any) -> list[Any]:
    """The moving averages of the weights that ``use_ema=True`` keeps (empty without)."""
    kept = getattr(innermost(optimizer), "_model_variables_moving_average", None) or []
    return [v for v in kept if v is not None]


def innermost(optimizer: Any) -> Any:
    """The optimizer inside all wrappers (loss scaling, ours)."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def broadcast(variables: Sequence[Any], communicator: Communicator) -> bool:
    """Rank 0's values to all ranks, any dtype, one variable at a time. Whether that changed any here."""
    changed = False
    for variable in variables:
        parts = components(variable)
        own = np.asarray(parts[0].read_value()._numpy()).reshape(-1)  # on a CPU its memory, to be read only
        value = None
        for start in range(0, own.size, _PIECE):
            stretch = slice(start, start + _PIECE)
            received = own[stretch].copy()
            communicator.broadcast(received)
            if received.tobytes() != own[stretch].tobytes():
                value = own.copy() if value is None else value
                value[stretch] = received
        del own
        if value is not None:
            changed = True
            for part in parts:
                part.assign(value.reshape(part.shape))
    return changed


def finish_device_work() -> None:
    """Wait until GPUs have done what they were given, so that the time that follows is counted to the next part."""
    if tf.config.list_logical_devices("GPU"):
        tf.test.experimental.sync_devices()


def exists(variable: Any) -> bool:
    """False for a variable that is made by a graph which has not run yet."""
    return all(np.shape(part.numpy()) == tuple(part.shape) for part in components(variable))


def floats(variables: Sequence[Any]) -> list[Any]:
    """Those of a floating dtype (bfloat16 included), each once, in order."""
    unique = {id(v): v for v in variables}
    return [v for v in unique.values() if tf.as_dtype(v.dtype).is_floating]


def components(variable: Any) -> list[tf.Variable]:
    """The TensorFlow variables behind a variable: one, or one per replica under a tf.distribute strategy."""
    inner = variable.value if isinstance(variable, keras.Variable) else variable
    values = getattr(inner, "values", None)
    return list(values) if isinstance(values, tuple | list) else [inner]


@dataclass(frozen=True, slots=True)
class Block:
    """What is averaged as one array: one variable, or all small ones of a dtype laid end to end."""

    members: list[int]
    size: int
    wire: np.dtype
    whole: bool  # one array of the dtype that travels: its memory can be the allreduce's buffer


class VariableSet:
    """A fixed list of variables in a fixed order.

    Args:
        variables: Keras or TensorFlow variables of floating dtype.
        as_memory: whether they are to be reached through ``open``; through ``flat`` otherwise.
    """

    def __init__(self, variables: Sequence[Any], as_memory: bool = True) -> None:
        self.variables = list(variables)
        self.components = [components(v) for v in self.variables]
        self.sizes = [int(np.prod(parts[0].shape)) for parts in self.components]
        self.elements = sum(self.sizes)
        doubles = [parts[0].dtype.base_dtype == tf.float64 for parts in self.components]
        self.wire_dtypes = [np.dtype(np.float64 if double else np.float32) for double in doubles]
        devices = {part.device for parts in self.components for part in parts}
        self._reachable = as_memory and len(devices) == 1 and all("CPU" in d.upper() or not d for d in devices)
        self._small = self._find_small()
        self._in_place = self._find_in_place()
        self.blocks = self._make_blocks()
        self._kernel = self._find_kernel()
        self._packed = [self._pack(block) for block in self._small]
        self._put_back_compiled = tf.function(lambda flats: self._put_back(flats, self._unpacked()), autograph=False)
        self._read_flat_compiled = tf.function(self.read_flat, autograph=False)
        self._assign_flat_compiled = tf.function(self.assign_flat, autograph=False)

    def smallest(self, among: int) -> tf.Variable | None:
        """The smallest of the first ``among`` variables."""
        candidates = [(size, i) for i, size in enumerate(self.sizes[:among]) if size]
        return self.components[min(candidates)[1]][0] if candidates else None

    def description(self) -> list[list[Any]]:
        """``[name, shape, dtype]`` of each, what all ranks must agree on.

        Names are without the numbers that Keras adds ("dense_3"): they count layers made, not layers used.
        """
        return [
            [re.sub(r"_\d+(?=[_/:]|$)", "", getattr(v, "path", v.name)), list(v.shape), tf.as_dtype(v.dtype).name]
            for v in self.variables
        ]

    # How each variable is reached: small ones together, others in place, the rest (``open`` says which) by copies.

    def _find_small(self) -> list[Block]:
        """Up to one block for each wire dtype. Never of one variable: a concatenation of one is that variable's memory."""
        blocks = []
        for wire, members in self._by_wire_dtype():
            small = [i for i in members if self._reachable and 0 < self.sizes[i] * wire.itemsize <= SMALL_BYTES]
            if len(small) > MANY:
                blocks.append(Block(small, sum(self.sizes[i] for i in small), wire, whole=True))
        return blocks

    def _find_in_place(self) -> list[int]:
        together = {i for block in self._small for i in block.members}
        return [
            i
            for i, parts in enumerate(self.components)
            if self._reachable and i not in together and parts[0].shape.rank and self.sizes[i]
        ]

    def _make_blocks(self) -> list[Block]:
        together = {i for block in self._small for i in block.members}
        return [
            *self._small,
            *(
                Block([i], self.sizes[i], wire, whole=len(parts) == 1 and parts[0].dtype.as_numpy_dtype == wire)
                for i, (parts, wire) in enumerate(zip(self.components, self.wire_dtypes, strict=True))
                if i not in together
            ),
        ]

    def _handle(self, i: int) -> tf.Tensor:
        return self.components[i][0].handle

    def _handles(self) -> list[list[tf.Tensor]]:
        """Of the variables in each of ``_small``."""
        return [[self._handle(i) for i in block.members] for block in self._small]

    def _pack(self, block: Block) -> tf.Tensor:
        """Many handles as one tensor: to pass each to a compiled function costs as much as a read or an assignment.

        For ``unstack`` each is there eight times: rows of a multiple of 64 bytes are taken out without copying them.
        """
        handles = tf.raw_ops.Pack(values=[self._handle(i) for i in block.members])
        return handles if self._kernel else tf.raw_ops.Pack(values=[handles] * 8, axis=1)

    def _unpacked(self) -> list[list[tf.Tensor]]:
        """For a compiled function: ``_handles`` from ``_packed``; the kernel takes them as they are."""
        return [[packed] if self._kernel else tf.unstack(packed) for packed in self._packed]

    def _find_kernel(self) -> Any:
        """The compiled kernel for small variables, if it is of use here and has been built."""
        dtypes = {self._dtype(i) for block in self._small for i in block.members}
        return build_kernel.load() if dtypes and dtypes <= set(build_kernel.DTYPES) else None

    def expose(self) -> list[tf.Tensor]:
        """For a graph, before the average: what ``open`` needs. The first ``len(self.small_dtypes)`` go to ``put_back``."""
        return self._expose(self._handles())

    def put_back(self, flats: Sequence[tf.Tensor]) -> None:
        """For a graph, after the average: assign the small variables."""
        self._put_back(flats, self._handles())

    @property
    def small_dtypes(self) -> list[tf.DType]:
        """Of the tensors that go from ``expose`` to ``put_back``."""
        return [tf.as_dtype(block.wire) for block in self._small]

    @cached_property
    def _expose_compiled(self) -> Callable[[], list[tf.Tensor]]:
        function = tf.function(lambda: self._expose(self._unpacked()), autograph=False)
        return function.get_concrete_function()  # its calls do not look at their arguments, of which there are none

    def _expose(self, small: Sequence[Sequence[tf.Tensor]]) -> list[tf.Tensor]:
        """Small variables copied into one fresh tensor; for the others, tensors that *are* their memory.

        That memory must be the variable's alone. An empty slice assignment makes TensorFlow copy a shared buffer,
        as it does before any update in place; it also turns on copy-on-read, which is turned off again so that reads
        stay free.
        """
        tensors = [self._read_small(block, handles) for block, handles in zip(self._small, small, strict=True)]
        zero, one = tf.constant([0]), tf.constant([1])
        for i in self._in_place:
            nothing = tf.constant(np.empty((0, *self._shape(i)[1:]), self._dtype(i).as_numpy_dtype))
            tf.raw_ops.ResourceStridedSliceAssign(ref=self._handle(i), begin=zero, end=zero, strides=one, value=nothing)
            tf.raw_ops.DisableCopyOnRead(resource=self._handle(i))
            tensors.append(tf.raw_ops.ReadVariableOp(resource=self._handle(i), dtype=self._dtype(i)))
        return tensors

    def _read_small(self, block: Block, handles: Sequence[tf.Tensor]) -> tf.Tensor:
        if self._kernel:
            return self._kernel.hvd_localsgd_read_variables(handles=handles, T=block.wire, size=block.size)
        return tf.concat(
            [self._read_one(handle, i, block.wire) for handle, i in zip(handles, block.members, strict=True)], 0
        )

    def _read_one(self, handle: tf.Tensor, i: int, wire: np.dtype) -> tf.Tensor:
        # As few operations as possible: there may be thousands of these.
        value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=self._dtype(i))
        value.set_shape(self._shape(i))
        return tf.cast(value if value.shape.rank == 1 else tf.reshape(value, [-1]), wire)

    def _put_back(self, flats: Sequence[tf.Tensor], small: Sequence[Sequence[tf.Tensor]]) -> None:
        for block, flat, handles in zip(self._small, flats, small, strict=True):
            self._write_small(block, flat, handles)

    def _write_small(self, block: Block, flat: tf.Tensor, handles: Sequence[tf.Tensor]) -> None:
        if self._kernel:
            self._kernel.hvd_localsgd_write_variables(handles=handles, flat=flat)
            return
        pieces = tf.split(flat, [self.sizes[i] for i in block.members])
        for i, handle, piece in zip(block.members, handles, pieces, strict=True):
            value = piece if len(self._shape(i)) == 1 else tf.reshape(piece, self._shape(i))
            tf.raw_ops.AssignVariableOp(resource=handle, value=tf.cast(value, self._dtype(i)))

    @contextmanager
    def open(self, exposed: Sequence[tf.Tensor] | None = None) -> Iterator[list[list[np.ndarray]]]:
        """Per block, one flat array per component, to read and to write. Writes count when the ``with`` block ends.

        Large CPU variables are seen in place. GPU memory, scalars and replicas are copied out here, assigned at the end.

        Args:
            exposed: from inside a graph, what ``expose`` gave there, and then ``put_back`` is the graph's to do.
        """
        compiled = exposed is None
        tensors = list(self._expose_compiled() if exposed is None else exposed)
        del exposed
        reached = [*(block.members[0] for block in self._small), *self._in_place]
        memory = {i: [tensor._numpy().reshape(-1)] for i, tensor in zip(reached, tensors, strict=True)}
        staged = [i for block in self.blocks for i in block.members[:1] if i not in memory]
        memory |= {i: [np.array(part.numpy()).reshape(-1) for part in self.components[i]] for i in staged}
        arrays = [memory[block.members[0]] for block in self.blocks]
        try:
            yield arrays
        finally:
            for i in staged:
                for part, copy in zip(self.components[i], memory[i], strict=True):
                    part.assign(copy.reshape(part.shape))
            # A view that lives on would make TensorFlow copy the variable at its next update.
            memory.clear()
            for row in arrays:
                row.clear()
            if compiled and self._small:
                self._put_back_compiled(tensors[: len(self._small)])
            tensors.clear()

    def _shape(self, i: int) -> tuple[int, ...]:
        return tuple(self.components[i][0].shape)

    def _dtype(self, i: int) -> tf.DType:
        return self.components[i][0].dtype

    # The same for a communicator that takes tensors: one flat tensor per wire dtype, on the variables' device.

    def flat(self, compiled: bool) -> list[tf.Tensor]:
        """All values end to end; replicas inside this rank (tf.distribute) count as their mean.

        Args:
            compiled: False inside a graph that is running, where a compiled function could wait for ever.
        """
        return self._read_flat_compiled() if compiled else self.read_flat()

    def assign(self, flats: Sequence[tf.Tensor], compiled: bool) -> tf.Tensor:
        """The inverse of ``flat``, on every replica. Returns the squared distance from the values before, float64."""
        return (self._assign_flat_compiled if compiled else self.assign_flat)(list(flats))

    def read_flat(self) -> list[tf.Tensor]:
        """``flat``, traceable."""
        flats = []
        for wire, members in self._by_wire_dtype():
            values = [tf.add_n([tf.cast(part, wire) for part in self.components[i]]) for i in members]
            counts = [len(self.components[i]) for i in members]
            flats.append(tf.concat([tf.reshape(v, [-1]) / n for v, n in zip(values, counts, strict=True)], 0))
        return flats

    def assign_flat(self, flats: list[tf.Tensor]) -> tf.Tensor:
        """``assign``, traceable."""
        distance = tf.zeros([], tf.float64)
        for (wire, members), flat in zip(self._by_wire_dtype(), flats, strict=True):
            for i, piece in zip(members, tf.split(flat, [self.sizes[i] for i in members]), strict=True):
                value = tf.reshape(piece, self.components[i][0].shape)
                gap = tf.cast(self.components[i][0], wire) - value
                distance += tf.cast(tf.reduce_sum(gap * gap), tf.float64)
                for part in self.components[i]:
                    part.assign(tf.cast(value, part.dtype))
        return distance

    def _by_wire_dtype(self) -> list[tuple[np.dtype, list[int]]]:
        kinds = (np.dtype(np.float32), np.dtype(np.float64))
        groups = [(kind, [i for i, dtype in enumerate(self.wire_dtypes) if dtype == kind]) for kind in kinds]
        return [(kind, members) for kind, members in groups if members]
