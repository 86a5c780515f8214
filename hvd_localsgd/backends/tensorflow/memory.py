"""TensorFlow's variables as memory: each is reached in one of three ways, which this file deals out and puts together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hvd_localsgd.backends.tensorflow import together
from hvd_localsgd.backends.tensorflow.in_place import InPlace
from hvd_localsgd.backends.tensorflow.tensors import Tensors
from hvd_localsgd.backends.tensorflow.together import Together
from hvd_localsgd.backends.tensorflow.variables import Part, components, describe, finish_device_work
from hvd_localsgd.core import agreement
from hvd_localsgd.core.layout import Array, Block, Kind


class Way(Protocol):
    """How some of the variables are reached."""

    @property
    def blocks(self) -> Sequence[Block]:
        """What they are averaged as."""

    @property
    def writes(self) -> bool:
        """Whether there is anything to do after the average."""

    @property
    def parts(self) -> Sequence[Part]:
        """The variables, as they lie in the blocks."""

    def read(self, packed: bool) -> list[tf.Tensor]:
        """A tensor for each block. Traceable; ``packed`` outside of a graph of the user's."""

    def array(self, tensor: tf.Tensor) -> Array:
        """What the average changes, of a tensor that ``read`` gave."""

    def write(self, tensors: Sequence[tf.Tensor], packed: bool) -> None:
        """The average, back into the variables. Traceable."""


class TensorFlowMemory:
    """A ``core.pipeline.Memory`` of TensorFlow or Keras variables.

    Args:
        averaged: what is averaged, of floating dtype.
        kinds: by ``id``, of those that are not ordinary weights, what they are; each kind has blocks of its own.
        tensors: all as one flat tensor per dtype, as if none could be reached in place.
        on_device: such tensors are not brought to the host: the communicator takes them.
    """

    def __init__(
        self,
        averaged: Sequence[Any],
        kinds: Mapping[int, Kind] = MappingProxyType({}),
        *,
        tensors: bool = False,
        on_device: bool = False,
    ) -> None:
        self.variables = list(averaged)
        self.prepare((), lambda: None)
        self._on_device = on_device
        parts = [Part(variable) for variable in averaged]
        self._probe = min((part for part in parts if part.size), key=lambda part: part.size, default=None)
        own = [kinds.get(id(variable), Kind()) for variable in averaged]
        self._ways, self.blocks = list[Way](), list[Block]()
        for kind in sorted(set(own)):
            alike = [part for part, each in zip(parts, own, strict=True) if each == kind]
            ways = _ways(alike, tensors or on_device, on_device)
            self._ways += ways
            self.blocks += [replace(block, kind=kind) for way in ways for block in way.blocks]
        self._lent: Sequence[tf.Tensor] | None = None
        self._write_compiled = tf.function(lambda tensors: self._write(tensors, packed=True), autograph=False)

    @property
    def uses_kernel(self) -> bool:
        """Whether the compiled kernel reads and writes small variables here."""
        return any(isinstance(way, Together) and way.uses_kernel for way in self._ways)

    def prepare(
        self,
        start: Sequence[Any],
        reset_state: Callable[[], None],
        statistics: Sequence[Any] = (),
        restart: Callable[[], None] = lambda: None,
        own: Sequence[Any] = (),
    ) -> None:
        """For a training that is about to begin.

        Args:
            start: what all ranks get from rank 0, any dtype.
            reset_state: what ``optimizer_state="reset"`` does.
            restart: makes this rank's optimizer start anew.
            statistics: what a rank gets from rank 0 only if other values changed: its first step has updated them already.
            own: of ``start``, what ranks that are equally far keep: an optimizer's state that is not averaged.
        """
        self._own = set(map(id, own))
        self._start, self._reset_state, self._statistics = list(start), reset_state, list(statistics)
        self._constrained = [each for each in self.variables if getattr(each, "constraint", None) is not None]
        self.restart = restart

    def holds(self, averaged: Sequence[Any]) -> bool:
        """Whether it was made for these variables."""
        return list(map(id, averaged)) == list(map(id, self.variables))

    def clear(self, arrays: list[Array]) -> None:
        """A tensor, where it is, instead of a tensor."""
        for number, array in enumerate(arrays):
            if isinstance(array, np.ndarray):
                array[:] = 0
            else:
                arrays[number] = tf.zeros_like(array)

    def settle(self, world: bool) -> None:
        """State as it was prepared; constraints, which a mean of weights that obey them need not obey."""
        if world:
            self._reset_state()
        if not self._lent:  # else what is assigned here is written over by the graph, which does it itself
            self._constrain()

    def _constrain(self) -> None:
        for variable in self._constrained:
            variable.assign(variable.constraint(variable))

    def place(self, variable: Any) -> tuple[int, int, int]:
        """Block, start, stop; nothing, of no block, if it is empty."""
        block = 0
        for way in self._ways:
            start = 0
            for number, part in enumerate(way.parts):
                own = len(way.blocks) == len(way.parts) and len(way.parts) > 1
                if part.variable is variable:
                    begin = 0 if own else start
                    return block + (number if own else 0), begin, begin + part.size
                start += part.size
            block += len(way.blocks)
        return 0, 0, 0

    def name(self, block: int, element: int) -> str:
        """As Keras shows it."""
        owners = self._owners()
        before = owners[:block].count(owners[block])  # blocks of the same way: one each, or one for all
        parts = list(owners[block].parts)
        if len(owners[block].blocks) == len(parts):
            return parts[before].name
        ends = np.cumsum([part.size for part in parts])
        return parts[int(np.searchsorted(ends, element, side="right"))].name

    def description(self) -> list[list[Any]]:
        """Of what is averaged, then of what all ranks start with."""
        return [describe(variable) for variable in [*self.variables, *self._start, *self._statistics]]

    def broadcast(self, communicator: Any, as_far: bool = False) -> bool:
        """One variable at a time; or, if a rank may die meanwhile, all or none."""
        averaged, moved = set(map(id, self.variables)), False
        received: list[tuple[Any, np.ndarray]] = []
        for number, variable in enumerate([*self._start, *self._statistics]):
            if as_far and id(variable) in self._own:
                continue
            parts = components(variable)
            own = np.asarray(parts[0].read_value()._numpy()).reshape(-1)  # on a CPU its memory, to be read only
            value = agreement.from_rank_0(own, communicator)
            del own
            if value is not None and (moved or number < len(self._start)):
                moved |= id(variable) in averaged
                received += [(part, value.reshape(part.shape)) for part in parts]
            if not communicator.resilient:
                _take(received)
        _take(received)
        return moved

    def is_finite(self) -> bool:
        """The smallest."""
        if self._probe is None:
            return True
        part = self._probe
        value = tf.raw_ops.ReadVariableOp(resource=part.handle, dtype=part.dtype)  # .numpy() takes three times as long
        return bool(np.isfinite(value._numpy().astype(np.float32)).all())

    # From Python: two calls into TensorFlow, or one if all is in place.

    @contextmanager
    def open(self) -> Iterator[list[Array]]:
        """The variables' own memory where it can be reached, and copies, which are assigned at the end."""
        lent = self._lent
        tensors = list(self._read_compiled() if lent is None else lent or self._read(packed=False))
        owners = self._owners()
        if self._on_device:
            finish_device_work()
        arrays = [way.array(tensor) for way, tensor in zip(owners, tensors, strict=True)]
        try:
            yield arrays
        finally:
            for number, (way, array) in enumerate(zip(owners, arrays, strict=True)):
                if way.writes and not isinstance(way, Together):
                    tensors[number] = tf.convert_to_tensor(array)
            # A view that lives on would make TensorFlow copy the variable at its next update.
            arrays.clear()
            if lent:
                self._lent = tensors
            elif written := self._written(tensors):
                (self._write_compiled(written) if lent is None else self._write(written, packed=False))

    def _written(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [tensor for way, tensor in zip(self._owners(), tensors, strict=False) if way.writes]

    def copy(self) -> list[np.ndarray]:
        """What is averaged, an array for each block."""
        with self.open() as arrays:
            return [np.array(array) for array in arrays]

    def restore(self, values: Sequence[np.ndarray]) -> None:
        """The inverse."""
        with self.open() as arrays:
            for number, value in enumerate(values):
                if isinstance(arrays[number], np.ndarray):
                    arrays[number][:] = value
                else:
                    arrays[number] = value

    @cached_property
    def _read_compiled(self) -> Callable[[], list[tf.Tensor]]:
        function = tf.function(lambda: self._read(packed=True), autograph=False)
        return function.get_concrete_function()  # its calls do not look at their arguments, of which there are none

    def _read(self, packed: bool) -> list[tf.Tensor]:
        return [tensor for way in self._ways for tensor in way.read(packed)]

    def _write(self, tensors: Sequence[tf.Tensor], packed: bool) -> None:
        remaining = iter(tensors)
        for way in self._ways:
            if way.writes:
                way.write(list(islice(remaining, len(way.blocks))), packed)

    # From inside a graph of the user's: it reads before, and writes after. In between nothing may call a compiled function.

    @contextmanager
    def lent(self, tensors: Sequence[tf.Tensor]) -> Iterator[list[tf.Tensor]]:
        """Inside the ``with`` block ``open`` takes these tensors, which ``expose`` gave to the graph, instead of reading.

        Args:
            tensors: none: they are read and written right there, operation by operation.

        Yields:
            A list that afterwards holds what ``put_back`` takes.
        """
        self._lent = tensors
        changed: list[tf.Tensor] = []
        try:
            yield changed
        finally:
            changed += self._written(self._lent)
            self._lent = None

    def _owners(self) -> list[Way]:
        return [way for way in self._ways for _ in way.blocks]

    def expose(self) -> list[tf.Tensor]:
        """For a graph, before the average: what ``lent`` needs. Nothing, where tensors have to stay on their device."""
        return [] if self._on_device else self._read(packed=False)

    def put_back(self, changed: Sequence[tf.Tensor]) -> None:
        """For a graph, after the average."""
        if changed:
            self._write(changed, packed=False)
        self._constrain()

    @property
    def changed_dtypes(self) -> list[tf.DType]:
        """Of what goes to ``put_back``."""
        return [] if self._on_device else [tf.as_dtype(b.wire) for way in self._ways if way.writes for b in way.blocks]


def _take(received: list[tuple[Any, np.ndarray]]) -> None:
    for part, value in received:
        part.assign(value)
    received.clear()


def _ways(parts: Sequence[Part], tensors: bool, on_device: bool) -> list[Way]:
    """Small ones together where there are many, large ones in place, the rest as tensors; nothing for empty ones."""
    devices = {component.device for part in parts for component in part.components}
    reachable = not tensors and len(devices) == 1 and all("CPU" in d.upper() or not d for d in devices)
    remaining = [part for part in parts if part.size]
    ways: list[Way] = []
    if reachable:
        for wire in (np.dtype(np.float32), np.dtype(np.float64)):
            small = [p for p in remaining if p.wire == wire and p.size * wire.itemsize <= together.SMALL_BYTES]
            if len(small) > together.MANY:
                ways.append(Together(small))
                taken = set(map(id, small))
                remaining = [part for part in remaining if id(part) not in taken]
        if large := [part for part in remaining if part.shape]:
            ways.append(InPlace(large))
            remaining = [part for part in remaining if not part.shape]
    for wire in (np.dtype(np.float32), np.dtype(np.float64)):
        if rest := [part for part in remaining if part.wire == wire]:
            ways.append(Tensors(rest, on_device))
    return ways
